"""``max_pool`` on a CPU, an image per block.

Letters: N samples, C channels, H W pixels of the input, P Q of the output. A tap is the index of a
pixel in its window, from 0 to 8, row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol_kernels.native import U8, Activation, inlined, kernel, narrowed, noalias, widened

# A tap that no window has, for windows beyond the edge.
_NO_TAP = 16


@inlined
def _pixel(array, index, c):
    # A slice, not an offset: an index that might be negative makes the compiler gather elements one
    # by one.
    return array[index * c : (index + 1) * c]


@inlined
def _larger(best, tap, new, new_tap):
    """Return the maximum and its tap by torch's rule: the first of equal values, the last NaN."""
    wins = (widened(new) > widened(best)) | (widened(new) != widened(new))
    return (new if wins else best), (new_tap if wins else tap)


@noalias
def _maximum(y, taps, x0, x1, x2, x3, x4, x5, x6, x7, x8, top, bottom, left, right):
    for i in range(len(y)):
        best, tap = x0[i], np.uint8(top + left)
        best, tap = _larger(best, tap, x1[i], np.uint8(top + 1))
        best, tap = _larger(best, tap, x2[i], np.uint8(top + right))
        best, tap = _larger(best, tap, x3[i], np.uint8(3 + left))
        best, tap = _larger(best, tap, x4[i], np.uint8(3 + 1))
        best, tap = _larger(best, tap, x5[i], np.uint8(3 + right))
        best, tap = _larger(best, tap, x6[i], np.uint8(bottom + left))
        best, tap = _larger(best, tap, x7[i], np.uint8(bottom + 1))
        best, tap = _larger(best, tap, x8[i], np.uint8(bottom + right))
        y[i], taps[i] = best, tap


@kernel
def _forward(block: int, x: Activation, y: Activation, taps: U8, h: int, w: int, c: int) -> None:
    """Write y (N, P, Q, C) and the taps of the maxima, from x (N, H, W, C)."""
    p, q = (h + 1) // 2, (w + 1) // 2
    for row in range(p):
        # The distance of the neighbours. Beyond the edge it is 0: the neighbour is the middle pixel
        # again, with the middle's tap, which changes no maximum.
        up, down = min(row, 1), min(1, h - 1 - 2 * row)
        for column in range(q):
            left, right = min(column, 1), min(1, w - 1 - 2 * column)
            to, middle = (block * p + row) * q + column, (block * h + 2 * row) * w + 2 * column
            above, below = middle - up * w, middle + down * w
            _maximum(
                _pixel(y, to, c), _pixel(taps, to, c),
                _pixel(x, above - left, c), _pixel(x, above, c), _pixel(x, above + right, c),
                _pixel(x, middle - left, c), _pixel(x, middle, c), _pixel(x, middle + right, c),
                _pixel(x, below - left, c), _pixel(x, below, c), _pixel(x, below + right, c),
                3 - 3 * up, 3 + 3 * down, 1 - left, 1 + right,
            )  # fmt: skip


@njit(forceinline=True, fastmath=False)
def _sum(a, b, c, d):
    # In torch's order, which the options of ``inlined`` would let the compiler change.
    return ((a + b) + c) + d


@inlined
def _chosen(gradient, tap, own):
    return gradient if tap == own else np.float32(0)


@noalias
def _gradient(dx, d0, d1, d2, d3, t0, t1, t2, t3, n0, n1, n2, n3):
    for i in range(len(dx)):
        a, b = _chosen(widened(d0[i]), t0[i], n0), _chosen(widened(d1[i]), t1[i], n1)
        c, d = _chosen(widened(d2[i]), t2[i], n2), _chosen(widened(d3[i]), t3[i], n3)
        dx[i] = narrowed(_sum(a, b, c, d), dx)


@kernel
def _backward(block: int, dy: Activation, taps: U8, dx: Activation, h: int, w: int, c: int) -> None:
    """Write dx (N, H, W, C) from dy (N, P, Q, C) and the taps.

    Each pixel gathers from the one, two or four windows that contain it, so it is written once.
    """
    p, q = (h + 1) // 2, (w + 1) // 2
    for row in range(h):
        # An odd row is the bottom row of one window and the top row of the next, an even row is a
        # middle row.
        above, below = row // 2, min((row + 1) // 2, p - 1)
        bottom, top = 3 + 3 * (row % 2), 0 if below > above else _NO_TAP
        for column in range(w):
            before, after = column // 2, min((column + 1) // 2, q - 1)
            right, left = 1 + column % 2, 0 if after > before else _NO_TAP
            w0, w1 = (block * p + above) * q + before, (block * p + above) * q + after
            w2, w3 = (block * p + below) * q + before, (block * p + below) * q + after
            _gradient(
                _pixel(dx, (block * h + row) * w + column, c),
                _pixel(dy, w0, c), _pixel(dy, w1, c), _pixel(dy, w2, c), _pixel(dy, w3, c),
                _pixel(taps, w0, c), _pixel(taps, w1, c), _pixel(taps, w2, c), _pixel(taps, w3, c),
                np.uint8(bottom + right), np.uint8(bottom + left), np.uint8(top + right),
                np.uint8(top + left),
            )  # fmt: skip


class CpuMaxPool(torch.autograd.Function):
    """Max pooling of channels-last x on a CPU, bf16 or fp32.

    It saves the tap of each maximum, a byte, instead of the input and an index of eight bytes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.new_empty(n, (h + 1) // 2, (w + 1) // 2, c).permute(0, 3, 1, 2)
        taps = torch.empty_like(y, dtype=torch.uint8)
        _forward(n, x, y, taps, h, w, c)
        ctx.shape = x.shape
        ctx.save_for_backward(taps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        dy, (taps,) = grads[0].contiguous(memory_format=torch.channels_last), ctx.saved_tensors
        n, c, h, w = ctx.shape
        dx = dy.new_empty(n, h, w, c).permute(0, 3, 1, 2)
        _backward(n, dy, taps, dx, h, w, c)
        return dx


# What a step calls, for ``native.compile_ahead``.
TRAINED_WITH = (_forward, _backward)
