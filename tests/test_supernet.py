"""supernet.py: training, its files, --resume, validation, one architecture alone, and flags."""

import copy
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import supernet
from conftest import TINY
from data.datasets import load_dataset
from data.loaders import Batches
from data.records import load_checkpoint, parse_choice, read_metrics
from model import SearchSpace, Supernet
from utils import UserError, named_rng, pick_precision, read_json, write_json

CPU = torch.device("cpu")
ZEROS = "-".join("0" * 20)


def train(folder: Path, *flags: str) -> Path:
    """Trains on tiny digits, one epoch unless the flags say otherwise; returns the run's folder."""
    supernet.main([*TINY, "--out_dir", str(folder), "--exp_name", "net", "--epochs", "1", *flags])
    return folder / "net"


def resume(folder: Path) -> list[str]:
    """All flags that a continuation needs."""
    return ["--out_dir", str(folder.parent), "--exp_name", folder.name, "--resume"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "last.pth")["model"]


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.csv without their times."""
    return [row | {"seconds": 0} for row in read_metrics(folder / "metrics.csv")]


def interrupt(flags: list[str]) -> None:
    """Trains until a Ctrl-C in the second epoch."""
    stopped = patch.object(supernet, "check_finite", side_effect=[None, KeyboardInterrupt])
    with stopped, pytest.raises(KeyboardInterrupt):
        supernet.main(flags)


@pytest.fixture(scope="module")
def alone(search, tmp_path_factory):
    """The choice of the search, trained alone, interrupted in its second epoch and resumed."""
    folder, choice = tmp_path_factory.mktemp("runs") / "alone", search.folder / "search.json"
    flags = ["--choice", str(choice), "--batch_size", "128", "--epochs", "2"]
    with patch.object(supernet, "evaluate", wraps=supernet.evaluate) as evaluate:
        interrupt([*flags, *resume(folder)])
        supernet.main(resume(folder))
    validated = [call.args[1].labels for call in evaluate.call_args_list]
    return SimpleNamespace(folder=folder, validated=validated, found=read_json(choice))


@pytest.fixture
def rates(monkeypatch):
    """A list that receives the learning rates of the parameter groups at every step."""
    step, rates = torch.optim.SGD.step, []

    def recorded_step(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded_step)
    return rates


def test_a_run_writes_its_files(run):
    """No counters among weights (facebookresearch/fvcore#154, Lyken17/pytorch-OpCounter#82)."""
    names = {path.name for path in run.folder.glob("[!.]*")}
    assert names == {"args.json", "log.txt", "metrics.csv", "last.pth", "training.png"}
    rows, args = metrics(run.folder), read_json(run.folder / "args.json")
    assert [(row["epoch"], row["lr"]) for row in rows] == [(1, 0.1), (2, 0.05)]
    assert (args["dataset"], args["precision"], args["init"]) == ("digits", "fp32", "identity")
    log = (run.folder / "log.txt").read_text()
    assert "random paths" in log and "device    cpu" in log and "graphs    not used" in log
    assert "next: python random_search.py --ckpt" in log
    assert weights(run.folder).keys() == Supernet(10, 8).state_dict().keys()


def test_an_old_run_is_not_overwritten_unless_asked(run, tmp_path):
    """--overwrite deletes the run's own files and nothing else (LibreYOLO/libreyolo#833)."""
    folder = Path(shutil.copytree(run.folder, tmp_path / "net"))
    (folder / "search").mkdir()
    others = [folder / "notes.md", folder / "search/paths.csv"]
    for file in others:
        file.write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        train(tmp_path)
    assert (folder / "last.pth").read_bytes() == (run.folder / "last.pth").read_bytes()
    train(tmp_path, "--overwrite", "--no_cuda_graphs")
    assert len(metrics(folder)) == 1 and all(file.read_text() == "mine" for file in others)
    args, checkpoint = supernet.parse_args(resume(folder))  # both flags were for that command only
    assert checkpoint["epoch"] == 1 and not args.overwrite and not args.no_cuda_graphs


def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path):
    """Complete, it is left alone (ultralytics/yolov5#292, pytorch/ignite#2076,
    sparticlesteve/cosmoflow-benchmark#48)."""
    folder = tmp_path / "net"
    interrupt([*TINY, "--epochs", "2", *resume(folder)])
    assert len(metrics(folder)) == 1
    for _ in range(2):
        supernet.main([*resume(folder), "--workers", "0"])
    lines = "no checkpoint yet|epoch ./2|resuming after epoch ."
    told = ["no checkpoint yet", "epoch 1/2", "resuming after epoch 1", "epoch 2/2"]
    log = (folder / "log.txt").read_text()
    assert re.findall(lines, log) == [*told, "resuming after epoch 2"]
    assert metrics(run.folder) == metrics(folder)
    first, second = (load_checkpoint(f / "last.pth") for f in (run.folder, folder))
    for part in ("model", "optimizer"):
        assert_close(first[part], second[part], rtol=0, atol=0)


def test_a_continuation_takes_the_runs_settings_but_may_work_in_another_way(run):
    args, _ = supernet.parse_args(resume(run.folder))
    assert (args.dataset, args.batch_size, args.image_size, args.epochs) == ("digits", 128, 8, 2)
    changed = {"data_dir": "/there", "device": "cuda", "workers": 7, "val_interval": 3}
    flags = [f"--{name}={value}" for name, value in changed.items()]
    changed["no_cuda_graphs"] = True
    again, _ = supernet.parse_args([*resume(run.folder), *flags, "--no_cuda_graphs"])
    assert not vars(args).items() & changed.items() and vars(again) == vars(args) | changed


def test_initial_weights_and_precision_are_those_asked_for_and_recorded(tmp_path):
    """With a rate that moves nothing; bf16 training keeps its weights in fp32."""
    folder = train(tmp_path, *"--init official --precision bf16 --learning_rate 1e-20".split())
    torch.manual_seed(0)
    begun, trained = Supernet(10, 8, init="official"), weights(folder)
    assert all(torch.equal(trained[name], value) for name, value in begun.named_parameters())
    assert {v.dtype for v in trained.values() if v.is_floating_point()} == {torch.float32}
    args, _ = supernet.parse_args(resume(folder))
    assert (args.init, args.precision) == ("official", "bf16")


def test_every_step_trains_a_path_of_its_own_in_training_mode(run, tmp_path, monkeypatch):
    """Also after a validation; the seed matters (joeynmt/joeynmt#184, MichiganCOG/ViP#25)."""
    steps, original = [], Supernet.forward

    def forward(self, x, choice):
        if torch.is_grad_enabled():
            steps.append((all(module.training for module in self.modules()), tuple(choice)))
        return original(self, x, choice)

    monkeypatch.setattr(Supernet, "forward", forward)
    folder = train(tmp_path, "--epochs", "2", "--seed", "1")
    assert len(steps) == 2 * (1197 // 128) == len({choice for _, choice in steps})
    assert all(training for training, _ in steps)
    assert metrics(run.folder) != metrics(folder)


def test_the_cosine_schedule_falls_at_every_step_to_almost_zero(tmp_path, rates):
    """The linear schedule is in test_ranks.py (mlfoundations/open_clip#413)."""
    flags = "--epochs 2 --learning_rate 0.04 --lr_schedule cosine --val_interval 5".split()
    rows = metrics(train(tmp_path, *flags))
    expected = [0.04 * math.cos(math.pi * i / 36) ** 2 for i in range(18)]
    assert torch.tensor(rates).T.tolist() == [pytest.approx(expected)] * 2
    assert [row["lr"] for row in rows] == pytest.approx([expected[0], expected[9]])
    assert [row["val_acc"] is None for row in rows] == [True, False]  # the last is validated anyway


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """Epoch and step are named, and the last good checkpoint stays (Nerogar/OneTrainer#1147)."""
    original = Batches.epoch

    def spoiled(self, seed, epoch, cutout_length=0):
        for step, (x, y) in enumerate(original(self, seed, epoch, cutout_length)):
            yield (x * math.nan if (epoch, step) == (1, 4) else x), y

    monkeypatch.setattr(Batches, "epoch", spoiled)
    with pytest.raises(UserError, match=r"epoch 2, step 5"):
        train(tmp_path, "--epochs", "3")
    assert load_checkpoint(tmp_path / "net/last.pth")["epoch"] == 1


@pytest.mark.parametrize(("device", "native"), [("cpu", True), ("cuda", True), ("cuda", False)])
def test_auto_is_bf16_where_cuda_has_it(monkeypatch, device, native):
    def supported(including_emulation):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    expected = "bf16" if device == "cuda" and native else "fp32"
    assert pick_precision("auto", torch.device(device)) == expected


@pytest.mark.parametrize(("size", "own"), [(250, True), (7, True), (1, True), (7, False)])
def test_validation_uses_each_batchs_statistics_or_the_running_ones(run, size, own):
    """No buffer changes; all but BatchNorm is in eval mode, so that no CUDA graph is replayed."""
    model, dataset, modes = Supernet(10, 8), load_dataset("digits", "", 8), set()
    model.load_state_dict(weights(run.folder))
    batches = Batches(dataset, dataset.search.subset(range(50)), size, CPU)
    space, rng = SearchSpace(model), named_rng(0, "any")
    paths = [space.sample(rng) for _ in range(len(batches))]
    reference = copy.deepcopy(model).train(own)
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, _: modes.add((type(m).__name__, m.training)))
    measured = supernet.evaluate(model, batches, paths, own)
    assert_close(dict(model.state_dict()), weights(run.folder), rtol=0, atol=0)
    assert all(training == (own and name == "BatchNorm") for name, training in modes)
    assert {("ShuffleBlock", False), ("BatchNorm", own)} <= modes
    with torch.no_grad():
        logits = [reference(x, path) for (x, _), path in zip(batches, paths, strict=True)]
    logits, labels = torch.cat(logits), batches.labels
    accuracy = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert measured["top1"] == pytest.approx(accuracy)
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_validation_batches_hold_images_of_every_class():
    """Even when the images come sorted by class, as folders do."""
    dataset = load_dataset("digits", "", 8)
    dataset.search = dataset.search.subset(dataset.search.labels.argsort().tolist())
    batches = supernet.load_batches(dataset, supernet.parse_args(TINY)[0], CPU)["search"]
    assert [len(labels.unique()) for _, labels in batches] == [10, 10]


def test_test_images_change_nothing_that_is_learned(run, tmp_path, monkeypatch):
    """Training and validation are the same with other test images (kuangliu/pytorch-cifar#145)."""

    def other_test_images(*args):
        dataset = load_dataset(*args)
        dataset.test.images = 255 - dataset.test.images
        return dataset

    monkeypatch.setattr(supernet, "load_dataset", other_test_images)
    folder = train(tmp_path, "--epochs", "2")
    assert metrics(run.folder) == metrics(folder)
    assert_close(weights(run.folder), weights(folder), rtol=0, atol=0)


def test_one_architecture_trains_by_the_same_loop_and_is_tested_once(alone):
    found, args = alone.found, read_json(alone.folder / "args.json")
    result, choice = read_json(alone.folder / "result.json"), found["choice"]
    assert (args["dataset"], args["image_size"], args["choice"]) == ("digits", 8, choice)
    assert (result["choice"], result["supernet_accuracy"]) == (choice, found["accuracy"])
    share = result["test_accuracy"] / 100
    assert result["standard_error"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 300))
    state = weights(alone.folder).items()
    count = sum(v.numel() for key, v in state if "running" not in key and "num_" not in key)
    assert count == round(1e6 * result["params_m"])
    test = load_dataset("digits", "", 8).test.labels
    assert [torch.equal(labels, test) for labels in alone.validated] == [False, False, True]


LOAD = """
import sys, torch
network, images = torch.export.load(sys.argv[1]).module(), torch.load("images.pt")
torch.save([network(images[:n]) for n in (1, 7, 300)], "logits.pt")
assert "torchvision" not in sys.modules
"""


def test_a_finished_network_runs_with_torch_alone(alone, tmp_path):
    """model.pt2 takes bytes, any number of images, and needs nothing of this repository."""
    dataset = load_dataset("digits", "", 8)
    torch.save(dataset.test.images, tmp_path / "images.pt")
    command = [sys.executable, "-c", LOAD, alone.folder / "model.pt2"]
    subprocess.run(command, cwd=tmp_path, check=True)
    args, checkpoint = supernet.parse_args(resume(alone.folder))
    model = supernet.build_model(dataset, args, checkpoint).eval()
    ((images, labels),) = Batches(dataset, dataset.test, 300, CPU)
    with torch.no_grad():
        expected = model(images, parse_choice(args.choice))
    for logits in torch.load(tmp_path / "logits.pt"):
        assert_close(logits, expected[: len(logits)], rtol=1e-4, atol=1e-5)
    accuracy = 100 * (expected.argmax(1) == labels).float().mean().item()
    recorded = read_json(alone.folder / "result.json")["test_accuracy"]
    assert recorded == pytest.approx(accuracy, abs=0.5)  # one may be a tie


def test_a_network_may_start_from_its_weights_in_the_supernet(run, tmp_path):
    """With a rate that moves nothing it keeps them (ShunLu91/Single-Path-One-Shot-NAS#19)."""
    flags, last = ["--choice", ZEROS, "--learning_rate", "1e-20"], run.folder / "last.pth"
    ours = weights(train(tmp_path, *flags, "--init_from", str(last)))
    shared, content = [key for key, value in ours.items() if value.ndim > 1], load_checkpoint(last)
    assert len(shared) == 67
    assert all(torch.equal(ours[key], content["model"][key]) for key in shared)
    content["model"]["head.classifier.weight"] = torch.zeros(7, 1024)
    torch.save(content, tmp_path / "seven.pth")
    with pytest.raises(UserError, match=r"seven\.pth: .*classifier"):
        train(tmp_path, *flags, "--init_from", str(tmp_path / "seven.pth"), "--overwrite")
    assert (tmp_path / "net/result.json").exists()


def test_training_on_all_adds_the_search_split_and_validates_nothing(tmp_path, rates):
    folder = train(tmp_path, "--choice", ZEROS, "--train_on", "all")
    assert "1,497 train" in (folder / "log.txt").read_text()
    assert len(rates) == 1497 // 128 and metrics(folder)[0]["val_acc"] is None


PRESETS = [
    ("", "epochs=600 batch_size=96 learning_rate=0.1 weight_decay=0.0003 cutout=0"),
    ("", "image_size=32 init=identity momentum=0.9 lr_schedule=linear norm_weight_decay=0.0"),
    ("--choice ZEROS", "epochs=600 batch_size=96 learning_rate=0.1 cutout=16"),
    ("--choice ZEROS", "lr_schedule=cosine weight_decay=0.0005 norm_weight_decay=0.0005"),
    ("--choice ZEROS --init_from last.pth", "init=None learning_rate=0.1"),
    ("--choice ZEROS --cutout 0 --weight-decay 0.5", "cutout=0 weight_decay=0.5"),
    ("--init official", "learning_rate=0.025"),
    ("--dataset folder --image_size 64", "learning_rate=0.1 init=identity"),
    ("--dataset folder --image_size 72", "learning_rate=0.025 init=official cutout=0"),
    (
        "--dataset folder --image_size 72 --init identity --choice ZEROS",
        "learning_rate=0.1 cutout=0",
    ),
    ("--dataset imagenet", "epochs=120 batch_size=1024 learning_rate=0.5 label_smoothing=0.1"),
    ("--dataset imagenet --choice ZEROS", "epochs=240 weight_decay=4e-05 image_size=224 cutout=0"),
    ("--dataset digits --choice ZEROS", "epochs=10 momentum=0.8 image_size=16 cutout=0"),
    ("--dataset digits --choice ZEROS", "lr_schedule=linear weight_decay=0.0003"),
    ("--dataset digits --init official", "learning_rate=0.1"),
    ("--choice FOUND", "dataset=folder image_size=48 data_dir=/pictures cutout=24"),
    ("--choice FOUND --image_size 64 --data_dir /there", "image_size=64 data_dir=/there cutout=32"),
    ("--choice FOUND --dataset digits", "dataset=digits image_size=48 cutout=0"),
]


@pytest.mark.parametrize(("flags", "expected"), PRESETS)
def test_presets_suit_the_data_and_flags_win(search, tmp_path, flags, expected):
    """No hole of Cutout is as large as the image (albumentations-team/albumentations#420)."""
    found = read_json(search.folder / "search.json")
    found |= {"dataset": "folder", "image_size": 48, "data_dir": "/pictures"}
    write_json(tmp_path / "found.json", found)
    flags = flags.replace("ZEROS", ZEROS).replace("FOUND", str(tmp_path / "found.json"))
    args, _ = supernet.parse_args(flags.split())
    for setting in expected.split():
        name, value = setting.split("=")
        assert str(vars(args)[name]) == value


WRONG_CHOICES = {
    "no/such/search.json": "a choice like 1-0-3",
    "0-" * 1000 + "0": "20 numbers",  # too long for a file name (Aider-AI/aider#4145)
    "log.txt": "is not valid JSON",
    "args.json": "no search.json: it lacks 'accuracy'",
}


@pytest.mark.parametrize(("choice", "message"), WRONG_CHOICES.items())
def test_a_wrong_choice_is_refused(run, tmp_path, monkeypatch, choice, message):
    monkeypatch.chdir(run.folder)
    with pytest.raises(UserError, match=message):
        train(tmp_path, "--choice", choice)


WRONG = """--epochs 99999999999; --weight_decay -0.1; --epo 3; --cutout 32; --seed 4294967296;
--workers -1; --resume False; --resume --overwrite; --train_on all; --init_from last.pth;
--image_size 64; --init_from last.pth --init official --choice ZEROS; --local-rank=0; --choice=;
--data_dir=; --init_from= --choice ZEROS; --exp_name=; --batch_size 0; --seed -1;
--dataset folder --image_size 72 --cutout 8"""


@pytest.mark.parametrize("flags", WRONG.split(";"))
def test_wrong_usage_exits_with_2_before_any_work(flags, tmp_path, monkeypatch):
    """(ACEsuit/mace#429, mllam/neural-lam#234, RasmussenLab/vamb#425, bghira/SimpleTuner#97)"""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        supernet.main(flags.replace("ZEROS", ZEROS).split())
    assert exit.value.code == 2 and not list(tmp_path.iterdir())
