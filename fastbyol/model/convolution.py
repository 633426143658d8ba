"""A 3x3 convolution with few output pixels, as one matrix product per pixel: for CPUs.

Letters: N samples, S pixels of a side, I and O channels in and out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastbyol_kernels.dispatch import at_once

KERNEL = 3
# At 96 pixels the last stage of ResNet-18 works on 3x3 pixels, at 32 pixels on one. With a border
# of zeros only 49 of the 9 x 9 taps lie over pixels there, and one of 1 x 9; oneDNN computes them
# all. The limits are the largest side of an output and the largest share of taps over pixels at
# which products by pixel were faster, forward and backward together (64 to 512 channels, batches of
# 256 and 512, one core of an AVX512-BF16 CPU: bench/LOG.md, "few pixels"). In float32 a product
# runs at half the convolution's rate, in bfloat16 at the same.
LIMITS = {torch.bfloat16: (3, 1.0), torch.float32: (2, 0.5)}
# The weight gradient of oneDNN's strided 1x1 convolution writes past its workspace if channels-last
# inputs have fewer channels than its block, 8 or 16 (github.com/uxlfoundation/oneDNN/issues/6035):
# wrong sums, a hang or SIGSEGV.
SAFE_CHANNELS = 16


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Convolve x (N, I, S, S) with weight (O, I, k, k), by pixel where that is faster.

    The result is that of ``F.conv2d`` but for rounding. A strided 1x1 kernel with few input
    channels gets a subsampled input instead of a stride (``SAFE_CHANNELS``).
    """
    if pays(x, weight, stride, padding):
        return convolve_by_pixel(x, weight, stride)
    if (
        weight.shape[2:] == (1, 1)
        and stride > 1
        and x.shape[1] < SAFE_CHANNELS
        and x.device.type == "cpu"
    ):
        return F.conv2d(x[:, :, ::stride, ::stride], weight)
    return F.conv2d(x, weight, None, stride, padding)


def pays(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Return whether ``convolve`` goes by pixel: eagerly, on a cpu, within ``LIMITS``."""
    if x.dtype not in LIMITS or not at_once(x, weight):
        return False
    if weight.shape[2:] != (KERNEL, KERNEL) or padding != 1:
        return False
    most_pixels, most_share = LIMITS[x.dtype]
    height, width = x.shape[2:]
    return max(_out(height, stride), _out(width, stride)) <= most_pixels and (
        _share(height, stride) * _share(width, stride) <= most_share
    )


def convolve_by_pixel(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve x (N, I, H, W) with weight (O, I, 3, 3), padding 1, one matrix product a pixel.

    Returns (N, O, H', W') in channels-last, differentiable once. Sums are in the matrix product's
    own precision, so rounding is a convolution's.
    """
    result: Tensor = _ByPixel.apply(x, weight, stride)
    return result


class _ByPixel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        sides = (_out(side, stride) for side in x.shape[2:])
        # No view of another tensor: the caller may overwrite it.
        out = torch.empty(
            (len(x), len(weight), *sides),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        _forward(x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1), stride, out.permute(0, 2, 3, 1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = (tensor.permute(0, 2, 3, 1) for tensor in ctx.saved_tensors)
        gradient = grads[0].permute(0, 2, 3, 1)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = (
            _input_gradient(gradient, weight, x.shape, ctx.stride).permute(0, 3, 1, 2)
            if needs_x
            else None
        )
        dweight = (
            _weight_gradient(gradient, x, weight.shape, ctx.stride).permute(0, 3, 1, 2)
            if needs_weight
            else None
        )
        return dx, dweight, None


def _forward(x: Tensor, weight: Tensor, stride: int, out: Tensor) -> None:
    """Convolve x (N, H, W, I) with weight (O, 3, 3, I) into ``out`` (N, H', W', O)."""
    for i, j in _pixels(*out.shape[1:3]):
        rows, columns = _under(i, stride, x.shape[1]), _under(j, stride, x.shape[2])
        patch = x[:, rows, columns].flatten(1)
        part = weight[:, _taps(rows, i, stride), _taps(columns, j, stride)].flatten(1)
        torch.mm(patch, part.t(), out=out[:, i, j])


def _input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """Return the gradient of x, ``shape`` (N, H, W, I), gathered from the outputs by pixel."""
    dx = gradient.new_empty(shape)
    turned = weight.flip(1, 2).permute(
        1, 2, 0, 3
    )  # (3, 3, O, I), the kernel as an input pixel sees it
    for i, j in _pixels(*shape[1:3]):
        rows, columns = _over(i, stride, gradient.shape[1]), _over(j, stride, gradient.shape[2])
        patch = gradient[:, rows, columns].flatten(1)
        part = turned[_turned_taps(rows, i, stride), _turned_taps(columns, j, stride)].flatten(0, 2)
        torch.mm(patch, part, out=dx[:, i, j])
    return dx


def _weight_gradient(gradient: Tensor, x: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """Return the gradient of the weight, ``shape`` (O, 3, 3, I): one product a tap."""
    dweight = gradient.new_zeros(shape)
    for a, b in _pixels(KERNEL, KERNEL):
        rows, columns = _reached(a, stride, x.shape[1]), _reached(b, stride, x.shape[2])
        if len(rows) and len(columns):
            g = gradient[:, rows.start : rows.stop, columns.start : columns.stop].flatten(0, 2)
            under = x[:, _shifted(rows, a, stride), _shifted(columns, b, stride)].flatten(0, 2)
            dweight[:, a, b] = torch.mm(g.t(), under)
    return dweight


def _out(side: int, stride: int) -> int:
    """Return the output's side for a kernel of three and a border of one."""
    return (side - 1) // stride + 1


def _share(side: int, stride: int) -> float:
    """Return the share of a row of taps, over all of its outputs, that lie over pixels."""
    outputs = range(_out(side, stride))
    covered = sum(min(i * stride + 2, side) - max(i * stride - 1, 0) for i in outputs)
    return covered / (KERNEL * len(outputs))


def _pixels(height: int, width: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(height) for j in range(width))


def _under(i: int, stride: int, side: int) -> slice:
    """Return the input pixels under the kernel of output pixel i."""
    return slice(max(i * stride - 1, 0), min(i * stride + 2, side))


def _taps(pixels: slice, i: int, stride: int) -> slice:
    """Return the taps of output pixel i's kernel over the input ``pixels``."""
    return slice(pixels.start - i * stride + 1, pixels.stop - i * stride + 1)


def _over(i: int, stride: int, side: int) -> slice:
    """Return the output pixels whose kernels lie over input pixel i."""
    return slice(max(-(-(i - 1) // stride), 0), min((i + 1) // stride + 1, side))


def _turned_taps(pixels: slice, i: int, stride: int) -> slice:
    """Return the taps, from the kernel's end, over input pixel i of the output ``pixels``.

    Output p has tap i - p stride + 1 there.
    """
    return slice(pixels.start * stride - i + 1, (pixels.stop - 1) * stride - i + 2, stride)


def _reached(tap: int, stride: int, side: int) -> range:
    """Return the output pixels for which ``tap`` lies over a pixel and not over the border."""
    return range(-(-max(1 - tap, 0) // stride), min((side - tap) // stride + 1, _out(side, stride)))


def _shifted(pixels: range, tap: int, stride: int) -> slice:
    """Return the input pixels under ``tap`` of the output ``pixels``."""
    return slice(pixels.start * stride + tap - 1, (pixels.stop - 1) * stride + tap, stride)
