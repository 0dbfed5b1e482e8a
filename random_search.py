"""Scores architectures with a trained supernet's weights, each with BatchNorm statistics of its own.

Guo et al., arXiv 1904.00420, section 3.3: before a path is scored, BatchNorm's statistics are recomputed for it on
training images. Paths that begin alike share that work. Random search, and with --generations evolution beside it.
"""

import argparse
import math
import random
import shlex
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import median, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.datasets import IMAGE_SIZES, calibration_images, load_dataset
from data.loaders import Batches
from img.plots import evolving, plot_search, ranking
from model import NAMES, SINGLE_BLOCK_PATHS, Choice, Supernet, parse_choice
from utils import (
    SEARCH_FILES,
    UserError,
    append_csv,
    autocast,
    delete_files,
    describe_device,
    duration,
    gather,
    load_supernet,
    log,
    make_folder,
    memory_format,
    new_parser,
    newest_supernet,
    number,
    on_first,
    open_log,
    pick_device,
    pick_precision,
    rank,
    ranks,
    read_json,
    recover_csv,
    refuse_changes,
    run_script,
    standard_error,
    stream,
    write_json,
)

COLUMNS = {"index": int, "choice": str, "accuracy": float, "half_accuracy": float, "loss": float}
COLUMNS |= {"half_loss": float, "flops_m": float, "params_m": float, "generation": int}
CALIBRATION_BATCH = 250  # a constant: the mean over batches of their variances depends on it
GROUP = 50  # paths that are scored together and recorded together
CONTROL = -1  # the generation of the four single-block networks
EVOLUTION = "population", "parents", "mutation_prob", "rank_by"


def build_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    parser = new_parser(__doc__.splitlines()[0], data_dir=None)
    add = parser.add_argument
    add("--ckpt", nargs="?", help="the supernet's last.pth; the newest of runs/*/ if there is no value")
    add("--search_dir", help="where the results go (default: search/ beside the checkpoint)")
    add("--num_paths", type=number(int, 1), default=1000, help="random architectures to score")
    add("--calibration_images", type=number(int, 0), default=2000, help="training images for BatchNorm; 0: none")
    add(
        "--batch_size",
        type=number(int, 1),
        help="images a step when scoring; changes no score (default: 250; CUDA: 1000)",
    )
    add("--min_flops", type=number(float, 0), help="smallest architecture, in millions of multiply-adds")
    add("--max_flops", type=number(float, 0), help="largest architecture, in millions of multiply-adds")
    add("--generations", type=number(int, 0), default=0, help="of evolution, which begins with the first random paths")
    add("--population", type=number(int, 2), default=50, help="architectures of a generation")
    add("--parents", type=number(int, 2), default=10, help="best architectures so far, from which a generation is bred")
    add("--mutation_prob", type=number(float, 0, 1), default=0.1, help="of each layer of a mutated child")
    add("--top_k", type=number(int, 1), default=10, help="best architectures that are measured on the test images")
    add("--rank_by", choices=("loss", "accuracy"), default="loss", help="what makes an architecture the better one")
    add("--split", choices=("search", "test"), default="search", help="images that score; test is biased, see README")
    add("--overwrite", action="store_true", help="delete what an earlier search left, and begin anew")
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The search's settings; a generation that could not be bred is a usage error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.generations and not args.parents <= args.population <= args.num_paths:
        parser.error("evolution needs --parents at most --population, and that at most --num_paths")
    return args


# For each node of the tree of paths, mean and variance of every BatchNorm in it.
Statistics = dict[tuple, list[tuple[Tensor, Tensor]]]


class Scorer:
    """Scores paths of a supernet, each with BatchNorm statistics computed for it on the calibration images.

    calibration: None scores with the statistics that the supernet brings.
    """

    def __init__(self, model: Supernet, calibration: Batches | None, scored: Batches, precision: str = "fp32"):
        self.model, self.calibration, self.scored, self.precision = model, calibration, scored, precision
        blocks = [block for layer in model.layers for block in layer.values()]
        self.norms = {
            module: [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
            for module in (model.stem, *blocks, model.last)
        }
        images = len(scored.labels)
        shuffled = random.Random("halves").sample(range(images), images)
        self.first_half = torch.zeros(images, dtype=torch.bool, device=scored.device)
        self.first_half[shuffled[: images // 2]] = True

    def score(self, choices: Sequence[Choice]) -> list[tuple[float, ...]]:
        """Of each path (accuracy, the same on the first half, loss, the same), accuracies in percent; sort the choices.

        The loss is the mean cross-entropy.
        """
        with torch.inference_mode(), autocast(self.precision, self.scored.device):
            return self._evaluate(choices, self.calibrate(choices) if self.calibration is not None else None)

    def calibrate(self, choices: Sequence[Choice]) -> Statistics:
        """BatchNorm's statistics for each path, by the keys of Supernet.walk.

        They are those that torch.optim.swa_utils.update_bn gives a path alone, the plain mean over the batches of each
        batch's mean and unbiased variance. Those of a module depend on the path up to it and no further, so paths that
        begin alike share them, and the work if they are neighbours.
        """
        statistics: Statistics = {}
        self.model.train()
        for i, (x, _) in enumerate(self.calibration, start=1):
            for norm in chain(*self.norms.values()):
                norm.momentum = 1 / i  # makes the running statistics the mean of all batches so far
            for _ in self.model.walk(x, choices, lambda module, key: self._enter(module, key, statistics)):
                pass
        return statistics

    def _enter(self, module: nn.Module, key: tuple, statistics: Statistics) -> None:
        norms = self.norms[module]
        if key not in statistics:
            statistics[key] = [(torch.zeros_like(n.running_mean), torch.zeros_like(n.running_var)) for n in norms]
        for norm, (mean, var) in zip(norms, statistics[key], strict=True):
            norm.running_mean, norm.running_var = mean, var

    def _evaluate(self, choices: Sequence[Choice], statistics: Statistics | None) -> list[tuple[float, ...]]:
        def enter(module: nn.Module, key: tuple) -> None:
            if statistics is not None:
                self._enter(module, key, statistics)

        self.model.eval()
        sums, start = [], 0
        for x, y in self.scored:
            logits = torch.stack([self.model.head(features) for features in self.model.walk(x, choices, enter)])
            sums.append(batch_sums(logits, y, self.first_half[start : start + len(y)]))
            start += len(y)
        totals = torch.stack(sums).cpu().double().sum(0)  # the one time that the device is waited for
        counts = torch.tensor([start, max(1, start // 2)]).repeat(2)
        return [tuple(row) for row in (totals / counts * torch.tensor([100, 100, 1, 1])).tolist()]


def batch_sums(logits: Tensor, labels: Tensor, first_half: Tensor) -> Tensor:
    """Hits and summed loss of each path, both also within the first half: logits (paths, N, classes) -> (paths, 4)."""
    hits = logits.argmax(-1) == labels
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none").view_as(hits)
    return torch.stack((hits.sum(1), (hits & first_half).sum(1), loss.sum(1), loss[:, first_half].sum(1)), dim=1)


def build_supernet(path: Path, checkpoint: dict) -> Supernet:
    """The supernet of a checkpoint; raises UserError if its weights do not fit."""
    facts = checkpoint["data"]
    model = Supernet(len(facts["classes"]), facts["image_size"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(
            f"{path}: the weights do not fit this supernet ({lines[min(1, len(lines) - 1)].strip()})"
        ) from None
    return model


def flops_limits(model: Supernet, args: argparse.Namespace) -> tuple[int | None, int | None]:
    """The limits as multiply-adds; raises UserError, with what can be had, if no architecture meets them."""
    low, high = (None if limit is None else round(limit * 1e6) for limit in (args.min_flops, args.max_flops))
    try:
        model.require_choices(low, high)
    except ValueError as error:
        raise UserError(str(error)) from None
    return low, high


def check_folder(folder: Path, settings: dict, device: torch.device, overwrite: bool) -> dict:
    """Makes the search's folder; returns the settings of its record, with those of an evolution that began earlier.

    The precision "auto" becomes that of the record, or without one what suits the device.
    Raises UserError if it holds a record that these settings would not go on with.
    """
    make_folder(folder, "--search_dir")
    before = read_json(folder / "args.json") if (folder / "args.json").exists() and not overwrite else {}
    if settings["precision"] == "auto":
        settings["precision"] = before.get("precision") or pick_precision("auto", device)
    if overwrite:
        return settings
    if before:
        begun = {name: value for name, value in settings.items() if name in before or name not in EVOLUTION}
        advice = "take another --search_dir, or --overwrite to delete the record"
        refuse_changes(before, begun, f"the search in {folder}", advice)
        return before | settings
    if (folder / "paths.csv").exists():
        raise UserError(
            f"{folder / 'paths.csv'} has no args.json beside it that says what it is; --overwrite deletes it"
        )
    return settings


def open_record(folder: Path, settings: dict, overwrite: bool) -> list[dict]:
    """The rows that an earlier search left; writes down first what they depend on."""
    if overwrite:
        delete_files(folder, SEARCH_FILES)
    write_json(folder / "args.json", settings)
    return recover_csv(folder / "paths.csv", COLUMNS)


def candidates(choices: Sequence[Choice], generation: int) -> list[dict]:
    """The beginnings of rows of paths.csv; an index counts within its generation."""
    return [
        {"index": i, "choice": "-".join(map(str, choice)), "generation": generation} for i, choice in enumerate(choices)
    ]


def choice_of(row: dict) -> Choice:
    """The choice of a row as numbers."""
    return parse_choice(row["choice"])


def score_missing(
    scorer: Scorer, wanted: list[dict], rows: list[dict], record: Path, seed: int, later: int = 0
) -> None:
    """Scores what the record lacks, in groups of neighbours, and adds it to the record and to `rows` group by group.

    Under torchrun every rank takes a group at a time. later: how many more paths will be asked for, for the time that
    is left.
    """
    known = {(row["generation"], row["choice"]) for row in rows}
    todo = sorted((row for row in wanted if (row["generation"], row["choice"]) not in known), key=choice_of)
    size = min(GROUP, max(1, -(-len(todo) // ranks())))
    groups = [todo[i : i + size] for i in range(0, len(todo), size)]
    stream(seed, "groups").shuffle(groups)  # so that what an interrupted search has scored is a fair sample
    start, done = time.time(), 0
    for first in range(0, len(groups), ranks()):
        mine = groups[first + rank()] if first + rank() < len(groups) else []
        new = list(chain(*gather(score_group(scorer, mine))))
        if rank() == 0:
            append_csv(record, new, list(COLUMNS))
        rows += new
        done += len(new)
        pace = (time.time() - start) / done
        left = duration(pace * (len(todo) - done + later))
        best = ranked(rows, "accuracy")
        top = f"{best[0]['accuracy']:.2f}%" if best else "none yet"
        generation = f"generation {new[0]['generation']}  " if new[0]["generation"] > 0 else ""
        until = f"{min(first + ranks(), len(groups))}/{len(groups)}"
        log.info(f"{generation}group {until}  {len(rows)} paths  best {top}  {pace:.2f}s a path  left {left}")
    rows.sort(key=lambda row: (row["generation"], row["index"]))


def score_group(scorer: Scorer, group: list[dict]) -> list[dict]:
    """The rows of a group, with scores and costs; a path that is in it twice, as a control too, is scored once."""
    choices = sorted(set(map(choice_of, group)))
    scores = dict(zip(choices, scorer.score(choices) if choices else [], strict=True))
    return [row | describe(choice_of(row), scores[choice_of(row)], scorer.model) for row in group]


def evolve(scorer: Scorer, rows: list[dict], record: Path, args: argparse.Namespace, limits: tuple) -> None:
    """Breeds and scores the generations that the record lacks; the defaults are those of the official code."""
    for generation in range(1, args.generations + 1):
        earlier = [row for row in rows if row["generation"] < generation]
        taken = {choice_of(row) for row in earlier}
        left = scorer.model.count_choices(*limits) - sum(scorer.model.within(choice, *limits) for choice in taken)
        if left < args.population:
            log.info(f"evolution ends before generation {generation}: only {left} new architectures are left")
            return
        parents = [choice_of(row) for row in ranked(evolving(earlier, args.population), args.rank_by)[: args.parents]]
        rng = stream(args.seed, f"generation {generation}")
        children = scorer.model.breed(parents, taken, args.population, args.mutation_prob, rng, *limits)
        later = (args.generations - generation) * args.population
        score_missing(scorer, candidates(children, generation), rows, record, args.seed, later)


def describe(choice: Choice, scores: Sequence[float], model: Supernet) -> dict:
    """The rest of a row: scores, as Scorer gives them, and costs."""
    names = "accuracy", "half_accuracy", "loss", "half_loss"
    return dict(zip(names, scores, strict=True)) | {
        "flops_m": model.flops(choice) / 1e6,
        "params_m": model.params(choice) / 1e6,
    }


def ranked(rows: list[dict], by: str) -> list[dict]:
    """The candidates, best first: by "accuracy" or "loss", then the other, then age.

    Controls and undefined scores are left out.
    """

    def key(row: dict) -> tuple:
        scores = -row["accuracy"], row["loss"]
        return scores if by == "accuracy" else scores[::-1], row["generation"], row["index"]

    return sorted((row for row in rows if row["generation"] != CONTROL and math.isfinite(row["loss"])), key=key)


def measure_top(scorer: Scorer, top: list[dict], known: dict[str, float]) -> list[dict]:
    """The rows of `top` in the search's order, with their accuracy on the test images; `known` ones are not redone."""
    missing = sorted(choice_of(row) for row in top if row["choice"] not in known)
    scores = dict(zip(missing, scorer.score(missing) if missing else [], strict=True))
    measured = {row["choice"]: scores[choice_of(row)][0] for row in top if row["choice"] not in known} | known
    return [row | {"test_accuracy": measured[row["choice"]]} for row in top]


def statistics(rows: list[dict], images: int) -> dict:
    """Numbers that sum up a random search; None where one is not defined. Accuracies in percent."""
    fair = ranked([row for row in rows if row["generation"] <= 0], "accuracy")
    accuracies = [row["accuracy"] for row in fair]
    reliability, noise = ranking(fair)
    return {
        "paths": len(fair),
        "undefined": sum(not math.isfinite(row["loss"]) for row in rows),
        "images": images,
        "best": accuracies[0],
        "median": median(accuracies),
        "worst": accuracies[-1],
        "spread": stdev(accuracies) if len(accuracies) > 1 else None,
        "reliability": reliability,
        "noise": noise,
        "loss_reliability": ranking(fair, "loss")[0],
        "controls": {NAMES[choice_of(row)[0]]: row["accuracy"] for row in rows if row["generation"] == CONTROL},
    }


def summary(found: dict, command: str) -> list[str]:
    """What the search found, for people."""
    s, where = found["statistics"], f"{found['split']} split, {found['statistics']['images']:,} images"
    spread = "not defined" if s["spread"] is None else f"{s['spread']:.2f}"
    undefined = "not defined (it needs 10 paths, some spread, and halves that agree)"
    trust = by_loss = undefined
    if s["reliability"] is not None:
        trust = f"{s['reliability']:.2f}: of the spread, {s['noise']:.2f} is noise of the images"
    if s["loss_reliability"] is not None:
        by_loss = f"{s['loss_reliability']:.2f}"
    controls = ", ".join(f"all {name} {accuracy:.2f}%" for name, accuracy in s["controls"].items())
    lines = [
        f"scores       {s['paths']} random paths: best {s['best']:.2f}%, median {s['median']:.2f}%, "
        f"worst {s['worst']:.2f}%, spread (standard deviation) {spread}; with the supernet's weights, {where}",
        f"ranking      reliability by accuracy {trust}",
        f"             reliability by loss {by_loss}",
        f"controls     {controls}",
        f"choice       {found['choice']}, the best by {found['args']['rank_by']}",
        f"             {found['accuracy']:.2f}% +- {found['standard_error']:.2f}, loss {found['loss']:.4f}, "
        f"{found['flops_m']:.1f}M multiply-adds, {found['params_m']:.2f}M parameters",
    ]
    if "evolution" in found:
        evolved = found["evolution"]
        lines.insert(
            4,
            f"evolution    best {evolved['best']:.2f}% after {evolved['evaluations']} paths, "
            f"{evolved['generations']} generations",
        )
    if s["undefined"]:
        lines.insert(1, f"             {s['undefined']} scores are not finite and left out")
    if "top" in found and found["split"] == "search":
        lines += [f"test images  the search's best {len(found['top'])}, in its order, with the supernet's weights: "]
        lines[-1] += ", ".join(f"{row['test_accuracy']:.2f}%" for row in found["top"])
    return [*lines, "train it alone:", f"  {command}"]


def training_command(found: Path, checkpoint: dict, data_dir: str) -> str:
    """The command that trains the choice alone on the same data."""
    trained = checkpoint["args"]
    parts = ["python", "supernet.py", "--choice", str(found), "--exp_name", f"{trained['exp_name']}_best"]
    if trained["dataset"] != "cifar10":
        parts += ["--dataset", trained["dataset"]]
    if trained["image_size"] != IMAGE_SIZES[trained["dataset"]]:
        parts += ["--image_size", str(trained["image_size"])]
    if data_dir != "./data":
        parts += ["--data_dir", data_dir]
    return shlex.join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Scores random architectures, writes the record, the choice and the pictures, and says how to go on."""
    args = parse_args(argv)
    path = Path(args.ckpt) if args.ckpt else on_first(lambda: newest_supernet(Path("runs")))
    checkpoint = load_supernet(path)
    facts = checkpoint["data"]
    model = build_supernet(path, checkpoint)
    limits = flops_limits(model, args)
    device = pick_device(args.device)
    folder = Path(args.search_dir) if args.search_dir else path.parent / "search"
    settings = {"checkpoint": checkpoint["sha256"], "split": args.split, "seed": args.seed, "precision": args.precision}
    settings |= {name: getattr(args, name) for name in ("calibration_images", "min_flops", "max_flops")}
    settings |= {name: getattr(args, name) for name in EVOLUTION if args.generations}
    settings = on_first(lambda: check_folder(folder, settings, device, args.overwrite))
    args.precision = settings["precision"]
    args.batch_size = args.batch_size or (1000 if device.type == "cuda" else 250)

    args.ckpt, args.data_dir = str(path), args.data_dir or checkpoint["args"]["data_dir"]
    open_log(None)
    dataset = load_dataset(facts["name"], args.data_dir, facts["image_size"], args.workers)
    dataset.adopt(facts, str(path))
    rows = on_first(lambda: open_record(folder, settings, args.overwrite))
    open_log(folder / "log.txt")
    log.info(f"supernet     {path}, {checkpoint['epoch']} epochs on {facts['name']}")
    log.info(f"device       {describe_device(device)}, {args.precision}")
    model = model.to(device, memory_format=memory_format(device, args.precision))
    calibration = calibration_images(dataset, args.calibration_images, CALIBRATION_BATCH)
    if calibration is not None:
        calibration = Batches(dataset, calibration, CALIBRATION_BATCH, device, args.workers, args.precision)
    scored, test = (
        Batches(dataset, split, args.batch_size, device, args.workers, args.precision)
        for split in (dataset.test if args.split == "test" else dataset.search, dataset.test)
    )
    scorer = Scorer(model, calibration, scored, args.precision)
    if args.split == "test":
        log.info(
            "scoring on the test images, as ShunLu91's code does: the best score is biased, and no fair one is left"
        )
    choices = model.sample_choices(stream(args.seed, "search"), args.num_paths, *limits)
    if len(choices) < args.num_paths:
        log.info(f"only {len(choices)} architectures are within the limits: all of them are scored")
    wanted = candidates(SINGLE_BLOCK_PATHS, CONTROL) + candidates(choices, 0)
    score_missing(scorer, wanted, rows, folder / "paths.csv", args.seed, args.generations * args.population)
    evolve(scorer, rows, folder / "paths.csv", args, limits)
    rows = [row for row in rows if row["generation"] <= args.generations]
    rows = [row for row in rows if row["generation"] or row["index"] < args.num_paths]
    if rank() == 0:
        report(folder, checkpoint, args, rows, Scorer(model, calibration, test, args.precision))


def report(folder: Path, checkpoint: dict, args: argparse.Namespace, rows: list[dict], test: Scorer) -> None:
    """Writes the choice, then measures it and the rest of the top k on the test images; draws; prints the summary."""
    images = len(test.scored.labels) if args.split == "test" else checkpoint["data"]["images"][1]
    order = ranked(rows, args.rank_by)
    if not ranked([row for row in rows if row["generation"] == 0], args.rank_by):
        raise UserError(f"no path has a finite loss: the weights in {args.ckpt} are broken; the scores are in {folder}")
    numbers = statistics(rows, images)
    found = order[0] | {"standard_error": standard_error(order[0]["accuracy"], images)}
    found |= {"split": args.split, "statistics": numbers}
    if args.generations and (own := ranked(evolving(rows, args.population), "accuracy")):
        found["evolution"] = {"generations": rows[-1]["generation"], "evaluations": len(own)}
        found["evolution"] |= {"best": own[0]["accuracy"]}
    source = {"path": args.ckpt, "epoch": checkpoint["epoch"], "sha256": checkpoint["sha256"]}
    found |= {"checkpoint": source, "args": vars(args)}
    old = read_json(folder / "search.json") if (folder / "search.json").exists() else {}
    write_json(folder / "search.json", old | found if old.get("choice") == found["choice"] else found)
    if args.split == "search":
        known = {row["choice"]: row["test_accuracy"] for row in old.get("top", [])}
        found["top"] = measure_top(test, order[: args.top_k], known)
        write_json(folder / "search.json", found)
    plot_search(rows, folder, args.split)
    for line in summary(found, training_command(folder / "search.json", checkpoint, args.data_dir)):
        log.info(line)
    log.info(f"wrote {', '.join(str(folder / name) for name in SEARCH_FILES if (folder / name).exists())}")


if __name__ == "__main__":
    run_script(main)
