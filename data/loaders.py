"""Batches on the device: images and labels in a fixed order, or shuffled and augmented."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from data.augment import crop_and_flip, cutout, normalise
from data.datasets import ImageData, Split
from data.images import ImageFiles, evaluation_transform, quiet_worker, training_transform
from utils import generator, rank, world_size

Batch = tuple[Tensor, Tensor]

AUGMENTED = 2048  # images per augmentation call, which launches some twenty kernels


class Batches:
    """The batches of one split: normalised images (N, 3, S, S) and labels (N,), on the device.

    Small images live on the device as one uint8 tensor; files are read by worker processes.
    Iterating yields the split in order, the same on every rank, without augmentation. precision: of
    the network that they are for; it decides the memory format.
    """

    def __init__(
        self,
        dataset: ImageData,
        split: Split,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        precision: str = "fp32",
    ):
        self.dataset, self.batch_size = dataset, batch_size
        self.device, self.workers, self.precision = device, workers, precision
        # Channels last for oneDNN and tensor cores, NCHW for CUDA's fp32 depthwise kernels.
        channels_last = device.type == "cpu" or precision == "bf16"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.augment_in_order, self.cutout_length = False, 0
        self.files = None if isinstance(split.images, Tensor) else split.images
        if self.files is None:  # as (N, S, S, 3): the three bytes of a pixel are copied together
            self.pixels = split.images.permute(0, 2, 3, 1).contiguous().to(device)
        self.labels = split.labels.to(device)
        self.mean = torch.tensor(dataset.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(dataset.std, device=device).view(3, 1, 1)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._in_order(0, 1)

    def for_this_rank(self) -> Iterator[tuple[int, Batch]]:
        """This rank's batches with their numbers; together the ranks have each batch once."""
        numbers = range(rank(), len(self), world_size())
        return zip(numbers, self._in_order(rank(), world_size()), strict=True)

    def augmented(self, cutout_length: int = 0) -> "Batches":
        """The same batches, augmented as in training, and in the same way at every pass."""
        batches = copy.copy(self)
        batches.augment_in_order, batches.cutout_length = True, cutout_length
        return batches

    def steps(self) -> int:
        """Batches of a training epoch; an incomplete last one is dropped unless it is alone."""
        return max(1, len(self.labels) // self.batch_size)

    def epoch(self, seed: int, epoch: int, cutout_length: int = 0) -> Iterator[Batch]:
        """The batches of a training epoch; order and augmentation depend on (seed, epoch) alone.

        Of each batch a rank gets every n-th image, where n is the number of ranks.
        """
        rng = generator(seed, f"images {epoch}")
        order = torch.randperm(len(self.labels), generator=rng)
        batches = torch.arange(len(order)).split(self.batch_size)[: self.steps()]
        own = [batch[rank() :: world_size()] for batch in batches]
        yield from self._augmented(order, own, rng, cutout_length)

    def blank(self, ranks: int = 1) -> Tensor:
        """A rank's part of a batch, of zeros, with device and memory format of the real ones."""
        side, count = self.dataset.image_size, min(self.batch_size, len(self.labels)) // ranks
        images = torch.zeros(count, 3, side, side, device=self.device)
        return images.contiguous(memory_format=self.memory_format)

    def _in_order(self, first: int, step: int) -> Iterator[Batch]:
        order = torch.arange(len(self.labels))
        # Of nearly equal size: a small last batch would have poor BatchNorm statistics.
        batches = list(order.tensor_split(len(self))[first::step])
        if self.augment_in_order:
            rng = generator(0, "augmented in order")
            yield from self._augmented(order, batches, rng, self.cutout_length)
        elif self.files is not None:
            yield from self._streamed(batches, evaluation_transform(self.dataset.image_size))
        else:
            for indices in batches:
                here = slice(indices[0], indices[-1] + 1)
                yield self._normalised(self.pixels[here].permute(0, 3, 1, 2)), self.labels[here]

    def _augmented(
        self, order: Tensor, batches: list[Tensor], rng: torch.Generator, cutout_length: int
    ) -> Iterator[Batch]:
        """Batches of positions in `order`; `rng` draws for all of `order`, whatever the batches."""
        side = self.dataset.image_size
        if self.files is not None:
            seed = torch.randint(2**62, (1,), generator=rng).item()
            indices = [order[batch] for batch in batches]
            yield from self._streamed(indices, training_transform(side), seed)
            return
        if not batches:  # more ranks than batches
            return
        padding, sizes = side // 8, [len(batch) for batch in batches]
        per_chunk = max(1, AUGMENTED // max(sizes))
        chunks = [sizes[i : i + per_chunk] for i in range(0, len(sizes), per_chunk)]
        positions, lengths = torch.cat(batches), [sum(chunk) for chunk in chunks]

        def take(values: Tensor) -> Sequence[Tensor]:
            # Moves the whole epoch at once, so that no step waits for the host.
            return values[positions].to(self.device).split(lengths)

        def randint(high: int) -> Sequence[Tensor]:
            return take(torch.randint(high, (len(order),), generator=rng))

        chosen, down, right = take(order), randint(2 * padding + 1), randint(2 * padding + 1)
        flip, row, column = randint(2), randint(side), randint(side)
        for i, (indices, chunk) in enumerate(zip(chosen, chunks, strict=True)):
            images = self.pixels[indices].permute(0, 3, 1, 2)
            mirrored = flip[i].bool() & self.dataset.flip
            images = crop_and_flip(images, down[i], right[i], mirrored, padding)
            images = normalise(images, self.mean, self.std)
            if cutout_length:
                images = cutout(images, row[i], column[i], cutout_length)
            images = images.contiguous(memory_format=self.memory_format)
            yield from zip(images.split(chunk), self.labels[indices].split(chunk), strict=True)

    def _streamed(
        self, batches: list[Tensor], transform: v2.Transform, seed: int | None = None
    ) -> Iterator[Batch]:
        loader = DataLoader(
            ImageFiles(self.files, transform, seed),
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=quiet_worker,
        )
        for batch in loader:
            images, indices = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield self._normalised(images), self.labels[indices]

    def _normalised(self, images: Tensor) -> Tensor:
        images = normalise(images, self.mean, self.std)
        return images.contiguous(memory_format=self.memory_format)
