"""Several ranks under torchrun, on CPUs: the results of one process, or an error that ends all."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from on_ranks import EVALUATION_BATCH

import data.datasets
import data.loaders
import random_search
import supernet
from conftest import ROOT, TIMEOUT, TINY, assert_same_record, noise, start
from data.datasets import ImageData, Split, load_dataset
from data.loaders import Batches
from data.records import load_checkpoint
from model import SearchSpace, Supernet
from utils import UserError, named_rng, read_json

CPU = torch.device("cpu")
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


@pytest.fixture(scope="module")
def trained(tiny_cifar, tmp_path_factory):
    """Three steps of two ranks on the tiny CIFAR-10, which is only an archive at first."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_cifar.install(folder, archive=True, folder=False)
    flags = f"--data_dir {folder} --out_dir {folder} --exp_name two --epochs 1 --batch_size 60"
    environment = {"LEFT": str(folder), "CIFAR10": json.dumps(tiny_cifar.attributes)}
    process = start(*TORCHRUN, "tests/on_ranks.py", *flags.split(), **environment)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    left = [torch.load(folder / f"{rank}.pth") for rank in range(2)]
    return SimpleNamespace(folder=folder, flags=flags.split(), out=out, left=left)


def test_two_ranks_train_with_the_mean_of_the_halves_gradients(trained, cifar):
    """One path a step, BatchNorm by halves (pytorch/pytorch#90171, pytorch/pytorch#69031)."""
    args, _ = supernet.parse_args(trained.flags)
    dataset = load_dataset("cifar10", args.data_dir, 32)
    model = supernet.build_model(dataset, args, None)
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, rng = supernet.build_optimizer(model, args, None), named_rng(0, "train 0")
    parameters = dict(model.named_parameters())
    idle = set(parameters)
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
        on_path = [name for name, parameter in parameters.items() if parameter.grad is not None]
        idle.difference_update(on_path)
    first, second = (left["weights"] for left in trained.left)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(first[name], parameter.detach(), rtol=0, atol=1e-6)
    assert idle and all(torch.equal(first[name], begun[name]) for name in idle)
    assert trained.left[0]["moved"] == trained.left[1]["moved"] == on_path


def test_one_rank_writes_a_checkpoint_for_any_number_of_ranks(trained, cifar):
    """One log, no prefix in the weights' names (pytorch/tutorials#3065, microsoft/nni#2958)."""
    assert trained.out.count("epoch 1/1") == trained.out.count("network") == 1
    assert (trained.folder / "two/log.txt").read_text().count("epoch 1/1") == 1
    path = trained.folder / "two/last.pth"
    checkpoint = load_checkpoint(path)
    assert checkpoint["model"].keys() == Supernet(10, 32).state_dict().keys()
    for name, value in checkpoint["model"].items():
        assert torch.equal(value, trained.left[0]["weights"][name])
    checkpoint["args"]["epochs"] = 2
    torch.save(checkpoint, path)
    supernet.main([*trained.flags, "--epochs", "2", "--resume"])
    assert load_checkpoint(path)["epoch"] == 2


def test_two_ranks_count_the_same_accuracy_as_one_process(trained, cifar, monkeypatch):
    monkeypatch.setattr(supernet, "EVALUATION_BATCH", EVALUATION_BATCH)
    row = load_checkpoint(trained.folder / "two/last.pth")["metrics"][0]
    dataset, model = load_dataset("cifar10", str(trained.folder), 32), Supernet(10, 32)
    model.load_state_dict(trained.left[0]["weights"])
    batches = supernet.load_batches(dataset, supernet.parse_args(trained.flags)[0], CPU)["search"]
    space, rng = SearchSpace(model), named_rng(0, "validation")
    paths = [space.sample(rng) for _ in range(len(batches))]
    alone = supernet.evaluate(model, batches, paths, batch_statistics=True)
    assert len(paths) > 2 and row["val_acc"] == pytest.approx(alone["top1"])
    assert row["val_loss"] == pytest.approx(alone["loss"], rel=1e-5)


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
        for (number, (plain, y)), (same_number, (augmented, same_y)) in pairs:
            assert number == same_number and torch.equal(y, same_y)
            torch.testing.assert_close((augmented, y), whole[number], rtol=0, atol=0)
            assert not torch.equal(augmented, plain)
            labels += y.tolist()
    assert sorted(labels) == list(range(47))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_share_each_batch_of_an_epoch(monkeypatch, ranks):
    """Images are augmented as by one rank; each epoch has its own order (pytorch/pytorch#31771)."""
    orders = []
    for epoch in range(2):
        alone = list(batches_of(0, 1, monkeypatch).epoch(0, epoch, 3))
        for rank in range(ranks):
            share = batches_of(rank, ranks, monkeypatch).epoch(0, epoch, 3)
            for (x, y), part in zip(alone, share, strict=True):
                expected = x[rank::ranks], y[rank::ranks]
                torch.testing.assert_close(part, expected, rtol=0, atol=0)
        orders.append(torch.cat([y for _, y in alone]))
    assert not torch.equal(*orders)


def test_two_ranks_search_as_one_does(search, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*search.flags, *"--generations 1 --population 4 --parents 2 --search_dir".split()]
    shutil.copytree(search.folder, one)
    random_search.main([*flags, str(one)])
    process = start(*TORCHRUN, "random_search.py", *flags, two)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert out.count("choice  ") == 1
    assert_same_record(two, one)
    found = [read_json(folder / "search.json") for folder in (one, two)]
    tops = [[(row["choice"], row["test_accuracy"]) for row in result["top"]] for result in found]
    assert found[0]["choice"] == found[1]["choice"] and tops[0] == tops[1]


def test_a_batch_that_the_ranks_cannot_share_is_refused_in_one_line(tmp_path):
    process = start(*TORCHRUN, "supernet.py", *TINY, "--batch_size", "33", "--out_dir", tmp_path)
    err = process.communicate(timeout=TIMEOUT)[1]
    (line,) = {line for line in err.splitlines() if line.startswith("error: ")}
    assert process.returncode == 1
    assert "--batch_size 33" in line and "multiple of the 2 ranks" in line


def test_a_rank_that_dies_ends_the_job_and_leaves_no_process_behind(tmp_path):
    process = start(*TORCHRUN, "supernet.py", *TINY, "--epochs", "1000", "--out_dir", tmp_path)
    log = tmp_path / "spos_cifar10/log.txt"
    while process.poll() is None and not (log.exists() and "epoch" in log.read_text()):
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1 and len(children) == 2
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_rank_zero_decides_which_checkpoint_there_is(tmp_path):
    """Without shared folders too (huggingface/transformers#28270, mosaicml/composer#2054)."""
    (tmp_path / "own.py").write_text(f"""import os, shutil, sys
sys.path.insert(0, {str(ROOT)!r})
folder = os.path.join(os.environ["OWN"], os.environ["RANK"])
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
import supernet, utils
from data import records
save = records.save_checkpoint
def keep(path, content):
    save(path, content)
    shutil.copy(path, f"{{content['epoch']}}.pth")
records.save_checkpoint = keep
utils.run_script(supernet.main)
""")

    def train(*flags):
        process = start(
            *TORCHRUN, tmp_path / "own.py", *TINY, "--epochs", "2", *flags, OWN=str(tmp_path)
        )
        err = process.communicate(timeout=TIMEOUT)[1]
        assert process.returncode == 0, err
        return load_checkpoint(tmp_path / "0/runs/spos_cifar10/last.pth")

    whole = train()
    shutil.copy(tmp_path / "0/1.pth", tmp_path / "0/runs/spos_cifar10/last.pth")
    again = train("--resume")
    assert all(torch.equal(value, again["model"][name]) for name, value in whole["model"].items())
    assert not (tmp_path / "1/runs").exists()


def test_ranks_with_other_data_are_refused(monkeypatch):
    metadata = load_dataset("digits", "", 8).metadata() | {"classes": ["a", "b"]}
    monkeypatch.setattr(data.datasets, "on_rank_zero", lambda make: metadata)
    with pytest.raises(UserError, match="the data of rank 0 has classes"):
        load_dataset("digits", "", 8)
