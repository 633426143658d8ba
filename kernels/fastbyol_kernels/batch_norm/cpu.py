"""``batch_norm`` on a CPU: two passes over the activations forward and two backward.

Each pass takes about as long as a copy. Letters: V views, K blocks of a view, C channels, L lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import int8, int32, int64, njit, void
from numba.core.cgutils import ir
from numba.core.types import CPointer  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol_kernels.batch_norm.reference import Gather, merge_moments
from fastbyol_kernels.native import F32, F64, Activation, inlined, kernel, narrowed, widened

# A loop over a pixel with few channels is short. So several neighbouring pixels form one row of
# lanes, and tables by channel are repeated over the lanes. 64x48x48 bf16 takes 6.8 ms to normalise
# with 512 or 1024 lanes and 7.0 ms with 256, so 512 hide the cost of starting a loop.
MIN_LANES = 512
# Elements of a block, which is a run of pixels of one view: 10 us of work. With many channels a
# block has at least MIN_RUN pixels, enough to outweigh its sums.
BLOCK, MIN_RUN = 65536, 64
# A single pixel that causes all variance of its view costs 16 ** 2 times less precision if the
# shift is the mean of 16 pixels than if it is that pixel.
_PIXELS_OF_SHIFT = 16
# Half the smallest bf16 number: values up to it are rounded to 0.
_LEAST_HALF = 2.0**-134
_CACHE_LINE = 64


def _cut(x: Tensor, num_views: int) -> tuple[int, int, int, int, int]:
    """Return how every kernel divides the views: rows, run, parts, c and lanes.

    A view has ``rows`` pixels in ``parts`` blocks of ``run`` pixels, ``c`` channels and ``lanes``.
    """
    n, c, h, w = x.shape
    rows, run = n // num_views * h * w, max(MIN_RUN, BLOCK // c)
    return rows, run, -(-rows // run), c, -(-MIN_LANES // c) * c


@inlined
def _elements(block, rows, run, parts, c):
    """Return the start and stop of a block's elements."""
    start = (block // parts * rows + block % parts * run) * c
    return start, min(start + run * c, (block // parts + 1) * rows * c)


@intrinsic
def _prefetch(typing: Any, address: Any) -> Any:
    """Prefetch the cache line at ``address`` to the first-level cache. Any address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = context.get_value_type(CPointer(int8)), context.get_value_type(int32)
        of_four = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], of_four)
        # The flags of llvm.prefetch: a read, the highest locality, data.
        builder.call(
            function, [builder.inttoptr(arguments[0], pointer), number(0), number(3), number(1)]
        )
        return context.get_dummy_value()

    return void(int64), generate


@njit(inline="always")
def _fetch_ahead(array, start, stop):
    """Prefetch fp32 elements that are read only where a ReLU was active."""
    # A masked load waits for its mask, and the pass took twice as long without this. bf16 is
    # widened before it is masked, so its loads do not wait.
    if array.itemsize == 4:
        for address in range(
            array.ctypes.data + start * 4, array.ctypes.data + stop * 4, _CACHE_LINE
        ):
            _prefetch(address)


@njit(inline="always")
def _passed(gradient, before, least):
    """Return ``gradient`` where ``before``, the ReLU's input, exceeds ``least``, else 0."""
    # On bits: with a branch the compiler delays the work on the gradient until the mask is known,
    # and with a product an infinite gradient would become NaN.
    keep = np.uint32(np.uint32(before <= least) - np.uint32(1))
    return np.uint32(np.float32(gradient).view(np.uint32) & keep).view(np.float32)


@njit(inline="always")
def _spread(tables, number, lanes, channels):
    """Repeat the first ``channels`` values of each of ``number`` tables over all of its lanes."""
    for table in range(number):
        values = tables[table * lanes : (table + 1) * lanes]
        first = values[:channels]
        for lane in range(channels, lanes, channels):
            into = values[lane : lane + channels]
            for i in range(channels):
                into[i] = first[i]


@njit(inline="always")
def _fold(sums, channels):
    """Add up the lanes of each channel, in order, into its first lane."""
    into = sums[:channels]
    for lane in range(channels, len(sums), channels):
        other = sums[lane : lane + channels]
        for i in range(channels):
            into[i] += other[i]


@kernel
def _sum_deviations(
    block: int, x: Activation, sums: F32, rows: int, run: int, parts: int, c: int, lanes: int
) -> None:
    """Write each lane's sums of x - shift and its square, and the shift, to ``sums`` (V, K, 3, L).

    The shift is the mean of the block's first few pixels. So a large mean costs no precision, and
    outliers among these pixels affect their own block only.
    """
    start, stop = _elements(block, rows, run, parts, c)
    own = sums[block * 3 * lanes : (block + 1) * 3 * lanes]
    once, twice, shift = own[:lanes], own[lanes : 2 * lanes], own[2 * lanes :]
    once[:] = np.float32(0)
    twice[:] = np.float32(0)
    first, into, pixels = (
        x[start : start + c],
        shift[:c],
        min((stop - start) // c, _PIXELS_OF_SHIFT),
    )
    into[:] = np.float32(0)
    for pixel in range(1, pixels):
        other = x[start + pixel * c : start + (pixel + 1) * c]
        for i in range(c):
            into[i] += widened(other[i]) - widened(first[i])
    for i in range(c):
        into[i] = widened(first[i]) + into[i] / np.float32(pixels)
    _spread(shift, 1, lanes, c)
    # Four rows at a time: storing a sum takes longer than adding, and here four rows need one
    # store.
    while start + 4 * lanes <= stop:
        x0, x1 = x[start : start + lanes], x[start + lanes : start + 2 * lanes]
        x2, x3 = x[start + 2 * lanes : start + 3 * lanes], x[start + 3 * lanes : start + 4 * lanes]
        for i in range(lanes):
            d0, d1 = widened(x0[i]) - shift[i], widened(x1[i]) - shift[i]
            d2, d3 = widened(x2[i]) - shift[i], widened(x3[i]) - shift[i]
            once[i] += (d0 + d1) + (d2 + d3)
            twice[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        start += 4 * lanes
    while start < stop:
        x0 = x[start : min(stop, start + lanes)]
        for i in range(len(x0)):
            d0 = widened(x0[i]) - shift[i]
            once[i] += d0
            twice[i] += d0 * d0
        start += lanes


@inlined
def _combine(view, sums, own, rows, run, parts, c, lanes):
    """Write a view's count, means and sums of squared deviations to ``own`` (V, 1 + 2 C).

    Source: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979.
    """
    width = 1 + 2 * c
    own[view * width] = float(rows)
    means = own[view * width + 1 : view * width + 1 + c]
    m2 = own[view * width + 1 + c : (view + 1) * width]
    means[:] = 0.0
    m2[:] = 0.0
    for part in range(parts):
        start = (view * parts + part) * 3 * lanes
        once, twice = sums[start : start + lanes], sums[start + lanes : start + 2 * lanes]
        shift = sums[start + 2 * lanes : start + 2 * lanes + c]
        _fold(once, c)
        _fold(twice, c)
        pixels = float(min(rows - part * run, run))
        for i in range(c):
            means[i] += np.float64(once[i]) + pixels * np.float64(shift[i])
    for i in range(c):
        means[i] /= float(rows)
    for part in range(parts):
        start = (view * parts + part) * 3 * lanes
        once, twice = sums[start : start + c], sums[start + lanes : start + lanes + c]
        shift = sums[start + 2 * lanes : start + 2 * lanes + c]
        pixels = float(min(rows - part * run, run))
        for i in range(c):
            sum_of_block = np.float64(once[i])
            apart = sum_of_block / pixels + (np.float64(shift[i]) - means[i])
            m2[i] += (
                np.float64(twice[i])
                - sum_of_block * (sum_of_block / pixels)
                + pixels * apart * apart
            )
    for i in range(c):
        m2[i] = max(m2[i], 0.0)


@kernel
def _combine_blocks(
    view: int, sums: F32, own: F64, rows: int, run: int, parts: int, c: int, lanes: int
) -> None:
    """Do ``_combine`` for a view, before a message of ``own``."""
    _combine(view, sums, own, rows, run, parts, c, lanes)


@kernel
def _moments(
    block: int, weight: F32, bias: F32, running_mean: F32, running_var: F32, sums: F32, own: F64,
    moments: F32, table: F32,
    num_views: int, alone: int, eps: float, momentum: float, rest: float,
    rows: int, run: int, parts: int, c: int, lanes: int,
) -> None:  # fmt: skip
    """Fill ``table`` from ``own``, each view's moments over all ranks, and update the buffers.

    The kernel has a single block. If ``alone`` it computes ``own`` first: a message would come in
    between. ``table`` (V, 3, L) is mean, scale and shift. The mean has two fp32 parts: the table's
    is subtracted before any product, the remainder is in ``moments`` (V, 2, C) together with
    1 / std. ``rest`` is 1 - ``momentum``: computed in here, it would be reordered with the products
    around it.
    """
    for view in range(num_views):
        if alone:
            _combine(view, sums, own, rows, run, parts, c, lanes)
        of_rows = own[view * (1 + 2 * c) : (view + 1) * (1 + 2 * c)]
        means, m2, count = of_rows[1 : 1 + c], of_rows[1 + c : 1 + 2 * c], of_rows[0]
        into = table[view * 3 * lanes : (view + 1) * 3 * lanes]
        of_view = moments[view * 2 * c : (view + 1) * 2 * c]
        for i in range(c):
            running_mean[i] = np.float32(momentum * means[i] + rest * np.float64(running_mean[i]))
            running_var[i] = np.float32(
                momentum * (m2[i] / (count - 1.0)) + rest * np.float64(running_var[i])
            )
            rstd = 1.0 / np.sqrt(m2[i] / count + eps)
            mean = np.float32(means[i])
            below = means[i] - np.float64(mean)
            scale = rstd * np.float64(weight[i])
            of_view[i], of_view[c + i] = np.float32(below), np.float32(rstd)
            into[i], into[lanes + i] = mean, np.float32(scale)
            into[2 * lanes + i] = np.float32(np.float64(bias[i]) - below * scale)
        _spread(into, 3, lanes, c)


@kernel(backwards=True)
def _normalise(
    block: int, x: Activation, residual: Activation, y: Activation, table: F32, added: int,
    limit: float,
    rows: int, run: int, parts: int, c: int, lanes: int,
) -> None:  # fmt: skip
    """Write y = max((x - mean) * scale + shift, limit), with a residual in the sum if ``added``."""
    start, stop = _elements(block, rows, run, parts, c)
    own, least = (
        table[block // parts * 3 * lanes : (block // parts + 1) * 3 * lanes],
        np.float32(limit),
    )
    mean, scale, shift = own[:lanes], own[lanes : 2 * lanes], own[2 * lanes :]
    while start < stop:
        xs, ys = x[start : min(stop, start + lanes)], y[start : min(stop, start + lanes)]
        if added:
            other = residual[start : min(stop, start + lanes)]
            for i in range(len(xs)):
                before = (widened(xs[i]) - mean[i]) * scale[i] + shift[i] + widened(other[i])
                ys[i] = narrowed(least if before <= least else before, ys)
        else:
            for i in range(len(xs)):
                before = (widened(xs[i]) - mean[i]) * scale[i] + shift[i]
                ys[i] = narrowed(least if before <= least else before, ys)
        start += lanes


@kernel
def _sum_gradients(
    block: int, x: Activation, dy: Activation, y: Activation, g: Activation, table: F32, sums: F32,
    from_y: int, limit: float,
    rows: int, run: int, parts: int, c: int, lanes: int,
) -> None:  # fmt: skip
    """Write per lane the sums of g and g * (x - mean) to ``sums`` (V, K, 2, L).

    g is dy where the ReLU was active, else 0. With ``from_y`` the mask comes from y, and g is
    written; else the ReLU's input is recomputed and compared with ``limit``.
    """
    start, stop = _elements(block, rows, run, parts, c)
    own, least = (
        table[block // parts * 3 * lanes : (block // parts + 1) * 3 * lanes],
        np.float32(limit),
    )
    mean, scale, shift = own[:lanes], own[lanes : 2 * lanes], own[2 * lanes :]
    of_block = sums[block * 2 * lanes : (block + 1) * 2 * lanes]
    of_g, of_gd = of_block[:lanes], of_block[lanes:]
    of_g[:] = np.float32(0)
    of_gd[:] = np.float32(0)
    while start < stop:
        end = min(stop, start + lanes)
        xs, dys = x[start:end], dy[start:end]
        _fetch_ahead(dy, end, end + lanes)
        if from_y:
            ys, gs = y[start:end], g[start:end]
            for i in range(len(xs)):
                one = _passed(widened(dys[i]), widened(ys[i]), np.float32(0))
                gs[i] = narrowed(one, gs)
                of_g[i] += one
                of_gd[i] += one * (widened(xs[i]) - mean[i])
        else:
            for i in range(len(xs)):
                d = widened(xs[i]) - mean[i]
                before = d * scale[i] + shift[i]
                one = _passed(widened(dys[i]), before, least)
                of_g[i] += one
                of_gd[i] += one * d
        start += lanes


@inlined
def _fold_blocks(view, sums, own, parts, c, lanes):
    """Write a view's sums of g and g * (x - mean), over its blocks, to ``own`` (V, 2, C)."""
    of_g, of_gx = (
        own[view * 2 * c : view * 2 * c + c],
        own[view * 2 * c + c : (view + 1) * 2 * c],
    )
    of_g[:] = 0.0
    of_gx[:] = 0.0
    for part in range(parts):
        start = (view * parts + part) * 2 * lanes
        once, twice = sums[start : start + lanes], sums[start + lanes : start + 2 * lanes]
        _fold(once, c)
        _fold(twice, c)
        for i in range(c):
            of_g[i] += np.float64(once[i])
            of_gx[i] += np.float64(twice[i])


@kernel
def _fold_gradients(view: int, sums: F32, own: F64, parts: int, c: int, lanes: int) -> None:
    """Do ``_fold_blocks`` for a view, before a message of ``own``."""
    _fold_blocks(view, sums, own, parts, c, lanes)


@kernel
def _affine(
    block: int, moments: F32, table: F32, sums: F32, own: F64, total: F64, affine: F32,
    slopes: F32, num_views: int, alone: int, count: float, parts: int, c: int, lanes: int,
) -> None:  # fmt: skip
    """Compute the gradients of weight and bias, ``affine`` (2, C), in fp64, and fill ``slopes``.

    The kernel has a single block. ``own`` are this rank's sums, from which the gradients come that
    are added to other ranks' later, ``total`` (V, 2, C) those over the ``count`` values of all. If
    ``alone``, ``total`` is ``own`` and computed here. ``slopes``
    (V, 2, L) is a and b of
    dx = scale * (g - sum(g) / n - x_hat * sum(g * x_hat) / n) = scale * g + a * (x - mean) + b.
    """
    dweight, dbias = affine[:c], affine[c : 2 * c]
    dweight[:] = np.float32(0)
    dbias[:] = np.float32(0)
    for view in range(num_views):
        if alone:
            _fold_blocks(view, sums, own, parts, c, lanes)
        below, rstd = (
            moments[view * 2 * c : view * 2 * c + c],
            moments[view * 2 * c + c : (view + 1) * 2 * c],
        )
        of_g, of_gx = (
            total[view * 2 * c : view * 2 * c + c],
            total[view * 2 * c + c : (view + 1) * 2 * c],
        )
        own_g, own_gx = (
            own[view * 2 * c : view * 2 * c + c],
            own[view * 2 * c + c : (view + 1) * 2 * c],
        )
        into = slopes[view * 2 * lanes : (view + 1) * 2 * lanes]
        for i in range(c):
            inverse, scale = np.float64(rstd[i]), np.float64(table[view * 3 * lanes + lanes + i])
            dweight[i] += np.float32(inverse * (own_gx[i] - np.float64(below[i]) * own_g[i]))
            dbias[i] += np.float32(own_g[i])
            of_x_hat = inverse * (of_gx[i] - np.float64(below[i]) * of_g[i])
            slope = -scale * inverse * of_x_hat / count
            into[i] = np.float32(slope)
            into[lanes + i] = np.float32(-scale * of_g[i] / count - slope * np.float64(below[i]))
        _spread(into, 2, lanes, c)


@kernel(backwards=True)
def _input_gradient(
    block: int, x: Activation, dy: Activation, dx: Activation, table: F32, slopes: F32, masks: int,
    limit: float,
    rows: int, run: int, parts: int, c: int, lanes: int,
) -> None:  # fmt: skip
    """Write dx by ``_affine``'s formula, with g = dy, masked by the ReLU if ``masks``."""
    start, stop = _elements(block, rows, run, parts, c)
    view, least = block // parts, np.float32(limit)
    own, of_view = (
        table[view * 3 * lanes : (view + 1) * 3 * lanes],
        slopes[view * 2 * lanes : (view + 1) * 2 * lanes],
    )
    mean, scale, shift = own[:lanes], own[lanes : 2 * lanes], own[2 * lanes :]
    slope, constant = of_view[:lanes], of_view[lanes:]
    while start < stop:
        end = min(stop, start + lanes)
        xs, dys, dxs = x[start:end], dy[start:end], dx[start:end]
        _fetch_ahead(dy, end, end + lanes)
        if masks:
            for i in range(len(xs)):
                d = widened(xs[i]) - mean[i]
                before = d * scale[i] + shift[i]
                one = _passed(widened(dys[i]), before, least)
                dxs[i] = narrowed(scale[i] * one + (slope[i] * d + constant[i]), dxs)
        else:
            for i in range(len(xs)):
                d = widened(xs[i]) - mean[i]
                dxs[i] = narrowed(scale[i] * widened(dys[i]) + (slope[i] * d + constant[i]), dxs)
        start += lanes


class FusedBatchNorm(torch.autograd.Function):
    """``batch_norm`` of channels-last x (N, C, H, W), bf16 or fp32, with fp32 parameters."""

    # The forward pass saves x, and y if a residual was added before the ReLU. Without a residual
    # the backward pass recomputes the ReLU's mask from x, bit for bit.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor,
        running_var: Tensor, num_views: int,
        momentum: float, eps: float, residual: Tensor | None, relu: bool, gather: Gather | None,
    ) -> Tensor:  # fmt: skip
        rows, _, parts, c, lanes = cut = _cut(x, num_views)
        sums, table = (
            weight.new_empty(num_views, parts, 3, lanes),
            weight.new_empty(num_views, 3, lanes),
        )
        moments = weight.new_empty(num_views, 2, c)
        own = weight.new_empty(num_views, 1 + 2 * c, dtype=torch.float64)
        y, added, limit = torch.empty_like(x), residual is not None, 0.0 if relu else -torch.inf
        _sum_deviations(num_views * parts, x, sums, *cut)
        if gather is not None:
            _combine_blocks(num_views, sums, own, *cut)
            own = merge_moments(gather(own))
        _moments(
            1, weight, bias, running_mean, running_var, sums, own, moments, table,
            num_views, gather is None, eps, momentum, 1 - momentum, *cut,
        )  # fmt: skip
        _normalise(num_views * parts, x, residual if added else x, y, table, added, limit, *cut)
        ctx.num_views, ctx.relu, ctx.added = num_views, relu, added
        ctx.gather, ctx.count = gather, float(rows if gather is None else own[0, 0])
        ctx.save_for_backward(x, y if relu and added else None, moments, table)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, moments, table = ctx.saved_tensors
        dy, num_views = grads[0].contiguous(memory_format=torch.channels_last), ctx.num_views
        _, _, parts, c, lanes = cut = _cut(x, num_views)
        masks = ctx.relu and y is None
        # An output is positive if its value before rounding exceeds this.
        limit = (_LEAST_HALF if x.dtype == torch.bfloat16 else 0.0) if masks else -torch.inf
        sums, slopes = (
            table.new_empty(num_views, parts, 2, lanes),
            table.new_empty(num_views, 2, lanes),
        )
        affine, own = table.new_empty(2, c), moments.new_empty(num_views, 2, c, dtype=torch.float64)
        dx, g = torch.empty_like(x), dy if y is None else torch.empty_like(x)
        _sum_gradients(
            num_views * parts,
            x,
            dy,
            dy if y is None else y,
            g,
            table,
            sums,
            y is not None,
            limit,
            *cut,
        )
        total = own
        if ctx.gather is not None:
            _fold_gradients(num_views, sums, own, parts, c, lanes)
            total = ctx.gather(own).sum(0)
        _affine(
            1, moments, table, sums, own, total, affine, slopes,
            num_views, ctx.gather is None, ctx.count, parts, c, lanes,
        )  # fmt: skip
        _input_gradient(num_views * parts, x, g, dx, table, slopes, masks, limit, *cut)
        return dx, affine[0], affine[1], *[None] * 5, g if ctx.added else None, None, None


# What a step of one rank calls, for ``native.compile_ahead``.
TRAINED_WITH = (_sum_deviations, _moments, _normalise, _sum_gradients, _affine, _input_gradient)
