"""Every picture, drawn without a display from the rows of a table.

`python img/plots.py FILE.csv ...` redraws the pictures of each file beside it. With the paths.csv
of a search and the result.json of architectures that were trained alone, it also draws how well the
one predicts the other, and with --truth FILE.json truth.png, how well the scores predict a
benchmark. Without a file it redraws single_path.png.
"""

import argparse
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # run as a script: find the modules beside img/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("MPLBACKEND", None)  # unused, and a notebook's may not be installed

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data import records
from data.records import BASELINE, Scored, asked_for, best_first, evolution_rows
from model import SPACES
from utils import UserError, atomic_write, log, open_log, read_json, run_script

# What holds for a table without an args.json beside it, as img/paths.csv.
SETTINGS = {"choice": None, "split": "search", "rank_by": "loss", "population": 50}
SETTINGS |= {"num_paths": math.inf, "generations": math.inf}
SETTINGS["space_layout"] = vars(SPACES["spos_small"])
MARKERS = "v^sDP*Xph<"  # of the single-block networks; ten candidates at most

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def new_figure(
    width: float = 6.4, height: float = 4.0, columns: int = 1
) -> tuple[Figure, Axes | np.ndarray]:
    """A figure in inches, and its axes without the upper and right line."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in axes if columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    if __name__ == "__main__":
        log.info(f"wrote {path}")


def draw(plot: Callable[..., object], *arguments: object) -> None:
    """Calls a function that draws; if it cannot, as by a foreign matplotlibrc, the log says so."""
    try:
        plot(*arguments)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        log.info(f"warning: {plot.__name__} failed ({type(error).__name__}: {reason})")


def values(rows: Sequence[Scored], name: str) -> np.ndarray:
    """One column of the rows."""
    return np.array([getattr(row, name) for row in rows])


def random_draws(rows: Sequence[Scored]) -> list[Scored]:
    """The random architectures whose score is defined."""
    return [row for row in rows if row.generation == 0 and math.isfinite(row.loss)]


def plot_training(rows: Sequence[dict], path: Path, validated_on: str) -> None:
    """Loss and accuracy against epochs, from the rows of metrics.csv (None: no validation)."""
    figure, axes = new_figure(9, 3.6, columns=2)
    labels = "cross-entropy", "top-1 accuracy (%)"
    kinds = ("train", BLUE, "training batches"), ("val", ORANGE, validated_on)
    for axis, name, label in zip(axes, ("loss", "acc"), labels, strict=True):
        for kind, colour, text in kinds:
            column = f"{kind}_{name}"
            points = [(row["epoch"], row[column]) for row in rows if row[column] is not None]
            if points:
                marker = "." if len(points) < 30 else ""
                axis.plot(*zip(*points, strict=True), color=colour, label=text, marker=marker)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
    save(figure, path)


def plot_histogram(rows: Sequence[Scored], path: Path, split: str) -> None:
    """Distribution of the random paths' accuracies, and how much of it is noise of the images."""
    drawn = random_draws(rows)
    accuracies = values(drawn, "accuracy")
    median, best = np.median(accuracies), accuracies.max()
    figure, axis = new_figure()
    bins = min(30, max(5, len(drawn) // 8))
    counts, _, _ = axis.hist(accuracies, bins=bins, color=BLUE, alpha=0.75)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.axvline(median, color="black", linestyle="--", label=f"median {median:.2f}%")
    axis.axvline(best, color=ORANGE, label=f"best {best:.2f}%")
    _, noise = records.reliability(drawn, "accuracy")
    if noise is not None:
        label = f"std {accuracies.std(ddof=1):.2f}; sampling noise alone {noise:.2f}"
        height = 1.07 * counts.max()
        axis.errorbar(accuracies.mean(), height, xerr=noise, color=GREY, capsize=3, label=label)
    axis.set(xlabel=f"top-1 with the supernet's weights, {split} split (%)", ylabel="architectures")
    axis.set_title(f"{len(drawn):,} random architectures", loc="left")
    axis.legend(frameon=False, loc="upper left")
    save(figure, path)


def plot_pareto(
    rows: Sequence[Scored], path: Path, split: str, by: str, names: Sequence[str]
) -> None:
    """Accuracy against FLOPs, the front of paths that no cheaper one beats, and the choice."""
    drawn = random_draws(rows)
    children = [row for row in rows if row.generation > 0 and math.isfinite(row.loss)]
    front = []
    for row in sorted(drawn + children, key=lambda row: (row.flops_m, -row.accuracy)):
        if not front or row.accuracy > front[-1].accuracy:
            front.append(row)
    figure, axis = new_figure()
    for part, colour, label in ((drawn, BLUE, "random paths"), (children, GREY, "evolution")):
        if part:
            points = values(part, "flops_m"), values(part, "accuracy")
            axis.plot(*points, ".", color=colour, alpha=0.5, label=label)
    corners = values(front, "flops_m"), values(front, "accuracy")
    axis.step(*corners, where="post", color=ORANGE, marker="o", label="front")
    baselines = [row for row in rows if row.generation == BASELINE]
    for row, marker in zip(baselines, MARKERS, strict=False):
        style = {"color": GREEN, "fillstyle": "none", "label": f"all {names[row.choice[0]]}"}
        axis.plot(row.flops_m, row.accuracy, marker, **style)
    best = best_first(rows, by)[0]
    style = {"color": "black", "markersize": 12, "label": f"choice, the best by {by}"}
    axis.plot(best.flops_m, best.accuracy, "*", **style)
    axis.set(xlabel="millions of multiply-adds", ylabel=f"top-1 accuracy, {split} split (%)")
    # Beside the axes, where it covers nothing.
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def plot_choices(rows: Sequence[Scored], path: Path, split: str, names: Sequence[str]) -> None:
    """For every layer and block, the mean accuracy of the random paths that have it."""
    drawn = random_draws(rows)
    accuracies, choices = values(drawn, "accuracy"), values(drawn, "choice")
    means = np.full((len(names), choices.shape[1]), np.nan)
    for block, layer in np.ndindex(means.shape):
        if (chosen := choices[:, layer] == block).any():
            means[block, layer] = accuracies[chosen].mean() - accuracies.mean()
    figure, axis = new_figure(9, 2.6)
    limit = np.nanmax(np.abs(means)) or 1
    image = axis.imshow(means, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_facecolor("#CCCCCC")
    unseen = "; grey: on none of the paths" if np.isnan(means).any() else ""
    axis.set(xlabel=f"layer{unseen}", yticks=range(len(names)), yticklabels=names)
    axis.set_xticks(range(choices.shape[1]))
    title = f"mean accuracy of the paths with a block, less that of all ({split} split)"
    axis.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, label="points of top-1")
    save(figure, path)


def plot_evolution(rows: Sequence[Scored], path: Path, split: str, population: int) -> None:
    """Best accuracy so far of evolution and of random search, and each generation's median.

    The first generation of evolution is the first random paths, as many as every later one has.
    """
    drawn = [row for row in rows if row.generation == 0]
    own = evolution_rows(rows, population)
    generations = range(max(row.generation for row in rows) + 1)
    parts = [[row for row in own if row.generation == generation] for generation in generations]
    figure, axis = new_figure()
    for name, part, style in (("random search", drawn, "--"), ("evolution", own, "-")):
        best, colour = np.fmax.accumulate(values(part, "accuracy")), GREY if part is drawn else BLUE
        label, scored = f"{name}, best so far", np.arange(1, len(best) + 1)
        axis.step(scored, best, style, where="post", color=colour, label=label)
    ends = np.cumsum([len(part) for part in parts])
    medians = [np.nanmedian(values(part, "accuracy")) for part in parts]
    label = "evolution, median of a generation"
    axis.plot(ends, medians, "o", color=ORANGE, markersize=4, label=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="architectures scored", ylabel=f"top-1 accuracy, {split} split (%)")
    axis.legend(frameon=False)
    save(figure, path)


def plot_search(rows: Sequence[Scored], folder: Path, settings: dict) -> None:
    """All pictures of a search; settings: its args.json."""
    split, names = settings["split"], settings["space_layout"]["candidates"]
    plot_histogram(rows, folder / "histogram.png", split)
    plot_pareto(rows, folder / "pareto.png", split, settings["rank_by"], names)
    plot_choices(rows, folder / "choices.png", split, names)
    if any(row.generation > 0 for row in rows):
        plot_evolution(rows, folder / "evolution.png", split, settings["population"])


def plot_standalone(
    rows: Sequence[Scored], alone: dict[tuple[int, ...], list[float]], path: Path, by: str
) -> list[str]:
    """Scores against test accuracies of architectures trained alone; returns lines to print.

    alone: test accuracies by choice, one for each seed. by: "loss" or "accuracy", which the search
    ranked by. The rank correlations are those of the random architectures, without the best of the
    search, the baselines and children of evolution. A low loss counts as a high score.
    """
    best = best_first(rows, by)[0]
    scored = [row for row in rows if row.choice in alone and math.isfinite(row.loss)]
    if not scored:
        raise UserError("no result.json is of an architecture in that paths.csv")
    drawn = [row for row in scored if row.generation == 0 and row.choice != best.choice]
    singles = [row for row in scored if row.generation == BASELINE]
    kinds = ("random", BLUE, "o", drawn), ("single block", GREEN, "^", singles)
    kinds += (("search's best", ORANGE, "D", [row for row in scored if row is best]),)
    figure, axis = new_figure()
    lines = []
    for kind, colour, marker, part in kinds:
        for row in part:
            tested = alone[row.choice]
            axis.plot([row.accuracy] * len(tested), tested, "-", color=colour, alpha=0.4)
            lines.append(f"{kind}: {row.accuracy:.2f}% -> {np.mean(tested):.2f}%")
        if part:
            points = values(part, "accuracy"), [np.mean(alone[row.choice]) for row in part]
            axis.plot(*points, marker, color=colour, label=f"{kind} ({len(part)})")
    axis.set(xlabel="top-1 with the supernet's weights (%)", ylabel="test top-1 trained alone (%)")
    axis.legend(frameon=False)
    save(figure, path)
    tested = np.array([np.mean(alone[row.choice]) for row in drawn])
    for name, scores in (("accuracy", values(drawn, "accuracy")), ("loss", -values(drawn, "loss"))):
        if len(drawn) > 2:
            text = "not defined (all scores or accuracies are equal)"
            if not math.isnan(tau := records.kendall(scores, tested)):
                low, high = records.kendall_interval(scores, tested)
                text = f"{tau:.2f}, 95% of bootstrap samples from {low:.2f} to {high:.2f}"
            lines.append(f"Kendall's tau of {len(drawn)} random architectures, by {name}: {text}")
    return lines


def plot_truth(rows: Sequence[Scored], truth: dict, path: Path, settings: dict) -> list[str]:
    """Scores against the known accuracy of every network; returns lines to print.

    truth: entries with "mean_acc" (percent) and "flops" (multiply-adds) by choice, as "02012100",
    like those of NAS-Bench-Macro; equal entries are one network. settings: of the search.
    """
    names, by = settings["space_layout"]["candidates"], settings["rank_by"]
    skip = names.index("identity") if "identity" in names else -1
    drawn, order = random_draws(rows), best_first(rows, by)
    keys = {row.choice: "".join(map(str, row.choice)) for row in order}
    if lacking := [key for key in keys.values() if key not in truth]:
        raise UserError(f"the truth lacks the choice {lacking[0]}")
    known = {choice: truth[key] for choice, key in keys.items()}
    true = np.array([known[row.choice]["mean_acc"] for row in drawn])
    skips = np.array([row.choice.count(skip) for row in drawn])
    scores = {"loss": -values(drawn, "loss"), "accuracy": values(drawn, "accuracy")}
    scores |= {"multiply-adds": values(drawn, "flops_m"), "fewest identities": -skips}
    lines = []
    for name, column in scores.items():
        low, high = records.kendall_interval(column, true, draws=200)
        line = f"tau by {name}: {records.kendall(column, true):.3f} ({low:.3f} to {high:.3f})"
        if not math.isnan(equal := records.kendall(column, true, skips)):
            line += f", equally many identities {equal:.3f}"
        lines.append(line)
    same: dict[str, list[float]] = {}  # the scores of paths that are the same network
    for row in drawn:
        same.setdefault(str(known[row.choice]), []).append(getattr(row, by))
    if repeated := [np.array(group) for group in same.values() if len(group) > 1]:
        errors = np.concatenate([group - group.mean() for group in repeated])
        noise = math.sqrt((errors**2).sum() / (len(errors) - len(repeated)))
        line = f"{by}: std {values(drawn, by).std(ddof=1):.4f}; between paths that are the same"
        lines.append(f"{line} network {noise:.4f}")
    low, high = (settings.get(name) for name in ("min_flops", "max_flops"))
    networks = list({str(entry): entry for entry in truth.values()}.values())
    within = [n for n in networks if (low or 0) <= n["flops"] / 1e6 <= (high or math.inf)]
    top = [known[row.choice] for row in order[:10]]
    best, mean = top[0]["mean_acc"], np.mean([network["mean_acc"] for network in top])
    parts = {"all": networks} | ({"those within the limits": within} if low or high else {})
    for kind, part in parts.items():
        rank = 1 + sum(network["mean_acc"] > best for network in part)
        lines.append(f"choice: {best:.2f}%, rank {rank} of {len(part):,}, {kind}")
    lines.append(f"ten best: mean {mean:.2f}%, {len(set(map(str, top)))} different networks")
    figure, axis = new_figure()
    dots = axis.scatter(values(drawn, by), true, 8, skips, cmap="viridis")
    figure.colorbar(dots, label="identities")
    axis.plot(getattr(order[0], by), best, "*", color=ORANGE, markersize=14, label="choice")
    axis.set(xlabel=f"{by} with the supernet's weights", ylabel="accuracy trained alone (%)")
    axis.legend(frameon=False)
    save(figure, path)
    return lines


def plot_single_path(path: Path) -> None:
    """Three steps of single-path training: each trains one candidate in every layer."""
    rng, space = random.Random(4), SPACES["spos_small"]
    names, layers = space.candidates, range(len(space.layers))
    blocks, middle, ends = range(len(names)), (len(names) - 1) / 2, (-1.5, len(layers) + 0.5)
    figure, axes = new_figure(10, 1.6, columns=3)
    for step, axis in enumerate(axes, start=1):
        choice = [rng.randrange(len(names)) for _ in layers]
        for block in blocks:
            axis.plot(layers, [block] * len(layers), "s", color="#DDDDDD", markersize=5, zorder=1)
        path_x, path_y = [ends[0], *layers, ends[1]], [middle, *choice, middle]
        axis.plot(path_x, path_y, color=BLUE, linewidth=1, zorder=2)
        axis.plot(layers, choice, "s", color=BLUE, markersize=5, zorder=3)
        axis.plot(ends, [middle, middle], "o", color="black", markersize=5)
        labels = names if step == 1 else []
        axis.set(yticks=blocks, yticklabels=labels, ylim=(len(names) - 0.4, -0.6))
        ticks = ends[0], sum(ends) / 2, ends[1]
        axis.set_xticks(ticks, ["stem", f"{len(layers)} layers", "head"])
        axis.set_title(f"step {step}", fontsize="medium")
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.tick_params(length=0, labelsize="small")
    save(figure, path)


def main() -> None:
    """Draws the files on the command line."""
    parser = argparse.ArgumentParser(description="Draws the pictures of searches and runs.")
    parser.add_argument("files", nargs="*", type=Path, help="paths.csv, metrics.csv, result.json")
    parser.add_argument("--truth", type=Path, help="JSON of the known accuracies of all choices")
    args = parser.parse_args()
    open_log()
    if not args.files and not args.truth:
        plot_single_path(Path(__file__).with_name("single_path.png"))
    rows, alone, by, lines = [], {}, "loss", []
    for path in args.files:
        if path.suffix == ".json":
            result = read_json(path)
            if not {"choice", "test_accuracy"} <= result.keys():
                raise UserError(f"{path} is no result.json of an architecture trained alone")
            choice = records.parse_choice(result["choice"])
            alone.setdefault(choice, []).append(result["test_accuracy"])
            continue
        beside = path.with_name("args.json")
        settings = SETTINGS | (read_json(beside) if beside.exists() else {})
        if "train_loss" in path.read_text(encoding="utf-8"):
            kind = "random paths" if settings["choice"] is None else "search split"
            plot_training(records.read_metrics(path), path.with_name("training.png"), kind)
            continue
        folder, by = path.parent, settings["rank_by"]
        rows = asked_for(records.read_rows(path), settings["num_paths"], settings["generations"])
        if not random_draws(rows):
            raise UserError(f"{path} holds no random architecture with a score yet")
        plot_search(rows, folder, settings)
        if args.truth:
            lines += plot_truth(rows, read_json(args.truth), folder / "truth.png", settings)
    if (alone or args.truth) and not rows:
        raise UserError("result.json files and --truth need the paths.csv of a search")
    if alone:
        lines += plot_standalone(rows, alone, folder / "standalone.png", by)
    for line in lines:
        log.info(line)


if __name__ == "__main__":
    run_script(main)
