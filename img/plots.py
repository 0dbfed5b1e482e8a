"""Every picture, drawn from rows of a CSV file without a display. The only module that imports matplotlib.

`python img/plots.py FILE.csv ...` redraws the pictures of each file beside it. With a search's paths.csv and the
result.json of architectures that were trained alone, it also draws how well the one predicts the other. Without a file
it redraws single_path.png, which needs none.
"""

import argparse
import csv
import json
import math
import random
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

BLOCKS = {"0": "3x3", "1": "5x5", "2": "7x7", "3": "xception"}
MARKERS = "v^sD"  # of the four single-block networks

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)


def _axes(width: float = 6.4, height: float = 4.0, columns: int = 1):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in axes if columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_training(rows: list[dict], path: Path, validated_on: str) -> None:
    """Loss and accuracy against epochs, from the rows of metrics.csv (None or empty: no validation)."""
    figure, axes = _axes(9, 3.6, columns=2)
    for axis, name, label in zip(axes, ("loss", "acc"), ("cross-entropy", "top-1 accuracy (%)"), strict=True):
        for kind, colour, text in (("train", BLUE, "training batches"), ("val", ORANGE, validated_on)):
            points = [
                (int(r["epoch"]), float(r[f"{kind}_{name}"])) for r in rows if r[f"{kind}_{name}"] not in (None, "")
            ]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=text, marker="." if len(points) < 30 else "")
        axis.set(xlabel="epoch", ylabel=label)
        axis.legend(frameon=False)
    _save(figure, path)


def ranking(rows: list[dict], by: str = "accuracy") -> tuple[float | None, float | None]:
    """How far a ranking by "accuracy" or "loss" can be trusted: its reliability, and the noise within it, in its units.

    The reliability is the correlation r of the scores on the two halves of the split, stepped up to the whole split as
    2r / (1 + r) (Spearman and Brown, 1910); the noise is the spread times sqrt(1 - reliability). Both are None with
    fewer than 10 paths, without spread, and if r is negative.
    """
    whole, first = (np.array([float(row[name]) for row in rows]) for name in (by, f"half_{by}"))
    second = 2 * whole - first
    if len(rows) < 10 or min(first.std(), second.std(), whole.std()) == 0:
        return None, None
    r = np.corrcoef(first, second)[0, 1]
    if r < 0:
        return None, None
    reliability = 2 * r / (1 + r)
    return float(reliability), float(whole.std(ddof=1) * math.sqrt(1 - reliability))


def evolving(rows: list[dict], population: int) -> list[dict]:
    """The rows that evolution counts as its own: the first random draws and all children."""
    return [
        row
        for row in rows
        if int(row["generation"]) >= 0 and (int(row["generation"]) or int(row["index"]) < population)
    ]


def _fair(rows: list[dict]) -> list[dict]:
    return [row for row in rows if int(row["generation"]) == 0 and math.isfinite(float(row["loss"]))]


def _values(rows: list[dict], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _controls(rows: list[dict]) -> list[tuple[str, dict]]:
    return [(f"all {BLOCKS[row['choice'][0]]}", row) for row in rows if int(row["generation"]) == -1]


def plot_histogram(rows: list[dict], path: Path, split: str = "search") -> None:
    """Distribution of the random paths' accuracies, beside the noise within the ranking."""
    fair = _fair(rows)
    accuracies = np.array(_values(fair, "accuracy"))
    figure, axis = _axes()
    counts, _, _ = axis.hist(accuracies, bins=min(30, max(5, len(fair) // 8)), color=BLUE, alpha=0.75)
    axis.yaxis.get_major_locator().set_params(integer=True)
    top = counts.max()
    axis.axvline(np.median(accuracies), color="black", linestyle="--", label=f"median {np.median(accuracies):.2f}%")
    axis.axvline(accuracies.max(), color=ORANGE, label=f"best {accuracies.max():.2f}%")
    for (label, row), marker in zip(_controls(rows), MARKERS, strict=False):
        accuracy = float(row["accuracy"])
        text = f"{label} {accuracy:.2f}%"  # and hollow markers, since two of them may coincide
        axis.plot(accuracy, -0.04 * top, marker, color=GREEN, fillstyle="none", clip_on=False, label=text)
    _, noise = ranking(fair)
    bars = [("spread", accuracies.std(ddof=1) if len(fair) > 1 else 0, BLUE)]
    bars += [("noise within the ranking", noise, GREY)] if noise is not None else []
    for i, (name, sd, colour) in enumerate(bars):
        height = top * (1.08 + 0.09 * i)
        axis.errorbar(np.mean(accuracies), height, xerr=sd, color=colour, capsize=3, label=f"{name} ±{sd:.2f}")
    axis.set(xlabel=f"top-1 accuracy with the supernet's weights, {split} split (%)", ylabel="architectures")
    axis.set_title(f"{len(fair):,} random architectures", loc="left")
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def plot_pareto(rows: list[dict], path: Path, split: str = "search") -> None:
    """Accuracy against FLOPs, with the front: the paths that no cheaper one beats."""
    fair = sorted(_fair(rows), key=lambda row: (float(row["flops_m"]), -float(row["accuracy"])))
    figure, axis = _axes()
    axis.plot(_values(fair, "flops_m"), _values(fair, "accuracy"), ".", color=BLUE, alpha=0.5, label="random paths")
    front = []
    for row in fair:
        if not front or float(row["accuracy"]) > float(front[-1]["accuracy"]):
            front.append(row)
    axis.step(
        _values(front, "flops_m"), _values(front, "accuracy"), where="post", color=ORANGE, marker="o", label="front"
    )
    for (label, row), marker in zip(_controls(rows), MARKERS, strict=False):
        axis.plot(float(row["flops_m"]), float(row["accuracy"]), marker, color=GREEN, markersize=8, label=label)
    axis.set(xlabel="millions of multiply-adds", ylabel=f"top-1 accuracy, {split} split (%)")
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def plot_choices(rows: list[dict], path: Path, split: str = "search") -> None:
    """For every layer and block, the mean accuracy of the random paths that have it, less the mean of all."""
    fair = _fair(rows)
    accuracies = np.array(_values(fair, "accuracy"))
    choices = np.array([[int(n) for n in row["choice"].split("-")] for row in fair])
    means = np.full((4, choices.shape[1]), np.nan)
    for layer in range(choices.shape[1]):
        for block in range(4):
            if (chosen := choices[:, layer] == block).any():
                means[block, layer] = accuracies[chosen].mean() - accuracies.mean()
    figure, axis = _axes(9, 2.6)
    limit = np.nanmax(np.abs(means)) or 1
    image = axis.imshow(means, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    axis.set(xlabel="layer", yticks=range(4), yticklabels=BLOCKS.values())
    axis.set_xticks(range(choices.shape[1]))
    axis.set_title(
        f"mean accuracy of the paths with a block, less that of all ({split} split)", loc="left", fontsize=10
    )
    figure.colorbar(image, label="points of top-1")
    _save(figure, path)


def plot_evolution(rows: list[dict], path: Path, split: str = "search") -> None:
    """Best accuracy so far against evaluations, evolution beside random search, and each generation's median.

    Evolution's first generation is the first random paths, as many as every later one has.
    """
    generations = [int(row["generation"]) for row in rows]
    drawn = [row for row in rows if int(row["generation"]) == 0]
    own = evolving(rows, population=generations.count(1))
    parts = [[row for row in own if int(row["generation"]) == g] for g in range(max(generations) + 1)]
    figure, axis = _axes()
    for name, part, colour, style in (("random search", drawn, GREY, "--"), ("evolution", own, BLUE, "-")):
        best = np.fmax.accumulate(_values(part, "accuracy"))
        axis.step(np.arange(1, len(best) + 1), best, style, where="post", color=colour, label=f"{name}, best so far")
    ends = np.cumsum([len(part) for part in parts])
    medians = [np.nanmedian(_values(part, "accuracy")) for part in parts]
    axis.plot(ends, medians, "o", color=ORANGE, markersize=4, label="evolution, median of a generation")
    axis.set(xlabel="architectures scored", ylabel=f"top-1 accuracy, {split} split (%)")
    axis.legend(frameon=False)
    _save(figure, path)


def plot_search(rows: list[dict], folder: Path, split: str = "search") -> None:
    """All pictures of a search, from the rows of paths.csv."""
    plot_histogram(rows, folder / "histogram.png", split)
    plot_pareto(rows, folder / "pareto.png", split)
    plot_choices(rows, folder / "choices.png", split)
    if any(int(row["generation"]) > 0 for row in rows):
        plot_evolution(rows, folder / "evolution.png", split)


def kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b, the rank correlation that corrects for ties; nan if one of them is constant."""
    a, b = (np.sign(np.subtract.outer(values, values)) for values in (first, second))
    with np.errstate(invalid="ignore"):
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def kendall_interval(first: np.ndarray, second: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The middle 95% of Kendall's tau over bootstrap samples of the pairs."""
    samples = np.random.default_rng(0).integers(len(first), size=(draws, len(first)))
    return tuple(np.nanpercentile([kendall(first[sample], second[sample]) for sample in samples], [2.5, 97.5]))


def plot_standalone(rows: list[dict], results: list[dict], path: Path, rank_by: str = "loss") -> list[str]:
    """The supernet's scores against test accuracies of the same architectures trained alone; returns lines to print.

    rows: of paths.csv; results: contents of result.json, several of a choice are seeds; rank_by: what the search chose
    by. The rank correlations are those of the random architectures: without the controls, the search's best and
    evolution's, which were not drawn at random. A low loss counts as a high score.
    """
    rows = [row for row in rows if math.isfinite(float(row["loss"]))]
    scores = {row["choice"]: (float(row["accuracy"]), -float(row["loss"])) for row in rows}
    order = -1 if rank_by == "loss" else 1
    best = max((row["choice"] for row in rows if int(row["generation"]) >= 0), key=lambda c: scores[c][::order])
    kinds = {"random": (BLUE, "o"), "single block": (GREEN, "^"), "search's best": (ORANGE, "D")}
    points: dict[str, tuple[str, list[float]]] = {}
    for row in rows:
        kind = "single block" if int(row["generation"]) < 0 else "random"
        kind = "search's best" if row["choice"] == best else kind
        alone = [result["test_accuracy"] for result in results if result["choice"] == row["choice"]]
        if alone and (int(row["generation"]) <= 0 or row["choice"] == best):
            points[row["choice"]] = kind, alone
    figure, axis = _axes()
    for kind, (colour, marker) in kinds.items():
        part = [(scores[choice][0], alone) for choice, (k, alone) in points.items() if k == kind]
        for score, alone in part:
            axis.plot([score] * len(alone), alone, "-", color=colour, alpha=0.4)
        means = [np.mean(alone) for _, alone in part]
        axis.plot([score for score, _ in part], means, marker, color=colour, label=f"{kind} ({len(part)})")
    axis.set(xlabel="top-1 with the supernet's weights (%)", ylabel="test top-1 trained alone (%)")
    axis.legend(frameon=False)
    _save(figure, path)
    lines = [f"{kind}: {scores[choice][0]:.2f}% -> {np.mean(alone):.2f}%" for choice, (kind, alone) in points.items()]
    drawn = [(*scores[choice], np.mean(alone)) for choice, (kind, alone) in points.items() if kind == "random"]
    for name, column in (("accuracy", 0), ("loss", 1)) if len(drawn) > 2 else ():
        table = np.array(drawn)
        first, second = table[:, column], table[:, 2]
        tau, text = kendall(first, second), "not defined (all scores or all accuracies are the same)"
        if not math.isnan(tau):
            low, high = kendall_interval(first, second)
            text = f"{tau:.2f}, 95% of bootstrap samples from {low:.2f} to {high:.2f}"
        lines.append(f"Kendall's tau of {len(drawn)} random architectures, by {name}: {text}")
    return lines


def plot_single_path(path: Path) -> None:
    """Three steps of single-path training: every layer has four candidates, each step trains one path through them."""
    rng = random.Random(4)
    figure, axes = _axes(9, 2.4, columns=3)
    names = list(BLOCKS.values())
    for step, axis in enumerate(axes, start=1):
        choice = [rng.randrange(4) for _ in range(8)]
        layers = range(1, 9)
        for layer, chosen in zip(layers, choice, strict=True):
            axis.plot([layer] * 4, range(4), "s", color="#DDDDDD", markersize=11, zorder=1)
            axis.plot(layer, chosen, "s", color=BLUE, markersize=11, zorder=3)
        axis.plot([0, *layers, 9], [1.5, *choice, 1.5], color=BLUE, linewidth=1.5, zorder=2)
        axis.plot([0, 9], [1.5, 1.5], "o", color="black", markersize=7)
        axis.set(yticks=range(4), yticklabels=names if step == 1 else [], ylim=(3.6, -0.6))
        axis.set_xticks([0, 1, 8, 9], ["stem", "1", "20", "head"], fontsize="small")
        axis.set_xlabel("layer", fontsize="small")
        axis.set_title(f"step {step}", fontsize="medium")
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.tick_params(length=0)
    _save(figure, path)


def redraw(path: Path, split: str) -> list[dict]:
    """Draws the pictures of a table beside it; returns the rows of a search, none for a run."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and "train_loss" in rows[0]:
        plot_training(rows, path.with_name("training.png"), "held out")
        return []
    if rows and "half_accuracy" in rows[0]:  # the file has them in the order in which they were scored
        rows.sort(key=lambda row: (int(row["generation"]), int(row["index"])))
        plot_search(rows, path.parent, split)
        return rows
    raise SystemExit(f"error: {path} is neither a paths.csv nor a metrics.csv with rows")


def main() -> None:
    """Draws what the files on the command line hold."""
    parser = argparse.ArgumentParser(description="Draws the pictures of searches and runs from their files.")
    parser.add_argument("files", nargs="*", type=Path, help="paths.csv, metrics.csv; result.json beside a paths.csv")
    parser.add_argument("--split", default="search", help="the images that a search scored on (default: search)")
    parser.add_argument(
        "--rank_by", choices=("loss", "accuracy"), default="loss", help="what a search chose by (default: loss)"
    )
    args = parser.parse_args()
    if not args.files:
        plot_single_path(Path(__file__).with_name("single_path.png"))
    tables = [path for path in args.files if path.suffix != ".json"]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.files if path.suffix == ".json"]
    rows = [row for path in tables for row in redraw(path, args.split)]
    if results and not rows:
        raise SystemExit("error: result.json files need the paths.csv of the search that scored their architectures")
    if results:
        print("\n".join(plot_standalone(rows, results, tables[0].with_name("standalone.png"), args.rank_by)))


if __name__ == "__main__":
    main()
