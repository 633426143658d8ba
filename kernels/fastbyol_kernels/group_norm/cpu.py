"""Group norm on a CPU, sample by sample, so that each byte comes from memory about once.

Letters: N samples, C channels, G groups, P pixels of a sample, L lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbyol_kernels.native import F32, Activation, inlined, kernel, narrowed, noalias, widened

# Pixels with few channels would be short loops, so several neighbouring pixels form one row of
# lanes: 32 vectors of 16. All arrays of lanes together fit the first-level cache.
LANES = 512
# Rows whose statistics are computed together.
ROWS = 8
# Bytes of x in a block: about 5 us of work. A larger sample is a block of its own.
BLOCK_BYTES = 1 << 16
# Columns of the affine gradients in a block.
COLUMNS = 32


@noalias
def _rows(x, first, lanes):
    """Return the four rows of ``x`` that start with row ``first``."""
    start = first * lanes
    x0, x1 = x[start : start + lanes], x[start + lanes : start + 2 * lanes]
    return (
        x0,
        x1,
        x[start + 2 * lanes : start + 3 * lanes],
        x[start + 3 * lanes : start + 4 * lanes],
    )


@noalias
def _row(x, row, lanes):
    """Return a row of ``x``; the last one may be shorter."""
    return x[row * lanes : min(row * lanes + lanes, len(x))]


@noalias
def _merge(mean, m2, count, other_mean, other_m2, more):
    """Combine the moments of ``count`` and of ``more`` values per lane, by Chan's formula."""
    f = np.float32(more / (count + more))
    g = np.float32(count * more / (count + more))
    for i in range(len(mean)):
        delta = other_mean[i] - mean[i]
        mean[i] += delta * f
        m2[i] += other_m2[i] + delta * delta * g


@noalias
def _moments(x, mean, m2):
    """Write each lane's mean and sum of squared deviations (L,) over the rows of a sample.

    One pass over x, without cancellation at any mean, in an order that depends on the shape only.
    """
    lanes = len(mean)
    rows = len(x) // lanes
    mean[:] = np.float32(0)
    m2[:] = np.float32(0)
    # The moments of eight rows first, then Chan's combination with those of the rows before.
    for row in range(0, rows - ROWS + 1, ROWS):
        f = np.float32(ROWS / (row + ROWS))
        g = np.float32(row * ROWS / (row + ROWS))
        x0, x1, x2, x3 = _rows(x, row, lanes)
        x4, x5, x6, x7 = _rows(x, row + 4, lanes)
        for i in range(lanes):
            v0, v1, v2, v3 = widened(x0[i]), widened(x1[i]), widened(x2[i]), widened(x3[i])
            v4, v5, v6, v7 = widened(x4[i]), widened(x5[i]), widened(x6[i]), widened(x7[i])
            center = ((v0 + v1) + (v2 + v3) + ((v4 + v5) + (v6 + v7))) * np.float32(1 / ROWS)
            v0, v1, v2, v3 = v0 - center, v1 - center, v2 - center, v3 - center
            v4, v5, v6, v7 = v4 - center, v5 - center, v6 - center, v7 - center
            squares = (
                (v0 * v0 + v1 * v1)
                + (v2 * v2 + v3 * v3)
                + ((v4 * v4 + v5 * v5) + (v6 * v6 + v7 * v7))
            )
            delta = center - mean[i]
            mean[i] += delta * f
            m2[i] += squares + delta * delta * g
    for row in range(rows // ROWS * ROWS, -(-len(x) // lanes)):
        f = np.float32(1 / (row + 1))
        values = _row(x, row, lanes)
        for i in range(len(values)):
            value = widened(values[i])
            delta = value - mean[i]
            mean[i] += delta * f
            m2[i] += delta * (value - mean[i])


@noalias
def _by_channel(mean, m2, channels, pixels):
    """Combine all lanes of a channel into its first lane."""
    per_row = len(mean) // channels
    rows, rest = pixels // per_row, pixels % per_row
    count = rows + min(rest, 1)
    for lane in range(1, per_row):
        more = rows + (1 if lane < rest else 0)
        start = lane * channels
        _merge(
            mean[:channels],
            m2[:channels],
            count,
            mean[start : start + channels],
            m2[start : start + channels],
            more,
        )
        count += more


@noalias
def _by_group(mean, m2, group_mean, group_rstd, pixels, eps):
    """Combine the channels of each group to its mean and 1 / sqrt(var + eps)."""
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


@noalias
def _lines(group_mean, group_rstd, weight, bias, scale, shift, center):
    """Write scale and shift of each lane, which normalise it as x * scale + shift.

    Both passes use these: they must agree on the sign, which the ReLU masks by.
    """
    channels = len(weight)
    per_group = channels // len(group_mean)
    for group in range(len(group_mean)):
        mean, rstd = group_mean[group], group_rstd[group]
        for c in range(group * per_group, (group + 1) * per_group):
            scale[c] = rstd * weight[c]
            shift[c] = bias[c] - mean * scale[c]
            if center is not None:
                center[c] = mean
    _repeat(scale, channels)
    _repeat(shift, channels)
    if center is not None:
        _repeat(center, channels)


@noalias
def _repeat(values, channels):
    """Copy the values of the first pixel to all pixels of a row."""
    for start in range(channels, len(values), channels):
        here = values[start : start + channels]
        for i in range(len(here)):
            here[i] = values[i]


@noalias
def _write(x, residual, y, scale, shift, least):
    """Write y = max(x * scale + shift + residual, least). The residual may be None; NaN is kept."""
    lanes = len(scale)
    # numba drops the branches for an argument that is None, so this stand-in is never read.
    residuals = x if residual is None else residual
    for row in range(-(-len(x) // lanes)):
        values, added, out = _row(x, row, lanes), _row(residuals, row, lanes), _row(y, row, lanes)
        for i in range(len(values)):
            value = widened(values[i]) * scale[i] + shift[i]
            if residual is not None:
                value += widened(added[i])
            # ``max`` returns its first argument, here a NaN, unless the second is greater. A
            # conditional expression would do the same, but LLVM does not vectorise it.
            out[i] = narrowed(max(value, least), out)


@kernel
def _forward(
    block: int, x: Activation, residual: Activation, y: Activation, weight: F32, bias: F32,
    means: F32, rstds: F32,
    samples: int, channels: int, groups: int, pixels: int, per_row: int, per_block: int,
    added: int, eps: float, least: float,
) -> None:  # fmt: skip
    """Write y, and mean and rstd (N, G), for ``per_block`` samples."""
    size, length = pixels * channels, per_row * channels
    lanes = np.empty(2 * length, np.float32)
    first, second = lanes[:length], lanes[length : 2 * length]
    for sample in range(block * per_block, min(block * per_block + per_block, samples)):
        here = slice(sample * size, sample * size + size)
        mean, rstd = (
            means[sample * groups : sample * groups + groups],
            rstds[sample * groups : sample * groups + groups],
        )
        _moments(x[here], first, second)
        _by_channel(first, second, channels, pixels)
        _by_group(first[:channels], second[:channels], mean, rstd, pixels, np.float32(eps))
        _lines(mean, rstd, weight[:channels], bias[:channels], first, second, None)
        if added:
            _write(x[here], residual[here], y[here], first, second, np.float32(least))
        else:
            _write(x[here], None, y[here], first, second, np.float32(least))


@inlined
def _passed(dy, x, result, i, y, scale, shift, limit):
    """Return element ``i`` of the gradient before the ReLU.

    It is 0 where ``result`` is 0, or without ``y`` where x * scale + shift <= ``limit``.
    """
    if y is None:
        return np.float32(0) if widened(x[i]) * scale[i] + shift[i] <= limit else widened(dy[i])
    return np.float32(0) if widened(result[i]) <= np.float32(0) else widened(dy[i])


@noalias
def _sums(dy, x, y, scale, shift, center, total, weighted, limit):
    """Write the sums of the gradient g and of g * (x - center) over a sample's rows, (L,) each."""
    lanes = len(center)
    total[:] = np.float32(0)
    weighted[:] = np.float32(0)
    rows, results = len(x) // lanes, x if y is None else y
    for row in range(0, rows - 3, 4):
        x0, x1, x2, x3 = _rows(x, row, lanes)
        y0, y1, y2, y3 = _rows(results, row, lanes)
        d0, d1, d2, d3 = _rows(dy, row, lanes)
        for i in range(lanes):
            # LLVM adds in the order of the loads: x comes before the gradients, but with ``y``
            # after them.
            if y is None:
                v0, v1, v2, v3 = widened(x0[i]), widened(x1[i]), widened(x2[i]), widened(x3[i])
            g0 = _passed(d0, x0, y0, i, y, scale, shift, limit)
            g1 = _passed(d1, x1, y1, i, y, scale, shift, limit)
            g2 = _passed(d2, x2, y2, i, y, scale, shift, limit)
            g3 = _passed(d3, x3, y3, i, y, scale, shift, limit)
            c = center[i]
            total[i] += (g0 + g1) + (g2 + g3)
            before = weighted[i]
            if y is not None:
                v0, v1, v2, v3 = widened(x0[i]), widened(x1[i]), widened(x2[i]), widened(x3[i])
            weighted[i] = before + (
                (g0 * (v0 - c) + g1 * (v1 - c)) + (g2 * (v2 - c) + g3 * (v3 - c))
            )
    for row in range(rows // 4 * 4, -(-len(x) // lanes)):
        values, result, gradient = (
            _row(x, row, lanes),
            _row(results, row, lanes),
            _row(dy, row, lanes),
        )
        for i in range(len(values)):
            g = _passed(gradient, values, result, i, y, scale, shift, limit)
            total[i] += g
            weighted[i] += g * (widened(values[i]) - center[i])


@noalias
def _sum_lanes(values, channels, out):
    """Sum ``values`` (L,) over the pixels of a row to ``out`` (C,)."""
    for i in range(channels):
        out[i] = values[i]
    for start in range(channels, len(values), channels):
        here = values[start : start + channels]
        for i in range(len(here)):
            out[i] += here[i]


@noalias
def _slopes(weight, mean, rstd, total, weighted, slope, level, pixels):
    """Write slope and level of dx = scale g - (x slope + level). Multiply ``weighted`` by rstd."""
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
    _repeat(slope, len(weight))
    _repeat(level, len(weight))


@noalias
def _write_gradients(dy, x, y, dx, dresidual, scale, shift, slope, level, limit):
    """Write dx, and the residual's gradient unless ``dresidual`` is None."""
    lanes, results, dresiduals = (
        len(scale),
        x if y is None else y,
        dx if dresidual is None else dresidual,
    )
    for row in range(-(-len(x) // lanes)):
        values, result, gradient = (
            _row(x, row, lanes),
            _row(results, row, lanes),
            _row(dy, row, lanes),
        )
        out, passed = _row(dx, row, lanes), _row(dresiduals, row, lanes)
        for i in range(len(values)):
            g = _passed(gradient, values, result, i, y, scale, shift, limit)
            if dresidual is not None:
                passed[i] = narrowed(g, passed)
            out[i] = narrowed(scale[i] * g - (widened(values[i]) * slope[i] + level[i]), out)


@kernel
def _backward(
    block: int, dy: Activation, x: Activation, y: Activation, dx: Activation, dresidual: Activation,
    weight: F32, bias: F32, means: F32, rstds: F32, sums: F32, samples: int, channels: int,
    groups: int, pixels: int,
    per_row: int, per_block: int, by_y: int, limit: float,
) -> None:  # fmt: skip
    """Write dx, dresidual, and sums (N, 2, C) of g * x_hat and g, for ``per_block`` samples."""
    size, length = pixels * channels, per_row * channels
    lanes, bound = np.empty(5 * length, np.float32), np.float32(limit)
    scale, shift, center = (
        lanes[:length],
        lanes[length : 2 * length],
        lanes[2 * length : 3 * length],
    )
    third, fourth = lanes[3 * length : 4 * length], lanes[4 * length : 5 * length]
    for sample in range(block * per_block, min(block * per_block + per_block, samples)):
        here = slice(sample * size, sample * size + size)
        mean, rstd = (
            means[sample * groups : sample * groups + groups],
            rstds[sample * groups : sample * groups + groups],
        )
        row = sample * 2 * channels
        weighted, total = sums[row : row + channels], sums[row + channels : row + 2 * channels]
        _lines(mean, rstd, weight[:channels], bias[:channels], scale, shift, center)
        if by_y:
            _sums(dy[here], x[here], y[here], scale, shift, center, third, fourth, bound)
        else:
            _sums(dy[here], x[here], None, scale, shift, center, third, fourth, bound)
        _sum_lanes(third, channels, total)
        _sum_lanes(fourth, channels, weighted)
        _slopes(weight[:channels], mean, rstd, total, weighted, third, fourth, pixels)
        if by_y:
            _write_gradients(
                dy[here],
                x[here],
                y[here],
                dx[here],
                dresidual[here],
                scale,
                shift,
                third,
                fourth,
                bound,
            )
        else:
            _write_gradients(
                dy[here], x[here], None, dx[here], None, scale, shift, third, fourth, bound
            )


@kernel
def _sum_rows(block: int, sums: F32, out: F32, rows: int, columns: int) -> None:
    """Sum the rows of ``sums`` to ``out`` (columns,) in fp64, COLUMNS columns per block."""
    start, stop = block * COLUMNS, min(block * COLUMNS + COLUMNS, columns)
    totals = np.zeros(stop - start, np.float64)
    for row in range(rows):
        values = sums[row * columns + start : row * columns + stop]
        for i in range(len(values)):
            totals[i] += np.float64(values[i])
    for i in range(len(totals)):
        out[start + i] = np.float32(totals[i])


def _plan(x: Tensor, num_groups: int) -> tuple[int, ...]:
    """Return the number of blocks and the kernels' sizes.

    These are samples, channels, groups, pixels, pixels of a row of lanes, and samples of a block.
    """
    n, channels, h, w = x.shape
    per_row = max(1, min(LANES // channels, h * w // ROWS))
    per_block = max(1, BLOCK_BYTES // (channels * h * w * x.element_size()))
    return -(-n // per_block), n, channels, num_groups, h * w, per_row, per_block


class CpuGroupNorm(torch.autograd.Function):
    """Group norm of non-empty channels-last x and residual, bf16 or fp32; the rest is fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        num_groups: int,
        eps: float,
        relu: bool,
    ) -> Tensor:
        y = torch.empty_like(x)
        mean, rstd = (weight.new_empty((len(x), num_groups)) for _ in range(2))
        ctx.num_groups, ctx.least, ctx.residual = (
            num_groups,
            0.0 if relu else -float("inf"),
            residual is not None,
        )
        num_blocks, *sizes = _plan(x, num_groups)
        added = x if residual is None else residual
        _forward(
            num_blocks,
            x,
            added,
            y,
            weight,
            bias,
            mean,
            rstd,
            *sizes,
            int(ctx.residual),
            eps,
            ctx.least,
        )
        ctx.save_for_backward(x, y if ctx.residual and relu else None, weight, bias, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *saved = ctx.saved_tensors
        n, c, _, _ = x.shape
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dresidual = dy if y is None else torch.empty_like(x)
        sums, affine = saved[0].new_empty((n, 2, c)), saved[0].new_empty((2, c))
        num_blocks, *sizes = _plan(x, ctx.num_groups)
        _backward(
            num_blocks,
            dy,
            x,
            x if y is None else y,
            dx,
            dresidual,
            *saved,
            sums,
            *sizes,
            int(y is not None),
            ctx.least,
        )
        _sum_rows(-(-2 * c // COLUMNS), sums, affine, n, 2 * c)
        return dx, affine[0], affine[1], dresidual if ctx.residual else None, None, None, None


# What a step calls, for ``native.compile_ahead``.
TRAINED_WITH = (_forward, _backward, _sum_rows)
