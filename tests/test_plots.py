"""Pictures: drawn from rows alone, without a display, whatever the rows are."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT, Run
from img.plots import plot_search, plot_training


def made(count: int, accuracy: float | None = None, loss: float = 1.0) -> list[dict]:
    row = {"flops_m": 100.0, "generation": 0, "loss": loss}
    return [
        row | {"choice": "-".join([str(i % 4)] * 20), "accuracy": accuracy or 50 + i, "half_accuracy": 50 + i}
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["one", "equal", "no controls", "nan"])
def test_degenerate_searches_are_drawn(kind: str, tmp_path: Path, recwarn) -> None:
    """matplotlib/matplotlib#6483: a single value, all values equal; no warning, no figure left open."""
    rows = {"one": made(1), "equal": made(20, 10.0), "no controls": made(30), "nan": made(12) + made(1, loss=math.nan)}
    for _ in range(3):
        plot_search(rows[kind], tmp_path)
    for name in ("histogram", "pareto", "choices"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 300
    assert not [warning for warning in recwarn if "figure" in str(warning.message)]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_csv_is_enough_to_redraw_without_a_display(run: Run, search: Run, tmp_path: Path) -> None:
    """chen0040/keras-video-classifier#8: also when the environment asks for a window."""
    for source in (run.folder / "metrics.csv", search.folder / "paths.csv"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    files = [str(tmp_path / name) for name in ("metrics.csv", "paths.csv")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "img" / "plots.py"), *files],
        env={"MPLBACKEND": "TkAgg", "PATH": "", "MPLCONFIGDIR": str(tmp_path / "config")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for name in ("histogram.png", "pareto.png", "choices.png"):
        assert (tmp_path / name).read_bytes() == (search.folder / name).read_bytes()
    assert Image.open(tmp_path / "training.png").size[0] > 600


def test_epochs_without_validation_are_left_out(tmp_path: Path) -> None:
    rows = [dict.fromkeys(("train_loss", "train_acc", "val_loss", "val_acc"), 1.0) | {"epoch": e} for e in (1, 2, 3)]
    rows[1] |= {"val_loss": "", "val_acc": None}
    plot_training(rows, tmp_path / "training.png", "search split")
    assert Image.open(tmp_path / "training.png").size[0] > 600


def test_the_pictures_in_img_have_their_tables() -> None:
    with open(ROOT / "img" / "paths.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["generation"] for row in rows} == {"-1", "0"} and len(rows) >= 50
