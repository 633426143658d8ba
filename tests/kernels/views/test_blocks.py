"""Images in blocks: the convolution of them is that of the pixels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbyol_kernels.views.blocks import IMAGE_BORDER, KERNEL_BORDER, blocks_shape, in_blocks


@pytest.mark.parametrize("size", [2, 4, 10, 32])
def test_a_convolution_of_blocks_is_that_of_pixels(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, size, size), (5, 3, 7, 7))
    )
    plain = F.conv2d(x, weight, None, 2, 3)
    images, kernels = in_blocks(x, IMAGE_BORDER), in_blocks(weight, KERNEL_BORDER)
    assert images.shape[1:] == blocks_shape(size)
    for blocks in (images, kernels):
        assert blocks.is_contiguous(memory_format=torch.channels_last)
    ours = F.conv2d(images, kernels)
    gradient = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, (x, weight), gradient)),
        (plain, *torch.autograd.grad(plain, (x, weight), gradient)),
        strict=True,
    )
    for got, exact in pairs:  # float64 sums of up to 2,560 products of order one
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
