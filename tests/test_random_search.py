"""random_search.py: the same numbers as a naive loop, a record that survives anything, honest statistics."""

import csv
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.swa_utils import update_bn

import random_search
import supernet
from conftest import ROOT, Run, noise
from data.datasets import calibration_images, load_dataset
from data.loaders import Batches
from img.plots import ranking
from model import Supernet
from random_search import Scorer
from utils import UserError, load_checkpoint, newest_supernet

CPU = torch.device("cpu")


def rows(folder: Path) -> list[dict]:
    with open(folder / "paths.csv", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: (int(row["generation"]), int(row["index"])))


def found(folder: Path) -> dict:
    return json.loads((folder / "search.json").read_text())


def load(run: Run) -> tuple[Supernet, Batches, Batches]:
    """The trained supernet, two calibration batches and the search split."""
    model = Supernet(10, 8)
    model.load_state_dict(load_checkpoint(run.folder / "last.pth")["model"])
    dataset = load_dataset("digits", "", 8)
    calibration = Batches(dataset, dataset.train.subset(range(500)), 250, CPU)
    return model, calibration, Batches(dataset, dataset.search, 64, CPU)


def naive(run: Run, choices: list[tuple]) -> Iterator[tuple[nn.Sequential, list[float]]]:
    """Path by path, with torch's own recalibration: the path as a view, and its scores."""
    model, calibration, scored = load(run)
    for choice in choices:
        path = model.path(choice)
        update_bn([(x,) for x, _ in calibration], path)
        path.eval()
        with torch.no_grad():
            logits = torch.cat([path(x) for x, _ in scored])
        half = Scorer(load(run)[0], None, scored).first_half
        hits = 100 * (logits.argmax(1) == scored.labels).double()
        losses = F.cross_entropy(logits.double(), scored.labels, reduction="none")
        yield path, [part.mean().item() for scores in (hits, losses) for part in (scores, scores[half])]


def test_shared_prefixes_give_each_path_what_it_would_get_alone(run: Run) -> None:
    """Accuracies, losses and every BatchNorm statistic of 12 paths, most with long common beginnings."""
    rng = random.Random(5)
    model, calibration, scored = load(run)
    choices = {model.sample_choice(rng) for _ in range(3)}
    while len(choices) < 12:
        parent = rng.choice(sorted(choices))
        cut = rng.choice([3, 12, 19])
        choices.add(parent[:cut] + model.sample_choice(rng)[cut:])
    choices = sorted(choices)
    scorer = Scorer(model, calibration, scored)
    with torch.inference_mode():
        statistics = scorer.calibrate(choices)
    scores = scorer.score(choices)
    for choice, score, (path, expected) in zip(choices, scores, naive(run, choices), strict=True):
        assert score[:2] == pytest.approx(expected[:2], abs=1e-9)
        assert score[2:] == pytest.approx(expected[2:], abs=1e-5)
        for depth, module in enumerate(list(path)[:-1]):
            norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
            for norm, (mean, var) in zip(norms, statistics[depth, choice[:depth]], strict=True):
                torch.testing.assert_close(mean, norm.running_mean, rtol=1e-6, atol=1e-7)
                torch.testing.assert_close(var, norm.running_var, rtol=1e-6, atol=1e-7)


def test_a_score_depends_on_nothing_but_the_path(run: Run) -> None:
    """open-mmlab/mmrazor#298, openai/CLIP#193: not on what was scored before, nor on the batch size."""
    model, calibration, scored = load(run)
    a, b = (0,) * 20, (3,) * 20
    scorer = Scorer(model, calibration, scored)
    alone = scorer.score([a])[0]
    scorer.score([b])
    assert scorer.score([a, b])[0] == alone == scorer.score([a])[0]
    for size in (1, 7, 300):
        other = Scorer(model, calibration, Batches(scored.dataset, scored.dataset.search, size, CPU)).score([a])[0]
        assert other[:2] == alone[:2] and other[2] == pytest.approx(alone[2], abs=1e-5)


def test_scoring_trains_nothing_and_scores_in_eval_mode(run: Run) -> None:
    """megvii-model/ShuffleNet-Series#9, facebookresearch/AlphaNet#3."""
    model, calibration, scored = load(run)
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes = []
    model.last.register_forward_hook(lambda module, *_: modes.append(module.training))
    Scorer(model, calibration, scored).score([(0,) * 20])
    assert modes == [True] * len(calibration) + [False] * len(scored)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


def test_without_calibration_the_supernets_own_statistics_score(run: Run) -> None:
    model, _, scored = load(run)
    choice = (1, 2) * 10
    fresh = load(run)[0].eval()
    with torch.no_grad():
        hits = sum((fresh(x, choice).argmax(1) == y).sum().item() for x, y in scored)
    assert Scorer(model, None, scored).score([choice])[0][0] == pytest.approx(100 * hits / 300)


def test_bf16_agrees_with_fp32_within_a_few_images(run: Run) -> None:
    model, calibration, scored = load(run)
    choices = [(0,) * 20, (2,) * 20, (3,) * 20]
    exact = Scorer(model, calibration, scored).score(choices)
    rough = Scorer(model, calibration, scored, "bf16").score(choices)
    assert exact != rough
    for a, b in zip(exact, rough, strict=True):
        assert abs(a[0] - b[0]) <= 5 and b[2] == pytest.approx(a[2], rel=0.05)


def test_the_halves_are_fixed_and_equal(run: Run) -> None:
    model, calibration, scored = load(run)
    scorer = Scorer(model, calibration, scored)
    assert scorer.first_half.sum() == 150
    assert torch.equal(scorer.first_half, Scorer(model, None, scored).first_half)
    fake = torch.zeros(1, 300, 10)
    fake[0, torch.arange(300), scored.labels] = scorer.first_half.float()  # right on the first half, else class 0
    hits, first, *_ = random_search.batch_sums(fake, scored.labels, scorer.first_half)[0].tolist()
    assert first == 150 and hits == 150 + (scored.labels[~scorer.first_half] == 0).sum()


def test_a_search_writes_what_it_promises(search: Run) -> None:
    assert {p.name for p in search.folder.iterdir()} == set(random_search.SEARCH_FILES) - {"evolution.png"}
    record = rows(search.folder)
    assert [int(row["index"]) for row in record] == [*range(4), *range(12)]
    assert [int(row["generation"]) for row in record] == [-1] * 4 + [0] * 12
    assert [row["choice"] for row in record[:4]] == ["-".join(str(n) * 20) for n in range(4)]
    assert len({row["choice"] for row in record}) == 16
    order = sorted(record[4:], key=lambda r: (float(r["loss"]), -float(r["accuracy"]), int(r["index"])))
    best, top = order[0], order[:3]
    result = found(search.folder)
    accuracy = float(best["accuracy"])
    assert (result["choice"], result["accuracy"], result["split"]) == (best["choice"], accuracy, "search")
    assert result["standard_error"] == pytest.approx(math.sqrt(accuracy * (100 - accuracy) / 300))
    assert result["statistics"]["paths"] == 12 and result["statistics"]["images"] == 300
    assert [row["choice"] for row in result["top"]] == [row["choice"] for row in top]
    assert all(0 <= row["test_accuracy"] <= 100 for row in result["top"])


def test_what_is_printed_can_be_acted_on(search: Run) -> None:
    """ShunLu91/Single-Path-One-Shot-NAS#14: which choice is best, and how to train it."""
    log, result = (search.folder / "log.txt").read_text(), found(search.folder)
    assert result["choice"] in log and f"{result['flops_m']:.1f}M multiply-adds" in log
    command = log.split("train it alone:\n")[1].splitlines()[0].split()
    import supernet

    args, _ = supernet.parse_args(command[2:])
    assert (args.choice, args.dataset, args.image_size) == (result["choice"], "digits", 8)
    assert args.supernet_accuracy == result["accuracy"]


def test_a_finished_search_may_be_ranked_the_other_way(search: Run, tmp_path: Path) -> None:
    """The record stays; the choice is the best by accuracy, and of equal ones the one with the smaller loss."""
    shutil.copytree(search.folder, tmp_path / "copy")
    random_search.main([*search.flags, "--search_dir", str(tmp_path / "copy"), "--rank_by", "accuracy"])
    record, result = rows(tmp_path / "copy"), found(tmp_path / "copy")
    assert record == rows(search.folder) and result["statistics"] == found(search.folder)["statistics"]
    best = min(record[4:], key=lambda r: (-float(r["accuracy"]), float(r["loss"])))
    assert result["choice"] == best["choice"] and result["accuracy"] == float(best["accuracy"])
    assert "the best by accuracy" in (tmp_path / "copy" / "log.txt").read_text()


def test_a_record_of_an_earlier_version_is_refused(search: Run, tmp_path: Path) -> None:
    """Its table lacks the loss on the first half."""
    shutil.copytree(search.folder, tmp_path / "old")
    with open(tmp_path / "old" / "paths.csv", "w", newline="") as file:
        names = [name for name in random_search.COLUMNS if name != "half_loss"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows(search.folder))
    with pytest.raises(
        UserError, match="does not begin with the line index,choice,accuracy,half_accuracy,loss,half_loss"
    ):
        random_search.main([*search.flags, "--search_dir", str(tmp_path / "old")])


def test_the_test_accuracy_is_that_of_the_test_images(run: Run, search: Run) -> None:
    dataset = load_dataset("digits", "", 8)
    result = found(search.folder)
    model = load(run)[0]
    path = model.path([int(n) for n in result["choice"].split("-")])
    chosen = random.Random("calibration").sample(range(len(dataset.train)), 250)
    update_bn([(x,) for x, _ in Batches(dataset, dataset.train.subset(chosen), 250, CPU)], path)
    path.eval()
    with torch.no_grad():
        hits = sum((path(x).argmax(1) == y).sum().item() for x, y in Batches(dataset, dataset.test, 100, CPU))
    assert result["top"][0]["test_accuracy"] == pytest.approx(100 * hits / 300)


def test_a_finished_search_run_again_measures_nothing(search: Run, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(search.folder, tmp_path / "copy")
    monkeypatch.setattr(Scorer, "score", lambda *_: pytest.fail("scored again"))
    random_search.main([*search.flags, "--search_dir", str(tmp_path / "copy")])
    before, after = found(search.folder), found(tmp_path / "copy")
    for result in (before, after):
        result.pop("args")
    assert before == after


def test_an_interrupted_search_ends_as_an_uninterrupted_one(search: Run, tmp_path: Path, monkeypatch) -> None:
    """huawei-noah/vega#120: the scored groups are kept, the cut-off last line is not."""
    monkeypatch.setattr(random_search, "GROUP", 4)
    flags, original, calls = [*search.flags, "--search_dir", str(tmp_path)], Scorer.score, []

    def score(self, choices):
        calls.append(len(choices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, choices)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scorer, "score", score)
        random_search.main(flags)
    assert len(rows(tmp_path)) == 8
    with open(tmp_path / "paths.csv", "a") as file:
        file.write("7,1-2-0-3")
    random_search.main(flags)
    assert rows(tmp_path) == rows(search.folder)
    ours, theirs = found(tmp_path), found(search.folder)
    assert (ours["choice"], ours["statistics"], ours["top"]) == (theirs["choice"], theirs["statistics"], theirs["top"])
    for name in ("histogram.png", "pareto.png", "choices.png"):
        assert (tmp_path / name).read_bytes() == (search.folder / name).read_bytes()


@pytest.mark.parametrize(("kill", "code"), [("SIGINT", 130), ("SIGKILL", -9)])
def test_a_killed_search_loses_at_most_a_group(search: Run, tmp_path: Path, monkeypatch, kill: str, code: int) -> None:
    """huawei-noah/vega#120: a process of its own, killed once it has recorded something; the same command goes on."""
    flags, record = [*search.flags, "--search_dir", str(tmp_path)], tmp_path / "paths.csv"
    script = "import random_search, signal, utils; signal.signal(signal.SIGINT, signal.default_int_handler);"
    script += f"random_search.GROUP = 3; utils.run_script(lambda _: random_search.main({flags}))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while process.poll() is None and not (record.exists() and len(record.read_text().splitlines()) > 1):
        time.sleep(0.02)
    process.send_signal(getattr(signal, kill))
    assert process.wait() == code
    kept, original, scored = rows(tmp_path), Scorer.score, []
    assert len(kept) % 3 == 0 and all(row in rows(search.folder) for row in kept)
    monkeypatch.setattr(Scorer, "score", lambda self, c: scored.append(len(c)) or original(self, c))
    random_search.main(flags)
    assert sum(scored) == 16 - len(kept) + 3  # and the top three on the test images
    assert rows(tmp_path) == rows(search.folder)
    assert found(tmp_path)["statistics"] == found(search.folder)["statistics"]


def test_more_paths_may_be_asked_for(search: Run, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(search.folder, tmp_path / "more")
    original, scored = Scorer.score, []
    monkeypatch.setattr(Scorer, "score", lambda self, c: scored.append((len(c), len(self.scored))) or original(self, c))
    random_search.main([*search.flags, "--search_dir", str(tmp_path / "more"), "--num_paths", "14"])
    assert scored[0][0] == 2 and rows(tmp_path / "more")[:16] == rows(search.folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "seed 0, this command 1"),
        (["--calibration_images", "500"], "calibration_images 250, this command 500"),
        (["--split", "test"], "split search, this command test"),
        (["--max_flops", "12"], "max_flops None, this command 12"),
        (["--precision", "bf16"], "precision fp32, this command bf16"),
    ],
)
def test_a_record_of_other_settings_is_refused_with_both_values(search: Run, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        random_search.main([*search.flags, *flags])


def test_the_precision_of_a_record_goes_on(search: Run, tmp_path: Path) -> None:
    """A search that a GPU began in bf16 may end on a CPU, whose own default is fp32."""
    shutil.copytree(search.folder, tmp_path / "gpu")
    args = json.loads((tmp_path / "gpu" / "args.json").read_text())
    assert args["precision"] == "fp32"
    (tmp_path / "gpu" / "args.json").write_text(json.dumps(args | {"precision": "bf16"}))
    random_search.main([*search.flags, "--search_dir", str(tmp_path / "gpu")])
    assert found(tmp_path / "gpu")["args"]["precision"] == "bf16"


def test_a_record_of_another_checkpoint_is_refused(run: Run, search: Run, tmp_path: Path) -> None:
    content = torch.load(run.folder / "last.pth", weights_only=True)
    content["epoch"] = 1
    torch.save(content, tmp_path / "last.pth")
    with pytest.raises(UserError, match="checkpoint"):
        random_search.main([*search.flags, "--ckpt", str(tmp_path / "last.pth")])


def test_a_search_names_the_weights_that_it_scored_with(run: Run, search: Run, tmp_path: Path, monkeypatch) -> None:
    """The training may go on beside the search, and replace the checkpoint."""
    last = shutil.copy(run.folder / "last.pth", tmp_path / "last.pth")
    shutil.copytree(search.folder, tmp_path / "search")

    def replace_it(*args):
        last.write_bytes(b"a later epoch")
        return load_dataset(*args)

    monkeypatch.setattr(random_search, "load_dataset", replace_it)
    random_search.main([*search.flags, "--ckpt", str(last), "--search_dir", str(tmp_path / "search")])
    scored_with = hashlib.sha256((run.folder / "last.pth").read_bytes()).hexdigest()
    assert found(tmp_path / "search")["checkpoint"]["sha256"] == scored_with


def test_a_damaged_record_is_refused_with_its_line(search: Run, tmp_path: Path) -> None:
    shutil.copytree(search.folder, tmp_path / "bad")
    lines = (tmp_path / "bad" / "paths.csv").read_text().splitlines()
    (tmp_path / "bad" / "paths.csv").write_text("\n".join([*lines[:3], "1,2,3", *lines[3:], ""]))
    with pytest.raises(UserError, match="line 4"):
        random_search.main([*search.flags, "--search_dir", str(tmp_path / "bad")])


def test_test_images_change_no_score_and_no_choice(search: Run, tmp_path: Path, monkeypatch) -> None:
    """quark0/darts#66: only the numbers that are called test accuracies look at test images."""

    def other_test_images(*args):
        dataset = load_dataset(*args)
        dataset.test.images = 255 - dataset.test.images
        return dataset

    monkeypatch.setattr(random_search, "load_dataset", other_test_images)
    random_search.main([*search.flags, "--search_dir", str(tmp_path)])
    assert rows(tmp_path) == rows(search.folder)
    assert found(tmp_path)["choice"] == found(search.folder)["choice"]
    assert found(tmp_path)["top"] != found(search.folder)["top"]


def test_scoring_on_test_images_is_said_everywhere(search: Run, tmp_path: Path) -> None:
    flags = [*search.flags, "--search_dir", str(tmp_path), "--num_paths", "2"]
    random_search.main([*flags, "--split", "test"])
    assert found(tmp_path)["split"] == "test" and "top" not in found(tmp_path)
    assert "biased" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "args.json").read_text())["split"] == "test"


def test_the_newest_supernet_is_taken(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    """Without a value, and never a single architecture, which is named as passed over."""
    import os

    for name, choice, age in (("old", None, 30), ("new", None, 20), ("alone", "-".join("0" * 20), 10)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        content = torch.load(run.folder / "last.pth", weights_only=True)
        content["args"]["choice"] = choice
        torch.save(content, tmp_path / "runs" / name / "last.pth")
        os.utime(tmp_path / "runs" / name / "last.pth", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    assert newest_supernet(Path("runs")) == Path("runs/new/last.pth")
    assert "runs/alone/last.pth" in capsys.readouterr().out
    with pytest.raises(UserError, match="single architecture"):
        random_search.main(["--ckpt", "runs/alone/last.pth"])
    for argv in ([], ["--ckpt"]):
        assert random_search.build_parser().parse_args(argv).ckpt is None


@pytest.mark.parametrize("content", [b"", b"hello", "half", "folder", "missing", "bare state", "other classes"])
def test_a_file_that_is_no_checkpoint_of_ours_is_named(run: Run, tmp_path: Path, content) -> None:
    """sml2h3/dddd_trainer#36, guyuchao/iNAS#1, bearpaw/pytorch-classification#27."""
    path = tmp_path / "x.pth"
    whole = (run.folder / "last.pth").read_bytes()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "folder":
        path.mkdir()
    elif content == "bare state":
        torch.save(load_checkpoint(run.folder / "last.pth")["model"], path)
    elif content == "other classes":
        changed = load_checkpoint(run.folder / "last.pth")
        changed["data"]["classes"] = ["a", "b"]
        torch.save(changed, path)
    with pytest.raises(UserError) as error:
        random_search.main(["--ckpt", str(path), "--num_paths", "1"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given_as", ["--ckpt", "--init_from", "--resume"])
def test_a_checkpoint_never_executes(run: Run, tmp_path: Path, given_as: str) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "evil").mkdir()
    path = tmp_path / "evil/last.pth"
    torch.save(load_checkpoint(run.folder / "last.pth") | {"epoch": Evil()}, path)
    flags = [*run.flags, "--out_dir", str(tmp_path)]
    with pytest.raises(UserError, match="evil"):
        if given_as == "--ckpt":
            random_search.main(["--ckpt", str(path)])
        elif given_as == "--init_from":
            supernet.main([*flags, "--exp_name", "new", "--choice", "-".join("0" * 20), "--init_from", str(path)])
        else:
            supernet.main([*flags, "--exp_name", "evil", "--resume"])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("saved", ["by a wrapper", "on a GPU"])
def test_a_supernet_that_was_saved_elsewhere_scores_the_same(search: Run, run: Run, tmp_path: Path, saved: str) -> None:
    """pytorch/pytorch#3805: `module.` before every name; GlassyWu/KTDN#1: a file of another machine's fourth GPU."""
    content = load_checkpoint(run.folder / "last.pth")
    with pytest.MonkeyPatch.context() as patch:
        if saved == "by a wrapper":
            content["model"] = {f"module.{name}": value for name, value in content["model"].items()}
        else:
            patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        torch.save(content, tmp_path / "moved.pth")
    random_search.main([*search.flags, "--ckpt", str(tmp_path / "moved.pth"), "--search_dir", str(tmp_path)])
    assert rows(tmp_path) == rows(search.folder)
    shutil.copytree(run.folder, tmp_path / "tiny")
    shutil.copy(tmp_path / "moved.pth", tmp_path / "tiny/last.pth")
    supernet.main([*run.flags, "--out_dir", str(tmp_path), "--resume"])  # complete: refuses nothing, trains nothing


def test_what_was_trained_is_what_is_searched(tmp_path: Path) -> None:
    """huggingface/pytorch-image-models#807: three classes have no top-5. Only --ckpt is given: data set, image size,
    classes and normalisation come from the checkpoint, as ShunLu91/Single-Path-One-Shot-NAS's random_search.py did not.
    """
    for label, part in itertools.product("abc", ("train", "test")):
        (tmp_path / part / label).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(noise(9, 11, 3, seed=ord(label) + i)).save(tmp_path / part / label / f"{i}.png")
    flags = ["--dataset", "folder", "--data_dir", str(tmp_path), "--image_size", "8", "--batch_size", "8"]
    supernet.main([*flags, "--epochs", "3", "--val_interval", "5", "--out_dir", str(tmp_path), "--exp_name", "net"])
    with open(tmp_path / "net/metrics.csv", newline="") as file:
        validated = [row["val_acc"] != "" for row in csv.DictReader(file)]
    assert validated == [False, False, True]  # the last epoch always is, whatever the interval, and has its checkpoint
    assert load_checkpoint(tmp_path / "net/last.pth")["epoch"] == 3
    random_search.main(["--ckpt", str(tmp_path / "net/last.pth"), "--num_paths", "2"])
    result = found(tmp_path / "net/search")
    assert result["statistics"]["images"] == 3 and len(result["top"]) == 2


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(search: Run, tmp_path: Path, kind: str) -> None:
    """RexYing/diffpool#33."""
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" if kind == "a file" else tmp_path / "file/search"
    with pytest.raises(UserError, match=r"cannot write to .*file.*--search_dir"):
        random_search.main([*search.flags, "--search_dir", str(folder)])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_device_that_is_not_there_is_refused_with_those_that_are(search: Run) -> None:
    """LuyaooChen/uninformed-students-pytorch#3."""
    with pytest.raises(UserError, match=r"--device cuda:63 cannot be used; this machine has cpu"):
        random_search.main([*search.flags, "--device", "cuda:63"])


def test_few_calibration_images_are_one_batch_in_which_each_counts_the_same() -> None:
    """xfey/pytorch-BigNAS#3, timgaripov/swa#10: no short last batch and no momentum distorts the mean."""
    dataset = load_dataset("digits", "", 8)
    dataset.train = dataset.train.subset(range(5))
    dataset.train.images[:4], dataset.train.images[4] = 0, 255
    model, few = Supernet(10, 8), calibration_images(dataset, 2000, random_search.CALIBRATION_BATCH)
    batches = Batches(dataset, few, random_search.CALIBRATION_BATCH, CPU)
    outputs = []
    model.stem[0].register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.inference_mode():
        (mean, _), *_ = Scorer(model, batches, batches).calibrate([(0,) * 20])[0, ()]
    torch.testing.assert_close(mean, torch.cat(outputs).mean((0, 2, 3)))


def test_flops_limits_are_met_or_refused(run: Run, search: Run, tmp_path: Path) -> None:
    """open-mmlab/mmrazor#183: at once, with the extremes of the space and what lies next to the limits."""
    model = load(run)[0]
    costs = sorted({model.flops(model.nth_choice(i)) / 1e6 for i in (0, 4**20 - 1)})
    flags = [*search.flags, "--search_dir", str(tmp_path / "limits")]
    low, high = model.flops_beside(0)[1] / 1e6, model.flops_beside(2**60)[0] / 1e6
    with pytest.raises(UserError, match=f"from {low} to {high}"):
        random_search.main([*flags, "--max_flops", "1"])
    assert costs[0] > low and not (tmp_path / "limits").exists()
    few = model.flops_beside(round(low * 1e6) + 1)[1] / 1e6  # the second smallest cost
    random_search.main([*flags, "--max_flops", str(few), "--num_paths", "500"])
    record = [row for row in rows(tmp_path / "limits") if row["generation"] == "0"]
    assert len(record) == model.count_choices(None, round(few * 1e6)) < 500
    assert all(float(row["flops_m"]) <= few for row in record)
    assert "all of them are scored" in (tmp_path / "limits" / "log.txt").read_text()


def test_draws_are_different_and_the_first_stay_when_more_are_asked_for() -> None:
    """BayesWatch/nas-without-training#4."""
    model = Supernet(10, 8)
    many = model.sample_choices(random.Random(1), 1000, None, None)
    assert len(set(many)) == 1000
    assert model.sample_choices(random.Random(1), 300, None, None) == many[:300]


def test_scores_that_are_not_finite_are_counted_and_never_chosen(run: Run, search: Run, tmp_path: Path) -> None:
    """matplotlib/matplotlib#14439: one block of layer 0 is broken; then all of them."""
    content = load_checkpoint(run.folder / "last.pth")
    content["model"]["layers.0.shuffle7.main.0.weight"][0] = math.nan
    torch.save(content, tmp_path / "last.pth")
    random_search.main([*search.flags, "--ckpt", str(tmp_path / "last.pth"), "--search_dir", str(tmp_path / "a")])
    broken = [row for row in rows(tmp_path / "a") if row["choice"].startswith("2")]
    result = found(tmp_path / "a")
    assert broken and result["statistics"]["undefined"] == len(broken) and not result["choice"].startswith("2")
    content["model"]["stem.0.weight"][0] = math.nan
    torch.save(content, tmp_path / "last.pth")
    with pytest.raises(UserError, match="no path has a finite loss"):
        random_search.main([*search.flags, "--ckpt", str(tmp_path / "last.pth"), "--search_dir", str(tmp_path / "b")])
    assert len(rows(tmp_path / "b")) == 16


@pytest.mark.parametrize("by", ["accuracy", "loss"])
def test_the_reliability_is_that_of_parallel_halves(by: str) -> None:
    """Scores made of a true value and independent noise on each half: the formula finds the share of the truth."""
    rng = np.random.default_rng(0)
    true, noise = rng.normal(60, 1, 5000), rng.normal(0, 1.5, (2, 5000))
    halves = true + noise
    made = [{f"half_{by}": h, by: a} for a, h in zip(halves.mean(0), halves[0], strict=True)]
    reliability, within = ranking(made, by)
    assert reliability == pytest.approx(1 / (1 + 1.5**2 / 2), abs=0.03)
    assert within == pytest.approx(1.5 / math.sqrt(2), abs=0.05)


@pytest.mark.parametrize("kind", ["few", "equal", "contrary"])
def test_a_ranking_without_reliability_is_said_to_have_none(kind: str) -> None:
    count = 9 if kind == "few" else 20
    made = [{"accuracy": 50.0 + i * (kind == "few"), "half_accuracy": 50.0 + i} for i in range(count)]
    if kind == "equal":
        made = [{"accuracy": 10.0, "half_accuracy": 10.0}] * count
    assert ranking(made) == (None, None)


# Evolution

EVOLVE = ["--population", "6", "--parents", "3", "--generations"]


@pytest.fixture(scope="module")
def evolved(search: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two generations of 6, begun with the first 6 of the twelve random paths."""
    folder = tmp_path_factory.mktemp("evolved") / "search"
    shutil.copytree(search.folder, folder)
    flags = [*search.flags, "--search_dir", str(folder), *EVOLVE, "2"]
    random_search.main(flags)
    return Run(folder, flags)


def best(record: list[dict], count: int) -> list[tuple]:
    order = sorted(record, key=lambda r: (float(r["loss"]), -float(r["accuracy"]), int(r["generation"])))
    return [tuple(int(n) for n in row["choice"].split("-")) for row in order[:count]]


def test_evolution_goes_on_with_the_record_of_a_random_search(search: Run, evolved: Run) -> None:
    record = rows(evolved.folder)
    assert record[:16] == rows(search.folder)
    assert [(r["generation"], r["index"]) for r in record[16:]] == [(g, str(i)) for g in "12" for i in range(6)]
    assert len({row["choice"] for row in record}) == len(record) == 28
    result, log = found(evolved.folder), (evolved.folder / "log.txt").read_text()
    random_ones = found(search.folder)["statistics"]
    assert result["statistics"] == random_ones and f"best {random_ones['best']:.2f}%" in log
    own = [row for row in record if row["generation"] in "12" or (row["generation"] == "0" and int(row["index"]) < 6)]
    top = max(float(row["accuracy"]) for row in own)
    assert result["evolution"] == {"generations": 2, "evaluations": 18, "best": top}
    assert result["loss"] == min(float(row["loss"]) for row in record[4:])
    assert (evolved.folder / "evolution.png").stat().st_size > 10_000


def test_the_best_of_evolutions_own_paths_are_the_parents(search: Run, tmp_path: Path, monkeypatch) -> None:
    """Of the first random draws and of all generations before, never of the other draws or the controls."""
    original, seen = Supernet.breed, []
    monkeypatch.setattr(
        Supernet, "breed", lambda self, parents, *rest: seen.append(parents) or original(self, parents, *rest)
    )
    shutil.copytree(search.folder, tmp_path / "search")
    random_search.main([*search.flags, "--search_dir", str(tmp_path / "search"), *EVOLVE, "2"])
    record = rows(tmp_path / "search")
    first, children = record[4:10], [row for row in record if row["generation"] == "1"]
    assert seen == [best(first, 3), best(first + children, 3)]


def test_a_killed_evolution_ends_as_an_uninterrupted_one(evolved: Run, search: Run, tmp_path: Path) -> None:
    """Also one that was first asked for a generation less: the record alone says how to go on."""
    shutil.copytree(evolved.folder, tmp_path / "a")
    lines = (tmp_path / "a" / "paths.csv").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "paths.csv").write_text("".join(lines[:-4]) + lines[-4][:9])  # in the midst of generation 2
    for name in ("search.json", "evolution.png"):
        (tmp_path / "a" / name).unlink()
    random_search.main([*evolved.flags, "--search_dir", str(tmp_path / "a")])
    shutil.copytree(search.folder, tmp_path / "b")
    for generations in ("1", "2"):
        random_search.main([*search.flags, "--search_dir", str(tmp_path / "b"), *EVOLVE, generations])
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert rows(folder) == rows(evolved.folder)
        assert found(folder)["top"] == found(evolved.folder)["top"]
        assert (folder / "evolution.png").read_bytes() == (evolved.folder / "evolution.png").read_bytes()


@pytest.mark.parametrize(
    ("flag", "value"), [("population", "5"), ("parents", "2"), ("mutation_prob", "0.5"), ("rank_by", "accuracy")]
)
def test_an_evolution_of_other_settings_is_refused(evolved: Run, flag: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{flag} (6|3|0.1|loss), this command {value}"):
        random_search.main([*evolved.flags, f"--{flag}", value])


def test_the_smallest_population_works(search: Run, tmp_path: Path) -> None:
    """CanyonWind/Single-Path-One-Shot-NAS-MXNet#5."""
    shutil.copytree(search.folder, tmp_path / "two")
    flags = ["--generations", "2", "--population", "2", "--parents", "2", "--search_dir", str(tmp_path / "two")]
    random_search.main([*search.flags, *flags])
    assert [row["generation"] for row in rows(tmp_path / "two")].count("2") == 2


def test_evolution_ends_when_too_few_architectures_are_left(run: Run, search: Run, tmp_path: Path) -> None:
    """Under limits that few meet: no loop without an end, and it is said."""
    model = load(run)[0]
    few = next(limit for limit in sums(model) if model.count_choices(None, limit) > 12)
    count = model.count_choices(None, few)
    flags = [*search.flags, "--search_dir", str(tmp_path), "--max_flops", str(few / 1e6), *EVOLVE, "9"]
    random_search.main([*flags, "--num_paths", "6"])
    record = [row for row in rows(tmp_path) if row["generation"] != "-1"]
    assert all(float(row["flops_m"]) <= few / 1e6 for row in record)
    assert len({row["choice"] for row in record}) == len(record) <= count < len(record) + 6
    left = re.search(r"before generation (\d): only (\d) new", (tmp_path / "log.txt").read_text())
    controls = [row["choice"] for row in rows(tmp_path)[:4] if float(row["flops_m"]) <= few / 1e6]
    assert int(left[2]) == count - len({row["choice"] for row in record}.union(controls))


def sums(model: Supernet) -> Iterator[int]:
    """The costs of the space from the smallest on."""
    cost = model.flops_beside(0)[1]
    while cost is not None:
        yield cost
        cost = model.flops_beside(cost + 1)[1]


@pytest.mark.parametrize(
    "flags",
    [["--num_paths", "0"], ["--batch_size", "0"], ["--calibration_images", "-1"], ["--top_k", "0"], ["--ckp", "x"]]
    + [["--generations", "1", *f.split()] for f in ("--num_paths 9", "--population 5", "--parents 1")],
)
def test_wrong_usage_exits_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        random_search.main(flags)
    assert exit.value.code == 2
