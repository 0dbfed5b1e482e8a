"""Every picture, drawn from rows of a CSV file without a display. The only module that imports matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure

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
