"""Own candidate blocks, own folders and other machines: whatever keeps the contract works."""

import errno
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import filelock
import matplotlib
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
from utils import UserError

CPU = torch.device("cpu")
ALONE = ["--choice", "0-0-0"]


class Own(nn.Module):
    """A candidate with a scalar, kernels of 1x7 and 7x1, InstanceNorm and dropout."""

    def __init__(self, inputs: int, outputs: int, stride: int, affine: bool):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.5))
        wide = nn.Conv2d(inputs, outputs, (1, 7), stride, padding=(0, 3), bias=False)
        high = nn.Conv2d(outputs, outputs, (7, 1), padding=(3, 0), bias=False)
        norm = nn.InstanceNorm2d(outputs, track_running_stats=True)
        self.main = nn.Sequential(wide, high, norm, nn.Dropout2d(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.main(x) * self.gate
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
    torch.rand(7)
    again = train(tmp_path / "b", "--epochs", "2", "--resume")["model"]
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_kernels_of_any_shape_begin_as_a_copy_in_their_centre(space):
    """(PaddlePaddle/PaddleSlim#969, cosmic-cortex/neural-networks-from-scratch#1)"""
    main = Supernet(10, 8, space=space).layers[0]["own"].main
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


BROKEN = [
    ("no_stride", lambda inputs, outputs, *_: nn.Conv2d(inputs, outputs, 1), "layer 1: .*, not"),
    ("in_place", lambda *_: nn.ReLU(inplace=True), "layer 0: it changes its input"),
    ("wrong_width", lambda *_: nn.Conv2d(7, 8, 1), "layer 0: .*channels"),
    ("raises", lambda *_: nn.Conv2d(8, 8, 1, groups=7), "layer 0: in_channels must be divisible"),
    ("mb3.5", lambda *_: nn.Identity(), "layer 0: .*can't contain"),
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
