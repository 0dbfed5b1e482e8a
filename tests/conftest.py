"""Shared by all tests: the CPU, one thread, a small run and search that many of them look at, and a tiny CIFAR-10."""

import hashlib
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

import random_search
import supernet
from data.records import read_rows

# Here and in the processes that tests start: batches are so small that a second thread only waits, on a busy machine 10
# to 100 times as long, and rounding, which hardly trained networks magnify, must be the same everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A suite that runs in the background ignores Ctrl-C, and so would the processes that it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "digits", "--image_size", "8", "--batch_size", "128"]
TIMEOUT = 600  # seconds; a process that takes that long hangs, however busy the machine is


class Run(NamedTuple):
    """A finished run: its folder and the flags that made it."""

    folder: Path
    flags: list[str]


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs, whose rounding is not reproducible, from all but the tests that are asked for by file."""
    if not any("test_cuda" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of a supernet on 8-pixel digits."""
    out = tmp_path_factory.mktemp("runs")
    flags = [*TINY, "--out_dir", str(out), "--exp_name", "tiny", "--epochs", "2"]
    supernet.main(flags)
    return Run(out / "tiny", flags)


@pytest.fixture(scope="session")
def search(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve random paths of that supernet, scored in groups of 5."""
    folder = tmp_path_factory.mktemp("search")
    flags = [
        "--ckpt",
        str(run.folder / "last.pth"),
        "--search_dir",
        str(folder),
        "--num_paths",
        "12",
    ]
    flags += ["--calibration_images", "250", "--top_k", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_search, "GROUP", 5)
        random_search.main(flags)
    return Run(folder, flags)


def start(*command: object, **environment: str) -> subprocess.Popen:
    """Starts Python with these arguments in the repository's folder."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_same_record(ours: Path, theirs: Path) -> None:
    """Two searches scored the same; in a group of another size a loss may be rounded otherwise."""
    for row, other in zip(
        *(read_rows(folder / "paths.csv") for folder in (ours, theirs)), strict=True
    ):
        assert (row.loss, row.half_loss) == pytest.approx((other.loss, other.half_loss), rel=1e-5)
        assert replace(row, loss=0, half_loss=0) == replace(other, loss=0, half_loss=0)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Response(io.BytesIO):
    """What urlopen returns; once its content is read it ends, or breaks off with an exception."""

    def __init__(self, url: str, content: bytes, end: BaseException | None):
        super().__init__(content)
        self.url, self.length, self.end = url, len(content), end

    def read(self, size: int = -1) -> bytes:
        chunk = super().read(size)
        if not chunk and self.end:
            raise self.end
        return chunk


class Cifar:
    """A CIFAR-10 of 6 x 40 images of noise in torchvision's layout, and the network that it might be fetched over."""

    def __init__(self, folder: Path):
        self.files, self.images, self.labels = {}, {}, {}
        for i, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
            self.images[name], self.labels[name] = (
                noise(40, 3072, seed=i),
                [(n * 7 + i) % 10 for n in range(40)],
            )
            self.files[name] = pickle.dumps(
                {"data": self.images[name], "labels": self.labels[name]}
            )
        self.files["batches.meta"] = pickle.dumps(
            {"label_names": [f"class {i}" for i in range(10)]}
        )
        for name, content in self.files.items():
            (folder / CIFAR10.base_folder).mkdir(exist_ok=True)
            (folder / CIFAR10.base_folder / name).write_bytes(content)
        with tarfile.open(folder / CIFAR10.filename, "w:gz", compresslevel=1) as tar:
            tar.add(folder / CIFAR10.base_folder, CIFAR10.base_folder)
        self.source, self.archive = folder, (folder / CIFAR10.filename).read_bytes()
        sums = {name: hashlib.md5(content).hexdigest() for name, content in self.files.items()}
        self.attributes = {  # what torchvision's class must have to take this for the real one
            "tgz_md5": hashlib.md5(self.archive).hexdigest(),
            "train_list": [[f"data_batch_{n}", sums[f"data_batch_{n}"]] for n in range(1, 6)],
            "test_list": [["test_batch", sums["test_batch"]]],
            "meta": CIFAR10.meta | {"md5": sums["batches.meta"]},
        }

    def install(self, root: Path, archive: bool, folder: bool) -> None:
        if archive:
            (root / CIFAR10.filename).write_bytes(self.archive)
        if folder:
            shutil.copytree(self.source / CIFAR10.base_folder, root / CIFAR10.base_folder)

    def urlopen(self, request, *_, **__) -> Response:
        self.calls.append(request.full_url)
        if self.served is None:
            raise urllib.error.URLError("no route to host")
        return Response(request.full_url, self.served, self.end)


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
