"""``max_pool`` on a GPU, in Triton: a launch forward and one backward, both without atomics.

Letters: N samples, H W pixels of the input, P Q of the output, C channels. A tap is the index of a
pixel in its window, from 0 to 8, row by row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Channels of a program, and elements of its tile: 128 bytes of bf16 in a row, 8 elements a thread.
MAX_CHANNELS, BLOCK, NUM_WARPS = 64, 2048, 8


@triton.jit
def window(row, H: tl.constexpr, W: tl.constexpr):
    """Return sample, first row and first column of the windows of outputs ``row``."""
    P: tl.constexpr = (H + 1) // 2
    Q: tl.constexpr = (W + 1) // 2
    return row // (P * Q), row // Q % P * 2 - 1, row % Q * 2 - 1


@triton.jit
def tap_offsets(
    sample, top, left, channels, mask, TAP: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr
):  # fmt: skip
    """Return the offsets of a tap in x (N, H, W, C), and the mask of the taps that exist."""
    y, x = top + TAP // 3, left + TAP % 3
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    pixel = (sample.to(tl.int64) * H + y) * W + x
    return pixel[:, None] * C + channels[None, :], mask & inside[:, None]


@triton.jit
def least(top, left, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return -inf and each window's first tap that exists: its maximum where all are -inf."""
    first = tl.where(top < 0, 3, 0) + tl.where(left < 0, 1, 0)
    best = tl.full((BLOCK_R, BLOCK_C), float("-inf"), tl.float32)
    return best, tl.broadcast_to(first[:, None], (BLOCK_R, BLOCK_C))


@triton.jit
def keep_larger(best, tap, value, TAP: tl.constexpr, mask):
    """Return the larger value and its tap: the first of equal ones, the last NaN, as torch."""
    wins = mask & ((value > best) | (value != value))
    return tl.where(wins, value, best), tl.where(wins, TAP, tap)


@triton.jit
def gradient_of_pixels(
    dy, more, taps, row, channels, mask, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """Return the gradient, fp32, of the pixels ``row`` of x (N, H, W, C), from the pooled ``dy``.

    If ADDED, ``more`` is the other part of the pooled gradient.
    A pixel lies in one window or two on each axis. It gets their gradients where it is the maximum.
    """
    P: tl.constexpr = (H + 1) // 2
    Q: tl.constexpr = (W + 1) // 2
    sample, y, x = row // (H * W), row // W % H, row % W
    total = tl.zeros(mask.shape, tl.float32)
    for window_y in tl.static_range(2):
        for window_x in tl.static_range(2):
            p, q = (y + window_y) // 2, (x + window_x) // 2
            i, j = y - 2 * p + 1, x - 2 * q + 1
            # The second window of an even row or column is the first one again.
            counts = (p < P) & (q < Q)
            if window_y == 1:
                counts = counts & (i == 0)
            if window_x == 1:
                counts = counts & (j == 0)
            pixel = (sample.to(tl.int64) * P + p) * Q + q
            offsets = pixel[:, None] * C + channels[None, :]
            inside = mask & counts[:, None]
            tap = tl.load(taps + offsets, mask=inside, other=255).to(tl.int32)
            gradient = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
            if ADDED:
                gradient += tl.load(more + offsets, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(tap == (3 * i + j)[:, None], gradient, 0.0)
    return total


@triton.jit
def _tile(num_rows, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return this program's rows and channels, and the mask of those that exist."""
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row, channels, (row < num_rows)[:, None] & (channels < C)[None, :]


@triton.jit
def _forward_kernel(
    x, y, taps, num_rows,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write y (N, P, Q, C) and the taps of the maxima, u8."""
    row, channels, mask = _tile(num_rows, C, BLOCK_R, BLOCK_C)
    sample, top, left = window(row, H, W)
    best, tap = least(top, left, BLOCK_R, BLOCK_C)
    for index in tl.static_range(9):
        offsets, exists = tap_offsets(sample, top, left, channels, mask, index, H, W, C)
        value = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)
        best, tap = keep_larger(best, tap, value, index, exists)
    out = row.to(tl.int64)[:, None] * C + channels[None, :]
    tl.store(y + out, best.to(y.dtype.element_ty), mask=mask)
    tl.store(taps + out, tap.to(tl.uint8), mask=mask)


@triton.jit
def _backward_kernel(
    dy, more, taps, dx, num_rows,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """Write dx (N, H, W, C)."""
    row, channels, mask = _tile(num_rows, C, BLOCK_R, BLOCK_C)
    gradient = gradient_of_pixels(dy, more, taps, row, channels, mask, H, W, C, ADDED)
    out = row.to(tl.int64)[:, None] * C + channels[None, :]
    tl.store(dx + out, gradient.to(dx.dtype.element_ty), mask=mask)


# The reason of kernels that move narrow words, which ``fastbyol_bench.launches`` demands.
_TAPS = "taps are u8, half as wide as the values beside them"
NARROW = {"_forward_kernel": _TAPS, "_backward_kernel": _TAPS}


@torch.library.custom_op("fastbyol::max_pool", mutates_args=())
def triton_max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and the taps of channels-last x (N, C, H, W), bf16 or fp32."""
    y, taps = pooled_like(x), pooled_like(x, torch.uint8)
    grid, options = _plan(y)
    _forward_kernel[grid](x, y, taps, y.numel() // y.shape[1], **_sides(x), **options)
    return y, taps


def pooled_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return unfilled memory for x's pooled values, channels-last, in x's dtype or ``dtype``."""
    n, c, h, w = x.shape
    return torch.empty(
        (n, c, (h + 1) // 2, (w + 1) // 2),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


@triton_max_pool.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return pooled_like(x), pooled_like(x, torch.uint8)


@torch.library.custom_op("fastbyol::max_pool_backward", mutates_args=())
def _max_pool_backward(
    dy: Tensor, taps: Tensor, height: int, width: int, more: Tensor | None = None
) -> Tensor:
    """Return dx (N, C, ``height``, ``width``); the gradient of y is ``dy`` or ``dy + more``."""
    dx = _gradient_like(dy, height, width)
    grid, options = _plan(dx)
    _backward_kernel[grid](
        dy, dy if more is None else more, taps, dx, dx.numel() // dx.shape[1],
        **_sides(dx), **options, ADDED=more is not None,
    )  # fmt: skip
    return dx


def _gradient_like(dy: Tensor, height: int, width: int) -> Tensor:
    return torch.empty(
        (*dy.shape[:2], height, width),
        dtype=dy.dtype,
        device=dy.device,
        memory_format=torch.channels_last,
    )


@_max_pool_backward.register_fake
def _(dy: Tensor, taps: Tensor, height: int, width: int, more: Tensor | None = None) -> Tensor:
    return _gradient_like(dy, height, width)


def _plan(written: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid over the rows and channels of what is ``written``, and the tile's options."""
    channels = written.shape[1]
    block_c = min(MAX_CHANNELS, triton.next_power_of_2(channels))
    block_r = BLOCK // block_c
    grid = (triton.cdiv(channels, block_c), triton.cdiv(written.numel() // channels, block_r))
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    return grid, {"BLOCK_R": block_r, "BLOCK_C": block_c} | options


def _sides(x: Tensor) -> dict[str, int]:
    return dict(zip("CHW", x.shape[1:], strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.sides = inputs[0].shape[2:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, dy: Tensor, _taps: Tensor) -> Tensor:
    (taps,) = ctx.saved_tensors
    dx: Tensor = _max_pool_backward(
        dy.contiguous(memory_format=torch.channels_last), taps, *ctx.sides
    )
    return dx


triton_max_pool.register_autograd(_backward, setup_context=_save)
