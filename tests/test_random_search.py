"""random_search.py: the scores of a naive loop, a record that survives a kill, fair statistics."""

import copy
import hashlib
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.swa_utils import update_bn

import random_search
import supernet
from blocks import CANDIDATES
from conftest import TIMEOUT, TINY, Run, assert_same_record, noise, start
from data import records
from data.datasets import load_dataset
from data.loaders import Batches
from data.records import BASELINE, Scored, best_first, format_choice, load_checkpoint, parse_choice
from model import SPACES, Choice, SearchSpace, Supernet, path_tree
from random_search import SEARCH_FILES, Scorer, calibration_batches, newest_supernet
from utils import UserError, open_log, read_json

CPU = torch.device("cpu")
NAMES = SPACES["spos_small"].candidates
SCORES = "accuracy", "half_accuracy", "loss", "half_loss"


def record(folder: Path) -> list[Scored]:
    return records.read_rows(folder / "paths.csv")


def found(folder: Path) -> dict:
    return read_json(folder / "search.json")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def search_in(folder: Path, search: Run, flags: str = "") -> None:
    """Gives the command of a search with another folder and more flags."""
    random_search.main([*search.flags, "--search_dir", str(folder), *flags.split()])


@pytest.fixture
def trained(run) -> tuple[Supernet, Batches, Batches]:
    """The trained supernet, two small calibration batches and the search split."""
    model, dataset = Supernet(10, 8), load_dataset("digits", "", 8)
    model.load_state_dict(load_checkpoint(run.folder / "last.pth")["model"])
    calibration = Batches(dataset, dataset.train.subset(range(160)), 80, CPU)
    return model, calibration, Batches(dataset, dataset.search, 64, CPU)


def calibrated(model: Supernet, choice: Choice, calibration: Batches) -> nn.Sequential:
    """A copy of one path, recalibrated alone by torch's own function."""
    path = copy.deepcopy(model.path(choice))
    update_bn([(x,) for x, _ in calibration], path)
    return path.eval()


@torch.no_grad()
def logits(network: nn.Module, images: Batches, *choice: Choice) -> torch.Tensor:
    return torch.cat([network(x, *choice) for x, _ in images])


# Scores


def test_paths_with_common_prefixes_score_as_each_alone(trained):
    """Also on half of the images. A prefix is computed once a batch; only BatchNorm is in training
    mode, and only in calibration (megvii-model/ShuffleNet-Series#9, facebookresearch/AlphaNet#3).
    """
    model, calibration, images = trained
    before, scorer = copy.deepcopy(model.state_dict()), Scorer(*trained)
    space, rng = SearchSpace(model), random.Random(5)
    first = space.sample(rng)
    choices = sorted({first[:cut] + space.sample(rng)[cut:] for cut in (0, 0, 3, 3, 12, 19, 20)})
    prefixes, last, calls, expected = {}, scorer.model.last, Counter(), Counter()
    for choice, depth in itertools.product(choices, range(21)):
        prefixes[choice[:depth]] = scorer.model.path(choice)[depth]
    for module in [*prefixes.values(), *[last] * len(choices)]:
        expected.update({(module, True): len(calibration), (module, False): len(images)})

    def count(module, *_):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        assert not any(m.training for m in module.modules() if m not in norms)
        calls.update([(module, norms[0].training)])

    for module in {module for module, _ in expected}:
        module.register_forward_hook(count)
    tree = path_tree(scorer.model, choices)
    with patch.object(random_search, "path_tree", return_value=tree) as build:
        scores = scorer.score(choices)
    build.assert_called_once_with(scorer.model, choices)
    assert calls == expected and calls[scorer.model.stem, True] == 2
    assert calls[last, False] == 5 * len(choices)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for choice, score in zip(choices, scores, strict=True):
        alone, nodes = calibrated(model, choice, calibration), [tree]
        for module, other in zip(scorer.model.path(choice)[:-1], alone[:-1], strict=True):
            (node,) = [node for node in nodes if node.module is module]
            norms = [norm for norm in other.modules() if isinstance(norm, nn.BatchNorm2d)]
            buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
            torch.testing.assert_close(node.statistics, buffers, rtol=1e-5, atol=1e-6)
            nodes = node.children
        output = logits(alone, images)
        hits = 100.0 * (output.argmax(1) == images.labels)
        losses = F.cross_entropy(output, images.labels, reduction="none")
        for prefix, part in (("", slice(None)), ("half_", scorer.first_half)):
            # Accuracies may differ by an image of a half.
            assert score[f"{prefix}accuracy"] == pytest.approx(hits[part].mean().item(), abs=0.7)
            assert score[f"{prefix}loss"] == pytest.approx(losses[part].mean().item(), abs=1e-4)


def test_without_calibration_the_supernets_statistics_are_used(trained):
    (model, _, images), choice = trained, (1, 2) * 10
    hits = logits(model.eval(), images, choice).argmax(1) == images.labels
    (score,) = Scorer(model, None, images).score([choice])
    assert score["accuracy"] == pytest.approx(100 * hits.float().mean().item())


def test_a_score_depends_on_the_path_alone(trained):
    """Earlier scores and the batch size change neither scores nor halves (open-mmlab/mmrazor#298,
    openai/CLIP#193)."""
    model, calibration, images = trained
    a, b, scorer = (0,) * 20, (3,) * 20, Scorer(*trained)
    alone = scorer.score([a])[0]
    scorer.score([b])
    assert scorer.score([a, b])[0] == pytest.approx(alone, abs=1e-5)
    assert scorer.score([a])[0] == alone
    for size in (7, 300):
        batches = Batches(images.dataset, images.dataset.search, size, CPU)
        other = Scorer(model, calibration, batches)
        assert torch.equal(other.first_half, scorer.first_half) and other.first_half.sum() == 150
        assert other.score([a])[0] == pytest.approx(alone, abs=1e-5)


def test_bf16_agrees_with_fp32_within_a_few_images(trained):
    choices = [(0,) * 20, (2,) * 20, (3,) * 20]
    exact = Scorer(*trained).score(choices)
    trained[2].precision = "bf16"
    rough = Scorer(*trained).score(choices)
    assert exact != rough
    for a, b in zip(exact, rough, strict=True):
        assert abs(a["accuracy"] - b["accuracy"]) <= 5
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)


@pytest.mark.parametrize(("available", "asked"), [(5, 2000), (1197, 600)])
def test_all_calibration_images_count_the_same(available, asked):
    """No short last batch and no momentum distorts the mean (xfey/pytorch-BigNAS#3,
    timgaripov/swa#10)."""
    dataset, outputs = load_dataset("digits", "", 8), []
    dataset.train = dataset.train.subset(range(available))
    dataset.train.images[:4] = 0
    torch.manual_seed(0)
    batches = calibration_batches(dataset, asked, 0, CPU, 0, "fp32")
    scorer = Scorer(Supernet(10, 8), batches, batches)
    scorer.model.stem[0].register_forward_hook(lambda module, _, output: outputs.append(output))
    scorer.score([(0,) * 20])
    assert len(outputs) == 2 * len(batches) and len(batches) == (1 if available == 5 else 2)
    mean, expected = scorer.model.stem[1].running_mean, torch.cat(outputs[: len(batches)])
    torch.testing.assert_close(mean, expected.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [0, 3])
def test_calibration_images_are_augmented_as_in_training(run, trained, tmp_path, length):
    """Also with its cutout, for the loss and the test accuracy; plain images give another loss."""
    checkpoint, dataset = load_checkpoint(run.folder / "last.pth"), load_dataset("digits", "", 8)
    checkpoint["args"]["cutout"] = length
    torch.save(checkpoint, tmp_path / "last.pth")
    flags = "--num_paths 1 --calibration_images 250 --top_k 1"
    random_search.main(["--ckpt", str(tmp_path / "last.pth"), *flags.split()])
    row, (model, _, images) = record(tmp_path / "search")[-1], trained
    augmented = calibration_batches(dataset, 250, length, CPU, 0, "fp32")
    plain = copy.copy(augmented)
    plain.augment_in_order = False
    alone, other = (calibrated(model, row.choice, batches) for batches in (augmented, plain))
    loss, other_loss = (F.cross_entropy(logits(n, images), images.labels) for n in (alone, other))
    assert row.loss == pytest.approx(loss.item(), abs=1e-4)
    assert abs(row.loss - other_loss.item()) > 1e-3
    hits = logits(alone, Batches(dataset, dataset.test, 100, CPU)).argmax(1) == dataset.test.labels
    (top,) = found(tmp_path / "search")["top"]
    assert top["test_accuracy"] == pytest.approx(100 * hits.float().mean().item(), abs=0.4)


# What a search leaves


def test_a_search_writes_a_table_a_summary_and_the_next_command(search):
    """The command trains the best architecture (ShunLu91/Single-Path-One-Shot-NAS#14)."""
    assert files(search.folder) == set(SEARCH_FILES) - {
        "evolution.png",
        "standalone.png",
        "truth.png",
    }
    rows, result, space = record(search.folder), found(search.folder), SearchSpace(Supernet(10, 8))
    singles, drawn = rows[:4], rows[4:]
    assert [(row.generation, row.index) for row in singles] == [(-1, i) for i in range(4)]
    assert [(row.generation, row.index) for row in drawn] == [(0, i) for i in range(12)]
    assert [row.choice for row in singles] == [(n,) * 20 for n in range(4)]
    assert len({row.choice for row in rows}) == 16
    for row in rows:
        assert row.flops_m == space.flops(row.choice) / 1e6
        assert row.params_m == space.params(row.choice) / 1e6
    top = sorted(drawn, key=lambda row: (row.loss, -row.accuracy, row.index))[:3]
    best, choices = top[0], [format_choice(row.choice) for row in top]
    assert result.items() >= (asdict(best) | {"choice": choices[0]}).items()
    assert [row["choice"] for row in result["top"]] == choices
    error = math.sqrt(best.accuracy * (100 - best.accuracy) / 300)
    assert result["standard_error"] == pytest.approx(error)
    assert (result["dataset"], result["image_size"], result["split"]) == ("digits", 8, "search")
    numbers, accuracies = result["statistics"], [row.accuracy for row in drawn]
    assert (numbers["paths"], numbers["images"], numbers["undefined"]) == (12, 300, 0)
    assert numbers["best"] == max(accuracies)
    assert numbers["median"] == pytest.approx(median(accuracies))
    baselines = [row.accuracy for row in singles]
    assert numbers["baselines"] == dict(zip(NAMES, baselines, strict=True))
    log = (search.folder / "log.txt").read_text()
    assert result["choice"] in log and f"{result['flops_m']:.1f}M multiply-adds" in log
    command = shlex.split(log.split("next: ")[1].splitlines()[0])
    args, _ = supernet.parse_args(command[2:])
    assert (args.choice, args.dataset, args.image_size) == (result["choice"], "digits", 8)
    assert args.supernet_accuracy == result["accuracy"]


def test_test_images_change_no_score_and_no_choice(search, tmp_path, monkeypatch):
    """With equal images in all classes, only the test accuracy falls to 10% (quark0/darts#66)."""

    def equal_test_images(*args):
        dataset = load_dataset(*args)
        dataset.test.images[:] = 0
        return dataset

    monkeypatch.setattr(random_search, "load_dataset", equal_test_images)
    search_in(tmp_path, search, "--num_paths 4")
    rows, result = record(tmp_path), found(tmp_path)
    expected = [(row.choice, row.accuracy) for row in record(search.folder)[:8]]
    assert [(row.choice, row.accuracy) for row in rows] == expected
    assert result["choice"] == format_choice(best_first(rows, "loss")[0].choice)
    assert [row["test_accuracy"] for row in result["top"]] == pytest.approx([10] * 3)


@pytest.mark.parametrize("by", ["loss", "accuracy"])
def test_a_finished_search_is_not_scored_again(search, tmp_path, by):
    """Only the top three are measured on the test images again; the record stays."""
    shutil.copytree(search.folder, tmp_path / "copy")
    with patch.object(Scorer, "score", autospec=True, side_effect=Scorer.score) as score:
        search_in(tmp_path / "copy", search, f"--rank_by {by}")
    before, after = found(search.folder), found(tmp_path / "copy")
    order = [format_choice(row.choice) for row in best_first(record(search.folder), by)]
    assert record(tmp_path / "copy") == record(search.folder)
    (call,) = score.mock_calls
    assert call.args[1] == sorted(parse_choice(choice) for choice in order[:3])
    assert after["choice"] == order[0] and [row["choice"] for row in after["top"]] == order[:3]
    assert after["statistics"] == before["statistics"]
    assert f"the best by {by}" in (tmp_path / "copy/log.txt").read_text()


ONE_GROUP = """import random_search, signal, time, utils
signal.signal(signal.SIGINT, signal.default_int_handler)
original, calls, random_search.GROUP = random_search.Scorer.score, [], 4
def score(*args):
    calls.append(args)
    return original(*args) if len(calls) < 2 else time.sleep(60)
random_search.Scorer.score = score
utils.run_script(random_search.main)"""


def test_a_killed_search_goes_on_to_the_same_record(search, tmp_path):
    """Interrupted in its second group, and killed a group later (huawei-noah/vega#120)."""
    table = tmp_path / "paths.csv"
    for kill, code, kept in ((signal.SIGINT, 130, 4), (signal.SIGKILL, -9, 8)):
        process = start("-c", ONE_GROUP, *search.flags, "--search_dir", tmp_path)
        while process.poll() is None and not (table.exists() and len(record(tmp_path)) == kept):
            time.sleep(0.05)
        process.send_signal(kill)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == code and len(record(tmp_path)) == kept
    with patch.object(Scorer, "score", autospec=True, side_effect=Scorer.score) as score:
        search_in(tmp_path, search)
    # At last the top three, on the test images.
    assert [len(call.args[1]) for call in score.mock_calls] == [8, 3]
    assert_same_record(tmp_path, search.folder)
    assert found(tmp_path)["choice"] == found(search.folder)["choice"]


def test_a_search_keeps_to_the_weights_it_began_with(run, search, tmp_path, monkeypatch):
    """The training may replace the checkpoint meanwhile; the new one is refused."""
    last = shutil.copy(run.folder / "last.pth", tmp_path / "last.pth")
    folder = shutil.copytree(search.folder, tmp_path / "search")

    def replace_it(*args):
        torch.save(load_checkpoint(last) | {"epoch": 3}, last)
        return load_dataset(*args)

    monkeypatch.setattr(random_search, "load_dataset", replace_it)
    search_in(folder, search, f"--ckpt {last}")
    scored_with = hashlib.sha256((run.folder / "last.pth").read_bytes()).hexdigest()
    assert found(folder)["checkpoint"]["sha256"] == scored_with
    with pytest.raises(UserError, match=f"has checkpoint {scored_with}, this command"):
        search_in(folder, search, f"--ckpt {last}")


def test_scores_that_are_not_finite_are_never_chosen(run, search, tmp_path):
    """One block of layer 0 is broken; then all of them (matplotlib/matplotlib#14439)."""
    content, path = load_checkpoint(run.folder / "last.pth"), tmp_path / "last.pth"
    content["model"]["layers.0.shuffle7.main.0.weight"][0] = math.nan
    torch.save(content, path)
    search_in(tmp_path / "a", search, f"--ckpt {path} --num_paths 6")
    broken = [row for row in record(tmp_path / "a") if row.choice[0] == 2]
    assert len(broken) > 1 and not any(math.isfinite(row.loss) for row in broken)
    result = found(tmp_path / "a")
    assert result["statistics"]["undefined"] == len(broken) and not result["choice"].startswith("2")
    content["model"]["stem.0.weight"][0] = math.nan
    torch.save(content, path)
    with pytest.raises(UserError, match="no random path has a finite loss"):
        search_in(tmp_path / "b", search, f"--ckpt {path} --num_paths 1")
    assert len(record(tmp_path / "b")) == 5


def test_own_images_and_an_own_block_get_from_training_to_the_winner(tmp_path, monkeypatch):
    """Later commands take data set, image size and classes from the files of earlier ones, even
    classes too few for a top-5 (huggingface/pytorch-image-models#807)."""

    def unchanged(in_channels, out_channels, stride, affine):  # not offered in all layers
        return nn.Identity() if stride == 1 and in_channels == out_channels else None

    monkeypatch.setitem(CANDIDATES, "unchanged", unchanged)
    space = replace(SPACES["spos_small"], candidates=[*NAMES, "unchanged"])
    monkeypatch.setitem(SPACES, "mine", space)
    for part, label in itertools.product(("train", "test"), "abc"):
        (tmp_path / part / label).mkdir(parents=True)
        for i in range(12):
            image = Image.fromarray(noise(9, 11, 3, seed=ord(label) + i))
            image.save(tmp_path / part / label / f"{i}.png")
    where = f"--dataset folder --data_dir {tmp_path} --image_size 8 --val_interval 5 --space mine"
    flags = f"--epochs 3 --batch_size 8 --out_dir {tmp_path} --exp_name".split()
    supernet.main([*where.split(), *flags, "five"])
    checkpoint, folder = load_checkpoint(tmp_path / "five/last.pth"), tmp_path / "five/search"
    validated = [row["val_acc"] is not None for row in checkpoint["metrics"]]
    assert validated == [False, False, True]  # the last epoch always is, whatever the interval
    searching = "--num_paths 12 --top_k 99 --generations 1 --population 4 --parents 2"
    random_search.main(["--ckpt", str(tmp_path / "five"), *searching.split()])
    rows, result = record(folder), found(folder)
    assert Counter(row.generation for row in rows) == {BASELINE: 4, 0: 12, 1: 4}
    skipped = {i for row in rows for i, number in enumerate(row.choice) if number == 4}
    assert skipped == set(range(20)) - {0, 4, 8, 16}
    assert files(folder) == set(SEARCH_FILES) - {"standalone.png", "truth.png"}
    assert result["statistics"]["images"] == 3 and len(result["top"]) == 16
    data = [result[name] for name in ("dataset", "image_size", "data_dir")]
    assert data == ["folder", 8, str(tmp_path)]
    supernet.main(["--choice", str(folder / "search.json"), *flags, "alone"])
    alone = read_json(tmp_path / "alone/result.json")
    for name in ("choice", "flops_m", "params_m", "dataset"):
        assert alone[name] == result[name]


# Which folder, which checkpoint, which settings


def made_up(choice: Choice) -> dict[str, float]:
    """Scores that depend on the path alone."""
    rng = random.Random(str(choice))
    scores = [rng.uniform(10, 90), rng.uniform(10, 90), rng.random(), rng.random()]
    return dict(zip(SCORES, scores, strict=True))


@pytest.fixture
def quick(monkeypatch):
    """Searches with made-up scores and without pictures."""
    monkeypatch.setattr(Scorer, "score", lambda self, choices: [made_up(c) for c in choices])
    monkeypatch.setattr(random_search, "plot_search", lambda *_: None)


def test_settings_are_those_of_the_record(quick, run, tmp_path):
    """Unset flags take them, set ones must agree. Scores on test images are named as such."""
    chosen = {"seed": 3, "split": "test", "precision": "bf16", "calibration_images": 250}
    chosen |= {"min_flops": 10.5, "max_flops": 12.5, "population": 4, "parents": 2}
    chosen |= {"mutation_prob": 0.5, "rank_by": "accuracy", "generations": 1}
    where, last = f"--ckpt {run.folder} --search_dir {tmp_path}".split(), run.folder / "last.pth"
    given = [f"--{name}={value}" for name, value in chosen.items()]
    random_search.main([*where, *given, "--num_paths", "6"])
    chosen["checkpoint"] = hashlib.sha256(last.read_bytes()).hexdigest()
    chosen |= {"space": "spos_small", "space_layout": asdict(SPACES["spos_small"])}
    rows = record(tmp_path)
    assert read_json(tmp_path / "args.json") == chosen | {"num_paths": 6}
    random_search.main(where)  # as many paths and generations as before: nothing is left to do
    assert record(tmp_path) == rows
    random_search.main([*where, "--num_paths", "8"])
    assert read_json(tmp_path / "args.json") == chosen | {"num_paths": 8}
    assert len(record(tmp_path)) == len(rows) + 2 and all(row in record(tmp_path) for row in rows)
    result, log = found(tmp_path), (tmp_path / "log.txt").read_text()
    assert result["args"].items() >= chosen.items()
    assert result["checkpoint"] == {"path": str(last), "sha256": chosen["checkpoint"]}
    assert result["split"] == "test" and "top" not in result
    assert log.count("selecting on the test set") == log.count("test split of 300 images") == 3
    others = {"seed": 4, "split": "search", "precision": "fp32", "calibration_images": 500}
    others |= {"min_flops": 10.25, "max_flops": 12.25, "population": 5, "parents": 3}
    for name, value in (others | {"mutation_prob": 0.1, "rank_by": "loss"}).items():
        with pytest.raises(UserError, match=f"{name} {chosen[name]}, this command {value}"):
            random_search.main([*where, f"--{name}={value}"])


def test_a_table_without_its_settings_is_refused(quick, search, tmp_path):
    """It may be overwritten, if asked, and nothing beside it (RexYing/diffpool#33)."""
    shutil.copy(search.folder / "paths.csv", tmp_path)
    with pytest.raises(OSError, match=r"No such file.*args\.json"):
        search_in(tmp_path, search, "--num_paths 1")
    assert record(tmp_path) == record(search.folder)
    for name in ("paths.csv", "notes.txt"):
        (tmp_path / name).write_text("mine")
    search_in(tmp_path, search, "--num_paths 1 --overwrite")
    assert len(record(tmp_path)) == 5 and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("device", ["cuda:63", "privateuseone"])
def test_an_unusable_device_is_refused(search, device):
    """LuyaooChen/uninformed-students-pytorch#3."""
    with pytest.raises(UserError, match=f"--device {device} cannot be used"):
        random_search.main([*search.flags, "--device", device])


def test_the_newest_supernet_is_the_default(run, tmp_path, monkeypatch):
    """Without a value of --ckpt; a single architecture is passed over."""
    with pytest.raises(UserError, match="no supernet in"):
        newest_supernet(tmp_path)
    content = load_checkpoint(run.folder / "last.pth")
    for age, name in enumerate(("alone", "new", "old")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        content["args"]["choice"] = format_choice([0] * 20) if name == "alone" else None
        torch.save(content, folder / "last.pth")
        (folder / "args.json").write_text(json.dumps(content["args"]))
        os.utime(folder / "last.pth", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    assert newest_supernet(Path("runs")) == Path("runs/new/last.pth")
    with pytest.raises(UserError, match="single architecture"):
        random_search.main(["--ckpt", "runs/alone/last.pth"])
    Path("runs/new/search").write_text("in the way")
    for argv in ([], ["--ckpt"]):
        with pytest.raises(OSError, match="runs/new/search"):
            random_search.main(argv)


def test_a_file_that_is_no_checkpoint_is_named_in_one_line(run, tmp_path):
    """sml2h3/dddd_trainer#36, guyuchao/iNAS#1, bearpaw/pytorch-classification#27."""
    path, whole = tmp_path / "x.pth", load_checkpoint(run.folder / "last.pth")
    other_classes = whole | {"data": whole["data"] | {"classes": ["a", "b"]}}
    half = (run.folder / "last.pth").read_bytes()[:1_000_000]
    for content in (b"", b"hello", half, whole["model"], other_classes):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError) as error:
            random_search.main(["--ckpt", str(path), "--num_paths", "1"])
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_never_executes_code(run, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    monkeypatch.chdir(tmp_path)
    Path("evil").mkdir()
    torch.save(load_checkpoint(run.folder / "last.pth") | {"epoch": Evil()}, "evil/last.pth")
    training = [*TINY, *"--out_dir . --exp_name".split()]
    alone = ["new", "--choice", format_choice([0] * 20), "--init_from", "evil/last.pth"]
    for main, flags in (
        (random_search.main, ["--ckpt", "evil/last.pth"]),
        (supernet.main, [*training, *alone]),
        (supernet.main, [*training, "evil", "--resume"]),
    ):
        with pytest.raises(UserError, match=r"evil/last\.pth"):
            main(flags)
        assert not Path("executed").exists()


WRONG = ["--num_paths 0", "--batch_size 0", "--calibration_images -1", "--top_k 0", "--ckp x"]
WRONG += [f"--generations 1 {flag}" for flag in ("--num_paths 9", "--population 5", "--parents 1")]


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_usage_exits_with_2(search, tmp_path, flags):
    with pytest.raises(SystemExit) as exit:
        search_in(tmp_path, search, flags)
    assert exit.value.code == 2


# What is drawn and bred, with made-up scores


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace(Supernet(10, 8))


def searched(space: SearchSpace, folder: Path, flags: str = "", stop: int = 0) -> list[Scored]:
    """The table of a search in groups of 4, whole at every group; the `stop`-th is interrupted."""
    rows, groups = record(folder) if (folder / "paths.csv").exists() else [], []
    known = len(rows)

    def score(choices: list[Choice]) -> list[dict[str, float]]:
        assert choices == sorted(set(choices))
        if groups or known:
            assert record(folder) == rows and len(rows) == known + sum(groups)
        if len(groups) + 1 == stop:
            raise KeyboardInterrupt
        groups.append(len(choices))
        return [made_up(choice) for choice in choices]

    folder.mkdir(exist_ok=True)
    open_log(folder / "log.txt")
    flags = f"--num_paths 12 --population 6 --parents 3 {flags}"
    args = random_search.build_parser().parse_args(flags.split())
    with patch.object(random_search, "GROUP", 4):
        random_search.search(SimpleNamespace(score=score), space, args, folder / "paths.csv", rows)
    assert record(folder) == rows
    return rows


def test_a_continued_search_ends_with_the_same_table(space, tmp_path):
    """Interrupted in any of its groups, or first asked for fewer generations or paths
    (BayesWatch/nas-without-training#4); another seed draws others."""
    flags, less = "--generations 2", tmp_path / "less"
    whole = searched(space, tmp_path / "whole", flags)
    assert Counter(row.generation for row in whole) == {BASELINE: 4, 0: 12, 1: 6, 2: 6}
    for stop in range(1, 9):
        with pytest.raises(KeyboardInterrupt):
            searched(space, tmp_path / f"{stop}", flags, stop)
        assert searched(space, tmp_path / f"{stop}", flags) == whole
    for fewer in ("--num_paths 7", "", "--generations 1"):
        rows = searched(space, less, fewer)
        assert rows == [row for row in whole if row in rows]
    assert searched(space, less, flags) == whole
    assert searched(space, tmp_path / "seed", "--seed 1")[4:] != whole[4:16]


SHARES = [(12, 1, 4), (13, 1, 5), (13, 3, 6), (3, 8, 7)]


@pytest.mark.parametrize(("paths", "ranks", "groups"), SHARES)
def test_ranks_score_groups_of_equal_size(space, tmp_path, monkeypatch, paths, ranks, groups):
    """All paths and the four baselines, once, in groups of at most 4."""
    monkeypatch.setattr(random_search, "GROUP", 4)
    monkeypatch.setattr(random_search.utils, "world_size", lambda: ranks)
    monkeypatch.setattr(random_search.utils, "all_gather", lambda value: [value])
    args, shares = random_search.build_parser().parse_args(["--num_paths", str(paths)]), []
    for rank in range(min(ranks, groups)):
        monkeypatch.setattr(random_search.utils, "rank", lambda rank=rank: rank)
        with patch.object(random_search, "score", side_effect=lambda *given: given[2]) as score:
            random_search.search(None, space, args, tmp_path / "paths.csv", [])
        shares.append([call.args[2] for call in score.mock_calls])
    sizes = [len(group) for share in shares for group in share if group]
    assert len(sizes) == groups and sum(sizes) == paths + 4 and max(sizes) - min(sizes) <= 1
    assert len({row.choice for share in shares for group in share for row in group}) == paths + 4
    assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize(("size", "parents"), [(6, 3), (2, 2)])
def test_children_are_new_and_bred_from_the_best(space, tmp_path, size, parents):
    """The best of evolution's own: the first random draws and all generations before, never the
    other draws or the baselines (CanyonWind/Single-Path-One-Shot-NAS-MXNet#5)."""
    flags = f"--generations 2 --population {size} --parents {parents}"
    with patch.object(random_search, "breed", wraps=random_search.breed) as breed:
        rows = searched(space, tmp_path, flags)
    assert len({row.choice for row in rows}) == len(rows)
    numbers = itertools.product((1, 2), range(size))
    assert [(row.generation, row.index) for row in rows[16:]] == list(numbers)
    first, children = rows[4 : 4 + size], rows[16 : 16 + size]
    for call, own in zip(breed.mock_calls, (first, first + children), strict=True):
        best = sorted(own, key=lambda row: row.loss)[:parents]
        assert call.args[1] == [row.choice for row in best]


def test_evolution_goes_on_with_the_record_of_a_random_search(quick, search, tmp_path):
    folder = shutil.copytree(search.folder, tmp_path / "search")
    search_in(folder, search, "--population 6 --parents 3 --generations 2")
    rows, result = record(folder), found(folder)
    assert rows[:16] == record(search.folder) and len(rows) == 28
    assert result["statistics"] == found(search.folder)["statistics"]
    best = max(row.accuracy for row in rows[4:10] + rows[16:])
    assert result["evolution"] == {"generations": 2, "evaluations": 18, "best": best}
    assert result["loss"] == min(row.loss for row in rows[4:])
    expected = f"best {best:.2f}% of 18 paths"
    assert expected in (folder / "log.txt").read_text()


def test_evolution_may_have_no_finite_score(quick, search, tmp_path, monkeypatch):
    good = [row.choice for row in record(search.folder)[14:]]

    def score(self, choices):
        broken = dict(zip(SCORES, (10.0, 10.0, math.nan, math.nan), strict=True))
        return [made_up(choice) if choice in good else broken for choice in choices]

    monkeypatch.setattr(Scorer, "score", score)
    search_in(tmp_path, search, "--generations 1 --population 2 --parents 2")
    assert parse_choice(found(tmp_path)["choice"]) in good


def test_flops_limits_are_met_or_refused(quick, search, space, tmp_path):
    """Too low a limit is refused at once, with the extremes of the space (open-mmlab/mmrazor#183);
    where few architectures are left, evolution ends and says so."""
    layers = [[space.flops((0,) * i + (n,) + (0,) * (19 - i)) for n in range(4)] for i in range(20)]
    extra = sorted({cost - min(layer) for layer in layers for cost in layer} - {0})
    least = space.flops([layer.index(min(layer)) for layer in layers])
    with pytest.raises(UserError, match=f"the space goes from {least / 1e6} to"):
        search_in(tmp_path, search, "--max_flops 1")
    assert not files(tmp_path)
    limit = least + min(2 * extra[0], extra[1])  # 36 architectures cost no more
    flags = f"--max_flops {limit / 1e6} --num_paths 500 --generations 9 --population 6 --parents 3"
    search_in(tmp_path, search, flags)
    rows, log = record(tmp_path), (tmp_path / "log.txt").read_text()
    assert all(space.flops(row.choice) <= limit for row in rows[4:])
    assert sum(row.generation == 0 for row in rows) == 36
    assert "only 36 architectures are within the limits" in log
    own = {row.choice for row in rows[4:10] + rows[40:]}
    assert len(own) == len(rows) - 34
    singles = {row.choice for row in rows[:4] if space.flops(row.choice) <= limit}
    left = 36 - len(own | singles)
    assert left < 6
    expected = f"before generation {rows[-1].generation + 1}: {left} architectures are left"
    assert expected in log
