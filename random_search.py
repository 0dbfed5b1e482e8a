"""Scores architectures with a trained supernet's weights, each with BatchNorm statistics of its own.

Guo et al., arXiv 1904.00420, section 3.3: before a path is scored, BatchNorm's statistics are recomputed for it on
training images, augmented as in training. Random search, and with --generations evolution beside it.
"""

import argparse
import dataclasses
import math
import os
import random
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import median, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from blocks import CANDIDATES, capture_blocks
from data.datasets import calibration_images, load_dataset
from data.loaders import Batches
from data.records import BASELINE, Row, best_first, evolving, format_choice, read_rows, reliability, write_rows
from img.plots import plot_search
from model import Choice, SearchSpace, Supernet
from utils import UserError, log

CALIBRATION_BATCH = 250  # a constant: the mean over batches of their variances depends on it
GROUP = 50  # at most so many paths are scored together and recorded together
SETTINGS = "split", "seed", "precision", "calibration_images", "min_flops", "max_flops"  # what scores and draws need
EXTENT = "num_paths", "generations"  # may grow
EVOLUTION = "population", "parents", "mutation_prob", "rank_by"  # what the children depend on as well


def build_parser() -> utils.Parser:
    """The parser of this script."""
    parser = utils.Parser("Scores architectures with a trained supernet's weights and picks the best one.")
    add, number = parser.add_argument, utils.number
    add("--ckpt", nargs="?", type=utils.path, help="the supernet's last.pth (default: the newest one in runs/*/)")
    add("--search_dir", type=utils.path, help="folder of the results (default: search/ beside the checkpoint)")
    add("--data_dir", type=utils.path, help="folder of the data set (default: where training found it)")
    add("--num_paths", type=number(int, 1), default=1000, help="random architectures to score")
    add(
        "--calibration_images",
        type=number(int, 0),
        default=2000,
        help="images that recompute BatchNorm's statistics; 0: keep the supernet's",
    )
    add("--batch_size", type=number(int, 1), help="images per scoring step (default: 250, on CUDA 1000)")
    add("--min_flops", type=number(float, 0, 1e9), help="lower limit, in millions of multiply-adds")
    add("--max_flops", type=number(float, 0, 1e9), help="upper limit, in millions of multiply-adds")
    add("--generations", type=number(int, 0), default=0, help="generations of evolution after the random search")
    add("--population", type=number(int, 2), default=50, help="architectures per generation")
    add("--parents", type=number(int, 2), default=10, help="best architectures so far that a generation is bred from")
    add("--mutation_prob", type=number(float, 0, 1), default=0.1, help="mutation probability of a layer")
    add("--top_k", type=number(int, 1), default=10, help="how many of the best to measure on the test images")
    add("--rank_by", choices=("loss", "accuracy"), default="loss", help="what makes an architecture the better one")
    add("--split", choices=("search", "test"), default="search", help="images to score on; test is biased, see README")
    add("--overwrite", action="store_true", help="delete the search in that folder and start again")
    utils.add_common_flags(parser)
    return parser


class Node:
    """A module at its place in the tree of paths, with BatchNorm statistics of its own.

    A module's statistics depend on the path up to it and no further, so paths that begin alike share nodes: their
    common part is computed once a batch. The tree is walked depth first, so one batch per layer is in memory.
    """

    def __init__(self, module: nn.Module):
        self.module, self.children = module, []
        norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
        self.buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self.statistics = [buffer.clone() for buffer in self.buffers]

    def calibrate(self, x: Tensor, i: int) -> None:
        """Adds the i-th batch, counted from 1, to the statistics of this node and of all below it.

        The modules must be in training mode with momentum 1, so that their buffers become the batch's statistics.
        """
        for buffer in self.buffers:
            buffer.zero_()  # the old value times 0 is added, which is nan after a path that is not finite
        x = self.module(x)
        for mean, batch in zip(self.statistics, self.buffers, strict=True):
            mean.copy_(batch) if i == 1 else mean.lerp_(batch, 1 / i)  # the plain mean over the batches so far
        for child in self.children:
            child.calibrate(x, i)

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """What the leaves give for a batch, in the order of the sorted choices, in eval mode."""
        for buffer, mean in zip(self.buffers, self.statistics, strict=True):
            buffer.copy_(mean)
        x = self.module(x)
        if not self.children:
            yield x
        for child in self.children:
            yield from child.features(x)


def build_tree(model: Supernet, choices: Sequence[Choice]) -> Node:
    """The tree of some paths, from the stem to a leaf for each path: its last convolution."""
    root = Node(model.stem)
    nodes = {(): root}
    for choice in sorted(choices):
        *blocks, last, _ = model.path(choice)[1:]
        for depth, block in enumerate(blocks):
            if choice[: depth + 1] not in nodes:
                nodes[choice[: depth + 1]] = Node(block)
                nodes[choice[:depth]].children.append(nodes[choice[: depth + 1]])
        nodes[choice].children.append(Node(last))
    return root


class Scorer:
    """Scores paths of a supernet, each with BatchNorm statistics computed for it on the calibration images.

    calibration: None scores with the statistics that the supernet brings.
    """

    def __init__(self, model: Supernet, calibration: Batches | None, scored: Batches, precision: str = "fp32"):
        self.model, self.calibration, self.scored, self.precision = model, calibration, scored, precision
        images = len(scored.labels)
        shuffled = random.Random("halves").sample(range(images), images)
        self.first_half = torch.zeros(images, dtype=torch.bool, device=scored.device)
        self.first_half[shuffled[: images // 2]] = True

    def score(self, choices: Sequence[Choice]) -> list[tuple[float, ...]]:
        """(accuracy, the same on the first half, loss, the same) of each path; the choices must be sorted and differ.

        Accuracies are in percent, the loss is the mean cross-entropy. A path's BatchNorm statistics are those that
        torch.optim.swa_utils.update_bn gives it alone: the plain mean over the calibration batches of each batch's
        mean and unbiased variance.
        """
        with self.borrowed_model() as model:
            tree = build_tree(model, choices)
            if self.calibration is not None:
                model.train()
                batches = utils.progress(self.calibration, "calibrating", len(self.calibration))
                for i, (x, _) in enumerate(batches, start=1):
                    tree.calibrate(x, i)
            model.eval()
            sums, start = [], 0
            for x, y in utils.progress(self.scored, "scoring", len(self.scored)):
                logits = torch.stack([model.head(features) for features in tree.features(x)])
                first_half = self.first_half[start : start + len(y)]
                hits = logits.argmax(-1) == y
                losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(choices)), reduction="none").view_as(hits)
                columns = hits.sum(1), hits[:, first_half].sum(1), losses.sum(1), losses[:, first_half].sum(1)
                sums.append(torch.stack(columns, dim=1))
                start += len(y)
            totals = torch.stack(sums).cpu().double().sum(0)  # the one time that the device is waited for
        counts = torch.tensor([start, max(1, start // 2)]).repeat(2)
        return [tuple(row) for row in (totals / counts * torch.tensor([100, 100, 1, 1])).tolist()]

    @contextmanager
    def borrowed_model(self) -> Iterator[Supernet]:
        """The supernet with BatchNorm's momentum 1, for inference; afterwards all of it is as it was before."""
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta, modes = [norm.momentum for norm in norms], [module.training for module in self.model.modules()]
        with torch.inference_mode(), utils.autocast(self.precision, self.scored.device):
            buffers = [buffer.clone() for buffer in self.model.buffers()]
            try:
                for norm in norms:
                    norm.momentum = 1.0
                yield self.model
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
                for module, training in zip(self.model.modules(), modes, strict=True):
                    module.training = training

    def use_cuda_graphs(self, paths: int) -> str:
        """Lets the blocks replay CUDA graphs in calibration, if so many paths repay it; returns what the log says."""
        if self.calibration is None:
            return "not used: no BatchNorm recalibration"
        batches = len(self.calibration)
        images = self.calibration.blank(len(self.calibration.labels) // batches)
        with self.borrowed_model() as model:
            return capture_blocks(model, images, paths * batches // utils.world_size())


def search(scorer: Scorer, space: SearchSpace, args: argparse.Namespace, record: Path, rows: list[Row]) -> None:
    """Proposes, scores and records what `rows` lacks: the baselines and random draws, then each generation's children.

    `rows` grows group by group, and the table with it. Under torchrun every rank takes a group at a time.
    """
    for generation in range(args.generations + 1):
        # Propose. Everything is drawn from the seed, so that an interrupted search proposes the same again.
        if generation == 0:
            drawn = space.sample_distinct(utils.stream(args.seed, "search"), args.num_paths)
            if len(drawn) < args.num_paths:
                log.info(f"only {len(drawn)} architectures are within the limits; scoring all of them")
            wanted = [Row(i, choice, generation=BASELINE) for i, choice in enumerate(space.single_blocks())]
        else:
            earlier = [row for row in rows if row.generation < generation]
            taken = {row.choice for row in earlier}
            left = space.size - sum(choice in space for choice in taken)
            if left < args.population:
                log.info(f"evolution ends before generation {generation}: only {left} new architectures are left")
                return
            parents = best_first(evolving(earlier, args.population), args.rank_by)[: args.parents]
            rng = utils.stream(args.seed, f"generation {generation}")
            choices = [row.choice for row in parents]
            drawn, wanted = space.breed(choices, taken, args.population, args.mutation_prob, rng), []
        wanted += [Row(i, choice, generation=generation) for i, choice in enumerate(drawn)]

        refuse_edits(record, rows, wanted)

        # Group neighbours, which share most work. In random order: what an interrupted search leaves is a fair sample.
        known = {(row.generation, row.choice) for row in rows}
        missing = sorted((row for row in wanted if (row.generation, row.choice) not in known), key=lambda r: r.choice)
        # As equal as can be, and as many for every rank, so that none waits for the others.
        total, ranks = len(missing), utils.world_size()
        count = min(total, ranks * -(-total // (ranks * GROUP)))
        groups = [missing[total * i // count : total * (i + 1) // count] for i in range(count)]
        utils.stream(args.seed, "groups").shuffle(groups)

        # Score and record.
        start, done = time.monotonic(), 0
        for first in range(0, len(groups), utils.world_size()):
            mine = groups[first + utils.rank() :][:1]
            new = list(chain(*utils.all_gather([row for group in mine for row in score_group(scorer, space, group)])))
            rows += new
            rows.sort(key=lambda row: (row.generation, row.index))
            if utils.rank() == 0:
                write_rows(record, rows)
            done += len(new)
            pace = (time.monotonic() - start) / done
            left = pace * (len(missing) - done + (args.generations - generation) * args.population)
            own = evolving(rows, args.population) if generation else rows
            best = best_first([row for row in own if row.generation <= generation], "accuracy")
            line = f"generation {generation}  " if generation else ""
            line += f"group {min(first + utils.world_size(), len(groups))}/{len(groups)}  "
            line += f"{sum(row.generation == generation for row in rows)} paths  "
            line += f"best {best[0].accuracy:.2f}%  " if best else ""
            log.info(f"{line}{pace:.2f}s a path  left {utils.duration(left)}")


def refuse_edits(record: Path, rows: list[Row], wanted: list[Row]) -> None:
    """Raises UserError if a recorded row has the place or the choice of a wanted one, but not both."""
    places = {(row.generation, row.choice): row.index for row in wanted}
    choices = {(row.generation, row.index): row.choice for row in wanted}
    for row in rows:
        index = places.get((row.generation, row.choice), row.index)
        choice = choices.get((row.generation, row.index), row.choice)
        if (index, choice) != (row.index, row.choice):
            where = f"generation {row.generation}, index {row.index}"
            raise UserError(f"{record} was edited: {where} is not what --seed draws there; --overwrite deletes it")


def score_group(scorer: Scorer, space: SearchSpace, group: list[Row]) -> list[Row]:
    """The rows with scores and costs; a path that is in the group twice, as a baseline too, is scored once."""
    choices = sorted({row.choice for row in group})
    names = "accuracy", "half_accuracy", "loss", "half_loss"
    scores = {c: dict(zip(names, s, strict=True)) for c, s in zip(choices, scorer.score(choices), strict=True)}
    costs = {c: {"flops_m": space.flops(c) / 1e6, "params_m": space.params(c) / 1e6} for c in choices}
    return [dataclasses.replace(row, **scores[row.choice], **costs[row.choice]) for row in group]


def main(argv: Sequence[str] | None = None) -> None:
    """Scores random architectures, writes the record, the choice and the pictures, and says how to continue."""
    parser = build_parser()
    args = parser.parse_args(argv)
    path = Path(args.ckpt) if args.ckpt else utils.on_rank_zero(lambda: utils.newest_supernet(Path("runs")))
    path = path / "last.pth" if path.is_dir() else path
    checkpoint = utils.load_supernet(path)
    folder = Path(args.search_dir) if args.search_dir else path.parent / "search"
    if (folder / "last.pth").exists() or (folder / "metrics.csv").exists():
        raise UserError(f"{folder} is the folder of a run; choose another --search_dir")
    with utils.owned_folder(folder, "--search_dir"):
        run(parser, argv, path, checkpoint, folder)


def run(parser: utils.Parser, argv: Sequence[str] | None, path: Path, checkpoint: dict, folder: Path) -> None:
    """Prepares a search or what is left of it, searches and reports."""
    before = utils.on_rank_zero(lambda: read_settings(folder, parser.parse_args(argv).overwrite))
    recorded = {name: before[name] for name in (*SETTINGS, *EVOLUTION, *EXTENT) if name in before}
    parser.adopt(recorded, str(folder / "args.json"))
    args = parser.parse_args(argv)  # what the command line leaves open is as the record has it
    if args.generations and not args.parents <= args.population <= args.num_paths:
        parser.error("evolution needs --parents <= --population <= --num_paths")
    if None not in (args.min_flops, args.max_flops) and args.min_flops > args.max_flops:
        parser.error(f"--min_flops {args.min_flops} is above --max_flops {args.max_flops}")
    device = utils.pick_device(args.device)
    if args.precision == "auto":
        args.precision = before.get("precision") or utils.pick_precision("auto", device)
    settings = {"checkpoint": checkpoint["sha256"], "calibrated_on": "augmented images"}  # plain ones earlier
    settings |= {name: getattr(args, name) for name in SETTINGS}
    settings |= {name: getattr(args, name) for name in EVOLUTION if args.generations or name in before}
    if before:
        advice = "take another --search_dir, or --overwrite to delete the search"
        fixed = {name: value for name, value in settings.items() if name in before or name not in EVOLUTION}
        utils.refuse_changes(before, fixed, f"the search in {folder}", advice)
    settings |= {name: getattr(args, name) for name in EXTENT}
    metadata, trained = checkpoint["data"], checkpoint["args"]
    utils.open_log(None)
    model = build_supernet(path, checkpoint)
    space = limited_space(model, args)
    args.batch_size = args.batch_size or (1000 if device.type == "cuda" else 250)
    args.ckpt, args.data_dir = str(path), os.path.abspath(args.data_dir or trained["data_dir"])

    dataset = load_dataset(metadata["name"], args.data_dir, metadata["image_size"], args.workers)
    dataset.adopt(metadata, str(path))
    utils.on_rank_zero(lambda: start_record(folder, settings, new=not before))
    utils.open_log(folder / "log.txt")
    log.info(f"supernet     {path}, {checkpoint['epoch']} of {trained['epochs']} epochs on {metadata['name']}")
    log.info(f"device       {utils.describe_device(device)}, {args.precision}")
    if checkpoint["epoch"] < trained["epochs"]:
        log.info("warning: this supernet is unfinished: its learning rate has not reached 0")
    record = folder / "paths.csv"
    rows = utils.on_rank_zero(lambda: read_rows(record, model.check) if record.exists() else [])
    if rows:
        drawn = sum(row.generation == 0 for row in rows)
        log.info(f"record       {len(rows)} scores in {record}, {drawn} of them random draws")
        if drawn > args.num_paths:
            log.info(f"warning: the results will be those of the first {args.num_paths} random draws alone")
    model = model.to(device, memory_format=utils.memory_format(device, args.precision))
    how = device, args.workers, args.precision
    chosen = calibration_images(dataset, args.calibration_images, CALIBRATION_BATCH)
    # The weights were trained with statistics of augmented images; those of plain ones cost 8.5 points of top-1.
    calibration = Batches(dataset, chosen, CALIBRATION_BATCH, *how).augmented(trained["cutout"]) if chosen else None
    scored = dataset.search if args.split == "search" else dataset.test
    scorer, test = (
        Scorer(model, calibration, Batches(dataset, split, args.batch_size, *how), args.precision)
        for split in (scored, dataset.test)
    )
    if args.split == "test":
        log.info("warning: selecting on the test set; no unbiased test score remains")
    paths = args.num_paths + args.generations * args.population - len(rows)
    graphs = "not used: --no_cuda_graphs" if args.no_cuda_graphs else scorer.use_cuda_graphs(paths)
    log.info(f"graphs       {graphs}")

    search(scorer, space, args, record, rows)
    if utils.rank() == 0:
        report(folder, checkpoint, args, rows, test)


def read_settings(folder: Path, overwrite: bool) -> dict:
    """The settings of the search in the folder, none if there is none or it is to be overwritten.

    Raises UserError if there is a table of scores without their settings.
    """
    if overwrite:
        return {}
    settings = utils.read_json(folder / "args.json") if (folder / "args.json").exists() else {}
    if "checkpoint" not in settings and (folder / "paths.csv").exists():
        raise UserError(
            f"{folder / 'paths.csv'} has no args.json beside it that says what it is; --overwrite deletes it"
        )
    return settings if "checkpoint" in settings else {}


def start_record(folder: Path, settings: dict, new: bool) -> None:
    """Writes down what the scores will depend on, before there are any; a new record replaces what lies there."""
    if new:
        utils.delete_files(folder, utils.SEARCH_FILES)
    utils.write_json(folder / "args.json", settings)


def build_supernet(path: Path, checkpoint: dict) -> Supernet:
    """The supernet of a checkpoint; raises UserError if it has other candidates or its weights do not fit."""
    metadata = checkpoint["data"]
    utils.refuse_candidates(checkpoint, list(CANDIDATES), str(path))
    model = Supernet(len(metadata["classes"]), metadata["image_size"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        line = error.args[0].splitlines()[1].strip()[:200]
        raise UserError(f"{path}: the weights do not fit this supernet ({line})") from None
    return model


def limited_space(model: Supernet, args: argparse.Namespace) -> SearchSpace:
    """The space within --min_flops and --max_flops; raises UserError if it is empty."""
    low, high = (None if limit is None else round(limit * 1e6) for limit in (args.min_flops, args.max_flops))
    try:
        space = SearchSpace(model, low, high)
    except ValueError as error:
        raise UserError(str(error)) from None
    lowest, highest = space.nearest(-math.inf)[1], space.nearest(math.inf)[0]
    if space.limited and space.low <= lowest and highest <= space.high:
        ends = f"from {lowest / 1e6} to {highest / 1e6} million multiply-adds"
        log.info(f"warning: the limits exclude nothing: the space goes {ends}")
    return space


def report(folder: Path, checkpoint: dict, args: argparse.Namespace, rows: list[Row], test: Scorer) -> None:
    """Writes the choice, then measures it and the rest of the top k on the test images; draws; prints the summary."""
    images = len(test.scored.labels) if args.split == "test" else checkpoint["data"]["images"][1]
    rows = [row for row in rows if row.generation <= args.generations]
    rows = [row for row in rows if row.generation or row.index < args.num_paths]  # the record may hold more
    order = best_first(rows, args.rank_by)
    if not best_first([row for row in rows if row.generation == 0], args.rank_by):
        raise UserError(f"no path has a finite loss: the weights in {args.ckpt} are broken; the scores are in {folder}")
    found = as_json(order[0]) | {"standard_error": utils.standard_error(order[0].accuracy, images)}
    found |= {"dataset": checkpoint["data"]["name"], "image_size": checkpoint["data"]["image_size"]}
    found |= {
        "candidates": test.model.names,
        "data_dir": args.data_dir,
        "split": args.split,
        "statistics": statistics(rows, images),
    }
    if args.generations and (own := best_first(evolving(rows, args.population), "accuracy")):
        found["evolution"] = {"generations": rows[-1].generation, "evaluations": len(own), "best": own[0].accuracy}
    source = {"path": args.ckpt, "epoch": checkpoint["epoch"], "sha256": checkpoint["sha256"]}
    found |= {"checkpoint": source, "args": vars(args)}
    known = known_test_accuracies(folder / "search.json", checkpoint["sha256"])
    utils.write_json(folder / "search.json", found)  # before any test image is looked at
    if args.split == "search":
        missing = sorted(row.choice for row in order[: args.top_k] if format_choice(row.choice) not in known)
        for choice, scores in zip(missing, test.score(missing) if missing else [], strict=True):
            known[format_choice(choice)] = scores[0]
        top = [as_json(row) for row in order[: args.top_k]]
        found["top"] = [row | {"test_accuracy": known[row["choice"]]} for row in top]
        utils.write_json(folder / "search.json", found)
    (folder / "evolution.png").unlink(missing_ok=True)  # it is drawn again if these results have generations
    plot_search(rows, folder, args.split, args.rank_by)
    command = ["python", "supernet.py", "--choice", str(folder / "search.json")]
    name = "" if folder.name == "search" else f"_{folder.name}"  # of another search of the same supernet
    command.append(f"--exp_name={checkpoint['args']['exp_name']}{name}_best")
    for line in (*summary(found), "train it alone:", f"  {shlex.join(command)}"):
        log.info(line)
    names = [name for name in utils.SEARCH_FILES if (folder / name).exists() and name != "standalone.png"]
    log.info(f"wrote {', '.join(str(folder / name) for name in names)}")


def known_test_accuracies(path: Path, checkpoint: str) -> dict[str, float]:
    """What an earlier search.json of the same weights has measured, by choice; nothing if it is damaged."""
    try:
        before = utils.read_json(path)
        if before["checkpoint"]["sha256"] == checkpoint:
            return {row["choice"]: float(row["test_accuracy"]) for row in before["top"]}
    except (UserError, LookupError, TypeError, ValueError):
        pass  # it is about to be written anew, and what is not known is measured
    return {}


def as_json(row: Row) -> dict:
    """A row with its choice as it is written in files."""
    return dataclasses.asdict(row) | {"choice": format_choice(row.choice)}


def statistics(rows: list[Row], images: int) -> dict:
    """Numbers that sum up a random search; None where one is not defined. Accuracies in percent."""
    drawn = best_first([row for row in rows if row.generation <= 0], "accuracy")
    accuracies = [row.accuracy for row in drawn]
    trust, noise = reliability(drawn)
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
        "baselines": {list(CANDIDATES)[row.choice[0]]: row.accuracy for row in rows if row.generation == BASELINE},
    }


def summary(found: dict) -> list[str]:
    """What the search found, for people."""
    s = found["statistics"]

    def text(value: float | None) -> str:
        return "not defined" if value is None else f"{value:.2f}"

    baselines = ", ".join(f"all {name} {accuracy:.2f}%" for name, accuracy in s["baselines"].items())
    lines = [
        f"scores       {s['paths']} random paths, {s['images']:,} images of the {found['split']} split: "
        f"best {s['best']:.2f}%, median {s['median']:.2f}%, worst {s['worst']:.2f}%",
        f"ranking      split-half reliability {text(s['reliability'])} by accuracy, {text(s['loss_reliability'])} by "
        f"loss; std {text(s['spread'])}, of which noise of the images {text(s['noise'])}",
        f"baselines    {baselines}",
        f"choice       {found['choice']}, the best by {found['args']['rank_by']}",
        f"             {found['accuracy']:.2f}% ± {found['standard_error']:.2f}, loss {found['loss']:.4f}, "
        f"{found['flops_m']:.1f}M multiply-adds, {found['params_m']:.2f}M parameters",
    ]
    if s["undefined"]:
        lines.insert(1, f"             {s['undefined']} scores are not finite and left out")
    if "evolution" in found:
        e = found["evolution"]
        lines.insert(
            -2, f"evolution    best {e['best']:.2f}% after {e['evaluations']} paths, {e['generations']} generations"
        )
    if "top" in found:
        accuracies = ", ".join(f"{row['test_accuracy']:.2f}%" for row in found["top"])
        lines.append(
            f"test images  the best {len(found['top'])} with the supernet's weights, in that order: {accuracies}"
        )
    return lines


if __name__ == "__main__":
    utils.run_script(main)
