"""Helpers shared by both scripts: errors, flags, ranks, random streams, devices, logging, files."""

import argparse
import ctypes
import errno
import json
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")

log = logging.getLogger("spos")

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of file systems without locks


class UserError(Exception):
    """A mistake of the user, or of their machine, in one line that says what to do about it."""


def run_script(main: Callable[[], None]) -> None:
    """Runs `main`; users' mistakes and refusals of the machine end in one line and exit code 1."""
    keep_freed_memory()
    try:
        if dist.is_torchelastic_launched():
            dist.init_process_group(timeout=timedelta(hours=1))  # rank 0 may be downloading
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        error.__traceback__ = None  # it keeps data loading workers, and each is waited for 5 s
        # From such a worker, the message carries a traceback; its last line is ours.
        line = str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")
        sys.exit(f"error: {line}")
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else error
        sys.exit(f"error: {named}")
    except (MemoryError, RuntimeError) as error:
        of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not of_memory and "can't allocate memory" not in str(error):  # PyTorch's on a CPU
            raise
        reason = str(error).partition("\n")[0]
        sys.exit(f"error: out of memory; try a smaller --batch_size ({reason})")
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted; what was completed is saved", file=sys.stderr)
        sys.exit(130)


def nonempty(text: str) -> str:
    """An argparse type: a text; rejects the empty one of an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def user_path(text: str) -> str:
    """An argparse type: a path; ~ is the home folder."""
    return os.path.expanduser(nonempty(text))


def absolute_path(text: str) -> str:
    """An argparse type: a path that stays valid in another working folder."""
    return os.path.abspath(user_path(text))


def number(kind: type, low: float = -math.inf, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # rejects nan too
            raise argparse.ArgumentTypeError(f"{text} is not between {low:.10g} and {high:.10g}")
        return value

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of both scripts; the caller adds --help once defaults are known."""
    parser = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add, workers = parser.add_argument, min(4, cpus)
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="random seed")
    add("--device", default="auto", help="auto: an accelerator if there is one, else the CPU")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on GPUs")
    add("--workers", type=number(int, 0), default=workers, help="data loading workers")
    add("--no_cuda_graphs", action="store_true", help="do not replay blocks as CUDA graphs")
    return parser


def check_unchanged(before: dict, now: dict, names: Iterable[str], what: str, advice: str) -> None:
    """Raises UserError if a setting differs from the recorded one, with both values."""
    for name in sorted(names):
        if before.get(name) != now.get(name):
            values = f"{name} {before.get(name)!s:.200}, this command {now.get(name)!s:.200}"
            raise UserError(f"{what} has {values}; {advice}")


def rank() -> int:
    """The number of this process among those that torchrun started together; else 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank; every rank must call it."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_zero(make: Callable[[], T]) -> T:
    """The value that `make` returns on rank 0, the only rank that calls it."""
    return all_gather(make() if rank() == 0 else None)[0]


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def named_rng(seed: int, name: str) -> random.Random:
    """Random numbers for one named use, independent of every other use."""
    return random.Random(f"{seed} {name}")


def generator(seed: int, name: str) -> torch.Generator:
    """Like `named_rng`, for tensors; on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(named_rng(seed, name).getrandbits(63))


def pick_device(name: str) -> torch.device:
    """The device of that name, under torchrun with the local rank as its number.

    "auto" is an accelerator if there is one. Raises UserError if the device cannot be used.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if world_size() > 1 and name != "cpu":
        name = f"{name.partition(':')[0]}:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # by build and device
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used ({reason})") from None
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    return device


def describe_device(device: torch.device) -> str:
    """The device for the log, with the GPU's name or the number of threads, and the ranks."""
    name = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{device} ({name})" + (f", {world_size()} ranks" if world_size() > 1 else "")


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of that name; "auto" is bf16 on CUDA hardware that has it, else fp32."""
    if name != "auto":
        return name
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision for "bf16", which has the range of fp32, so that no loss is scaled.

    Cast weights are not cached: a step uses each weight once, and CUDA graphs cast their own.
    """
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def open_log(file: Path | None = None) -> None:
    """Sends the log of rank 0 to standard output and to the end of a file."""
    logging.raiseExceptions = False  # a closed or full standard output ends no run
    log.propagate = False  # a notebook's root logger would write each line again
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    if rank() == 0:
        log.setLevel(logging.INFO)
        if hasattr(sys.stdout, "reconfigure"):  # unlike a notebook's; a terminal may lack the ±
            sys.stdout.reconfigure(errors="backslashreplace")
        log.addHandler(logging.StreamHandler(sys.stdout))
        if file is not None:
            log.addHandler(logging.FileHandler(file, encoding="utf-8", errors="backslashreplace"))


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
    """The same items, with a progress bar on a terminal."""
    hidden = True if rank() > 0 or sys.stderr is None else None  # None: unless on a terminal
    return tqdm(items, title, total, leave=False, disable=hidden)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:05:51."""
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file to write; it replaces `path` once it is complete and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows needs a file that is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, timeout: float = 0) -> Iterator[None]:
    """Makes and locks a folder; raises UserError if another process keeps it locked.

    timeout: seconds to wait; negative: for ever; 0: only rank 0 locks, since it alone writes.
    """
    if rank() > 0 and timeout == 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / ".lock").acquire(timeout=timeout))
        except Timeout:
            raise UserError(f"another process is at work in {folder}") from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            print(f"warning: {folder} is not locked, its file system has no locks", file=sys.stderr)
        yield


def files_to_keep(folder: Path, names: Iterable[str], key: str) -> list[Path]:
    """The files of those names that a new run or search must not delete unasked.

    One that was interrupted before its first result has left log.txt and an args.json with `key`.
    """
    try:
        own = {"args.json", "log.txt"} if key in read_json(folder / "args.json") else set()
    except (OSError, UserError):  # there is none, or it is somebody else's
        own = set()
    return [folder / name for name in names if (folder / name).exists() and name not in own]


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file for people and programs."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises UserError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def keep_freed_memory() -> None:
    """Tells glibc to reuse large blocks instead of returning them to the kernel after every layer.

    Getting them back page by page took a quarter of the time of a search on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    # Before 2.35 glibc refuses this mmap_threshold, and trim_threshold alone would make it worse.
    if mallopt(mmap_threshold, 2**30):
        mallopt(trim_threshold, 2**30)
