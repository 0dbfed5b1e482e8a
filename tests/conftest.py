"""Shared by all tests: two threads, and one small run and search that many of them look at."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import random_search
import supernet

ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "digits", "--image_size", "8", "--batch_size", "128"]


class Run(NamedTuple):
    """A finished run: its folder and the flags that made it."""

    folder: Path
    flags: list[str]


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


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
    flags = ["--ckpt", str(run.folder / "last.pth"), "--search_dir", str(folder), "--num_paths", "12"]
    flags += ["--calibration_images", "250", "--top_k", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_search, "GROUP", 5)
        random_search.main(flags)
    return Run(folder, flags)
