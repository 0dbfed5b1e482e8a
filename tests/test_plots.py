"""Pictures: drawn from tables alone, without a display, whatever is in them."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT, Run
from data.records import BASELINE, METRICS, Scored, format_choice, read_rows
from img import plots
from utils import UserError


def made(count: int, accuracy: float | None = None, loss: float = 1.0) -> list[Scored]:
    return [
        Scored(i, (i % 4,) * 20, accuracy or 50.0 + i, 50.0 + i, loss, flops_m=100.0)
        for i in range(count)
    ]


HEADER = "index,choice,accuracy,half_accuracy,loss,half_loss,flops_m,params_m,generation\n"
CHILDREN = [replace(row, generation=1) for row in made(3)]
CHILDREN += [replace(row, generation=2, loss=math.nan) for row in made(3)]


@pytest.mark.parametrize(
    "rows",
    [made(1), made(20, 10.0), made(12) + made(1, loss=math.nan), made(12) + CHILDREN],
    ids=["one", "equal", "undefined", "evolution"],
)
def test_searches_of_any_kind_are_drawn(rows: list[Scored], tmp_path: Path, recwarn) -> None:
    """matplotlib/matplotlib#6483: a single value, all values equal, no baselines; nothing warns."""
    plots.plot_search(rows, tmp_path, "search", "loss")
    assert not recwarn.list and not list(tmp_path.glob("*.tmp"))
    for name in ("histogram", "pareto", "choices", *(["evolution"] if rows[-1].generation else [])):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 300


def test_a_table_is_enough_to_redraw_without_a_display(
    run: Run, search: Run, tmp_path: Path
) -> None:
    """chen0040/keras-video-classifier#8: also when the environment asks for a window."""
    for source in (run.folder / "metrics.csv", search.folder / "paths.csv"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    choice = format_choice(read_rows(tmp_path / "paths.csv")[0].choice)
    (tmp_path / "result.json").write_text(json.dumps({"choice": choice, "test_accuracy": 50.0}))
    files = [str(tmp_path / name) for name in ("metrics.csv", "paths.csv", "result.json")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "img" / "plots.py"), *files],
        env={"MPLBACKEND": "TkAgg", "PATH": "", "MPLCONFIGDIR": str(tmp_path / "config")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for name in ("histogram.png", "pareto.png", "choices.png"):
        assert (tmp_path / name).read_bytes() == (search.folder / name).read_bytes()
    assert Image.open(tmp_path / "training.png").size[0] > 600
    assert "single block: " in result.stdout and "-> 50.00%" in result.stdout
    assert (tmp_path / "standalone.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("paths.csv", HEADER, "no random architect"),
        ("search.json", "{}", "no result.json"),
        (
            "result.json",
            json.dumps({"choice": format_choice((0,) * 20), "test_accuracy": 50}),
            "need the paths.csv",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(
    tmp_path: Path, monkeypatch, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path / name)])
    with pytest.raises(UserError, match=message):
        plots.main()


def test_networks_trained_alone_are_set_against_their_scores(tmp_path: Path) -> None:
    """The tau is that of the random ones: neither baselines, nor the best, nor children, nor what nobody trained."""
    tested = {  # (accuracy, loss, generation) of a row and the test accuracies of its network
        (50.0, 1.00, 0): [90.0, 91.0],
        (51.0, 1.01, 0): [92.0, 92.0],
        (52.0, 1.02, 0): [91.0, 92.0],
        (53.0, 1.03, 0): [],
        (55.0, 1.00, BASELINE): [95.0],
        (80.0, 0.90, 0): [99.0],
        (70.0, 1.00, 1): [40.0],
    }
    rows = [
        Scored(i, (i,) * 20, a, loss=loss, generation=generation)
        for i, (a, loss, generation) in enumerate(tested)
    ]
    alone = {row.choice: found for row, found in zip(rows, tested.values(), strict=True) if found}
    lines = plots.plot_standalone(rows, alone, tmp_path / "standalone.png", "loss")
    assert lines[:5] == [
        "random: 50.00% -> 90.50%",
        "random: 51.00% -> 92.00%",
        "random: 52.00% -> 91.50%",
        "single block: 55.00% -> 95.00%",
        "search's best: 80.00% -> 99.00%",
    ]
    assert "Kendall's tau of 3 random architectures, by accuracy: 0.33" in lines[5]
    assert "Kendall's tau of 3 random architectures, by loss: -0.33" in lines[6]
    assert min(Image.open(tmp_path / "standalone.png").size) > 300
    chance = plots.plot_standalone(
        rows, {choice: [10.0] for choice in alone}, tmp_path / "standalone.png", "loss"
    )
    assert "random architectures, by loss: not defined" in chance[-1]


def test_epochs_without_validation_are_left_out(tmp_path: Path) -> None:
    rows = [dict.fromkeys(METRICS, 1.0) | {"epoch": epoch} for epoch in (1, 2, 3)]
    rows[1] |= {"val_loss": None, "val_acc": None}
    plots.plot_training(rows, tmp_path / "training.png", "search split")
    assert Image.open(tmp_path / "training.png").size[0] > 600


def test_the_pictures_in_img_have_their_tables() -> None:
    generations = Counter(row.generation for row in read_rows(ROOT / "img" / "paths.csv"))
    assert set(generations) == set(range(-1, 20)) and generations.total() == 1954
