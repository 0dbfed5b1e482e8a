"""What users, their files and their machines do to a run: one line, nothing lost or wrong."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import random_search
import supernet
import utils
from conftest import ROOT, TINY, start
from data import records
from model import SPACES
from utils import UserError

CHOICE = "-".join("0123" * 5)
SHORT = "--num_paths 1 --calibration_images 9 --top_k 1".split()


@pytest.fixture
def folders(tmp_path):
    """train/ and val/ of three classes that differ in their brightness."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for i, name in enumerate("abc"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(80 * i, 80 * i + 60, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n:03}.png")
    return tmp_path / "images"


def folder_flags(folders, *flags):
    """A short training on these folders."""
    where = ["--data_dir", str(folders), "--out_dir", str(folders.parent / "runs")]
    short = "--dataset folder --workers 0 --image_size 8 --batch_size 8 --epochs 1".split()
    return [*where, *short, *flags]


def contents(folder):
    return {path: path.read_bytes() for path in folder.glob("*.*")}


def test_a_locked_folder_is_refused_until_its_owner_is_dead(run, search):
    """Two processes never write to one folder (openml/automlbenchmark#691)."""
    code = """import pathlib, sys, time, utils
with utils.locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)"""
    cases = [(supernet.main, run, ["--resume"]), (random_search.main, search, [])]
    for main, (folder, flags), resume in cases:
        owner = start("-c", code, folder)
        owner.stdout.readline()
        before = contents(folder)
        for more in ([], ["--overwrite"]):
            with pytest.raises(UserError, match="another process is at work"):
                main([*flags, *more])
        assert before == contents(folder)
        owner.kill()
        owner.communicate()
        main([*flags, *resume])


def test_runs_and_searches_never_share_a_folder(run, search):
    """Neither deletes the files of the other (isaacovercast/easySFS#34)."""
    before = contents(run.folder)
    flags = ["--ckpt", str(run.folder), "--search_dir", str(run.folder), "--overwrite"]
    with pytest.raises(UserError, match="folder of a run"):
        random_search.main(flags)
    assert before == contents(run.folder)
    where = ["--out_dir", str(search.folder.parent), "--exp_name", search.folder.name]
    with pytest.raises(UserError, match="folder of a search"):
        supernet.main([*TINY, *where, "--overwrite"])


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_results_without_a_checkpoint_are_not_deleted_unasked(flags, tmp_path):
    """The checkpoint may have been removed to save space."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.csv").write_text("mine")
    with pytest.raises(UserError, match=r"metrics\.csv exists.*--overwrite deletes"):
        supernet.main([*TINY, "--out_dir", str(tmp_path), "--exp_name", "old", *flags])
    assert (tmp_path / "old" / "metrics.csv").read_text() == "mine"


def test_other_candidates_are_refused_everywhere(run, search, tmp_path, monkeypatch):
    """The numbers of a choice would mean other blocks."""
    space = replace(
        SPACES["spos_small"], candidates=["shuffle5", "shuffle3", "shuffle7", "xception"]
    )
    monkeypatch.setitem(SPACES, "spos_small", space)
    checkpoint, found = str(run.folder / "last.pth"), str(search.folder / "search.json")
    out = ["--out_dir", str(tmp_path)]
    for main, flags in (
        (supernet.main, [*run.flags, "--resume"]),
        (supernet.main, [*out, "--choice", found]),
        (supernet.main, [*TINY, *out, "--choice", CHOICE, "--init_from", checkpoint]),
        (random_search.main, ["--ckpt", checkpoint, "--search_dir", str(tmp_path / "search")]),
    ):
        with pytest.raises(UserError, match="space_layout"):
            main(flags)


@pytest.mark.parametrize("renamed", ["train", "search"])
def test_changed_data_is_refused(folders, renamed):
    """A split by position would move when a file is renamed (talmolab/sleap-nn#602)."""
    flags = folder_flags(folders, "--exp_name", "split")
    supernet.main(flags)
    checkpoint = folders.parent / "runs" / "split" / "last.pth"
    dataset = supernet.load_dataset("folder", str(folders), 72)
    file = Path(getattr(dataset, renamed).images[0])
    file.rename(file.with_stem("zzz"))
    with pytest.raises(UserError, match=r"split/last.pth has digest"):
        supernet.main([*flags, "--resume"])
    with pytest.raises(UserError, match=r"split/last.pth has digest"):
        random_search.main(["--ckpt", str(checkpoint)])


def test_skipped_files_and_missing_classes_are_logged(folders):
    """The number of files and the names of the classes (thumbsup/thumbsup#368)."""
    for n in range(3):
        file = folders / "train" / "b" / f"{n:03}.png"
        file.rename(file.with_suffix(".jfif"))
    (folders / "train" / "readme.txt").write_text("no class")
    shutil.rmtree(folders / "val" / "c")
    supernet.main(folder_flags(folders))
    text = (folders.parent / "runs" / "spos_cifar10" / "log.txt").read_text()
    assert "30 train, 3 search" in text and f"4 files in {folders / 'train'}" in text
    assert "of 1 classes: c" in text


def test_the_readme_prepares_images_as_the_evaluation_does(folders):
    """Wide images whose middle alone tells the class (FixRes#4)."""
    rng = np.random.default_rng(0)
    for path in folders.glob("*/*/*.png"):
        pixels = rng.integers(0, 256, (12, 40, 3), dtype=np.uint8)
        middle = rng.integers(0, 40, (12, 12, 3))
        pixels[:, 14:26] = "abc".index(path.parent.name) * 100 + middle
        Image.fromarray(pixels).save(path)
    alone = ["--exp_name", "alone", "--choice", CHOICE, "--epochs", "12", "--cutout", "0"]
    supernet.main(folder_flags(folders, *alone))
    folder = folders.parent / "runs" / "alone"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert "photo.jpg" in code and "32" in code
    code = code.replace("32", "8").replace("runs/spos_cifar_best", str(folder))
    load, use = code.replace("print(", "found.append(").split("image = ", 1)
    names = {"found": []}
    exec(load, names)
    paths = sorted(folders.glob("val/*/*.png"))
    for path in paths:
        exec("image = " + use.replace("photo.jpg", str(path)), names)
    found = ["abc"[p.argmax().item()] for p in names["found"]]
    hits = [name == path.parent.name for name, path in zip(found, paths, strict=True)]
    result = json.loads((folder / "result.json").read_text())["test_accuracy"]
    assert 100 * np.mean(hits) == pytest.approx(result) and result > 60


ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space left"),
    (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "File name too long"),
    (MemoryError("Unable to allocate 36.9 GiB"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 28752000000"), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), "smaller --batch_size"),
]


@pytest.mark.parametrize(("error", "said"), ERRORS)
def test_an_error_of_the_machine_is_one_line(error, said):
    """(rwth-i6/returnn#1829, LeapMind/MLF-SC#41, docling-project/docling#4097)"""
    with pytest.raises(SystemExit, match=f"^error: .*{said}.*$"):
        utils.run_script(Mock(side_effect=error))


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        utils.run_script(Mock(side_effect=error))


@pytest.mark.parametrize("write", [utils.write_json, records.save_checkpoint])
def test_a_full_disk_leaves_the_old_file_and_names_it(write, tmp_path, monkeypatch):
    """No temporary file stays (rwth-i6/returnn#1829)."""
    path = tmp_path / "file"
    write(path, {"old": 1})
    before = path.read_bytes()
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left: '.*file'"):
        write(path, {"new": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_process_may_lack_a_stream(name, tmp_path, monkeypatch):
    """As a service does (tqdm/tqdm#1797)."""
    monkeypatch.setattr(sys, name, None)
    supernet.main([*TINY, "--epochs", "1", "--out_dir", str(tmp_path)])
    assert (tmp_path / "spos_cifar10" / "last.pth").exists()


def test_a_closed_output_ends_no_run(tmp_path):
    """The log file goes on, as after `| head -1` (python/cpython#134568)."""
    code = """import pathlib, utils
utils.open_log(pathlib.Path("log.txt"))
for i in range(9):
    utils.log.info(i)"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-uc", code]
    pipes = {"stdout": write, "stderr": subprocess.PIPE}
    result = subprocess.run(command, cwd=tmp_path, env=env, **pipes)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "log.txt").read_text().split() == list("012345678")


def test_a_notebooks_plotting_backend_may_be_missing():
    """(oobabooga/textgen#6815)"""
    process = start("img/plots.py", "--help", MPLBACKEND="module://nowhere.backend")
    process.communicate()
    assert process.returncode == 0


def test_home_is_expanded_and_the_data_folder_recorded_as_absolute(folders, monkeypatch):
    """(gregreen/dustmaps#2, nerfstudio-project/nerfstudio#3485)"""
    monkeypatch.setenv("HOME", str(folders.parent))
    flags = ["--out_dir=~/r", "--data_dir=~/images", "--init_from=~/x", "--choice", CHOICE]
    args, _ = supernet.parse_args(flags)
    expected = [f"{folders.parent}/{name}" for name in ("r", "images", "x")]
    assert [args.out_dir, args.data_dir, args.init_from] == expected
    monkeypatch.chdir(folders.parent)
    supernet.main([*folder_flags(folders, "--exp_name", "here"), "--data_dir", "images"])
    checkpoint = records.load_checkpoint(Path("runs/here/last.pth"))
    assert checkpoint["args"]["data_dir"] == str(folders)


@pytest.mark.parametrize("name", ["my run", "-x"])
def test_proposed_commands_can_be_pasted(name, tmp_path, capsys):
    """Also with a blank in a name, or a hyphen first (pypa/pipenv#4761)."""

    def proposed():
        line = capsys.readouterr().out.splitlines()[-1]
        return shlex.split(line.removeprefix("next: "))

    flags = ["--batch_size", "1197", "--epochs", "1", "--out_dir", str(tmp_path)]
    supernet.main([*TINY, *flags, f"--exp_name={name}"])
    python, script, *flags = proposed()
    assert (python, script) == ("python", "random_search.py")
    random_search.main([*flags, *SHORT])
    args, _ = supernet.parse_args(proposed()[2:])
    assert args.exp_name == f"{name}_best" and args.dataset == "digits"
    assert len(args.choice) == 39


LIMITS = [
    (supernet, "--learning_rate nan", "nan is not between 0 and 1e+09"),
    (supernet, "--epochs 0", "0 is not between 1"),
    (supernet, "--epochs many", "invalid int value"),
    (random_search, "--max_flops 170000000", "not between 0 and 100000"),
    (random_search, "--max_flops inf", "inf is not between"),
]


@pytest.mark.parametrize(("script", "flags", "said"), LIMITS)
def test_a_wrong_value_is_named_with_its_limits(script, flags, said, capsys):
    """Also if it is in another unit (megvii-model/SinglePathOneShot#13)."""
    with pytest.raises(SystemExit) as exit:
        script.build_parser().parse_args(flags.split())
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_weight_decay_may_be_written_with_a_hyphen():
    """As in ShunLu91/Single-Path-One-Shot-NAS."""
    assert supernet.parse_args(["--weight-decay", "0.5"])[0].weight_decay == 0.5


def test_an_unfinished_supernet_is_noticed(run, tmp_path, capsys):
    content = torch.load(run.folder / "last.pth")
    content["args"]["epochs"] = 50
    torch.save(content, tmp_path / "last.pth")
    random_search.main(["--ckpt", str(tmp_path), *SHORT])
    said = capsys.readouterr().out
    assert "2 of 50 epochs" in said and "unfinished" in said
