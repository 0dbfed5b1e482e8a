"""What both scripts need and what knows no data set and no block: flags, devices, logs, checkpoints and records."""

import argparse
import csv
import ctypes
import hashlib
import io
import json
import logging
import math
import os
import pickle
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from tqdm import tqdm

T = TypeVar("T")

log = logging.getLogger("spos")

# All that a run and a search write into their folders; --overwrite deletes these and nothing else.
RUN_FILES = "args.json", "log.txt", "metrics.csv", "last.pth", "training.png", "model.pt2", "result.json"
SEARCH_FILES = "args.json", "log.txt", "paths.csv", "search.json", "histogram.png", "pareto.png", "choices.png"
SEARCH_FILES += ("evolution.png",)


class UserError(Exception):
    """A mistake of the user's, or of their machine, in one line that says what to do about it."""


def run_script(main: Callable[[list[str] | None], None]) -> None:
    """Runs a script's main, under torchrun together with the other ranks.

    Turns a UserError into one line and exit code 1, Ctrl-C into exit code 130.
    """
    keep_freed_memory()
    try:
        if dist.is_torchelastic_launched():
            dist.init_process_group(timeout=timedelta(hours=1))  # rank 0 may download for long
        main(None)
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        # An error that crossed a data loader's worker carries the worker's traceback; its last line is ours.
        line = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        _fail(line)
    except torch.OutOfMemoryError as error:
        _fail(f"the device is out of memory; try a smaller --batch_size ({str(error).splitlines()[0]})")
    except RuntimeError:
        if ranks() > 1:
            time.sleep(5)  # another rank may have failed, and this one only lost it; torchrun ends both
        raise
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted; the same command goes on (supernet.py: with --resume)", file=sys.stderr)
        sys.exit(130)


def _fail(line: str) -> None:
    """Ends the process with one line; a rank waits first, since rank 0 may be saying the same, which ends them all."""
    if rank() > 0:
        time.sleep(5)
    sys.exit(f"error: {line}")


def keep_freed_memory() -> None:
    """Tells glibc to reuse large blocks instead of handing them back to the kernel after every layer.

    Getting them back page by page took a quarter of the time of a search on a CPU. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    if mallopt(mmap_threshold, 2**30):  # refused before glibc 2.35, where the other one alone would make it worse
        mallopt(trim_threshold, 2**30)


# Flags


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> Callable:
    """An argparse type: a finite int or float from low to high and greater than `above`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and value > above and math.isfinite(value)):
            limits = [f"at least {low}"] * (low > -math.inf) + [f"above {above}"] * (above > -math.inf)
            limits += [f"at most {high}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is not {' and '.join(limits) or 'finite'}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` itself refuses the text
    return parse


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, unless there is none or it is that of a switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "; for several processes use torchrun, which passes no such flag" if "--local" in message else ""
        super().error(message + hint)


def new_parser(description: str, data_dir: str | None = "./data") -> argparse.ArgumentParser:
    """A parser with the flags that both scripts have; help shows every default.

    data_dir: its default; None stands for the folder that a checkpoint was trained on.
    """
    parser = _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    where = "where the data set lies" + (" or is downloaded to" if data_dir else "; by default where training found it")
    seeds = number(int, 0, 2**32 - 1)
    parser.add_argument("--data_dir", default=data_dir, help=where)
    precisions = "of the forward pass, auto: bf16 where CUDA has it in hardware, else fp32; weights are fp32 always"
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precisions)
    parser.add_argument("--seed", type=seeds, default=0, help="of paths, order, augmentation and initial weights")
    parser.add_argument("--device", default="auto", help="auto takes an accelerator if there is one, else cpu")
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument("--workers", type=number(int, 0), default=workers, help="processes that read images")
    return parser


def explicit_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    """Only the flags that the command line itself gives, with their values. Spoils the parser's defaults."""
    absent = object()
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([])), absent))
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not absent}


def refuse_changes(before: dict, now: dict, what: str, advice: str) -> None:
    """Raises UserError if a setting of `now` differs from the one of `before`, with both values."""
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(f"{what} has {name} {before.get(name)}, this command {value}; {advice}")


# Ranks: the processes that torchrun started together; there is one, number 0, without it


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """The values of all ranks, by rank; every rank must call it."""
    values = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def on_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, the only one that calls it. If it fails there, torchrun ends the others."""
    return gather(make() if rank() == 0 else None)[0]


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Rank 0 is through with the block before the others enter it."""
    if rank() > 0:
        gather(None)
    yield
    if rank() == 0:
        gather(None)


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def share_buffers(model: nn.Module) -> None:
    """Gives every rank the buffers of rank 0: in training each collects BatchNorm's statistics over its own images."""
    for buffer in model.buffers() if ranks() > 1 else ():
        dist.broadcast(buffer, src=0)


# Randomness, device, log


def stream(seed: int, name: str) -> random.Random:
    """The random numbers of one named use, independent of every other use and of the global generators."""
    return random.Random(f"{seed} {name}")


def generator(seed: int, name: str) -> torch.Generator:
    """As `stream`, for tensors; on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(stream(seed, name).getrandbits(63))


def pick_device(name: str) -> torch.device:
    """The device of that name, or for "auto" an accelerator if there is one; raises UserError if it cannot be used.

    Under torchrun each rank of a machine takes the accelerator with its own number.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if ranks() > 1 and name != "cpu":
        name = f"{name.partition(':')[0]}:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
        if ranks() > 1 and device.type != "cpu":
            torch.accelerator.set_device_index(device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = ["cpu"]
        if accelerator := torch.accelerator.current_accelerator(check_available=True):
            found += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used; this machine has {', '.join(found)} ({reason})") from None


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of that name; "auto" is bf16 on a CUDA device that has it in hardware, else fp32."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """How images lie in memory: channels last for oneDNN and tensor cores, else NCHW for CUDA's depthwise kernels."""
    return torch.channels_last if device.type == "cpu" or precision == "bf16" else torch.contiguous_format


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision for "bf16", nothing for "fp32"; bfloat16 has the range of fp32, so no loss is scaled."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def describe_device(device: torch.device) -> str:
    """The device's name for the log, with the number of threads on a CPU, and of ranks under torchrun."""
    name = str(device)
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        name += f" ({torch.get_num_threads()} threads)"
    return name if ranks() == 1 else f"{name}, {ranks()} ranks"


def delete_files(folder: Path, names: Sequence[str]) -> None:
    """Deletes the named files of a folder, and what a kill may have left of one half-written."""
    for name in names:
        for path in (folder / name, folder / f"{name}.tmp"):
            path.unlink(missing_ok=True)


def make_folder(folder: Path, flag: str) -> None:
    """Makes a folder to write to; raises UserError, which names the flag that chooses another one, if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".tmp").touch()
        (folder / ".tmp").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error}); choose another {flag}") from None


def open_log(path: Path | None) -> None:
    """Sends the log to standard output and, if there is a path, to the end of that file; rank 0's only."""
    if rank() > 0:
        return
    log.setLevel(logging.INFO)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handlers = [logging.StreamHandler(sys.stdout)]
    if path:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


def bar(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """The same items, with a bar while they are worked on: on a terminal only, and on rank 0."""
    return tqdm(items, title, total, leave=False, disable=True if rank() > 0 else None)


def duration(seconds: float) -> str:
    """A time for people: 42s, 3m07s, 5h51m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def standard_error(accuracy: float, images: int) -> float:
    """Binomial standard error of an accuracy in percent that was measured on so many images."""
    return math.sqrt(max(accuracy * (100 - accuracy), 0) / images)


# Files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` only once it is whole and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file for people and programs; a number that is not finite becomes null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict:
    """The content of a JSON file; raises UserError if it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def write_csv(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Writes a whole table; None becomes an empty cell."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_csv(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Adds rows to a table in one write; a kill can only cut off the last line."""
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    with open(path, "a", newline="", encoding="utf-8") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def recover_csv(path: Path, columns: dict[str, type]) -> list[dict]:
    """The rows of a table that append_csv extends; a last line that a kill cut off is dropped, from the file as well.

    Makes an empty table if there is none. Raises UserError if the file is another one, or a line is no row of it.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ",".join(columns) + "\n"
    reader = csv.DictReader(text.rpartition("\n")[0].splitlines())
    if reader.fieldnames != list(columns):
        raise UserError(f"{path} does not begin with the line {','.join(columns)}; move or delete it")
    rows = []
    for line, row in enumerate(reader, start=2):
        try:
            rows.append({name: kind(row[name]) for name, kind in columns.items()})
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {line}, is not a row of that table; mend or delete the line") from None
    write_csv(path, rows, list(columns))
    return rows


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes plain data and tensors; a kill at any moment leaves either the old file or the new one."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of supernet.py, on the CPU, with the SHA-256 of its file; runs no code from the file.

    Raises UserError for anything else.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; `python supernet.py` writes one to runs/EXP_NAME/last.pth")
    try:
        file = path.read_bytes()  # at once: a training that goes on may replace it between two looks
        content = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"{path} is not a checkpoint of supernet.py, or is damaged ({reason})") from None
    expected = {"model": dict, "optimizer": dict, "epoch": int, "args": dict, "data": dict, "metrics": list}
    found = content if isinstance(content, dict) else {}
    if not all(isinstance(found.get(name), kind) for name, kind in expected.items()):
        holds = sorted(map(str, found))[:5] or type(content).__name__
        raise UserError(f"{path} is not a checkpoint of supernet.py: it holds {holds}, not {list(expected)}")
    consume_prefix_in_state_dict_if_present(content["model"], "module.")  # of a wrapper for several GPUs
    return content | {"sha256": hashlib.sha256(file).hexdigest()}


def load_supernet(path: Path) -> dict:
    """The checkpoint of a supernet; raises UserError if it is one of a single architecture, or none at all."""
    checkpoint = load_checkpoint(path)
    if checkpoint["args"]["choice"] is not None:
        raise UserError(f"{path} holds the single architecture {checkpoint['args']['choice']}, not a supernet")
    return checkpoint


def newest_supernet(runs: Path) -> Path:
    """The newest supernet's checkpoint below a folder of runs; says what it passed over, raises UserError for none."""
    for path in sorted(runs.glob("*/last.pth"), key=lambda path: path.stat().st_mtime, reverse=True):
        if load_checkpoint(path)["args"]["choice"] is None:
            return path
        print(f"passing over {path}, which is newer: it holds a single architecture")
    raise UserError(
        f"no supernet in {runs}/*/last.pth; train one with `python supernet.py`, or name one with --ckpt PATH"
    )
