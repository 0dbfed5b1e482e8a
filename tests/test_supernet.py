"""supernet.py: training, its files, --resume, validation, one architecture alone, and flags."""

import copy
import json
import math
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import random_search
import supernet
from blocks import CANDIDATES
from conftest import TINY
from data.datasets import load_dataset
from data.loaders import Batches
from data.records import load_checkpoint, read_metrics
from model import SPACES, SearchSpace, Supernet
from utils import UserError, named_rng, pick_precision, read_json

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


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.csv without their times."""
    return [row | {"seconds": 0} for row in read_metrics(folder / "metrics.csv")]


def interrupt(losses: list[torch.Tensor], epoch: int) -> None:
    """Replaces supernet.check_finite: a Ctrl-C in the second epoch."""
    if epoch == 1:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def alone(search, tmp_path_factory):
    """The choice of the search, trained alone, interrupted in its second epoch and resumed."""
    folder, choice = tmp_path_factory.mktemp("runs") / "alone", search.folder / "search.json"
    evaluate, flags = Mock(wraps=supernet.evaluate), "--batch_size 128 --epochs 2".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supernet, "evaluate", evaluate)
        with patch.context() as stop, pytest.raises(KeyboardInterrupt):
            stop.setattr(supernet, "check_finite", interrupt)
            supernet.main(["--choice", str(choice), *flags, *resume(folder)])
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


# Files


def test_a_run_writes_its_files(run):
    names = {path.name for path in run.folder.glob("[!.]*")}
    assert names == {"args.json", "log.txt", "metrics.csv", "last.pth", "training.png"}
    rows, args = metrics(run.folder), read_json(run.folder / "args.json")
    assert list(rows[0]) == "epoch lr train_loss train_acc val_loss val_acc seconds".split()
    assert [(row["epoch"], row["lr"]) for row in rows] == [(1, 0.1), (2, 0.05)]
    assert (args["dataset"], args["precision"], args["init"]) == ("digits", "fp32", "identity")
    log = (run.folder / "log.txt").read_text()
    assert "random paths" in log and "device    cpu" in log and "graphs    not used" in log
    (command,) = [shlex.split(line)[1:] for line in log.splitlines() if line.startswith("next: ")]
    assert command[:2] == ["python", "random_search.py"]
    parsed = random_search.build_parser().parse_args(command[2:])
    assert parsed.ckpt == str(run.folder / "last.pth")


def test_the_checkpoint_is_plain_data(run):
    """No objects, no counters (facebookresearch/fvcore#154, Lyken17/pytorch-OpCounter#82)."""
    content = torch.load(run.folder / "last.pth", weights_only=True)
    assert (content["epoch"], content["args"]["epochs"]) == (2, 2)
    assert content["data"]["name"] == "digits"
    assert content["args"]["space_layout"] == asdict(SPACES["spos_small"])
    assert content["model"].keys() == Supernet(10, 8).state_dict().keys()
    assert not any("total_" in key or key.startswith("module.") for key in content["model"])


def test_an_old_run_is_not_overwritten_unless_asked(run, tmp_path):
    """--overwrite deletes the run's own files and nothing else (LibreYOLO/libreyolo#833)."""
    folder = Path(shutil.copytree(run.folder, tmp_path / "net"))
    (folder / "search").mkdir()
    others = [folder / "notes.md", folder / "search/paths.csv"]
    for file in others:
        file.write_text("mine")
    before = (folder / "last.pth").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        train(tmp_path)
    assert (folder / "last.pth").read_bytes() == before
    train(tmp_path, "--overwrite", "--no_cuda_graphs")
    assert len(metrics(folder)) == 1
    assert [file.read_text() for file in others] == ["mine", "mine"]
    args, checkpoint = supernet.parse_args(resume(folder))  # both flags were for that command only
    assert checkpoint["epoch"] == 1 and not args.overwrite and not args.no_cuda_graphs


def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """In the second epoch (zylo117/Yet-Another-EfficientDet-Pytorch#101)."""
    original, saves = Path.write_bytes, []

    def write(path, content):
        saves.append(path)
        original(path, content[:1000] if len(saves) == 2 else content)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "--epochs", "2")
    assert load_checkpoint(tmp_path / "net/last.pth")["epoch"] == 1


# Continuing


def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path, monkeypatch):
    """In weights, momentum and metrics (ultralytics/yolov5#292, pytorch/ignite#2076)."""
    folder = tmp_path / "net"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supernet, "check_finite", interrupt)
        train(tmp_path, "--epochs", "2")
    assert len(metrics(folder)) == 1
    supernet.main([*resume(folder), "--workers", "0"])
    assert metrics(run.folder) == metrics(folder)
    first, second = (load_checkpoint(f / "last.pth") for f in (run.folder, folder))
    assert same(first["model"], second["model"])
    first, second = first["optimizer"]["state"], second["optimizer"]["state"]
    assert first.keys() == second.keys() and all(same(first[i], second[i]) for i in first)


def test_a_complete_run_is_left_alone(run, capsys):
    """--resume trains no further epoch (sparticlesteve/cosmoflow-benchmark#48)."""
    before = (run.folder / "last.pth").read_bytes()
    supernet.main([*run.flags, "--resume"])
    said = capsys.readouterr().out
    assert "resuming after epoch 2" in said and "epoch 3" not in said
    assert (run.folder / "last.pth").read_bytes() == before


def test_a_continuation_takes_the_runs_settings_but_may_work_in_another_way(run):
    args, checkpoint = supernet.parse_args(resume(run.folder))
    assert (args.dataset, args.batch_size, args.image_size, args.epochs) == ("digits", 128, 8, 2)
    flags = "--data_dir /there --device cuda --workers 7 --val_interval 3 --no_cuda_graphs".split()
    changed = {"data_dir": "/there", "device": "cuda", "workers": 7, "val_interval": 3}
    changed["no_cuda_graphs"] = True
    assert checkpoint["epoch"] == 2 and not vars(args).items() & changed.items()
    assert vars(supernet.parse_args([*resume(run.folder), *flags])[0]) == vars(args) | changed


def test_without_a_checkpoint_a_continuation_starts_and_says_so(alone):
    log = (alone.folder / "log.txt").read_text()
    texts = "no checkpoint: a new run", "epoch 1/2", "resuming after epoch 1"
    places = [log.index(text) for text in texts]
    assert places == sorted(places)


# Learning


def test_initial_weights_and_precision_are_those_asked_for_and_recorded(tmp_path):
    """With a rate that moves nothing; bf16 training keeps its weights in fp32."""
    flags = "--init official --precision bf16 --learning_rate 1e-20".split()
    folder = train(tmp_path, *flags)
    torch.manual_seed(0)
    begun, trained = Supernet(10, 8, init="official"), weights(folder)
    assert all(torch.equal(trained[name], value) for name, value in begun.named_parameters())
    assert {v.dtype for v in trained.values() if v.is_floating_point()} == {torch.float32}
    for more in ([], ["--precision", "bf16"]):
        args, _ = supernet.parse_args([*resume(folder), *more])
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
    assert not same(weights(run.folder), weights(folder))


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
    checkpoint = load_checkpoint(tmp_path / "net/last.pth")
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


HARDWARE = [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp32")]


@pytest.mark.parametrize(("device", "native", "expected"), HARDWARE)
def test_auto_is_bf16_where_cuda_has_it(monkeypatch, device, native, expected):
    def supported(including_emulation):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    for name, precision in {"auto": expected, "fp32": "fp32", "bf16": "bf16"}.items():
        assert pick_precision(name, torch.device(device)) == precision


# Validation


@pytest.mark.parametrize(("size", "own"), [(250, True), (7, True), (1, True), (7, False)])
def test_validation_uses_each_batchs_statistics_or_the_running_ones(run, size, own):
    """Also of a single image; no buffer changes, and all but BatchNorm is in eval mode.

    A block in training mode might replay the CUDA graph of a training step.
    """
    model, dataset, modes = Supernet(10, 8), load_dataset("digits", "", 8), set()
    model.load_state_dict(weights(run.folder))
    batches = Batches(dataset, dataset.search.subset(range(50)), size, CPU)
    space, rng, before = SearchSpace(model), named_rng(0, "any"), copy.deepcopy(model.state_dict())
    paths = [space.sample(rng) for _ in range(len(batches))]
    reference = copy.deepcopy(model).train(own)
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, _: modes.add((type(m).__name__, m.training)))
    measured = supernet.evaluate(model, batches, paths, own)
    assert same(before, model.state_dict())
    assert all(training == (own and name == "BatchNorm") for name, training in modes)
    assert {"ShuffleBlock", "BatchNorm"} <= {name for name, _ in modes}
    with torch.no_grad():
        logits = [reference(x, path) for (x, _), path in zip(batches, paths, strict=True)]
    logits, labels = torch.cat(logits), batches.labels
    accuracy = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert measured["top1"] == pytest.approx(accuracy)
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    model.train()(torch.ones(2, 3, 8, 8), paths[0])  # training still updates the buffers
    assert not torch.equal(before["stem.1.running_var"], model.stem[1].running_var)


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
    assert same(weights(run.folder), weights(folder)) and metrics(run.folder) == metrics(folder)


# One architecture alone


def test_one_architecture_trains_by_the_same_loop_and_is_tested_once(alone):
    found, args = alone.found, read_json(alone.folder / "args.json")
    result, choice = read_json(alone.folder / "result.json"), found["choice"]
    assert (args["dataset"], args["image_size"], args["choice"]) == ("digits", 8, choice)
    assert (result["choice"], result["supernet_accuracy"]) == (choice, found["accuracy"])
    share = result["test_accuracy"] / 100
    assert result["standard_error"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 300))
    assert result["params_m"] == pytest.approx(found["params_m"])
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
    test = load_dataset("digits", "", 8).test
    torch.save(test.images, tmp_path / "images.pt")
    command = [sys.executable, "-c", LOAD, alone.folder / "model.pt2"]
    subprocess.run(command, cwd=tmp_path, check=True)
    checkpoint = load_checkpoint(alone.folder / "last.pth")
    choice = [int(number) for number in alone.found["choice"].split("-")]
    model = Supernet(10, 8, affine=True, choice=choice)
    model.load_state_dict(checkpoint["model"])
    mean, std = (torch.tensor(checkpoint["data"][name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = model.eval()((test.images / 255 - mean) / std, choice)
    for logits in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(logits, expected[: len(logits)], rtol=1e-4, atol=1e-5)
    accuracy = 100 * (expected.argmax(1) == test.labels).float().mean().item()
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


# Flags

PRESETS = [
    ("", "epochs=600 batch_size=96 learning_rate=0.1 weight_decay=0.0003 cutout=0"),
    ("", "image_size=32 init=identity momentum=0.9 lr_schedule=linear"),
    ("--choice ZEROS", "epochs=600 cutout=16"),
    ("--choice ZEROS --dataset folder --image_size 8", "cutout=4"),
    ("--choice ZEROS --init_from last.pth", "init=None learning_rate=0.1"),
    ("--choice ZEROS --cutout 0 --weight-decay 0.5", "cutout=0 weight_decay=0.5"),
    ("--init official", "learning_rate=0.025"),
    ("--init official --learning_rate 0.2", "learning_rate=0.2"),
    ("--dataset folder --image_size 64", "learning_rate=0.1 init=identity"),
    ("--dataset folder --image_size 72", "learning_rate=0.025 init=official cutout=0"),
    ("--dataset folder --image_size 72 --init identity", "learning_rate=0.1"),
    ("--dataset folder --image_size 72 --choice ZEROS", "cutout=36"),
    ("--dataset imagenet", "epochs=120 batch_size=1024 label_smoothing=0.1 image_size=224"),
    ("--dataset imagenet --choice ZEROS", "epochs=240 weight_decay=4e-05 cutout=0"),
    ("--dataset imagenet --epochs 3", "epochs=3 learning_rate=0.5 cutout=0"),
    ("--dataset digits --choice ZEROS", "epochs=10 momentum=0.8 image_size=16 cutout=0"),
    ("--dataset digits --init official", "learning_rate=0.1"),
]


@pytest.mark.parametrize(("flags", "expected"), PRESETS)
def test_presets_suit_the_data_and_flags_win(flags, expected):
    """No hole of Cutout is as large as the image (albumentations-team/albumentations#420)."""
    args, _ = supernet.parse_args(flags.replace("ZEROS", ZEROS).split())
    for setting in expected.split():
        name, value = setting.split("=")
        assert str(vars(args)[name]) == value


FOUND = {"choice": ZEROS, "accuracy": 50.0, "space": "spos_small"}
FOUND["space_layout"] = asdict(SPACES["spos_small"])
FOUND |= {"dataset": "folder", "image_size": 48, "data_dir": "/pictures"}
WITH_FOUND = [
    ("", ("folder", 48, "/pictures", 24)),
    ("--image_size 64 --dataset folder", ("folder", 64, "/pictures", 32)),
    ("--data_dir ~/here", ("folder", 48, "HOME/here", 24)),
    ("--dataset digits --image_size 24 --data_dir /there", ("digits", 24, "/there", 0)),
]


@pytest.mark.parametrize(("flags", "expected"), WITH_FOUND)
def test_a_search_brings_its_data_along_and_flags_win(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "search.json").write_text(json.dumps(FOUND))
    args, _ = supernet.parse_args(["--choice", "~/search.json", *flags.split()])
    assert (args.choice, args.supernet_accuracy) == (ZEROS, 50)
    data_dir = args.data_dir.replace(str(tmp_path), "HOME")
    assert (args.dataset, args.image_size, data_dir, args.cutout) == expected


WRONG_CHOICES = {
    "no/such/search.json": "a choice like 1-0-3",
    "1-2-3": "20 numbers",
    "-".join("4" * 20): "layer 0 has no candidate 4",
    "0-" * 1000 + "0": "20 numbers",  # too long for a file name (Aider-AI/aider#4145)
    "log.txt": "is not valid JSON",
    "args.json": "no search.json: it lacks 'accuracy'",
    ZEROS: "layer 4 has no candidate 0",
}


@pytest.mark.parametrize(("choice", "message"), WRONG_CHOICES.items())
def test_a_wrong_choice_is_refused(run, tmp_path, monkeypatch, choice, message):
    """In a folder with files of a run, and with shuffle3 offered at stride 1 only."""
    monkeypatch.chdir(run.folder)
    offered = CANDIDATES["shuffle3"]

    def at_stride_1(*shape):
        return offered(*shape) if shape[2] == 1 else None

    monkeypatch.setitem(CANDIDATES, "shuffle3", at_stride_1)
    with pytest.raises(UserError, match=message):
        train(tmp_path, "--choice", choice)


WRONG = """--epochs 99999999999; --batch_size 0; --learning_rate -1; --weight_decay -0.1; --epo 3;
--cutout 32; --seed -1; --seed 4294967296; --seed abc; --workers -1; --resume False; --init zero;
--resume --overwrite; --train_on all; --init_from last.pth; --image_size 64; --dataset mnist;
--init_from last.pth --init official --choice ZEROS; --local-rank=0; --choice=; --data_dir=;
--init_from= --choice ZEROS; --exp_name="""


@pytest.mark.parametrize("flags", WRONG.split(";"))
def test_wrong_usage_exits_with_2_before_any_work(flags, tmp_path, monkeypatch):
    """(ACEsuit/mace#429, mllam/neural-lam#234, RasmussenLab/vamb#425, bghira/SimpleTuner#97)"""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        supernet.main(flags.replace("ZEROS", ZEROS).split())
    assert exit.value.code == 2 and not list(tmp_path.iterdir())
