"""The data sets and their three splits: training, the search split held out of it, and test."""

import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import is_image_file, make_dataset

from data.images import RESIDENT_SIDE, decode
from utils import UserError, check_unchanged, locked, on_rank_zero

IMAGE_SIZES = {"cifar10": 32, "imagenet": 224, "folder": 32, "digits": 16}

# Mean and standard deviation per channel, for values from 0 to 1: those in common use.
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
        labels = self.labels[torch.as_tensor(indices)]
        if isinstance(self.images, Tensor):
            return Split(self.images[torch.as_tensor(indices)], labels)
        return Split([self.images[i] for i in indices], labels)

    def __add__(self, other: "Split") -> "Split":
        """The images of both."""
        labels = torch.cat((self.labels, other.labels))
        if isinstance(self.images, Tensor):
            return Split(torch.cat((self.images, other.images)), labels)
        return Split(self.images + other.images, labels)


@dataclass
class ImageData:
    """A data set with its three splits; mean and std per channel are for values from 0 to 1."""

    name: str
    image_size: int
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    search: Split
    test: Split
    digest: str | None = None  # SHA-256 of the file names in the training and the search split
    notes: list[str] = field(default_factory=list)  # for the log: what the folders lack

    @property
    def flip(self) -> bool:
        """Whether a mirrored image still belongs to its class."""
        return self.name != "digits"

    def metadata(self) -> dict:
        """Plain data for a checkpoint: the classes, how to prepare images, what was trained on."""
        names = "name", "image_size", "classes", "mean", "std", "digest"
        sizes = [len(self.train), len(self.search), len(self.test)]
        return {name: getattr(self, name) for name in names} | {"images": sizes}

    def check_same(self, metadata: dict, owner: str) -> None:
        """Takes mean and std from the owner's metadata; raises UserError if it has other data."""
        names, advice = metadata.keys() - {"mean", "std"}, "--data_dir must hold the same data"
        check_unchanged(metadata, self.metadata(), names, f"the data of {owner}", advice)
        self.mean, self.std = metadata["mean"], metadata["std"]


def load_dataset(name: str, data_dir: str, image_size: int, workers: int = 0) -> ImageData:
    """The data set of that name with its fixed splits; raises UserError if it is not there."""
    if name == "cifar10":
        dataset = _cifar10(Path(data_dir))
    elif name == "digits":
        dataset = _digits(image_size)
    else:
        dataset = _folders(name, Path(data_dir), image_size, workers)
    dataset.check_same(on_rank_zero(dataset.metadata), "rank 0")
    return dataset


def _hold_out(split: Split, per_class: Sequence[int], name: str = "search") -> tuple[Split, Split]:
    """Splits off per_class[c] images of every class c, the same ones for any --seed."""
    rng = random.Random(f"held out for {name}")
    held, sizes = set(), torch.bincount(split.labels, minlength=len(per_class)).tolist()
    by_class = split.labels.argsort(stable=True).split(sizes)
    for indices, count in zip(by_class, per_class, strict=True):
        held.update(rng.sample(indices.tolist(), count))
    kept = [i for i in range(len(split)) if i not in held]
    return split.subset(kept), split.subset(sorted(held))


def _cifar10(root: Path) -> ImageData:
    """45,000 / 5,000 / 10,000 images, downloaded if they are not there."""

    def parts(download: bool) -> list[CIFAR10]:
        return [CIFAR10(str(root), train=part, download=download) for part in (True, False)]

    try:
        try:
            train, test = parts(download=False)
        except RuntimeError:  # not there, or damaged
            with locked(root, timeout=-1):  # other jobs and ranks wait, and find the files
                train, test = parts(download=True)
    except PermissionError as error:
        raise UserError(
            f"no unpacked CIFAR-10 in {root}, and {error.filename} is read-only"
        ) from None
    except Exception as error:  # a network and an archive fail in many ways
        advice = f"put {CIFAR10.filename} there by hand, or try --dataset digits"
        raise UserError(f"no CIFAR-10 in {root} ({error}); {advice}") from None
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, test)]
    whole = Split(images[0], torch.tensor(train.targets))
    test = Split(images[1], torch.tensor(test.targets))
    counts = torch.bincount(whole.labels, minlength=10).tolist()
    kept, held = _hold_out(whole, [count // 10 for count in counts])
    return ImageData("cifar10", 32, list(train.classes), *CIFAR10_NORM, kept, held, test)


def _digits(image_size: int) -> ImageData:
    """1,197 / 300 / 300 images of the UCI handwritten digits, 8x8 with values from 0 to 16."""
    with np.load(Path(__file__).with_name("digits.npz")) as arrays:
        images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    images = images[:, None].float() * (255 / 16)
    images = F.interpolate(images, size=image_size, mode="bilinear", antialias=True)
    images = images.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    rest, test = _hold_out(Split(images, labels.long()), [30] * 10, "test")
    train, search = _hold_out(rest, [30] * 10)
    norm = channel_statistics(train.images)
    return ImageData("digits", image_size, list("0123456789"), *norm, train, search, test)


def _folders(name: str, root: Path, image_size: int, workers: int) -> ImageData:
    """train/<class>/ and val/<class>/ or test/<class>/; without both, 10% of train is held out."""
    notes = []
    classes, train = _list_images(root / "train", notes)
    counts = torch.bincount(train.labels, minlength=len(classes)).tolist()
    if len(classes) < 2 or min(counts) < 2:
        raise UserError(f"{root / 'train'} needs two classes or more, each of two images or more")
    has_test = name == "folder" and (root / "test").is_dir()
    _, test = _list_images(root / ("test" if has_test else "val"), notes, classes)
    if has_test and (root / "val").is_dir():
        _, search = _list_images(root / "val", notes, classes)
    else:
        most = 50 if name == "imagenet" else len(train)  # the paper's 50,000 validation images
        train, search = _hold_out(train, [min(most, max(1, count // 10)) for count in counts])
    seen = {}
    for file in (file for split in (train, search, test) for file in split.images):
        real = os.path.realpath(file)
        if real in seen:
            raise UserError(f"{file} is {seen[real]} again; an image has one class and one split")
        seen[real] = file
    files = [Path(file).relative_to(root).as_posix() for file in train.images + search.images]
    digest = hashlib.sha256("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest()
    if image_size <= RESIDENT_SIDE:
        train, search, test = (
            Split(decode(split.images, image_size, workers), split.labels)
            for split in (train, search, test)
        )
    norm = IMAGENET_NORM
    if name == "folder":
        sample = train.images
        if isinstance(sample, list):
            sample = random.Random("channel statistics").sample(sample, min(len(sample), 2000))
            sample = decode(sample, image_size, workers)
        norm = channel_statistics(sample)
    return ImageData(name, image_size, classes, *norm, train, search, test, digest, notes)


def _list_images(
    folder: Path, notes: list[str], classes: list[str] | None = None
) -> tuple[list[str], Split]:
    """The classes of a folder and its image files, only of `classes` if those are given."""
    if not folder.is_dir():
        needs = "--data_dir needs train/<class>/ and val/<class>/ (or test/<class>/)"
        raise UserError(f"no folder {folder}; {needs}")
    hidden = ".", "__MACOSX"  # left by tools
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(hidden)]
    if dead := [entry.path for entry in entries if not os.path.exists(entry.path)]:
        raise UserError(f"{dead[0]} is a link to nothing")
    found = sorted(entry.name for entry in entries if entry.is_dir())
    skipped = [entry.name for entry in entries if not entry.is_dir()]
    if classes is not None and (unknown := set(found) - set(classes)):
        raise UserError(f"{folder / min(unknown)} is a class that the training folder lacks")

    def is_valid(file: str) -> bool:
        parts = Path(file).relative_to(folder).parts
        is_hidden = parts[-1].startswith(".") or any(part.startswith(hidden) for part in parts[:-1])
        valid = is_image_file(file) and not is_hidden
        if not valid:
            skipped.append(file)
        return valid

    classes = classes or found
    numbers = {name: i for i, name in enumerate(classes)}
    how = {"is_valid_file": is_valid, "allow_empty": True}
    samples = make_dataset(folder, numbers, **how) if found else []
    if not samples:
        raise UserError(f"{folder} holds no images; it needs one folder per class")
    if skipped:
        notes.append(f"{len(skipped)} files in {folder} are no images, or hidden")
    labels = torch.tensor([label for _, label in samples])
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        notes.append(f"no images in {folder} of {len(empty)} classes: {', '.join(empty[:5])}")
    return classes, Split([file for file, _ in samples], labels)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, 3, S, S), for values from 0 to 1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        means.append((share @ levels).item())
        deviations.append((share @ (levels - means[-1]) ** 2).sqrt().item() or 1.0)  # if constant
    return tuple(means), tuple(deviations)
