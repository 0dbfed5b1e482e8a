"""Search spaces as data: NAS-Bench-Macro, a run in another space, scores against the truth."""

import json
import random
from dataclasses import asdict, replace
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
from utils import UserError, read_json

TINY = "--dataset digits --image_size 8 --batch_size 400 --epochs 1".split()
SEARCH = "--num_paths 8 --calibration_images 250 --top_k 2".split()
CHOICE = "0-1-2-0-1-2-0-1"


def test_the_costs_of_nasbench_macro_are_the_published_ones() -> None:
    """xiusu/NAS-Bench-Macro's table; its classifier has 10 parameters more, the bias."""
    with torch.device("meta"):
        space = SearchSpace(Supernet(10, 32, space=SPACES["nasbench_macro"]))
    published = {
        "02012100": (47_327_744, 890_666),
        "11111221": (65_012_224, 2_181_386),
        "00011110": (31_390_208, 1_118_378),
        "22222222": (105_660_928, 2_932_586),
    }
    for text, costs in published.items():
        choice = tuple(map(int, text))
        assert (space.flops(choice), space.params(choice) + 10) == costs
    assert space.flops((0,) * 8) == 7_713_280 and space.size == 3**8


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet of another space, its search, and its choice alone with both initial weights."""
    out = tmp_path_factory.mktemp("runs")
    where = ["--out_dir", str(out), "--exp_name"]
    supernet.main([*TINY, *where, "macro", "--space", "nasbench_macro", "--init", "official"])
    random_search.main(["--ckpt", str(out / "macro"), *SEARCH, "--max_flops", "3"])
    found = ["--choice", str(out / "macro/search/search.json"), *TINY[4:]]
    supernet.main([*found, *where, "alone"])
    supernet.main([*found, *where, "from", "--init_from", str(out / "macro/last.pth")])
    return out


def test_a_run_follows_its_space(out: Path) -> None:
    """With another number of layers and candidates, through search and stand-alone training."""
    space, found = asdict(SPACES["nasbench_macro"]), read_json(out / "macro/search/search.json")
    files = [read_json(out / name / "args.json") for name in ("macro", "macro/search", "alone")]
    for recorded in (load_checkpoint(out / "macro/last.pth")["args"], found, *files):
        assert (recorded["space"], recorded["space_layout"]) == ("nasbench_macro", space)
    rows = read_rows(out / "macro/search/paths.csv")
    assert {row.choice for row in rows[:3]} == {(n,) * 8 for n in range(3)}
    assert all(row.flops_m <= 3 for row in rows[3:]) and list(found["statistics"]["baselines"]) == [
        "identity",
        "mb3_k3",
        "mb6_k5",
    ]
    result = read_json(out / "alone/result.json")
    assert (result["choice"], result["flops_m"]) == (found["choice"], found["flops_m"])
    network = torch.export.load(out / "alone/model.pt2").module()
    assert network(torch.zeros(3, 3, 8, 8, dtype=torch.uint8)).shape == (3, 10)
    supernet.main(["--out_dir", str(out), "--exp_name", "macro", "--resume"])


@pytest.mark.parametrize("case", ["--resume", "--choice", "--init_from", "other candidates"])
def test_another_space_is_refused(out: Path, tmp_path: Path, monkeypatch, case: str) -> None:
    """In one line: for a run, for a choice, for initial weights, and for a search."""
    found, checkpoint = str(out / "macro/search/search.json"), str(out / "macro/last.pth")
    other = ["--space", "spos_small", "--out_dir", str(tmp_path)]
    main, flags = supernet.main, [*TINY, *other, "--choice", found]
    if case == "--resume":
        flags = ["--out_dir", str(out), "--exp_name", "macro", "--resume", *other[:2]]
    if case == "--init_from":
        flags = [*TINY, *other, "--choice", "-".join("0" * 20), "--init_from", checkpoint]
    if case == "other candidates":
        space = replace(SPACES["nasbench_macro"], candidates=["identity", "mb6_k5", "mb3_k3"])
        monkeypatch.setitem(SPACES, "nasbench_macro", space)
        main, flags = random_search.main, ["--ckpt", checkpoint, "--search_dir", str(tmp_path)]
    with pytest.raises(UserError, match="has space"):
        main(flags)


def test_the_space_of_the_readme_trains(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own space")[1]
    code = section.split("```python\n")[1].split("```")[0]
    exec(code.replace('"mine"])', '"mine", "--epochs", "1", "--image_size", "8"])'), {})
    space = load_checkpoint(Path("runs/mine/last.pth"))["args"]["space_layout"]
    assert space == asdict(SPACES.pop("mine"))


def test_scores_are_set_against_the_truth(out: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Rank correlations as a loop over pairs counts them, and the rank of the choice."""
    rng, accuracies = random.Random(0), {}
    rows = [Scored(i, tuple(map(int, f"{i:08b}"))) for i in range(60)]
    for row in rows:
        accuracies["".join(map(str, row.choice))] = rng.uniform(80, 90)
        row.accuracy, row.loss, row.flops_m = rng.uniform(40, 60), rng.random(), rng.random()
    truth = {c: {"mean_acc": accuracy, "flops": 1} for c, accuracy in accuracies.items()}
    settings = {"space_layout": asdict(SPACES["nasbench_macro"])}
    lines = plots.plot_truth(rows, truth, tmp_path / "truth.png", "loss", settings)
    pairs = {"all": [], "equal": []}
    for a, b in combinations(rows, 2):
        true = [accuracies["".join(map(str, row.choice))] for row in (a, b)]
        agree = np.sign(b.loss - a.loss) * np.sign(true[0] - true[1])
        pairs["all"].append(agree)
        if a.choice.count(0) == b.choice.count(0):
            pairs["equal"].append(agree)
    assert lines[0].startswith(f"tau by loss: {np.mean(pairs['all']):.3f} (")
    assert lines[0].endswith(f"identities {np.mean(pairs['equal']):.3f}")
    best = accuracies["".join(map(str, min(rows, key=lambda row: row.loss).choice))]
    rank = sorted(accuracies.values(), reverse=True).index(best) + 1
    assert f"choice: {best:.2f}%, rank {rank} of 60, all" in lines
    assert min(Image.open(tmp_path / "truth.png").size) > 300
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    table, flag = str(out / "macro/search/paths.csv"), ["--truth", str(tmp_path / "truth.json")]
    monkeypatch.setattr("sys.argv", ["plots.py", table, *flag])
    with pytest.raises(UserError, match="the truth lacks the choice"):
        plots.main()
