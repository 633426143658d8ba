"""``batch_norm`` on a GPU, in Triton: two launches forward and two backward, for all views.

The first launch of each pair writes sums of runs of rows; the second adds those of all runs, in a
fixed order, in every program that needs them. At the stem the second one also pools. All sums are
of x - pivot, a number near the mean: in a collapsed layer the variance is far below the squared
mean, which would drown it.
Letters: V views, N samples, R rows (pixels) of a view, C channels, K runs of a view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol_kernels.batch_norm.reference import Gather, merge_moments
from fastbyol_kernels.max_pool.triton import (
    gradient_of_pixels,
    keep_larger,
    least,
    pooled_like,
    tap_offsets,
    window,
)


@triton.jit
def _place(num_runs):
    """Return this program's slab of channels, view and run."""
    return tl.program_id(0), tl.program_id(1) // num_runs, tl.program_id(1) % num_runs


@triton.jit
def _tile(start, stop, channels, C: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return offsets (BLOCK_R, BLOCK_C) of rows into a view, and the mask of those in the run."""
    row = start + tl.arange(0, BLOCK_R)
    mask = (row < stop)[:, None] & (channels < C)[None, :]
    return row[:, None] * C + channels[None, :], mask


@triton.jit
def _channels(slab, BLOCK_C: tl.constexpr):
    return slab * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _row(base, row, channels, C: tl.constexpr):
    return tl.load(base + row * C + channels, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def _moments_kernel(
    x, partial, rows, run, num_runs,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write a pivot, the mean above it and the squared deviations of one slab's run of rows.

    ``partial`` is (V, K, 3, C).
    """
    slab, view, index = _place(num_runs)
    channels = _channels(slab, BLOCK_C)
    first = index * run
    stop = tl.minimum(first + run, rows)
    base = x + view.to(tl.int64) * rows * C
    # The median of three rows: a single odd one is none that all others are far from.
    a = _row(base, first, channels, C)
    b = _row(base, (first + stop) // 2, channels, C)
    c = _row(base, stop - 1, channels, C)
    pivot = tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
    # Welford's recurrence in every lane of the tile, then Chan's combination of the lanes: no
    # cancellation at any mean.
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    steps = 0.0
    for start in range(first, stop, BLOCK_R):
        offsets, mask = _tile(start, stop, channels, C, BLOCK_R)
        value = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32) - pivot[None, :]
        steps += 1.0
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta * (1.0 / steps)
        m2 += delta * (value - mean)
    lanes = stop - first - tl.arange(0, BLOCK_R) + BLOCK_R - 1
    counts = (lanes // BLOCK_R).to(tl.float32)[:, None]
    center = tl.sum(counts * mean, 0) / (stop - first)
    apart = mean - center[None, :]
    out = partial + tl.program_id(1) * (3 * C) + channels
    tl.store(out, pivot, mask=channels < C)
    tl.store(out + C, center, mask=channels < C)
    tl.store(out + 2 * C, tl.sum(m2 + counts * apart * apart, 0), mask=channels < C)


@triton.jit
def _moments_of(
    partial, view, channels, rows, run, num_runs,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return a view's pivot, mean above it and sum of squared deviations, (BLOCK_C,) each.

    ``run`` and ``rows``, numbers of rows, are fp32 where they are those of all ranks.
    """
    own = partial + view * num_runs * (3 * C) + channels
    inside = channels < C
    # The first run's mean, rounded to fp32; what that cuts off is in the mean above it. It is near
    # the others' means, so that sums of squares around it lose nothing.
    pivot = tl.load(own, mask=inside, other=0.0) + tl.load(own + C, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, num_runs, BLOCK_K):
        runs = start + tl.arange(0, BLOCK_K)
        mask = (runs < num_runs)[:, None] & inside[None, :]
        count = tl.maximum(tl.minimum(rows - runs * run, run), 0).to(tl.float32)[:, None]
        at = own[None, :] + runs[:, None] * (3 * C)
        apart = tl.load(at, mask=mask, other=0.0) - pivot[None, :]
        apart += tl.load(at + C, mask=mask, other=0.0)
        total += tl.sum(count * apart, 0)
        squares += tl.sum(tl.load(at + 2 * C, mask=mask, other=0.0) + count * apart * apart, 0)
    mean = total / rows
    m2 = squares - total * mean
    return pivot, mean, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def _update_running(
    partial, running_mean, running_var, tracked, channels, rows, run, num_runs, num_views,
    keep, momentum,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, TRACKED: tl.constexpr,
):  # fmt: skip
    """Update the running buffers of a slab by each view in order, and count the views."""
    inside = channels < C
    mean = tl.load(running_mean + channels, mask=inside, other=0.0)
    var = tl.load(running_var + channels, mask=inside, other=0.0)
    for view in range(num_views):
        pivot, above, m2 = _moments_of(
            partial, view, channels, rows, run, num_runs, C, BLOCK_K, BLOCK_C
        )
        mean = keep * mean + momentum * (pivot + above)
        var = keep * var + momentum * (m2 / (rows - 1.0))
    tl.store(running_mean + channels, mean, mask=inside)
    tl.store(running_var + channels, var, mask=inside)
    if TRACKED and tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + num_views)


@triton.jit
def _begin_forward(
    weight, bias, partial, count, running_mean, running_var, tracked, statistics, rows, run,
    num_runs, num_views, eps, keep, momentum,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, MERGED: tl.constexpr,
    TRACKED: tl.constexpr,
):  # fmt: skip
    """Return channels, pivot, scale and shift of a view and slab: y = (x - pivot) * scale + shift.

    The first program of a view writes them to ``statistics`` (V, 5, C), before mean - pivot and
    rstd, and the first one of all updates the running buffers. ``partial`` is of one rank's runs
    or, if ``MERGED``, (V, 1, 3, C) of ``count`` (1,) values of all ranks.
    """
    if MERGED:
        rows = tl.load(count)
        run, num_runs = rows, 1
    slab = tl.program_id(0)
    runs_out = tl.num_programs(1) // num_views
    view = tl.program_id(1) // runs_out
    channels = _channels(slab, BLOCK_C)
    pivot, mean, m2 = _moments_of(partial, view, channels, rows, run, num_runs, C, BLOCK_K, BLOCK_C)
    rstd = 1.0 / tl.sqrt(m2 / rows + eps)
    inside = channels < C
    scale = rstd * tl.load(weight + channels, mask=inside, other=0.0)
    shift = tl.load(bias + channels, mask=inside, other=0.0) - mean * scale
    if tl.program_id(1) % runs_out == 0:
        out = statistics + view * (5 * C) + channels
        tl.store(out, pivot, mask=inside)
        tl.store(out + C, scale, mask=inside)
        tl.store(out + 2 * C, shift, mask=inside)
        tl.store(out + 3 * C, mean, mask=inside)
        tl.store(out + 4 * C, rstd, mask=inside)
    if tl.program_id(1) == 0:
        _update_running(
            partial, running_mean, running_var, tracked, channels, rows, run, num_runs,
            num_views, keep, momentum, C, BLOCK_K, BLOCK_C, TRACKED,
        )  # fmt: skip
    return channels, pivot, scale, shift


@triton.jit
def _normalise_kernel(
    x, residual, weight, bias, partial, count, running_mean, running_var, tracked, y, statistics,
    rows, run, num_runs, num_views, eps, keep, momentum,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    MERGED: tl.constexpr, TRACKED: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Write y of one slab's run of rows per program."""
    channels, pivot, scale, shift = _begin_forward(
        weight, bias, partial, count, running_mean, running_var, tracked, statistics, rows, run,
        num_runs, num_views, eps, keep, momentum, C, BLOCK_K, BLOCK_C, MERGED, TRACKED,
    )  # fmt: skip
    view = (tl.program_id(1) // num_runs).to(tl.int64)
    first = tl.program_id(1) % num_runs * run
    stop = tl.minimum(first + run, rows)
    base = view * rows * C
    # The last rows first: they were read last for the moments and are still in the L2.
    blocks = tl.cdiv(stop - first, BLOCK_R)
    for step in range(blocks):
        offsets, mask = _tile(first + (blocks - 1 - step) * BLOCK_R, stop, channels, C, BLOCK_R)
        value = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
        value = (value - pivot[None, :]) * scale[None, :] + shift[None, :]
        if RESIDUAL:
            value += tl.load(residual + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            # tl.maximum would drop a NaN.
            value = tl.where(value < 0, 0.0, value)
        tl.store(y + base + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _pool_kernel(
    x, weight, bias, partial, count, running_mean, running_var, tracked, y, taps, statistics,
    rows, run, num_runs, num_views, eps, keep, momentum, rows_out, run_out,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    MERGED: tl.constexpr, TRACKED: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Write the pooled y and its taps of one slab's run of ``rows_out`` per program."""
    channels, pivot, scale, shift = _begin_forward(
        weight, bias, partial, count, running_mean, running_var, tracked, statistics, rows, run,
        num_runs, num_views, eps, keep, momentum, C, BLOCK_K, BLOCK_C, MERGED, TRACKED,
    )  # fmt: skip
    runs_out = tl.num_programs(1) // num_views
    view = (tl.program_id(1) // runs_out).to(tl.int64)
    first = tl.program_id(1) % runs_out * run_out
    stop = tl.minimum(first + run_out, rows_out)
    source, base = x + view * rows * C, view * rows_out * C
    for start in range(first, stop, BLOCK_R):
        offsets, mask = _tile(start, stop, channels, C, BLOCK_R)
        sample, top, left = window(start + tl.arange(0, BLOCK_R), H, W)
        best, tap = least(top, left, BLOCK_R, BLOCK_C)
        for index in tl.static_range(9):
            at, exists = tap_offsets(sample, top, left, channels, mask, index, H, W, C)
            value = tl.load(source + at, mask=exists, other=0.0).to(tl.float32)
            value = (value - pivot[None, :]) * scale[None, :] + shift[None, :]
            if RELU:
                value = tl.where(value < 0, 0.0, value)
            # Rounded before it is compared, as the norm's output would be: ties are the same.
            value = value.to(y.dtype.element_ty).to(tl.float32)
            best, tap = keep_larger(best, tap, value, index, exists)
        tl.store(y + base + offsets, best.to(y.dtype.element_ty), mask=mask)
        tl.store(taps + base + offsets, tap.to(tl.uint8), mask=mask)


@triton.jit
def _gradient_tile(
    dy, more, y, taps, offsets, start, channels, mask, value, scale, shift,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    MASK: tl.constexpr, POOL: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Return the gradient before pooling and ReLU; ``value`` is x - pivot.

    The gradient after them is dy or, if ADDED, dy + ``more``.
    MASK 0 applies none, 1 takes y <= 0, 2 recomputes y as it was rounded, bit for bit.
    """
    if POOL:
        row = start + tl.arange(0, mask.shape[0])
        gradient = gradient_of_pixels(dy, more, taps, row, channels, mask, H, W, C, ADDED)
    else:
        gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        if ADDED:
            gradient += tl.load(more + offsets, mask=mask, other=0.0).to(tl.float32)
    if MASK == 1:
        kept = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.where(kept <= 0, 0.0, gradient)
    if MASK == 2:
        kept = value * scale[None, :] + shift[None, :]
        gradient = tl.where(kept.to(dy.dtype.element_ty).to(tl.float32) <= 0, 0.0, gradient)
    return gradient


@triton.jit
def _statistic(statistics, view, index, channels, C: tl.constexpr):
    """Return a number of each channel, from what ``_begin_forward`` wrote."""
    return tl.load(statistics + (5 * view + index) * C + channels, mask=channels < C, other=0.0)


@triton.jit
def _gradient_sums_kernel(
    dy, more, x, y, taps, statistics, sums, dresidual, rows, rows_out, run, num_runs,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    MASK: tl.constexpr, POOL: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Write the sums of g and g * (x - pivot) of one slab's run of rows to ``sums`` (V, K, 2, C).

    With a mask from y also write g itself, the gradient of the residual.
    """
    slab, view, index = _place(num_runs)
    channels = _channels(slab, BLOCK_C)
    pivot = _statistic(statistics, view, 0, channels, C)
    scale = _statistic(statistics, view, 1, channels, C)
    shift = _statistic(statistics, view, 2, channels, C)
    first = index * run
    stop = tl.minimum(first + run, rows)
    base, pooled = view.to(tl.int64) * rows * C, view.to(tl.int64) * rows_out * C
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    weighted = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, stop, BLOCK_R):
        offsets, mask = _tile(start, stop, channels, C, BLOCK_R)
        value = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32) - pivot[None, :]
        gradient = _gradient_tile(
            dy + pooled, more + pooled, y + base, taps + pooled, offsets, start, channels, mask,
            value, scale, shift, H, W, C, MASK, POOL, ADDED,
        )  # fmt: skip
        if MASK == 1:
            tl.store(dresidual + base + offsets, gradient.to(dresidual.dtype.element_ty), mask=mask)
        total += gradient
        # x is 0 beyond the run, but x - pivot is not.
        weighted += tl.where(mask, gradient * value, 0.0)
    out = sums + tl.program_id(1) * (2 * C) + channels
    tl.store(out, tl.sum(total, 0), mask=channels < C)
    tl.store(out + C, tl.sum(weighted, 0), mask=channels < C)


@triton.jit
def _sums_of(sums, view, channels, num_sums, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return a view's sums of g and g * (x - pivot), (BLOCK_C,) each, over ``num_sums`` runs."""
    total = tl.zeros(channels.shape, tl.float32)
    weighted = tl.zeros(channels.shape, tl.float32)
    for start in range(0, num_sums, BLOCK_K):
        runs = start + tl.arange(0, BLOCK_K)
        mask = (runs < num_sums)[:, None] & (channels < C)[None, :]
        at = sums + (view * num_sums + runs)[:, None] * (2 * C) + channels[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        weighted += tl.sum(tl.load(at + C, mask=mask, other=0.0), 0)
    return total, weighted


@triton.jit
def _gradient_kernel(
    dy, more, x, taps, statistics, sums, count, dx, affine,
    rows, rows_out, run, num_runs, num_sums, num_views,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK: tl.constexpr, POOL: tl.constexpr, ADDED: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """Write dx = scale * (g - sum(g) / n - x_hat * sum(g * x_hat) / n) of a run of rows.

    The first program of a slab writes the gradients of weight and bias to ``affine`` (2, C).
    """
    slab, view, index = _place(num_runs)
    channels = _channels(slab, BLOCK_C)
    if tl.program_id(1) == 0:
        of_weight = tl.zeros((BLOCK_C,), tl.float32)
        of_bias = tl.zeros((BLOCK_C,), tl.float32)
        for other in range(num_views):
            total, weighted = _sums_of(sums, other, channels, num_sums, C, BLOCK_K)
            mean = _statistic(statistics, other, 3, channels, C)
            rstd = _statistic(statistics, other, 4, channels, C)
            of_weight += (weighted - mean * total) * rstd
            of_bias += total
        tl.store(affine + channels, of_weight, mask=channels < C)
        tl.store(affine + C + channels, of_bias, mask=channels < C)
    pivot = _statistic(statistics, view, 0, channels, C)
    scale = _statistic(statistics, view, 1, channels, C)
    shift = _statistic(statistics, view, 2, channels, C)
    mean = _statistic(statistics, view, 3, channels, C)
    rstd = _statistic(statistics, view, 4, channels, C)
    n = tl.load(count) if MERGED else rows.to(tl.float32)
    total, weighted = _sums_of(sums, view, channels, num_sums, C, BLOCK_K)
    slope = scale * rstd * rstd * (weighted - mean * total) / n
    level = scale * total / n - mean * slope
    first = index * run
    stop = tl.minimum(first + run, rows)
    base, pooled = view.to(tl.int64) * rows * C, view.to(tl.int64) * rows_out * C
    blocks = tl.cdiv(stop - first, BLOCK_R)
    for step in range(blocks):
        start = first + (blocks - 1 - step) * BLOCK_R
        offsets, mask = _tile(start, stop, channels, C, BLOCK_R)
        value = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32) - pivot[None, :]
        gradient = _gradient_tile(
            dy + pooled, more + pooled, x, taps + pooled, offsets, start, channels, mask, value,
            scale, shift, H, W, C, MASK, POOL, ADDED,
        )  # fmt: skip
        value = scale[None, :] * gradient - (value * slope[None, :] + level[None, :])
        tl.store(dx + base + offsets, value.to(dx.dtype.element_ty), mask=mask)


# The reasons of kernels that move narrow words, which ``fastbyol_bench.launches`` demands.
NARROW = {
    "_moments_kernel": "writes sums, a few per run",
    "_gradient_sums_kernel": "writes sums, a few per run",
    "_pool_kernel": "taps are u8, half as wide as the values beside them",
    "_gradient_kernel": "pooled: four elements a thread, taps of u8",
}
# Channels of a program: 128 bytes of bf16 are a whole line of the L2.
MAX_CHANNELS = 64
# Two programs of 16 warps on each of an H100's 132 SMs, which 64 registers a thread allow. The last
# pass needs 80 for its five numbers of each of a thread's eight channels: three of 8 warps.
PROGRAMS, NUM_WARPS = 264, 16
PROGRAMS_LAST, NUM_WARPS_LAST = 396, 8
MAX_REGISTERS = {NUM_WARPS: 64, NUM_WARPS_LAST: 80}
# Elements a thread and tensor. 16 of bf16 are two 16-byte loads in flight; more tensors in flight,
# two sums of as many elements or the nine taps of a window leave registers for fewer.
PER_THREAD = 16
PER_THREAD_SUMS, PER_THREAD_POOL = 8, 4
# Elements a thread of the sums of runs that the second launches add at once.
PER_THREAD_RUNS = 2
# The shortest run. Each program of a second launch reads the sums of all runs of its view: 68 KB
# of 64 channels, beside 1.1 MB of the stem's activations.
MIN_RUN = 128


@dataclass(frozen=True)
class Launch:
    """The launch of a pass: slabs of ``block_c`` channels, runs of a view, rows of a run, warps."""

    num_slabs: int
    block_c: int
    num_runs: int
    run: int
    num_warps: int

    def tile(self, per_thread: int) -> dict[str, int]:
        """Return the blocks of a tile of ``per_thread`` elements a thread, and the options."""
        row = self.num_warps * 32 // self.block_c
        return {
            "BLOCK_R": int(min(row * per_thread, triton.next_power_of_2(self.run))),
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
            "maxnreg": MAX_REGISTERS[self.num_warps],
            "enable_fp_fusion": True,
        }

    def block_k(self, num_runs: int) -> int:
        """Return how many of the sums of ``num_runs`` runs a program adds at once."""
        most = self.num_warps * 32 * PER_THREAD_RUNS // self.block_c
        return int(min(most, triton.next_power_of_2(num_runs)))


def launch(rows: int, channels: int, num_views: int, *, last: bool = False) -> Launch:
    """Plan a launch on views of ``rows`` x ``channels``, of the backward pass's ``last`` kernel."""
    programs, num_warps = (PROGRAMS_LAST, NUM_WARPS_LAST) if last else (PROGRAMS, NUM_WARPS)
    block_c = min(MAX_CHANNELS, triton.next_power_of_2(channels))
    num_slabs = triton.cdiv(channels, block_c)
    most = max(programs // (num_slabs * num_views), 1)
    run = max(triton.cdiv(rows, most), min(MIN_RUN, rows))
    return Launch(num_slabs, block_c, triton.cdiv(rows, run), run, num_warps)


def _plan(x: Tensor, num_views: int, *, last: bool = False) -> Launch:
    # Under torch.compile a plan is for one shape: as a formula of symbols it is minutes of algebra.
    return launch(int(_rows(x, num_views)), int(x.shape[1]), num_views, last=last)


def _rows(x: Tensor, num_views: int) -> int:
    return x.numel() // (x.shape[1] * num_views)


def _grid(plan: Launch, num_views: int) -> tuple[int, int]:
    return plan.num_slabs, num_views * plan.num_runs


@torch.library.custom_op("fastbyol::batch_norm_moments", mutates_args=())
def _batch_norm_moments(x: Tensor, num_views: int) -> Tensor:
    """Return pivot, mean above it and squared deviations of each run, (V, K, 3, C) fp32."""
    plan = _plan(x, num_views)
    partial = _of_runs(x, num_views, plan, 3)
    _moments_kernel[_grid(plan, num_views)](
        x, partial, _rows(x, num_views), plan.run, plan.num_runs,
        C=x.shape[1], **plan.tile(PER_THREAD),
    )  # fmt: skip
    return partial


def _of_runs(x: Tensor, num_views: int, plan: Launch, count: int) -> Tensor:
    """Return unfilled memory for ``count`` numbers of each view, run and channel."""
    shape = (num_views, plan.num_runs, count, x.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=x.device)


@_batch_norm_moments.register_fake
def _(x: Tensor, num_views: int) -> Tensor:
    return _of_runs(x, num_views, _plan(x, num_views), 3)


@torch.library.custom_op(
    "fastbyol::batch_norm", mutates_args=("running_mean", "running_var", "tracked")
)
def _batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    tracked: Tensor | None, residual: Tensor | None, partial: Tensor, count: Tensor | None,
    num_views: int, momentum: float, eps: float, relu: bool, pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the statistics (V, 5, C) fp32, and the taps of a pooled y (else empty).

    ``partial`` are the moments of x's runs or, with a ``count`` (1,) fp32, of all ranks.
    """
    plan, rows = _plan(x, num_views), _rows(x, num_views)
    y, statistics, taps = _outputs(x, num_views, pool)
    named = {"C": x.shape[1], "BLOCK_K": plan.block_k(plan.num_runs)}
    named |= {"MERGED": count is not None, "TRACKED": tracked is not None, "RELU": relu}
    state = (
        weight, bias, partial, partial if count is None else count, running_mean, running_var,
        running_mean if tracked is None else tracked,
    )  # fmt: skip
    numbers = (rows, plan.run, plan.num_runs, num_views, eps, 1 - momentum, momentum)
    if not pool:
        _normalise_kernel[_grid(plan, num_views)](
            x, x if residual is None else residual, *state, y, statistics, *numbers,
            RESIDUAL=residual is not None, **named, **plan.tile(PER_THREAD),
        )  # fmt: skip
        return y, statistics, taps
    out, (h, w) = _plan(y, num_views), x.shape[2:]
    _pool_kernel[_grid(out, num_views)](
        x, *state, y, taps, statistics, *numbers, _rows(y, num_views), out.run,
        H=h, W=w, **named, **out.tile(PER_THREAD_POOL),
    )  # fmt: skip
    return y, statistics, taps


def _outputs(x: Tensor, num_views: int, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    statistics = torch.empty((num_views, 5, x.shape[1]), dtype=torch.float32, device=x.device)
    if pool:
        return pooled_like(x), statistics, pooled_like(x, torch.uint8)
    return torch.empty_like(x), statistics, torch.empty(0, dtype=torch.uint8, device=x.device)


@_batch_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    tracked: Tensor | None, residual: Tensor | None, partial: Tensor, count: Tensor | None,
    num_views: int, momentum: float, eps: float, relu: bool, pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(x, num_views, pool)


@torch.library.custom_op("fastbyol::batch_norm_sums", mutates_args=())
def _batch_norm_sums(
    dy: Tensor, x: Tensor, y: Tensor | None, taps: Tensor | None, statistics: Tensor,
    num_views: int, relu: bool, more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the sums of each run, (V, K, 2, C) fp32, and with ``y`` the residual's gradient.

    ``y`` is passed if a residual was added before the ReLU, ``taps`` if y was pooled. The gradient
    of y is ``dy`` or ``dy + more``.
    """
    plan, pool = _plan(x, num_views), taps is not None
    sums = _of_runs(x, num_views, plan, 2)
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    mask = 0 if not relu else 2 if y is None else 1
    _gradient_sums_kernel[_grid(plan, num_views)](
        dy, dy if more is None else more, x, x if y is None else y, dy if taps is None else taps,
        statistics, sums, x if y is None else dresidual, _rows(x, num_views), _rows(dy, num_views),
        plan.run, plan.num_runs,
        **_gradients(x, plan, pool), MASK=mask, ADDED=more is not None,
    )  # fmt: skip
    return sums, dresidual


@_batch_norm_sums.register_fake
def _(
    dy: Tensor, x: Tensor, y: Tensor | None, taps: Tensor | None, statistics: Tensor,
    num_views: int, relu: bool, more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan = _plan(x, num_views)
    return _of_runs(x, num_views, plan, 2), x.new_empty(0) if y is None else torch.empty_like(x)


@torch.library.custom_op("fastbyol::batch_norm_backward", mutates_args=())
def _batch_norm_backward(
    dy: Tensor, x: Tensor, taps: Tensor | None, statistics: Tensor, sums: Tensor,
    count: Tensor | None, num_views: int, masks: bool, more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dx and the gradients of weight and bias, (2, C).

    ``dy``, or ``dy + more``, is already masked by the ReLU unless ``masks``. With a ``count`` (1,)
    fp32, ``sums`` (V, 1, 2, C) are those of all ranks.
    """
    plan = _plan(x, num_views, last=True)
    pool = taps is not None
    dx = torch.empty_like(x)
    affine = torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device)
    _gradient_kernel[_grid(plan, num_views)](
        dy, dy if more is None else more, x, dy if taps is None else taps, statistics, sums,
        sums if count is None else count,
        dx, affine,
        _rows(x, num_views), _rows(dy, num_views), plan.run, plan.num_runs, sums.shape[1],
        num_views,
        **_gradients(x, plan, pool), BLOCK_K=plan.block_k(sums.shape[1]), MASK=2 if masks else 0,
        ADDED=more is not None, MERGED=count is not None,
    )  # fmt: skip
    return dx, affine


@_batch_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _gradients(x: Tensor, plan: Launch, pool: bool) -> dict[str, int]:
    """Return what both passes over gradients are compiled for."""
    sides = dict(zip("HW", x.shape[2:] if pool else (1, 1), strict=True))
    tile = plan.tile(PER_THREAD_POOL if pool else PER_THREAD_SUMS)
    return {"C": x.shape[1], "POOL": pool} | sides | tile


class TritonBatchNorm(torch.autograd.Function):
    """``batch_norm`` of x (N, C) or channels-last (N, C, H, W), bf16 or fp32, on a GPU."""

    # The forward pass saves x, y if a residual was added before the ReLU, and the taps if it
    # pooled. Without a residual the backward pass recomputes the ReLU's mask from x, bit for bit.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor,
        running_var: Tensor, tracked: Tensor | None, num_views: int, momentum: float, eps: float,
        residual: Tensor | None, relu: bool, pool: bool, gather: Gather | None,
    ) -> Tensor:  # fmt: skip
        partial, count = _batch_norm_moments(x, num_views), None
        if gather is not None:
            partial, count = _of_all_ranks(partial, x, num_views, gather)
        y, statistics, taps = _batch_norm(
            x, weight, bias, running_mean, running_var, tracked, residual, partial, count,
            num_views, momentum, eps, relu, pool,
        )  # fmt: skip
        ctx.num_views, ctx.relu, ctx.gather = num_views, relu, gather
        ctx.added = residual is not None
        kept = y if relu and ctx.added else None
        ctx.save_for_backward(x, kept, taps if pool else None, statistics, count)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, taps, statistics, count = ctx.saved_tensors
        dy = grads[0].contiguous(
            memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format
        )
        sums, dresidual = _batch_norm_sums(dy, x, y, taps, statistics, ctx.num_views, ctx.relu)
        own = None
        if ctx.gather is not None:
            own = sums.double().sum(1)
            sums = ctx.gather(own).sum(0)[:, None].float()
        g = dy if y is None else dresidual
        dx, affine = _batch_norm_backward(
            g, x, taps, statistics, sums, count, ctx.num_views, ctx.relu and y is None
        )
        if own is not None:
            of_x_hat = (own[:, 1] - statistics[:, 3] * own[:, 0]) * statistics[:, 4]
            affine = torch.stack((of_x_hat.sum(0), own[:, 0].sum(0))).float()
        return dx, affine[0], affine[1], *[None] * 6, g if ctx.added else None, *[None] * 3


def _of_all_ranks(
    partial: Tensor, x: Tensor, num_views: int, gather: Gather
) -> tuple[Tensor, Tensor]:
    """Merge the moments (V, K, 3, C) of this rank's runs and then of all ranks.

    Returns them as of a single run, (V, 1, 3, C) fp32, and their count (1,) fp32.
    """
    plan, rows = _plan(x, num_views), _rows(x, num_views)
    runs = torch.arange(plan.num_runs, dtype=torch.float64, device=x.device)
    counts = (rows - runs * plan.run).clamp(max=plan.run)[:, None, None].expand(-1, num_views, 1)
    pivots, above, m2 = partial.double().transpose(0, 1).unbind(2)
    own = merge_moments(torch.cat((counts, pivots + above, m2), -1))
    every = merge_moments(gather(own))
    mean, m2 = every[:, 1:].unflatten(1, (2, -1)).unbind(1)
    pivot = mean.float()
    merged = torch.stack((pivot, (mean - pivot).float(), m2.float()), 1)
    return merged[:, None], every[0, :1].float()
