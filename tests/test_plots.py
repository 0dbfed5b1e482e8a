"""Pictures: drawn from tables alone, without a display, whatever is in them."""

import math
from dataclasses import replace

import pytest
from PIL import Image

from conftest import TIMEOUT, start
from data.records import BASELINE, METRICS, Scored, format_choice, write_csv
from img import plots
from utils import UserError, write_json


def made(count, **changes):
    rows = [Scored(i, (i % 4,) * 20, 50.0 + i, 50.0 + i, 1.0, flops_m=100.0) for i in range(count)]
    return [replace(row, **changes) for row in rows]


UNDEFINED = made(1, loss=math.nan) + made(3, loss=math.nan, generation=2)
SEARCHES = {"one": made(1), "equal": made(20, accuracy=10.0)}
SEARCHES["evolution"] = made(12) + made(3, generation=1) + UNDEFINED
RESULT = {"choice": format_choice((0,) * 20), "test_accuracy": 50.0}


@pytest.mark.parametrize("rows", SEARCHES.values(), ids=SEARCHES)
def test_any_search_is_drawn_without_warnings(rows, tmp_path, recwarn):
    """A single value, all values equal, no baselines (matplotlib/matplotlib#6483)."""
    plots.plot_search(rows, tmp_path, plots.SETTINGS)
    pictures = ["histogram.png", "pareto.png", "choices.png", "evolution.png"]
    expected = set(pictures if rows[-1].generation else pictures[:3])
    assert not recwarn.list and {path.name for path in tmp_path.iterdir()} == expected
    assert all(min(Image.open(path).size) > 300 for path in tmp_path.iterdir())


def test_tables_are_redrawn_without_a_display(search, tmp_path):
    """Also if the environment asks for a notebook's (chen0040/keras-video-classifier#8)."""
    epochs = [dict.fromkeys(METRICS, 1.0) | {"epoch": epoch} for epoch in (1, 2, 3)]
    epochs[1] |= {"val_loss": None, "val_acc": None}
    write_csv(tmp_path / "metrics.csv", epochs)
    (tmp_path / "paths.csv").write_bytes((search.folder / "paths.csv").read_bytes())
    write_json(tmp_path / "result.json", RESULT)
    files = [tmp_path / name for name in ("metrics.csv", "paths.csv", "result.json")]
    backend = "module://matplotlib_inline.backend_inline"
    process = start("img/plots.py", *files, MPLBACKEND=backend, DISPLAY="")
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and "-> 50.00%" in out, err
    for name in ("histogram.png", "pareto.png", "choices.png"):
        assert (tmp_path / name).read_bytes() == (search.folder / name).read_bytes()
    for name in ("training.png", "standalone.png"):
        assert min(Image.open(tmp_path / name).size) > 300


def test_a_file_without_a_picture_is_refused(tmp_path, monkeypatch):
    header = ",".join(UNDEFINED[0].as_json())
    (tmp_path / "paths.csv").write_text(header + "\n")
    write_json(tmp_path / "search.json", {})
    write_json(tmp_path / "result.json", RESULT)
    messages = {"paths.csv": "no random architect", "search.json": "no result.json"}
    messages |= dict.fromkeys(["result.json", "--truth=truth.json"], "need the paths.csv")
    for name, message in messages.items():
        given = name if name.startswith("--") else str(tmp_path / name)
        monkeypatch.setattr("sys.argv", ["plots.py", given])
        with pytest.raises(UserError, match=message):
            plots.main()


def test_networks_trained_alone_are_set_against_their_scores(tmp_path):
    """Kendall's tau leaves out baselines, the best, children and what nobody trained."""
    tested = [  # accuracy, loss and generation of a row, and the test accuracies of its network
        (50.0, 1.00, 0, [90.0, 91.0]),
        (51.0, 1.01, 0, [92.0, 92.0]),
        (52.0, 1.02, 0, [91.0, 92.0]),
        (55.0, 1.00, BASELINE, [95.0]),
        (80.0, 0.90, 0, [99.0]),
        (70.0, 1.00, 1, [40.0]),
        (53.0, 1.03, 0, []),
    ]
    rows = [Scored(i, (i,), a, loss=loss, generation=g) for i, (a, loss, g, _) in enumerate(tested)]
    alone = {row.choice: tested[row.index][3] for row in rows[:-1]}
    lines = plots.plot_standalone(rows, alone, tmp_path / "standalone.png", "loss")
    points = "random: 50.00% -> 90.50%; random: 51.00% -> 92.00%; random: 52.00% -> 91.50%; "
    points += "single block: 55.00% -> 95.00%; search's best: 80.00% -> 99.00%"
    assert lines[:5] == points.split("; ")
    assert "Kendall's tau of 3 random architectures, by accuracy: 0.33" in lines[5]
    assert "Kendall's tau of 3 random architectures, by loss: -0.33" in lines[6]
