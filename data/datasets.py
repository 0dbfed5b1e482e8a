"""Where images come from and how they are split: training, the search split held out of it, and test."""

import hashlib
import os
import random
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2 import functional as transform

from utils import UserError, log, progress, rank_zero_first, refuse_changes

# The largest images that are decoded once and kept on the device, and how much room they may take there.
RESIDENT_PIXELS, RESIDENT_BYTES = 64, 8 * 2**30
EARLIER = {"held_out": [], "trained_on": None}  # metadata of before the files were recorded
THIN = 16  # an image longer than so many times its width is cut
DECODED = 64  # images that a worker decodes and hands over at once

IMAGE_SIZES = {"cifar10": 32, "imagenet": 224, "folder": 32, "digits": 16}

# Mean and standard deviation per channel, for values from 0 to 1: those in common use for these data sets.
CIFAR10_NORM = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Split:
    """Images and their classes: uint8 (N, 3, S, S) in memory, or the files that hold them."""

    images: Tensor | list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int]) -> "Split":
        """The images at these positions."""
        if isinstance(self.images, Tensor):
            return Split(self.images[torch.as_tensor(indices)], self.labels[torch.as_tensor(indices)])
        return Split([self.images[i] for i in indices], self.labels[torch.as_tensor(indices)])

    def __add__(self, other: "Split") -> "Split":
        """The images of both."""
        both = self.images, other.images
        images = torch.cat(both) if isinstance(self.images, Tensor) else both[0] + both[1]
        return Split(images, torch.cat((self.labels, other.labels)))


@dataclass
class Dataset:
    """A data set with its three splits; mean and std per channel are for values from 0 to 1."""

    name: str
    image_size: int
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    search: Split
    test: Split
    held_out: list[str] = field(default_factory=list)  # files of the search split, for image folders
    trained_on: str | None = None  # SHA-256 of the names of the training files, in order

    @property
    def flip(self) -> bool:
        """Whether a mirrored image is still one of its class."""
        return self.name != "digits"

    def metadata(self) -> dict:
        """What a checkpoint keeps of it, as plain data: how to use the network on new images, and what was held out."""
        names = "name", "image_size", "classes", "mean", "std", "held_out", "trained_on"
        return {name: getattr(self, name) for name in names} | {"images": [len(self.train), len(self.search)]}

    def adopt(self, metadata: dict, checkpoint: str) -> None:
        """Takes over mean and std from a checkpoint's metadata; raises UserError if it was trained on other data."""

        def compared(metadata: dict) -> dict:
            numbered = {f"class {i}": name for i, name in enumerate(metadata["classes"])}
            held_out = {f"held-out image {i}": name for i, name in enumerate(metadata.get("held_out", []))}
            same = {name: metadata[name] for name in ("name", "image_size", "images")} | numbered | held_out
            return same | {"training images with digest": metadata.get("trained_on")}

        ours = compared(self.metadata() if "trained_on" in metadata else self.metadata() | EARLIER)
        advice = "point --data_dir to the data that it was trained on"
        refuse_changes(compared(metadata), ours, f"the data of {checkpoint}", advice)
        self.mean, self.std = metadata["mean"], metadata["std"]


def load_dataset(name: str, data_dir: str, image_size: int, workers: int = 0) -> Dataset:
    """The data set of that name with its fixed splits; raises UserError if it is not there, whole and readable."""
    if name == "cifar10":
        return _cifar10(Path(data_dir))
    if name == "digits":
        return _digits(image_size)
    return _folders(name, Path(data_dir), image_size, workers)


def calibration_images(dataset: Dataset, count: int, batch: int) -> Split | None:
    """A fixed draw from the training images, the same whatever --seed says; cut to whole batches; None for 0."""
    count, asked = min(count, len(dataset.train)), count
    if count > batch:
        count -= count % batch
    if count != asked:
        there = f"there are {len(dataset.train):,} training images"
        log.info(f"calibrating on {count:,} images, not {asked:,}: {there}, and batches of {batch} must be whole")
    chosen = random.Random("calibration").sample(range(len(dataset.train)), count)
    return dataset.train.subset(chosen) if count else None


def _hold_out(split: Split, per_class: Sequence[int], name: str = "search") -> tuple[Split, Split]:
    """What is kept and what is held out of a split: per_class[c] images of class c, the same whatever --seed says."""
    rng = random.Random(f"held out for {name}")
    held = set()
    for label, count in enumerate(per_class):
        held.update(rng.sample((split.labels == label).nonzero().flatten().tolist(), count))
    return split.subset([i for i in range(len(split)) if i not in held]), split.subset(sorted(held))


class WholeCIFAR10(CIFAR10):
    """torchvision's data set, which fetches a damaged file of class names again as well."""

    def _check_integrity(self) -> bool:
        names = Path(self.root, self.base_folder, self.meta["filename"])
        return super()._check_integrity() and check_integrity(str(names), self.meta["md5"])


def _cifar10(root: Path) -> Dataset:
    """45,000 / 5,000 / 10,000 images; downloaded if neither the archive nor the unpacked folder is there."""
    root = root.parent if root.name == CIFAR10.base_folder else root  # the unpacked folder itself was given
    archive = root / CIFAR10.filename
    had_archive = archive.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with rank_zero_first():
            train, test = (WholeCIFAR10(str(root), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        folder = root / CIFAR10.base_folder
        parts = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        bad = [folder / name for name, md5 in parts if not _intact(folder / name, md5)]
        bad += [archive] if had_archive and not check_integrity(str(archive), CIFAR10.tgz_md5) else []
        state = f"damaged, delete: {', '.join(map(str, bad))}" if bad else f"no CIFAR-10 in {root}"
        advice = f"put {CIFAR10.filename} into {root} by hand, or try --dataset digits, which needs no download"
        raise UserError(f"{state}; {CIFAR10.url} cannot be fetched either ({error}); {advice}") from None
    finally:
        if not had_archive and archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):
            archive.unlink()  # torchvision downloads under the final name; half a file must not stay there
    whole, test = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)) for part in (train, test)
    )
    kept, held = _hold_out(whole, [count // 10 for count in torch.bincount(whole.labels, minlength=10).tolist()])
    return Dataset("cifar10", 32, list(train.classes), *CIFAR10_NORM, kept, held, test)


def _intact(path: Path, md5: str) -> bool:
    return not path.exists() or check_integrity(str(path), md5)


def _digits(image_size: int) -> Dataset:
    """1,197 / 300 / 300 images of the UCI handwritten digits, 8x8 with values from 0 to 16, enlarged."""
    with np.load(Path(__file__).with_name("digits.npz")) as arrays:
        images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    _check_room(len(images), image_size)
    images = F.interpolate(images[:, None].float() * (255 / 16), size=image_size, mode="bilinear", antialias=True)
    whole = Split(images.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), labels.long())
    rest, test = _hold_out(whole, [30] * 10, "test")
    train, search = _hold_out(rest, [30] * 10)
    return Dataset("digits", image_size, list("0123456789"), *channel_statistics(train.images), train, search, test)


def _folders(name: str, root: Path, image_size: int, workers: int) -> Dataset:
    """train/<class>/ and val/<class>/ or test/<class>/; the search split comes out of train unless it has its own."""
    names, known = _class_folders(root / "train"), {}
    if len(names) < 2:
        raise UserError(f"{root / 'train'} has one class only ({names[0]}); it needs a folder for each of two or more")
    whole = _scan(root / "train", names, names, known)
    counts = torch.bincount(whole.labels, minlength=len(names)).tolist()
    if few := [name for name, count in zip(names, counts, strict=True) if count < 2]:
        raise UserError(f"{root / 'train' / few[0]} holds fewer than 2 images, so none could be held out of training")
    has_test = name == "folder" and (root / "test").is_dir()
    held = root / ("test" if has_test else "val")
    test = _scan(held, _class_folders(held), names, known)
    if has_test and (root / "val").is_dir():
        train, search = whole, _scan(root / "val", _class_folders(root / "val"), names, known)
    else:
        most = 50 if name == "imagenet" else len(whole)  # 50 a class are the paper's 50,000 validation images
        train, search = _hold_out(whole, [min(most, max(1, count // 10)) for count in counts])
    trained_on, held_out = ([_portable(os.path.relpath(file, root)) for file in s.images] for s in (train, search))
    if image_size <= RESIDENT_PIXELS:
        _check_room(len(train) + len(search) + len(test), image_size)
        train, search, test = (Split(decode(s.images, image_size, workers), s.labels) for s in (train, search, test))
    if name == "imagenet":
        norm = IMAGENET_NORM
    else:
        sample = train.images if isinstance(train.images, Tensor) else _sample(train.images, image_size, workers)
        norm = channel_statistics(sample)
    digest = hashlib.sha256("\n".join(trained_on).encode("utf-8", "surrogateescape")).hexdigest()
    classes = [_portable(name) for name in names]
    return Dataset(name, image_size, classes, *norm, train, search, test, held_out, digest)


def _class_folders(folder: Path) -> list[str]:
    """Sorted names of the class folders; what else lies beside them, hidden or a tool's (__MACOSX), is named."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data_dir needs train/<class>/ and val/<class>/ (or test/<class>/)")
    names, passed = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name)):
        is_class = entry.is_dir() and not entry.name.startswith((".", "__"))
        (names if is_class else passed).append(entry.name)
    if passed:
        more = f" and {len(passed) - 5} more" if len(passed) > 5 else ""
        log.info(f"passed over in {folder}: {', '.join(passed[:5])}{more}")
    if not names:
        raise UserError(f"{folder} has no class folders; it needs one folder per class with that class's images")
    return names


def _portable(name: str) -> str:
    """A file's name as UTF-8, whatever the locale of this process is."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _scan(folder: Path, found: list[str], classes: list[str], known: dict[str, Path]) -> Split:
    """The image files of the class folders `found`, with the class numbers of the training folder.

    known: the class folder of every image so far, by its real path, since links are followed. Raises UserError if an
    image is in another one too. What else lies there is counted and named.
    """
    if unknown := [name for name in found if name not in classes]:
        raise UserError(f"{folder / unknown[0]} is a class that the training folder does not have")
    files, labels, passed = [], [], Counter()
    for name in found:
        entries = _images(str(folder / name), passed, set())
        for place, file, real in sorted(entries, key=lambda entry: tuple(map(os.fsencode, entry[:2]))):
            path = os.path.join(place, file)
            if known.get(real, folder / name) != folder / name:
                raise UserError(f"{path} is in {known[real]} as well; an image has one class and belongs to one split")
            if real in known:
                passed["links to images that are read already"] += 1
                continue
            known[real] = folder / name
            files.append(path)
            labels.append(classes.index(name))
    passed = [f"{count} {what}" for what, count in sorted(passed.items()) if count]
    if passed:
        log.info(f"passed over in {folder}: {', '.join(passed)}")
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    counts = torch.bincount(torch.tensor(labels), minlength=len(classes)).tolist()
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        log.info(f"no images in {folder} of {len(empty)} classes: {', '.join(empty[:5])}")
    return Split(files, torch.tensor(labels))


def _images(place: str, passed: Counter, seen: set[str]) -> Iterator[tuple[str, str, str]]:
    """Folder, name and real path of each image below a folder; counts in `passed` what is none."""
    real = os.path.realpath(place)
    if real in seen:
        passed["links to folders that are read already"] += 1
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(place), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    for entry in entries:
        kind = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            if entry.name.startswith((".", "__")):
                passed["hidden folders"] += 1
            else:
                yield from _images(entry.path, passed, seen)
        elif entry.name.startswith("."):
            passed["hidden files"] += 1
        elif not entry.is_file():
            passed["broken links, pipes or sockets"] += 1
        elif kind not in IMG_EXTENSIONS:
            passed[f"{kind or 'other'} files"] += 1
        else:
            target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            yield place, entry.name, target


def read_image(path: str) -> Image.Image:
    """An image file as RGB, whatever its mode; an EXIF orientation is not applied, as in torchvision.

    16-bit values are scaled to 8 bits. Of an image more than THIN times as long as wide, the middle is taken, for to
    enlarge its shorter side would take gigabytes. Raises UserError with the path if the file is damaged or no image.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of EXIF, which is not used, in many of ImageNet's files
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of an unknown range")
            longest = THIN * min(image.size)
            if max(image.size) > longest:
                image = transform.center_crop(image, [min(side, longest) for side in image.size[::-1]])
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise UserError(f"{path} cannot be read as an image ({error}); mend or remove it") from None


def decode(files: list[str], image_size: int, workers: int) -> Tensor:
    """The images of many files, each resized by its shorter side and cropped at the centre: uint8 (N, 3, S, S)."""

    images = torch.empty((len(files), image_size, image_size, 3), dtype=torch.uint8)
    places = torch.arange(len(files)).split(DECODED)
    parts = read_in_workers(_Decoded(files, image_size), places, workers if len(places) > 1 else 0)
    for place, part in zip(places, progress(parts, "reading images", len(places)), strict=True):
        images[place] = part
    return images.permute(0, 3, 1, 2)


class _Decoded(TorchDataset):
    """Images read from files, as uint8 (S, S, 3)."""

    def __init__(self, files: list[str], image_size: int):
        self.files, self.image_size = files, image_size

    def __getitem__(self, index: int) -> np.ndarray:
        image = read_image(self.files[index])
        if image.size != (self.image_size, self.image_size):
            image = transform.resize(image, evaluation_resize(self.image_size), antialias=True)
            image = transform.center_crop(image, self.image_size)
        return np.array(image)


def read_in_workers(
    dataset: TorchDataset, batches: Sequence[Tensor], workers: int, pin_memory: bool = False
) -> Iterator:
    """The batches of a data set that reads files, in order, by that many processes; 0: by this one.

    Raises UserError for what a worker raises as such, and if the machine has too little shared memory for them.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=[indices.tolist() for indices in batches],
        num_workers=workers,
        pin_memory=pin_memory,
    )
    try:
        yield from loader
    except UserError as error:  # its traceback would keep the dying workers waited for, 5 seconds each
        raise error.with_traceback(None) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if "shared memory" in str(error) or "shm" in str(error):
            raise UserError("too little shared memory for the workers: use --workers 0, or enlarge /dev/shm") from None
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a worker that reads images was killed, probably for lack of memory; use fewer --workers"
        ) from None


def evaluation_resize(image_size: int) -> int:
    """The shorter side before the centre crop: 256 for 224 as is usual on ImageNet; small images are not cropped."""
    return image_size if image_size <= RESIDENT_PIXELS else image_size * 256 // 224


def _sample(files: list[str], image_size: int, workers: int) -> Tensor:
    chosen = random.Random("channel statistics").sample(files, min(len(files), 2000))
    return decode(chosen, image_size, workers)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, 3, S, S), for values from 0 to 1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        means.append((share @ levels).item())
        deviations.append((share @ (levels - means[-1]) ** 2).sqrt().item())
    if not all(deviations):
        raise UserError("all training images have the same brightness in a channel; there is nothing to learn from")
    return tuple(means), tuple(deviations)


def _check_room(count: int, image_size: int) -> None:
    size = count * 3 * image_size**2
    if size > RESIDENT_BYTES:
        raise UserError(
            f"{count} images of {image_size} px take {size / 2**30:.1f} GiB, and {RESIDENT_BYTES / 2**30:.0f} GiB at "
            f"most are kept in memory; of --dataset folder, images above {RESIDENT_PIXELS} px are read as needed"
        )
