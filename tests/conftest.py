"""Shared by all tests: one thread, no GPU, a small run and its search, and a tiny CIFAR-10."""

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

import random_search
import supernet
from data.records import read_rows

# Also in the processes that tests start: batches are so small that a second thread only waits, and
# rounding, which hardly trained networks magnify, must be the same everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A suite that runs in the background ignores Ctrl-C, and so would the processes that it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
TINY = "--dataset digits --image_size 8 --batch_size 128".split()
TIMEOUT = 600  # seconds; a process that takes that long hangs, however busy the machine is
Run = namedtuple("Run", "folder flags")  # a finished run and the flags that made it


def pytest_configure(config):
    """Hides the GPUs, whose rounding is not reproducible, unless test_cuda.py is named."""
    if not any("test_cuda" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Two epochs of a supernet on 8-pixel digits."""
    out = tmp_path_factory.mktemp("runs")
    flags = [*TINY, "--out_dir", str(out), "--exp_name", "tiny", "--epochs", "2"]
    supernet.main(flags)
    return Run(out / "tiny", flags)


@pytest.fixture(scope="session")
def search(run, tmp_path_factory):
    """Twelve random paths of that supernet, scored in groups of 5."""
    folder = tmp_path_factory.mktemp("search")
    flags = ["--ckpt", str(run.folder / "last.pth"), "--search_dir", str(folder)]
    flags += "--num_paths 12 --calibration_images 250 --top_k 3".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_search, "GROUP", 5)
        random_search.main(flags)
    return Run(folder, flags)


def start(*command: object, **environment: str) -> subprocess.Popen:
    """Starts Python with these arguments in the repository's folder."""
    command, env = [sys.executable, *map(str, command)], os.environ | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def assert_same_record(ours: Path, theirs: Path) -> None:
    """Two searches scored the same; the size of the groups may change the rounding of a loss."""
    rows, others = (read_rows(folder / "paths.csv") for folder in (ours, theirs))
    for row, other in zip(rows, others, strict=True):
        assert (row.loss, row.half_loss) == pytest.approx((other.loss, other.half_loss), rel=1e-5)
        assert replace(row, loss=0, half_loss=0) == replace(other, loss=0, half_loss=0)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Cifar:
    """A CIFAR-10 of 6 x 40 images of noise in torchvision's layout, and its download."""

    def __init__(self, folder: Path):
        self.extracted, self.images, self.labels = folder / CIFAR10.base_folder, {}, {}
        self.extracted.mkdir()
        files = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
        for i, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
            self.images[name] = noise(40, 3072, seed=i)
            self.labels[name] = [(n * 7 + i) % 10 for n in range(40)]
            files[name] = {"data": self.images[name], "labels": self.labels[name]}
        sums = {}
        for name, content in files.items():
            (self.extracted / name).write_bytes(pickle.dumps(content))
            sums[name] = hashlib.md5(pickle.dumps(content)).hexdigest()
        archive = shutil.make_archive(folder / "cifar", "gztar", folder, CIFAR10.base_folder)
        self.archive = Path(archive).read_bytes()
        self.attributes = {  # what torchvision's class must have to take this for the real one
            "tgz_md5": hashlib.md5(self.archive).hexdigest(),
            "train_list": [[name, sums[name]] for name in sums if name.startswith("data")],
            "test_list": [["test_batch", sums["test_batch"]]],
            "meta": CIFAR10.meta | {"md5": sums["batches.meta"]},
        }

    def install(self, root: Path, archive: bool, folder: bool) -> None:
        if archive:
            (root / CIFAR10.filename).write_bytes(self.archive)
        if folder:
            shutil.copytree(self.extracted, root / CIFAR10.base_folder)

    def urlopen(self, request, **_) -> MagicMock:
        """A response whose content ends, or breaks off with an exception."""
        self.calls.append(request.full_url)
        if self.served is None:
            raise urllib.error.URLError("no route to host")
        response = MagicMock(url=request.full_url, length=len(self.served))
        response.__enter__.return_value = response
        response.read.side_effect = [self.served, self.end or b""]
        return response


@pytest.fixture(scope="session")
def tiny_cifar(tmp_path_factory):
    return Cifar(tmp_path_factory.mktemp("cifar"))


@pytest.fixture
def cifar(tiny_cifar, monkeypatch):
    """The tiny CIFAR-10 with its checksums in torchvision's class and no network."""
    for name, value in tiny_cifar.attributes.items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.setattr(urllib.request, "urlopen", tiny_cifar.urlopen)
    tiny_cifar.calls, tiny_cifar.served, tiny_cifar.end = [], None, None
    return tiny_cifar
