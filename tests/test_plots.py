"""Pictures: drawn from rows alone, without a display, whatever the rows are."""

import csv
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, Run
from img.plots import kendall, kendall_interval, plot_search, plot_standalone, plot_training


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
    scored = next(csv.DictReader((search.folder / "paths.csv").read_text().splitlines()))["choice"]
    (tmp_path / "result.json").write_text(json.dumps({"choice": scored, "test_accuracy": 50.0}))
    files = [str(tmp_path / name) for name in ("metrics.csv", "paths.csv", "result.json")]
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
    assert "-> 50.00%" in result.stdout and (tmp_path / "standalone.png").exists()


def naive_kendall(first: list[float], second: list[float]) -> float:
    """Pair by pair: concordant less discordant, over the geometric mean of the pairs that are not tied in each."""
    agree, untied = 0, [0, 0]
    for i, j in itertools.combinations(range(len(first)), 2):
        signs = [(values[i] > values[j]) - (values[i] < values[j]) for values in (first, second)]
        agree += signs[0] * signs[1]
        untied = [count + abs(sign) for count, sign in zip(untied, signs, strict=True)]
    return agree / math.sqrt(untied[0] * untied[1])


def test_kendalls_tau_is_that_of_a_loop_over_pairs() -> None:
    rng = random.Random(0)
    for n in (3, 8, 20):
        first, second = ([float(rng.randrange(6)) for _ in range(n)] for _ in range(2))
        assert kendall(np.array(first), np.array(second)) == pytest.approx(naive_kendall(first, second))
    assert kendall(np.arange(5), np.arange(5)) == 1 and kendall(np.arange(5), -np.arange(5)) == -1
    assert math.isnan(kendall(np.ones(5), np.arange(5)))


def test_an_interval_of_tau_holds_about_95_of_100_truths() -> None:
    """Pairs of which half of the variance is shared; Kendall's tau is then 2 asin(r) / pi with r = 1/2, so 1/3."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        shared = rng.normal(size=40)
        low, high = kendall_interval(*(shared + rng.normal(size=40) for _ in range(2)), draws=200)
        hits += low <= 1 / 3 <= high
    assert 86 <= hits <= 100


def test_networks_trained_alone_are_set_against_their_scores(tmp_path: Path) -> None:
    """The tau is that of the random ones: neither controls, nor the best, nor children, nor what nobody trained."""
    rows = [row | {"index": i, "loss": 1 + 0.01 * i} for i, row in enumerate(made(4))]
    for i, row in enumerate(rows):
        row["choice"] = "-".join(["0"] * 19 + [str(i)])
    rows += [made(1)[0] | {"generation": -1, "choice": "-".join("1" * 20), "index": 0}]
    rows += [made(1, 80.0, loss=2.0)[0] | {"generation": 0, "choice": "-".join(["3"] * 19 + ["0"]), "index": 5}]
    rows += [made(1, 80.0)[0] | {"generation": 0, "choice": "-".join("3" * 20), "index": 4}]
    rows += [made(1, 70.0)[0] | {"generation": 1, "choice": "-".join("2" * 20), "index": 0}]
    alone = dict(
        zip([row["choice"] for row in rows], [(90, 91), (92, 92), (91, 92), (), (95,), (), (99,), (40,)], strict=True)
    )
    results = [{"choice": choice, "test_accuracy": float(a)} for choice, found in alone.items() for a in found]
    lines = plot_standalone(rows, results, tmp_path / "standalone.png")
    assert lines[:5] == [
        "random: 50.00% -> 90.50%",
        "random: 51.00% -> 92.00%",
        "random: 52.00% -> 91.50%",
        "single block: 50.00% -> 95.00%",
        "search's best: 80.00% -> 99.00%",
    ]
    assert "Kendall's tau of 3 random architectures, by accuracy: 0.33" in lines[5]
    assert "Kendall's tau of 3 random architectures, by loss: -0.33" in lines[6]
    assert min(Image.open(tmp_path / "standalone.png").size) > 300


def test_networks_that_are_all_at_chance_have_no_rank_correlation(tmp_path: Path) -> None:
    rows = [row | {"choice": "-".join(["0"] * 19 + [str(i)])} for i, row in enumerate(made(4))]
    results = [{"choice": row["choice"], "test_accuracy": 10.0} for row in rows]
    assert (
        "random architectures, by loss: not defined" in plot_standalone(rows, results, tmp_path / "standalone.png")[-1]
    )


def test_epochs_without_validation_are_left_out(tmp_path: Path) -> None:
    rows = [dict.fromkeys(("train_loss", "train_acc", "val_loss", "val_acc"), 1.0) | {"epoch": e} for e in (1, 2, 3)]
    rows[1] |= {"val_loss": "", "val_acc": None}
    plot_training(rows, tmp_path / "training.png", "search split")
    assert Image.open(tmp_path / "training.png").size[0] > 600


def test_the_pictures_in_img_have_their_tables() -> None:
    with open(ROOT / "img" / "paths.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["generation"] for row in rows} == {str(g) for g in range(-1, 10)} and len(rows) == 1454
