"""The tables that runs and searches leave, read and written in one place, and what a ranking in them is worth."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from utils import UserError, replacing

METRICS = ["epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds"]  # of metrics.csv
BASELINE = -1  # the generation of the single-block networks


def parse_choice(text: str) -> tuple[int, ...]:
    """The numbers of a choice that is written as 1-0-3-...; raises ValueError."""
    return tuple(map(int, text.split("-")))


def format_choice(choice: Sequence[int]) -> str:
    """A choice as it is written in files and commands: 1-0-3-..."""
    return "-".join(map(str, choice))


@dataclass
class Row:
    """An architecture and, once it is scored, its scores and costs: one line of paths.csv.

    index counts within a generation: BASELINE, 0 for random draws, 1, 2, ... for evolution. Accuracies are in percent,
    the loss is the mean cross-entropy, half_*: both on the first half of the images. Costs are in millions.
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


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a whole paths.csv."""
    cells = [asdict(row) | {"choice": format_choice(row.choice)} for row in rows]
    write_csv(path, cells, [field.name for field in fields(Row)])


def read_rows(path: Path, check: Callable[[tuple[int, ...]], object] = tuple) -> list[Row]:
    """The rows of a paths.csv, by generation and index; raises UserError, with the line, for anything that is not one.

    check: raises ValueError for a choice that is not in the space. A table of before the loss on half of the images was
    recorded has nan there.
    """
    kinds = {field.name: parse_choice if field.name == "choice" else field.type for field in fields(Row)}
    rows, lines = [], {}
    for line, cells in read_csv(path, [name for name in kinds if name != "half_loss"]):
        try:
            row = Row(**{name: kind(cells.get(name, "nan")) for name, kind in kinds.items()})
            check(row.choice)
            possible = row.index >= 0 and row.generation >= BASELINE and not (row.loss < 0 or row.half_loss < 0)
            possible &= all(0 <= accuracy <= 100 for accuracy in (row.accuracy, row.half_accuracy))
            possible &= all(0 < cost < math.inf for cost in (row.flops_m, row.params_m))
            if None in cells or not possible:
                raise ValueError
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {line}: not a row of that table; mend or delete the line") from None
        for key in ((row.generation, row.index), (row.generation, row.choice)):
            if key in lines:
                raise UserError(f"{path}, line {line}: repeats line {lines[key]}; delete one of the two")
            lines[key] = line
        rows.append(row)
    return sorted(rows, key=lambda row: (row.generation, row.index))


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.csv, with None where there was no validation; raises UserError if it is not one."""
    rows = []
    for line, cells in read_csv(path, METRICS):
        try:
            rows.append({name: float(cell) if cell else None for name, cell in cells.items()})
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {line}: not a row of that table; mend or delete the line") from None
    return rows


def write_csv(path: Path, rows: Sequence[dict], columns: Sequence[str]) -> None:
    """Writes a whole table; None becomes an empty cell."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table that has at least these columns, with their lines; raises UserError if it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte-order mark first
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (UnicodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV table in UTF-8 ({error})") from None
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two columns of the same name")
    if missing := [name for name in columns if name not in names]:
        raise UserError(f"{path} is another table: it has no column {missing[0]}")
    return rows


def best_first(rows: Sequence[Row], by: str) -> list[Row]:
    """Rows by "accuracy" or "loss", then by the other, then by age; baselines and undefined scores are left out."""

    def key(row: Row) -> tuple:
        scores = -row.accuracy, row.loss
        return scores if by == "accuracy" else scores[::-1], row.generation, row.index

    return sorted((row for row in rows if row.generation != BASELINE and math.isfinite(row.loss)), key=key)


def evolving(rows: Sequence[Row], population: int) -> list[Row]:
    """The rows that evolution counts as its own: the first random draws and all children."""
    return [row for row in rows if row.generation > 0 or (row.generation == 0 and row.index < population)]


def reliability(rows: Sequence[Row], by: str = "accuracy") -> tuple[float | None, float | None]:
    """How far a ranking by "accuracy" or "loss" can be trusted, and the noise of the images within it, in its units.

    The reliability is the correlation r of the scores on the two halves of the images, stepped up to all of them as
    2r / (1 + r) (Spearman and Brown, 1910); the noise is the spread times sqrt(1 - reliability). Both are None with
    fewer than 10 paths, without spread, and if r is negative.
    """
    whole, first = (np.array([getattr(row, name) for row in rows]) for name in (by, f"half_{by}"))
    second = 2 * whole - first
    if len(rows) < 10 or not min(first.std(), second.std(), whole.std()) > 0:
        return None, None
    r = np.corrcoef(first, second)[0, 1]
    if r < 0:
        return None, None
    trust = 2 * r / (1 + r)
    return float(trust), float(whole.std(ddof=1) * math.sqrt(1 - trust))


def kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b, the rank correlation that corrects for ties; nan if one of them is constant."""
    a, b = (np.sign(np.subtract.outer(values, values)) for values in (first, second))
    with np.errstate(invalid="ignore"):
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def kendall_interval(first: np.ndarray, second: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The middle 95% of Kendall's tau over bootstrap samples of the pairs."""
    samples = np.random.default_rng(0).integers(len(first), size=(draws, len(first)))
    return tuple(np.nanpercentile([kendall(first[sample], second[sample]) for sample in samples], [2.5, 97.5]))
