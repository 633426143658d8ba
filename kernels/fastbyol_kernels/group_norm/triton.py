"""Group norm on a GPU, in Triton: a program works on one sample and a slab of whole groups.

Letters: N samples, C channels, H W pixels, G groups, K runs of pixels of a sample (1 if it is not
cut).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _slab(C: tl.constexpr, SLAB: tl.constexpr):
    """Return this program's slab and sample."""
    return tl.program_id(0) % (C // SLAB), (tl.program_id(0) // (C // SLAB)).to(tl.int64)


@triton.jit
def _tile(
    first,
    stop,
    slab,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return offsets (BLOCK_P, BLOCK_C) into a sample, and the mask of those inside the slab."""
    pixels = first + tl.arange(0, BLOCK_P)
    channels = tl.arange(0, BLOCK_C)
    mask = (pixels < stop)[:, None] & (channels < SLAB)[None, :]
    return pixels[:, None] * C + (slab * SLAB + channels)[None, :], mask


@triton.jit
def _belongs(PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Return (BLOCK_C, BLOCK_G), 1 where the channel belongs to the group, for any PER_GROUP."""
    return ((tl.arange(0, BLOCK_C) // PER_GROUP)[:, None] == tl.arange(0, BLOCK_G)[None, :]).to(
        tl.float32
    )


@triton.jit
def _by_group(values, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Sum (BLOCK_C,) to (BLOCK_G,). Channels beyond the slab go to groups that are not read."""
    if BLOCK_G * PER_GROUP == BLOCK_C:
        return tl.sum(tl.reshape(values, (BLOCK_G, PER_GROUP)), 1)
    else:  # noqa: RET505
        return tl.sum(values[:, None] * _belongs(PER_GROUP, BLOCK_C, BLOCK_G), 0)


@triton.jit
def _by_channel(values, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Return each channel's group value: (BLOCK_G,) -> (BLOCK_C,)."""
    if BLOCK_G * PER_GROUP == BLOCK_C:
        return tl.reshape(tl.broadcast_to(values[:, None], (BLOCK_G, PER_GROUP)), (BLOCK_C,))
    else:  # noqa: RET505
        return tl.sum(values[None, :] * _belongs(PER_GROUP, BLOCK_C, BLOCK_G), 1)


@triton.jit
def _moments(
    x, first, stop, slab,
    C: tl.constexpr, SLAB: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Return mean and sum of squared deviations per group over pixels [first, stop) of a sample."""
    # Welford's recurrence in every lane of the tile, then Chan's combination of the lanes: no
    # cancellation at any mean.
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    steps = 0.0
    for start in range(first, stop, BLOCK_P):
        offsets, mask = _tile(start, stop, slab, C, SLAB, BLOCK_P, BLOCK_C)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        steps += 1.0
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta * (1.0 / steps)
        m2 += delta * (value - mean)
    lanes = stop - first - tl.arange(0, BLOCK_P) + BLOCK_P - 1
    counts = (lanes // BLOCK_P).to(tl.float32)[:, None]
    group_mean = _by_group(tl.sum(counts * mean, 0), PER_GROUP, BLOCK_C, BLOCK_G) / (
        (stop - first) * PER_GROUP
    )
    apart = mean - _by_channel(group_mean, PER_GROUP, BLOCK_C, BLOCK_G)[None, :]
    return group_mean, _by_group(
        tl.sum(m2 + counts * apart * apart, 0), PER_GROUP, BLOCK_C, BLOCK_G
    )


@triton.jit
def _write_normalised(
    x, residual, y, first, stop, slab, scale, shift,
    C: tl.constexpr, SLAB: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """Write y = relu(x * scale + shift + residual)."""
    # The last pixels first: they were read last for the statistics and are still in the SM's cache
    # or the L2, so device memory moves each byte once.
    blocks = tl.cdiv(stop - first, BLOCK_P)
    for step in range(blocks):
        offsets, mask = _tile(
            first + (blocks - 1 - step) * BLOCK_P, stop, slab, C, SLAB, BLOCK_P, BLOCK_C
        )
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        value = value * scale[None, :] + shift[None, :]
        if RESIDUAL:
            value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            # tl.maximum would drop a NaN.
            value = tl.where(value < 0, 0.0, value)
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _affine(weight, bias, slab, SLAB: tl.constexpr, BLOCK_C: tl.constexpr):
    channels = tl.arange(0, BLOCK_C)
    mask = channels < SLAB
    gamma = tl.load(weight + slab * SLAB + channels, mask=mask, other=0.0)
    return gamma, tl.load(bias + slab * SLAB + channels, mask=mask, other=0.0)


@triton.jit
def _line(mean, rstd, gamma, beta):
    """Return scale and shift of a channel, which normalise it as x * scale + shift.

    Both passes use these: they must agree on the sign, which the ReLU masks by.
    """
    scale = rstd * gamma
    return scale, beta - mean * scale


@triton.jit
def _forward_kernel(
    x, residual, weight, bias, y, mean_out, rstd_out, num_pixels, eps,
    C: tl.constexpr, SLAB: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Normalise one sample's slab per program."""
    slab, sample = _slab(C, SLAB)
    base = sample * num_pixels * C
    mean, m2 = _moments(
        x + base, 0, num_pixels, slab, C, SLAB, PER_GROUP, BLOCK_P, BLOCK_C, BLOCK_G
    )
    rstd = 1.0 / tl.sqrt(m2 / (num_pixels * PER_GROUP) + eps)
    groups = tl.arange(0, BLOCK_G)
    out = sample * (C // PER_GROUP) + slab * (SLAB // PER_GROUP) + groups
    tl.store(mean_out + out, mean, mask=groups < SLAB // PER_GROUP)
    tl.store(rstd_out + out, rstd, mask=groups < SLAB // PER_GROUP)
    gamma, beta = _affine(weight, bias, slab, SLAB, BLOCK_C)
    scale, shift = _line(
        _by_channel(mean, PER_GROUP, BLOCK_C, BLOCK_G),
        _by_channel(rstd, PER_GROUP, BLOCK_C, BLOCK_G),
        gamma,
        beta,
    )
    _write_normalised(
        x + base, residual + base, y + base, 0, num_pixels, slab, scale, shift,
        C, SLAB, BLOCK_P, BLOCK_C, RESIDUAL, RELU,
    )  # fmt: skip


@triton.jit
def _moments_kernel(
    x, partial, num_pixels, run,
    C: tl.constexpr, SLAB: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Write mean and squared deviations of one slab's run of pixels to ``partial`` (N, K, 2, G)."""
    slab, sample = _slab(C, SLAB)
    first = tl.program_id(1) * run
    stop = tl.minimum(first + run, num_pixels)
    base = sample * num_pixels * C
    mean, m2 = _moments(x + base, first, stop, slab, C, SLAB, PER_GROUP, BLOCK_P, BLOCK_C, BLOCK_G)
    groups = tl.arange(0, BLOCK_G)
    row = (sample * tl.num_programs(1) + tl.program_id(1)) * 2
    out = row * (C // PER_GROUP) + slab * (SLAB // PER_GROUP) + groups
    tl.store(partial + out, mean, mask=groups < SLAB // PER_GROUP)
    tl.store(partial + out + C // PER_GROUP, m2, mask=groups < SLAB // PER_GROUP)


@triton.jit
def _normalise_kernel(
    x, residual, weight, bias, partial, y, mean_out, rstd_out, num_pixels, run, eps,
    C: tl.constexpr, SLAB: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Normalise one run of pixels of a slab per program.

    Each program combines the statistics of all runs; the first one writes the result.
    """
    slab, sample = _slab(C, SLAB)
    num_runs = tl.num_programs(1)
    groups = tl.arange(0, BLOCK_G)
    runs = tl.arange(0, BLOCK_K)
    in_slab = groups < SLAB // PER_GROUP
    mask = (runs < num_runs)[:, None] & in_slab[None, :]
    offsets = (sample * num_runs + runs)[:, None] * (2 * (C // PER_GROUP)) + (
        slab * (SLAB // PER_GROUP) + groups
    )[None, :]
    means = tl.load(partial + offsets, mask=mask, other=0.0)
    m2 = tl.load(partial + offsets + C // PER_GROUP, mask=mask, other=0.0)
    pixels = tl.maximum(tl.minimum(num_pixels - runs * run, run), 0)
    counts = (pixels * PER_GROUP).to(tl.float32)[:, None]
    mean = tl.sum(counts * means, 0) / (num_pixels * PER_GROUP)
    apart = means - mean[None, :]
    var = tl.sum(m2 + counts * apart * apart, 0) / (num_pixels * PER_GROUP)
    rstd = 1.0 / tl.sqrt(var + eps)
    out = sample * (C // PER_GROUP) + slab * (SLAB // PER_GROUP) + groups
    num_written = tl.where(tl.program_id(1) == 0, SLAB // PER_GROUP, 0)
    tl.store(mean_out + out, mean, mask=groups < num_written)
    tl.store(rstd_out + out, rstd, mask=groups < num_written)
    gamma, beta = _affine(weight, bias, slab, SLAB, BLOCK_C)
    scale, shift = _line(
        _by_channel(mean, PER_GROUP, BLOCK_C, BLOCK_G),
        _by_channel(rstd, PER_GROUP, BLOCK_C, BLOCK_G),
        gamma,
        beta,
    )
    first = tl.program_id(1) * run
    base = sample * num_pixels * C
    _write_normalised(
        x + base, residual + base, y + base, first, tl.minimum(first + run, num_pixels), slab,
        scale, shift, C, SLAB, BLOCK_P, BLOCK_C, RESIDUAL, RELU,
    )  # fmt: skip


@triton.jit
def _through_relu(
    dy,
    more,
    y,
    offsets,
    mask,
    value,
    scale,
    shift,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Return the gradient before the ReLU; that after it is dy or, if ADDED, dy + ``more``.

    With a residual the mask is y > 0: the next layer saves y anyway, whereas the residual would be
    saved for this alone. Without one the ReLU's input is recomputed from x, bit for bit.
    """
    gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        gradient += tl.load(more + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU and RESIDUAL:
        gradient = tl.where(
            tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) > 0, gradient, 0.0
        )
    elif RELU:
        gradient = tl.where(value * scale[None, :] + shift[None, :] > 0, gradient, 0.0)
    return gradient


@triton.jit
def _gradient_sums(
    dy, more, x, y, first, stop, slab, mean, rstd, gamma, beta,
    C: tl.constexpr, SLAB: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """Return the sums of the gradient g and of g * x_hat per channel over pixels [first, stop)."""
    scale, shift = _line(mean, rstd, gamma, beta)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    weighted = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(first, stop, BLOCK_P):
        offsets, mask = _tile(start, stop, slab, C, SLAB, BLOCK_P, BLOCK_C)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient = _through_relu(
            dy, more, y, offsets, mask, value, scale, shift, RESIDUAL, RELU, ADDED
        )
        total += gradient
        weighted += gradient * (value - mean[None, :])
    return tl.sum(total, 0), tl.sum(weighted, 0) * rstd


@triton.jit
def _write_gradient(
    dy, more, x, y, dx, dresidual, first, stop, slab, mean, rstd, gamma, beta, total, weighted,
    count, C: tl.constexpr, SLAB: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Write dx = rstd * (gamma g - mean(gamma g) - x_hat * mean(gamma g x_hat)), last pixels first.

    The means are taken over groups.
    """
    scale, shift = _line(mean, rstd, gamma, beta)
    of_total = _by_group(gamma * total, PER_GROUP, BLOCK_C, BLOCK_G)
    of_weighted = _by_group(gamma * weighted, PER_GROUP, BLOCK_C, BLOCK_G)
    slope = _by_channel(of_weighted, PER_GROUP, BLOCK_C, BLOCK_G) * rstd * rstd / count
    level = _by_channel(of_total, PER_GROUP, BLOCK_C, BLOCK_G) * rstd / count - mean * slope
    blocks = tl.cdiv(stop - first, BLOCK_P)
    for step in range(blocks):
        offsets, mask = _tile(
            first + (blocks - 1 - step) * BLOCK_P, stop, slab, C, SLAB, BLOCK_P, BLOCK_C
        )
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient = _through_relu(
            dy, more, y, offsets, mask, value, scale, shift, RESIDUAL, RELU, ADDED
        )
        value = scale[None, :] * gradient - (value * slope[None, :] + level[None, :])
        tl.store(dx + offsets, value.to(dx.dtype.element_ty), mask=mask)
        if RELU and RESIDUAL:
            tl.store(dresidual + offsets, gradient.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _statistics(
    mean,
    rstd,
    sample,
    slab,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Load mean and rstd of each channel of a slab."""
    channels = tl.arange(0, BLOCK_C)
    groups = sample * (C // PER_GROUP) + slab * (SLAB // PER_GROUP) + channels // PER_GROUP
    mask = channels < SLAB
    return tl.load(mean + groups, mask=mask, other=0.0), tl.load(
        rstd + groups, mask=mask, other=0.0
    )


@triton.jit
def _store_sums(
    sums, row, total, weighted, slab, C: tl.constexpr, SLAB: tl.constexpr, BLOCK_C: tl.constexpr
):
    channels = tl.arange(0, BLOCK_C)
    offsets = row * (2 * C) + slab * SLAB + channels
    tl.store(sums + offsets, weighted, mask=channels < SLAB)
    tl.store(sums + offsets + C, total, mask=channels < SLAB)


@triton.jit
def _backward_kernel(
    dy, more, x, y, weight, bias, mean, rstd, dx, dresidual, sums, num_pixels,
    C: tl.constexpr, SLAB: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Write dx of one sample's slab per program, and its share of the affine gradients.

    ``sums`` (N, 2, C) holds the sums of g * x_hat and g, which add up over samples to the gradients
    of weight and bias.
    """
    slab, sample = _slab(C, SLAB)
    base = sample * num_pixels * C
    mu, r = _statistics(mean, rstd, sample, slab, C, SLAB, PER_GROUP, BLOCK_C)
    gamma, beta = _affine(weight, bias, slab, SLAB, BLOCK_C)
    total, weighted = _gradient_sums(
        dy + base,
        more + base,
        x + base,
        y + base,
        0,
        num_pixels,
        slab,
        mu,
        r,
        gamma,
        beta,
        C,
        SLAB,
        BLOCK_P,
        BLOCK_C,
        RESIDUAL,
        RELU,
        ADDED,
    )
    _store_sums(sums, sample, total, weighted, slab, C, SLAB, BLOCK_C)
    # Loaded again after the stores: kept in registers, these values would cost an SM half its
    # threads.
    mu, r = _statistics(mean, rstd, sample, slab, C, SLAB, PER_GROUP, BLOCK_C)
    gamma, beta = _affine(weight, bias, slab, SLAB, BLOCK_C)
    _write_gradient(
        dy + base, more + base, x + base, y + base, dx + base, dresidual + base, 0, num_pixels,
        slab, mu, r, gamma, beta, total, weighted,
        num_pixels * PER_GROUP, C, SLAB, PER_GROUP, BLOCK_P, BLOCK_C, BLOCK_G, RESIDUAL, RELU,
        ADDED,
    )  # fmt: skip


@triton.jit
def _gradient_sums_kernel(
    dy, more, x, y, weight, bias, mean, rstd, sums, num_pixels, run,
    C: tl.constexpr, SLAB: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Write the sums of one slab's run of pixels per program to ``sums`` (N * K, 2, C)."""
    slab, sample = _slab(C, SLAB)
    first = tl.program_id(1) * run
    base = sample * num_pixels * C
    mu, r = _statistics(mean, rstd, sample, slab, C, SLAB, PER_GROUP, BLOCK_C)
    gamma, beta = _affine(weight, bias, slab, SLAB, BLOCK_C)
    total, weighted = _gradient_sums(
        dy + base, more + base, x + base, y + base, first, tl.minimum(first + run, num_pixels),
        slab, mu, r, gamma, beta,
        C, SLAB, BLOCK_P, BLOCK_C, RESIDUAL, RELU, ADDED,
    )  # fmt: skip
    _store_sums(
        sums,
        sample * tl.num_programs(1) + tl.program_id(1),
        total,
        weighted,
        slab,
        C,
        SLAB,
        BLOCK_C,
    )


@triton.jit
def _gradient_kernel(
    dy, more, x, y, weight, bias, mean, rstd, sums, dx, dresidual, whole, num_pixels, run,
    C: tl.constexpr, SLAB: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """Write dx of one slab's run of pixels per program, which adds up the sums of all runs.

    The first one writes them to ``whole`` (N, 2, C).
    """
    slab, sample = _slab(C, SLAB)
    num_runs = tl.num_programs(1)
    channels = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    weighted = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, num_runs, BLOCK_K):
        runs = start + tl.arange(0, BLOCK_K)
        mask = (runs < num_runs)[:, None] & (channels < SLAB)[None, :]
        offsets = (sample * num_runs + runs)[:, None] * (2 * C) + (slab * SLAB + channels)[None, :]
        weighted += tl.sum(tl.load(sums + offsets, mask=mask, other=0.0), 0)
        total += tl.sum(tl.load(sums + offsets + C, mask=mask, other=0.0), 0)
    if tl.program_id(1) == 0:
        _store_sums(whole, sample, total, weighted, slab, C, SLAB, BLOCK_C)
    mu, r = _statistics(mean, rstd, sample, slab, C, SLAB, PER_GROUP, BLOCK_C)
    gamma, beta = _affine(weight, bias, slab, SLAB, BLOCK_C)
    first = tl.program_id(1) * run
    base = sample * num_pixels * C
    _write_gradient(
        dy + base, more + base, x + base, y + base, dx + base, dresidual + base, first,
        tl.minimum(first + run, num_pixels), slab, mu, r,
        gamma, beta, total, weighted, num_pixels * PER_GROUP, C, SLAB, PER_GROUP, BLOCK_P, BLOCK_C,
        BLOCK_G, RESIDUAL, RELU, ADDED,
    )  # fmt: skip


@triton.jit
def _sum_samples_kernel(
    parts,
    strides,
    out,
    table,
    num_samples,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Sum BLOCK_C columns of one of the ``parts`` per program, in a fixed order.

    ``table`` (programs, 4) has its number, the first column, the columns, a multiple of ALIGN, and
    their place in ``out``. ``strides`` are those of the parts' rows, one per sample.
    """
    row = table + tl.program_id(0) * 4
    number = tl.load(row)
    part, stride = parts[0], strides[0]
    for other in tl.static_range(1, len(parts)):
        part = tl.where(number == other, parts[other], part)
        stride = tl.where(number == other, strides[other], stride)
    columns = tl.multiple_of(tl.load(row + 1), BLOCK_C) + tl.arange(0, BLOCK_C)
    inside = columns < tl.multiple_of(tl.load(row + 2), ALIGN)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, num_samples, BLOCK_R):
        samples = start + tl.arange(0, BLOCK_R)
        mask = (samples < num_samples)[:, None] & inside[None, :]
        total += tl.load(part + samples[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    tl.store(out + tl.load(row + 3) + columns, tl.sum(total, 0), mask=inside)


# The reasons of kernels that move narrow words, which ``fastbyol_bench.launches`` demands.
_FEW = "writes sums, a few per run"
NARROW = {"_moments_kernel": _FEW, "_gradient_sums_kernel": _FEW, "_sum_samples_kernel": _FEW}
# Two 32-byte sectors, the unit of device memory. A narrower slab, such as one of 32 groups of 64
# channels (4 bytes), would fetch its neighbours' bytes.
MIN_SLAB_BYTES = 64
# Enough work to be worth starting a program: about 3 us for first bytes, reductions and last bytes.
ENOUGH_BYTES = 1 << 14
# The most bytes that a program finds in cache when it reads them again; a larger sample is cut into
# runs of pixels, and a first launch writes the statistics of each run. An H100 has 256 KB of L1 per
# SM and 50 MB of L2, which is 380 KB per SM. Above that the samples in flight evict each other and
# a third (fourth) pass over device memory is certain, so cutting the sample costs no more. 48x48x64
# in two slabs is 147 KB forward and 295 KB backward in bf16.
MAX_BYTES_FORWARD = 224 << 10
MAX_BYTES_BACKWARD = 320 << 10
# Elements per thread and tensor: two 16-byte loads of bf16 in flight, from one tensor forward and
# two backward. With two fp32 accumulators of as many elements a thread stays within 64 registers,
# and an SM holds 1,024 threads.
PER_THREAD_FORWARD, PER_THREAD_BACKWARD = 16, 8
# Bytes of a program -> its warps. With these 1,024 threads an SM works on at most 320 KB at any
# time.
WARPS = ((80 << 10, 8), (120 << 10, 16), (MAX_BYTES_BACKWARD, 32))
# The cap that keeps 1,024 threads per SM: by itself ptxas gives the backward pass with a recomputed
# ReLU 99 registers, which halves the bytes in flight. With the cap that kernel spills 16 to 56
# bytes outside its loops, once per program.
MAX_REGISTERS = 64
SPILLS = {"_backward_kernel": f"maxnreg={MAX_REGISTERS}: 16 to 56 bytes, outside the loops"}
# The size of a run, and few enough runs that combining them (K rows of G values) costs nothing.
RUN_BYTES = 64 << 10
MAX_RUNS = 64
# Sums of samples: a program's rows per step and its columns, 4,096 elements in 8 warps. Rows of 64
# bytes give many programs.
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 256, 16, 8


@dataclass(frozen=True)
class Launch:
    """The launch of a pass: channels of a slab, runs of a sample, pixels of a run, tile, warps."""

    slab: int
    num_runs: int
    run: int
    block_p: int
    block_c: int
    block_g: int
    num_warps: int


def launch(
    num_pixels: int,
    channels: int,
    num_groups: int,
    element_bytes: int,
    num_read: int,
    max_bytes: int,
) -> Launch:
    """Plan a launch on samples of ``num_pixels`` x ``channels`` with ``num_read`` inputs."""
    per_group = channels // num_groups
    powers = [1 << e for e in range(channels.bit_length())]
    slabs = [
        s
        for s in powers
        if s % per_group == 0 and channels % s == 0 and s * element_bytes >= MIN_SLAB_BYTES
    ]
    slab = next((s for s in slabs if s * element_bytes * num_pixels >= ENOUGH_BYTES), channels)
    row_bytes = slab * element_bytes * num_read
    run = num_pixels
    if num_pixels * row_bytes > max_bytes:
        run = max(RUN_BYTES // row_bytes, -(-num_pixels // MAX_RUNS), 1)
    block_c = triton.next_power_of_2(slab)
    num_warps = next((warps for limit, warps in WARPS if run * row_bytes <= limit), WARPS[-1][1])
    per_warp = 32 * (PER_THREAD_FORWARD if num_read == 1 else PER_THREAD_BACKWARD)
    block_p = max(1, min(triton.next_power_of_2(run), num_warps * per_warp // block_c))
    num_warps = min(num_warps, max(1, block_p * block_c // per_warp))
    return Launch(
        slab,
        -(-num_pixels // run),
        run,
        block_p,
        block_c,
        triton.next_power_of_2(slab // per_group),
        num_warps,
    )


@torch.library.custom_op("fastbyol::group_norm", mutates_args=())
def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and mean and rstd (N, G), of arguments that ``group_norm`` has checked."""
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    mean, rstd = (
        torch.empty((n, num_groups), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    plan = launch(h * w, c, num_groups, x.element_size(), 1, MAX_BYTES_FORWARD)
    grid = (n * (c // plan.slab), plan.num_runs)
    tile, options = _tile_of(plan, c, num_groups), _options(plan)
    flags = {"RESIDUAL": residual is not None, "RELU": relu}
    read = (x, x if residual is None else residual, weight, bias)
    if plan.num_runs == 1:
        _forward_kernel[grid](*read, y, mean, rstd, h * w, eps, **tile, **flags, **options)
        return y, mean, rstd
    partial = torch.empty((n, plan.num_runs, 2, num_groups), dtype=torch.float32, device=x.device)
    _moments_kernel[grid](x, partial, h * w, plan.run, **tile, **options)
    flags["BLOCK_K"] = triton.next_power_of_2(plan.num_runs)
    _normalise_kernel[grid](
        *read, partial, y, mean, rstd, h * w, plan.run, eps, **tile, **flags, **options
    )
    return y, mean, rstd


@group_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, num_groups: int, *_: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *(
        x.new_empty((len(x), num_groups), dtype=torch.float32) for _ in range(2)
    )


@torch.library.custom_op("fastbyol::group_norm_backward", mutates_args=())
def _group_norm_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor,
    rstd: Tensor,
    num_groups: int, relu: bool, more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, the residual's gradient (empty without ``y``), and the affine ones, (N, 2, C).

    ``y`` is passed if a residual was added before the ReLU. The gradient of y is ``dy`` or
    ``dy + more``.
    """
    n, c, h, w = x.shape
    dx = torch.empty_like(x)
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    num_read = 2 + (y is not None) + (more is not None)
    plan = launch(h * w, c, num_groups, x.element_size(), num_read, MAX_BYTES_BACKWARD)
    grid = (n * (c // plan.slab), plan.num_runs)
    tile, options = _tile_of(plan, c, num_groups), _options(plan)
    flags = {"RESIDUAL": y is not None, "RELU": relu, "ADDED": more is not None}
    affine, sums = (
        torch.empty((n * runs, 2, c), dtype=torch.float32, device=x.device)
        for runs in (1, plan.num_runs)
    )
    read = (dy, dy if more is None else more, x, x if y is None else y, weight, bias, mean, rstd)
    written = (dx, dx if y is None else dresidual)
    if plan.num_runs == 1:
        _backward_kernel[grid](*read, *written, affine, h * w, **tile, **flags, **options)
    else:
        block_g = tile.pop("BLOCK_G")
        _gradient_sums_kernel[grid](*read, sums, h * w, plan.run, **tile, **flags, **options)
        # The number of runs whose sums a program adds at once, for a tile like its others.
        block_k = max(
            1,
            min(
                triton.next_power_of_2(plan.num_runs),
                plan.num_warps * 32 * PER_THREAD_BACKWARD // plan.block_c,
            ),
        )
        tile |= {"BLOCK_G": block_g, "BLOCK_K": block_k}
        _gradient_kernel[grid](
            *read, sums, *written, affine, h * w, plan.run, **tile, **flags, **options
        )
    return dx, dresidual, affine


@_group_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, y: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    affine = x.new_empty((len(x), 2, x.shape[1]), dtype=torch.float32)
    return torch.empty_like(x), dresidual, affine


def _tile_of(plan: Launch, channels: int, num_groups: int) -> dict[str, int]:
    blocks = {"BLOCK_P": plan.block_p, "BLOCK_C": plan.block_c, "BLOCK_G": plan.block_g}
    return {"C": channels, "SLAB": plan.slab, "PER_GROUP": channels // num_groups, **blocks}


def _options(plan: Launch) -> dict[str, int]:
    return {"num_warps": plan.num_warps, "maxnreg": MAX_REGISTERS, "enable_fp_fusion": True}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, ctx.num_groups, _, ctx.relu = inputs
    y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.residual, ctx.by_sample = residual is not None, weight.ndim == 2
    ctx.save_for_backward(x, y if ctx.residual and ctx.relu else None, weight, bias, mean, rstd)


def _backward(ctx: Any, dy: Tensor, _mean: Tensor, _rstd: Tensor) -> tuple[Tensor | None, ...]:
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, dresidual, affine = _group_norm_backward(dy, *ctx.saved_tensors, ctx.num_groups, ctx.relu)
    if ctx.residual and not ctx.relu:
        dresidual = dy
    of_weight, of_bias = (affine if ctx.by_sample else affine.sum(0)).unbind(-2)
    return dx, of_weight, of_bias, dresidual if ctx.residual else None, None, None, None


group_norm.register_autograd(_backward, setup_context=_save)


def sum_samples(parts: Sequence[Tensor], out: Tensor, table: Tensor) -> None:
    """Launch the kernel on ``parts`` (N, C), with a row of ``table`` for each program."""
    align = math.gcd(SUM_COLUMNS, *(part.shape[1] for part in parts))
    _sum_samples_kernel[(len(table),)](
        tuple(parts), tuple(part.stride(0) for part in parts), out, table, len(parts[0]),
        BLOCK_R=SUM_ROWS, BLOCK_C=SUM_COLUMNS, ALIGN=align, num_warps=SUM_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip
