"""``lars_ema`` on a GPU in three launches: sums of squares per chunk, the update, the telemetry.

``scheduled_step`` hides its other work in them: the first reads the schedule, the last writes the
step's row and undoes what a step that is left out must not have changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol_kernels.lars_ema.reference import (
    ALIGN,
    BOLTS_EPS,
    LAYER_METRICS,
    REVERSIBLE_BLOCK,
    Reversible,
    Rule,
    SegmentTable,
)

# A kernel reads module constants only as constexpr.
_ALIGN, _BOLTS_EPS, _REVERSIBLE_BLOCK = map(tl.constexpr, (ALIGN, BOLTS_EPS, REVERSIBLE_BLOCK))
# The reasons of kernels that move narrow words, which ``fastbyol_bench.launches`` demands.
NARROW = {
    "_norms_kernel": "stores three numbers per 4096 elements",
    "_telemetry_kernel": "five numbers per segment",
}
# 16 elements per thread and stream, four 16-byte loads each. The sweep needs at most 128 registers:
# two programs per SM, with 128 KB in flight together. 4 warps need up to 241 registers, for as many
# bytes and fewer warps to hide the sums behind.
NUM_WARPS = 8
# 16 sums or flags per thread. A compile-time constant, so that all loads start before the first
# addition.
MAX_LANES = 4096


@triton.jit
def _chunk(chunks, index):
    """Return segment, start, number of elements, and that number rounded up to a multiple of 4.

    Accesses extend into the padding up to the rounded number, so that they stay 16 bytes wide.
    """
    segment = tl.load(chunks + index * 3)
    start = tl.multiple_of(tl.load(chunks + index * 3 + 1), _ALIGN)
    count = tl.load(chunks + index * 3 + 2) - start
    # A 64-bit start: all accesses of a thread to a buffer then have one address and constant
    # distances.
    return segment, start.to(tl.int64), count, tl.cdiv(count, _ALIGN) * _ALIGN


@triton.jit
def _norms_kernel(
    online,
    gradient,
    chunks,
    decay,
    sums,
    fine,
    num_chunks,
    rates,
    step,
    num_rates,
    now,
    DECAYED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write a chunk's sums of squares of w, g and, if DECAYED, u to ``sums`` (4, K).

    Write 1 to ``fine`` (K,) if the gradient's sum is finite, else 0. Unless ``now`` is None, write
    to it row ``step`` of ``rates`` (T, 2), past the end the last one: the last launch of a step
    adds to ``step``, so that its programs cannot read it.
    """
    index = tl.program_id(0)
    if now is not None:  # noqa: SIM102 - Triton does not compile what None rules out
        if index == 0:
            pair = tl.arange(0, 2)
            row = tl.minimum(tl.load(step), num_rates - 1)
            tl.store(now + pair, tl.load(rates + row * 2 + pair))
    segment, start, count, touched = _chunk(chunks, index)
    elements = tl.arange(0, CHUNK)
    near = elements < touched
    w = tl.where(elements < count, tl.load(online + start + elements, mask=near, other=0.0), 0.0)
    g = tl.where(elements < count, tl.load(gradient + start + elements, mask=near, other=0.0), 0.0)
    squares = tl.sum(g * g, 0)
    tl.store(sums + index, tl.sum(w * w, 0))
    tl.store(sums + num_chunks + index, squares)
    # Also false for NaN, and for a sum that might overflow when all chunks are added: a norm counts
    # as infinite if its square, or that times the number of chunks, overflows fp32.
    tl.store(fine + index, (squares * num_chunks < float("inf")).to(tl.int8))
    if DECAYED:
        u = g + tl.load(decay + segment) * w
        tl.store(sums + 2 * num_chunks + index, tl.sum(u * u, 0))


@triton.jit
def _norm(sums, first, end, LANES: tl.constexpr, PASSES: tl.constexpr):
    """Return the norm of a segment from its chunks' sums, which are added in a fixed order."""
    total = tl.zeros((LANES,), tl.float32)
    for turn in tl.static_range(PASSES):
        lanes = first + turn * LANES + tl.arange(0, LANES)
        total += tl.load(sums + lanes, mask=lanes < end, other=0.0)
    return tl.sqrt_rn(tl.sum(total, 0))


@triton.jit
def _all_fine(fine, num_chunks, FLAGS: tl.constexpr, FLAG_PASSES: tl.constexpr):
    """Return True if the first K flags of ``fine`` are 1.

    ``fine`` is padded, with any values, to a multiple of 16 elements for 16-byte accesses.
    """
    least = tl.full((FLAGS // 16, 16), 1, tl.int32)
    for turn in tl.static_range(FLAG_PASSES):
        # In two dimensions: otherwise the sweep's tiles, if as long, would get this one's layout of
        # 16 neighbours per thread.
        lanes = turn * FLAGS + 16 * tl.arange(0, FLAGS // 16)[:, None] + tl.arange(0, 16)[None, :]
        flags = tl.load(fine + lanes, mask=lanes < tl.cdiv(num_chunks, 16) * 16, other=1).to(
            tl.int32
        )
        least = tl.minimum(least, tl.where(lanes < num_chunks, flags, 1))
    return tl.min(tl.min(least, 1), 0) > 0


@triton.jit
def _treatment(
    segment, spans, adapt, decay, lr_mult, lr, sums, fine, num_chunks, eta, RULE: tl.constexpr,
    LANES: tl.constexpr, PASSES: tl.constexpr, FLAGS: tl.constexpr, FLAG_PASSES: tl.constexpr,
):  # fmt: skip
    """Return a segment's first and end chunk, |w|, |g|, trust, rate, a, b, d, and the go flag.

    ``reference`` has the formulas. The flag is False if a gradient is not finite: nothing may
    change.
    """
    first = tl.load(spans + segment * 2)
    end = tl.load(spans + segment * 2 + 1)
    d = tl.load(decay + segment)
    adapts = tl.load(adapt + segment) != 0
    base = tl.load(lr) * tl.load(lr_mult + segment)
    go = _all_fine(fine, num_chunks, FLAGS, FLAG_PASSES)
    weight_norm = _norm(sums, first, end, LANES, PASSES)
    grad_norm = _norm(sums + num_chunks, first, end, LANES, PASSES)
    g = tl.where(go, grad_norm, 0.0)
    trust = 1.0
    if RULE != "sgd":
        below = g + d * weight_norm
        moves = below > 0
        otherwise = 0.0
        if RULE == "deepmind":
            below = _norm(sums + 2 * num_chunks, first, end, LANES, PASSES)
            moves = go & (weight_norm > 0) & (below > 0)
            otherwise = 1.0
        if RULE == "bolts":
            below += _BOLTS_EPS
            moves = (weight_norm > 0) & (g > 0)
            otherwise = 1.0
            d = tl.where(adapts & (g == 0), 0.0, d)
        trust = tl.where(
            moves, tl.div_rn(eta * weight_norm, tl.where(moves, below, 1.0)), otherwise
        )
        trust = tl.where(adapts, trust, 1.0)
    trust = tl.where(go, trust, 0.0)
    rate = base * trust
    a = trust
    b = base
    if RULE == "blog":
        a = rate
        b = 1.0
    return first, end, weight_norm, grad_norm, trust, rate, a, b, d, go


@triton.jit
def _sweep_kernel(
    online, gradient, momentum, target, online_copy, target_copy,
    chunks, spans, adapt, decay, lr_mult, lr, tau, sums, fine,
    num_chunks, num_target, eta, mu, RULE: tl.constexpr, EMA_FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr, PASSES: tl.constexpr, FLAGS: tl.constexpr, FLAG_PASSES: tl.constexpr,
):  # fmt: skip
    """Update a chunk of each buffer. Write the sum of squares of m to row 3 of ``sums``.

    Round the new w and target to the copies that are not None.
    """
    # The last chunk first: the L2 still holds the data that the norms read last.
    index = num_chunks - 1 - tl.program_id(0)
    segment, start, count, touched = _chunk(chunks, index)
    elements = tl.arange(0, CHUNK)
    near = elements < touched
    followed = elements < tl.where(start < num_target, touched, 0)
    # The loads of the four streams start before the sums are added up, which hides their latency.
    # They are marked evict_first, so that the L2 keeps the weights and gradients of the chunks to
    # come.
    w = tl.load(online + start + elements, mask=near, other=0.0, eviction_policy="evict_first")
    g = tl.load(gradient + start + elements, mask=near, other=0.0, eviction_policy="evict_first")
    m = tl.load(momentum + start + elements, mask=near, other=0.0, eviction_policy="evict_first")
    t = tl.load(target + start + elements, mask=followed, other=0.0, eviction_policy="evict_first")
    _, _, _, _, _, _, a, b, d, go = _treatment(
        segment,
        spans,
        adapt,
        decay,
        lr_mult,
        lr,
        sums,
        fine,
        num_chunks,
        eta,
        RULE,
        LANES,
        PASSES,
        FLAGS,
        FLAG_PASSES,
    )
    moves = elements < tl.where(go, count, 0)
    g = tl.where(moves, g, 0.0)
    m_new = tl.where(moves, mu * m + a * (g + d * w), m)
    w_new = tl.where(moves, w - b * m_new, w)
    tl.store(sums + 3 * num_chunks + index, tl.sum(tl.where(moves, m_new * m_new, 0.0), 0))
    # torch.lerp's formula, exact at both ends.
    weight = 1.0 - tl.load(tau)
    leader = w_new
    if EMA_FIRST:
        leader = w
    t_new = tl.where(
        weight < 0.5, t + weight * (leader - t), leader - (leader - t) * (1.0 - weight)
    )
    t_new = tl.where(moves, t_new, t)
    tl.store(momentum + start + elements, m_new, mask=near, eviction_policy="evict_first")
    tl.store(online + start + elements, w_new, mask=near, eviction_policy="evict_first")
    tl.store(target + start + elements, t_new, mask=followed, eviction_policy="evict_first")
    if online_copy is not None:
        tl.store(online_copy + start + elements, w_new.to(tl.bfloat16), mask=near)
    if target_copy is not None:
        tl.store(target_copy + start + elements, t_new.to(tl.bfloat16), mask=followed)


@triton.jit
def _write_layer(
    spans, adapt, decay, lr_mult, lr, sums, fine, layers, num_chunks, segment, eta,
    RULE: tl.constexpr,
    LANES: tl.constexpr, PASSES: tl.constexpr, FLAGS: tl.constexpr, FLAG_PASSES: tl.constexpr,
):  # fmt: skip
    """Write a segment's ``LAYER_METRICS`` to ``layers`` (S, 5)."""
    first, end, weight_norm, grad_norm, trust, rate, _, b, _, go = _treatment(
        segment,
        spans,
        adapt,
        decay,
        lr_mult,
        lr,
        sums,
        fine,
        num_chunks,
        eta,
        RULE,
        LANES,
        PASSES,
        FLAGS,
        FLAG_PASSES,
    )
    update_norm = tl.where(go, b * _norm(sums + 3 * num_chunks, first, end, LANES, PASSES), 0.0)
    row = layers + segment * 5
    tl.store(row, weight_norm)
    tl.store(row + 1, grad_norm)
    tl.store(row + 2, trust)
    tl.store(row + 3, rate)
    tl.store(row + 4, update_norm)


@triton.jit
def _write_values(
    values, loss, observed, now, step, sums, fine, num_chunks,
    OBSERVED: tl.constexpr, LANES: tl.constexpr, FLAGS: tl.constexpr, FLAG_PASSES: tl.constexpr,
):  # fmt: skip
    """Write loss, observations, |g|, lr, tau and whether the step is left out, and count it."""
    lanes = tl.arange(0, LANES)
    tl.store(values, tl.load(loss))
    tl.store(
        values + 1 + lanes, tl.load(observed + lanes, mask=lanes < OBSERVED), mask=lanes < OBSERVED
    )
    rest = values + 1 + OBSERVED
    tl.store(rest, _norm(sums + num_chunks, 0, num_chunks, FLAGS, FLAG_PASSES))
    tl.store(rest + 1, tl.load(now))
    tl.store(rest + 2, tl.load(now + 1))
    tl.store(rest + 3, tl.where(_all_fine(fine, num_chunks, FLAGS, FLAG_PASSES), 0.0, 1.0))
    tl.store(step, tl.load(step) + 1)


@triton.jit
def _save_or_restore(reversible, saved, blocks, index, go):
    """Save a block of the tensors ``reversible``, or write back what was saved, unless ``go``."""
    row = blocks + index * 4
    number = tl.load(row)
    part = reversible[0]
    for other in tl.static_range(1, len(reversible)):
        part = tl.where(number == other, reversible[other], part)
    lanes = tl.arange(0, _REVERSIBLE_BLOCK)
    inside = lanes < tl.load(row + 3)
    part += tl.load(row + 1) + lanes
    old = saved + tl.load(row + 2) + lanes
    value = tl.where(go, tl.load(part, mask=inside), tl.load(old, mask=inside))
    tl.store(part, value, mask=inside)
    tl.store(old, value, mask=inside)


@triton.jit
def _telemetry_kernel(
    spans, adapt, decay, lr_mult, lr, sums, fine, layers, num_segments, num_chunks, eta,
    values, loss, observed, now, step, reversible, saved, blocks,
    RULE: tl.constexpr, OBSERVED: tl.constexpr, OBSERVED_LANES: tl.constexpr,
    LANES: tl.constexpr, PASSES: tl.constexpr, FLAGS: tl.constexpr, FLAG_PASSES: tl.constexpr,
):  # fmt: skip
    """Write a segment's measures per program, then the step's; others save or restore."""
    index = tl.program_id(0)
    if index < num_segments:
        _write_layer(
            spans, adapt, decay, lr_mult, lr, sums, fine, layers, num_chunks, index, eta,
            RULE, LANES, PASSES, FLAGS, FLAG_PASSES,
        )  # fmt: skip
    if values is not None:  # noqa: SIM102
        if index == num_segments:
            _write_values(
                values, loss, observed, now, step, sums, fine, num_chunks,
                OBSERVED, OBSERVED_LANES, FLAGS, FLAG_PASSES,
            )  # fmt: skip
    if reversible is not None:  # noqa: SIM102
        if index > num_segments:
            go = _all_fine(fine, num_chunks, FLAGS, FLAG_PASSES)
            _save_or_restore(reversible, saved, blocks, index - num_segments - 1, go)


def _added_at_once(num_chunks: int, longest: int) -> dict[str, int]:
    """Return the kernels' constants: sums and flags that a program loads at once, and the passes.

    ResNet-18 has 2,887 chunks, at most 576 in a segment, and needs one pass over each.
    """
    lanes, flags = (
        min(triton.next_power_of_2(max(count, 16)), MAX_LANES) for count in (longest, num_chunks)
    )
    passes, flag_passes = triton.cdiv(longest, lanes), triton.cdiv(num_chunks, flags)
    return {"LANES": lanes, "PASSES": passes, "FLAGS": flags, "FLAG_PASSES": flag_passes}


@torch.library.custom_op("fastbyol::lars_ema", mutates_args=("online", "momentum", "target"))
def _lars_ema(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor,
    chunks: Tensor, spans: Tensor, adapt: Tensor,
    decay: Tensor, lr_mult: Tensor, lr: Tensor, tau: Tensor,
    chunk: int, longest: int, rule: str, eta: float, mu: float, ema_first: bool,
) -> Tensor:  # fmt: skip
    layers = torch.empty(
        (len(spans), len(LAYER_METRICS)), dtype=torch.float32, device=online.device
    )
    _launch(
        online, gradient, momentum, target, None, None,
        chunks, spans, adapt, decay, lr_mult, lr, tau,
        chunk, longest, rule, eta, mu, ema_first, layers,
    )  # fmt: skip
    return layers


class Row(NamedTuple):
    """What a step's ``values`` are written from, besides ``now``, lr and tau as read."""

    values: Tensor
    loss: Tensor
    observed: Tensor
    now: Tensor
    step: Tensor
    rates: Tensor


def _launch(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor,
    online_copy: Tensor | None, target_copy: Tensor | None,
    chunks: Tensor, spans: Tensor, adapt: Tensor,
    decay: Tensor, lr_mult: Tensor, lr: Tensor, tau: Tensor,
    chunk: int, longest: int, rule: str, eta: float, mu: float, ema_first: bool, layers: Tensor,
    row: Row | None = None, reversible: Reversible | None = None,
) -> None:  # fmt: skip
    num_chunks, num_segments = len(chunks), len(spans)
    values, loss, observed, now, step, rates = (None,) * 6 if row is None else row
    num_observed = 0 if observed is None else len(observed)
    settled = (
        (None, None, None)
        if reversible is None
        else (reversible.tensors, reversible.saved, reversible.blocks)
    )
    num_programs = (
        num_segments + (row is not None) + (0 if reversible is None else len(reversible.blocks))
    )
    sums = torch.empty((4, num_chunks), dtype=torch.float32, device=online.device)
    fine = torch.empty(triton.cdiv(num_chunks, 16) * 16, dtype=torch.int8, device=online.device)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    treat = {"RULE": rule, **_added_at_once(num_chunks, longest), **options}
    with torch.cuda.device_of(online):
        _norms_kernel[(num_chunks,)](
            online,
            gradient,
            chunks,
            decay,
            sums,
            fine,
            num_chunks,
            rates,
            step,
            0 if rates is None else len(rates),
            now,
            DECAYED=rule == "deepmind",
            CHUNK=chunk,
            **options,
        )
        _sweep_kernel[(num_chunks,)](
            online, gradient, momentum, target, online_copy, target_copy,
            chunks, spans, adapt, decay, lr_mult, lr, tau, sums, fine,
            num_chunks, len(target), eta, mu, EMA_FIRST=ema_first, CHUNK=chunk, **treat,
        )  # fmt: skip
        _telemetry_kernel[(num_programs,)](
            spans, adapt, decay, lr_mult, lr, sums, fine, layers, num_segments, num_chunks, eta,
            values, loss, observed, now, step, *settled, OBSERVED=num_observed,
            OBSERVED_LANES=triton.next_power_of_2(max(num_observed, 1)), **treat,
        )  # fmt: skip


@_lars_ema.register_fake
def _(
    online: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    target: Tensor,
    chunks: Tensor,
    spans: Tensor,
    *_: object,
) -> Tensor:
    return online.new_empty((len(spans), len(LAYER_METRICS)), dtype=torch.float32)


def step(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor, table: SegmentTable,
    lr: Tensor, tau: Tensor,
    *, rule: Rule, eta: float, mu: float, ema_first: bool,
) -> Tensor:  # fmt: skip
    """Compute ``lars_ema`` on fp32 buffers on a GPU.

    Raises ValueError unless segments start and buffers end at multiples of ``ALIGN`` elements.
    """
    _check_layout(online, target, table)
    layers: Tensor = _lars_ema(
        online, gradient, momentum, target,
        table.chunks, table.spans, table.adapt, table.decay, table.lr_mult, lr, tau,
        table.chunk, table.longest, rule, eta, mu, ema_first,
    )  # fmt: skip
    return layers


def scheduled_step(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor,
    online_copy: Tensor | None, target_copy: Tensor | None, table: SegmentTable,
    rates: Tensor, step: Tensor, lr: Tensor | None, loss: Tensor, observed: Tensor,
    reversible: Reversible | None,
    *, rule: Rule, eta: float, mu: float, ema_first: bool,
) -> Tensor:  # fmt: skip
    """Compute ``lars_ema.scheduled_step`` on fp32 buffers on a GPU."""
    _check_layout(online, target, table)
    num_values, num_layers = 5 + len(observed), len(table.spans) * len(LAYER_METRICS)
    row = torch.empty(num_values + num_layers, dtype=torch.float32, device=online.device)
    now = torch.empty(2, dtype=torch.float32, device=online.device)
    _launch(
        online, gradient, momentum, target, online_copy, target_copy,
        table.chunks, table.spans, table.adapt, table.decay, table.lr_mult,
        now[0] if lr is None else lr, now[1],
        table.chunk, table.longest, rule, eta, mu, ema_first,
        row[num_values:], Row(row, loss, observed, now, step, rates), reversible,
    )  # fmt: skip
    return row


def _check_layout(online: Tensor, target: Tensor, table: SegmentTable) -> None:
    for name, buffer in (("online", online), ("target", target)):
        if len(buffer) % ALIGN:
            raise ValueError(
                f"{name} must have a multiple of {ALIGN} elements for the kernels, not "
                f"{len(buffer)}"
            )
    for segment, offset in enumerate(table.offsets):
        if offset % ALIGN:
            raise ValueError(f"table: segment {segment} starts at {offset}, no multiple of {ALIGN}")
