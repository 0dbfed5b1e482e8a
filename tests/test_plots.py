"""Pictures: drawn from tables alone, without a display, whatever is in them."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from conftest import ROOT
from data.records import BASELINE, METRICS, Scored, format_choice, read_rows
from img import plots
from model import SPACES
from utils import UserError


def made(count, accuracy=None, loss=1.0):
    rows = [Scored(i, (i % 4,) * 20, 50.0 + i, 50.0 + i, loss, flops_m=100.0) for i in range(count)]
    return [replace(row, accuracy=accuracy or row.accuracy) for row in rows]


CHILDREN = [replace(row, generation=1) for row in made(3)]
CHILDREN += [replace(row, generation=2, loss=math.nan) for row in made(3)]
SEARCHES = {"one": made(1), "equal": made(20, 10.0), "evolution": made(12) + CHILDREN}
SEARCHES["undefined"] = made(12) + made(1, loss=math.nan)


@pytest.mark.parametrize("rows", SEARCHES.values(), ids=SEARCHES)
def test_any_search_is_drawn_without_warnings(rows, tmp_path, recwarn):
    """A single value, all values equal, no baselines (matplotlib/matplotlib#6483)."""
    plots.plot_search(rows, tmp_path, "search", "loss", SPACES["spos_small"].candidates)
    assert not recwarn.list and not list(tmp_path.glob("*.tmp"))
    for name in ("histogram", "pareto", "choices", *(["evolution"] if rows[-1].generation else [])):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 300


def test_tables_are_redrawn_without_a_display(run, search, tmp_path):
    """Also if the environment asks for a window (chen0040/keras-video-classifier#8)."""
    for source in (run.folder / "metrics.csv", search.folder / "paths.csv"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    choice = format_choice(read_rows(tmp_path / "paths.csv")[0].choice)
    (tmp_path / "result.json").write_text(json.dumps({"choice": choice, "test_accuracy": 50.0}))
    files = [tmp_path / name for name in ("metrics.csv", "paths.csv", "result.json")]
    command = [sys.executable, ROOT / "img" / "plots.py", *files]
    env = {"MPLBACKEND": "TkAgg", "PATH": "", "MPLCONFIGDIR": str(tmp_path / "config")}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("histogram.png", "pareto.png", "choices.png"):
        assert (tmp_path / name).read_bytes() == (search.folder / name).read_bytes()
    assert Image.open(tmp_path / "training.png").size[0] > 600
    assert "single block: " in result.stdout and "-> 50.00%" in result.stdout
    assert (tmp_path / "standalone.png").exists()


HEADER = "index,choice,accuracy,half_accuracy,loss,half_loss,flops_m,params_m,generation\n"
RESULT = json.dumps({"choice": format_choice((0,) * 20), "test_accuracy": 50})
UNDRAWABLE = [("paths.csv", HEADER, "no random architect"), ("search.json", "{}", "no result.json")]
UNDRAWABLE += [("result.json", RESULT, "need the paths.csv")]


@pytest.mark.parametrize(("name", "content", "message"), UNDRAWABLE)
def test_a_file_without_a_picture_is_refused(tmp_path, monkeypatch, name, content, message):
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path / name)])
    with pytest.raises(UserError, match=message):
        plots.main()


def test_networks_trained_alone_are_set_against_their_scores(tmp_path):
    """Kendall's tau leaves out baselines, the best, children and what nobody trained."""
    tested = {  # (accuracy, loss, generation) of a row and the test accuracies of its network
        (50.0, 1.00, 0): [90.0, 91.0],
        (51.0, 1.01, 0): [92.0, 92.0],
        (52.0, 1.02, 0): [91.0, 92.0],
        (53.0, 1.03, 0): [],
        (55.0, 1.00, BASELINE): [95.0],
        (80.0, 0.90, 0): [99.0],
        (70.0, 1.00, 1): [40.0],
    }
    rows, alone, path = [], {}, tmp_path / "standalone.png"
    for i, ((accuracy, loss, generation), found) in enumerate(tested.items()):
        rows.append(Scored(i, (i,) * 20, accuracy, loss=loss, generation=generation))
        if found:
            alone[rows[-1].choice] = found
    lines = plots.plot_standalone(rows, alone, path, "loss")
    points = "random: 50.00% -> 90.50%; random: 51.00% -> 92.00%; random: 52.00% -> 91.50%; "
    points += "single block: 55.00% -> 95.00%; search's best: 80.00% -> 99.00%"
    assert lines[:5] == points.split("; ")
    assert "Kendall's tau of 3 random architectures, by accuracy: 0.33" in lines[5]
    assert "Kendall's tau of 3 random architectures, by loss: -0.33" in lines[6]
    assert min(Image.open(path).size) > 300
    chance = plots.plot_standalone(rows, {choice: [10.0] for choice in alone}, path, "loss")
    assert "random architectures, by loss: not defined" in chance[-1]


def test_epochs_without_validation_are_left_out(tmp_path):
    rows = [dict.fromkeys(METRICS, 1.0) | {"epoch": epoch} for epoch in (1, 2, 3)]
    rows[1] |= {"val_loss": None, "val_acc": None}
    plots.plot_training(rows, tmp_path / "training.png", "search split")
    assert Image.open(tmp_path / "training.png").size[0] > 600


def test_the_pictures_in_img_have_their_tables():
    generations = Counter(row.generation for row in read_rows(ROOT / "img" / "paths.csv"))
    assert set(generations) == set(range(-1, 20)) and generations.total() == 1954
