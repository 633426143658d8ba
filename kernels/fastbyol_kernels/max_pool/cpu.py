"""``max_pool`` on a CPU. A block is an image.

The forward pass keeps the place of each maximum, a byte, in place of its input and an index of eight bytes. The backward pass
gathers: a pixel looks at the one, two or four windows over it, so that nothing is written twice.

Letters: N samples, C channels, H W pixels before, P Q after. Places in a window are numbered from 0 to 8, row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol_kernels.native import U8, Activation, inlined, kernel, narrowed, noalias, widened

# No place: of a window that is not there.
_NOWHERE = 16


@inlined
def _pixel(array, index, c):
    # A slice, not an offset: an index that might be negative makes the compiler gather elements one by one.
    return array[index * c : (index + 1) * c]


@inlined
def _larger(best, place, new, number):
    """Return the maximum and its place by torch's rule: the first of equal values, the last that is no number."""
    takes = (widened(new) > widened(best)) | (widened(new) != widened(new))
    return (new if takes else best), (number if takes else place)


@noalias
def _maximum(y, places, x0, x1, x2, x3, x4, x5, x6, x7, x8, top, bottom, left, right):
    for i in range(len(y)):
        best, place = x0[i], np.uint8(top + left)
        best, place = _larger(best, place, x1[i], np.uint8(top + 1))
        best, place = _larger(best, place, x2[i], np.uint8(top + right))
        best, place = _larger(best, place, x3[i], np.uint8(3 + left))
        best, place = _larger(best, place, x4[i], np.uint8(3 + 1))
        best, place = _larger(best, place, x5[i], np.uint8(3 + right))
        best, place = _larger(best, place, x6[i], np.uint8(bottom + left))
        best, place = _larger(best, place, x7[i], np.uint8(bottom + 1))
        best, place = _larger(best, place, x8[i], np.uint8(bottom + right))
        y[i], places[i] = best, place


@kernel
def _forward(block: int, x: Activation, y: Activation, places: U8, h: int, w: int, c: int) -> None:
    """Write y (N, P, Q, C) and the places of the maxima, from x (N, H, W, C)."""
    p, q = (h + 1) // 2, (w + 1) // 2
    for row in range(p):
        # How far there is a neighbour. One that is not is the middle again, place and all, which changes no maximum.
        up, down = min(row, 1), min(1, h - 1 - 2 * row)
        for column in range(q):
            left, right = min(column, 1), min(1, w - 1 - 2 * column)
            to, middle = (block * p + row) * q + column, (block * h + 2 * row) * w + 2 * column
            above, below = middle - up * w, middle + down * w
            _maximum(
                _pixel(y, to, c), _pixel(places, to, c),
                _pixel(x, above - left, c), _pixel(x, above, c), _pixel(x, above + right, c),
                _pixel(x, middle - left, c), _pixel(x, middle, c), _pixel(x, middle + right, c),
                _pixel(x, below - left, c), _pixel(x, below, c), _pixel(x, below + right, c),
                3 - 3 * up, 3 + 3 * down, 1 - left, 1 + right,
            )  # fmt: skip


@njit(forceinline=True, fastmath=False)
def _sum(a, b, c, d):
    # In torch's order, which ``inlined`` would let the compiler change.
    return ((a + b) + c) + d


@inlined
def _chosen(gradient, place, number):
    return gradient if place == number else np.float32(0)


@noalias
def _gradient(dx, d0, d1, d2, d3, p0, p1, p2, p3, n0, n1, n2, n3):
    for i in range(len(dx)):
        a, b = _chosen(widened(d0[i]), p0[i], n0), _chosen(widened(d1[i]), p1[i], n1)
        c, d = _chosen(widened(d2[i]), p2[i], n2), _chosen(widened(d3[i]), p3[i], n3)
        dx[i] = narrowed(_sum(a, b, c, d), dx)


@kernel
def _backward(block: int, dy: Activation, places: U8, dx: Activation, h: int, w: int, c: int) -> None:
    """Write dx (N, H, W, C) from dy (N, P, Q, C) and the places."""
    p, q = (h + 1) // 2, (w + 1) // 2
    for row in range(h):
        # An odd pixel lies in the bottom row of one window and in the top row of the next, an even one in a middle row.
        above, below = row // 2, min((row + 1) // 2, p - 1)
        bottom, top = 3 + 3 * (row % 2), 0 if below > above else _NOWHERE
        for column in range(w):
            before, after = column // 2, min((column + 1) // 2, q - 1)
            right, left = 1 + column % 2, 0 if after > before else _NOWHERE
            w0, w1 = (block * p + above) * q + before, (block * p + above) * q + after
            w2, w3 = (block * p + below) * q + before, (block * p + below) * q + after
            _gradient(
                _pixel(dx, (block * h + row) * w + column, c),
                _pixel(dy, w0, c), _pixel(dy, w1, c), _pixel(dy, w2, c), _pixel(dy, w3, c),
                _pixel(places, w0, c), _pixel(places, w1, c), _pixel(places, w2, c), _pixel(places, w3, c),
                np.uint8(bottom + right), np.uint8(bottom + left), np.uint8(top + right), np.uint8(top + left),
            )  # fmt: skip


class PlacedMaxPool(torch.autograd.Function):
    """For channels-last x on a CPU, bf16 or fp32. Saves the places, uint8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.new_empty(n, (h + 1) // 2, (w + 1) // 2, c).permute(0, 3, 1, 2)
        places = torch.empty_like(y, dtype=torch.uint8)
        _forward(n, x, y, places, h, w, c)
        ctx.shape = x.shape
        ctx.save_for_backward(places)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        dy, (places,) = grads[0].contiguous(memory_format=torch.channels_last), ctx.saved_tensors
        n, c, h, w = ctx.shape
        dx = dy.new_empty(n, h, w, c).permute(0, 3, 1, 2)
        _backward(n, dy, places, dx, h, w, c)
        return dx
