"""What both scripts need and what knows no data set and no block: flags, ranks, devices, logs, files, checkpoints."""

import argparse
import ctypes
import difflib
import errno
import hashlib
import io
import json
import logging
import math
import os
import pickle
import random
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from tqdm import tqdm

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

T = TypeVar("T")

log = logging.getLogger("spos")

# All that a run and a search write into their folders; --overwrite deletes these and nothing else.
RUN_FILES = "args.json", "log.txt", "metrics.csv", "last.pth", "training.png", "model.pt2", "result.json"
SEARCH_FILES = "args.json", "log.txt", "paths.csv", "search.json", "histogram.png", "pareto.png", "choices.png"
SEARCH_FILES += "evolution.png", "standalone.png"


# What the operating system may refuse for no fault of this code: room, permission, open files, memory, odd paths.
REFUSALS = {errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
REFUSALS |= {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EIO}
REFUSALS |= {getattr(errno, name, errno.ENOSPC) for name in ("EDQUOT", "ESTALE")}


# What torch.load raises for files that are none of its own.
UNREADABLE = RuntimeError, ValueError, EOFError, OSError, LookupError, AttributeError, TypeError
UNREADABLE += pickle.UnpicklingError, zipfile.BadZipFile


class UserError(Exception):
    """A mistake of the user's, or of their machine, in one line that says what to do about it."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main, under torchrun together with the other ranks.

    Turns a UserError and what the operating system refuses into one line and exit code 1, Ctrl-C into exit code 130.
    """
    keep_freed_memory()
    for output in (sys.stdout, sys.stderr):
        if output is not None:
            output.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot show
    try:
        if dist.is_torchelastic_launched():
            dist.init_process_group(timeout=timedelta(hours=1))  # rank 0 may download for long
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        # An error that crossed a data loader's worker carries the worker's traceback; its last line is ours.
        fail(str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: "))
    except torch.OutOfMemoryError as error:
        fail(f"the device is out of memory; try a smaller --batch_size ({str(error).splitlines()[0]})")
    except MemoryError as error:
        fail(f"out of memory; try a smaller --batch_size or --image_size ({error})")
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        fail(f"{error.filename or 'the operating system'}: {error.strerror}")
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            fail(f"out of memory; try a smaller --batch_size or --image_size ({str(error).splitlines()[0]})")
        if world_size() > 1:
            time.sleep(5)  # another rank may have failed, and this one only lost it; torchrun ends both
        raise
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted; the same command continues (supernet.py: with --resume)", file=sys.stderr)
        sys.exit(130)


def fail(line: str) -> NoReturn:
    """Ends the process with one line; a rank waits first, since rank 0 may be saying the same, which ends them all."""
    if rank() > 0:
        time.sleep(5)
    sys.exit(f"error: {line}")


# Flags


def path(text: str) -> str:
    """An argparse type: a path, in which ~ stands for the home folder."""
    return os.path.expanduser(text)


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite int or float from low to high, greater than `above` and less than `below`.

    An int is at most a billion unless `high` says otherwise.
    """
    high = 10**9 if kind is int and high == math.inf else high

    def parse(text: str) -> float:
        value = kind(text)
        limits = {"at least": low, "at most": high, "above": above, "below": below}
        if not (low <= value <= high and above < value < below and math.isfinite(value)):
            allowed = [f"{word} {limit:,}" for word, limit in limits.items() if math.isfinite(limit)]
            kinds = "a finite number" if kind is float else "a whole number"
            raise argparse.ArgumentTypeError(f"{text} is not {kinds} {' and '.join(allowed)}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` itself refuses the text
    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to a flag's help, except for switches and where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, for which --batch-size is --batch_size."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args = sys.argv[1:] if args is None else args
        args = [re.sub("^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), text) for text in args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if "--local" in message:
            message += "; start several processes with torchrun, which passes no such flag"
        elif message.startswith("unrecognized") and (flag := re.search("--[^ =]+", message)):
            near = difflib.get_close_matches(flag[0], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)

    def adopt(self, recorded: dict, source: str, optional: Sequence[str] = ()) -> None:
        """Makes recorded values the defaults; raises UserError for one that the command line would refuse.

        None is taken for what is `optional` or has no default.
        """
        for action in self._actions:
            if action.dest not in recorded:
                continue
            value = recorded[action.dest]
            try:
                valid = isinstance(value, bool) if action.nargs == 0 else (action.type or str)(str(value)) == value
            except (ValueError, argparse.ArgumentTypeError):
                valid = False
            valid = valid and (not action.choices or value in action.choices)
            absent = value is None and (action.default is None or action.dest in optional)
            if not (valid or absent):
                raise UserError(f"{source} was edited or is damaged: {action.dest} is {repr(value)[:100]}")
            self.set_defaults(**{action.dest: value})

    def peek(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """What the command line asks for, before the defaults that depend on it are set and --help can show them."""
        argv = sys.argv[1:] if argv is None else argv
        return self.parse_known_args([text for text in argv if text not in ("-h", "--help")])[0]


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that both scripts have."""
    add = parser.add_argument
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on GPUs that have it")
    add("--no_cuda_graphs", action="store_true", help="do not replay blocks as CUDA graphs")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="random seed")
    add("--device", default="auto", help="auto: an accelerator if there is one, else cpu")
    add("--workers", type=number(int, 0, 1000), default=min(4, os.cpu_count() or 1), help="processes that read images")


def refuse_changes(before: dict, now: dict, what: str, advice: str) -> None:
    """Raises UserError if a setting of `now` differs from the one of `before`, with both values."""
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(f"{what} has {name} {before.get(name)}, this command {value}; {advice}")


def refuse_candidates(found: dict, names: list[str], what: str) -> None:
    """Raises UserError if a checkpoint or a search.json has other candidate blocks than `names`.

    An earlier version did not record them, and had no others.
    """
    advice = "numbers would mean other blocks; restore CANDIDATES in blocks.py"
    refuse_changes({"candidates": found.get("candidates", names)}, {"candidates": names}, what, advice)


# Ranks: the processes that torchrun started together; without it there is one, rank 0


def rank() -> int:
    """The number of this process."""
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
    """What `make` returns on rank 0, the only one that calls it. If it fails there, torchrun ends the others."""
    return all_gather(make() if rank() == 0 else None)[0]


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 leaves the block before the others enter it."""
    if rank() > 0:
        all_gather(None)
    yield
    if rank() == 0:
        all_gather(None)


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every rank the buffers of rank 0: in training each collects BatchNorm's statistics over its own images."""
    for buffer in model.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, src=0)


# Randomness, device, log


def stream(seed: int, name: str) -> random.Random:
    """The random numbers of one named use, independent of every other use and of the global generators."""
    return random.Random(f"{seed} {name}")


def generator(seed: int, name: str) -> torch.Generator:
    """Like `stream`, for tensors; on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(stream(seed, name).getrandbits(63))


def pick_device(name: str) -> torch.device:
    """The device of that name, or for "auto" an accelerator if there is one; raises UserError if it cannot be used.

    Under torchrun each rank of a machine takes the accelerator with its own number.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if world_size() > 1 and name != "cpu":
        name = f"{name.partition(':')[0]}:{os.environ['LOCAL_RANK']}"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails on the meta device, which computes nothing
        device = probe.device
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        found = ["cpu"]
        if accelerator := torch.accelerator.current_accelerator(check_available=True):
            found += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used; this machine has {', '.join(found)} ({reason})") from None


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of that name; "auto" is bf16 on a CUDA device that has it in hardware, else fp32."""
    if name != "auto":
        return name
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp32"


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """How images lie in memory: channels last for oneDNN and tensor cores, else NCHW for CUDA's depthwise kernels."""
    return torch.channels_last if device.type == "cpu" or precision == "bf16" else torch.contiguous_format


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision for "bf16", nothing for "fp32"; bfloat16 has the range of fp32, so no loss is scaled.

    Without the cache of cast weights: a step uses a weight once, and CUDA graphs cast it by themselves.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def describe_device(device: torch.device) -> str:
    """The device's name for the log, with the number of threads on a CPU, and of ranks under torchrun."""
    name = str(device)
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name += f" ({threads} thread{'s' if threads > 1 else ''})"
    return name if world_size() == 1 else f"{name}, {world_size()} ranks"


class Console(logging.StreamHandler):
    """Standard output; once it is closed or full, the log goes on to its file alone."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError | ValueError) or isinstance(error, UnicodeError):
            raise
        nowhere = open(os.devnull, "w")  # noqa: SIM115
        if sys.stdout is self.stream:
            sys.stdout = nowhere
        self.stream = nowhere  # not setStream, which would flush the old one


class LogFile(logging.FileHandler):
    """The end of a log file; what the operating system refuses is not passed over."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def open_log(path: Path | None) -> None:
    """Sends the log to standard output and to the end of that file, or keeps it for the file that is opened next.

    Of several ranks only rank 0 logs.
    """
    if rank() > 0:
        return
    log.setLevel(logging.INFO)
    kept = [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]
    file = LogFile(path, encoding="utf-8", errors="backslashreplace") if path else None
    for handler in list(log.handlers):
        log.removeHandler(handler)
        if handler in kept:
            handler.setTarget(file)
        handler.close()
    log.addHandler(Console(sys.stdout))
    log.addHandler(file or MemoryHandler(1000, flushLevel=logging.CRITICAL + 1))


def progress(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """The same items, with a progress bar: on a terminal only, and on rank 0."""
    return tqdm(items, title, total, leave=False, disable=True if rank() > 0 or sys.stderr is None else None)


def duration(seconds: float) -> str:
    """A time for people: 0:05:51."""
    return str(timedelta(seconds=round(seconds)))


def standard_error(accuracy: float, images: int) -> float:
    """Binomial standard error of an accuracy in percent that was measured on so many images."""
    return math.sqrt(max(accuracy * (100 - accuracy), 0) / images)


# Files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` only once it is whole and on the disk.

    If that fails, nothing of it stays behind. Raises UserError with the path for what the operating system refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def owned_folder(folder: Path, flag: str) -> Iterator[None]:
    """Makes a folder and holds it against other processes, until the block or this process ends, in whatever way.

    A new one in which nothing was written disappears again. Raises UserError, which names the flag that chooses another
    folder, if it cannot be made, written to or held. Only rank 0 writes, so the other ranks hold nothing.
    """
    if rank() > 0:
        yield
        return
    new = not os.path.lexists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another {flag}") from None
    with lock:
        try:
            if sys.platform == "win32":
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no worker process inherits it
            if not os.path.samefile(lock.fileno(), folder / ".lock"):
                raise OSError  # its owner has just removed the folder
        except OSError:
            raise UserError(f"another process is at work in {folder}; wait for it, or choose another {flag}") from None
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                if new and os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()


def delete_files(folder: Path, names: Sequence[str]) -> None:
    """Deletes the named files of a folder, and what a kill may have left of one half-written."""
    for name in names:
        for path in (folder / name, folder / f"{name}.tmp"):
            path.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file for people and programs."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """The content of a JSON file; raises UserError if it is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes plain data and tensors; a kill at any moment leaves either the old file or the new one."""
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise
            raise UserError(f"cannot write {path}; is the disk full? ({str(error).splitlines()[0]})") from None


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of supernet.py, on the CPU, with the SHA-256 of its file; runs no code from the file.

    Raises UserError for anything else.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; `python supernet.py` writes one to runs/EXP_NAME/last.pth")
    try:
        file = path.read_bytes()  # at once: a training that goes on may replace it between two looks
        content = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"{path} is not a checkpoint of supernet.py, or is damaged ({reason})") from None
    expected = {"model": dict, "optimizer": dict, "epoch": int, "args": dict, "data": dict, "metrics": list}
    found = content if isinstance(content, dict) else {}
    whole = all(isinstance(found.get(name), kind) for name, kind in expected.items())
    if not whole or not all(isinstance(name, str) for name in found["model"]):
        holds = sorted(map(str, found))[:5] or type(content).__name__
        raise UserError(f"{path} is not a checkpoint of supernet.py: it holds {holds}, not {list(expected)}")
    needed = {"args": ("choice", "exp_name", "data_dir", "epochs", "supernet_accuracy", "cutout")}
    needed |= {"data": ("name", "image_size", "classes", "mean", "std", "images")}
    if missing := [f"{part}[{name!r}]" for part in needed for name in needed[part] if name not in content[part]]:
        raise UserError(f"{path} is not a whole checkpoint of supernet.py: it lacks {', '.join(missing)}")
    for prefix in ("module.", "_orig_mod."):  # of wrappers for several GPUs and of torch.compile
        consume_prefix_in_state_dict_if_present(content["model"], prefix)
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
        try:
            load_supernet(path)
            return path
        except UserError as error:
            print(f"skipping a newer checkpoint: {error}")
    raise UserError(
        f"no supernet in {runs}/*/last.pth; train one with `python supernet.py`, or name one with --ckpt PATH"
    )


# Memory


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
