"""Images in blocks: 2x2 pixels as one of 16 channels, since tensor cores want multiples of 8.

A convolution of 7x7 taps, stride 2 and three channels becomes one of 4x4 blocks and stride 1:
``conv2d(in_blocks(x, IMAGE_BORDER), in_blocks(weight, KERNEL_BORDER))``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS = 16
# Pixels of zeros before and after an image and a kernel. Output y reads the rows 2y - 3 to 2y + 3,
# which are in the blocks y - 2 to y + 1: two blocks of border before, one after, and a row of zeros
# before the seven taps.
IMAGE_BORDER, KERNEL_BORDER = (4, 2), (1, 0)
KERNEL_SHAPE = (CHANNELS, 4, 4)


def in_blocks(x: Tensor, border: tuple[int, int]) -> Tensor:
    """Return x (N, 3, H, W) with a ``border`` before and after, as channels-last (N, 16, H', W').

    A block's channels are its pixels, row by row, each of red, green, blue and a zero. Both sides
    with their border must be even; H' and W' are half of them. Differentiable; the gradient is
    channels-last.
    """
    x = F.pad(x.permute(0, 2, 3, 1), (0, 1, *border, *border))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (N, H', 2, W', 2, 4)
    return x.transpose(2, 3).flatten(3).permute(0, 3, 1, 2)


def blocks_shape(size: int) -> tuple[int, int, int]:
    """Return the channels, height and width of an image of ``size`` x ``size`` pixels in blocks."""
    side = (sum(IMAGE_BORDER) + size) // 2
    return CHANNELS, side, side


def kernel_places() -> Tensor:
    """Return where ``in_blocks`` moves the elements of a kernel, int32 (147,).

    Both a kernel of 7x7x3 and its blocks, 4x4x16, are counted in channels-last memory.
    """
    numbers = torch.arange(1, 148).view(1, 7, 7, 3).permute(0, 3, 1, 2)
    moved = in_blocks(numbers, KERNEL_BORDER).permute(0, 2, 3, 1).flatten()
    return moved.argsort()[-numbers.numel() :].to(torch.int32)
