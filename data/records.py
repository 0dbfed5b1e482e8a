"""What runs and searches leave, read and written in one place, and how reliable a ranking is."""

import csv
import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median, stdev

import numpy as np
import torch

from utils import UserError, atomic_write

METRICS = ["epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds"]
BASELINE = -1  # the generation of the single-block networks


def parse_choice(text: str) -> tuple[int, ...]:
    """The numbers of a choice like 1-0-3-...; raises ValueError for another text."""
    if not re.fullmatch(r"\d+(-\d+)*", text):
        raise ValueError("it is neither a choice like 1-0-3-... nor an existing file")
    return tuple(map(int, text.split("-")))


def format_choice(choice: Sequence[int]) -> str:
    """A choice as it is written in files and commands: 1-0-3-..."""
    return "-".join(map(str, choice))


@dataclass
class Scored:
    """An architecture and, once it is scored, its scores and costs: one row of paths.csv.

    index counts within its generation, which is BASELINE, 0 (random draws) or 1, 2, ... (children).
    Accuracies are in percent, the loss is the mean cross-entropy, half_*: both on a random half of
    the images. Costs are in millions.
    """

    index: int
    choice: tuple[int, ...]
    accuracy: float = math.nan
    half_accuracy: float = math.nan
    loss: float = math.nan
    half_loss: float = math.nan
    flops_m: float = math.nan
    params_m: float = math.nan
    generation: int = 0

    def as_json(self) -> dict:
        """The columns by name, with the choice as text."""
        return asdict(self) | {"choice": format_choice(self.choice)}


def read_rows(path: Path) -> list[Scored]:
    """The rows of a paths.csv, by generation and index; raises UserError if it is not one."""
    kinds = {field.name: field.type for field in fields(Scored)} | {"choice": parse_choice}
    rows, known = [], set()
    for line, cells in read_csv(path, list(kinds)):
        try:
            row = Scored(**{name: kind(cells[name]) for name, kind in kinds.items()})
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {line}: not a row of that table; delete it") from None
        if (row.generation, row.choice) in known:
            raise UserError(f"{path}, line {line}: repeats an earlier row; delete one of the two")
        known.add((row.generation, row.choice))
        rows.append(row)
    return sorted(rows, key=lambda row: (row.generation, row.index))


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.csv, with None where there was no validation."""
    rows = [cells for _, cells in read_csv(path, METRICS)]
    return [{name: float(row[name]) if row[name] else None for name in METRICS} for row in rows]


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Writes a whole table with the columns of its first row; None becomes an empty cell."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table and their lines; raises UserError if it lacks a column."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a BOM
        reader = csv.DictReader(file)
        names, rows = reader.fieldnames or [], [(reader.line_num, row) for row in reader]
    if missing := [name for name in columns if name not in names]:
        raise UserError(f"{path} is another table: it has no column {missing[0]}")
    return rows


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes plain data and tensors; a kill at any moment leaves the old file or the new one."""
    buffer = io.BytesIO()  # torch.save itself reports a full disk as a RuntimeError of its own
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict:
    """A checkpoint, on the CPU, with path and SHA-256 of its file; UserError for other files."""
    file = path.read_bytes()  # once: a training that goes on may replace it between two reads
    try:
        content = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
        if missing := {"model", "args", "data", "epoch"} - content.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except Exception as error:  # torch.load raises almost anything on a file of another kind
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
        raise UserError(f"{path} is damaged or no checkpoint of supernet.py ({reason})") from None
    return content | {"path": str(path), "sha256": hashlib.sha256(file).hexdigest()}


def best_first(rows: Sequence[Scored], by: str) -> list[Scored]:
    """Finite scores by "accuracy" or "loss", then by the other, then by age; no baselines.

    Each architecture once: a child may repeat a random draw.
    """

    def key(row: Scored) -> tuple:
        scores = -row.accuracy, row.loss
        return scores if by == "accuracy" else scores[::-1], row.generation, row.index

    ranked = [row for row in rows if row.generation != BASELINE and math.isfinite(row.loss)]
    distinct: dict[tuple[int, ...], Scored] = {}
    for row in sorted(ranked, key=key):
        distinct.setdefault(row.choice, row)
    return list(distinct.values())


def asked_for(rows: Sequence[Scored], num_paths: float, generations: float) -> list[Scored]:
    """The rows of a search of that size; its record may hold more, of an earlier command."""
    rows = [row for row in rows if row.generation <= generations]
    return [row for row in rows if row.generation != 0 or row.index < num_paths]


def evolution_rows(rows: Sequence[Scored], population: int) -> list[Scored]:
    """The rows that belong to evolution: the first random draws and all children."""
    return [r for r in rows if r.generation > 0 or (r.generation == 0 and r.index < population)]


def standard_error(accuracy: float, images: int) -> float:
    """Binomial standard error, in percent, of an accuracy in percent on so many images."""
    return math.sqrt(max(accuracy * (100 - accuracy), 0) / images)


def statistics(rows: Sequence[Scored], images: int) -> dict:
    """Summary of the random draws, accuracies in percent; None where a number is not defined."""
    drawn = best_first([row for row in rows if row.generation == 0], "accuracy")
    accuracies = [row.accuracy for row in drawn]
    trust, noise = reliability(drawn, "accuracy")
    return {
        "paths": len(drawn),
        "undefined": sum(not math.isfinite(row.loss) for row in rows),
        "images": images,
        "best": accuracies[0],
        "median": median(accuracies),
        "worst": accuracies[-1],
        "spread": stdev(accuracies) if len(accuracies) > 1 else None,
        "reliability": trust,
        "noise": noise,
        "loss_reliability": reliability(drawn, "loss")[0],
    }


def reliability(rows: Sequence[Scored], by: str) -> tuple[float | None, float | None]:
    """How reliable a ranking by "accuracy" or "loss" is, and the sampling noise of the scores.

    The reliability is the correlation r of the scores on the two halves of the images, corrected to
    all of them as 2r / (1 + r) (Spearman and Brown, 1910). The noise, in the units of the scores,
    is their standard deviation times sqrt(1 - reliability). Both are None for fewer than 10 paths,
    for scores without spread and for r < 0.
    """
    whole, first = (np.array([getattr(row, name) for row in rows]) for name in (by, f"half_{by}"))
    second = 2 * whole - first
    spread = min(first.std(), second.std(), whole.std())
    if len(rows) < 10 or not spread > 1e-6 * abs(whole.mean()):  # not of rounding alone
        return None, None
    r = np.corrcoef(first, second)[0, 1]
    if r < 0:
        return None, None
    trust = 2 * r / (1 + r)
    return float(trust), float(whole.std(ddof=1) * math.sqrt(1 - trust))


def kendall(first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Kendall's tau-b, nan if one is constant; with groups, of the pairs within the same group."""
    counted = 1 if groups is None else np.equal.outer(groups, groups)
    a, b = (np.sign(np.subtract.outer(v, v)) * counted for v in (first, second))
    with np.errstate(invalid="ignore"):
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def kendall_interval(a: np.ndarray, b: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The middle 95% of Kendall's tau over bootstrap samples of the pairs."""
    samples = np.random.default_rng(0).integers(len(a), size=(draws, len(a)))
    taus = [kendall(a[sample], b[sample]) for sample in samples]
    return tuple(np.nanpercentile(taus, [2.5, 97.5]))
