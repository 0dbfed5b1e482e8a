"""supernet.py: what it learns, what it writes, how it continues, what it refuses."""

import copy
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import random_search
import supernet
from blocks import CANDIDATES
from conftest import TINY, Run
from data.datasets import load_dataset
from data.loaders import Batches
from data.records import load_checkpoint, read_metrics
from model import SearchSpace, Supernet
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
    """Stands in for supernet.check_finite: a Ctrl-C in the second epoch."""
    if epoch == 1:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def alone(search: Run, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The choice of the search, trained alone for two epochs; interrupted in the second one and resumed."""
    folder, validated, evaluate = tmp_path_factory.mktemp("runs") / "alone", [], supernet.evaluate
    flags = ["--choice", str(search.folder / "search.json"), "--batch_size", "128", "--epochs", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            supernet,
            "evaluate",
            lambda *a, **more: validated.append(a[1].labels) or evaluate(*a, **more),
        )
        with patch.context() as stop, pytest.raises(KeyboardInterrupt):
            stop.setattr(supernet, "check_finite", interrupt)
            supernet.main([*flags, *resume(folder)])
        supernet.main(resume(folder))
    return SimpleNamespace(
        folder=folder, validated=validated, found=read_json(search.folder / "search.json")
    )


# Files


def test_a_run_writes_what_it_promises(run: Run) -> None:
    names = {path.name for path in run.folder.glob("[!.]*")}
    assert names == {"args.json", "log.txt", "metrics.csv", "last.pth", "training.png"}
    rows, args = metrics(run.folder), read_json(run.folder / "args.json")
    assert list(rows[0]) == [
        "epoch",
        "lr",
        "train_loss",
        "train_acc",
        "val_loss",
        "val_acc",
        "seconds",
    ]
    assert [(row["epoch"], row["lr"]) for row in rows] == [(1, 0.1), (2, 0.05)]
    assert (args["dataset"], args["precision"], args["init"]) == ("digits", "fp32", "identity")
    log = (run.folder / "log.txt").read_text()
    assert "random paths" in log and "device    cpu" in log and "graphs    not used" in log
    (command,) = [shlex.split(line)[1:] for line in log.splitlines() if line.startswith("next: ")]
    parsed = random_search.build_parser().parse_args(command[2:])
    assert command[:2] == ["python", "random_search.py"] and parsed.ckpt == str(
        run.folder / "last.pth"
    )


def test_the_checkpoint_is_plain_data(run: Run) -> None:
    """facebookresearch/fvcore#154: no namespaces or NumPy values; Lyken17/pytorch-OpCounter#82: no counters."""
    content = torch.load(run.folder / "last.pth", weights_only=True)
    assert (
        content["epoch"] == 2
        and content["args"]["epochs"] == 2
        and content["data"]["name"] == "digits"
    )
    assert content["args"]["candidates"] == list(CANDIDATES)
    assert content["model"].keys() == Supernet(10, 8).state_dict().keys()
    assert not any("total_" in key or key.startswith("module.") for key in content["model"])


def test_an_old_run_is_not_overwritten_unless_asked(run: Run, tmp_path: Path) -> None:
    """LibreYOLO/libreyolo#833; --overwrite deletes the run's own files and nothing else."""
    folder = Path(shutil.copytree(run.folder, tmp_path / "net"))
    (folder / "search").mkdir()
    for name in ("notes.md", "search/paths.csv"):
        (folder / name).write_text("mine")
    before = (folder / "last.pth").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        train(tmp_path)
    assert (folder / "last.pth").read_bytes() == before
    train(tmp_path, "--overwrite", "--no_cuda_graphs")
    assert len(metrics(folder)) == 1
    assert {(folder / name).read_text() for name in ("notes.md", "search/paths.csv")} == {"mine"}
    args, checkpoint = supernet.parse_args(resume(folder))  # both flags were for that command only
    assert checkpoint["epoch"] == 1 and not args.overwrite and not args.no_cuda_graphs


def test_a_kill_while_saving_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zylo117/Yet-Another-EfficientDet-Pytorch#101."""
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


def test_a_resumed_run_equals_an_uninterrupted_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ultralytics/yolov5#292, pytorch/ignite#2076: weights, momentum, rates, paths and order all go on."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supernet, "check_finite", interrupt)
        train(tmp_path, "--epochs", "2")
    assert len(metrics(tmp_path / "net")) == 1
    supernet.main([*resume(tmp_path / "net"), "--workers", "0"])
    assert same(weights(run.folder), weights(tmp_path / "net"))
    assert metrics(run.folder) == metrics(tmp_path / "net")
    first, second = (
        load_checkpoint(f / "last.pth")["optimizer"]["state"]
        for f in (run.folder, tmp_path / "net")
    )
    assert first.keys() == second.keys() and all(same(first[i], second[i]) for i in first)


def test_a_complete_run_is_left_alone(run: Run, capsys: pytest.CaptureFixture) -> None:
    """sparticlesteve/cosmoflow-benchmark#48."""
    before = (run.folder / "last.pth").read_bytes()
    supernet.main([*run.flags, "--resume"])
    said = capsys.readouterr().out
    assert "resuming after epoch 2" in said and "epoch 3" not in said
    assert (run.folder / "last.pth").read_bytes() == before


def test_a_continuation_takes_the_runs_settings_but_may_work_in_another_way(run: Run) -> None:
    args, checkpoint = supernet.parse_args(resume(run.folder))
    assert (args.dataset, args.batch_size, args.image_size, args.epochs) == ("digits", 128, 8, 2)
    flags = [
        "--data_dir",
        "/there",
        "--device",
        "cuda",
        "--workers",
        "7",
        "--val_interval",
        "3",
        "--no_cuda_graphs",
    ]
    changed = {
        "data_dir": "/there",
        "device": "cuda",
        "workers": 7,
        "val_interval": 3,
        "no_cuda_graphs": True,
    }
    assert checkpoint["epoch"] == 2 and not vars(args).items() & changed.items()
    assert vars(supernet.parse_args([*resume(run.folder), *flags])[0]) == vars(args) | changed


REFUSED = """epochs 2 3, batch_size 128 64, dataset digits cifar10, image_size 8 16, learning_rate 0.1 0.2, cutout 0 4,
seed 0 1, precision fp32 bf16, init identity official"""


@pytest.mark.parametrize("change", [*REFUSED.split(","), f"choice None {ZEROS}"])
def test_a_continuation_with_another_setting_is_refused_with_both_values(
    run: Run, change: str
) -> None:
    """mlfoundations/open_clip#413: another length, for one, would change the decay."""
    name, before, now = change.split()
    with pytest.raises(UserError, match=f"{name} {before}, this command {now}"):
        supernet.parse_args([*resume(run.folder), f"--{name}", now])


def test_without_a_checkpoint_a_continuation_begins_and_says_so(alone: SimpleNamespace) -> None:
    log = (alone.folder / "log.txt").read_text()
    assert (
        log.index("no checkpoint yet")
        < log.index("epoch 1/2")
        < log.index("resuming after epoch 1")
    )


# Learning


def test_the_initial_weights_are_those_asked_for_and_recorded(tmp_path: Path) -> None:
    folder = train(tmp_path, "--init", "official", "--learning_rate", "1e-20")
    torch.manual_seed(0)
    begun, trained = dict(Supernet(10, 8, init="official").named_parameters()), weights(folder)
    assert all(torch.equal(trained[name], parameter) for name, parameter in begun.items())
    assert supernet.parse_args(resume(folder))[0].init == "official"


def test_every_step_trains_in_training_mode_on_a_path_of_its_own(
    run: Run, tmp_path: Path, monkeypatch
) -> None:
    """joeynmt/joeynmt#184: validation does not leave the model in eval mode, nor count as a batch.

    MichiganCOG/ViP#25: another seed trains another network.
    """
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


def test_the_rate_falls_at_every_step_from_its_start_to_almost_zero(
    tmp_path: Path, monkeypatch
) -> None:
    """mlfoundations/open_clip#413: never negative, never rising. The other schedule's steps are in test_ranks.py."""
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self: rates.append([group["lr"] for group in self.param_groups]) or step(self),
    )
    flags = [
        "--epochs",
        "2",
        "--learning_rate",
        "0.04",
        "--lr_schedule",
        "cosine",
        "--val_interval",
        "5",
    ]
    rows = metrics(train(tmp_path, *flags))
    expected = [0.04 * math.cos(math.pi * i / 36) ** 2 for i in range(18)]
    assert torch.tensor(rates).T.tolist() == [pytest.approx(expected)] * 2
    assert [row["lr"] for row in rows] == pytest.approx([expected[0], expected[9]])
    assert [row["val_acc"] is None for row in rows] == [
        True,
        False,
    ]  # the last epoch is validated anyway


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nerogar/OneTrainer#1147: epoch and step are named, and the last good checkpoint stays."""
    original = Batches.epoch

    def spoiled(self, seed, epoch, cutout_length=0):
        for step, (x, y) in enumerate(original(self, seed, epoch, cutout_length)):
            yield (x * math.nan if (epoch, step) == (1, 4) else x), y

    monkeypatch.setattr(Batches, "epoch", spoiled)
    with pytest.raises(UserError, match=r"epoch 2, step 5"):
        train(tmp_path, "--epochs", "3")
    checkpoint = load_checkpoint(tmp_path / "net/last.pth")
    assert checkpoint["epoch"] == 1 and all(
        value.isfinite().all() for value in checkpoint["model"].values()
    )


def test_bf16_training_keeps_fp32_weights_and_goes_on_as_such(tmp_path: Path) -> None:
    folder = train(tmp_path, "--precision", "bf16")
    assert {value.dtype for value in weights(folder).values() if value.is_floating_point()} == {
        torch.float32
    }
    for more in ([], ["--precision", "bf16"]):
        assert supernet.parse_args([*resume(folder), *more])[0].precision == "bf16"


@pytest.mark.parametrize(
    ("device", "hardware", "expected"),
    [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp32")],
)
def test_auto_is_bf16_where_cuda_has_it(
    monkeypatch, device: str, hardware: bool, expected: str
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: hardware or including_emulation
    )
    assert pick_precision("auto", torch.device(device)) == expected
    assert [pick_precision(name, torch.device(device)) for name in ("fp32", "bf16")] == [
        "fp32",
        "bf16",
    ]


# Validation


@pytest.mark.parametrize(("size", "own"), [(250, True), (7, True), (1, True), (7, False)])
def test_validation_uses_each_batchs_statistics_or_the_running_ones(
    run: Run, size: int, own: bool
) -> None:
    """As BatchNorm does in training or not, and without a trace in any buffer; also of a single image.

    All but BatchNorm is in eval mode: a block in training mode might replay the CUDA graph of a training step.
    """
    model, dataset, modes = Supernet(10, 8), load_dataset("digits", "", 8), set()
    model.load_state_dict(weights(run.folder))
    batches = Batches(dataset, dataset.search.subset(range(50)), size, CPU)
    space, rng, before = SearchSpace(model), named_rng(0, "any"), copy.deepcopy(model.state_dict())
    paths = [space.sample(rng) for _ in range(len(batches))]
    reference = copy.deepcopy(model).train(own)
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda module, _: modes.add((type(module).__name__, module.training))
        )
    measured = supernet.evaluate(model, batches, paths, own)
    assert same(before, model.state_dict())
    assert all(training == (own and name == "BatchNorm") for name, training in modes)
    assert {"ShuffleBlock", "BatchNorm"} <= {name for name, _ in modes}
    with torch.no_grad():
        logits = torch.cat(
            [reference(x, choice) for (x, _), choice in zip(batches, paths, strict=True)]
        )
    assert measured["top1"] == pytest.approx(
        100 * (logits.argmax(1) == batches.labels).float().mean().item()
    )
    assert measured["loss"] == pytest.approx(
        F.cross_entropy(logits, batches.labels).item(), rel=1e-5
    )
    model.train()(torch.ones(2, 3, 8, 8), paths[0])
    assert not torch.equal(
        before["stem.1.running_var"], model.stem[1].running_var
    )  # training goes on to track them


def test_validation_batches_hold_images_of_every_class() -> None:
    """Folders come class by class; statistics of one class would take away what tells it from the others."""
    dataset = load_dataset("digits", "", 8)
    dataset.search = dataset.search.subset(dataset.search.labels.argsort().tolist())
    batches = supernet.load_batches(dataset, supernet.parse_args(TINY)[0], CPU)["search"]
    assert [len(labels.unique()) for _, labels in batches] == [10, 10]


def test_test_images_change_nothing_that_is_learned(run: Run, tmp_path: Path, monkeypatch) -> None:
    """kuangliu/pytorch-cifar#145: with other test images, training and validation are the same to the last bit."""

    def other_test_images(*args):
        dataset = load_dataset(*args)
        dataset.test.images = 255 - dataset.test.images
        return dataset

    monkeypatch.setattr(supernet, "load_dataset", other_test_images)
    folder = train(tmp_path, "--epochs", "2")
    assert same(weights(run.folder), weights(folder)) and metrics(run.folder) == metrics(folder)


# One architecture alone


def test_one_architecture_trains_by_the_same_loop_and_is_tested_once(
    alone: SimpleNamespace,
) -> None:
    result, args = read_json(alone.folder / "result.json"), read_json(alone.folder / "args.json")
    assert (args["dataset"], args["image_size"], args["choice"]) == (
        "digits",
        8,
        alone.found["choice"],
    )
    assert (result["choice"], result["supernet_accuracy"]) == (
        alone.found["choice"],
        alone.found["accuracy"],
    )
    accuracy = result["test_accuracy"] / 100
    assert result["standard_error"] == pytest.approx(
        100 * math.sqrt(accuracy * (1 - accuracy) / 300)
    )
    assert result["params_m"] == pytest.approx(alone.found["params_m"])
    parameters = [
        value
        for key, value in weights(alone.folder).items()
        if "running" not in key and "num_" not in key
    ]
    assert sum(value.numel() for value in parameters) == round(1e6 * result["params_m"])
    test = load_dataset("digits", "", 8).test.labels
    assert [torch.equal(labels, test) for labels in alone.validated] == [False, False, True]


def test_a_finished_network_runs_with_torch_alone(alone: SimpleNamespace, tmp_path: Path) -> None:
    """model.pt2 takes bytes, any number of images, and needs nothing of this repository."""
    test = load_dataset("digits", "", 8).test
    torch.save(test.images, tmp_path / "images.pt")
    code = "import sys, torch; network = torch.export.load(sys.argv[1]).module(); x = torch.load('images.pt');"
    code += "torch.save([network(x[:n]) for n in (1, 7, 300)], 'logits.pt'); assert 'torchvision' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code, alone.folder / "model.pt2"], cwd=tmp_path, check=True
    )
    checkpoint, choice = (
        load_checkpoint(alone.folder / "last.pth"),
        [int(n) for n in alone.found["choice"].split("-")],
    )
    model = Supernet(10, 8, affine=True, choice=choice)
    model.load_state_dict(checkpoint["model"])
    mean, std = (torch.tensor(checkpoint["data"][name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = model.eval()((test.images / 255 - mean) / std, choice)
    for logits in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(logits, expected[: len(logits)], rtol=1e-4, atol=1e-5)
    accuracy = 100 * (expected.argmax(1) == test.labels).float().mean().item()
    assert read_json(alone.folder / "result.json")["test_accuracy"] == pytest.approx(
        accuracy, abs=0.5
    )  # one may be a tie


def test_a_network_may_start_from_its_weights_in_the_supernet(run: Run, tmp_path: Path) -> None:
    """ShunLu91/Single-Path-One-Shot-NAS#19: with a rate that moves nothing they are still the supernet's."""
    flags = ["--choice", ZEROS, "--learning_rate", "1e-20", "--init_from"]
    ours, supernets = (
        weights(train(tmp_path, *flags, str(run.folder / "last.pth"))),
        weights(run.folder),
    )
    shared = [key for key, value in ours.items() if value.ndim > 1]
    assert len(shared) == 67 and all(torch.equal(ours[key], supernets[key]) for key in shared)
    content = load_checkpoint(run.folder / "last.pth")
    content["model"]["head.classifier.weight"] = torch.zeros(7, 1024)
    torch.save(content, tmp_path / "seven.pth")
    with pytest.raises(UserError, match=r"seven\.pth: .*classifier"):
        train(tmp_path, *flags, str(tmp_path / "seven.pth"), "--overwrite")
    assert (tmp_path / "net/result.json").exists()


def test_training_on_all_adds_the_search_split_and_validates_nothing(
    tmp_path: Path, monkeypatch
) -> None:
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(self) or step(self))
    folder = train(tmp_path, "--choice", ZEROS, "--train_on", "all")
    assert "1,497 train" in (folder / "log.txt").read_text()
    assert len(steps) == 1497 // 128 and metrics(folder)[0]["val_acc"] is None


# Flags


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "",
            {
                "epochs": 600,
                "batch_size": 96,
                "learning_rate": 0.1,
                "weight_decay": 3e-4,
                "cutout": 0,
            },
        ),
        ("", {"image_size": 32, "init": "identity", "momentum": 0.9, "lr_schedule": "linear"}),
        ("--choice ZEROS", {"epochs": 600, "cutout": 16}),
        ("--choice ZEROS --dataset folder --image_size 8", {"cutout": 4}),
        ("--choice ZEROS --init_from last.pth", {"init": None, "learning_rate": 0.1}),
        ("--choice ZEROS --cutout 0 --weight-decay 0.5", {"cutout": 0, "weight_decay": 0.5}),
        ("--init official", {"learning_rate": 0.025}),
        ("--init official --learning_rate 0.2", {"learning_rate": 0.2}),
        ("--dataset folder --image_size 64", {"learning_rate": 0.1, "init": "identity"}),
        (
            "--dataset folder --image_size 72",
            {"learning_rate": 0.025, "init": "official", "cutout": 0},
        ),
        ("--dataset folder --image_size 72 --init identity", {"learning_rate": 0.1}),
        ("--dataset folder --image_size 72 --choice ZEROS", {"cutout": 36}),
        (
            "--dataset imagenet",
            {"epochs": 120, "batch_size": 1024, "label_smoothing": 0.1, "image_size": 224},
        ),
        ("--dataset imagenet --choice ZEROS", {"epochs": 240, "weight_decay": 4e-5, "cutout": 0}),
        ("--dataset imagenet --epochs 3", {"epochs": 3, "learning_rate": 0.5, "cutout": 0}),
        (
            "--dataset digits --choice ZEROS",
            {"epochs": 10, "momentum": 0.8, "image_size": 16, "cutout": 0},
        ),
        ("--dataset digits --init official", {"learning_rate": 0.1}),
    ],
)
def test_presets_suit_the_data_and_flags_win(flags: str, expected: dict) -> None:
    """albumentations-team/albumentations#420: no hole is as large as the image."""
    args = vars(supernet.parse_args(flags.replace("ZEROS", ZEROS).split())[0])
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", ("folder", 48, "/pictures", 24)),
        ("--image_size 64 --dataset folder", ("folder", 64, "/pictures", 32)),
        ("--data_dir ~/here", ("folder", 48, "HOME/here", 24)),
        ("--dataset digits --image_size 24 --data_dir /there", ("digits", 24, "/there", 0)),
    ],
)
def test_a_search_brings_its_data_along_and_flags_win(
    tmp_path: Path, monkeypatch, flags: str, expected: tuple
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = {
        "choice": ZEROS,
        "accuracy": 50.0,
        "dataset": "folder",
        "image_size": 48,
        "data_dir": "/pictures",
    }
    found["candidates"] = list(CANDIDATES)
    (tmp_path / "search.json").write_text(json.dumps(found))
    args, _ = supernet.parse_args(["--choice", "~/search.json", *flags.split()])
    assert (args.choice, args.supernet_accuracy) == (ZEROS, 50)
    data_dir = args.data_dir.replace(str(tmp_path), "HOME")
    assert (args.dataset, args.image_size, data_dir, args.cutout) == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        *[(text, "a choice like 1-0-3") for text in ("", "no/such/search.json")],
        ("1-2-3", "20 numbers"),
        ("-".join("4" * 20), "layer 0 has no candidate 4"),
        ("0-" * 1000 + "0", "20 numbers"),  # too long for a file name (Aider-AI/aider#4145)
        ("log.txt", "is not valid JSON"),
        ("args.json", "no search.json: it lacks 'accuracy'"),
        (ZEROS, "layer 4 has no candidate 0"),
    ],
)
def test_a_wrong_choice_is_refused(
    run: Run, tmp_path: Path, monkeypatch, choice: str, message: str
) -> None:
    monkeypatch.chdir(run.folder)
    offered = CANDIDATES["shuffle3"]
    monkeypatch.setitem(
        CANDIDATES, "shuffle3", lambda *shape: None if shape[2] == 2 else offered(*shape)
    )
    with pytest.raises(UserError, match=message):
        train(tmp_path, "--choice", choice)


WRONG = """--epochs 99999999999; --batch_size 0; --learning_rate -1; --weight_decay -0.1; --cutout 32;
--seed -1; --seed 4294967296; --seed abc; --workers -1; --epo 3; --resume False; --resume --overwrite;
--train_on all; --init zero; --init_from last.pth; --init_from last.pth --init official --choice ZEROS;
--image_size 64; --dataset mnist; --local-rank=0"""


@pytest.mark.parametrize("flags", WRONG.split(";"))
def test_wrong_usage_exits_with_2_before_any_work(flags: str, tmp_path: Path, monkeypatch) -> None:
    """ACEsuit/mace#429, mllam/neural-lam#234, RasmussenLab/vamb#425, bghira/SimpleTuner#97."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        supernet.main(flags.replace("ZEROS", ZEROS).split())
    assert exit.value.code == 2 and not list(tmp_path.iterdir())
