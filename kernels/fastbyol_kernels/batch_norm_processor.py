"""``batch_norm`` on a processor: two passes over the activations forward, two backward, each about as fast as a copy.

A block is a run of pixels of one view. The first pass forward sums, by channels, the deviations from the mean of the block's
first few pixels, and their squares; fp64 combines the blocks by Chan's rule. So a large mean costs nothing, and odd first
pixels little: they spoil their own block alone. The mean is kept in two fp32 parts, of which the first is subtracted before
anything is multiplied. The first pass backward sums the gradient g after the ReLU's mask and g * (x - mean).

Source of the combination: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
1979.

Rows of few channels are short loops, so a lane is a channel of several neighbouring pixels, and tables by channel are repeated
over the lanes. Letters: V views, K blocks of a view, C channels, L lanes.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol_kernels.processor import argument, blocks, doubles, floats, halves, kernel, prefetch, rounded, shared, take, value

# 64x48x48 bf16 normalises in 6.8 ms with 512 or 1024 lanes and in 7.0 with 256: enough to hide what a loop costs to begin.
MIN_LANES = 512
# Elements of a block: 10 us of work, and of few pixels with many channels still enough to outweigh a block's sums.
BLOCK, MIN_RUN = 65536, 64
# One pixel that makes all the variance of its view loses 16 ** 2 times less in 16 than alone.
_PIXELS_OF_SHIFT = 16
# Halfway to the smallest bfloat16: what is not above it is rounded to 0.
_LEAST_HALF = 2.0**-134
_CACHE_LINE = 64


@dataclass(frozen=True)
class _Blocks:
    """How views are cut: ``rows`` pixels of a view, ``run`` of a block, ``parts`` blocks of a view."""

    rows: int
    run: int
    parts: int
    channels: int
    lanes: int
    num_views: int

    @staticmethod
    def of(x: Tensor, num_views: int) -> _Blocks:
        n, c, h, w = x.shape
        rows, run = n // num_views * h * w, max(MIN_RUN, BLOCK // c)
        return _Blocks(rows, run, -(-rows // run), c, -(-MIN_LANES // c) * c, num_views)

    @property
    def total(self) -> int:
        return self.num_views * self.parts

    def call(self, run: tuple[Any, Any], x: Tensor, *tensors: Tensor | int) -> None:
        """Run the first of two kernels for bf16 ``x``, the second for fp32."""
        run[x.dtype == torch.float32](self.total, *astuple(self), x, *tensors)


@numba.njit(inline="always")
def _geometry(table):
    """rows, run, parts, C, L, V."""
    return (
        argument(table, 0),
        argument(table, 1),
        argument(table, 2),
        argument(table, 3),
        argument(table, 4),
        argument(table, 5),
    )


@numba.njit(inline="always")
def _fetch_ahead(array, start, stop):
    """Have fp32 elements brought closer that are read only where a ReLU let through: a masked load waits for its mask first,
    and the pass took twice as long. bf16 is widened before it is masked, so its loads do not wait.
    """
    if array.itemsize == 4:
        for address in range(array.ctypes.data + start * 4, array.ctypes.data + stop * 4, _CACHE_LINE):
            prefetch(address)


@numba.njit(inline="always")
def _passed(gradient, before, least):
    """``gradient`` where the ReLU let ``before`` through, else 0. By bits: after a branch the compiler would put off what is
    done to the gradient until it knows the mask, and a product would make NaN of what is infinite.
    """
    keep = np.uint32(np.uint32(before <= least) - np.uint32(1))
    return np.uint32(np.float32(gradient).view(np.uint32) & keep).view(np.float32)


@numba.njit(inline="always")
def _spread(tables, number, lanes, channels):
    """Repeat the first ``channels`` of each of ``number`` tables over all its lanes."""
    for table in range(number):
        values = tables[table * lanes : (table + 1) * lanes]
        first = values[:channels]
        for lane in range(channels, lanes, channels):
            into = values[lane : lane + channels]
            for i in range(channels):
                into[i] = first[i]


@shared
def _sum_deviations(table, x):
    """Sums (L,) of x - shift and of its square, and the shift (L,): a row (3, L) per block."""
    rows, run, parts, c, lanes, _ = _geometry(table)
    block = take(table)
    while block < blocks(table):
        start = (block // parts * rows + block % parts * run) * c
        stop = min(start + run * c, (block // parts + 1) * rows * c)
        sums = floats(table, 7)[block * 3 * lanes : (block + 1) * 3 * lanes]
        once, twice, shift = sums[:lanes], sums[lanes : 2 * lanes], sums[2 * lanes :]
        once[:] = np.float32(0)
        twice[:] = np.float32(0)
        first, into, pixels = x[start : start + c], shift[:c], min((stop - start) // c, _PIXELS_OF_SHIFT)
        into[:] = np.float32(0)
        for pixel in range(1, pixels):
            other = x[start + pixel * c : start + (pixel + 1) * c]
            for i in range(c):
                into[i] += value(other[i]) - value(first[i])
        for i in range(c):
            into[i] = value(first[i]) + into[i] / np.float32(pixels)
        _spread(shift, 1, lanes, c)
        # Four at a time: a sum is stored, which takes longer than to add, once for four.
        while start + 4 * lanes <= stop:
            x0, x1 = x[start : start + lanes], x[start + lanes : start + 2 * lanes]
            x2, x3 = x[start + 2 * lanes : start + 3 * lanes], x[start + 3 * lanes : start + 4 * lanes]
            for i in range(lanes):
                d0, d1 = value(x0[i]) - shift[i], value(x1[i]) - shift[i]
                d2, d3 = value(x2[i]) - shift[i], value(x3[i]) - shift[i]
                once[i] += (d0 + d1) + (d2 + d3)
                twice[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
            start += 4 * lanes
        while start < stop:
            x0 = x[start : min(stop, start + lanes)]
            for i in range(len(x0)):
                d0 = value(x0[i]) - shift[i]
                once[i] += d0
                twice[i] += d0 * d0
            start += lanes
        block = take(table)


@kernel
def _sum_deviations_bf16(table):
    """``_sum_deviations``"""
    _sum_deviations(table, halves(table, 6))


@kernel
def _sum_deviations_fp32(table):
    """``_sum_deviations``"""
    _sum_deviations(table, floats(table, 6))


@numba.njit(inline="always")
def _fold(sums, channels):
    """Add the lanes of each channel up, in order, into the first of them."""
    into = sums[:channels]
    for lane in range(channels, len(sums), channels):
        other = sums[lane : lane + channels]
        for i in range(channels):
            into[i] += other[i]


@kernel
def _moments(table):
    """One block, all in fp64: mean and variance of each view, the running buffers in order of views, and the tables.

    After the geometry: weight, bias, running mean and variance, sums (V, K, 3, L), scratch fp64 (2, C), numbers fp64 (eps,
    momentum, 1 - momentum), moments (V, 2, C), table (V, 3, L).
    """
    rows, run, parts, c, lanes, num_views = _geometry(table)
    weight, bias, running_mean, running_var = floats(table, 6), floats(table, 7), floats(table, 8), floats(table, 9)
    means, m2 = doubles(table, 11)[:c], doubles(table, 11)[c : 2 * c]
    eps, momentum, rest = doubles(table, 12)[0], doubles(table, 12)[1], doubles(table, 12)[2]
    for view in range(num_views * take(table), num_views):
        means[:] = 0.0
        m2[:] = 0.0
        for part in range(parts):
            start = (view * parts + part) * 3 * lanes
            once = floats(table, 10)[start : start + lanes]
            twice = floats(table, 10)[start + lanes : start + 2 * lanes]
            shift = floats(table, 10)[start + 2 * lanes : start + 2 * lanes + c]
            _fold(once, c)
            _fold(twice, c)
            pixels = float(min(rows - part * run, run))
            for i in range(c):
                means[i] += np.float64(once[i]) + pixels * np.float64(shift[i])
        for i in range(c):
            means[i] /= float(rows)
        for part in range(parts):
            start = (view * parts + part) * 3 * lanes
            once = floats(table, 10)[start : start + c]
            twice = floats(table, 10)[start + lanes : start + lanes + c]
            shift = floats(table, 10)[start + 2 * lanes : start + 2 * lanes + c]
            pixels = float(min(rows - part * run, run))
            for i in range(c):
                sum_of_block = np.float64(once[i])
                apart = sum_of_block / pixels + (np.float64(shift[i]) - means[i])
                m2[i] += np.float64(twice[i]) - sum_of_block * (sum_of_block / pixels) + pixels * apart * apart
        moments = floats(table, 13)[view * 2 * c : (view + 1) * 2 * c]
        own = floats(table, 14)[view * 3 * lanes : (view + 1) * 3 * lanes]
        for i in range(c):
            of_channel = 0.0 if m2[i] < 0.0 else m2[i]
            running_mean[i] = np.float32(momentum * means[i] + rest * np.float64(running_mean[i]))
            running_var[i] = np.float32(momentum * (of_channel / float(rows - 1)) + rest * np.float64(running_var[i]))
            rstd = 1.0 / np.sqrt(of_channel / float(rows) + eps)
            mean = np.float32(means[i])
            below = means[i] - np.float64(mean)
            scale = rstd * np.float64(weight[i])
            moments[i], moments[c + i] = np.float32(below), np.float32(rstd)
            own[i], own[lanes + i] = mean, np.float32(scale)
            own[2 * lanes + i] = np.float32(np.float64(bias[i]) - below * scale)
        _spread(own, 3, lanes, c)


@shared
def _normalise(table, x, residual, y):
    """y = max((x - mean) * scale + shift + residual, least). Backwards: what was read last may still be in the cache.

    After x, residual and y: numbers fp32 (least), table (V, 3, L), whether there is a residual.
    """
    rows, run, parts, c, lanes, _ = _geometry(table)
    least, added = floats(table, 9)[0], argument(table, 11)
    block = blocks(table) - 1 - take(table)
    while block >= 0:
        start = (block // parts * rows + block % parts * run) * c
        stop = min(start + run * c, (block // parts + 1) * rows * c)
        own = floats(table, 10)[block // parts * 3 * lanes : (block // parts + 1) * 3 * lanes]
        mean, scale, shift = own[:lanes], own[lanes : 2 * lanes], own[2 * lanes :]
        while start < stop:
            xs, ys = x[start : min(stop, start + lanes)], y[start : min(stop, start + lanes)]
            if added:
                other = residual[start : min(stop, start + lanes)]
                for i in range(len(xs)):
                    before = (value(xs[i]) - mean[i]) * scale[i] + shift[i] + value(other[i])
                    ys[i] = rounded(least if before <= least else before, ys)
            else:
                for i in range(len(xs)):
                    before = (value(xs[i]) - mean[i]) * scale[i] + shift[i]
                    ys[i] = rounded(least if before <= least else before, ys)
            start += lanes
        block = blocks(table) - 1 - take(table)


@kernel
def _normalise_bf16(table):
    """``_normalise``"""
    _normalise(table, halves(table, 6), halves(table, 7), halves(table, 8))


@kernel
def _normalise_fp32(table):
    """``_normalise``"""
    _normalise(table, floats(table, 6), floats(table, 7), floats(table, 8))


@shared
def _sum_gradients(table, x, dy, y, g):
    """Sums (L,) of g and g * (x - mean): a row (2, L) per block. g is dy where the ReLU let through, else 0.

    After x, dy, y and g: numbers fp32 (_, least), table (V, 3, L), sums, whether to take the mask from y and write g (or from
    what the forward pass made of x, in the same words).
    """
    rows, run, parts, c, lanes, _ = _geometry(table)
    least, from_y = floats(table, 10)[1], argument(table, 13)
    block = take(table)
    while block < blocks(table):
        start = (block // parts * rows + block % parts * run) * c
        stop = min(start + run * c, (block // parts + 1) * rows * c)
        own = floats(table, 11)[block // parts * 3 * lanes : (block // parts + 1) * 3 * lanes]
        mean, scale, shift = own[:lanes], own[lanes : 2 * lanes], own[2 * lanes :]
        sums = floats(table, 12)[block * 2 * lanes : (block + 1) * 2 * lanes]
        of_g, of_gd = sums[:lanes], sums[lanes:]
        of_g[:] = np.float32(0)
        of_gd[:] = np.float32(0)
        while start < stop:
            end = min(stop, start + lanes)
            xs, dys = x[start:end], dy[start:end]
            _fetch_ahead(dy, end, end + lanes)
            if from_y:
                ys, gs = y[start:end], g[start:end]
                for i in range(len(xs)):
                    one = _passed(value(dys[i]), value(ys[i]), np.float32(0))
                    gs[i] = rounded(one, gs)
                    of_g[i] += one
                    of_gd[i] += one * (value(xs[i]) - mean[i])
            else:
                for i in range(len(xs)):
                    d = value(xs[i]) - mean[i]
                    before = d * scale[i] + shift[i]
                    one = _passed(value(dys[i]), before, least)
                    of_g[i] += one
                    of_gd[i] += one * d
            start += lanes
        block = take(table)


@kernel
def _sum_gradients_bf16(table):
    """``_sum_gradients``"""
    _sum_gradients(table, halves(table, 6), halves(table, 7), halves(table, 8), halves(table, 9))


@kernel
def _sum_gradients_fp32(table):
    """``_sum_gradients``"""
    _sum_gradients(table, floats(table, 6), floats(table, 7), floats(table, 8), floats(table, 9))


@kernel
def _affine(table):
    """One block, in fp64: gradients of weight and bias (2, C), and tables (V, 5, L): mean, scale, shift, b and c of

    dx = scale * (g - sum(g) / n - x_hat * sum(g * x_hat) / n) = scale * g + b * (x - mean) + c.

    After the geometry: moments, table of the forward pass, sums (V, K, 2, L), scratch fp64 (2, C), gradients, tables.
    """
    rows, _, parts, c, lanes, num_views = _geometry(table)
    of_g, of_gx = doubles(table, 9)[:c], doubles(table, 9)[c : 2 * c]
    dweight, dbias = floats(table, 10)[:c], floats(table, 10)[c : 2 * c]
    dweight[:] = np.float32(0)
    dbias[:] = np.float32(0)
    for view in range(num_views * take(table), num_views):
        of_g[:] = 0.0
        of_gx[:] = 0.0
        for part in range(parts):
            start = (view * parts + part) * 2 * lanes
            once, twice = floats(table, 8)[start : start + lanes], floats(table, 8)[start + lanes : start + 2 * lanes]
            _fold(once, c)
            _fold(twice, c)
            for i in range(c):
                of_g[i] += np.float64(once[i])
                of_gx[i] += np.float64(twice[i])
        below, rstd = floats(table, 6)[view * 2 * c : view * 2 * c + c], floats(table, 6)[view * 2 * c + c : (view + 1) * 2 * c]
        before = floats(table, 7)[view * 3 * lanes : (view + 1) * 3 * lanes]
        own = floats(table, 11)[view * 5 * lanes : (view + 1) * 5 * lanes]
        for i in range(3 * lanes):
            own[i] = before[i]
        for i in range(c):
            inverse, scale = np.float64(rstd[i]), np.float64(before[lanes + i])
            of_gx[i] = inverse * (of_gx[i] - np.float64(below[i]) * of_g[i])
            dweight[i] += np.float32(of_gx[i])
            dbias[i] += np.float32(of_g[i])
            slope = -scale * inverse * of_gx[i] / float(rows)
            own[3 * lanes + i] = np.float32(slope)
            own[4 * lanes + i] = np.float32(-scale * of_g[i] / float(rows) - slope * np.float64(below[i]))
        _spread(own[3 * lanes :], 2, lanes, c)


@shared
def _input_gradient(table, x, dy, dx):
    """dx of the formula above, g being dy (masked already) or dy under the mask that the forward pass's words give.

    After x, dy and dx: numbers fp32 (_, least), tables (V, 5, L), whether to mask.
    """
    rows, run, parts, c, lanes, _ = _geometry(table)
    least, masks = floats(table, 9)[1], argument(table, 11)
    block = blocks(table) - 1 - take(table)
    while block >= 0:
        start = (block // parts * rows + block % parts * run) * c
        stop = min(start + run * c, (block // parts + 1) * rows * c)
        own = floats(table, 10)[block // parts * 5 * lanes : (block // parts + 1) * 5 * lanes]
        mean, scale, shift = own[:lanes], own[lanes : 2 * lanes], own[2 * lanes : 3 * lanes]
        slope, constant = own[3 * lanes : 4 * lanes], own[4 * lanes :]
        while start < stop:
            end = min(stop, start + lanes)
            xs, dys, dxs = x[start:end], dy[start:end], dx[start:end]
            _fetch_ahead(dy, end, end + lanes)
            if masks:
                for i in range(len(xs)):
                    d = value(xs[i]) - mean[i]
                    before = d * scale[i] + shift[i]
                    one = _passed(value(dys[i]), before, least)
                    dxs[i] = rounded(scale[i] * one + (slope[i] * d + constant[i]), dxs)
            else:
                for i in range(len(xs)):
                    d = value(xs[i]) - mean[i]
                    dxs[i] = rounded(scale[i] * value(dys[i]) + (slope[i] * d + constant[i]), dxs)
            start += lanes
        block = blocks(table) - 1 - take(table)


@kernel
def _input_gradient_bf16(table):
    """``_input_gradient``"""
    _input_gradient(table, halves(table, 6), halves(table, 7), halves(table, 8))


@kernel
def _input_gradient_fp32(table):
    """``_input_gradient``"""
    _input_gradient(table, floats(table, 6), floats(table, 7), floats(table, 8))


_SUM_DEVIATIONS = (_sum_deviations_bf16, _sum_deviations_fp32)
_NORMALISE = (_normalise_bf16, _normalise_fp32)
_SUM_GRADIENTS = (_sum_gradients_bf16, _sum_gradients_fp32)
_INPUT_GRADIENT = (_input_gradient_bf16, _input_gradient_fp32)


class FusedBatchNorm(torch.autograd.Function):
    """``batch_norm`` for channels-last x (N, C, H, W), bf16 or fp32, and everything else contiguous fp32.

    Saves x, and y where a residual went into a ReLU; else the ReLU's mask is made again from x, bit for bit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        num_views: int,
        momentum: float,
        eps: float,
        residual: Tensor | None,
        relu: bool,
    ) -> Tensor:
        cut = _Blocks.of(x, num_views)
        sums = weight.new_empty(cut.total, 3, cut.lanes)
        table, moments = weight.new_empty(num_views, 3, cut.lanes), weight.new_empty(num_views, 2, cut.channels)
        scratch = weight.new_empty(2, cut.channels, dtype=torch.float64)
        y = torch.empty_like(x)
        least = _least(relu, x.dtype)
        cut.call(_SUM_DEVIATIONS, x, sums)
        _moments(
            1, *astuple(cut), weight, bias, running_mean, running_var, sums, scratch, _numbers(eps, momentum), moments, table
        )  # fmt: skip
        cut.call(_NORMALISE, x, x if residual is None else residual, y, least, table, int(residual is not None))
        ctx.num_views, ctx.relu, ctx.residual = num_views, relu, residual is not None
        ctx.save_for_backward(x, y if relu and ctx.residual else None, moments, table)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, moments, table = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        cut, least = _Blocks.of(x, ctx.num_views), _least(ctx.relu and y is None, x.dtype)
        sums, affine = table.new_empty(cut.total, 2, cut.lanes), table.new_empty(2, cut.channels)
        tables = table.new_empty(cut.num_views, 5, cut.lanes)
        scratch = table.new_empty(2, cut.channels, dtype=torch.float64)
        g = dy if y is None else torch.empty_like(x)
        dx = torch.empty_like(x)
        cut.call(_SUM_GRADIENTS, x, dy, dy if y is None else y, g, least, table, sums, int(y is not None))
        _affine(1, *astuple(cut), moments, table, sums, scratch, affine, tables)
        cut.call(_INPUT_GRADIENT, x, g, dx, least, tables, int(ctx.relu and y is None))
        return dx, affine[0], affine[1], *[None] * 5, g if ctx.residual else None, None


@cache
def _numbers(eps: float, momentum: float) -> Tensor:
    return torch.tensor([eps, momentum, 1 - momentum], dtype=torch.float64, device="cpu")


@cache
def _least(relu: bool, dtype: torch.dtype) -> Tensor:
    """What the output is at least, and what must be exceeded before rounding to ``dtype`` for the output to exceed it."""
    least = (0.0, _LEAST_HALF if dtype == torch.bfloat16 else 0.0) if relu else (-torch.inf, -torch.inf)
    return torch.tensor(least, dtype=torch.float32, device="cpu")
