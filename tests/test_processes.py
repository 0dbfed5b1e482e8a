"""Whole processes: started, interrupted and killed as users and machines do it."""

import ctypes
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import image_files

import random_search
import supernet
from conftest import ROOT, TINY, Run, noise
from utils import SEARCH_FILES, keep_freed_memory, load_checkpoint


def start(*command: object, **environment: str) -> subprocess.Popen:
    script, *flags = map(str, command)
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("limit", [2**30, 2**25])
def test_the_allocator_is_set_as_a_whole_or_not_at_all(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.35 glibc refuses an mmap threshold above 32 MiB, and to set the other one freezes it at 128 KiB."""
    calls = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            calls.append(parameter)
            return int(parameter != -3 or value <= limit)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    keep_freed_memory()
    assert calls == ([-3, -1] if limit == 2**30 else [-3])


@pytest.fixture
def streamed(tmp_path: Path) -> list[str]:
    """Flags of a training whose images are read by two workers."""
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(noise(80, 90, 3, seed=i)).save(tmp_path / name / f"{i}.jpg")
        (tmp_path / name / "bad-exif.jpg").write_bytes(image_files()["bad-exif.jpg"][0])
    flags = ["--dataset", "imagenet", "--data_dir", tmp_path, "--image_size", "72", "--batch_size", "8"]
    return [*map(str, flags), "--out_dir", str(tmp_path), "--exp_name", "net", "--workers", "2"]


def test_workers_may_be_spawned(streamed: list[str], tmp_path: Path) -> None:
    """HazyResearch/cartridges#20, belskikh/kekas#26: as on Windows and macOS; nothing starts itself again.

    IntelLabs/distiller#163: nor does every worker warn of a malformed EXIF block that nobody reads.
    """
    (tmp_path / "sitecustomize.py").write_text("import multiprocessing as m; m.set_start_method('spawn')")
    process = start("supernet.py", *streamed, "--epochs", "1", PYTHONPATH=str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.count("network") == 1 and out.count("epoch 1/1") == 1


def test_an_interrupt_leaves_no_process_and_a_whole_checkpoint(streamed: list[str], tmp_path: Path) -> None:
    """youngwanLEE/CenterMask#58, pytorch/pytorch#22924."""
    process = start("supernet.py", *streamed, "--epochs", "1000")
    while process.poll() is None and not (tmp_path / "net/last.pth").exists():
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(workers := children.read_text().split()) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=10)[1]
    assert (process.returncode, err.count("\n")) == (130, 1) and "interrupted" in err
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert load_checkpoint(tmp_path / "net/last.pth")["epoch"] >= 1


def test_every_file_name_is_portable(run: Run, search: Run) -> None:
    """isl-org/Open3D-ML#620: no time stamp with colons, nothing that differs by case alone."""
    for folder in (run.folder, search.folder):
        names = [path.name for path in folder.iterdir()]
        assert not any(set(name) & set('<>:"/\\|?* ') or name.endswith(".") for name in names)
        assert len({name.lower() for name in names}) == len(names)


def kill_twenty_times(command: list, folder: Path) -> None:
    """Starts a command that takes long, and kills it within 10 seconds; what it has written must be whole each time."""
    rng = random.Random(0)
    for _ in range(20):
        process = start(*command)
        time.sleep(rng.uniform(0, 10))
        assert process.poll() is None
        process.kill()
        process.communicate()
        for path in folder.rglob("*"):
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                Image.open(path).verify()
            elif path.suffix == ".pth":
                load_checkpoint(path)


@pytest.mark.slow
def test_a_training_that_is_killed_twenty_times_ends_as_one_that_is_not(tmp_path: Path) -> None:
    flags = [*TINY, "--out_dir", tmp_path, "--epochs", "60", "--exp_name"]
    supernet.main([*map(str, flags), "whole"])
    kill_twenty_times(["supernet.py", *flags, "killed", "--resume"], tmp_path / "killed")
    supernet.main([*map(str, flags), "killed", "--resume"])
    whole, again = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "killed"))
    assert all(torch.equal(value, again["model"][name]) for name, value in whole["model"].items())
    assert [row | {"seconds": 0} for row in whole["metrics"]] == [row | {"seconds": 0} for row in again["metrics"]]


@pytest.mark.slow
def test_a_search_that_is_killed_twenty_times_ends_as_one_that_is_not(run: Run, tmp_path: Path) -> None:
    whole, again = (tmp_path / name for name in ("whole", "killed"))
    flags = ["--ckpt", str(run.folder / "last.pth"), "--num_paths", "600", "--population", "20", "--generations", "10"]
    flags += ["--calibration_images", "250", "--search_dir"]
    random_search.main([*flags, str(whole)])
    kill_twenty_times(["random_search.py", *flags, again], again)
    random_search.main([*flags, str(again)])
    lines = [sorted((folder / "paths.csv").read_text().splitlines()) for folder in (whole, again)]
    assert lines[0] == lines[1]
    for name in SEARCH_FILES:
        if name.endswith(".png"):
            assert (whole / name).read_bytes() == (again / name).read_bytes()
