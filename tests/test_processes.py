"""Whole processes: started, interrupted and killed as users and machines do it."""

import contextlib
import ctypes
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import random_search
import supernet
from conftest import TIMEOUT, TINY, assert_same_record, noise, start
from data.records import load_checkpoint
from utils import keep_freed_memory


@pytest.mark.parametrize(("limit", "set_in_turn"), [(2**30, [-3, -1]), (2**25, [-3])])
def test_the_allocator_is_set_as_a_whole_or_not_at_all(limit, set_in_turn, monkeypatch):
    """glibc before 2.35 refuses an mmap threshold above 32 MiB; the other one alone freezes it."""
    calls = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            calls.append(parameter)
            return int(parameter != -3 or value <= limit)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    keep_freed_memory()
    assert calls == set_in_turn


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
    assert (process.returncode, err.count("\n"), len(workers)) == (130, 1, 2)
    assert "interrupted" in err
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert load_checkpoint(tmp_path / "net/last.pth")["epoch"] >= 1


def test_every_file_name_is_portable(run, search):
    """No time stamp with colons, no names that differ by case alone (isl-org/Open3D-ML#620)."""
    for folder in (run.folder, search.folder):
        names = [path.name for path in folder.iterdir()]
        assert not any(set(name) & set('<>:"/\\|?* ') or name.endswith(".") for name in names)
        assert len({name.lower() for name in names}) == len(names)


def kill_until_it_ends(command: list, folder: Path) -> None:
    """Starts a command up to 20 times and kills it within 10 seconds; its files must be whole."""
    rng = random.Random(0)
    for kills in range(20):
        process = start(*command)
        time.sleep(rng.uniform(0, 10))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            assert kills > 2
            return
        for path in folder.rglob("*"):
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                Image.open(path).verify()
            elif path.suffix == ".pth":
                load_checkpoint(path)


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    flags = [*TINY, "--out_dir", str(tmp_path), "--epochs", "60", "--exp_name"]
    supernet.main([*flags, "whole"])
    kill_until_it_ends(["supernet.py", *flags, "killed", "--resume"], tmp_path / "killed")
    supernet.main([*flags, "killed", "--resume"])
    whole, again = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "killed"))
    torch.testing.assert_close(again["model"], whole["model"], rtol=0, atol=0)
    for row in whole["metrics"] + again["metrics"]:
        row["seconds"] = 0
    assert whole["metrics"] == again["metrics"]


@pytest.mark.slow
def test_a_search_that_is_killed_again_and_again_ends_as_one_that_is_not(run, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "killed"
    flags = "--num_paths 200 --population 20 --generations 5 --calibration_images 250 --search_dir"
    flags = ["--ckpt", str(run.folder), *flags.split()]
    random_search.main([*flags, str(whole)])
    kill_until_it_ends(["random_search.py", *flags, again], again)
    random_search.main([*flags, str(again)])
    assert_same_record(again, whole)
