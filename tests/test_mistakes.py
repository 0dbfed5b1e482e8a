"""What users, their files and their machines do to a run: one line, nothing lost or wrong."""

import errno
import fcntl
import os
import shlex
import shutil
import sys
from dataclasses import replace
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
    """train/ and val/ of three classes, which the middle of their wide images alone tells."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for i, name in enumerate("abc"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(256, size=(12, 40, 3), dtype=np.uint8)
                pixels[:, 14:26] = 100 * i + rng.integers(40, size=(12, 12, 3))
                Image.fromarray(pixels).save(folder / f"{n:03}.png")
    return tmp_path / "images"


def folder_flags(folders, *flags):
    """A short training on these folders, in runs/net beside them."""
    where = f"--data_dir {folders} --out_dir {folders.parent}/runs --exp_name net"
    short = "--dataset folder --workers 0 --image_size 8 --batch_size 8 --epochs 1"
    return [*where.split(), *short.split(), *flags]


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
        with pytest.raises(UserError, match="another process is at work"):
            main([*flags, "--overwrite"])
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


def test_other_candidates_are_refused_everywhere(run, search, tmp_path, monkeypatch):
    """The numbers of a choice would mean other blocks."""
    names = ["shuffle5", "shuffle3", "shuffle7", "xception"]
    monkeypatch.setitem(SPACES, "spos_small", replace(SPACES["spos_small"], candidates=names))
    checkpoint, out = str(run.folder / "last.pth"), ["--out_dir", str(tmp_path)]
    for main, flags in (
        (supernet.main, [*run.flags, "--resume"]),
        (supernet.main, [*out, "--choice", str(search.folder / "search.json")]),
        (supernet.main, [*TINY, *out, "--choice", CHOICE, "--init_from", checkpoint]),
        (random_search.main, ["--ckpt", checkpoint, "--search_dir", str(tmp_path / "search")]),
    ):
        with pytest.raises(UserError, match="space_layout"):
            main(flags)


def test_skipped_files_are_logged_and_a_renamed_one_is_refused(folders):
    """A split by position would move (thumbsup/thumbsup#368, talmolab/sleap-nn#602)."""
    for n in range(3):
        (folders / f"train/b/{n:03}.png").rename(folders / f"train/b/{n:03}.jfif")
    (folders / "train/readme.txt").write_text("no class")
    shutil.rmtree(folders / "val/c")
    supernet.main(folder_flags(folders))
    text = (folders.parent / "runs/net/log.txt").read_text()
    assert f"4 files in {folders / 'train'}" in text and "of 1 classes: c" in text
    (folders / "train/a/000.png").rename(folders / "train/a/zzz.png")
    for main, flags in (
        (supernet.main, folder_flags(folders, "--resume")),
        (random_search.main, ["--ckpt", f"{folders.parent}/runs/net"]),
    ):
        with pytest.raises(UserError, match=r"net/last.pth has digest"):
            main(flags)


def test_the_readme_prepares_images_as_the_evaluation_does(folders):
    """Its code is right as often as the evaluation says (FixRes#4)."""
    supernet.main(folder_flags(folders, "--choice", CHOICE, "--epochs", "12", "--cutout", "0"))
    folder, hits, names = folders.parent / "runs/net", [], {"found": []}
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    code = code.replace("32", "8").replace("runs/spos_cifar_best", str(folder))
    load, use = code.replace("print(", "found.append(").split("image = ", 1)
    exec(load, names)
    for path in folders.glob("val/*/*.png"):
        exec("image = " + use.replace("photo.jpg", str(path)), names)
        hits.append("abc"[names["found"][-1].argmax()] == path.parent.name)
    result = utils.read_json(folder / "result.json")["test_accuracy"]
    assert 100 * np.mean(hits) == pytest.approx(result) and result > 60


def test_an_error_of_the_machine_is_one_line_and_a_bug_keeps_its_traceback():
    """(rwth-i6/returnn#1829, LeapMind/MLF-SC#41, docling-project/docling#4097)"""
    for error, said in (
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space left"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (MemoryError("Unable to allocate 36.9 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 28752000"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "smaller --batch_size"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{said}.*$"):
            utils.run_script(Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="bug"):
        utils.run_script(Mock(side_effect=RuntimeError("bug")))


@pytest.mark.parametrize("write", [utils.write_json, records.save_checkpoint])
def test_a_full_disk_leaves_the_old_file_and_names_it(write, tmp_path, monkeypatch):
    """No temporary file stays (rwth-i6/returnn#1829, RyanCodrai/turbovec#187)."""

    def full(file):
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY  # Windows refuses it
        raise OSError(errno.ENOSPC, "No space left")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left: '.*file'"):
        write(path, {"new": 2})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_process_may_lack_a_stream(name, tmp_path, monkeypatch):
    """As a service does (tqdm/tqdm#1797)."""
    monkeypatch.setattr(sys, name, None)
    supernet.main([*TINY, "--epochs", "1", "--out_dir", str(tmp_path)])
    assert (tmp_path / "spos_cifar10/last.pth").exists()


def test_a_closed_output_a_notebooks_logger_and_a_lost_plotting_backend_end_no_run(tmp_path):
    """(python/cpython#134568, googlecolab/colabtools#2998, oobabooga/textgen#6815)"""
    code = """import logging, pathlib, sys, supernet, utils
logging.basicConfig()
utils.open_log(pathlib.Path(sys.argv[1]))
for i in range(9):
    utils.log.info(i)"""
    backend = "module://matplotlib_inline.backend_inline"
    process = start("-uc", code, tmp_path / "log.txt", MPLBACKEND=backend)
    process.stdout.close()  # as `| head -1` does
    assert (process.stderr.read(), process.wait()) == ("", 0)
    assert (tmp_path / "log.txt").read_text().split() == list("012345678")


@pytest.mark.parametrize("data_dir", ["images", "~/images"])
def test_home_is_expanded_and_the_data_folder_made_absolute(data_dir, tmp_path, monkeypatch):
    """(gregreen/dustmaps#2, nerfstudio-project/nerfstudio#3485)"""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flags = ["--out_dir=~/r", f"--data_dir={data_dir}", "--init_from=~/x", "--choice=~/c"]
    args, _ = supernet.parse_args(flags)
    expected = [f"{tmp_path}/{name}" for name in ("r", "images", "x", "c")]
    assert [args.out_dir, args.data_dir, args.init_from, args.choice] == expected


@pytest.mark.parametrize("name", ["my run", "-x"])
def test_proposed_commands_can_be_pasted(name, tmp_path, capsys):
    """Also with a blank in a name, or a hyphen first (pypa/pipenv#4761)."""

    def proposed():
        """The flags after `next: python SCRIPT` in the last line."""
        return shlex.split(capsys.readouterr().out.splitlines()[-1])[3:]

    supernet.main([*TINY, "--epochs", "1", f"--out_dir={tmp_path}", f"--exp_name={name}"])
    random_search.main([*proposed(), *SHORT])
    args, _ = supernet.parse_args(proposed())
    assert (args.exp_name, args.dataset, len(args.choice)) == (f"{name}_best", "digits", 39)


def test_a_wrong_value_is_named_with_its_limits(capsys):
    """Also if it is in another unit (megvii-model/SinglePathOneShot#13)."""
    for script, flags, said in (
        (supernet, "--learning_rate nan", "nan is not between 0 and 1000000000"),
        (supernet, "--epochs many", "invalid int value"),
        (random_search, "--max_flops 170000000", "not between 0 and 100000"),
    ):
        with pytest.raises(SystemExit):
            script.build_parser().parse_args(flags.split())
        assert said in capsys.readouterr().err


def test_an_unfinished_supernet_is_noticed(run, tmp_path, capsys):
    content = torch.load(run.folder / "last.pth")
    content["args"]["epochs"] = 50
    torch.save(content, tmp_path / "last.pth")
    random_search.main(["--ckpt", str(tmp_path), *SHORT])
    assert "warning: this supernet is unfinished" in capsys.readouterr().out
