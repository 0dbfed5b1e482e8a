"""Batches on the device: normalised images and their labels, in a fixed order, or shuffled and augmented."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from data.augment import crop_and_flip, cutout, normalise, streamed_transform
from data.datasets import Dataset, Split, read_image, read_in_workers
from utils import generator, memory_format, rank, world_size

Batch = tuple[Tensor, Tensor]

AUGMENTED = 2048  # images that are augmented together: some twenty kernels for many steps, and not for each


class Batches:
    """The batches of one split, as pairs of images (N, 3, S, S) float and labels (N,), both on the device.

    Small images live on the device as one uint8 tensor; files are read by worker processes as they are needed.
    Iterating goes through the split in order, the same on every rank; `share` gives a rank its part of that, `epoch`
    its part of the shuffled, augmented batches of a training epoch, and `augmented` augments in order. precision: that
    of the network they are for.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        precision: str = "fp32",
    ):
        self.dataset, self.batch_size, self.device, self.workers = dataset, batch_size, device, workers
        self.memory_format = memory_format(device, precision)
        self.cutout_length: int | None = None  # of the augmentation in order; None: there is none
        self.files = None if isinstance(split.images, Tensor) else split.images
        if self.files is None:  # as (N, S, S, 3): the three bytes of a pixel are copied together
            self.pixels = split.images.permute(0, 2, 3, 1).contiguous().to(device)
        self.labels = split.labels.to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._in_order(0, 1)

    def share(self) -> Iterator[tuple[int, Batch]]:
        """The numbers of this rank's batches and the batches; together the ranks have each one once."""
        return zip(range(rank(), len(self), world_size()), self._in_order(rank(), world_size()), strict=True)

    def augmented(self, cutout_length: int = 0) -> "Batches":
        """The same batches as training would see them; an image is augmented in the same way at every pass."""
        batches = copy.copy(self)
        batches.cutout_length = cutout_length
        return batches

    def _in_order(self, first: int, step: int) -> Iterator[Batch]:
        order = torch.arange(len(self.labels))
        # As equal as can be: statistics of a last batch of few images would be worth little.
        places = list(order.tensor_split(len(self))[first::step])
        if self.cutout_length is not None:
            yield from self._augmented(order, places, generator(0, "augmented in order"), self.cutout_length)
        elif self.files is not None:
            yield from self._streamed(places, streamed_transform(self.dataset.image_size, train=False))
        else:
            for indices in places:
                images = self.pixels[indices[0] : indices[-1] + 1].permute(0, 3, 1, 2)
                yield self._plain(images), self.labels[indices[0] : indices[-1] + 1]

    def blank(self, count: int) -> Tensor:
        """A batch of zeros that lies on the device as the real ones do."""
        side = self.dataset.image_size
        return torch.zeros(count, 3, side, side, device=self.device).contiguous(memory_format=self.memory_format)

    def steps(self) -> int:
        """Batches of a training epoch: the last one is dropped if it is incomplete, unless it is the only one."""
        return max(1, len(self.labels) // self.batch_size)

    def epoch(self, seed: int, epoch: int, cutout_length: int = 0) -> Iterator[Batch]:
        """The batches of one training epoch; their order and augmentation depend on (seed, epoch) alone.

        Of each batch a rank gets every n-th image, n being the number of ranks.
        """
        rng = generator(seed, f"images {epoch}")
        order = torch.randperm(len(self.labels), generator=rng)
        places = torch.arange(len(order)).split(self.batch_size)[: self.steps()]
        yield from self._augmented(order, [batch[rank() :: world_size()] for batch in places], rng, cutout_length)

    def _augmented(self, order: Tensor, places: list[Tensor], rng: torch.Generator, length: int) -> Iterator[Batch]:
        side = self.dataset.image_size
        if self.files is not None:
            seed = torch.randint(2**62, (1,), generator=rng).item()
            yield from self._streamed([order[batch] for batch in places], streamed_transform(side, train=True), seed)
            return
        if not places:  # more ranks than batches
            return
        padding = side // 8
        sizes = [len(batch) for batch in places]
        at_once = max(1, AUGMENTED // max(sizes))
        groups = [sizes[i : i + at_once] for i in range(0, len(sizes), at_once)]
        mine, lengths = torch.cat(places), [sum(group) for group in groups]

        def spread(values: Tensor) -> Sequence[Tensor]:  # for the whole epoch at once: no waiting in a step
            return values[mine].to(self.device).split(lengths)

        def draws(high: int) -> Sequence[Tensor]:
            return spread(torch.randint(high, (len(order),), generator=rng))

        chosen, down, right, flip = spread(order), draws(2 * padding + 1), draws(2 * padding + 1), draws(2)
        row, column = draws(side), draws(side)
        for i, (indices, group) in enumerate(zip(chosen, groups, strict=True)):
            mirrored = flip[i].bool() & self.dataset.flip
            images = crop_and_flip(self.pixels[indices].permute(0, 3, 1, 2), down[i], right[i], mirrored, padding)
            images = normalise(images, self.mean, self.std)
            if length:
                images = cutout(images, row[i], column[i], length)
            images = images.contiguous(memory_format=self.memory_format)
            yield from zip(images.split(group), self.labels[indices].split(group), strict=True)

    def _streamed(self, batches: Sequence[Tensor], transform, seed: int | None = None) -> Iterator[Batch]:
        files = _Files(self.files, transform, seed)
        for batch in read_in_workers(files, batches, self.workers, self.device.type == "cuda"):
            images, indices = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield self._plain(images), self.labels[indices]

    def _plain(self, images: Tensor) -> Tensor:
        return normalise(images, self.mean, self.std).contiguous(memory_format=self.memory_format)


class _Files(TorchDataset):
    """Images read from files, with their positions. With a seed, each image's augmentation depends on it alone,
    so that neither the number of workers nor a resume changes anything."""

    def __init__(self, files: list[str], transform, seed: int | None):
        self.files, self.transform, self.seed = files, transform, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.files[index])
        with torch.random.fork_rng(devices=[]):
            if self.seed is not None:
                torch.default_generator.manual_seed(self.seed + index)  # torch.manual_seed takes 0.1 ms
            return self.transform(image), index
