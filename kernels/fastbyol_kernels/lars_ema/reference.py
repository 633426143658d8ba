"""The formulas of ``lars_ema`` in plain torch: trust ratio, LARS rate, momentum, moving average.

Letters: L elements of a buffer, T of the target, S segments (parameters), K chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["sgd", "blog", "deepmind", "bolts"]
RULES: tuple[Rule, ...] = ("sgd", "blog", "deepmind", "bolts")
LAYER_METRIC_MEANINGS = {
    "weight_norm": "Euclidean norm of the parameter before the step",
    "grad_norm": "Euclidean norm of its gradient, without weight decay",
    "trust_ratio": "LARS's factor on the learning rate; 1 where the parameter does not adapt",
    "rate": "learning rate x factor of the parameter (lr_mult) x trust ratio",
    "update_norm": "Euclidean norm of what the step subtracted from the parameter",
}
LAYER_METRICS = tuple(LAYER_METRIC_MEANINGS)
BOLTS_EPS = 1e-8

# Elements of a chunk. All of ResNet-18's convolutions but the stem are whole multiples of 4096.
# Chunks of 2048 would double the share of sums (576 in the largest segment) and flags in the
# sweep's reads, which is 5 %. Chunks of 8192 need 192 registers or more, which leaves one program
# per SM.
CHUNK = 4096
# Elements of ``Reversible`` per program of a launch.
REVERSIBLE_BLOCK = 1024
# Elements of fp32 in a 16-byte access: in Triton's kernels segments start at a multiple of this.
# With 8, a 16-byte access in bf16, the compiler would give each thread 8 neighbours and shuffle
# them through shared memory for every fp32 store.
ALIGN = 4


@dataclass(frozen=True)
class SegmentTable:
    """The positions of S segments in a flat buffer and their settings.

    The tensors (S,) are on the buffers' device. ``offsets`` ascend without overlap. ``chunk``, a
    power of two, is the number of elements per chunk, the kernels' unit of work. ``chunks`` (K, 3)
    holds segment, start and stop of each chunk, ``spans`` (S, 2) the first and end chunk of each
    segment. Raises ValueError, naming the field, for a value that does not fit.
    """

    offsets: tuple[int, ...]
    numels: tuple[int, ...]
    adapt: Tensor  # bool: the segment uses the trust ratio
    decay: Tensor  # weight decay, 0 for none; the buffers' dtype
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
            rows += [
                (segment, start, min(start + self.chunk, end))
                for start in range(offset, end, self.chunk)
            ]
            spans.append((first, len(rows)))
        # Built here, once: a step that is being captured in a CUDA graph cannot copy from the host.
        for name, table in (("chunks", rows), ("spans", spans)):
            object.__setattr__(
                self, name, torch.tensor(table, dtype=torch.int32, device=self.adapt.device)
            )

    @property
    def longest(self) -> int:
        """The number of chunks of the longest segment."""
        return -(-max(self.numels) // self.chunk)

    @property
    def end(self) -> int:
        """The end of the last segment, which is the least length of a buffer."""
        return self.offsets[-1] + self.numels[-1]

    def split(self, buffer: Tensor) -> list[Tensor]:
        """Return the segments of ``buffer`` as one-dimensional views."""
        return [
            buffer.narrow(0, offset, numel)
            for offset, numel in zip(self.offsets, self.numels, strict=True)
        ]

    def _check(self) -> None:
        if not self.offsets or len(self.offsets) != len(self.numels):
            raise ValueError(
                f"numels must be as many as offsets, at least 1: {len(self.numels)} and "
                f"{len(self.offsets)}"
            )
        if min(self.numels) < 1:
            raise ValueError(f"numels must be positive, not {min(self.numels)}")
        free = 0
        for segment, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            if offset < free:
                raise ValueError(f"offsets: segment {segment} starts at {offset}, before {free}")
            free = offset + numel
        if self.end >= 2**31:
            raise ValueError(f"offsets: the last segment ends at {self.end}, beyond 2**31 - 1")
        if self.chunk < ALIGN or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk must be a power of two, at least {ALIGN}, not {self.chunk}")
        shape, device = (len(self.offsets),), self.adapt.device
        for name, tensor in (
            ("adapt", self.adapt),
            ("decay", self.decay),
            ("lr_mult", self.lr_mult),
        ):
            if tensor.shape != shape or tensor.device != device:
                raise ValueError(
                    f"{name} must be {shape} on {device}, not {tuple(tensor.shape)} on "
                    f"{tensor.device}"
                )
        if self.adapt.dtype != torch.bool:
            raise ValueError(f"adapt must be bool, not {self.adapt.dtype}")


@dataclass(frozen=True)
class Reversible:
    """Tensors that a step changes before its gradient is known, and what they were after the last.

    ``saved`` (K,) is theirs, flat, one after the other; ``blocks`` (B, 4) int32 holds the number of
    a tensor, first element there and in ``saved``, and the elements, of each block.
    """

    tensors: tuple[Tensor, ...]
    saved: Tensor
    blocks: Tensor

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Reversible | None:
        """Make one of contiguous ``tensors`` of one dtype and device, saved; None without any."""
        if not tensors:
            return None
        rows: list[tuple[int, int, int, int]] = []
        end = 0
        for number, tensor in enumerate(tensors):
            rows += [
                (number, first, end + first, min(REVERSIBLE_BLOCK, tensor.numel() - first))
                for first in range(0, tensor.numel(), REVERSIBLE_BLOCK)
            ]
            end += tensor.numel()
        blocks = torch.tensor(rows, dtype=torch.int32, device=tensors[0].device)
        reversible = Reversible(tuple(tensors), tensors[0].new_empty(end), blocks)
        reversible.save()
        return reversible

    def flat(self) -> Tensor:
        """Return a copy of the tensors, flat."""
        return torch.cat([tensor.flatten() for tensor in self.tensors])

    def write(self, flat: Tensor) -> None:
        """Write ``flat`` to the tensors."""
        parts = torch.split(flat, [tensor.numel() for tensor in self.tensors])
        torch._foreach_copy_(
            self.tensors, [p.view_as(t) for p, t in zip(parts, self.tensors, strict=True)]
        )

    def save(self) -> None:
        """Copy the tensors to ``saved``."""
        self.saved.copy_(self.flat())

    def save_or_restore(self, taken: Tensor) -> None:
        """Copy the tensors to ``saved`` if the step is ``taken``, 0-d; write them back if not."""
        self.saved.copy_(torch.where(taken, self.flat(), self.saved))
        self.write(self.saved)


def trust_ratio(
    rule: Rule,
    weight_norm: Tensor,
    grad_norm: Tensor,
    decayed_norm: Tensor,
    decay: Tensor,
    eta: float,
) -> Tensor:
    """Return the trust ratios (S,) of segments that adapt, from the norms of w, g and u = g + d w.

        sgd       1                                    torch.optim.SGD
        blog      eta |w| / (|g| + d |w|),             the post's code, lars.py
                  0 if the sum is 0
        deepmind  eta |w| / |u|,                       deepmind-research, byol/utils/optimizers.py
                  1 if |w| or |u| is 0
        bolts     eta |w| / (|g| + d |w| + 1e-8),      Lightning Bolts; also solo-learn and lightly
                  1 if |w| or |g| is 0

    All are readings of You et al., "Large Batch Training of Convolutional Networks",
    arXiv:1708.03888. With ``blog`` a tensor that starts at zero (a norm layer's bias) never moves
    while it adapts.
    """
    check_rule(rule)
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


def check_rule(rule: str) -> None:
    """Raise ValueError unless ``rule`` is one of ``RULES``."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")


def reference(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor, table: SegmentTable,
    lr: Tensor, tau: Tensor,
    *, rule: Rule, eta: float, mu: float, ema_first: bool,
) -> Tensor:  # fmt: skip
    """Compute ``lars_ema`` by ``foreach`` operations over views of the segments.

    For a segment with weights w, gradient g, momentum m, weight decay d and the factors a and b:

        m <- mu m + a (g + d w)
        w <- w - b m
        target <- tau target + (1 - tau) online    before or after the update of w
    """
    grad_norm = _norms(table.split(gradient))
    # A gradient that is not finite must not enter any sum, not even multiplied by zero.
    fine = grad_norm.isfinite().all()
    gradient, tau = torch.where(fine, gradient, 0.0), torch.where(fine, tau, 1.0)
    w, g, m = (table.split(buffer) for buffer in (online, gradient, momentum))
    weight_norm, decay = _norms(w), table.decay
    decayed_norm = (
        _norms(torch._foreach_addcmul(g, w, list(decay))) if rule == "deepmind" else grad_norm
    )
    if ema_first:
        _follow(target, online, tau)
    trust = trust_ratio(rule, weight_norm, grad_norm, decayed_norm, decay, eta)
    trust = torch.where(table.adapt, trust, 1.0).where(fine, 0.0)
    rate, before, after, decay = factors(rule, table, trust, grad_norm, lr)
    after = torch.where(fine, after, 0.0)
    momentum.mul_(torch.where(fine, momentum.new_full((), mu), 1.0))
    torch._foreach_addcmul_(m, g, list(before))
    torch._foreach_addcmul_(m, w, list(before * decay))
    torch._foreach_addcmul_(w, m, list(-after))
    if not ema_first:
        _follow(target, online, tau)
    return torch.stack((weight_norm, grad_norm, trust, rate, after * _norms(m)), dim=1)


def factors(
    rule: Rule, table: SegmentTable, trust: Tensor, grad_norm: Tensor, lr: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rate, a, b and d of each segment, (S,) each, from its trust ratio.

    The LARS rate is lr * lr_mult * trust. ``blog`` applies it to the gradient before the momentum:
    a is the rate, b is 1. The other rules use a = trust, b = lr * lr_mult.
    """
    # ``bolts`` does not decay a segment without a gradient. In its originals a segment that does
    # not adapt does not decay either; here the table decides that.
    base, decay = lr * table.lr_mult, table.decay
    rate = base * trust
    if rule == "bolts":
        decay = torch.where(table.adapt & (grad_norm == 0), 0.0, decay)
    return (
        (rate, rate, torch.ones_like(rate), decay) if rule == "blog" else (rate, trust, base, decay)
    )


def _norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))


def _follow(target: Tensor, online: Tensor, tau: Tensor) -> None:
    target.lerp_(online[: len(target)], 1 - tau)
