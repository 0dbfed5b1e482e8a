"""What happens to a batch of images before the network sees it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from data.datasets import evaluation_resize


def crop_and_flip(images: Tensor, down: Tensor, right: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Shifted, zero-padded crops of the same size, mirrored where `flip`: (N, 3, S, S) -> (N, 3, S, S), any type.

    down, right: (N,) offsets of the crop in the padded image, 0 to 2 * padding; flip: (N,) bool.
    """
    n, _, side, _ = images.shape
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    pixels = torch.arange(side, device=images.device)
    rows = pixels + down[:, None]
    columns = torch.where(flip[:, None], pixels.flip(0), pixels) + right[:, None]
    index = torch.arange(n, device=images.device)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, row: Tensor, column: Tensor, length: int) -> Tensor:
    """Zeroes a square of that side, centred at (row, column) and clipped at the border (DeVries and Taylor, 2017).

    images: (N, 3, S, S), normalised, so that zero is the mean; row, column: (N,).
    """
    pixels = torch.arange(images.shape[-1], device=images.device)

    def hit(centre: Tensor) -> Tensor:
        start = centre[:, None] - length // 2
        return (pixels >= start) & (pixels < start + length)

    return images.masked_fill((hit(row)[:, :, None] & hit(column)[:, None, :])[:, None], 0)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, 3, S, S) -> float, with mean and std (3, 1, 1) for values from 0 to 1."""
    return images.float().div_(255).sub_(mean).div_(std)


def streamed_transform(image_size: int, train: bool) -> v2.Transform:
    """For large images, one at a time, to uint8 (3, S, S): the training augmentation of the official code, or none."""
    if train:
        jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
        return v2.Compose([v2.RandomResizedCrop(image_size), jitter, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return v2.Compose([v2.Resize(evaluation_resize(image_size)), v2.CenterCrop(image_size), v2.PILToTensor()])
