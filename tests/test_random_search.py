"""random_search.py: the same numbers as a naive loop, a record that survives anything, honest statistics."""

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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import SimpleNamespace

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
from data.datasets import load_dataset
from data.loaders import Batches
from data.records import (
    BASELINE,
    Scored,
    best_first,
    format_choice,
    load_checkpoint,
    parse_choice,
    read_rows,
)
from model import Choice, SearchSpace, Supernet, path_tree
from random_search import SEARCH_FILES, Scorer, calibration_batches, newest_supernet
from utils import UserError, open_log

CPU = torch.device("cpu")
SCORES = "accuracy", "half_accuracy", "loss", "half_loss"


def record(folder: Path) -> list[Scored]:
    return read_rows(folder / "paths.csv")


def found(folder: Path) -> dict:
    return json.loads((folder / "search.json").read_text())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def load(run: Run) -> tuple[Supernet, Batches, Batches]:
    """The trained supernet, two small calibration batches and the search split."""
    model = Supernet(10, 8)
    model.load_state_dict(load_checkpoint(run.folder / "last.pth")["model"])
    dataset = load_dataset("digits", "", 8)
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


def related(space: SearchSpace) -> list[Choice]:
    """Seven paths, most with long common beginnings, sorted."""
    rng = random.Random(5)
    first = space.sample(rng)
    return sorted({first[:cut] + space.sample(rng)[cut:] for cut in (0, 0, 3, 3, 12, 19, 20)})


# Scores


def test_each_path_of_a_tree_gets_what_it_gets_alone(run: Run, monkeypatch) -> None:
    """Accuracies, losses, the same on half of the images, and every BatchNorm statistic."""
    model, calibration, scored = load(run)
    choices, trees, scorer = related(SearchSpace(model)), [], Scorer(model, calibration, scored)
    monkeypatch.setattr(
        random_search, "path_tree", lambda *given: trees.append(path_tree(*given)) or trees[0]
    )
    for choice, score in zip(choices, scorer.score(choices), strict=True):
        alone = calibrated(model, choice, calibration)
        nodes = trees
        for module, expected in zip(scorer.model.path(choice)[:-1], alone[:-1], strict=True):
            (node,) = [node for node in nodes if node.module is module]
            norms = [norm for norm in expected.modules() if isinstance(norm, nn.BatchNorm2d)]
            expected = [
                buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)
            ]
            torch.testing.assert_close(node.statistics, expected, rtol=1e-5, atol=1e-6)
            nodes = node.children
        output = logits(alone, scored)
        hits, losses = (
            output.argmax(1) == scored.labels,
            F.cross_entropy(output, scored.labels, reduction="none"),
        )
        parts = [
            100 * hits.float(),
            100 * hits[scorer.first_half].float(),
            losses,
            losses[scorer.first_half],
        ]
        # Accuracies may differ by an image of a half.
        for name, part, tolerance in zip(SCORES, parts, (0.7, 0.7, 1e-4, 1e-4), strict=True):
            assert score[name] == pytest.approx(part.mean().item(), abs=tolerance)


def test_a_common_beginning_is_computed_once_a_batch_and_scored_in_eval_mode(run: Run) -> None:
    """megvii-model/ShuffleNet-Series#9, facebookresearch/AlphaNet#3."""
    model, calibration, scored = load(run)
    scorer, before = Scorer(model, calibration, scored), copy.deepcopy(model.state_dict())
    untouched, model = model, scorer.model
    choices, calls, expected = related(SearchSpace(model)), Counter(), Counter()
    for depth in range(22):
        for beginning in {choice[:depth] for choice in choices} if depth < 21 else choices:
            module = (
                model.last if depth == 21 else model.path((*beginning, *(0,) * (20 - depth)))[depth]
            )
            expected.update({(module, True): len(calibration), (module, False): len(scored)})
    for module in {module for module, _ in expected}:
        module.register_forward_hook(lambda module, *_: calls.update([(module, module.training)]))
    scorer.score(choices)
    assert calls == expected and calls[model.stem, True] == 2
    assert calls[model.last, False] == 5 * len(choices)
    torch.testing.assert_close(untouched.state_dict(), before, rtol=0, atol=0)


def test_without_calibration_the_supernets_own_statistics_score(run: Run) -> None:
    model, _, scored = load(run)
    choice = (1, 2) * 10
    hits = logits(model.eval(), scored, choice).argmax(1) == scored.labels
    (score,) = Scorer(model, None, scored).score([choice])
    assert score["accuracy"] == pytest.approx(100 * hits.float().mean().item())


def test_a_score_depends_on_nothing_but_the_path(run: Run) -> None:
    """open-mmlab/mmrazor#298, openai/CLIP#193: not on what was scored before, nor on the batch size; nor do halves."""
    model, calibration, scored = load(run)
    a, b = (0,) * 20, (3,) * 20
    scorer = Scorer(model, calibration, scored)
    alone = scorer.score([a])[0]
    scorer.score([b])
    assert (
        scorer.score([a, b])[0] == pytest.approx(alone, abs=1e-5) and scorer.score([a])[0] == alone
    )
    for size in (7, 300):
        other = Scorer(
            model, calibration, Batches(scored.dataset, scored.dataset.search, size, CPU)
        )
        assert torch.equal(other.first_half, scorer.first_half) and other.first_half.sum() == 150
        assert other.score([a])[0] == pytest.approx(alone, abs=1e-5)


def test_bf16_agrees_with_fp32_within_a_few_images(run: Run) -> None:
    model, calibration, scored = load(run)
    choices = [(0,) * 20, (2,) * 20, (3,) * 20]
    exact = Scorer(model, calibration, scored).score(choices)
    scored.precision = "bf16"
    rough = Scorer(model, calibration, scored).score(choices)
    assert exact != rough
    for a, b in zip(exact, rough, strict=True):
        assert abs(a["accuracy"] - b["accuracy"]) <= 5
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)


@pytest.mark.parametrize(("available", "asked"), [(5, 2000), (1197, 600)])
def test_all_calibration_images_count_the_same(available: int, asked: int, monkeypatch) -> None:
    """xfey/pytorch-BigNAS#3, timgaripov/swa#10: no short last batch and no momentum distorts the mean."""
    dataset, outputs, trees = load_dataset("digits", "", 8), [], []
    dataset.train = dataset.train.subset(range(available))
    dataset.train.images[:4] = 0
    torch.manual_seed(0)
    batches = calibration_batches(dataset, asked, 0, CPU, 0, "fp32")
    monkeypatch.setattr(
        random_search, "path_tree", lambda *given: trees.append(path_tree(*given)) or trees[0]
    )
    scorer = Scorer(Supernet(10, 8), batches, batches)
    scorer.model.stem[0].register_forward_hook(lambda module, _, output: outputs.append(output))
    scorer.score([(0,) * 20])
    assert len(outputs) == 2 * len(batches) and len(batches) == (1 if available == 5 else 2)
    expected = torch.cat(outputs[: len(batches)]).mean((0, 2, 3))
    torch.testing.assert_close(trees[0].statistics[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [0, 3])
def test_calibration_images_are_augmented_as_the_supernets_training_images_were(
    run: Run, tmp_path: Path, length: int
) -> None:
    """Statistics of plain images, without the dark borders of shifted ones, are not those that the weights know."""
    checkpoint, dataset = load_checkpoint(run.folder / "last.pth"), load_dataset("digits", "", 8)
    checkpoint["args"]["cutout"] = length
    torch.save(checkpoint, tmp_path / "last.pth")
    flags = ["--num_paths", "1", "--calibration_images", "250", "--top_k", "1"]
    random_search.main(["--ckpt", str(tmp_path / "last.pth"), *flags])
    row, losses = record(tmp_path / "search")[-1], []
    augmented = calibration_batches(dataset, 250, length, CPU, 0, "fp32")
    plain = copy.copy(augmented)
    plain.augment_in_order = False
    for calibration in (augmented, plain):
        output = logits(
            calibrated(load(run)[0], row.choice, calibration),
            Batches(dataset, dataset.search, 300, CPU),
        )
        losses.append(F.cross_entropy(output, dataset.search.labels).item())
    assert row.loss == pytest.approx(losses[0], abs=1e-4) and abs(row.loss - losses[1]) > 1e-3


# What a search leaves


def test_a_search_writes_what_it_promises(search: Run) -> None:
    assert files(search.folder) == set(SEARCH_FILES) - {"evolution.png", "standalone.png"}
    rows, result, space = record(search.folder), found(search.folder), SearchSpace(Supernet(10, 8))
    assert [(row.generation, row.index) for row in rows] == [(-1, i) for i in range(4)] + [
        (0, i) for i in range(12)
    ]
    assert [row.choice for row in rows[:4]] == [(n,) * 20 for n in range(4)] and len(
        {row.choice for row in rows}
    ) == 16
    for row in rows:
        assert (row.flops_m, row.params_m) == (
            space.flops(row.choice) / 1e6,
            space.params(row.choice) / 1e6,
        )
    best, *others = sorted(rows[4:], key=lambda row: (row.loss, -row.accuracy, row.index))
    assert result.items() >= (asdict(best) | {"choice": format_choice(best.choice)}).items()
    assert result["standard_error"] == pytest.approx(
        math.sqrt(best.accuracy * (100 - best.accuracy) / 300)
    )
    assert (result["dataset"], result["image_size"], result["split"]) == ("digits", 8, "search")
    numbers, accuracies = result["statistics"], [row.accuracy for row in rows[4:]]
    assert (numbers["paths"], numbers["images"], numbers["undefined"]) == (12, 300, 0)
    assert (numbers["best"], numbers["median"]) == (
        max(accuracies),
        pytest.approx(median(accuracies)),
    )
    assert numbers["baselines"] == dict(
        zip(CANDIDATES, [row.accuracy for row in rows[:4]], strict=True)
    )
    assert [row["choice"] for row in result["top"]] == [
        format_choice(row.choice) for row in (best, *others[:2])
    ]


def test_what_is_printed_can_be_acted_on(search: Run) -> None:
    """ShunLu91/Single-Path-One-Shot-NAS#14: which choice is best, and how to train it."""
    log, result = (search.folder / "log.txt").read_text(), found(search.folder)
    assert result["choice"] in log and f"{result['flops_m']:.1f}M multiply-adds" in log
    command = shlex.split(log.split("next: ")[1].splitlines()[0])
    args, _ = supernet.parse_args(command[2:])
    assert (args.choice, args.dataset, args.image_size) == (result["choice"], "digits", 8)
    assert args.supernet_accuracy == result["accuracy"]


def test_the_test_accuracy_is_that_of_the_test_images(run: Run, search: Run) -> None:
    dataset, best = load_dataset("digits", "", 8), found(search.folder)["top"][0]
    images = calibration_batches(dataset, 250, 0, CPU, 0, "fp32")
    path = calibrated(load(run)[0], parse_choice(best["choice"]), images)
    hits = logits(path, Batches(dataset, dataset.test, 100, CPU)).argmax(1) == dataset.test.labels
    assert best["test_accuracy"] == pytest.approx(100 * hits.float().mean().item(), abs=0.4)


def test_test_images_change_no_score_and_no_choice(
    search: Run, tmp_path: Path, monkeypatch
) -> None:
    """quark0/darts#66: only what is called a test accuracy looks at them: a tenth, if each class gets the same ones."""

    def equal_test_images(*args):
        dataset = load_dataset(*args)
        dataset.test.images[:] = 0
        return dataset

    monkeypatch.setattr(random_search, "load_dataset", equal_test_images)
    random_search.main([*search.flags, "--search_dir", str(tmp_path), "--num_paths", "4"])
    ours, theirs = (
        [(row.choice, row.accuracy) for row in record(f)] for f in (tmp_path, search.folder)
    )
    assert ours == theirs[:8]
    assert found(tmp_path)["choice"] == format_choice(
        best_first(record(tmp_path), "loss")[0].choice
    )
    assert [row["test_accuracy"] for row in found(tmp_path)["top"]] == pytest.approx([10] * 3)


@pytest.mark.parametrize("by", ["loss", "accuracy"])
def test_a_finished_search_is_not_scored_again(
    search: Run, tmp_path: Path, monkeypatch, by: str
) -> None:
    """Only the top three are measured on the test images again; the record stays."""
    shutil.copytree(search.folder, tmp_path / "copy")
    calls, original = [], Scorer.score
    monkeypatch.setattr(
        Scorer, "score", lambda self, choices: calls.append(choices) or original(self, choices)
    )
    random_search.main([*search.flags, "--search_dir", str(tmp_path / "copy"), "--rank_by", by])
    before, after = found(search.folder), found(tmp_path / "copy")
    order = [format_choice(row.choice) for row in best_first(record(search.folder), by)]
    assert record(tmp_path / "copy") == record(search.folder)
    assert calls == [sorted(parse_choice(choice) for choice in order[:3])]
    assert after["choice"] == order[0] and [row["choice"] for row in after["top"]] == order[:3]
    assert after["statistics"] == before["statistics"]
    assert f"the best by {by}" in (tmp_path / "copy" / "log.txt").read_text()


def test_a_killed_search_goes_on_and_ends_as_one_that_was_not(
    search: Run, tmp_path: Path, monkeypatch
) -> None:
    """huawei-noah/vega#120: interrupted in its second group, and killed in the second one after that."""
    flags, original, scored = [*search.flags, "--search_dir", str(tmp_path)], Scorer.score, []
    script = (
        "import random_search, signal, time, utils; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "original, calls, random_search.GROUP = random_search.Scorer.score, [], 4\n"
        "def score(*args):\n    calls.append(args)\n    return original(*args) if len(calls) < 2 else time.sleep(60)\n"
        f"random_search.Scorer.score = score\nutils.run_script(lambda: random_search.main({flags}))"
    )
    for kill, code, kept in ((signal.SIGINT, 130, 4), (signal.SIGKILL, -9, 8)):
        process = start("-c", script)
        while process.poll() is None and not (
            (tmp_path / "paths.csv").exists() and len(record(tmp_path)) == kept
        ):
            time.sleep(0.05)
        process.send_signal(kill)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == code and len(record(tmp_path)) == kept
    monkeypatch.setattr(Scorer, "score", lambda self, c: scored.append(len(c)) or original(self, c))
    random_search.main(flags)
    assert scored == [8, 3]  # at last the top three, on the test images
    assert_same_record(tmp_path, search.folder)
    assert found(tmp_path)["choice"] == found(search.folder)["choice"]


def test_a_search_names_the_weights_that_it_scored_with(
    run: Run, search: Run, tmp_path: Path, monkeypatch
) -> None:
    """The training may go on beside the search, and replace the checkpoint."""
    last = shutil.copy(run.folder / "last.pth", tmp_path / "last.pth")
    shutil.copytree(search.folder, tmp_path / "search")

    def replace_it(*args):
        last.write_bytes(b"a later epoch")
        return load_dataset(*args)

    monkeypatch.setattr(random_search, "load_dataset", replace_it)
    random_search.main(
        [*search.flags, "--ckpt", str(last), "--search_dir", str(tmp_path / "search")]
    )
    scored_with = hashlib.sha256((run.folder / "last.pth").read_bytes()).hexdigest()
    assert found(tmp_path / "search")["checkpoint"]["sha256"] == scored_with


def test_scores_that_are_not_finite_are_counted_and_never_chosen(
    run: Run, search: Run, tmp_path: Path
) -> None:
    """matplotlib/matplotlib#14439: one block of layer 0 is broken; then all of them."""
    content = load_checkpoint(run.folder / "last.pth")
    content["model"]["layers.0.shuffle7.main.0.weight"][0] = math.nan
    torch.save(content, tmp_path / "last.pth")
    flags = [*search.flags, "--ckpt", str(tmp_path / "last.pth"), "--search_dir"]
    random_search.main([*flags, str(tmp_path / "a"), "--num_paths", "6"])
    broken = [row for row in record(tmp_path / "a") if row.choice[0] == 2]
    assert len(broken) > 1 and not any(math.isfinite(row.loss) for row in broken)
    result = found(tmp_path / "a")
    assert result["statistics"]["undefined"] == len(broken) and not result["choice"].startswith("2")
    content["model"]["stem.0.weight"][0] = math.nan
    torch.save(content, tmp_path / "last.pth")
    with pytest.raises(UserError, match="no random path has a finite loss"):
        random_search.main([*flags, str(tmp_path / "b"), "--num_paths", "1"])
    assert len(record(tmp_path / "b")) == 5


def test_what_was_trained_is_what_is_searched(tmp_path: Path) -> None:
    """huggingface/pytorch-image-models#807: three classes have no top-5. Only --ckpt is given: data set, image size,
    classes and normalisation come from the checkpoint, as ShunLu91/Single-Path-One-Shot-NAS's random_search.py did not.
    """
    for label, part in itertools.product("abc", ("train", "test")):
        (tmp_path / part / label).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(noise(9, 11, 3, seed=ord(label) + i)).save(
                tmp_path / part / label / f"{i}.png"
            )
    flags = [
        "--dataset",
        "folder",
        "--data_dir",
        str(tmp_path),
        "--image_size",
        "8",
        "--batch_size",
        "8",
    ]
    supernet.main(
        [
            *flags,
            "--epochs",
            "3",
            "--val_interval",
            "5",
            "--out_dir",
            str(tmp_path),
            "--exp_name",
            "net",
        ]
    )
    checkpoint = load_checkpoint(tmp_path / "net/last.pth")
    validated = [row["val_acc"] is not None for row in checkpoint["metrics"]]
    assert validated == [False, False, True]  # the last epoch always is, whatever the interval
    random_search.main(["--ckpt", str(tmp_path / "net"), "--num_paths", "2"])
    result = found(tmp_path / "net/search")
    assert result["statistics"]["images"] == 3 and len(result["top"]) == 2
    assert (result["dataset"], result["image_size"], result["data_dir"]) == (
        "folder",
        8,
        str(tmp_path),
    )


def identity(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module | None:
    return nn.Identity() if stride == 1 and in_channels == out_channels else None


def test_one_more_candidate_is_one_entry_from_training_to_the_winner_alone(
    tmp_path: Path, monkeypatch
) -> None:
    """A block that some layers do not offer."""
    flags = [
        *TINY,
        "--batch_size",
        "400",
        "--epochs",
        "1",
        "--out_dir",
        str(tmp_path),
        "--exp_name",
    ]
    evolution = ["--generations", "1", "--population", "4", "--parents", "2"]
    folder, calibration = tmp_path / "five/search", ["--calibration_images", "250", "--top_k", "1"]
    with monkeypatch.context() as patch:
        patch.setitem(CANDIDATES, "skip", identity)
        supernet.main([*flags, "five"])
        random_search.main(
            ["--ckpt", str(tmp_path / "five"), "--num_paths", "12", *calibration, *evolution]
        )
        rows, result = record(folder), found(folder)
        assert Counter(row.generation for row in rows) == {BASELINE: 4, 0: 12, 1: 4}
        assert {i for row in rows for i, number in enumerate(row.choice) if number == 4} == {
            *range(20)
        } - {0, 4, 8, 16}
        assert files(folder) == set(SEARCH_FILES) - {"standalone.png"}
        supernet.main(["--choice", str(folder / "search.json"), *flags[4:], "alone"])
        alone = json.loads((tmp_path / "alone/result.json").read_text())
        for name in ("choice", "flops_m", "params_m", "dataset"):
            assert alone[name] == result[name]


# Which folder, which checkpoint, which settings


def made_up(choice: Choice) -> dict[str, float]:
    """Scores that depend on the path alone."""
    rng = random.Random(str(choice))
    return dict(
        zip(
            SCORES,
            [rng.uniform(10, 90), rng.uniform(10, 90), rng.random(), rng.random()],
            strict=True,
        )
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches with made-up scores and without pictures."""
    monkeypatch.setattr(
        Scorer, "score", lambda self, choices: [made_up(choice) for choice in choices]
    )
    monkeypatch.setattr(random_search, "plot_search", lambda *_: None)


def test_what_the_command_line_leaves_open_is_as_in_the_record(
    quick, run: Run, tmp_path: Path
) -> None:
    """Also the precision: what a GPU began in bf16 may end on a CPU, whose own default is fp32.

    Scores on test images are said to be such everywhere.
    """
    chosen = {
        "seed": 3,
        "split": "test",
        "precision": "bf16",
        "calibration_images": 250,
        "min_flops": 10.5,
    }
    chosen |= {
        "max_flops": 12.5,
        "population": 4,
        "parents": 2,
        "mutation_prob": 0.5,
        "rank_by": "accuracy",
    }
    flags = [
        "--ckpt",
        str(run.folder),
        "--search_dir",
        str(tmp_path),
        "--generations",
        "1",
        "--num_paths",
    ]
    random_search.main([*flags, "6", *(f"--{name}={value}" for name, value in chosen.items())])
    settings, rows = json.loads((tmp_path / "args.json").read_text()), record(tmp_path)
    chosen |= {"checkpoint": hashlib.sha256((run.folder / "last.pth").read_bytes()).hexdigest()}
    chosen |= {"candidates": list(CANDIDATES), "generations": 1}
    assert settings == chosen | {"num_paths": 6}
    random_search.main(flags[:4])  # as many paths and generations as before: nothing is left to do
    assert record(tmp_path) == rows
    random_search.main([*flags, "8"])
    assert json.loads((tmp_path / "args.json").read_text()) == settings | {"num_paths": 8}
    assert found(tmp_path)["args"].items() >= chosen.items()
    assert found(tmp_path)["split"] == "test" and "top" not in found(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("selecting on the test set") == log.count("images of the test split") == 3
    assert len(record(tmp_path)) == len(rows) + 2 and all(row in record(tmp_path) for row in rows)


@pytest.mark.parametrize(
    "changed",
    [
        "seed 0 1",
        "calibration_images 250 500",
        "split search test",
        "max_flops None 12",
        "precision fp32 bf16",
        "population 6 5",
        "parents 3 2",
        "mutation_prob 0.1 0.5",
        "rank_by loss accuracy",
    ],
)
def test_another_setting_than_that_of_the_record_is_refused_with_both_values(
    search: Run, tmp_path: Path, changed: str
) -> None:
    (flag, before, value), settings = (
        changed.split(),
        json.loads((search.folder / "args.json").read_text()),
    )
    settings |= {
        "population": 6,
        "parents": 3,
        "mutation_prob": 0.1,
        "rank_by": "loss",
    }  # of an evolution
    shutil.copy(search.folder / "paths.csv", tmp_path)
    (tmp_path / "args.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"{flag} {before}, this command {value}"):
        random_search.main([*search.flags, "--search_dir", str(tmp_path), f"--{flag}={value}"])


def test_a_record_of_another_checkpoint_is_refused(search: Run, tmp_path: Path) -> None:
    settings = json.loads((search.folder / "args.json").read_text())
    shutil.copy(search.folder / "paths.csv", tmp_path)
    (tmp_path / "args.json").write_text(json.dumps(settings | {"checkpoint": "0123"}))
    with pytest.raises(UserError, match="has checkpoint 0123, this command"):
        random_search.main([*search.flags, "--search_dir", str(tmp_path)])


def test_a_table_without_its_settings_is_refused(quick, search: Run, tmp_path: Path) -> None:
    """RexYing/diffpool#33. It may be overwritten, if asked, and nothing beside it."""
    for name in ("paths.csv", "notes.txt"):
        (tmp_path / name).write_text("mine")
    flags = [*search.flags, "--search_dir", str(tmp_path), "--num_paths", "1"]
    with pytest.raises(OSError, match=r"No such file.*args\.json"):
        random_search.main(flags)
    assert (tmp_path / "paths.csv").read_text() == "mine"
    random_search.main([*flags, "--overwrite"])
    assert len(record(tmp_path)) == 5 and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("device", ["cuda:63", "privateuseone"])
def test_a_device_that_cannot_be_used_is_refused(search: Run, device: str) -> None:
    """LuyaooChen/uninformed-students-pytorch#3."""
    with pytest.raises(UserError, match=f"--device {device} cannot be used"):
        random_search.main([*search.flags, "--device", device])


def test_the_newest_supernet_is_taken(run: Run, tmp_path: Path, monkeypatch) -> None:
    """Without a value of --ckpt; a single architecture is passed over."""
    with pytest.raises(UserError, match="no supernet in"):
        newest_supernet(tmp_path)
    for age, name in enumerate(("alone", "new", "old")):
        shutil.copytree(
            run.folder, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("search")
        )
        content = load_checkpoint(run.folder / "last.pth")
        content["args"]["choice"] = "-".join("0" * 20) if name == "alone" else None
        torch.save(content, tmp_path / "runs" / name / "last.pth")
        (tmp_path / "runs" / name / "args.json").write_text(json.dumps(content["args"]))
        os.utime(tmp_path / "runs" / name / "last.pth", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    assert newest_supernet(Path("runs")) == Path("runs/new/last.pth")
    with pytest.raises(UserError, match="single architecture"):
        random_search.main(["--ckpt", "runs/alone/last.pth"])
    (tmp_path / "runs/new/search").write_text("in the way")
    for argv in ([], ["--ckpt"]):
        with pytest.raises(OSError, match="runs/new/search"):
            random_search.main(argv)


@pytest.mark.parametrize("content", [b"", b"hello", "half", "bare state", "other classes"])
def test_a_file_that_is_no_checkpoint_of_ours_is_named(
    run: Run, tmp_path: Path, content: bytes | str
) -> None:
    """sml2h3/dddd_trainer#36, guyuchao/iNAS#1, bearpaw/pytorch-classification#27."""
    path, whole = tmp_path / "x.pth", load_checkpoint(run.folder / "last.pth")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "half":
        path.write_bytes((run.folder / "last.pth").read_bytes()[:1_000_000])
    elif content == "bare state":
        torch.save(whole["model"], path)
    elif content == "other classes":
        torch.save(whole | {"data": whole["data"] | {"classes": ["a", "b"]}}, path)
    with pytest.raises(UserError) as error:
        random_search.main(["--ckpt", str(path), "--num_paths", "1"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (random_search.main, "--ckpt evil/last.pth"),
        (
            supernet.main,
            f"--exp_name new --choice {format_choice([0] * 20)} --init_from evil/last.pth",
        ),
        (supernet.main, "--exp_name evil --resume"),
    ],
)
def test_a_checkpoint_never_executes(
    run: Run, tmp_path: Path, monkeypatch, main: Callable, flags: str
) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "evil").mkdir()
    torch.save(
        load_checkpoint(run.folder / "last.pth") | {"epoch": Evil()}, tmp_path / "evil/last.pth"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"evil/last\.pth"):
        main([*flags.split(), *([*TINY, "--out_dir", "."] if main is supernet.main else [])])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "flags",
    ["--num_paths 0", "--batch_size 0", "--calibration_images -1", "--top_k 0", "--ckp x"]
    + [f"--generations 1 {flag}" for flag in ("--num_paths 9", "--population 5", "--parents 1")],
)
def test_wrong_usage_exits_with_2(run: Run, tmp_path: Path, flags: str) -> None:
    with pytest.raises(SystemExit) as exit:
        random_search.main(
            ["--ckpt", str(run.folder), "--search_dir", str(tmp_path), *flags.split()]
        )
    assert exit.value.code == 2


# What is drawn and bred, with made-up scores


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace(Supernet(10, 8))


def searched(
    space: SearchSpace, folder: Path, flags: Sequence[str] = (), stop: int = 0
) -> list[Scored]:
    """The table of a search in groups of 4, whole at every group; the group number `stop` is interrupted."""
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
    args = random_search.build_parser().parse_args(
        ["--num_paths", "12", "--population", "6", "--parents", "3", *flags]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_search, "GROUP", 4)
        random_search.search(SimpleNamespace(score=score), space, args, folder / "paths.csv", rows)
    assert record(folder) == rows
    return rows


def test_an_interrupted_search_goes_on_and_ends_with_the_same_table(
    space: SearchSpace, tmp_path: Path
) -> None:
    """In any of its groups, the generations included; also one that was first asked for fewer generations or paths."""
    flags = ["--generations", "2"]
    whole = searched(space, tmp_path / "whole", flags)
    assert Counter(row.generation for row in whole) == {BASELINE: 4, 0: 12, 1: 6, 2: 6}
    for stop in range(1, 9):
        with pytest.raises(KeyboardInterrupt):
            searched(space, tmp_path / f"{stop}", flags, stop)
        assert searched(space, tmp_path / f"{stop}", flags) == whole
    for less in (["--num_paths", "7"], [], ["--generations", "1"]):
        assert searched(space, tmp_path / "less", less) == [
            row for row in whole if row in record(tmp_path / "less")
        ]
    assert searched(space, tmp_path / "less", flags) == whole


@pytest.mark.parametrize(
    ("paths", "ranks", "groups"), [(12, 1, 4), (13, 1, 5), (13, 3, 6), (3, 8, 7)]
)
def test_every_rank_gets_as_much_to_score(
    space: SearchSpace, tmp_path: Path, monkeypatch, paths: int, ranks: int, groups: int
) -> None:
    """Of all paths and the four baselines, in groups of at most 4."""
    monkeypatch.setattr(random_search, "GROUP", 4)
    monkeypatch.setattr(random_search.utils, "world_size", lambda: ranks)
    monkeypatch.setattr(random_search.utils, "all_gather", lambda value: [value])
    args = random_search.build_parser().parse_args(["--num_paths", str(paths)])
    shares = [[] for _ in range(min(ranks, groups))]
    for rank, share in enumerate(shares):
        monkeypatch.setattr(random_search.utils, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            random_search, "score", lambda *given, to=share: to.append(given[2]) or given[2]
        )
        random_search.search(None, space, args, tmp_path / "paths.csv", [])
    sizes = [len(group) for share in shares for group in share if group]
    assert len(sizes) == groups and sum(sizes) == paths + 4 and max(sizes) - min(sizes) <= 1
    assert len({row.choice for share in shares for group in share for row in group}) == paths + 4
    assert len({len(share) for share in shares}) == 1


def test_draws_are_different_and_the_first_stay_when_more_are_asked_for(
    space: SearchSpace, tmp_path: Path
) -> None:
    """BayesWatch/nas-without-training#4."""
    many = searched(space, tmp_path / "many", ["--num_paths", "90"])[4:]
    assert len({row.choice for row in many}) == 90
    assert searched(space, tmp_path / "few", ["--num_paths", "20"])[4:] == many[:20]
    assert (
        searched(space, tmp_path / "other", ["--num_paths", "20", "--seed", "1"])[4:] != many[:20]
    )


@pytest.mark.parametrize(("size", "parents"), [(6, 3), (2, 2)])
def test_children_are_new_and_bred_from_the_best_of_evolutions_own(
    space: SearchSpace, tmp_path: Path, monkeypatch, size: int, parents: int
) -> None:
    """Of the first random draws and of all generations before, never of the other draws or the baselines.

    CanyonWind/Single-Path-One-Shot-NAS-MXNet#5: nor is there a population too small.
    """
    seen, original = [], random_search.breed
    monkeypatch.setattr(
        random_search, "breed", lambda *given: seen.append(given[1]) or original(*given)
    )
    flags = ["--generations", "2", "--population", str(size), "--parents", str(parents)]
    rows = searched(space, tmp_path, flags)
    assert len({row.choice for row in rows}) == len(rows)
    assert [(row.generation, row.index) for row in rows[16:]] == [
        (g, i) for g in (1, 2) for i in range(size)
    ]
    first, children = rows[4 : 4 + size], rows[16 : 16 + size]
    for bred_from, own in zip(seen, (first, first + children), strict=True):
        assert bred_from == [row.choice for row in sorted(own, key=lambda row: row.loss)[:parents]]


def test_evolution_goes_on_with_the_record_of_a_random_search(
    quick, search: Run, tmp_path: Path
) -> None:
    shutil.copytree(search.folder, tmp_path / "search")
    flags = [
        *search.flags,
        "--search_dir",
        str(tmp_path / "search"),
        "--population",
        "6",
        "--parents",
        "3",
    ]
    random_search.main([*flags, "--generations", "2"])
    rows, result, log = (
        record(tmp_path / "search"),
        found(tmp_path / "search"),
        tmp_path / "search/log.txt",
    )
    assert rows[:16] == record(search.folder) and len(rows) == 28
    assert result["statistics"] == found(search.folder)["statistics"]
    best = max(row.accuracy for row in rows[4:10] + rows[16:])
    assert result["evolution"] == {"generations": 2, "evaluations": 18, "best": best}
    assert result["loss"] == min(row.loss for row in rows[4:])
    assert f"best {best:.2f}% after 18 paths, 2 generations" in log.read_text()


def test_an_evolution_may_have_no_defined_score_where_random_search_has(
    quick, search: Run, tmp_path: Path, monkeypatch
) -> None:
    good = [row.choice for row in record(search.folder)[14:]]
    broken = dict(zip(SCORES, (10.0, 10.0, math.nan, math.nan), strict=True))
    monkeypatch.setattr(
        Scorer,
        "score",
        lambda self, choices: [made_up(c) if c in good else broken for c in choices],
    )
    evolution = ["--generations", "1", "--population", "2", "--parents", "2"]
    random_search.main([*search.flags, "--search_dir", str(tmp_path), *evolution])
    assert parse_choice(found(tmp_path)["choice"]) in good


@pytest.fixture(scope="module")
def costs(space: SearchSpace) -> list[int]:
    """The three smallest costs of the space; 1, 8 and 36 architectures cost no more."""
    layers = [[space.flops((0,) * i + (n,) + (0,) * (19 - i)) for n in range(4)] for i in range(20)]
    choice = tuple(costs.index(min(costs)) for costs in layers)
    extra = sorted({cost - min(costs) for costs in layers for cost in costs if cost > min(costs)})
    least = space.flops(choice)
    return sorted({least, least + extra[0], least + min(2 * extra[0], extra[1])})


def test_flops_limits_are_met_or_refused(
    quick, search: Run, space: SearchSpace, costs: list[int], tmp_path
) -> None:
    """open-mmlab/mmrazor#183: at once, with the extremes of the space."""
    flags = [*search.flags, "--search_dir", str(tmp_path)]
    with pytest.raises(UserError, match=f"the space goes from {costs[0] / 1e6} to"):
        random_search.main([*flags, "--max_flops", "1"])
    assert not files(tmp_path)
    random_search.main([*flags, "--max_flops", str(costs[1] / 1e6), "--num_paths", "500"])
    drawn = [row for row in record(tmp_path) if row.generation == 0]
    assert len(drawn) == 8 and all(space.flops(row.choice) <= costs[1] for row in drawn)
    assert "only 8 architectures are within the limits" in (tmp_path / "log.txt").read_text()


def test_evolution_ends_when_too_few_architectures_are_left(
    space: SearchSpace, costs: list[int], tmp_path
) -> None:
    """Under limits that few meet: no loop without an end, and it is said."""
    rows = searched(SearchSpace(space.model, max_flops=costs[2]), tmp_path, ["--generations", "9"])
    own = {row.choice for row in rows[4:10] + rows[16:]}
    assert all(space.flops(choice) <= costs[2] for choice in own)
    assert len(own) == len(rows) - 10
    singles = {row.choice for row in rows[:4] if space.flops(row.choice) <= costs[2]}
    left = 36 - len(own | singles)
    assert left < 6
    expected = f"before generation {rows[-1].generation + 1}: {left} architectures are left"
    assert expected in (tmp_path / "log.txt").read_text()
