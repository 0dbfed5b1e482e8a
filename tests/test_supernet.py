"""supernet.py: what it learns, what it writes, how it goes on, what it refuses."""

import contextlib
import copy
import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import supernet
from conftest import TINY, Run
from data.datasets import load_dataset
from data.loaders import Batches
from model import Supernet
from utils import UserError, load_checkpoint, pick_precision


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "last.pth")["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def metrics(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def interrupt_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes supernet.py stop as by Ctrl-C in the middle of the epoch after that many."""
    original = supernet.check_finite

    def check(losses, epoch):
        original(losses, epoch)
        if epoch == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(supernet, "check_finite", check)


def test_a_run_writes_what_it_promises(run: Run) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"args.json", "log.txt", "metrics.csv", "last.pth", "training.png"}
    rows = metrics(run.folder)
    assert list(rows[0]) == ["epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    args = json.loads((run.folder / "args.json").read_text())
    assert (args["dataset"], args["precision"]) == ("digits", "fp32")
    log = (run.folder / "log.txt").read_text()
    assert "random paths" in log and "device    cpu" in log


def test_the_checkpoint_is_plain_data(run: Run) -> None:
    """facebookresearch/fvcore#154: no namespaces or NumPy values; Lyken17/pytorch-OpCounter#82: no counters."""
    content = torch.load(run.folder / "last.pth", weights_only=True)
    assert content["epoch"] == 2 and content["args"]["epochs"] == 2 and content["data"]["name"] == "digits"
    assert content["model"].keys() == Supernet(10, 8).state_dict().keys()
    assert not any("total_" in key or key.startswith("module.") for key in content["model"])


def test_a_resumed_run_equals_an_uninterrupted_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ultralytics/yolov5#292, pytorch/ignite#2076: weights, momentum, rates, paths and order all go on."""
    flags = [*TINY, "--out_dir", str(tmp_path), "--exp_name", "again", "--epochs", "2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(1, patch)
        supernet.main(flags)
    assert len(metrics(tmp_path / "again")) == 1
    supernet.main([*flags, "--resume", "--workers", "0"])
    assert same(weights(run.folder), weights(tmp_path / "again"))
    for ours, theirs in zip(metrics(run.folder), metrics(tmp_path / "again"), strict=True):
        assert {**ours, "seconds": ""} == {**theirs, "seconds": ""}
    momenta = [load_checkpoint(f / "last.pth")["optimizer"]["state"] for f in (run.folder, tmp_path / "again")]
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])


def test_momentum_of_an_earlier_version_goes_on(run: Run) -> None:
    """Which lacks the buffers of what no step had touched, and was not fused."""
    args, checkpoint = supernet.parse_args([*run.flags, "--resume"])
    model = Supernet(10, 8)
    model.load_state_dict(checkpoint["model"])
    state = checkpoint["optimizer"]
    kept = {i: value for i, value in state["state"].items() if i % 3}
    state = {"state": kept, "param_groups": [group | {"fused": None} for group in state["param_groups"]]}
    optimizer = supernet.build_optimizer(model, args, copy.deepcopy(state))
    F.cross_entropy(model(torch.ones(2, 3, 8, 8), (0,) * 20), torch.tensor([0, 1])).backward()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    rate, momentum, decay = (optimizer.param_groups[0][name] for name in ("lr", "momentum", "weight_decay"))
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.grad is None:
            assert torch.equal(parameter, before[name])
        else:
            buffer = kept[i]["momentum_buffer"] if i in kept else 0
            moved = rate * (momentum * buffer + parameter.grad + decay * before[name])
            torch.testing.assert_close(parameter, before[name] - moved)


def test_another_seed_trains_another_network(run: Run, tmp_path: Path) -> None:
    """MichiganCOG/ViP#25."""
    supernet.main([*TINY, "--out_dir", str(tmp_path), "--exp_name", "other", "--epochs", "1", "--seed", "1"])
    assert not same(weights(run.folder), weights(tmp_path / "other"))


def test_a_complete_run_is_left_alone(run: Run, capsys: pytest.CaptureFixture) -> None:
    """sparticlesteve/cosmoflow-benchmark#48."""
    before = (run.folder / "last.pth").read_bytes()
    supernet.main([*run.flags, "--resume"])
    assert "complete" in capsys.readouterr().out
    assert (run.folder / "last.pth").read_bytes() == before


def test_resume_takes_the_runs_settings_and_refuses_others(run: Run) -> None:
    """mlfoundations/open_clip#413: another length would change the decay."""
    where = ["--out_dir", str(run.folder.parent), "--exp_name", "tiny", "--resume"]
    args, checkpoint = supernet.parse_args(where)
    assert (args.dataset, args.batch_size, args.image_size) == ("digits", 128, 8) and checkpoint["epoch"] == 2
    with pytest.raises(UserError, match=r"epochs 2, this command 3"):
        supernet.parse_args([*where, "--epochs", "3"])
    assert supernet.parse_args([*where, "--workers", "7"])[0].workers == 7


def test_the_initial_weights_are_part_of_a_run(run: Run, tmp_path: Path) -> None:
    """They are recorded, go on with it, and are those that were asked for."""
    for init in ("identity", "official"):
        flags = [*TINY, "--out_dir", str(tmp_path), "--exp_name", init, "--epochs", "1", "--learning_rate", "1e-20"]
        supernet.main([*flags, "--init", init])
        torch.manual_seed(0)
        name = "layers.2.xception.main.2.weight"
        assert torch.equal(weights(tmp_path / init)[name], Supernet(10, 8, init=init).state_dict()[name])
        assert json.loads((tmp_path / init / "args.json").read_text())["init"] == init
        assert supernet.parse_args([*flags, "--resume"])[0].init == init
    with pytest.raises(UserError, match="init official, this command identity"):
        supernet.parse_args([*flags, "--resume", "--init", "identity"])
    assert load_checkpoint(run.folder / "last.pth")["args"]["init"] == "identity"


def test_a_run_of_an_earlier_version_goes_on_only_if_it_goes_on_alike(run: Run, tmp_path: Path) -> None:
    """Before --init, weights were the official ones, and the rate fell per epoch, but for ImageNet."""
    for dataset, epoch in (("digits", 1), ("imagenet", 1), ("digits", 2)):
        content = load_checkpoint(run.folder / "last.pth") | {"epoch": epoch}
        content["args"]["dataset"] = dataset
        del content["args"]["init"]
        (tmp_path / f"{dataset}{epoch}").mkdir()
        torch.save(content, tmp_path / f"{dataset}{epoch}" / "last.pth")
    flags = ["--out_dir", str(tmp_path), "--resume", "--exp_name"]
    with pytest.raises(UserError, match=r"last\.pth is of an earlier version.*per epoch.*--overwrite"):
        supernet.parse_args([*flags, "digits1"])
    for finished in ("imagenet1", "digits2"):
        assert supernet.parse_args([*flags, finished])[0].init == "official"


def test_nothing_to_resume_begins_anew_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    supernet.main([*TINY, "--out_dir", str(tmp_path), "--exp_name", "new", "--epochs", "1", "--resume"])
    assert "nothing to resume" in capsys.readouterr().out
    assert len(metrics(tmp_path / "new")) == 1


def test_an_old_run_is_not_overwritten_unless_asked(run: Run, tmp_path: Path) -> None:
    """LibreYOLO/libreyolo#833; --overwrite deletes the scripts' own files and nothing else."""
    folder = tmp_path / "tiny"
    shutil.copytree(run.folder, folder)
    (folder / "notes.md").write_text("mine")
    (folder / "search").mkdir()
    (folder / "search" / "paths.csv").write_text("old")
    flags = [*run.flags, "--out_dir", str(tmp_path), "--epochs", "1", "--seed", "3"]
    before = (folder / "last.pth").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        supernet.main(flags)
    assert (folder / "last.pth").read_bytes() == before
    supernet.main([*flags, "--overwrite"])
    assert len(metrics(folder)) == 1 and (folder / "notes.md").read_text() == "mine"
    assert not (folder / "search" / "paths.csv").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nerogar/OneTrainer#1147: epoch and step are named, and the last good checkpoint stays."""
    original = supernet.Batches.epoch

    def spoiled(self, seed, epoch, cutout_length=0):
        for step, (x, y) in enumerate(original(self, seed, epoch, cutout_length)):
            yield (x * math.nan if (epoch, step) == (1, 4) else x), y

    monkeypatch.setattr(supernet.Batches, "epoch", spoiled)
    with pytest.raises(UserError, match=r"epoch 2, step 5"):
        supernet.main([*TINY, "--out_dir", str(tmp_path), "--exp_name", "nan", "--epochs", "3"])
    checkpoint = load_checkpoint(tmp_path / "nan" / "last.pth")
    assert checkpoint["epoch"] == 1 and all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zylo117/Yet-Another-EfficientDet-Pytorch#101."""
    original, saves = torch.save, []

    def save(content, path):
        saves.append(path)
        original(content, path)
        if len(saves) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        supernet.main([*TINY, "--out_dir", str(tmp_path), "--exp_name", "kill", "--epochs", "2"])
    assert load_checkpoint(tmp_path / "kill" / "last.pth")["epoch"] == 1


def test_every_step_trains_in_training_mode_on_a_path_of_its_own(tmp_path: Path, monkeypatch) -> None:
    """joeynmt/joeynmt#184: validation does not leave the model in eval mode, nor count as a batch."""
    steps, original = [], Supernet.forward

    def forward(self, x, choice):
        if torch.is_grad_enabled():
            steps.append((self.training, tuple(choice)))
        return original(self, x, choice)

    monkeypatch.setattr(Supernet, "forward", forward)
    supernet.main([*TINY, "--out_dir", str(tmp_path), "--exp_name", "modes", "--epochs", "2"])
    assert len(steps) == 2 * (1197 // 128) == len({choice for _, choice in steps})
    assert all(training for training, _ in steps)


@pytest.mark.parametrize("size", [250, 7, 1])
def test_a_supernet_is_validated_with_each_batchs_own_statistics(run: Run, size: int) -> None:
    """As F.batch_norm has them in training, and without a trace in any buffer; also of a single image."""
    model = Supernet(10, 8)
    model.load_state_dict(load_checkpoint(run.folder / "last.pth")["model"])
    dataset = load_dataset("digits", "", 8)
    batches = Batches(dataset, dataset.search.subset(range(50)), size, torch.device("cpu"))
    paths, before = supernet.random_paths(model, batches, 0), copy.deepcopy(model.state_dict())
    measured = supernet.evaluate(model, batches, paths, own_statistics=True)
    assert same(before, model.state_dict())
    reference = copy.deepcopy(model).train()
    with torch.no_grad():
        logits = torch.cat([reference(x, choice) for (x, _), choice in zip(batches, paths, strict=True)])
    assert measured["top1"] == pytest.approx(100 * (logits.argmax(1) == batches.labels).float().mean().item())
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, batches.labels).item(), rel=1e-5)
    model.train()(torch.ones(2, 3, 8, 8), paths[0])
    assert not torch.equal(before["stem.1.running_var"], model.stem[1].running_var)  # training goes on to track them


def test_validation_batches_hold_images_of_every_class(tmp_path: Path, monkeypatch) -> None:
    """Folders come class by class; statistics of one class would take away what tells it from the others."""
    seen, original = [], supernet.evaluate

    def evaluate(model, batches, *rest, **more):
        seen.extend(y.unique().tolist() for _, y in batches)
        return original(model, batches, *rest, **more)

    def by_class(*args):
        dataset = load_dataset(*args)
        dataset.search = dataset.search.subset(dataset.search.labels.argsort().tolist())
        return dataset

    monkeypatch.setattr(supernet, "evaluate", evaluate)
    monkeypatch.setattr(supernet, "load_dataset", by_class)
    supernet.main([*TINY, "--out_dir", str(tmp_path), "--exp_name", "sorted", "--epochs", "1"])
    assert seen == [list(range(10))] * 2


def test_test_images_change_nothing_that_is_learned(run: Run, tmp_path: Path, monkeypatch) -> None:
    """kuangliu/pytorch-cifar#145: with other test images, training and validation are the same to the last bit."""

    def other_test_images(*args):
        dataset = load_dataset(*args)
        dataset.test.images = 255 - dataset.test.images
        return dataset

    monkeypatch.setattr(supernet, "load_dataset", other_test_images)
    supernet.main([*run.flags, "--out_dir", str(tmp_path)])
    assert same(weights(run.folder), weights(tmp_path / "tiny"))
    assert [row["val_acc"] for row in metrics(run.folder)] == [row["val_acc"] for row in metrics(tmp_path / "tiny")]


def test_bf16_training_keeps_fp32_weights_and_goes_on_as_such(tmp_path: Path) -> None:
    flags = [*TINY, "--out_dir", str(tmp_path), "--exp_name", "bf16", "--epochs", "1"]
    supernet.main([*flags, "--precision", "bf16"])
    floats = {value.dtype for value in weights(tmp_path / "bf16").values() if value.is_floating_point()}
    assert floats == {torch.float32}
    for more in ([], ["--precision", "auto"], ["--precision", "bf16"]):
        assert supernet.parse_args([*flags, "--resume", *more])[0].precision == "bf16"
    with pytest.raises(UserError, match="precision bf16, this command fp32"):
        supernet.parse_args([*flags, "--resume", "--precision", "fp32"])


@pytest.mark.parametrize(
    ("device", "hardware", "expected"), [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp32")]
)
def test_auto_is_bf16_where_cuda_has_it(monkeypatch, device: str, hardware: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: hardware or including_emulation)
    assert pick_precision("auto", torch.device(device)) == expected
    assert [pick_precision(name, torch.device(device)) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_one_architecture_trains_by_the_same_loop_and_is_tested_once(search: Run, tmp_path: Path, monkeypatch) -> None:
    tested, original = [], supernet.evaluate
    monkeypatch.setattr(
        supernet, "evaluate", lambda model, b, *rest: tested.append(len(b.labels)) or original(model, b, *rest)
    )
    choice = search.folder / "search.json"
    flags = [*TINY, "--out_dir", str(tmp_path), "--exp_name", "alone", "--epochs", "2", "--choice", str(choice)]
    supernet.main(flags)
    found, result = json.loads(choice.read_text()), json.loads((tmp_path / "alone" / "result.json").read_text())
    assert result["choice"] == found["choice"] and result["supernet_accuracy"] == found["accuracy"]
    accuracy = result["test_accuracy"] / 100
    assert result["standard_error"] == pytest.approx(100 * math.sqrt(accuracy * (1 - accuracy) / 300))
    assert "test_top5" not in result and result["params_m"] == pytest.approx(found["params_m"])
    state = weights(tmp_path / "alone")
    assert state.keys() > {key for key in state if key.endswith("running_mean")}
    assert sum(value.numel() for key, value in state.items() if "running" not in key and "num_" not in key) == round(
        1e6 * result["params_m"]
    )
    supernet.main([*flags, "--resume"])
    assert tested.count(300) == 3  # two validations on 300 search images, one test on as many


def test_a_finished_network_runs_with_torch_alone(run: Run, tmp_path: Path) -> None:
    """model.pt2 takes bytes, any number of images, and needs nothing of this repository."""
    choice = "3-2-1-0" + "-0-1-2-3" * 4
    flags = [*TINY, "--out_dir", str(tmp_path), "--exp_name", "alone", "--epochs", "1", "--choice", choice]
    supernet.main(flags)
    images = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    code = "import sys, torch; network = torch.export.load('alone/model.pt2').module(); x = torch.load('images.pt');"
    code += "torch.save([network(x[:n]) for n in (1, 2, 7)], 'logits.pt'); assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    checkpoint = load_checkpoint(tmp_path / "alone" / "last.pth")
    model = Supernet(10, 8, affine=True, choice=[int(n) for n in choice.split("-")])
    model.load_state_dict(checkpoint["model"])
    mean, std = (torch.tensor(checkpoint["data"][name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = model.eval()((images / 255 - mean) / std, [int(n) for n in choice.split("-")])
    for n, logits in zip((1, 2, 7), torch.load(tmp_path / "logits.pt"), strict=True):
        torch.testing.assert_close(logits, expected[:n], rtol=1e-4, atol=1e-6)


def test_a_network_may_start_from_its_weights_in_the_supernet(run: Run, tmp_path: Path) -> None:
    """ShunLu91/Single-Path-One-Shot-NAS#19: with a rate that moves nothing they are still the supernet's."""
    choice, supernets = "-".join("2" * 20), weights(run.folder)
    flags = [*TINY, "--out_dir", str(tmp_path), "--exp_name", "tuned", "--epochs", "1", "--choice", choice]
    supernet.main([*flags, "--learning_rate", "1e-20", "--init_from", str(run.folder / "last.pth")])
    ours = weights(tmp_path / "tuned")
    shared = [key for key, value in ours.items() if value.ndim > 1]
    assert len(shared) == 67 and all(torch.equal(ours[key], supernets[key]) for key in shared)
    alone = str(tmp_path / "tuned" / "last.pth")
    with pytest.raises(UserError, match="single architecture"):
        supernet.main([*flags, "--overwrite", "--init_from", alone])
    content = load_checkpoint(run.folder / "last.pth")
    content["model"]["head.classifier.weight"] = torch.zeros(7, 1024)
    torch.save(content, tmp_path / "seven.pth")
    with pytest.raises(UserError, match=r"seven.pth does not fit.*classifier"):
        supernet.main([*flags, "--overwrite", "--init_from", str(tmp_path / "seven.pth")])
    assert (tmp_path / "tuned" / "result.json").exists()


def test_training_on_all_adds_the_search_split_and_validates_nothing(tmp_path: Path, monkeypatch) -> None:
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(self) or step(self))
    choice = "-".join("0" * 20)
    flags = [*TINY, "--out_dir", str(tmp_path), "--exp_name", "all", "--epochs", "1", "--choice", choice]
    supernet.main([*flags, "--train_on", "all"])
    assert "1,497 train" in (tmp_path / "all" / "log.txt").read_text()
    assert metrics(tmp_path / "all")[0]["val_acc"] == ""
    assert len(steps) == 1497 // 128


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"epochs": 600, "batch_size": 96, "learning_rate": 0.1, "weight_decay": 3e-4, "cutout": 0}),
        (["--choice", "x"], {"epochs": 600, "cutout": 16}),
        (["--dataset", "imagenet"], {"epochs": 120, "batch_size": 1024, "label_smoothing": 0.1, "image_size": 224}),
        (["--dataset", "imagenet", "--choice", "x"], {"epochs": 240, "weight_decay": 4e-5}),
        (["--dataset", "imagenet", "--epochs", "3"], {"epochs": 3, "learning_rate": 0.5}),
        (["--weight-decay", "0.5", "--cutout"], {"weight_decay": 0.5, "cutout": 16}),
        (["--init", "official"], {"learning_rate": 0.025}),
        (["--dataset", "folder", "--image_size", "72"], {"learning_rate": 0.025}),
        (["--dataset", "folder", "--image_size", "72", "--init", "identity"], {"learning_rate": 0.1}),
        (["--dataset", "digits", "--init", "official", "--learning_rate", "0.2"], {"learning_rate": 0.2}),
    ],
)
def test_presets_suit_the_data_and_flags_win(flags: list[str], expected: dict) -> None:
    args = vars(supernet.build_parser(flags).parse_args(flags))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_falls_at_every_step_from_its_start_to_almost_zero(tmp_path: Path, monkeypatch, schedule: str) -> None:
    """mlfoundations/open_clip#413: never negative, never rising."""
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self: rates.append([group["lr"] for group in self.param_groups]) or step(self)
    )
    flags = ["--exp_name", "rates", "--epochs", "2", "--learning_rate", "0.04", "--lr_schedule", schedule]
    supernet.main([*TINY, "--out_dir", str(tmp_path), *flags])
    done = [i / len(rates) for i in range(len(rates))]
    falls = {"linear": [1 - d for d in done], "cosine": [math.cos(math.pi * d / 2) ** 2 for d in done]}
    assert len(rates) == 18 and [weights for weights, _ in rates] == pytest.approx([0.04 * f for f in falls[schedule]])
    assert all(weights == scales for weights, scales in rates)
    assert float(metrics(tmp_path / "rates")[1]["lr"]) == rates[9][0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "0"],
        ["--batch_size", "0"],
        ["--learning_rate", "-1"],
        ["--learning_rate", "nan"],
        ["--weight_decay", "-0.1"],
        ["--seed", "-1"],
        ["--seed", "4294967296"],
        ["--seed", "abc"],
        ["--workers", "-1"],
        ["--epo", "3"],
        ["--resume", "False"],
        ["--resume", "--overwrite"],
        ["--train_on", "all"],
        ["--init_from", "last.pth"],
        ["--init_from", "last.pth", "--choice", "-".join("0" * 20), "--init", "official"],
        ["--init", "zero"],
        ["--image_size", "64"],
        ["--exp_name", "../up"],
        ["--exp_name", ".."],
        ["--exp_name", "a:b"],
        ["--dataset", "mnist"],
        ["--local_rank", "0"],
    ],
)
def test_wrong_usage_exits_with_2_before_any_work(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    """ACEsuit/mace#429, mllam/neural-lam#234, RasmussenLab/vamb#425, bghira/SimpleTuner#97."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        supernet.main(flags)
    assert exit.value.code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("choice", ["1-2-3", "-".join("4" * 20), "no/such/search.json", ",".join(["x"] * 20)])
def test_a_wrong_choice_is_refused_in_one_line(choice: str) -> None:
    with pytest.raises(UserError, match="20 numbers from 0 to 3"):
        supernet.main(["--choice", choice])
