"""Several ranks under torchrun, on CPUs: the results of one process, or an error that ends all."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import data.datasets
import data.loaders
import random_search
import supernet
from conftest import ROOT, TIMEOUT, TINY, assert_same_record, noise, start
from data.datasets import ImageData, Split, load_dataset
from data.loaders import Batches
from data.records import load_checkpoint
from model import SearchSpace
from utils import UserError, named_rng, read_json

CPU = torch.device("cpu")
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


def on_two_ranks(*command, **environment):
    """The standard output of a command that must succeed."""
    process = start(*TORCHRUN, *command, **environment)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    return out


def train(cifar, folder, *flags):
    """Two ranks, which share no folder but the data set's: their output and both weights."""
    environment = {"CIFAR10": json.dumps(cifar.attributes), "PYTHONPATH": str(ROOT)}
    out = on_two_ranks("tests/on_ranks.py", *flags, FOLDER=str(folder), **environment)
    return out, [torch.load(folder / rank / "weights.pth") for rank in "01"]


@pytest.fixture(scope="module")
def trained(tiny_cifar, tmp_path_factory):
    """Three steps of two ranks on the tiny CIFAR-10, which is only an archive at first."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_cifar.install(folder, archive=True, folder=False)
    for rank in "01":
        (folder / rank).mkdir()
    flags = f"--data_dir {folder} --exp_name two --epochs 1 --batch_size 60".split()
    out, left = train(tiny_cifar, folder, *flags)
    last, args = folder / "0/runs/two/last.pth", supernet.parse_args(flags)[0]
    return SimpleNamespace(folder=folder, last=last, flags=flags, args=args, out=out, left=left)


def test_two_ranks_train_with_the_mean_of_the_halves_gradients(trained, cifar):
    """One path a step, BatchNorm by halves (pytorch/pytorch#90171, pytorch/pytorch#69031)."""
    args, dataset = trained.args, load_dataset("cifar10", str(trained.folder), 32)
    model = supernet.build_model(dataset, args, None)
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, rng = supernet.build_optimizer(model, args, None), named_rng(0, "train 0")
    idle = set(dict(model.named_parameters()))
    for step, (x, y) in enumerate(Batches(dataset, dataset.train, 60, CPU).epoch(0, 0)):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / 3)
        choice, gradients = SearchSpace(model).sample(rng), []
        for half in range(2):
            model.zero_grad()
            F.cross_entropy(model(x[half::2], choice), y[half::2]).backward()
            gradients.append([p.grad for p in model.parameters()])
        for parameter, first, second in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = None if first is None else (first + second) / 2
        optimizer.step()
        idle -= {name for name, p in model.named_parameters() if p.grad is not None}
    assert_close(*trained.left, rtol=0, atol=0)
    weights = trained.left[0]
    for name, parameter in model.named_parameters():
        assert_close(weights[name], parameter.detach(), rtol=0, atol=1e-6)
    assert idle and all(torch.equal(weights[name], begun[name]) for name in idle)


def test_rank_zero_writes_the_checkpoint_and_decides_which_one_there_is(trained, tiny_cifar):
    """One log, no prefix in the weights' names, no file of rank 1 (pytorch/tutorials#3065,
    microsoft/nni#2958, huggingface/transformers#28270, mosaicml/composer#2054)."""
    for log in (trained.out, trained.last.with_name("log.txt").read_text()):
        assert log.count("epoch 1/1") == log.count("network") == 1
    checkpoint = load_checkpoint(trained.last)
    assert_close(checkpoint["model"], dict(trained.left[0]), rtol=0, atol=0)
    checkpoint["args"]["epochs"] = 2
    torch.save(checkpoint, trained.last)
    out, left = train(tiny_cifar, trained.folder, *trained.flags, "--epochs", "2", "--resume")
    assert "resuming after epoch 1" in out and out.count("epoch 2/2") == 1
    assert_close(*left, rtol=0, atol=0)
    assert load_checkpoint(trained.last)["epoch"] == 2 and not (trained.folder / "1/runs").exists()


def test_two_ranks_count_the_same_accuracy_as_one_process(trained, cifar, monkeypatch):
    """With the weights of their checkpoint, in batches as small as in on_ranks.py."""
    monkeypatch.setattr(supernet, "EVALUATION_BATCH", 6)
    dataset = load_dataset("cifar10", str(trained.folder), 32)
    checkpoint = load_checkpoint(trained.last)
    model = supernet.build_model(dataset, trained.args, checkpoint)
    batches = supernet.load_batches(dataset, trained.args, CPU)["search"]
    space, rng = SearchSpace(model), named_rng(0, "validation")
    paths = [space.sample(rng) for _ in range(len(batches))]
    alone = supernet.evaluate(model, batches, paths, batch_statistics=True)
    both = [checkpoint["metrics"][-1][name] for name in ("val_acc", "val_loss")]
    assert both == pytest.approx([alone["top1"], alone["loss"]], rel=1e-5)


def batches_of(rank: int, ranks: int, monkeypatch) -> Batches:
    """47 images in batches of 6, as a rank sees them."""
    monkeypatch.setattr(data.loaders, "rank", lambda: rank)
    monkeypatch.setattr(data.loaders, "world_size", lambda: ranks)
    split, names = Split(torch.from_numpy(noise(47, 3, 8, 8)), torch.arange(47)), ["a"] * 47
    dataset = ImageData("cifar10", 8, names, (0.5,) * 3, (0.2,) * 3, split, split, split)
    return Batches(dataset, split, 6, CPU)


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_the_ranks_validate_on_every_image_once(monkeypatch, ranks):
    """Augmented images are the same for any number of ranks."""
    whole, labels = list(batches_of(0, 1, monkeypatch).augmented(3)), []
    for rank in range(ranks):
        batches = batches_of(rank, ranks, monkeypatch)
        pairs = zip(batches.for_this_rank(), batches.augmented(3).for_this_rank(), strict=True)
        for (number, (_, y)), (same_number, augmented) in pairs:
            assert number == same_number and torch.equal(y, augmented[1])
            assert_close(augmented, whole[number], rtol=0, atol=0)
            labels += y.tolist()
    assert sorted(labels) == list(range(47))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_share_each_batch_of_an_epoch(monkeypatch, ranks):
    """Images are augmented as by one rank (pytorch/pytorch#31771)."""
    alone = list(batches_of(0, 1, monkeypatch).epoch(0, 1, 3))
    for rank in range(ranks):
        share = batches_of(rank, ranks, monkeypatch).epoch(0, 1, 3)
        for (x, y), part in zip(alone, share, strict=True):
            assert_close(part, (x[rank::ranks], y[rank::ranks]), rtol=0, atol=0)


def test_two_ranks_search_as_one_does(search, tmp_path):
    one, two = shutil.copytree(search.folder, tmp_path / "one"), tmp_path / "two"
    flags = [*search.flags, *"--generations 1 --population 4 --parents 2 --search_dir".split()]
    random_search.main([*flags, str(one)])
    assert on_two_ranks("random_search.py", *flags, two).count("choice  ") == 1
    assert_same_record(two, one)
    assert read_json(one / "search.json")["choice"] == read_json(two / "search.json")["choice"]


def test_a_batch_that_the_ranks_cannot_share_is_refused_in_one_line(tmp_path):
    process = start(*TORCHRUN, "supernet.py", *TINY, "--batch_size", "33", "--out_dir", tmp_path)
    err = process.communicate(timeout=TIMEOUT)[1]
    (line,) = {line for line in err.splitlines() if line.startswith("error: ")}
    assert process.returncode == 1
    assert "--batch_size 33" in line and "multiple of the 2 ranks" in line


def test_ranks_with_other_data_are_refused(monkeypatch):
    metadata = load_dataset("digits", "", 8).metadata() | {"classes": ["a", "b"]}
    monkeypatch.setattr(data.datasets, "on_rank_zero", lambda make: metadata)
    with pytest.raises(UserError, match="the data of rank 0 has classes"):
        load_dataset("digits", "", 8)
