"""Search spaces as data: NAS-Bench-Macro, a run in another space, scores against the truth."""

from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import random_search
import supernet
from conftest import ROOT
from data.records import Scored, load_checkpoint, read_rows
from img import plots
from model import SPACES, SearchSpace, Supernet
from utils import UserError, read_json, write_json

TINY = "--dataset digits --image_size 8 --batch_size 400 --epochs 1".split()
MACRO = asdict(SPACES["nasbench_macro"])


def test_the_costs_of_nasbench_macro_are_the_published_ones():
    """xiusu/NAS-Bench-Macro's table; its classifier has 10 parameters more, the bias."""
    space = SearchSpace(Supernet(10, 32, space=SPACES["nasbench_macro"]))
    published = {"02012100": (47_327_744, 890_666), "11111221": (65_012_224, 2_181_386)}
    published |= {"00011110": (31_390_208, 1_118_378), "22222222": (105_660_928, 2_932_586)}
    for text, costs in published.items():
        choice = tuple(map(int, text))
        assert (space.flops(choice), space.params(choice) + 10) == costs
    assert space.flops((0,) * 8) == 7_713_280 and space.size == 3**8


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A supernet of another space, its search, and its choice alone with both initial weights."""
    out = tmp_path_factory.mktemp("runs")
    where = ["--out_dir", str(out), "--exp_name"]
    supernet.main([*TINY, *where, "macro", "--space", "nasbench_macro", "--init", "official"])
    searching = "--num_paths 8 --calibration_images 250 --top_k 2 --max_flops 3".split()
    random_search.main(["--ckpt", str(out / "macro"), *searching])
    found = ["--choice", str(out / "macro/search/search.json"), *TINY[4:]]
    supernet.main([*found, *where, "alone"])
    supernet.main([*found, *where, "from", "--init_from", str(out / "macro/last.pth")])
    return out


def test_a_run_follows_its_space(out):
    """With another number of layers and candidates, through search and stand-alone training."""
    found = read_json(out / "macro/search/search.json")
    result = read_json(out / "alone/result.json")
    files = [read_json(out / name / "args.json") for name in ("macro", "macro/search", "alone")]
    for recorded in (load_checkpoint(out / "macro/last.pth")["args"], found, *files):
        assert (recorded["space"], recorded["space_layout"]) == ("nasbench_macro", MACRO)
    rows = read_rows(out / "macro/search/paths.csv")
    assert {row.choice for row in rows[:3]} == {(n,) * 8 for n in range(3)}
    assert all(row.flops_m <= 3 for row in rows[3:])
    assert list(found["statistics"]["baselines"]) == MACRO["candidates"]
    assert (result["choice"], result["flops_m"]) == (found["choice"], found["flops_m"])
    network = torch.export.load(out / "alone/model.pt2").module()
    assert network(torch.zeros(3, 3, 8, 8, dtype=torch.uint8)).shape == (3, 10)
    supernet.main(["--out_dir", str(out), "--exp_name", "macro", "--resume"])


def test_the_space_of_the_readme_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own space")[1]
    code = section.split("```python\n")[1].split("```")[0]
    exec(code.replace('"mine"])', '"mine", "--epochs", "1", "--image_size", "8"])'), {})
    space = load_checkpoint(Path("runs/mine/last.pth"))["args"]["space_layout"]
    assert space == asdict(SPACES.pop("mine"))


def test_scores_are_set_against_the_truth(out, tmp_path, monkeypatch):
    """Rank correlations as a loop over pairs counts them, and the rank of the choice."""
    rng, rows, truth = np.random.default_rng(0), [], {}
    for i in range(60):
        scores = {"accuracy": rng.uniform(40, 60), "loss": rng.random(), "flops_m": rng.random()}
        rows.append(Scored(i, tuple(map(int, f"{i:08b}")), **scores))
        truth[f"{i:08b}"] = {"mean_acc": rng.uniform(80, 90), "flops": 1}
    settings = plots.SETTINGS | {"space_layout": MACRO}
    true = [network["mean_acc"] for network in truth.values()]
    lines = plots.plot_truth(rows, truth, tmp_path / "truth.png", settings)
    agree, equal = [], []
    for a, b in combinations(rows, 2):
        agree.append(np.sign(b.loss - a.loss) * np.sign(true[a.index] - true[b.index]))
        if a.choice.count(0) == b.choice.count(0):
            equal.append(agree[-1])
    assert lines[0].startswith(f"tau by loss: {np.mean(agree):.3f} (")
    assert lines[0].endswith(f"identities {np.mean(equal):.3f}")
    best = true[min(rows, key=lambda row: row.loss).index]
    rank = sorted(true, reverse=True).index(best) + 1
    assert f"choice: {best:.2f}%, rank {rank} of 60, all" in lines
    assert min(Image.open(tmp_path / "truth.png").size) > 300
    truth[f"{1:08b}"] = truth[f"{0:08b}"]  # two paths that are the same network
    noise = abs(rows[0].loss - rows[1].loss) / 2**0.5
    lines = plots.plot_truth(rows, truth, tmp_path / "truth.png", settings)
    assert any(line.endswith(f"same network {noise:.4f}") for line in lines)
    write_json(tmp_path / "truth.json", truth)
    files = [str(out / "macro/search/paths.csv"), "--truth", str(tmp_path / "truth.json")]
    monkeypatch.setattr("sys.argv", ["plots.py", *files])
    with pytest.raises(UserError, match="the truth lacks the choice"):
        plots.main()
