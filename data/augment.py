"""Augmentation and normalisation of images."""

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(
    images: Tensor, down: Tensor, right: Tensor, flip: Tensor, padding: int
) -> Tensor:
    """Shifted, zero-padded crops, mirrored where `flip`: (N, 3, S, S) -> (N, 3, S, S), any type.

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
    """Zeroes a square of that side, centred at (row, column) and clipped at the border.

    images: (N, 3, S, S), normalised, so that zero is the mean; row, column: (N,). DeVries and
    Taylor, arXiv 1708.04552.
    """
    pixels = torch.arange(images.shape[-1], device=images.device)

    def hit(centre: Tensor) -> Tensor:
        start = centre[:, None] - length // 2
        return (pixels >= start) & (pixels < start + length)

    return images.masked_fill((hit(row)[:, :, None] & hit(column)[:, None, :])[:, None], 0)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, 3, S, S) -> float, with mean and std (3, 1, 1) for values from 0 to 1."""
    return images.float().div_(255).sub_(mean).div_(std)
