"""What users, their files and their machines do to a run: one line, nothing lost or wrong."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import random_search
import supernet
import utils
from blocks import CANDIDATES
from conftest import ROOT, TINY, Run
from data import records
from data.records import read_csv
from utils import UserError

CHOICE = "-".join("0123" * 5)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """train/ and val/ of three classes that differ in their brightness."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for i, name in enumerate("abc"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(80 * i, 80 * i + 60, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{n:03}.png")
    return tmp_path / "images"


def folder_flags(folders: Path, *flags: str) -> list[str]:
    """A short training on these folders."""
    where = ["--dataset", "folder", "--data_dir", str(folders), "--workers", "0"]
    where += ["--out_dir", str(folders.parent / "runs")]
    return [*where, "--image_size", "8", "--batch_size", "8", "--epochs", "1", *flags]


def test_a_locked_folder_is_refused_until_its_owner_is_dead(run: Run, search: Run) -> None:
    """Two processes never write to one folder (openml/automlbenchmark#691)."""
    code = """import pathlib, sys, time, utils
with utils.locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)"""
    for main, flags, folder in (
        (supernet.main, [*run.flags, "--resume"], run.folder),
        (random_search.main, search.flags, search.folder),
    ):
        command = [sys.executable, "-c", code, folder]
        owner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        owner.stdout.readline()
        before = {path: path.read_bytes() for path in folder.glob("*.*")}
        for more in ([], ["--overwrite"]):
            with pytest.raises(UserError, match="another process is at work"):
                main([flag for flag in flags if flag != "--resume"] + more)
        assert before == {path: path.read_bytes() for path in folder.glob("*.*")}
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
        main(flags)


def test_runs_and_searches_never_share_a_folder(run: Run, search: Run) -> None:
    """Neither deletes the files of the other (isaacovercast/easySFS#34)."""
    before = {path: path.read_bytes() for path in run.folder.glob("*.*")}
    flags = ["--ckpt", str(run.folder), "--search_dir", str(run.folder), "--overwrite"]
    with pytest.raises(UserError, match="folder of a run"):
        random_search.main(flags)
    assert before == {path: path.read_bytes() for path in run.folder.glob("*.*")}
    where = ["--out_dir", str(search.folder.parent), "--exp_name", search.folder.name]
    with pytest.raises(UserError, match="folder of a search"):
        supernet.main([*TINY, *where, "--overwrite"])


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_results_without_a_checkpoint_are_not_deleted_unasked(
    flags: list[str], tmp_path: Path
) -> None:
    """Its checkpoint may have been removed to save room."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.csv").write_text("mine")
    with pytest.raises(UserError, match=r"metrics\.csv exists.*--overwrite deletes"):
        supernet.main([*TINY, "--out_dir", str(tmp_path), "--exp_name", "old", *flags])
    assert (tmp_path / "old" / "metrics.csv").read_text() == "mine"


def test_other_candidates_are_refused_everywhere(
    run: Run, search: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of a choice would mean other blocks."""
    monkeypatch.setitem(CANDIDATES, "extra", CANDIDATES["shuffle3"])
    checkpoint, found = str(run.folder / "last.pth"), str(search.folder / "search.json")
    for main, flags in (
        (supernet.main, [*run.flags, "--resume"]),
        (supernet.main, ["--choice", found]),
        (supernet.main, [*TINY, "--choice", CHOICE, "--init_from", checkpoint]),
        (random_search.main, ["--ckpt", checkpoint, "--search_dir", str(tmp_path / "search")]),
    ):
        more = ["--out_dir", str(tmp_path)] if "--choice" in flags else []
        with pytest.raises(UserError, match="candidates"):
            main([*flags, *more])


@pytest.mark.parametrize("renamed", ["train", "search"])
def test_changed_data_is_refused(folders: Path, renamed: str) -> None:
    """A split by position would move when a file is renamed (talmolab/sleap-nn#602)."""
    flags = folder_flags(folders, "--exp_name", "split")
    supernet.main(flags)
    checkpoint = folders.parent / "runs" / "split" / "last.pth"
    dataset = supernet.load_dataset("folder", str(folders), 72)
    file = Path(getattr(dataset, renamed).images[0])
    file.rename(file.with_stem("zzz"))
    for main, again in (
        (supernet.main, [*flags, "--resume"]),
        (random_search.main, ["--ckpt", str(checkpoint)]),
    ):
        with pytest.raises(UserError, match=r"split/last.pth has digest"):
            main(again)


def test_skipped_files_and_missing_classes_are_logged(folders: Path) -> None:
    """One line with the number of files, one with the classes (thumbsup/thumbsup#368)."""
    for n in range(3):
        file = folders / "train" / "b" / f"{n:03}.png"
        file.rename(file.with_suffix(".jfif"))
    (folders / "train" / "readme.txt").write_text("no class")
    shutil.rmtree(folders / "val" / "c")
    supernet.main(folder_flags(folders))
    text = (folders.parent / "runs" / "spos_cifar10" / "log.txt").read_text()
    assert "30 train, 3 search" in text and f"4 files in {folders / 'train'}" in text
    assert "of 1 classes: c" in text


def test_the_readme_prepares_images_as_the_evaluation_does(folders: Path) -> None:
    """On images that are no squares: only their middle tells the class (FixRes#4)."""
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
    load, use = code.replace("print(", "found.append(").split("image = ")
    names = {"found": []}
    exec(load, names)
    paths = sorted(folders.glob("val/*/*.png"))
    for path in paths:
        exec("image = " + use.replace("photo.jpg", str(path)), names)
    truth = ["abc".index(path.parent.name) for path in paths]
    hits = [p.argmax().item() == n for p, n in zip(names["found"], truth, strict=True)]
    result = json.loads((folder / "result.json").read_text())["test_accuracy"]
    assert 100 * np.mean(hits) == pytest.approx(result) and result > 60


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space left"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "File name too long"),
        (MemoryError("Unable to allocate 36.9 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 28752000000"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "smaller --batch_size"),
    ],
)
def test_a_refusal_of_the_machine_is_one_line(error: Exception, said: str) -> None:
    """rwth-i6/returnn#1829, LeapMind/MLF-SC#41, docling-project/docling#4097."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match=f"^error: .*{said}.*$"):
        utils.run_script(main)


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        utils.run_script(main)


@pytest.mark.parametrize("write", [utils.write_json, records.save_checkpoint])
def test_a_full_disk_leaves_the_old_file_and_names_it(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written stays (rwth-i6/returnn#1829)."""
    path = tmp_path / "file"
    write(path, {"old": 1})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        write(path, {"new": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_missing_stream_is_no_obstacle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service has none (tqdm/tqdm#1797)."""
    monkeypatch.setattr(sys, name, None)
    supernet.main([*TINY, "--epochs", "1", "--out_dir", str(tmp_path)])
    assert (tmp_path / "spos_cifar10" / "last.pth").exists()


def test_a_closed_output_ends_no_run(tmp_path: Path) -> None:
    """The log goes on in its file (python/cpython#134568: `| head -1`)."""
    code = """import pathlib, utils
utils.open_log(pathlib.Path("log.txt"))
for i in range(9):
    utils.log.info(i)"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-uc", code], cwd=tmp_path, env=env, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "log.txt").read_text().split() == list("012345678")


def test_the_backend_of_a_notebook_is_no_obstacle() -> None:
    """It may not be installed (oobabooga/textgen#6815)."""
    env = os.environ | {"MPLBACKEND": "module://nowhere.backend"}
    command = [sys.executable, str(ROOT / "img" / "plots.py"), "--help"]
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0


def test_a_table_with_a_byte_order_mark_is_read(search: Run, tmp_path: Path) -> None:
    """As spreadsheets write it (timeseer-ai/kukur#279)."""
    text, path = (search.folder / "paths.csv").read_text(), tmp_path / "paths.csv"
    path.write_text(text, encoding="utf-8-sig")
    assert len(read_csv(path, ["index"])) == text.count("\n") - 1


def test_home_is_expanded_and_the_data_folder_recorded_as_absolute(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gregreen/dustmaps#2, nerfstudio-project/nerfstudio#3485."""
    monkeypatch.setenv("HOME", str(folders.parent))
    flags = ["--out_dir=~/r", "--data_dir=~/images", "--init_from=~/x", "--choice", CHOICE]
    args, _ = supernet.parse_args(flags)
    expected = [f"{folders.parent}/{name}" for name in ("r", "images", "x")]
    assert [args.out_dir, args.data_dir, args.init_from] == expected
    monkeypatch.chdir(folders.parent)
    supernet.main([*folder_flags(folders, "--exp_name", "here"), "--data_dir", "images"])
    checkpoint = records.load_checkpoint(Path("runs/here/last.pth"))
    assert checkpoint["args"]["data_dir"] == str(folders)


def test_proposed_commands_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also with blanks in names, or a hyphen first (pypa/pipenv#4761)."""
    short = ["--num_paths", "1", "--calibration_images", "9", "--top_k", "1"]
    for name in ("my run", "-x"):
        flags = ["--batch_size", "1197", "--epochs", "1", "--out_dir", str(tmp_path)]
        supernet.main([*TINY, *flags, f"--exp_name={name}"])
        proposed = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
        assert proposed[:2] == ["python", "random_search.py"]
        random_search.main([*proposed[2:], *short])
        proposed = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
        args, _ = supernet.parse_args(shlex.split(proposed)[2:])
        assert args.exp_name == f"{name}_best" and args.dataset == "digits"
        assert len(args.choice) == 39


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (supernet, ["--learning_rate", "nan"], "nan is not between 0 and 1e+09"),
        (supernet, ["--epochs", "0"], "0 is not between 1"),
        (supernet, ["--epochs", "many"], "invalid int value"),
        (random_search, ["--max_flops", "170000000"], "not between 0 and 100000"),
        (random_search, ["--max_flops", "inf"], "inf is not between"),
    ],
)
def test_a_wrong_value_is_named_with_its_limits(
    script, flags: list[str], said: str, capsys
) -> None:
    """Limits in another unit too (megvii-model/SinglePathOneShot#13)."""
    with pytest.raises(SystemExit) as exit:
        script.build_parser().parse_args(flags)
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_weight_decay_may_be_written_with_a_hyphen() -> None:
    """As in ShunLu91/Single-Path-One-Shot-NAS."""
    assert supernet.parse_args(["--weight-decay", "0.5"])[0].weight_decay == 0.5


def test_an_unfinished_supernet_is_noticed(run: Run, tmp_path: Path, capsys) -> None:
    content = torch.load(run.folder / "last.pth")
    content["args"]["epochs"] = 50
    torch.save(content, tmp_path / "last.pth")
    short = ["--num_paths", "1", "--calibration_images", "9", "--top_k", "1"]
    random_search.main(["--ckpt", str(tmp_path), *short])
    said = capsys.readouterr().out
    assert "2 of 50 epochs" in said and "unfinished" in said
