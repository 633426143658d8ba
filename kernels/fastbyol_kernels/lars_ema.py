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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["sgd", "blog", "deepmind", "bolts"]
LAYER_METRICS = ("weight_norm", "grad_norm", "trust_ratio", "rate", "update_norm")
BOLTS_EPS = 1e-8


@dataclass(frozen=True)
class SegmentTable:
    """Where S segments lie in a flat buffer and how each is treated. The tensors (S,) are on the buffers' device."""

    offsets: tuple[int, ...]
    numels: tuple[int, ...]
    adapt: Tensor  # bool: takes a trust ratio
    decay: Tensor  # weight decay, 0 where there is none; the buffers' dtype
    lr_mult: Tensor  # factor of the learning rate; the buffers' dtype

    def split(self, buffer: Tensor) -> list[Tensor]:
        """The segments of ``buffer`` as one-dimensional views."""
        return [buffer.narrow(0, offset, numel) for offset, numel in zip(self.offsets, self.numels, strict=True)]


def trust_ratio(rule: Rule, weight_norm: Tensor, grad_norm: Tensor, decayed_norm: Tensor, decay: Tensor, eta: float) -> Tensor:
    """Trust ratios (S,) by ``rule`` for segments that adapt, from the norms of w, g and u = g + d w."""
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
) -> Tensor:
    """The formulas above in plain torch: ``foreach`` operations over views of the segments, scalars left on the device."""
    w, g, m = (table.split(buffer) for buffer in (online, gradient, momentum))
    if ema_first:
        _follow(target, online, tau)
    weight_norm, grad_norm = _norms(w), _norms(g)
    decay = table.decay
    decayed_norm = _norms(torch._foreach_addcmul(g, w, list(decay))) if rule == "deepmind" else grad_norm
    trust = trust_ratio(rule, weight_norm, grad_norm, decayed_norm, decay, eta)
    trust = torch.where(table.adapt, trust, 1.0)
    if rule == "bolts":
        decay = torch.where(table.adapt & (grad_norm == 0), 0.0, decay)
    rate = lr * table.lr_mult * trust
    before, after = (rate, torch.ones_like(rate)) if rule == "blog" else (trust, lr * table.lr_mult)
    momentum.mul_(mu)
    torch._foreach_addcmul_(m, g, list(before))
    torch._foreach_addcmul_(m, w, list(before * decay))
    torch._foreach_addcmul_(w, m, list(-after))
    if not ema_first:
        _follow(target, online, tau)
    return torch.stack((weight_norm, grad_norm, trust, rate, after * _norms(m)), dim=1)


def _norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))


def _follow(target: Tensor, online: Tensor, tau: Tensor) -> None:
    target.lerp_(online[: len(target)], 1 - tau)


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
) -> Tensor:
    """One step of ``rule`` on ``online`` and ``momentum``, and of the moving average on ``target``, all in place.

    Buffers (L,) are flat, fp32 or fp64, with zeros between segments; ``target`` (T,), T <= L, holds the first segments at the
    same offsets. ``lr`` and ``tau`` are 0-d tensors on the device in the buffers' dtype; ``eta`` is the trust coefficient,
    ``mu`` the momentum's. Returns (S, 5): ``LAYER_METRICS`` of each segment, the norms of w and g from before the step and the
    norm of the change in w. Never waits for the device.
    """
    return reference(online, gradient, momentum, target, table, lr, tau, rule=rule, eta=eta, mu=mu, ema_first=ema_first)
