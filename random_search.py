"""Scores architectures with a trained supernet's weights, each with its own BatchNorm statistics.

Guo et al., arXiv 1904.00420, section 3.3: before a path is scored, BatchNorm's statistics are
recomputed for it. Random search, and with --generations evolution beside it.
"""

import copy
import math
import random
import shlex
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import utils
from blocks import capture_blocks
from data import records
from data.datasets import ImageData, load_dataset
from data.loaders import Batches
from data.records import BASELINE, Scored, asked_for, best_first, evolution_rows
from img.plots import draw, plot_search
from model import SPACES, Choice, SearchSpace, Space, Supernet, path_tree, tracked_norms
from utils import UserError, absolute_path, log, number, user_path

CALIBRATION_BATCH = 250  # fixed: the mean over batches of their variances depends on it
GROUP = 50  # the most paths that are scored and recorded together
SEARCH_FILES = ["args.json", "log.txt", "paths.csv", "search.json", "standalone.png", "truth.png"]
SEARCH_FILES += ["histogram.png", "pareto.png", "choices.png", "evolution.png"]
# Recorded settings: those that the scores depend on, those that children depend on, the rest.
SCORED_BY = ["checkpoint", "space", "split", "seed", "precision", "calibration_images"]
SCORED_BY += ["min_flops", "max_flops"]
BRED_BY = ["population", "parents", "mutation_prob", "rank_by"]
MAY_GROW = ["num_paths", "generations"]


def build_parser() -> ArgumentParser:
    """The parser of this script."""
    parser = utils.new_parser("Scores architectures with a trained supernet's weights.")
    add, limit = parser.add_argument, number(float, 0, 1e5)
    add("--ckpt", nargs="?", type=user_path, help="last.pth of a supernet; None: the newest")
    add("--search_dir", type=user_path, help="results; None: search/ beside the checkpoint")
    add("--data_dir", type=absolute_path, help="data set; None: where training found it")
    add("--num_paths", type=number(int, 1), default=1000, help="random architectures to score")
    images = "training images for BatchNorm's statistics; 0: keep the supernet's statistics"
    add("--calibration_images", type=number(int, 0), default=2000, help=images)
    add("--batch_size", type=number(int, 1), help="images per step; None: 250, on CUDA 1000")
    add("--min_flops", type=limit, help="lower limit, in millions of multiply-adds")
    add("--max_flops", type=limit, help="upper limit, in millions of multiply-adds")
    add("--generations", type=number(int, 0), default=0, help="of evolution, after random search")
    add("--population", type=number(int, 2), default=50, help="architectures per generation")
    add("--parents", type=number(int, 2), default=10, help="number of parents of a generation")
    add("--mutation_prob", type=number(float, 0, 1), default=0.1, help="probability for a layer")
    add("--top_k", type=number(int, 1), default=10, help="how many of the best to test at the end")
    add("--rank_by", choices=("loss", "accuracy"), default="loss", help="score to rank by")
    add("--split", choices=("search", "test"), default="search", help="test is biased, see README")
    add("--overwrite", action="store_true", help="delete the search in that folder and start again")
    add("-h", "--help", action="help", help="show this message and exit")
    return parser


def load_supernet(ckpt: str | None) -> dict:
    """The checkpoint with that path or in that run's folder, or of the newest supernet in runs/."""
    if ckpt is None:
        runs = [path.parent for path in Path("runs").glob("*/last.pth")]
        runs = [run for run in runs if (run / "args.json").exists()]
        runs = [run for run in runs if utils.read_json(run / "args.json").get("choice") is None]
        if not runs:
            raise UserError("no supernet in runs/*/last.pth; train one, or give --ckpt PATH")
        ckpt = max(runs, key=lambda run: (run / "last.pth").stat().st_mtime)
    path = Path(ckpt)
    supernet = records.load_checkpoint(path / "last.pth" if path.is_dir() else path)
    if supernet["args"]["choice"] is not None:
        raise UserError(f"{supernet['path']} holds a single architecture, not a supernet")
    return supernet


def main(argv: Sequence[str] | None = None) -> None:
    """Prepares a search or the rest of one, scores, and reports."""
    parser = build_parser()
    args = parser.parse_args(argv)
    supernet = utils.on_rank_zero(lambda: load_supernet(args.ckpt))
    path, trained, data = Path(supernet["path"]), supernet["args"], supernet["data"]
    # A checkpoint that is not the last.pth of a run, such as a download, is searched in runs/.
    run = path.parent if path.name == "last.pth" else Path("runs", path.stem)
    folder = Path(args.search_dir or run / "search")
    if (folder / "last.pth").exists() or (folder / "metrics.csv").exists():
        raise UserError(f"{folder} is the folder of a run; choose another --search_dir")
    with utils.locked(folder):
        # Settings: the data folder of the training < those of the record < the command line.
        record, rows, recorded = folder / "paths.csv", [], {}
        goes_on = not args.overwrite and utils.on_rank_zero(record.exists)
        if goes_on:
            rows = utils.on_rank_zero(lambda: records.read_rows(record))
            recorded = utils.on_rank_zero(lambda: utils.read_json(folder / "args.json"))
        elif not args.overwrite and utils.rank() == 0:
            files = utils.files_to_keep(folder, SEARCH_FILES, "checkpoint")
            if files:
                raise UserError(f"{files[0]} exists; --overwrite deletes it")
        weights = {"checkpoint": supernet["sha256"]}
        weights |= {name: trained[name] for name in ("space", "space_layout")}
        parser.set_defaults(data_dir=trained["data_dir"])
        args = parser.parse_args(argv, Namespace(**recorded | weights))
        device = utils.pick_device(args.device)
        args.precision = utils.pick_precision(args.precision, device)
        args.batch_size = args.batch_size or (1000 if device.type == "cuda" else 250)
        if args.generations and not args.parents <= args.population <= args.num_paths:
            sizes = f"{args.parents}, {args.population}, {args.num_paths}"
            parser.error(f"evolution needs --parents <= --population <= --num_paths, not {sizes}")
        if args.space not in SPACES:
            raise UserError(f"{path} has the space {args.space}, which is not in SPACES (model.py)")
        current = {"space_layout": asdict(SPACES[args.space])}
        advice = "restore that space in model.py"
        utils.check_unchanged(trained, current, ["space_layout"], str(path), advice)
        names = SCORED_BY + (BRED_BY if any(row.generation > 0 for row in rows) else [])
        advice = "take another --search_dir, or --overwrite to delete the search"
        if goes_on:
            utils.check_unchanged(recorded, vars(args), names, f"the search in {folder}", advice)

        # The network and the images.
        limits = [limit and round(limit * 1e6) for limit in (args.min_flops, args.max_flops)]
        try:
            layout = Space(**args.space_layout)
            model = Supernet(len(data["classes"]), data["image_size"], space=layout)
            model.load_state_dict(supernet["model"])
            space = SearchSpace(model, *limits)
            _ = space.costs  # checks the contract of the candidates
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None
        dataset = load_dataset(data["name"], args.data_dir, data["image_size"], args.workers)
        dataset.check_same(data, str(path))
        how = device, args.workers, args.precision
        calibration = calibration_batches(dataset, args.calibration_images, trained["cutout"], *how)
        test = scored = Batches(dataset, dataset.test, args.batch_size, *how)
        if args.split == "search":
            scored = Batches(dataset, dataset.search, args.batch_size, *how)
        model.place(device, scored.memory_format)
        scorer = Scorer(model, calibration, scored)

        if utils.rank() == 0:
            if not goes_on:
                for name in SEARCH_FILES:
                    (folder / name).unlink(missing_ok=True)
            names = SCORED_BY + BRED_BY + MAY_GROW + ["space_layout"]
            utils.write_json(folder / "args.json", {name: getattr(args, name) for name in names})
        utils.open_log(folder / "log.txt")
        epochs = f"{supernet['epoch']} of {trained['epochs']} epochs"
        log.info(f"supernet     {path}, {epochs} on {data['name']}")
        log.info(f"device       {utils.describe_device(device)}, {args.precision}")
        for note in dataset.notes:
            log.info(f"data         {note}")
        images = len(calibration.labels) if calibration else 0
        if images != args.calibration_images:
            whole = f"whole batches of {CALIBRATION_BATCH}, at most {len(dataset.train):,}"
            log.info(f"warning: calibrating on {images:,} images: {whole}")
        if supernet["epoch"] < trained["epochs"]:
            log.info("warning: this supernet is unfinished: its learning rate has not reached 0")
        if args.split == "test":
            log.info("warning: selecting on the test set; no unbiased test score remains")
        log.info(f"record       {len(rows)} scores in {record}")
        if sum(row.generation == 0 for row in rows) > args.num_paths:
            log.info(f"warning: the results are those of the first {args.num_paths} random paths")
        paths = max(0, args.num_paths + args.generations * args.population - len(rows))
        log.info(f"graphs       {'not used' if args.no_cuda_graphs else scorer.capture(paths)}")

        search(scorer, space, args, record, rows)
        if utils.rank() == 0:
            tester = Scorer(model, calibration, test)
            report(folder, supernet, args, rows, len(scored.labels), tester)


def calibration_batches(
    dataset: ImageData, count: int, cutout_length: int, *how: torch.device | int | str
) -> Batches | None:
    """Training images for BatchNorm's statistics, the same for any --seed; None for 0 images.

    Augmented, since the weights were trained with the statistics of augmented images: those of
    plain images cost 8.6 points of top-1 (img/README.md).
    """
    count = min(count, len(dataset.train))
    count -= count % CALIBRATION_BATCH if count > CALIBRATION_BATCH else 0  # whole batches
    if not count:
        return None
    chosen = random.Random("calibration").sample(range(len(dataset.train)), count)
    batches = Batches(dataset, dataset.train.subset(chosen), CALIBRATION_BATCH, *how)
    return batches.augmented(cutout_length)


class Scorer:
    """Scores paths of a supernet, each with BatchNorm statistics of its own.

    Works on a copy of the supernet. calibration: images for the statistics; None: paths are scored
    with those of the supernet.
    """

    def __init__(self, model: Supernet, calibration: Batches | None, scored: Batches):
        self.model, self.calibration = copy.deepcopy(model), calibration
        self.scored, self.precision = scored, scored.precision
        self.norms = tracked_norms(self.model)
        for norm in self.norms:
            norm.momentum = 1.0  # buffers become the statistics of the last batch
        images = len(scored.labels)
        shuffled = random.Random("halves").sample(range(images), images)
        self.half = torch.zeros(images, dtype=torch.bool, device=scored.device)
        self.half[shuffled[: images // 2]] = True

    @torch.inference_mode()
    def score(self, choices: Sequence[Choice]) -> list[dict[str, float]]:
        """Accuracy (percent) and mean cross-entropy of each path, and both on half of the images.

        The choices must be sorted and different. A path has the BatchNorm statistics that
        torch.optim.swa_utils.update_bn computes for it: the mean over the calibration batches of
        each batch's mean and unbiased variance.
        """
        with utils.autocast(self.precision, self.scored.device):
            tree = path_tree(self.model.eval(), choices)
            if self.calibration is not None:
                for norm in self.norms:
                    norm.train()
                for i, (x, _) in enumerate(utils.progress(self.calibration, "calibrating"), 1):
                    tree.calibrate(x, i)
            self.model.eval()
            sums, start = [], 0
            for x, y in utils.progress(self.scored, "scoring", len(self.scored)):
                logits = torch.stack([self.model.head(features) for features in tree.features(x)])
                half = self.half[start : start + len(y)]
                hits, targets = logits.argmax(-1) == y, y.repeat(len(choices))
                losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
                losses = losses.view_as(hits)
                columns = hits.sum(1), hits[:, half].sum(1), losses.sum(1), losses[:, half].sum(1)
                sums.append(torch.stack(columns, dim=1))
                start += len(y)
            totals = torch.stack(sums).cpu().double().sum(0)
        counts = torch.tensor([start, max(1, start // 2)]).repeat(2)  # all, half, all, half
        scores = (totals / counts * torch.tensor([100, 100, 1, 1])).tolist()
        names = "accuracy", "half_accuracy", "loss", "half_loss"
        return [dict(zip(names, row, strict=True)) for row in scores]

    def capture(self, paths: int) -> str:
        """Lets blocks replay CUDA graphs if the paths repay it; returns a line for the log."""
        if self.calibration is None:
            return "not used: no BatchNorm recalibration"
        batches = paths * len(self.calibration) // utils.world_size()
        with torch.inference_mode(), utils.autocast(self.precision, self.scored.device):
            return capture_blocks(self.model, self.calibration.blank(), batches)


def search(
    scorer: Scorer, space: SearchSpace, args: Namespace, record: Path, rows: list[Scored]
) -> None:
    """Proposes, scores and records what `rows` lacks, generation by generation.

    Generation 0 has the baselines and the random draws, later ones the children of the best.
    `rows` grows group by group, and the table with it. Every rank scores a group at a time.
    """
    ranks = utils.world_size()
    for generation in range(args.generations + 1):
        # Propose. All is drawn from the seed, so an interrupted search proposes the same again.
        proposed = propose(space, args, rows, generation)
        if not proposed:
            return
        known = {(row.generation, row.choice) for row in rows}
        missing = [row for row in proposed if (row.generation, row.choice) not in known]

        # Group neighbours, which share most work: as many groups for each rank, of nearly equal
        # size. In random order: the record of an interrupted search is a fair sample.
        missing.sort(key=lambda row: row.choice)
        total = len(missing)
        count = min(total, ranks * math.ceil(total / (ranks * GROUP)))
        groups = [missing[total * i // count : total * (i + 1) // count] for i in range(count)]
        utils.named_rng(args.seed, "groups").shuffle(groups)

        # Score and record.
        start, done = time.monotonic(), 0
        for first in range(0, count, ranks):
            group = groups[first + utils.rank()] if first + utils.rank() < count else []
            new = [row for part in utils.all_gather(score(scorer, space, group)) for row in part]
            rows += new
            rows.sort(key=lambda row: (row.generation, row.index))
            if utils.rank() == 0:
                records.write_csv(record, [row.as_json() for row in rows])
            done += len(new)
            pace = (time.monotonic() - start) / done
            left = pace * (total - done + (args.generations - generation) * args.population)
            best = best_first([row for row in rows if row.generation <= generation], "accuracy")
            line = f"generation {generation}  {len(proposed) - total + done}/{len(proposed)} paths"
            line += f"  best {best[0].accuracy:.2f}%" if best else ""
            log.info(f"{line}  {pace:.2f}s a path  left {utils.duration(left)}")


def score(scorer: Scorer, space: SearchSpace, group: list[Scored]) -> list[Scored]:
    """The rows with scores and costs; a baseline that was also drawn is scored once."""
    choices = sorted({row.choice for row in group})
    scores = dict(zip(choices, scorer.score(choices), strict=True)) if choices else {}
    for choice in choices:
        scores[choice]["flops_m"] = space.flops(choice) / 1e6
        scores[choice]["params_m"] = space.params(choice) / 1e6
    return [replace(row, **scores[row.choice]) for row in group]


def propose(
    space: SearchSpace, args: Namespace, rows: list[Scored], generation: int
) -> list[Scored]:
    """The baselines and random draws, or a generation of children; none if too few are left."""
    if generation == 0:
        drawn = space.sample_distinct(utils.named_rng(args.seed, "search"), args.num_paths)
        if len(drawn) < args.num_paths:
            log.info(f"there are only {len(drawn)} such architectures; scoring all of them")
        singles = enumerate(space.single_blocks())
        baselines = [Scored(i, choice, generation=BASELINE) for i, choice in singles]
        return baselines + [Scored(i, choice) for i, choice in enumerate(drawn)]
    # Children depend on the rows of evolution alone, so --num_paths may grow after it.
    earlier = [row for row in rows if row.generation < generation]
    own = evolution_rows(earlier, args.population)
    taken = {row.choice for row in own + [r for r in earlier if r.generation == BASELINE]}
    left = space.size - sum(choice in space for choice in taken)
    if left < args.population:
        log.info(f"evolution ends before generation {generation}: {left} architectures are left")
        return []
    parents = [row.choice for row in best_first(own, args.rank_by)[: args.parents]]
    children = breed(space, parents, taken, args, generation)
    return [Scored(i, choice, generation=generation) for i, choice in enumerate(children)]


def breed(
    space: SearchSpace, parents: list[Choice], taken: set[Choice], args: Namespace, generation: int
) -> list[Choice]:
    """A generation of architectures that are not `taken`; enough of them must be left.

    Half by mutation and half by crossover of two parents, as in the official code
    (src/Search/search.py). A child that failed 10 times is replaced by a random draw.
    """
    rng, count = utils.named_rng(args.seed, f"generation {generation}"), args.population
    children: dict[Choice, None] = {}

    def add(make: Callable[[], Choice], number: int) -> None:
        for _ in range(number):
            for child in (make() for _ in range(10)):
                if child not in taken and child not in children and child in space:
                    children[child] = None
                    break

    if parents:
        add(lambda: mutate(space, rng.choice(parents), args.mutation_prob, rng), count // 2)
    if len(parents) > 1:
        add(lambda: crossover(*rng.sample(parents, 2), rng), count - count // 2)
    while len(children) < count:
        add(lambda: space.sample(rng), 1)
    return list(children)


def mutate(space: SearchSpace, choice: Choice, probability: float, rng: random.Random) -> Choice:
    """Replaces each block, with that probability, by another candidate of its layer."""
    mutated = list(choice)
    for layer, options in enumerate(space.options):
        others = [number for number in options if number != choice[layer]]
        if rng.random() < probability and others:
            mutated[layer] = rng.choice(others)
    return tuple(mutated)


def crossover(first: Choice, second: Choice, rng: random.Random) -> Choice:
    """Takes each block from either parent."""
    return tuple(rng.choice(pair) for pair in zip(first, second, strict=True))


def report(
    folder: Path, supernet: dict, args: Namespace, rows: list[Scored], images: int, tester: Scorer
) -> None:
    """Writes the choice, tests the top k, draws the pictures and prints a summary."""
    rows = asked_for(rows, args.num_paths, args.generations)
    order, singles = best_first(rows, args.rank_by), [r for r in rows if r.generation == BASELINE]
    if not any(row.generation == 0 for row in order):
        raise UserError(f"no random path has a finite loss: {supernet['path']} is broken")
    best, numbers, data = order[0], records.statistics(rows, images), supernet["data"]
    text = {n: "not defined" if x is None else f"{x:.2f}" for n, x in numbers.items()}
    error = records.standard_error(best.accuracy, images)
    names = args.space_layout["candidates"]
    numbers["baselines"] = {names[row.choice[0]]: row.accuracy for row in singles}
    found = best.as_json() | {"standard_error": error, "statistics": numbers, "args": vars(args)}
    found |= {"dataset": data["name"], "image_size": data["image_size"], "data_dir": args.data_dir}
    found |= {"space": args.space, "space_layout": args.space_layout, "split": args.split}
    found["checkpoint"] = {name: supernet[name] for name in ("path", "sha256")}
    own = best_first(evolution_rows(rows, args.population), "accuracy") if args.generations else []
    if own:
        found["evolution"] = {"generations": rows[-1].generation, "evaluations": len(own)}
        found["evolution"]["best"] = own[0].accuracy
    utils.write_json(folder / "search.json", found)  # before any test image is looked at
    top = order[: args.top_k] if args.split == "search" else []
    if top:
        choices = sorted({row.choice for row in top})
        tested = {c: s["accuracy"] for c, s in zip(choices, tester.score(choices), strict=True)}
        found["top"] = [row.as_json() | {"test_accuracy": tested[row.choice]} for row in top]
        utils.write_json(folder / "search.json", found)
    (folder / "evolution.png").unlink(missing_ok=True)  # drawn again if there are generations
    draw(plot_search, rows, folder, vars(args))
    scored_on = f"{args.split} split of {images:,} images"
    log.info(f"scores       {numbers['paths']} random paths, {scored_on}")
    log.info(f"             best {text['best']}%, median {text['median']}%, worst {text['worst']}%")
    log.info(f"             std {text['spread']}; sampling noise alone {text['noise']}")
    if numbers["undefined"]:
        log.info(f"             {numbers['undefined']} scores are not finite and left out")
    log.info(f"reliability  {text['reliability']} by accuracy, {text['loss_reliability']} by loss")
    for name, accuracy in numbers["baselines"].items():
        log.info(f"baseline     {accuracy:.2f}%, all {name}")
    if own:
        log.info(f"evolution    best {own[0].accuracy:.2f}% of {len(own)} paths")
    log.info(f"choice       {found['choice']}, the best by {args.rank_by}")
    costs = f"{best.flops_m:.1f}M multiply-adds, {best.params_m:.2f}M parameters"
    log.info(f"             {best.accuracy:.2f}% ± {error:.2f}, loss {best.loss:.4f}, {costs}")
    if top:
        accuracies = ", ".join(f"{tested[row.choice]:.2f}%" for row in top)
        log.info(f"test images  top {len(top)}, supernet weights: {accuracies}")
    run = folder.resolve().parent.name if folder.name == "search" else folder.name
    name = f"--exp_name={run}_best"
    command = ["python", "supernet.py", "--choice", str(folder / "search.json"), name]
    log.info(f"next: {shlex.join(command)}")


if __name__ == "__main__":
    utils.run_script(main)
