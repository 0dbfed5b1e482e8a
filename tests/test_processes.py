"""Whole processes: started, interrupted and killed as users and machines do it."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import time
from multiprocessing.resource_sharer import DupFd
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import random_search
from conftest import TIMEOUT, assert_same_record, noise, start
from data.images import quiet_worker
from data.records import load_checkpoint
from utils import keep_freed_memory, read_json


@pytest.mark.parametrize(("accepted", "set_in_turn"), [(1, [-3, -1]), (0, [-3])])
def test_the_allocator_is_set_as_a_whole_or_not_at_all(accepted, set_in_turn, monkeypatch):
    """glibc before 2.35 refuses an mmap threshold above 32 MiB; the other one alone freezes it."""
    library = Mock()
    library.mallopt.return_value = accepted
    monkeypatch.setattr(ctypes, "CDLL", Mock(return_value=library))
    keep_freed_memory()
    assert [call.args for call in library.mallopt.mock_calls] == [(p, 2**30) for p in set_in_turn]


@pytest.fixture
def streamed(tmp_path) -> list[str]:
    """A training whose images are read by two workers."""
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(noise(80, 90, 3, seed=i)).save(tmp_path / name / f"{i}.jpg")
    flags = f"--dataset imagenet --data_dir {tmp_path} --image_size 72 --batch_size 8 --workers 2"
    return ["supernet.py", *flags.split(), "--out_dir", str(tmp_path), "--exp_name", "net"]


def test_workers_may_be_spawned(streamed, tmp_path):
    """As on Windows and macOS; the script does not start itself again (belskikh/kekas#26)."""
    code = "import multiprocessing as m; m.set_start_method('spawn')"
    (tmp_path / "sitecustomize.py").write_text(code)
    process = start(*streamed, "--epochs", "1", PYTHONPATH=str(tmp_path))
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (0, "")
    assert out.count("network") == out.count("epoch 1/1") == 1


def test_an_interrupt_leaves_no_process_and_a_whole_checkpoint(streamed, tmp_path):
    """A worker is waiting for a file (youngwanLEE/CenterMask#58, pytorch/pytorch#22924)."""
    process, file = start(*streamed, "--epochs", "1000"), tmp_path / "train/a/1.jpg"
    while process.poll() is None and not (tmp_path / "net/last.pth").exists():
        time.sleep(0.05)
    os.mkfifo(tmp_path / "pipe")
    os.replace(tmp_path / "pipe", file)
    pipe = None
    while process.poll() is None and pipe is None:
        time.sleep(0.05)
        with contextlib.suppress(OSError):  # as long as nobody reads
            pipe = os.open(file, os.O_WRONLY | os.O_NONBLOCK)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=TIMEOUT)[1]
    os.close(pipe)
    said = "interrupted; what was completed is saved\n"
    assert (process.returncode, err, len(workers)) == (130, said, 2)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert load_checkpoint(tmp_path / "net/last.pth")["epoch"] >= 1


def test_a_batch_that_an_interrupt_cuts_off_prints_nothing(capfd):
    """As when it meets the handover of a batch: the reader connects to the worker and is gone."""
    loader = DataLoader(Addresses(), None, num_workers=1, worker_init_fn=quiet_worker)
    for address in loader:
        for _ in range(2):  # the worker greets the second one when it has done with the first
            with socket.socket(socket.AF_UNIX) as reader:
                reader.connect(address)
                assert reader.recv(4)
    assert capfd.readouterr().err == ""


class Addresses(Dataset):
    """The address at which a worker hands over its batches."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        return DupFd(1)._id[0]


@pytest.mark.slow
def test_a_search_that_is_killed_again_and_again_ends_as_one_that_is_not(run, tmp_path):
    """After every kill its files are whole."""
    whole, again = tmp_path / "whole", tmp_path / "killed"
    flags = "--num_paths 200 --population 20 --generations 5 --calibration_images 250 --search_dir"
    flags = ["--ckpt", str(run.folder), *flags.split()]
    random_search.main([*flags, str(whole)])
    rng, codes = random.Random(0), []
    while 0 not in codes and len(codes) < 20:
        process = start("random_search.py", *flags, again)
        time.sleep(rng.uniform(0, 10))
        process.kill()
        process.communicate()
        codes.append(process.returncode)
        for path in again.glob("*.json"):
            read_json(path)
        for path in again.glob("*.png"):
            Image.open(path).verify()
    assert len(codes) > 3
    random_search.main([*flags, str(again)])
    assert_same_record(again, whole)
