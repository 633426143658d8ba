"""``group_norm`` on a processor: a thread takes a sample, which its caches hold, so that memory moves each byte about once.

Pixels lie next to each other, so a few of them are one row of ``lanes``: short rows (64 channels) would spend their time on the
loop. Statistics of a lane go over eight rows at a time, their mean and squared deviations first, then Chan's combination with
what is known of the lane: one reading, no cancellation at any mean. Lanes of a channel are combined the same way, then those of
a group. Everything is summed in an order that a sample's shape decides.

Letters: N samples, C channels, G groups, P pixels of a sample, L lanes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from fastbyol_kernels.processor import apart, argument, blocks, floats, halves, kernel, rounded, take
from fastbyol_kernels.processor import value as wide

# Lanes of a row, if pixels have fewer channels: 32 vectors of 16, and all arrays of lanes together stay in the first cache.
LANES = 512
# Rows whose statistics are taken together.
ROWS = 8
# Bytes of x that a thread takes at a time, if a sample has fewer: some 5 us of work.
BLOCK_BYTES = 1 << 16
# Columns of the weights' gradients that a thread takes at a time.
COLUMNS = 32


@apart
def _merge(mean, m2, known, other_mean, other_m2, more):
    """Chan's combination, lane by lane: ``known`` values with ``more`` values."""
    f = np.float32(more / (known + more))
    g = np.float32(known * more / (known + more))
    for i in range(len(mean)):
        delta = other_mean[i] - mean[i]
        mean[i] += delta * f
        m2[i] += other_m2[i] + delta * delta * g


@apart
def _moments(x, mean, m2):
    """Mean and sum of squared deviations (L,) of the lanes of a sample; the last row may be short."""
    lanes = len(mean)
    rows = len(x) // lanes
    for i in range(lanes):
        mean[i] = np.float32(0)
        m2[i] = np.float32(0)
    for row in range(0, rows - ROWS + 1, ROWS):
        f = np.float32(ROWS / (row + ROWS))
        g = np.float32(row * ROWS / (row + ROWS))
        start = row * lanes
        x0, x1 = x[start : start + lanes], x[start + lanes : start + 2 * lanes]
        x2, x3 = x[start + 2 * lanes : start + 3 * lanes], x[start + 3 * lanes : start + 4 * lanes]
        x4, x5 = x[start + 4 * lanes : start + 5 * lanes], x[start + 5 * lanes : start + 6 * lanes]
        x6, x7 = x[start + 6 * lanes : start + 7 * lanes], x[start + 7 * lanes : start + 8 * lanes]
        for i in range(lanes):
            v0, v1, v2, v3 = wide(x0[i]), wide(x1[i]), wide(x2[i]), wide(x3[i])
            v4, v5, v6, v7 = wide(x4[i]), wide(x5[i]), wide(x6[i]), wide(x7[i])
            center = ((v0 + v1) + (v2 + v3) + ((v4 + v5) + (v6 + v7))) * np.float32(1 / ROWS)
            v0, v1, v2, v3 = v0 - center, v1 - center, v2 - center, v3 - center
            v4, v5, v6, v7 = v4 - center, v5 - center, v6 - center, v7 - center
            squares = (v0 * v0 + v1 * v1) + (v2 * v2 + v3 * v3) + ((v4 * v4 + v5 * v5) + (v6 * v6 + v7 * v7))
            delta = center - mean[i]
            mean[i] += delta * f
            m2[i] += squares + delta * delta * g
    for row in range(rows // ROWS * ROWS, -(-len(x) // lanes)):
        f = np.float32(1 / (row + 1))
        values = x[row * lanes : min(row * lanes + lanes, len(x))]
        for i in range(len(values)):
            value = wide(values[i])
            delta = value - mean[i]
            mean[i] += delta * f
            m2[i] += delta * (value - mean[i])


@apart
def _by_channel(mean, m2, channels, pixels):
    """Combine all lanes of a channel into its first one."""
    per_row = len(mean) // channels
    rows, rest = pixels // per_row, pixels % per_row
    known = rows + min(rest, 1)
    for lane in range(1, per_row):
        more = rows + (1 if lane < rest else 0)
        start = lane * channels
        _merge(mean[:channels], m2[:channels], known, mean[start : start + channels], m2[start : start + channels], more)
        known += more


@apart
def _by_group(mean, m2, group_mean, group_rstd, pixels, eps):
    """Mean and 1 / sqrt(var + eps) of each group, from those of its channels."""
    per_group = len(mean) // len(group_mean)
    for group in range(len(group_mean)):
        means = mean[group * per_group : (group + 1) * per_group]
        squares = m2[group * per_group : (group + 1) * per_group]
        first, total = means[0], np.float32(0)
        for i in range(len(means)):
            total += means[i] - first
        center = first + total / np.float32(per_group)
        inside = between = np.float32(0)
        for i in range(len(means)):
            off = means[i] - center
            between += off * off
            inside += squares[i]
        variance = (inside + np.float32(pixels) * between) / np.float32(pixels * per_group)
        group_mean[group] = center
        group_rstd[group] = np.float32(1) / np.sqrt(variance + eps)


@apart
def _lines(group_mean, group_rstd, weight, bias, scale, shift):
    """The normalisation of each lane as x * scale + shift, for both passes alike: they must agree on its sign."""
    channels = len(weight)
    per_group = channels // len(group_mean)
    for group in range(len(group_mean)):
        mean, rstd = group_mean[group], group_rstd[group]
        for c in range(group * per_group, (group + 1) * per_group):
            scale[c] = rstd * weight[c]
            shift[c] = bias[c] - mean * scale[c]


@apart
def _repeat(values, channels):
    """The first pixel's values for all pixels of a row."""
    for start in range(channels, len(values), channels):
        here = values[start : start + channels]
        for i in range(len(here)):
            here[i] = values[i]


@apart
def _write(x, y, scale, shift, least):
    """y = x * scale + shift, at least ``least``; NaN comes through.

    ``max`` gives its first argument unless the second is greater. The same as a conditional expression is not made vectors of.
    """
    lanes = len(scale)
    for row in range(-(-len(x) // lanes)):
        values, out = x[row * lanes : min(row * lanes + lanes, len(x))], y[row * lanes : min(row * lanes + lanes, len(x))]
        for i in range(len(values)):
            value = wide(values[i]) * scale[i] + shift[i]
            out[i] = rounded(max(value, least), out)


@apart
def _write_sum(x, residual, y, scale, shift, least):
    """y = x * scale + shift + residual, at least ``least``."""
    lanes = len(scale)
    for row in range(-(-len(x) // lanes)):
        start, stop = row * lanes, min(row * lanes + lanes, len(x))
        values, added, out = x[start:stop], residual[start:stop], y[start:stop]
        for i in range(len(values)):
            value = wide(values[i]) * scale[i] + shift[i] + wide(added[i])
            out[i] = rounded(max(value, least), out)


@numba.njit(inline="always")
def _forward_block(table, x, residual, y, lanes, block):
    """Samples of one block: statistics, then y."""
    weight, bias, means, rstds = floats(table, 3), floats(table, 4), floats(table, 5), floats(table, 6)
    samples, channels, groups, pixels = argument(table, 8), argument(table, 9), argument(table, 10), argument(table, 11)
    per_row, per_block, added = argument(table, 12), argument(table, 13), argument(table, 14)
    eps, least = floats(table, 7)[0], floats(table, 7)[1]
    size, length = pixels * channels, per_row * channels
    first, second = lanes[:length], lanes[length : 2 * length]
    for sample in range(block * per_block, min(block * per_block + per_block, samples)):
        start, stop = sample * size, sample * size + size
        mean, rstd = means[sample * groups : sample * groups + groups], rstds[sample * groups : sample * groups + groups]
        _moments(x[start:stop], first, second)
        _by_channel(first, second, channels, pixels)
        _by_group(first[:channels], second[:channels], mean, rstd, pixels, eps)
        _lines(mean, rstd, weight[:channels], bias[:channels], first, second)
        _repeat(first, channels)
        _repeat(second, channels)
        if added:
            _write_sum(x[start:stop], residual[start:stop], y[start:stop], first, second, least)
        else:
            _write(x[start:stop], y[start:stop], first, second, least)


@kernel
def _forward(table):
    """y, and mean and rstd (N, G), of a few samples per block."""
    lanes = np.empty(2 * argument(table, 12) * argument(table, 9), np.float32)
    half = argument(table, 15)
    block = take(table)
    while block < blocks(table):
        if half:
            _forward_block(table, halves(table, 0), halves(table, 1), halves(table, 2), lanes, block)
        else:
            _forward_block(table, floats(table, 0), floats(table, 1), floats(table, 2), lanes, block)
        block = take(table)


@apart
def _sums(dy, x, scale, shift, center, total, weighted, limit):
    """Sums (L,) over a sample's rows of the gradient g and of g (x - center); dy stops where x * scale + shift <= ``limit``."""
    lanes = len(scale)
    for i in range(lanes):
        total[i] = np.float32(0)
        weighted[i] = np.float32(0)
    rows = len(x) // lanes
    for row in range(0, rows - 3, 4):
        start = row * lanes
        x0, x1 = x[start : start + lanes], x[start + lanes : start + 2 * lanes]
        x2, x3 = x[start + 2 * lanes : start + 3 * lanes], x[start + 3 * lanes : start + 4 * lanes]
        d0, d1 = dy[start : start + lanes], dy[start + lanes : start + 2 * lanes]
        d2, d3 = dy[start + 2 * lanes : start + 3 * lanes], dy[start + 3 * lanes : start + 4 * lanes]
        for i in range(lanes):
            v0, v1, v2, v3 = wide(x0[i]), wide(x1[i]), wide(x2[i]), wide(x3[i])
            g0 = np.float32(0) if v0 * scale[i] + shift[i] <= limit else wide(d0[i])
            g1 = np.float32(0) if v1 * scale[i] + shift[i] <= limit else wide(d1[i])
            g2 = np.float32(0) if v2 * scale[i] + shift[i] <= limit else wide(d2[i])
            g3 = np.float32(0) if v3 * scale[i] + shift[i] <= limit else wide(d3[i])
            c = center[i]
            total[i] += (g0 + g1) + (g2 + g3)
            weighted[i] += (g0 * (v0 - c) + g1 * (v1 - c)) + (g2 * (v2 - c) + g3 * (v3 - c))
    for row in range(rows // 4 * 4, -(-len(x) // lanes)):
        start, stop = row * lanes, min(row * lanes + lanes, len(x))
        values, gradient = x[start:stop], dy[start:stop]
        for i in range(len(values)):
            value = wide(values[i])
            g = np.float32(0) if value * scale[i] + shift[i] <= limit else wide(gradient[i])
            total[i] += g
            weighted[i] += g * (value - center[i])


@apart
def _sums_by_y(dy, x, y, center, total, weighted):
    """``_sums`` where dy stops where y <= 0."""
    lanes = len(center)
    for i in range(lanes):
        total[i] = np.float32(0)
        weighted[i] = np.float32(0)
    rows = len(x) // lanes
    for row in range(0, rows - 3, 4):
        start = row * lanes
        x0, x1 = x[start : start + lanes], x[start + lanes : start + 2 * lanes]
        x2, x3 = x[start + 2 * lanes : start + 3 * lanes], x[start + 3 * lanes : start + 4 * lanes]
        y0, y1 = y[start : start + lanes], y[start + lanes : start + 2 * lanes]
        y2, y3 = y[start + 2 * lanes : start + 3 * lanes], y[start + 3 * lanes : start + 4 * lanes]
        d0, d1 = dy[start : start + lanes], dy[start + lanes : start + 2 * lanes]
        d2, d3 = dy[start + 2 * lanes : start + 3 * lanes], dy[start + 3 * lanes : start + 4 * lanes]
        for i in range(lanes):
            g0 = np.float32(0) if wide(y0[i]) <= np.float32(0) else wide(d0[i])
            g1 = np.float32(0) if wide(y1[i]) <= np.float32(0) else wide(d1[i])
            g2 = np.float32(0) if wide(y2[i]) <= np.float32(0) else wide(d2[i])
            g3 = np.float32(0) if wide(y3[i]) <= np.float32(0) else wide(d3[i])
            c = center[i]
            total[i] += (g0 + g1) + (g2 + g3)
            weighted[i] += (g0 * (wide(x0[i]) - c) + g1 * (wide(x1[i]) - c)) + (g2 * (wide(x2[i]) - c) + g3 * (wide(x3[i]) - c))
    for row in range(rows // 4 * 4, -(-len(x) // lanes)):
        start, stop = row * lanes, min(row * lanes + lanes, len(x))
        values, gradient, result = x[start:stop], dy[start:stop], y[start:stop]
        for i in range(len(values)):
            g = np.float32(0) if wide(result[i]) <= np.float32(0) else wide(gradient[i])
            total[i] += g
            weighted[i] += g * (wide(values[i]) - center[i])


@apart
def _sum_lanes(values, channels, out):
    """Sums (C,) over the pixels of a row."""
    for i in range(channels):
        out[i] = values[i]
    for start in range(channels, len(values), channels):
        here = values[start : start + channels]
        for i in range(len(here)):
            out[i] += here[i]


@apart
def _slopes(weight, mean, rstd, total, weighted, slope, level, pixels):
    """dx = scale g - (x slope + level): ``slope`` and ``level`` of each channel. Multiplies ``weighted`` by rstd."""
    per_group = len(weight) // len(mean)
    count = np.float32(pixels * per_group)
    for group in range(len(mean)):
        start, stop = group * per_group, (group + 1) * per_group
        gamma, of_g, of_both = weight[start:stop], total[start:stop], weighted[start:stop]
        slopes, levels, r = slope[start:stop], level[start:stop], rstd[group]
        a = b = np.float32(0)
        for i in range(len(gamma)):
            of_both[i] *= r
            a += gamma[i] * of_g[i]
            b += gamma[i] * of_both[i]
        b = b * r * r / count
        a = a * r / count - mean[group] * b
        for i in range(len(gamma)):
            slopes[i] = b
            levels[i] = a


@apart
def _write_gradient(dy, x, dx, scale, shift, slope, level, limit):
    """dx."""
    lanes = len(scale)
    for row in range(-(-len(x) // lanes)):
        start, stop = row * lanes, min(row * lanes + lanes, len(x))
        values, gradient, out = x[start:stop], dy[start:stop], dx[start:stop]
        for i in range(len(values)):
            value = wide(values[i])
            g = np.float32(0) if value * scale[i] + shift[i] <= limit else wide(gradient[i])
            out[i] = rounded(scale[i] * g - (value * slope[i] + level[i]), out)


@apart
def _write_gradients_by_y(dy, x, y, dx, dresidual, scale, slope, level):
    """dx and the residual's gradient."""
    lanes = len(scale)
    for row in range(-(-len(x) // lanes)):
        start, stop = row * lanes, min(row * lanes + lanes, len(x))
        values, gradient, result = x[start:stop], dy[start:stop], y[start:stop]
        out, passed = dx[start:stop], dresidual[start:stop]
        for i in range(len(values)):
            g = np.float32(0) if wide(result[i]) <= np.float32(0) else wide(gradient[i])
            passed[i] = rounded(g, passed)
            out[i] = rounded(scale[i] * g - (wide(values[i]) * slope[i] + level[i]), out)


@apart
def _spread(values, out):
    """A group's value for each of its channels."""
    per_group = len(out) // len(values)
    for group in range(len(values)):
        here = out[group * per_group : (group + 1) * per_group]
        for i in range(len(here)):
            here[i] = values[group]


@numba.njit(inline="always")
def _backward_block(table, dy, x, y, dx, dresidual, lanes, block):
    """Samples of one block: sums, then dx."""
    weight, bias, means, rstds, sums = (
        floats(table, 5), floats(table, 6), floats(table, 7), floats(table, 8), floats(table, 9),
    )  # fmt: skip
    samples, channels, groups, pixels = argument(table, 11), argument(table, 12), argument(table, 13), argument(table, 14)
    per_row, per_block, added = argument(table, 15), argument(table, 16), argument(table, 17)
    limit = floats(table, 10)[0]
    size, length = pixels * channels, per_row * channels
    scale, shift, center = lanes[:length], lanes[length : 2 * length], lanes[2 * length : 3 * length]
    third, fourth = lanes[3 * length : 4 * length], lanes[4 * length : 5 * length]
    for sample in range(block * per_block, min(block * per_block + per_block, samples)):
        start, stop = sample * size, sample * size + size
        mean, rstd = means[sample * groups : sample * groups + groups], rstds[sample * groups : sample * groups + groups]
        row = sample * 2 * channels
        weighted, total = sums[row : row + channels], sums[row + channels : row + 2 * channels]
        _lines(mean, rstd, weight[:channels], bias[:channels], scale, shift)
        _spread(mean, center[:channels])
        _repeat(scale, channels)
        _repeat(shift, channels)
        _repeat(center, channels)
        if added:
            _sums_by_y(dy[start:stop], x[start:stop], y[start:stop], center, third, fourth)
        else:
            _sums(dy[start:stop], x[start:stop], scale, shift, center, third, fourth, limit)
        _sum_lanes(third, channels, total)
        _sum_lanes(fourth, channels, weighted)
        _slopes(weight[:channels], mean, rstd, total, weighted, third, fourth, pixels)
        _repeat(third, channels)
        _repeat(fourth, channels)
        if added:
            _write_gradients_by_y(
                dy[start:stop], x[start:stop], y[start:stop], dx[start:stop], dresidual[start:stop], scale, third, fourth
            )
        else:
            _write_gradient(dy[start:stop], x[start:stop], dx[start:stop], scale, shift, third, fourth, limit)


@kernel
def _backward(table):
    """dx, the residual's gradient, and sums (N, 2, C) of g x_hat and g, of a few samples per block."""
    lanes = np.empty(5 * argument(table, 15) * argument(table, 12), np.float32)
    half = argument(table, 18)
    block = take(table)
    while block < blocks(table):
        if half:
            _backward_block(
                table, halves(table, 0), halves(table, 1), halves(table, 2), halves(table, 3), halves(table, 4), lanes, block
            )
        else:
            _backward_block(
                table, floats(table, 0), floats(table, 1), floats(table, 2), floats(table, 3), floats(table, 4), lanes, block
            )
        block = take(table)


@kernel
def _sum_rows(table):
    """out (columns,) = sums over rows, in fp64, of a few columns per block."""
    rows, columns = argument(table, 2), argument(table, 3)
    totals = np.empty(COLUMNS, np.float64)
    block = take(table)
    while block < blocks(table):
        start, stop = block * COLUMNS, min(block * COLUMNS + COLUMNS, columns)
        here = totals[: stop - start]
        here[:] = 0.0
        for row in range(rows):
            values = floats(table, 0)[row * columns + start : row * columns + stop]
            for i in range(len(values)):
                here[i] += np.float64(values[i])
        out = floats(table, 1)[start:stop]
        for i in range(len(out)):
            out[i] = np.float32(here[i])
        block = take(table)


def _plan(x: Tensor) -> tuple[int, int, int]:
    """Pixels of a row, samples of a block, blocks."""
    n, channels, h, w = x.shape
    per_row = max(1, min(LANES // channels, h * w // ROWS))
    per_block = max(1, BLOCK_BYTES // (channels * h * w * x.element_size()))
    return per_row, per_block, -(-n // per_block)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, num_groups: int, eps: float, relu: bool
    ) -> Tensor:
        n, c, h, w = x.shape
        y = torch.empty_like(x)
        mean, rstd = (weight.new_empty((n, num_groups)) for _ in range(2))
        numbers = weight.new_tensor((eps, 0.0 if relu else -float("inf")))
        per_row, per_block, num_blocks = _plan(x)
        _forward(
            num_blocks, x, x if residual is None else residual, y, weight, bias, mean, rstd, numbers, n, c, num_groups, h * w,
            per_row, per_block, int(residual is not None), int(x.dtype == torch.bfloat16),
        )  # fmt: skip
        ctx.num_groups, ctx.relu, ctx.residual = num_groups, relu, residual is not None
        ctx.save_for_backward(x, y if ctx.residual and relu else None, weight, bias, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, rstd = ctx.saved_tensors
        n, c, h, w = x.shape
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dresidual = None if y is None else torch.empty_like(x)
        sums, affine = weight.new_empty((n, 2, c)), weight.new_empty((2, c))
        numbers = weight.new_tensor((0.0 if ctx.relu else -float("inf"),))
        per_row, per_block, num_blocks = _plan(x)
        _backward(
            num_blocks, dy, x, x if y is None else y, dx, dx if dresidual is None else dresidual, weight, bias, mean, rstd,
            sums, numbers, n, c, ctx.num_groups, h * w, per_row, per_block, int(y is not None), int(x.dtype == torch.bfloat16),
        )  # fmt: skip
        _sum_rows(-(-2 * c // COLUMNS), sums, affine, n, 2 * c)
        if ctx.residual and not ctx.relu:
            dresidual = dy
        return dx, affine[0], affine[1], dresidual, None, None, None


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, num_groups: int, eps: float, *, relu: bool
) -> Tensor:
    """``group_norm`` of x (N, C, H, W), bf16 or fp32, channels-last and not empty as ``residual``; the rest fp32."""
    y: Tensor = _GroupNorm.apply(x, weight, bias, residual, num_groups, eps, relu)
    return y
