"""What users, their files and their machines do to a run: one clear line, nothing lost, nothing wrong in silence."""

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
from torch.utils.data import Dataset as TorchDataset

import random_search
import supernet
import utils
from blocks import CANDIDATES
from conftest import ROOT, TINY, Run
from data.datasets import load_dataset, read_image, read_in_workers
from data.records import read_csv
from utils import UserError

CHOICE = "-".join("0123" * 5)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """train/ and val/ of three classes, told apart by their brightness."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for i, name in enumerate("abc"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(80 * i, 80 * i + 60, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{n:03}.png")
    return tmp_path / "images"


def folder_flags(folders: Path, *flags: str) -> list[str]:
    out = str(folders.parent / "runs")
    where = ["--dataset", "folder", "--data_dir", str(folders), "--out_dir", out, "--workers", "0"]
    return [*where, "--image_size", "8", "--batch_size", "8", "--epochs", "1", *flags]


def test_a_folder_has_one_owner_until_that_is_dead(run: Run, search: Run, tmp_path: Path) -> None:
    """openml/automlbenchmark#691, usnistgov/alignn#182: workers that outlive a killed owner hold nothing."""
    code = """import os, pathlib, sys, time, utils
with utils.owned_folder(pathlib.Path(sys.argv[1]), "-"):
    if worker := os.fork():
        print(worker, flush=True)
    time.sleep(600)"""
    for script, flags, folder in (
        (supernet, [*run.flags, "--resume"], run.folder),
        (random_search, search.flags, search.folder),
    ):
        owner = subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        worker = int(owner.stdout.readline())
        with pytest.raises(UserError, match="another process is at work"):
            script.main(flags)
        if script is supernet:  # a search at work keeps its supernet's run from being deleted
            (tmp_path / "net").mkdir()
            shutil.copy(run.folder / "last.pth", tmp_path / "net")
            (tmp_path / "net" / "search").symlink_to(folder)
            with pytest.raises(UserError, match=r"another process is at work in .*search"):
                script.main([*run.flags, "--out_dir", str(tmp_path), "--exp_name", "net", "--overwrite"])
            assert (tmp_path / "net" / "last.pth").exists()
        owner.kill()
        owner.wait()
        owner.stdout.close()
        script.main(flags)
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(
    "edit",
    [
        {"dataset": "nosuch"},
        {"dataset": None},
        {"image_size": 8.0},
        {"image_size": -3},
        {"data_dir": 5},
        {"accuracy": "high"},
        {"choice": None},
    ],
)
def test_a_search_json_that_was_edited_is_refused(search: Run, tmp_path: Path, edit: dict) -> None:
    path = tmp_path / "search.json"
    path.write_text(json.dumps(json.loads((search.folder / "search.json").read_text()) | edit))
    with pytest.raises(UserError):
        supernet.parse_args(["--choice", str(path)])
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        supernet.parse_args(["--choice", str(path)])


def test_a_run_of_which_a_setting_is_lost_is_refused(run: Run, tmp_path: Path) -> None:
    content = torch.load(run.folder / "last.pth")
    del content["args"]["momentum"]
    (tmp_path / "net").mkdir()
    torch.save(content, tmp_path / "net" / "last.pth")
    with pytest.raises(UserError, match="its args lack momentum"):
        supernet.parse_args(["--out_dir", str(tmp_path), "--exp_name", "net", "--resume"])


def test_a_command_that_is_refused_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        supernet.main(["--dataset", "folder", "--data_dir", "nowhere", "--out_dir", str(tmp_path), "--exp_name", "new"])
    with pytest.raises(UserError, match="no architecture"):
        random_search.main(["--ckpt", str(run.folder), "--search_dir", str(tmp_path / "new"), "--max_flops", "1"])
    assert not list(tmp_path.iterdir())


def test_a_run_and_a_search_never_share_a_folder(run: Run, search: Run, tmp_path: Path) -> None:
    """isaacovercast/easySFS#34"""
    before = {path: path.read_bytes() for path in run.folder.glob("*.*")}
    with pytest.raises(UserError, match="folder of a run"):
        random_search.main(["--ckpt", str(run.folder), "--search_dir", str(run.folder), "--overwrite"])
    assert before == {path: path.read_bytes() for path in run.folder.glob("*.*")}
    flags = [*TINY, "--out_dir", str(search.folder.parent), "--exp_name", search.folder.name, "--overwrite"]
    with pytest.raises(UserError, match="folder of a search"):
        supernet.main(flags)


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_no_run_deletes_a_search_unasked(flags: list[str], tmp_path: Path) -> None:
    """Its checkpoint may have been removed to save room."""
    (tmp_path / "old" / "search").mkdir(parents=True)
    (tmp_path / "old" / "search" / "paths.csv").write_text("scores")
    with pytest.raises(UserError, match=r"paths\.csv exists.*--overwrite deletes it"):
        supernet.main([*TINY, "--out_dir", str(tmp_path), "--exp_name", "old", *flags])
    assert (tmp_path / "old" / "search" / "paths.csv").read_text() == "scores"


def test_other_candidates_are_refused_everywhere(run: Run, search: Run, tmp_path: Path, monkeypatch) -> None:
    """Their numbers would mean other blocks."""
    monkeypatch.setitem(CANDIDATES, "extra", CANDIDATES["shuffle3"])
    checkpoint, found = str(run.folder / "last.pth"), str(search.folder / "search.json")
    with pytest.raises(UserError, match="candidates"):
        supernet.main([*run.flags, "--resume"])
    with pytest.raises(UserError, match="candidates"):
        supernet.main(["--choice", found])
    with pytest.raises(UserError, match="candidates"):
        random_search.main(["--ckpt", checkpoint, "--search_dir", str(tmp_path / "search")])
    flags = ["--out_dir", str(tmp_path), "--exp_name", "alone", "--choice", CHOICE, "--init_from", checkpoint]
    with pytest.raises(UserError, match="candidates"):
        supernet.main([*TINY, *flags])


@pytest.mark.parametrize("renamed", ["train", "search"])
def test_changed_data_is_refused_with_the_first_difference(folders: Path, renamed: str) -> None:
    """talmolab/sleap-nn#602: a split by position would move when a file is renamed."""
    flags = folder_flags(folders, "--exp_name", "split")
    supernet.main(flags)
    checkpoint = folders.parent / "runs" / "split" / "last.pth"
    held_out = utils.load_checkpoint(checkpoint)["data"]["held_out"]
    every = sorted(path.relative_to(folders).as_posix() for path in folders.glob("train/*/*.png"))
    name = next(name for name in every if (name in held_out) == (renamed == "search"))
    (folders / name).rename((folders / name).with_stem("zzz"))
    for script, again in (
        (supernet, [*flags, "--resume", "--epochs", "1"]),
        (random_search, ["--ckpt", str(checkpoint)]),
    ):
        if script is supernet:
            utils.save_checkpoint(checkpoint, {**torch.load(checkpoint), "epoch": 0, "metrics": []})
        with pytest.raises(UserError, match=r"held-out image \d|training images with digest"):
            script.main(again)


def test_what_is_passed_over_in_a_folder_is_named_in_the_log(folders: Path) -> None:
    """mindspore-lab/mindocr#538 (a link in a circle), thumbsup/thumbsup#368 (kinds of files)"""
    (folders / "train" / "a" / "self").symlink_to(folders / "train" / "a")
    for n in range(3):
        (folders / "train" / "b" / f"{n:03}.png").rename(folders / "train" / "b" / f"{n:03}.jfif")
    supernet.main(folder_flags(folders))
    text = (folders.parent / "runs" / "spos_cifar10" / "log.txt").read_text()
    assert "30 train, 3 search" in text
    assert "3 .jfif files" in text and "1 links to folders that are read already" in text


def test_names_that_are_not_utf8_train_and_match_anywhere(folders: Path, tmp_path: Path) -> None:
    """wummel/patool#29, GoSecure/pyrdp#247"""
    for part in ("train", "val"):
        os.rename(os.fsencode(folders / part / "a"), os.fsencode(folders / part) + b"/caf\xe9")
        os.rename(os.fsencode(folders / part / "b"), os.fsencode(folders / part) + "/день".encode())
    code = """import sys, data.datasets
print(ascii(data.datasets.load_dataset("folder", sys.argv[1], 8).classes))"""
    found = set()
    for language in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}):
        env = os.environ | language
        result = subprocess.run(
            [sys.executable, "-c", code, folders], cwd=ROOT, env=env, capture_output=True, text=True
        )
        found.add(result.stdout)
    assert found == {ascii(["c", "caf\udce9", "день"]) + "\n"}


def test_the_readmes_preprocessing_is_that_of_the_evaluation(folders: Path) -> None:
    """facebookresearch/FixRes#4: on images that are no squares; only their middle tells the class."""
    rng = np.random.default_rng(0)
    for path in folders.glob("*/*/*.png"):
        pixels = rng.integers(0, 256, (12, 40, 3), dtype=np.uint8)
        pixels[:, 14:26] = "abc".index(path.parent.name) * 100 + rng.integers(0, 40, (12, 12, 3))
        Image.fromarray(pixels).save(path)
    supernet.main(folder_flags(folders, "--exp_name", "alone", "--choice", CHOICE, "--epochs", "12", "--cutout", "0"))
    folder = folders.parent / "runs" / "alone"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert "photo.jpg" in code and "32" in code
    code = code.replace("32", "8").replace("runs/spos_cifar_best", str(folder)).replace("print(", "found.append(")
    load, use = code.split("image = ")
    names = {"found": []}
    exec(load, names)
    paths = sorted(folders.glob("val/*/*.png"))
    for path in paths:
        exec("image = " + use.replace("photo.jpg", str(path)), names)
    hits = [p.argmax().item() == "abc".index(path.parent.name) for p, path in zip(names["found"], paths, strict=True)]
    result = json.loads((folder / "result.json").read_text())["test_accuracy"]
    assert 100 * np.mean(hits) == pytest.approx(result) and result > 60


def test_limits_in_another_unit_are_noticed(search: Run, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """megvii-model/SinglePathOneShot#13"""
    flags = [*search.flags, "--search_dir", str(tmp_path), "--num_paths", "1", "--max_flops", "330000000"]
    random_search.main(flags)
    assert "the limits exclude nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space left"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (OSError(errno.EISDIR, "Is a directory", "runs/x/log.txt"), "runs/x/log.txt: Is a directory"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "File name too long"),
        (MemoryError("Unable to allocate 36.9 GiB"), "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 28752000000 bytes"),
            "out of memory",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "smaller --batch_size"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error: Exception, said: str) -> None:
    """rwth-i6/returnn#1829, LeapMind/MLF-SC#41, docling-project/docling#4097"""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match=f"^error: .*{said}.*$"):
        utils.run_script(main)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file"), ValueError("bug"), RuntimeError("bug")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        utils.run_script(main)


@pytest.mark.parametrize("broken", [utils.write_json, utils.save_checkpoint])
def test_a_full_disk_leaves_the_old_file_and_no_stump(broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rwth-i6/returnn#1829"""
    path = tmp_path / "file"
    broken(path, {"old": 1})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*file: No space left"):
        broken(path, {"new": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_size_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(UserError, match=r"1797 images of 2000 px take 20\.1 GiB"):
        load_dataset("digits", ".", 2000)


def test_a_thin_strip_stays_small_and_16_bits_are_scaled(tmp_path: Path) -> None:
    """nagadomi/nunif#256, pytorch/vision#2218"""
    Image.new("RGB", (20000, 1)).save(tmp_path / "strip.png")
    assert read_image(str(tmp_path / "strip.png")).size == (16, 1)
    for value in (0, 1000, 40000, 65535):
        Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / "grey.png")
        assert np.unique(np.asarray(read_image(str(tmp_path / "grey.png")))).tolist() == [round(value / 257)]


class Killed(TorchDataset):
    """A worker that reads this dies as one that the system kills."""

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line() -> None:
    """TorchSSL/TorchSSL#4"""
    with pytest.raises(UserError, match="worker that reads images was killed"):
        list(read_in_workers(Killed(), [torch.tensor([0])], 1))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_missing_stream_is_no_obstacle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm/tqdm#1797: a service has none."""
    monkeypatch.setattr(sys, name, None)
    supernet.main([*TINY, "--epochs", "1", "--out_dir", str(tmp_path)])
    assert (tmp_path / "spos_cifar10" / "last.pth").exists()


def test_a_closed_output_ends_no_run_and_prints_no_traceback(tmp_path: Path) -> None:
    """python/cpython#134568: `| head -1`"""
    code = """import pathlib, utils
utils.open_log(pathlib.Path("log.txt"))
for i in range(9):
    utils.log.info(i)"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-uc", code], cwd=tmp_path, env=env, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "log.txt").read_text().split() == list("012345678")


def test_the_parsers_need_no_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    """hhatto/autopep8#225: python -OO has none."""
    for script in (supernet, random_search):
        monkeypatch.setattr(script, "__doc__", None)
        assert "--seed" in script.build_parser().format_help()


def test_a_notebooks_backend_is_no_obstacle() -> None:
    """oobabooga/textgen#6815"""
    env = os.environ | {"MPLBACKEND": "module://nowhere.backend"}
    command = [sys.executable, str(ROOT / "img" / "plots.py"), "--help"]
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0


def test_a_table_of_another_encoding_is_one_line(search: Run, tmp_path: Path) -> None:
    """timeseer-ai/kukur#279, SFDO-Tooling/Snowfakery#516"""
    text = (search.folder / "paths.csv").read_text()
    path = tmp_path / "paths.csv"
    path.write_text(text, encoding="utf-8-sig")
    assert len(read_csv(path, ["index"])) == text.count("\n") - 1
    path.write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match="not a CSV table in UTF-8"):
        read_csv(path, ["index"])


def test_home_is_expanded_and_the_place_of_the_data_is_recorded_whole(folders: Path, monkeypatch) -> None:
    """gregreen/dustmaps#2, nerfstudio-project/nerfstudio#3485"""
    monkeypatch.setenv("HOME", str(folders.parent))
    args, _ = supernet.parse_args(["--out_dir=~/r", "--data_dir=~/images", "--init_from=~/x", "--choice", CHOICE])
    assert [args.out_dir, args.data_dir, args.init_from] == [
        f"{folders.parent}/{name}" for name in ("r", "images", "x")
    ]
    monkeypatch.chdir(folders.parent)
    supernet.main([*folder_flags(folders, "--exp_name", "here"), "--data_dir", "images"])
    assert utils.load_checkpoint(Path("runs/here/last.pth"))["args"]["data_dir"] == str(folders)


def test_proposed_commands_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """pypa/pipenv#4761"""
    short = ["--num_paths", "1", "--calibration_images", "9", "--top_k", "1"]
    for name in ("my run", "-x"):
        flags = [*TINY, "--batch_size", "1197", "--epochs", "1", "--out_dir", str(tmp_path), f"--exp_name={name}"]
        supernet.main(flags)
        proposed = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
        assert proposed[:2] == ["python", "random_search.py"]
        random_search.main([*proposed[2:], *short])
        proposed = next(line for line in capsys.readouterr().out.splitlines() if "python supernet.py" in line)
        args, _ = supernet.parse_args(shlex.split(proposed)[2:])
        assert args.exp_name == f"{name}_best" and args.dataset == "digits" and len(args.choice) == 39


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (supernet, ["--learning_rate", "nan"], "nan is not a finite number above 0"),
        (supernet, ["--momentum", "1"], "below 1"),
        (supernet, ["--epochs", "0"], "at least 1"),
        (supernet, ["--batch-sise", "3"], "did you mean --batch_size?"),
        (random_search, ["--max_flops", "1e305"], "at most"),
        (random_search, ["--max_flops", "inf"], "finite"),
    ],
)
def test_a_wrong_flag_is_named_with_its_limit(script, flags: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        script.build_parser().parse_args(flags)
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_hyphens_are_underscores() -> None:
    args, _ = supernet.parse_args(["--batch-size=7", "--weight-decay", "0.5", "--exp-name", "a-b"])
    assert (args.batch_size, args.weight_decay, args.exp_name) == (7, 0.5, "a-b")


def test_an_unfinished_supernet_and_a_smaller_search_are_noticed(run: Run, search: Run, tmp_path: Path, capsys) -> None:
    content = torch.load(run.folder / "last.pth")
    content["args"]["epochs"] = 50
    torch.save(content, tmp_path / "last.pth")
    random_search.main(["--ckpt", str(tmp_path), "--num_paths", "1", "--calibration_images", "9", "--top_k", "1"])
    random_search.main([*search.flags, "--num_paths", "11"])
    said = capsys.readouterr().out
    assert "2 of 50 epochs" in said and "unfinished" in said and "first 11 random draws" in said
    random_search.main(search.flags)


@pytest.mark.parametrize("where", ["above", "inside"])
def test_cifar10_is_found_in_the_unpacked_folder_too(cifar, tmp_path: Path, where: str) -> None:
    """pytorch/pytorch#740"""
    cifar.install(tmp_path, archive=False, folder=True)
    inside = tmp_path / "cifar-10-batches-py"
    assert len(load_dataset("cifar10", str(inside if where == "inside" else tmp_path), 32).test) == 40
    assert cifar.calls == []
