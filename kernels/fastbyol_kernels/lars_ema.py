"""SGD or LARS, with momentum, over flat buffers, and the target network's moving average: the step after the backward pass.

For each segment (one parameter) with weights w, gradient g, momentum m, weight decay d, factor k of the learning rate:

    u  = g + d w
    m <- mu m + a u            m is kept from step to step
    w <- w - b m               rate = lr k trust is what the telemetry calls the rate

    rule      a      b      trust, where the segment adapts (1 elsewhere)
    sgd       1      lr k   1                                              torch.optim.SGD
    blog      rate   1      eta |w| / (|g| + d |w|), 0 if the sum is 0     the post's code, lars.py
    deepmind  trust  lr k   eta |w| / |u|, 1 where |w| or |u| is 0         deepmind-research, byol/utils/optimizers.py
    bolts     trust  lr k   eta |w| / (|g| + d |w| + 1e-8), and            Lightning Bolts, whence solo-learn and lightly
                            1 without decay where |w| or |g| is 0

All are readings of You et al., "Large Batch Training of Convolutional Networks", arXiv:1708.03888. With ``blog`` a tensor that
starts at zero (a norm layer's bias) never moves while it adapts. In the originals of ``bolts`` what does not adapt does not
decay either; here that is the table's choice.

    target <- tau target + (1 - tau) online      over the target's segments, before or after the step on w

Where the norm of any segment's gradient is not finite nothing moves, and trust, rate and update norm of all segments are 0. The
kernels hold a norm for infinite where its square, or that times the number of chunks, overflows fp32.

Kernels. Segments are cut into chunks that never straddle two. Three launches: the sums of squares of each chunk; the sweep over
chunks, in which every program adds up the sums of its segment in the same fixed order and then reads each buffer once; the
numbers for the telemetry. The sweep goes from the last chunk to the first, so that it begins with what the L2 still holds of
the weights and gradients that were read for the norms.

Letters: L elements of a buffer, T of the target, S segments, K chunks, R slots of telemetry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch

Rule = Literal["sgd", "blog", "deepmind", "bolts"]
RULES: tuple[Rule, ...] = ("sgd", "blog", "deepmind", "bolts")
LAYER_METRICS = ("weight_norm", "grad_norm", "trust_ratio", "rate", "update_norm")
BOLTS_EPS = 1e-8

# Elements of a chunk. ResNet-18's convolutions behind the stem are whole multiples of 4096. Half as many would double the share
# of sums (576 in the largest segment) and flags in what the sweep reads, now 5 %; twice as many take 192 registers or more,
# which leaves one program to an SM.
CHUNK = 4096
# Elements of fp32 in a 16-byte access: the kernels want segments to start at a multiple of this. With 8, a 16-byte access in
# bf16, the compiler would give each thread 8 neighbours and shuffle them through shared memory for every store in fp32.
ALIGN = 4


@dataclass(frozen=True)
class SegmentTable:
    """Where S segments lie in a flat buffer and how each is treated. The tensors (S,) are on the buffers' device.

    ``offsets`` ascend without overlap. ``chunk``, a power of two, is how many elements a program of the kernels takes; from it
    ``chunks`` (K, 3) holds segment, start and stop of each chunk and ``spans`` (S, 2) each segment's first and end chunk.
    Raises ValueError, naming the field, for what does not fit.
    """

    offsets: tuple[int, ...]
    numels: tuple[int, ...]
    adapt: Tensor  # bool: takes a trust ratio
    decay: Tensor  # weight decay, 0 where there is none; the buffers' dtype
    lr_mult: Tensor  # factor of the learning rate; the buffers' dtype
    chunk: int = CHUNK
    chunks: Tensor = field(init=False, repr=False)
    spans: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        rows: list[tuple[int, int, int]] = []
        spans: list[tuple[int, int]] = []
        for segment, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            end = offset + numel
            first = len(rows)
            rows += [(segment, start, min(start + self.chunk, end)) for start in range(offset, end, self.chunk)]
            spans.append((first, len(rows)))
        # Made once, here: a step that is being captured in a graph cannot copy from the host.
        for name, table in (("chunks", rows), ("spans", spans)):
            object.__setattr__(self, name, torch.tensor(table, dtype=torch.int32, device=self.adapt.device))

    @property
    def longest(self) -> int:
        """The most chunks a segment has."""
        return -(-max(self.numels) // self.chunk)

    @property
    def end(self) -> int:
        """Where the last segment ends: the least length of a buffer."""
        return self.offsets[-1] + self.numels[-1]

    def split(self, buffer: Tensor) -> list[Tensor]:
        """The segments of ``buffer`` as one-dimensional views."""
        return [buffer.narrow(0, offset, numel) for offset, numel in zip(self.offsets, self.numels, strict=True)]

    def _check(self) -> None:
        if not self.offsets or len(self.offsets) != len(self.numels):
            raise ValueError(f"numels must be as many as offsets, at least 1: {len(self.numels)} and {len(self.offsets)}")
        if min(self.numels) < 1:
            raise ValueError(f"numels must be positive, not {min(self.numels)}")
        ends = (0, *(offset + numel for offset, numel in zip(self.offsets, self.numels, strict=True)))
        for segment, (offset, free) in enumerate(zip(self.offsets, ends, strict=False)):
            if offset < free:
                raise ValueError(f"offsets: segment {segment} starts at {offset}, before {free}")
        if ends[-1] >= 2**31:
            raise ValueError(f"offsets: the last segment ends at {ends[-1]}, beyond 2**31 - 1")
        if self.chunk < ALIGN or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk must be a power of two, at least {ALIGN}, not {self.chunk}")
        for name, tensor in (("adapt", self.adapt), ("decay", self.decay), ("lr_mult", self.lr_mult)):
            shape, device = (len(self.offsets),), self.adapt.device
            if tensor.shape != shape or tensor.device != device:
                raise ValueError(f"{name} must be {shape} on {device}, not {tuple(tensor.shape)} on {tensor.device}")
        if self.adapt.dtype != torch.bool:
            raise ValueError(f"adapt must be bool, not {self.adapt.dtype}")


def trust_ratio(rule: Rule, weight_norm: Tensor, grad_norm: Tensor, decayed_norm: Tensor, decay: Tensor, eta: float) -> Tensor:
    """Trust ratios (S,) by ``rule`` for segments that adapt, from the norms of w, g and u = g + d w."""
    _check_rule(rule)
    one = torch.ones_like(weight_norm)
    if rule == "sgd":
        return one
    scaled = eta * weight_norm
    if rule == "blog":
        below = grad_norm + decay * weight_norm
        return torch.where(below > 0, scaled / below, 0.0)
    if rule == "deepmind":
        return torch.where((weight_norm > 0) & (decayed_norm > 0), scaled / decayed_norm, one)
    below = grad_norm + decay * weight_norm + BOLTS_EPS
    return torch.where((weight_norm > 0) & (grad_norm > 0), scaled / below, one)


def reference(
    online: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    target: Tensor,
    table: SegmentTable,
    lr: Tensor,
    tau: Tensor,
    *,
    rule: Rule,
    eta: float,
    mu: float,
    ema_first: bool,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """The formulas above in plain torch: ``foreach`` operations over views of the segments, scalars left on the device."""
    if loss_scale is not None:
        gradient = gradient / loss_scale
    grad_norm = _norms(table.split(gradient))
    # Of a gradient that is not finite nothing may enter, not even times zero.
    fine = grad_norm.isfinite().all()
    gradient, tau = torch.where(fine, gradient, 0.0), torch.where(fine, tau, 1.0)
    w, g, m = (table.split(buffer) for buffer in (online, gradient, momentum))
    weight_norm, decay = _norms(w), table.decay
    decayed_norm = _norms(torch._foreach_addcmul(g, w, list(decay))) if rule == "deepmind" else grad_norm
    if ema_first:
        _follow(target, online, tau)
    trust = trust_ratio(rule, weight_norm, grad_norm, decayed_norm, decay, eta)
    trust = torch.where(table.adapt, trust, 1.0).where(fine, 0.0)
    if rule == "bolts":
        decay = torch.where(table.adapt & (grad_norm == 0), 0.0, decay)
    rate = lr * table.lr_mult * trust
    before, after = (rate, torch.ones_like(rate)) if rule == "blog" else (trust, lr * table.lr_mult)
    after = torch.where(fine, after, 0.0)
    momentum.mul_(torch.where(fine, momentum.new_full((), mu), 1.0))
    torch._foreach_addcmul_(m, g, list(before))
    torch._foreach_addcmul_(m, w, list(before * decay))
    torch._foreach_addcmul_(w, m, list(-after))
    if not ema_first:
        _follow(target, online, tau)
    return torch.stack((weight_norm, grad_norm, trust, rate, after * _norms(m)), dim=1)


def on_processor(
    online: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    target: Tensor,
    table: SegmentTable,
    lr: Tensor,
    tau: Tensor,
    *,
    rule: Rule,
    eta: float,
    mu: float,
    ema_first: bool,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """``reference`` for fp32 on a CPU, where numbers are read without waiting, in two passes of machine code."""
    from fastbyol_kernels import lars_ema_processor  # numba: who has a GPU need not wait for it

    scale = torch.ones_like(lr) if loss_scale is None else loss_scale
    measured = online, gradient, table.decay, scale, table.chunks, table.spans
    weight_norm, grad_norm, decayed_norm = lars_ema_processor.norms(*measured, all_three=rule != "sgd")
    if not grad_norm.isfinite().all():
        weight_norm, still = lars_ema_processor.norms(*measured)[0], torch.zeros_like(grad_norm)
        return torch.stack((weight_norm, grad_norm, still, still, still), dim=1)
    trust = torch.where(table.adapt, trust_ratio(rule, weight_norm, grad_norm, decayed_norm, table.decay, eta), 1.0)
    decay = table.decay
    if rule == "bolts":
        decay = torch.where(table.adapt & (grad_norm == 0), 0.0, decay)
    rate = lr * table.lr_mult * trust
    before, after = (rate, torch.ones_like(rate)) if rule == "blog" else (trust, lr * table.lr_mult)
    momentum_norm, weight_norm = lars_ema_processor.sweep(
        online, gradient, momentum, target, torch.stack((before, after, decay), dim=1),
        torch.stack((torch.full_like(lr, mu), tau, 1 - tau, scale)), table.chunks, table.spans, ema_first=ema_first,
    )  # fmt: skip
    return torch.stack((weight_norm, grad_norm, trust, rate, after * momentum_norm), dim=1)


def _norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))


def _follow(target: Tensor, online: Tensor, tau: Tensor) -> None:
    target.lerp_(online[: len(target)], 1 - tau)


def _publish(
    layers: Tensor,
    online: Tensor,
    target: Tensor,
    online_copy: Tensor | None,
    target_copy: Tensor | None,
    slots: Tensor | None,
    step: Tensor | None,
    skipped: Tensor | None,
) -> None:
    """What the kernels write on the side, for the reference."""
    for copy, source in ((online_copy, online), (target_copy, target)):
        if copy is not None:
            copy.copy_(source)
    if slots is not None and step is not None:
        slots.index_copy_(0, (step % len(slots)).view(1), layers.to(slots.dtype)[None])
    if skipped is not None:
        skipped.copy_(~layers[:, 1].isfinite().all())


@triton.jit
def _chunk(chunks, index, ALIGN: tl.constexpr):
    """Segment, start, number of elements, and how many may be touched: up to a multiple of ALIGN, into the padding, so that
    accesses stay 16 bytes wide.

    The start is 64 bits wide so that one address serves all of a thread's accesses to a buffer, each at a constant distance.
    """
    segment = tl.load(chunks + index * 3)
    start = tl.multiple_of(tl.load(chunks + index * 3 + 1), ALIGN)
    count = tl.load(chunks + index * 3 + 2) - start
    return segment, start.to(tl.int64), count, tl.cdiv(count, ALIGN) * ALIGN


@triton.jit
def _norms_kernel(
    online,
    gradient,
    chunks,
    decay,
    loss_scale,
    sums,
    fine,
    num_chunks,
    DECAYED: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One chunk per program: ``sums`` (4, K) takes the squares of w, g and, where DECAYED, u; ``fine`` (K,) is 1 or 0."""
    index = tl.program_id(0)
    segment, start, count, touched = _chunk(chunks, index, ALIGN)
    elements = tl.arange(0, CHUNK)
    near = elements < touched
    w = tl.where(elements < count, tl.load(online + start + elements, mask=near, other=0.0), 0.0)
    g = tl.where(elements < count, tl.load(gradient + start + elements, mask=near, other=0.0), 0.0)
    if loss_scale is not None:
        g *= tl.div_rn(1.0, tl.load(loss_scale))
    squares = tl.sum(g * g, 0)
    tl.store(sums + index, tl.sum(w * w, 0))
    tl.store(sums + num_chunks + index, squares)
    # False for NaN, too, and for what might overflow when all chunks are added.
    tl.store(fine + index, (squares * num_chunks < float("inf")).to(tl.int8))
    if DECAYED:
        u = g + tl.load(decay + segment) * w
        tl.store(sums + 2 * num_chunks + index, tl.sum(u * u, 0))


@triton.jit
def _norm(sums, first, end, LANES: tl.constexpr, PASSES: tl.constexpr):
    """The norm of a segment from its chunks' sums, always added in the same order."""
    total = tl.zeros((LANES,), tl.float32)
    for turn in tl.static_range(PASSES):
        lanes = first + turn * LANES + tl.arange(0, LANES)
        total += tl.load(sums + lanes, mask=lanes < end, other=0.0)
    return tl.sqrt_rn(tl.sum(total, 0))


@triton.jit
def _all_fine(fine, num_chunks, FLAGS: tl.constexpr, FLAG_PASSES: tl.constexpr):
    """``fine`` is as long as a multiple of 16, so that accesses are 16 bytes wide; what is beyond K may be anything."""
    least = tl.full((FLAGS // 16, 16), 1, tl.int32)
    for turn in tl.static_range(FLAG_PASSES):
        # In two dimensions, lest the tiles of the sweep, when as long, be laid out like this one, 16 neighbours per thread.
        lanes = turn * FLAGS + 16 * tl.arange(0, FLAGS // 16)[:, None] + tl.arange(0, 16)[None, :]
        flags = tl.load(fine + lanes, mask=lanes < tl.cdiv(num_chunks, 16) * 16, other=1).to(tl.int32)
        least = tl.minimum(least, tl.where(lanes < num_chunks, flags, 1))
    return tl.min(tl.min(least, 1), 0) > 0


@triton.jit
def _treatment(
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
    RULE: tl.constexpr,
    BOLTS_EPS: tl.constexpr,
    LANES: tl.constexpr,
    PASSES: tl.constexpr,
    FLAGS: tl.constexpr,
    FLAG_PASSES: tl.constexpr,
):
    """A segment's first and end chunk, |w|, |g|, trust, rate, a, b, d of the module's table, and whether to step at all."""
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
            below += BOLTS_EPS
            moves = (weight_norm > 0) & (g > 0)
            otherwise = 1.0
            d = tl.where(adapts & (g == 0), 0.0, d)
        trust = tl.where(moves, tl.div_rn(eta * weight_norm, tl.where(moves, below, 1.0)), otherwise)
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
    online,
    gradient,
    momentum,
    target,
    online_copy,
    target_copy,
    chunks,
    spans,
    adapt,
    decay,
    lr_mult,
    lr,
    tau,
    loss_scale,
    sums,
    fine,
    num_chunks,
    num_target,
    eta,
    mu,
    RULE: tl.constexpr,
    EMA_FIRST: tl.constexpr,
    BOLTS_EPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    PASSES: tl.constexpr,
    FLAGS: tl.constexpr,
    FLAG_PASSES: tl.constexpr,
):
    """One chunk per program, the last first; row 3 of ``sums`` takes the squares of the new momentum.

    The four streams are asked for before the sums are added up, which hides the one behind the other, and are marked as not
    worth keeping: the L2 has the weights and gradients of the chunks to come.
    """
    index = num_chunks - 1 - tl.program_id(0)
    segment, start, count, touched = _chunk(chunks, index, ALIGN)
    elements = tl.arange(0, CHUNK)
    near = elements < touched
    followed = elements < tl.where(start < num_target, touched, 0)
    w = tl.load(online + start + elements, mask=near, other=0.0, eviction_policy="evict_first")
    g = tl.load(gradient + start + elements, mask=near, other=0.0, eviction_policy="evict_first")
    m = tl.load(momentum + start + elements, mask=near, other=0.0, eviction_policy="evict_first")
    t = tl.load(target + start + elements, mask=followed, other=0.0, eviction_policy="evict_first")
    _, _, _, _, _, _, a, b, d, go = _treatment(
        segment, spans, adapt, decay, lr_mult, lr, sums, fine, num_chunks, eta, RULE, BOLTS_EPS,
        LANES, PASSES, FLAGS, FLAG_PASSES,
    )  # fmt: skip
    moves = elements < tl.where(go, count, 0)
    g = tl.where(moves, g, 0.0)
    if loss_scale is not None:
        g *= tl.div_rn(1.0, tl.load(loss_scale))
    m_new = tl.where(moves, mu * m + a * (g + d * w), m)
    w_new = tl.where(moves, w - b * m_new, w)
    tl.store(sums + 3 * num_chunks + index, tl.sum(tl.where(moves, m_new * m_new, 0.0), 0))
    # As torch.lerp: exact at either end.
    weight = 1.0 - tl.load(tau)
    leader = w_new
    if EMA_FIRST:
        leader = w
    t_new = tl.where(weight < 0.5, t + weight * (leader - t), leader - (leader - t) * (1.0 - weight))
    t_new = tl.where(moves, t_new, t)
    tl.store(momentum + start + elements, m_new, mask=near, eviction_policy="evict_first")
    tl.store(online + start + elements, w_new, mask=near, eviction_policy="evict_first")
    tl.store(target + start + elements, t_new, mask=followed, eviction_policy="evict_first")
    if online_copy is not None:
        tl.store(online_copy + start + elements, w_new.to(online_copy.dtype.element_ty), mask=near)
    if target_copy is not None:
        tl.store(target_copy + start + elements, t_new.to(target_copy.dtype.element_ty), mask=followed)


@triton.jit
def _telemetry_kernel(
    spans,
    adapt,
    decay,
    lr_mult,
    lr,
    sums,
    fine,
    layers,
    slots,
    step,
    skipped,
    num_chunks,
    num_slots,
    eta,
    RULE: tl.constexpr,
    BOLTS_EPS: tl.constexpr,
    LANES: tl.constexpr,
    PASSES: tl.constexpr,
    FLAGS: tl.constexpr,
    FLAG_PASSES: tl.constexpr,
):
    """One segment per program: its five numbers into ``layers`` (S, 5) and into slot step % R of ``slots`` (R, S, 5)."""
    segment = tl.program_id(0)
    first, end, weight_norm, grad_norm, trust, rate, _, b, _, go = _treatment(
        segment, spans, adapt, decay, lr_mult, lr, sums, fine, num_chunks, eta, RULE, BOLTS_EPS,
        LANES, PASSES, FLAGS, FLAG_PASSES,
    )  # fmt: skip
    update_norm = tl.where(go, b * _norm(sums + 3 * num_chunks, first, end, LANES, PASSES), 0.0)
    _row(layers + segment * 5, weight_norm, grad_norm, trust, rate, update_norm)
    if slots is not None:
        slot = tl.load(step) % num_slots
        _row(slots + (slot * tl.num_programs(0) + segment) * 5, weight_norm, grad_norm, trust, rate, update_norm)
    if skipped is not None:
        tl.store(skipped, (go == 0).to(tl.int8), mask=segment == 0)


@triton.jit
def _row(out, weight_norm, grad_norm, trust, rate, update_norm):
    tl.store(out, weight_norm)
    tl.store(out + 1, grad_norm)
    tl.store(out + 2, trust)
    tl.store(out + 3, rate)
    tl.store(out + 4, update_norm)


# Why a kernel may move narrow words; ``fastbyol_bench.launches`` asks where one does.
NARROW = {
    "_norms_kernel": "stores three numbers per 4096 elements",
    "_telemetry_kernel": "five numbers per segment",
}


@dataclass(frozen=True)
class Launch:
    """How many sums and flags a program adds up at once, and in how many passes."""

    lanes: int
    passes: int
    flags: int
    flag_passes: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels take it."""
        return {"LANES": self.lanes, "PASSES": self.passes, "FLAGS": self.flags, "FLAG_PASSES": self.flag_passes}


# 16 elements per thread and stream, four 16-byte loads each. The sweep takes at most 128 registers: two programs to an SM, with
# 128 KB in flight between them. 4 warps take up to 241 registers, for as many bytes and fewer warps to hide the sums behind.
NUM_WARPS = 8
# 16 sums or flags per thread. Known when compiled, so that all loads go out before the first addition.
MAX_LANES = 4096


def launch(num_chunks: int, longest: int) -> Launch:
    """For a table of ``num_chunks`` with ``longest`` in one segment. ResNet-18 (2,887 and 576) takes one pass of each."""
    lanes, flags = (min(triton.next_power_of_2(max(count, 16)), MAX_LANES) for count in (longest, num_chunks))
    return Launch(lanes, triton.cdiv(longest, lanes), flags, triton.cdiv(num_chunks, flags))


@torch.library.custom_op(
    "fastbyol::lars_ema",
    mutates_args=("online", "momentum", "target", "online_copy", "target_copy", "slots", "skipped"),
)
def _lars_ema(
    online: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    target: Tensor,
    online_copy: Tensor | None,
    target_copy: Tensor | None,
    slots: Tensor | None,
    skipped: Tensor | None,
    chunks: Tensor,
    spans: Tensor,
    adapt: Tensor,
    decay: Tensor,
    lr_mult: Tensor,
    lr: Tensor,
    tau: Tensor,
    loss_scale: Tensor | None,
    step: Tensor | None,
    chunk: int,
    longest: int,
    rule: str,
    eta: float,
    mu: float,
    ema_first: bool,
) -> Tensor:
    num_chunks, num_segments = len(chunks), len(spans)
    sums = torch.empty((4, num_chunks), dtype=torch.float32, device=online.device)
    fine = torch.empty(triton.cdiv(num_chunks, 16) * 16, dtype=torch.int8, device=online.device)
    layers = torch.empty((num_segments, len(LAYER_METRICS)), dtype=torch.float32, device=online.device)
    cut = {"CHUNK": chunk, "ALIGN": ALIGN}
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    treat = {"RULE": rule, "BOLTS_EPS": BOLTS_EPS, **launch(num_chunks, longest).constants}
    with torch.cuda.device_of(online):
        _norms_kernel[(num_chunks,)](
            online, gradient, chunks, decay, loss_scale, sums, fine, num_chunks,
            DECAYED=rule == "deepmind", **cut, **options,
        )  # fmt: skip
        _sweep_kernel[(num_chunks,)](
            online, gradient, momentum, target, online_copy, target_copy, chunks, spans, adapt, decay, lr_mult,
            lr, tau, loss_scale, sums, fine, num_chunks, len(target), eta, mu,
            EMA_FIRST=ema_first, **treat, **cut, **options,
        )  # fmt: skip
        _telemetry_kernel[(num_segments,)](
            spans, adapt, decay, lr_mult, lr, sums, fine, layers, slots, step, skipped,
            num_chunks, 1 if slots is None else len(slots), eta, **treat, **options,
        )  # fmt: skip
    return layers


@_lars_ema.register_fake
def _(
    online: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    target: Tensor,
    online_copy: Tensor | None,
    target_copy: Tensor | None,
    slots: Tensor | None,
    skipped: Tensor | None,
    chunks: Tensor,
    spans: Tensor,
    adapt: Tensor,
    decay: Tensor,
    lr_mult: Tensor,
    lr: Tensor,
    tau: Tensor,
    loss_scale: Tensor | None,
    step: Tensor | None,
    chunk: int,
    longest: int,
    rule: str,
    eta: float,
    mu: float,
    ema_first: bool,
) -> Tensor:
    return online.new_empty((len(spans), len(LAYER_METRICS)), dtype=torch.float32)


def lars_ema(
    online: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    target: Tensor,
    table: SegmentTable,
    lr: Tensor,
    tau: Tensor,
    *,
    rule: Rule,
    eta: float,
    mu: float,
    ema_first: bool,
    loss_scale: Tensor | None = None,
    online_copy: Tensor | None = None,
    target_copy: Tensor | None = None,
    slots: Tensor | None = None,
    step: Tensor | None = None,
    skipped: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """One step of ``rule`` on ``online`` and ``momentum``, and of the moving average on ``target``, all in place.

    Buffers (L,) are flat, fp32 or fp64, with zeros between segments; ``target`` (T,), T <= L, holds the first segments at the
    same offsets. ``lr`` and ``tau`` are 0-d tensors on the device in the buffers' dtype; ``eta`` is the trust coefficient,
    ``mu`` the momentum's. ``gradient`` is divided by ``loss_scale`` (0-d, as lr) first. Returns (S, 5): ``LAYER_METRICS`` of
    each segment, the norms of w and g from before the step and the norm of the change in w. Never waits for the device.

    A gradient whose norm is not finite in some segment changes no weight, momentum or target; then |g| is as measured there
    and trust ratio, rate and update norm are 0 in all rows.

    Written besides, where given: ``online_copy`` (L,) and ``target_copy`` (T,), the new weights in bf16, whose padding may
    stay as it is; slot ``step`` % R of ``slots`` (R, S, 5), fp32, with what is returned (``step`` is 0-d int64); ``skipped``,
    0-d bool, with whether the gradient was not finite.

    ``kernels``: "reference" (plain torch), "triton" (fp32, three launches; on a CPU only in Triton's interpreter), "cpu"
    (fp32 on a CPU, two passes), or "auto", which is "triton" for CUDA tensors and "cpu" for others. fp64 never takes the
    kernels, nor does what does not run at once on a CPU (``dispatch.at_once``). Triton's want segments that start and buffers
    that end at multiples of 4 elements. Raises ValueError, naming the argument, for what does not fit.
    """
    _check(online, gradient, momentum, target, table, lr, tau, rule, loss_scale)
    _check_outputs(online, target, table, online_copy, target_copy, slots, step, skipped)
    chosen = dispatch(kernels, "online", online, gradient, momentum, target, lr, tau, loss_scale)
    if chosen != "triton":
        layers: Tensor = (on_processor if chosen == "cpu" else reference)(
            online, gradient, momentum, target, table, lr, tau,
            rule=rule, eta=eta, mu=mu, ema_first=ema_first, loss_scale=loss_scale,
        )  # fmt: skip
        _publish(layers, online, target, online_copy, target_copy, slots, step, skipped)
        return layers
    _check_kernel(online, target, table)
    layers = _lars_ema(
        online, gradient, momentum, target, online_copy, target_copy, slots, skipped, table.chunks, table.spans,
        table.adapt, table.decay, table.lr_mult, lr, tau, loss_scale, step, table.chunk, table.longest,
        rule, eta, mu, ema_first,
    )  # fmt: skip
    return layers  # noqa: RET504


def _check(
    online: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    target: Tensor,
    table: SegmentTable,
    lr: Tensor,
    tau: Tensor,
    rule: str,
    loss_scale: Tensor | None,
) -> None:
    _check_rule(rule)
    if online.ndim != 1 or online.dtype not in (torch.float32, torch.float64) or not online.is_contiguous():
        raise ValueError(f"online must be flat, contiguous, float32 or float64, not {_kind(online)}")
    if len(online) < table.end:
        raise ValueError(f"online has {len(online)} elements, table ends at {table.end}")
    like = (online.dtype, online.device)
    _expect("gradient", gradient, online.shape, *like)
    _expect("momentum", momentum, online.shape, *like)
    _expect("target", target, (min(target.numel(), len(online)),), *like)
    for offset, numel in zip(table.offsets, table.numels, strict=True):
        if offset < len(target) < offset + numel:
            raise ValueError(f"target's {len(target)} elements end inside the segment at {offset}")
    for name, tensor in (("table.decay", table.decay), ("table.lr_mult", table.lr_mult)):
        _expect(name, tensor, (len(table.offsets),), *like)
    for name, scalar in (("lr", lr), ("tau", tau), ("loss_scale", loss_scale)):
        if scalar is not None:
            _expect(name, scalar, (), *like)


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")


def _check_outputs(
    online: Tensor,
    target: Tensor,
    table: SegmentTable,
    online_copy: Tensor | None,
    target_copy: Tensor | None,
    slots: Tensor | None,
    step: Tensor | None,
    skipped: Tensor | None,
) -> None:
    if online_copy is not None:
        _expect("online_copy", online_copy, online.shape, torch.bfloat16, online.device)
    if target_copy is not None:
        _expect("target_copy", target_copy, target.shape, torch.bfloat16, online.device)
    if (slots is None) != (step is None):
        raise ValueError("slots and step go together: one of them is missing")
    if slots is not None and step is not None:
        shape = (max(slots.shape[0] if slots.ndim else 1, 1), len(table.offsets), len(LAYER_METRICS))
        _expect("slots", slots, shape, torch.float32, online.device)
        _expect("step", step, (), torch.int64, online.device)
    if skipped is not None:
        _expect("skipped", skipped, (), torch.bool, online.device)


def _check_kernel(online: Tensor, target: Tensor, table: SegmentTable) -> None:
    for name, buffer in (("online", online), ("target", target)):
        if len(buffer) % ALIGN:
            raise ValueError(f"{name} must have a multiple of {ALIGN} elements for the kernels, not {len(buffer)}")
    for segment, offset in enumerate(table.offsets):
        if offset % ALIGN:
            raise ValueError(f"table: segment {segment} starts at {offset}, no multiple of {ALIGN}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} {tuple(shape)} on {device}, not {_kind(tensor)}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"


def bytes_moved(num_online: int, num_target: int, *, copies: bool = True) -> int:
    """Bytes that a step on fp32 buffers must read and write; tables and sums are left out.

    Weights, gradient, momentum and target in, all but the gradient out, bf16 copies of both networks out, and the gradient once
    more: no weight can move before all of it was seen. |w| needs no second reading in principle, since the step before could
    have kept it. These kernels do read w twice, which costs up to 4 bytes per element where the L2 has not kept it.
    """
    online = 3 * 4 + 2 * 4 + 4
    target = 2 * 4
    return num_online * (online + 2 * copies) + num_target * (target + 2 * copies)
