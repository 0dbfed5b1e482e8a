"""random_search.py: the scores of a naive loop, a record that survives a kill, fair statistics."""

import copy
import hashlib
import itertools
import math
import os
import random
import shutil
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
from conftest import TINY, Run, assert_same_record, noise
from data import records
from data.datasets import load_dataset
from data.loaders import Batches
from data.records import BASELINE, Scored, best_first, format_choice, load_checkpoint, parse_choice
from model import SPACES, Choice, SearchSpace, Supernet, path_tree
from random_search import SEARCH_FILES, Scorer, calibration_batches
from utils import UserError, read_json, write_json

CPU = torch.device("cpu")
SMALL = SPACES["spos_small"]
ZEROS = format_choice([0] * 20)


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
def checkpoint(run) -> dict:
    """What the tiny run's last.pth holds."""
    return load_checkpoint(run.folder / "last.pth")


@pytest.fixture
def trained(checkpoint) -> tuple[Supernet, Batches, Batches]:
    """The trained supernet, two small calibration batches and the search split."""
    model, dataset = Supernet(10, 8), load_dataset("digits", "", 8)
    model.load_state_dict(checkpoint["model"])
    calibration = Batches(dataset, dataset.train.subset(range(160)), 80, CPU)
    return model, calibration, Batches(dataset, dataset.search, 64, CPU)


def calibrated(model: Supernet, choice: Choice, calibration: Batches) -> nn.Sequential:
    """A copy of one path, recalibrated alone by torch's own function."""
    path = copy.deepcopy(model.path(choice))
    update_bn([(x,) for x, _ in calibration], path)
    return path.eval()


@torch.no_grad()
def naive(network: nn.Module, images: Batches, *choice: Choice) -> tuple[torch.Tensor, ...]:
    """For every image 100 or 0, whether it is recognised, and the cross-entropy."""
    logits = torch.cat([network(x, *choice) for x, _ in images])
    hits = 100.0 * (logits.argmax(1) == images.labels)
    return hits, F.cross_entropy(logits, images.labels, reduction="none")


def test_paths_with_common_prefixes_score_as_each_alone(trained):
    """Also on half of the images. A prefix is computed once a batch; only BatchNorm is in training
    mode, and only in calibration (megvii-model/ShuffleNet-Series#9, facebookresearch/AlphaNet#3).
    """
    model, calibration, images = trained
    before, scorer, calls = copy.deepcopy(model.state_dict()), Scorer(*trained), Counter()
    space, rng = SearchSpace(model), random.Random(5)
    first = space.sample(rng)
    choices = sorted({first[:cut] + space.sample(rng)[cut:] for cut in (0, 0, 3, 3, 12, 19, 20)})

    def count(module, *_):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        assert not any(m.training for m in module.modules() if m not in norms)
        calls[norms[0].training] += 1

    blocks = [block for layer in scorer.model.layers for block in layer.values()]
    for module in (scorer.model.stem, *blocks, scorer.model.last):
        module.register_forward_hook(count)
    tree = path_tree(scorer.model, choices)
    with patch.object(random_search, "path_tree", return_value=tree):
        scores = scorer.score(choices)
    prefixes = {choice[:depth] for choice in choices for depth in range(21)}
    once = len(prefixes) + len(choices)  # and the last convolution of each path
    assert calls == {True: once * len(calibration), False: once * len(images)}
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for choice, score in zip(choices, scores, strict=True):
        alone, nodes = calibrated(model, choice, calibration), [tree]
        for module, other in zip(scorer.model.path(choice)[:-1], alone[:-1], strict=True):
            (node,) = [node for node in nodes if node.module is module]
            buffers = [value for name, value in other.named_buffers() if "running" in name]
            torch.testing.assert_close(node.statistics, buffers, rtol=1e-5, atol=1e-6)
            nodes = node.children
        hits, losses = naive(alone, images)
        for prefix, part in (("", slice(None)), ("half_", scorer.half)):
            # Accuracies may differ by an image of a half.
            assert score[f"{prefix}accuracy"] == pytest.approx(hits[part].mean().item(), abs=0.7)
            assert score[f"{prefix}loss"] == pytest.approx(losses[part].mean().item(), abs=1e-4)


def test_a_score_depends_on_the_path_alone(trained):
    """Earlier scores and the batch size change neither scores nor halves, and bf16 changes scores
    by a few images (open-mmlab/mmrazor#298, openai/CLIP#193). Without calibration, BatchNorm's
    statistics are those of the supernet."""
    model, calibration, images = trained
    a, b, scorer = (0,) * 20, (3,) * 20, Scorer(*trained)
    (alone,) = scorer.score([a])
    assert scorer.score([a, b])[0] == pytest.approx(alone, abs=1e-5)
    assert scorer.score([a])[0] == alone
    other = Scorer(model, calibration, Batches(images.dataset, images.dataset.search, 7, CPU))
    assert torch.equal(other.half, scorer.half) and other.half.sum() == 150
    assert other.score([a])[0] == pytest.approx(alone, abs=1e-5)
    hits, _ = naive(model.eval(), images, a)
    (uncalibrated,) = Scorer(model, None, images).score([a])
    assert uncalibrated["accuracy"] == pytest.approx(hits.mean().item())
    images.precision = "bf16"
    (rough,) = Scorer(*trained).score([a])
    assert rough != alone and rough["loss"] == pytest.approx(alone["loss"], rel=0.05)
    assert rough["accuracy"] == pytest.approx(alone["accuracy"], abs=5)


@pytest.mark.parametrize(("available", "batches"), [(5, 1), (1197, 2)])
def test_all_calibration_images_count_the_same(available, batches):
    """No short last batch and no momentum distorts the mean (xfey/pytorch-BigNAS#3,
    timgaripov/swa#10)."""
    dataset, outputs = load_dataset("digits", "", 8), []
    dataset.train = dataset.train.subset(range(available))
    dataset.train.images[:4] = 0
    torch.manual_seed(0)
    images = calibration_batches(dataset, 600, 0, CPU, 0, "fp32")
    scorer = Scorer(Supernet(10, 8), images, images)
    scorer.model.stem[0].register_forward_hook(lambda module, _, output: outputs.append(output))
    scorer.score([(0,) * 20])
    assert (len(images), len(outputs)) == (batches, 2 * batches)
    mean, expected = scorer.model.stem[1].running_mean, torch.cat(outputs[:batches])
    torch.testing.assert_close(mean, expected.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_calibration_images_are_augmented_as_in_training(checkpoint, trained, tmp_path):
    """For the scores on the search split and the test accuracy (quark0/darts#66)."""
    checkpoint["args"]["cutout"], dataset = 3, load_dataset("digits", "", 8)
    torch.save(checkpoint, tmp_path / "last.pth")
    flags = "--num_paths 1 --calibration_images 250 --top_k 1".split()
    random_search.main(["--ckpt", str(tmp_path / "last.pth"), *flags])
    row, (model, _, images) = record(tmp_path / "search")[-1], trained
    augmented = calibration_batches(dataset, 250, 3, CPU, 0, "fp32")
    plain = copy.copy(augmented)
    plain.augment_in_order = False
    alone, other = (calibrated(model, row.choice, batches) for batches in (augmented, plain))
    assert row.loss == pytest.approx(naive(alone, images)[1].mean().item(), abs=1e-4)
    assert row.loss != pytest.approx(naive(other, images)[1].mean().item(), abs=1e-3)
    hits, _ = naive(alone, Batches(dataset, dataset.test, 100, CPU))
    (top,) = found(tmp_path / "search")["top"]
    assert top["test_accuracy"] == pytest.approx(hits.mean().item(), abs=0.4)


def test_a_search_writes_a_table_a_summary_and_the_next_command(search):
    """The command trains the best architecture (ShunLu91/Single-Path-One-Shot-NAS#14)."""
    rows, result, space = record(search.folder), found(search.folder), SearchSpace(Supernet(10, 8))
    others = {"evolution.png", "standalone.png", "truth.png"}
    assert files(search.folder) == set(SEARCH_FILES) - others
    singles, drawn = rows[:4], rows[4:]
    expected = [(BASELINE, n, (n,) * 20) for n in range(4)]
    assert [(row.generation, row.index, row.choice) for row in singles] == expected
    assert [(row.generation, row.index) for row in drawn] == [(0, i) for i in range(12)]
    for row in rows:
        assert row.flops_m == space.flops(row.choice) / 1e6
        assert row.params_m == space.params(row.choice) / 1e6
    top = sorted(drawn, key=lambda row: (row.loss, -row.accuracy, row.index))[:3]
    assert result.items() >= top[0].as_json().items()
    assert [parse_choice(row["choice"]) for row in result["top"]] == [row.choice for row in top]
    error = math.sqrt(top[0].accuracy * (100 - top[0].accuracy) / 300)
    assert result["standard_error"] == pytest.approx(error)
    accuracies, baselines = ([row.accuracy for row in part] for part in (drawn, singles))
    numbers = {"paths": 12, "images": 300, "undefined": 0, "best": max(accuracies)}
    numbers["median"] = median(accuracies)
    numbers["baselines"] = dict(zip(SMALL.candidates, baselines, strict=True))
    assert result["statistics"].items() >= numbers.items()
    log, command = (search.folder / "log.txt").read_text().split("next: ")
    assert result["choice"] in log and f"{result['flops_m']:.1f}M multiply-adds" in log
    assert command.startswith(f"python supernet.py --choice {search.folder}/search.json")


def test_a_search_goes_on_where_it_ended(search, tmp_path, monkeypatch):
    """Interrupted in its second group (huawei-noah/vega#120), or finished: ranked in another way,
    only its best are scored again, on the test images."""
    original, groups = Scorer.score, []

    def interrupted(self, choices):
        groups.append(choices)
        if len(groups) == 2:
            raise KeyboardInterrupt
        return original(self, choices)

    monkeypatch.setattr(random_search, "GROUP", 4)
    monkeypatch.setattr(Scorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_in(tmp_path, search)
    assert len(record(tmp_path)) == 4
    search_in(tmp_path, search)
    rows, before = record(tmp_path), found(tmp_path)
    assert [len(group) for group in groups] == [4, 4, 4, 4, 4, 3]
    assert_same_record(tmp_path, search.folder)
    search_in(tmp_path, search, "--rank_by accuracy")
    top, after = [row.choice for row in best_first(rows, "accuracy")[:3]], found(tmp_path)
    assert record(tmp_path) == rows and groups[6:] == [sorted(top)]
    assert [parse_choice(row["choice"]) for row in (after, *after["top"])] == [top[0], *top]
    assert after["statistics"] == before["statistics"]
    assert "the best by accuracy" in (tmp_path / "log.txt").read_text()


def test_scores_that_are_not_finite_are_never_chosen(checkpoint, search, tmp_path):
    """One block of layer 0 is broken; then all of them (matplotlib/matplotlib#14439)."""
    last, folder = tmp_path / "last.pth", tmp_path / "search"
    checkpoint["model"]["layers.0.shuffle7.main.0.weight"][0] = math.nan
    torch.save(checkpoint, last)
    search_in(folder, search, f"--ckpt {last} --num_paths 6")
    broken, result = [row for row in record(folder) if row.choice[0] == 2], found(folder)
    assert len(broken) > 1 and not any(math.isfinite(row.loss) for row in broken)
    assert result["statistics"]["undefined"] == len(broken) and not result["choice"].startswith("2")
    checkpoint["model"]["stem.0.weight"][0] = math.nan
    torch.save(checkpoint, last)
    with pytest.raises(UserError, match="no random path has a finite loss"):
        search_in(folder, search, f"--ckpt {last} --num_paths 1 --overwrite")


def test_own_images_and_an_own_block_get_from_training_to_the_winner(tmp_path, monkeypatch):
    """Later commands take data set, image size and classes from the files of earlier ones, even
    classes too few for a top-5 (huggingface/pytorch-image-models#807)."""

    def unchanged(in_channels, out_channels, stride, affine):  # not offered in all layers
        return nn.Identity() if stride == 1 and in_channels == out_channels else None

    monkeypatch.setitem(CANDIDATES, "unchanged", unchanged)
    space = replace(SMALL, candidates=[*SMALL.candidates, "unchanged"])
    monkeypatch.setitem(SPACES, "mine", space)
    for part, label in itertools.product(("train", "test"), "abc"):
        (tmp_path / part / label).mkdir(parents=True)
        for i in range(12):
            image = Image.fromarray(noise(9, 11, 3, seed=ord(label) + i))
            image.save(tmp_path / part / label / f"{i}.png")
    where = f"--dataset folder --data_dir {tmp_path} --image_size 8 --space mine".split()
    flags = f"--epochs 3 --batch_size 8 --out_dir {tmp_path} --exp_name".split()
    supernet.main([*where, *flags, "net"])
    searching = "--num_paths 12 --top_k 99 --generations 1 --population 4 --parents 2".split()
    random_search.main(["--ckpt", str(tmp_path / "net"), *searching])
    folder = tmp_path / "net/search"
    rows, result = record(folder), found(folder)
    assert Counter(row.generation for row in rows) == {BASELINE: 4, 0: 12, 1: 4}
    assert files(folder) == set(SEARCH_FILES) - {"standalone.png", "truth.png"}
    numbers = result["statistics"]
    assert (numbers["images"], numbers["paths"], len(result["top"])) == (3, 12, 16)
    best = max(row.accuracy for row in rows[4:8] + rows[16:])
    assert result["evolution"] == {"generations": 1, "evaluations": 8, "best": best}
    assert f"best {best:.2f}% of 8 paths" in (folder / "log.txt").read_text()
    supernet.main(["--choice", str(folder / "search.json"), *flags, "alone"])
    alone = read_json(tmp_path / "alone/result.json")
    for name in ("choice", "flops_m", "params_m", "dataset"):
        assert alone[name] == result[name]


def made_up(choice: Choice) -> dict[str, float]:
    """Scores that depend on the path alone."""
    rng = random.Random(str(choice))
    return {name: rng.uniform(10, 90) for name in "accuracy half_accuracy loss half_loss".split()}


@pytest.fixture
def quick(monkeypatch):
    """Searches with made-up scores and without pictures."""
    monkeypatch.setattr(Scorer, "score", lambda self, choices: [made_up(c) for c in choices])
    monkeypatch.setattr(random_search, "plot_search", lambda *_: None)


def test_settings_are_those_of_the_record(quick, run, checkpoint, tmp_path):
    """Unset flags take them; set ones, and the checkpoint, must agree. Scores on test images are
    named as such."""
    chosen = {"seed": 3, "split": "test", "precision": "bf16", "calibration_images": 250}
    chosen |= {"min_flops": 10.5, "max_flops": 12.5, "population": 4, "parents": 2}
    chosen |= {"mutation_prob": 0.5, "rank_by": "accuracy", "generations": 1}
    where, last = f"--ckpt {run.folder} --search_dir {tmp_path}".split(), run.folder / "last.pth"
    given = [f"--{name}={value}" for name, value in chosen.items()]
    random_search.main([*where, *given, "--num_paths", "6"])
    rows = record(tmp_path)
    random_search.main(where)  # as many paths and generations as before: nothing is left to do
    assert record(tmp_path) == rows
    random_search.main([*where, "--num_paths", "8"])
    assert len(record(tmp_path)) == len(rows) + 2 and all(row in record(tmp_path) for row in rows)
    chosen["checkpoint"] = hashlib.sha256(last.read_bytes()).hexdigest()
    chosen |= {"space": "spos_small", "space_layout": asdict(SMALL)}
    assert read_json(tmp_path / "args.json") == chosen | {"num_paths": 8}
    result, log = found(tmp_path), (tmp_path / "log.txt").read_text()
    assert result["split"] == "test" and "top" not in result
    assert log.count("selecting on the test set") == log.count("test split of 300 images") == 3
    others = {"seed": 4, "split": "search", "precision": "fp32", "calibration_images": 500}
    others |= {"min_flops": 10.25, "max_flops": 12.25, "population": 5, "parents": 3}
    for name, value in (others | {"mutation_prob": 0.1, "rank_by": "loss"}).items():
        with pytest.raises(UserError, match=f"{name} {chosen[name]}, this command {value}"):
            random_search.main([*where, f"--{name}={value}"])
    torch.save(checkpoint | {"epoch": 1}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"has checkpoint {chosen['checkpoint']}, this command"):
        random_search.main([*where, "--ckpt", str(tmp_path / "other.pth")])


def test_a_table_without_its_settings_is_refused(quick, search, tmp_path):
    """It may be overwritten, if asked, and nothing beside it (RexYing/diffpool#33)."""
    shutil.copy(search.folder / "paths.csv", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match=r"No such file.*args\.json"):
        search_in(tmp_path, search, "--num_paths 1")
    assert record(tmp_path) == record(search.folder)
    search_in(tmp_path, search, "--num_paths 1 --overwrite")
    assert len(record(tmp_path)) == 5 and (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unusable_device_is_refused(search, tmp_path):
    """LuyaooChen/uninformed-students-pytorch#3."""
    with pytest.raises(UserError, match="--device cuda:63 cannot be used"):
        search_in(tmp_path, search, "--device cuda:63")


def test_the_newest_supernet_is_the_default(checkpoint, tmp_path, monkeypatch):
    """Without a value of --ckpt; a single architecture is passed over."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no supernet in"):
        random_search.main([])
    for age, name in enumerate(("alone", "new", "old")):
        last = Path("runs", name, "last.pth")
        last.parent.mkdir(parents=True)
        checkpoint["args"]["choice"] = ZEROS if name == "alone" else None
        torch.save(checkpoint, last)
        write_json(last.with_name("args.json"), checkpoint["args"])
        os.utime(last, (1e9 - age, 1e9 - age))
    with pytest.raises(UserError, match="single architecture"):
        random_search.main(["--ckpt", "runs/alone/last.pth"])
    Path("runs/new/search").write_text("in the way")
    for argv in ([], ["--ckpt"]):
        with pytest.raises(OSError, match="runs/new/search"):
            random_search.main(argv)


def test_a_file_that_is_no_checkpoint_is_named_in_one_line(run, checkpoint, tmp_path, monkeypatch):
    """By every command, and no code in it is executed (sml2h3/dddd_trainer#36, guyuchao/iNAS#1,
    bearpaw/pytorch-classification#27)."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    monkeypatch.chdir(tmp_path)
    last, message = Path("net/last.pth"), r"^.*net/last\.pth.*$"
    shutil.copytree(run.folder, last.parent)
    last.write_bytes(last.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match=message):
        random_search.main(["--ckpt", str(last)])
    other_classes = checkpoint | {"data": checkpoint["data"] | {"classes": ["a", "b"]}}
    for content in (checkpoint["model"], other_classes, checkpoint | {"epoch": Evil()}):
        torch.save(content, last)
        with pytest.raises(UserError, match=message):
            random_search.main(["--ckpt", str(last)])
    for more in (["net", "--resume"], ["new", "--choice", ZEROS, "--init_from", str(last)]):
        with pytest.raises(UserError, match=message):
            supernet.main([*TINY, "--out_dir", ".", "--exp_name", *more])
    assert not Path("executed").exists()


@pytest.mark.parametrize("flags", ["--num_paths 9", "--population 5", "--parents 1"])
def test_impossible_sizes_of_a_generation_exit_with_2(search, tmp_path, flags):
    with pytest.raises(SystemExit, match=r"^2$"):
        search_in(tmp_path, search, f"--generations 1 {flags}")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace(Supernet(10, 8))


def searched(space: SearchSpace, folder: Path, flags: str = "", stop: int = 0) -> list[Scored]:
    """The table of a search in groups of 4, whole at every group; the `stop`-th is interrupted."""
    rows, groups = record(folder) if (folder / "paths.csv").exists() else [], []

    def score(choices: list[Choice]) -> list[dict[str, float]]:
        assert choices == sorted(set(choices)) and (not rows or record(folder) == rows)
        groups.append(choices)
        if len(groups) == stop:
            raise KeyboardInterrupt
        return [made_up(choice) for choice in choices]

    folder.mkdir(exist_ok=True)
    flags = f"--num_paths 12 --population 6 --parents 3 {flags}"
    args = random_search.build_parser().parse_args(flags.split())
    with patch.object(random_search, "GROUP", 4):
        random_search.search(SimpleNamespace(score=score), space, args, folder / "paths.csv", rows)
    assert record(folder) == rows
    return rows


def test_a_continued_search_ends_with_the_same_table(space, tmp_path):
    """Interrupted in any of its groups, or first asked for fewer generations or paths
    (BayesWatch/nas-without-training#4); another seed draws others."""
    flags = "--generations 2"
    whole = searched(space, tmp_path / "whole", flags)
    assert Counter(row.generation for row in whole) == {BASELINE: 4, 0: 12, 1: 6, 2: 6}
    for stop in range(1, 9):
        with pytest.raises(KeyboardInterrupt):
            searched(space, tmp_path / f"{stop}", flags, stop)
        assert searched(space, tmp_path / f"{stop}", flags) == whole
    for fewer in ("--num_paths 7", "", "--generations 1", flags):
        rows = searched(space, tmp_path / "less", fewer)
        assert rows == [row for row in whole if row in rows]
    assert rows == whole
    assert searched(space, tmp_path / "seed", "--seed 1")[4:] != whole[4:16]


@pytest.mark.parametrize(("paths", "ranks", "groups"), [(13, 1, 5), (13, 3, 6), (3, 8, 7)])
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


def test_children_are_new_and_bred_from_the_best(space, tmp_path):
    """The best of evolution's own: the first random draws and all generations before, never the
    other draws or the baselines (CanyonWind/Single-Path-One-Shot-NAS-MXNet#5)."""
    with patch.object(random_search, "breed", wraps=random_search.breed) as breed:
        rows = searched(space, tmp_path, "--generations 2")
    assert len({row.choice for row in rows}) == len(rows)
    numbers = [(row.generation, row.index) for row in rows[16:]]
    assert numbers == list(itertools.product((1, 2), range(6)))
    first, children = rows[4:10], rows[16:22]
    for call, own in zip(breed.mock_calls, (first, first + children), strict=True):
        best = sorted(own, key=lambda row: row.loss)[:3]
        assert call.args[1] == [row.choice for row in best]


def test_flops_limits_are_met_or_refused(quick, search, space, tmp_path):
    """Too low a limit is refused at once, with the extremes of the space (open-mmlab/mmrazor#183);
    where few architectures are left, evolution ends and says so."""
    shared, layers = space.costs
    least = shared + sum(min(layer.values()) for layer in layers)
    with pytest.raises(UserError, match=f"the space goes from {least / 1e6} to"):
        search_in(tmp_path, search, "--max_flops 1")
    assert not files(tmp_path)
    extra = {cost - min(layer.values()) for layer in layers for cost in layer.values()}
    _, cheapest, second, *_ = sorted(extra)
    limit = least + min(2 * cheapest, second)  # 36 architectures cost no more
    flags = f"--max_flops {limit / 1e6} --num_paths 500 --generations 9 --population 6 --parents 3"
    search_in(tmp_path, search, flags)
    rows, log = record(tmp_path), (tmp_path / "log.txt").read_text()
    assert all(space.flops(row.choice) <= limit for row in rows[4:])
    assert sum(row.generation == 0 for row in rows) == 36
    assert "there are only 36 such architectures" in log
    own = {row.choice for row in rows[4:10] + rows[40:]}
    singles = {row.choice for row in rows[:4] if space.flops(row.choice) <= limit}
    left = 36 - len(own | singles)
    assert left < 6
    assert f"before generation {rows[-1].generation + 1}: {left} architectures are left" in log
