"""Own candidate blocks, own folders and other machines: whatever keeps the contract works."""

import errno
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import filelock
import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import random_search
import supernet
import utils
from blocks import CANDIDATES
from conftest import TINY
from data.datasets import load_dataset
from data.loaders import Batches
from data.records import Scored, load_checkpoint, read_rows, reliability
from model import SPACES, SearchSpace, Space, Supernet, stages
from utils import UserError, read_json

CPU = torch.device("cpu")
ALONE = ["--choice", "0-0-0"]


class Own(nn.Module):
    """A 5-D parameter, odd and fixed kernels, other norms, three random generators, own forward."""

    def __init__(self, inputs: int, outputs: int, stride: int, affine: bool):
        super().__init__()
        self.gate = nn.Parameter(torch.full((1, 1, 1, 1, 1), 0.5))
        self.register_buffer("mask", torch.tensor(-math.inf))
        wide = nn.Conv2d(inputs, outputs, (1, 7), stride, padding=(0, 3), bias=False)
        high = nn.Conv2d(outputs, outputs, (7, 1), padding=(3, 0), bias=False)
        self.fixed = nn.Conv2d(outputs, outputs, 1, bias=False).requires_grad_(False)
        nn.init.eye_(self.fixed.weight[:, :, 0, 0])
        norm = nn.InstanceNorm2d(outputs, track_running_stats=True)
        group = nn.GroupNorm(2, outputs, affine=affine)
        self.main = nn.Sequential(wide, high, norm, group, self.fixed, nn.Dropout2d(0.3))
        self.forward = self.run

    def run(self, x: torch.Tensor) -> torch.Tensor:
        y = self.main(x) * self.gate[0]
        if self.training:
            y = y * random.choice([0.5, 1.5]) * np.random.choice([0.5, 1.5])
        return y if y.abs().mean() < 1e3 else y / 2  # cannot be exported


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Space:
    """Three layers of the own candidate or another one, as --space own."""
    monkeypatch.setitem(CANDIDATES, "own", Own)
    space = Space([8, 1], stages((1, 8, 1), (2, 16, 2)), 32, ["own", "mb3_k3"])
    monkeypatch.setitem(SPACES, "own", space)
    return space


def train(out: Path, *flags: str) -> dict:
    supernet.main([*TINY, "--space", "own", "--out_dir", str(out), "--exp_name", "net", *flags])
    return load_checkpoint(out / "net/last.pth")


def test_every_parameter_trains_and_a_resumed_run_is_equal(space, tmp_path, monkeypatch):
    """Dropout has a stream of its own (WatChMaL/WatChMaL#112, ai2cm/ace#690)."""
    whole = train(tmp_path / "a", "--epochs", "2")["model"]
    gates = [value.item() for name, value in whole.items() if name.endswith("gate")]
    assert len(gates) == 3 and 0.5 not in gates
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supernet, "check_finite", Mock(side_effect=[None, KeyboardInterrupt]))
        train(tmp_path / "b", "--epochs", "2")
    torch.rand(7), random.random(), np.random.rand()
    again = train(tmp_path / "b", "--epochs", "2", "--resume")["model"]
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_kernels_of_any_shape_begin_as_a_copy_in_their_centre(space):
    """(PaddlePaddle/PaddleSlim#969, cosmic-cortex/neural-networks-from-scratch#1)"""
    main = Supernet(10, 8, space=space).layers[0]["own"].main
    assert torch.equal(main[4].weight[:, :, 0, 0], torch.eye(8))  # not trainable: left alone
    for weight, centre in ((main[0].weight, (0, 3)), (main[1].weight, (3, 0))):
        for channel in range(8):
            assert weight[channel, channel][centre].item() == pytest.approx(1, abs=0.2)
            assert weight[channel, channel].sum().item() == pytest.approx(1, abs=0.4)


def test_any_running_statistics_are_recalibrated_for_each_path(space):
    """Their mean over the batches; no score depends on others (mit-han-lab/gan-compression#65)."""
    model, dataset = Supernet(10, 8, space=space), load_dataset("digits", "", 8)
    images = Batches(dataset, dataset.train.subset(range(100)), 50, CPU)
    scorer, choices = random_search.Scorer(model, images, images), [(0, 0, 0), (0, 0, 1), (1, 0, 0)]
    together = scorer.score(choices)
    for choice, score in zip(choices, together, strict=True):
        path, collected = model.path(choice).eval(), []
        norms = [m for m in path.modules() if isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d)]
        buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
        for norm in norms:
            norm.train().momentum = 1.0
        with torch.no_grad():
            for x, _ in images:
                path(x)
                collected.append([buffer.clone() for buffer in buffers])
            for buffer, *parts in zip(buffers, *collected, strict=True):
                buffer.copy_(sum(parts) / len(parts))
            logits = torch.cat([path.eval()(x) for x, _ in images])
        loss = nn.functional.cross_entropy(logits, images.labels).item()
        assert score["loss"] == pytest.approx(loss, rel=1e-4)
        assert scorer.score([choice])[0]["loss"] == pytest.approx(score["loss"], rel=1e-5)


def test_a_block_that_cannot_be_exported_costs_the_export_alone(space, tmp_path, capsys):
    """(pytorch/pytorch#93579)"""
    train(tmp_path, *ALONE)
    assert (tmp_path / "net/result.json").exists() and not (tmp_path / "net/model.pt2").exists()
    assert "warning: no model.pt2" in capsys.readouterr().out


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5)


def test_costs_and_inherited_weights_follow_other_norms(space, tmp_path):
    """Parameters are those of the network alone, which may start from the supernet's weights."""
    shared = train(tmp_path / "shared")["model"]
    flags = ["--init_from", str(tmp_path / "shared/net/last.pth"), "--learning_rate", "0"]
    alone = train(tmp_path / "alone", *ALONE, *flags)["model"]
    key = "layers.1.own.main.0.weight"
    assert torch.equal(alone[key], shared[key]) and "layers.1.own.main.3.weight" in alone
    whole = SearchSpace(Supernet(10, 8, space=space))
    network = Supernet(10, 8, True, (0, 0, 0), space=space)
    assert whole.params((0, 0, 0)) == sum(p.numel() for p in network.parameters())
    assert read_json(tmp_path / "alone/net/result.json")["params_m"] * 1e6 == whole.params((0,) * 3)


class Wide(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


class Attention(nn.Module):
    """Self-attention over 8x8 places of 8 channels, with the residual."""

    def __init__(self, *_: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = x.flatten(2).transpose(1, 2)
        return x + self.attention(places, places, places)[0].transpose(1, 2).reshape(x.shape)


def test_attention_is_counted(monkeypatch):
    monkeypatch.setitem(CANDIDATES, "attention", Attention)
    space = Space((8, 1), ((8, 1),), 32, ("attention",))  # tuples are as good as lists
    assert space == Space([8, 1], [[8, 1]], 32, ["attention"])
    (costs,) = SearchSpace(Supernet(10, 8, space=space)).costs[1]
    projections, products = 4 * 64 * 8 * 8, 2 * 64 * 64 * 8
    assert costs == {0: projections + products}


def test_a_layer_needs_a_candidate(space, tmp_path, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "none", lambda *_: None)
    space.candidates[:] = ["none"]
    with pytest.raises(UserError, match="layer 0 has no candidate"):
        train(tmp_path)


BROKEN = [
    ("no_stride", lambda inputs, outputs, *_: nn.Conv2d(inputs, outputs, 1), "layer 1: .*, not"),
    ("in_place", lambda *_: nn.ReLU(inplace=True), "layer 0: it changes its input"),
    ("wrong_width", lambda *_: nn.Conv2d(7, 8, 1), "layer 0: .*channels"),
    ("raises", lambda *_: nn.Conv2d(8, 8, 1, groups=7), "layer 0: in_channels must be divisible"),
    ("mb3.5", lambda *_: nn.Identity(), "layer 0: .*can't contain"),
    ("lazy", lambda *_: nn.LazyConv2d(8, 1), "layer 0: lazy"),
    ("noisy", lambda *_: Noisy(), "layer 0: in evaluation mode"),
    ("wide", lambda *_: Wide(), r"layer 0: its output is torch\.float64"),
]


@pytest.mark.parametrize(("name", "make", "said"), BROKEN)
def test_a_broken_contract_is_one_line_before_any_work(
    space, tmp_path, monkeypatch, name, make, said
):
    """(D-X-Y/NATS-Bench#36, sovrasov/flops-counter.pytorch#19, pytorch/vision#809)"""
    monkeypatch.setitem(CANDIDATES, name, make)
    space.candidates[0] = name
    with pytest.raises(UserError, match=f"candidate '?{name}'?, {said}"):
        train(tmp_path)
    assert not list(tmp_path.iterdir())


OTHERS = [(supernet, name) for name in ("log.txt", "args.json", "metrics.csv", "model.pt2")]
OTHERS += [(random_search, name) for name in ("log.txt", "args.json", "histogram.png")]


@pytest.mark.parametrize(("script", "name"), OTHERS)
def test_files_of_others_are_not_deleted_unasked(run, tmp_path, script, name):
    """(tushartushar/DesigniteJava#65, MontrealCorpusTools/Montreal-Forced-Aligner#47)"""
    file, training = tmp_path / "net" / name, [*TINY, f"--out_dir={tmp_path}", "--exp_name=net"]
    file.parent.mkdir()
    file.write_text('{"lr": 1}')
    commands = {supernet: [training, [*training, "--resume"]]}
    commands[random_search] = [["--ckpt", str(run.folder), "--search_dir", str(file.parent)]]
    for flags in commands[script]:
        with pytest.raises(UserError, match=f"{name} exists.*--overwrite deletes"):
            script.main(flags)
    assert file.read_text() == '{"lr": 1}'


def test_more_paths_may_be_asked_for_after_an_evolution(run, tmp_path):
    """In a small space too (ray-project/ray#20886, maxpumperla/hyperas#217)."""
    flags = f"--ckpt {run.folder} --search_dir {tmp_path} --calibration_images 0 --top_k 1 "
    flags += "--max_flops 9.5911 --population 6 --parents 3 --generations 2 --num_paths"
    random_search.main([*flags.split(), "8"])
    before = [row for row in read_rows(tmp_path / "paths.csv") if row.generation > 0]
    random_search.main([*flags.split(), "40"])
    rows = read_rows(tmp_path / "paths.csv")
    assert [row for row in rows if row.generation > 0] == before
    assert sum(row.generation == 0 for row in rows) == 40


def test_lost_files_of_a_finished_run_are_written_again(space, tmp_path):
    """From last.pth (AlexsLemonade/scpca-nf#1142)."""
    train(tmp_path, "--epochs", "1", "--choice", "1-1-1")
    names = [tmp_path / "net" / name for name in ("metrics.csv", "training.png", "result.json")]
    before = {file: file.read_bytes() for file in names}
    for file in before:
        file.write_text("")
    (tmp_path / "net/model.pt2").unlink()
    train(tmp_path, "--resume")
    assert before == {file: file.read_bytes() for file in before}
    assert (tmp_path / "net/model.pt2").stat().st_size > 10_000


def test_scores_without_spread_have_no_reliability():
    """Whatever the rounding (numpy/numpy#32446, pola-rs/polars#29344)."""
    rng = random.Random(0)
    losses = [1.0986 * (1 + rng.uniform(-1e-8, 1e-8)) for _ in range(24)]
    rows = [Scored(i, (), loss=loss, half_loss=loss) for i, loss in enumerate(losses)]
    assert reliability(rows, "loss") == (None, None)


def test_a_space_without_limits_has_a_product_for_its_size(monkeypatch):
    """Ten candidates of irregular costs too (emdgroup/baybe#365)."""
    model = Supernet(10, 8)
    model.options = [list(range(10))] * 20
    monkeypatch.setattr(SearchSpace, "_sums", None)
    space = SearchSpace(model)
    assert space.size == 10**20 and len(space.sample_distinct(random.Random(0), 3)) == 3


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    """(tox-dev/filelock#77, nipy/nipype#1370)"""
    refuse = Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with utils.locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert "has no locks" in capsys.readouterr().err


def test_jobs_that_download_into_one_folder_wait_for_each_other(cifar, tmp_path, monkeypatch):
    """Only the first one downloads (pytorch/vision#8707)."""
    cifar.served, urlopen = cifar.archive, cifar.urlopen

    def slow(*given, **more):
        time.sleep(0.3)
        return urlopen(*given, **more)

    monkeypatch.setattr("urllib.request.urlopen", slow)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(load_dataset, "cifar10", str(tmp_path), 32) for _ in range(3)]
    assert [len(job.result().train) for job in jobs] == [180] * 3
    assert len(cifar.calls) == 2  # torchvision asks for the address first


def test_a_data_folder_that_is_read_only_is_named(tmp_path, monkeypatch):
    """The archive in it must be unpacked elsewhere (ildoonet/pytorch-randaugment#11)."""
    errors = RuntimeError("not found"), PermissionError(errno.EACCES, "denied", str(tmp_path))
    monkeypatch.setattr("data.datasets.CIFAR10", Mock(side_effect=errors))
    with pytest.raises(UserError, match=f"no unpacked CIFAR-10 in {tmp_path}.*read-only"):
        load_dataset("cifar10", str(tmp_path), 32)


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path, capsys):
    """A user's matplotlibrc asks for LaTeX, which is missing (matplotlib/matplotlib#17683)."""
    with matplotlib.rc_context({"text.usetex": True}), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        supernet.main([*TINY, "--epochs", "2", "--out_dir", str(tmp_path)])
    assert load_checkpoint(tmp_path / "spos_cifar10/last.pth")["epoch"] == 2
    assert capsys.readouterr().out.count("warning: plot_training failed") == 2
