"""The step of SGD or LARS over flat buffers, with the target network's moving average.

``reference.trust_ratio`` computes the trust ratio and ``reference.factors`` the LARS rate.
``fastbyol.optim`` holds the buffers (arena), dialects (lars) and schedules of lr and tau
(schedule).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch
from fastbyol_kernels.lars_ema import triton
from fastbyol_kernels.lars_ema.reference import (
    BOLTS_EPS,
    LAYER_METRIC_MEANINGS,
    LAYER_METRICS,
    RULES,
    Reversible,
    Rule,
    SegmentTable,
    check_rule,
    reference,
    trust_ratio,
)

__all__ = [
    "BOLTS_EPS",
    "LAYER_METRICS",
    "LAYER_METRIC_MEANINGS",
    "RULES",
    "Reversible",
    "Rule",
    "SegmentTable",
    "bytes_moved",
    "lars_ema",
    "reference",
    "scheduled_step",
    "trust_ratio",
]


def lars_ema(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor, table: SegmentTable,
    lr: Tensor, tau: Tensor,
    *, rule: Rule, eta: float, mu: float, ema_first: bool, kernels: str = "auto",
) -> Tensor:  # fmt: skip
    """Update ``online`` and ``momentum`` by ``rule``, ``target`` by the moving average, in place.

    Buffers (L,) are flat, fp32 or fp64, with zeros between segments. ``target`` (T,), T <= L, holds
    the first segments at the same offsets. ``lr`` and ``tau`` are 0-d tensors on the buffers'
    device in their dtype, ``eta`` is the trust coefficient, ``mu`` the momentum coefficient.
    Returns (S, 5), the ``LAYER_METRICS`` of each segment: the norms of w and g before the step,
    trust ratio, rate, and the norm of the change in w. Does not synchronise with a GPU.

    If any segment's gradient norm is not finite, no weight, momentum or target changes. The norms
    of w and g are returned as measured; trust ratio, rate and update norm are 0 in all rows.

    ``kernels``: "reference" (plain torch), "triton" (fp32, three launches; on a CPU only in
    Triton's interpreter), "cpu" (fp32 on a CPU, two passes), or "auto": "triton" for CUDA tensors,
    else "cpu". The reference runs fp64, and CPU steps that do not run eagerly
    (``dispatch.at_once``). The Triton kernels need segments that start, and buffers that end, at
    multiples of 4 elements. Raises ValueError, naming the argument, for a tensor that does not fit.
    """
    check_rule(rule)
    _check(online, gradient, momentum, target, table, lr, tau)
    backend = dispatch(kernels, "online", online, gradient, momentum, target, lr, tau)
    buffers = (online, gradient, momentum, target)
    settings: dict[str, Any] = {"rule": rule, "eta": eta, "mu": mu, "ema_first": ema_first}
    if backend == "triton":
        return triton.step(*buffers, table, lr, tau, **settings)
    step = reference
    if backend == "cpu":
        # Imported here because it loads numba, which a GPU run does not need.
        from fastbyol_kernels.lars_ema import cpu

        step = cpu.step
    return step(*buffers, table, lr, tau, **settings)


def scheduled_step(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor, table: SegmentTable,
    rates: Tensor, step: Tensor, loss: Tensor, observed: Tensor, reversible: Reversible | None,
    *, rule: Rule, eta: float, mu: float, ema_first: bool, kernels: str = "auto",
    online_copy: Tensor | None = None, target_copy: Tensor | None = None, lr: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Take ``lars_ema`` at lr and tau of row ``step`` of ``rates``, and return the step's measures.

    ``rates`` (T, 2) goes on with its last row, ``step`` is 0-d int64 and is counted up. ``lr``, if
    it is not None, takes the place of the table's in the update. ``reversible`` is saved, or gets
    back what was saved if the step is left out. ``online_copy`` (L,) and ``target_copy`` (T,),
    bf16, become the rounded segments of ``online`` and ``target``, also where nothing changes.

    Returns (5 + M + 5 S,) fp32: ``loss``, 0-d; the M numbers ``observed``; the whole gradient's
    norm, lr, tau, 1 if the step was left out, else 0; and the rows of ``lars_ema``, whose other
    arguments and errors these are.

    On Triton all of it is in the three launches of ``lars_ema``.
    """
    copies = (("online_copy", online_copy, online), ("target_copy", target_copy, target))
    for name, copy, like in copies:
        if copy is not None:
            _check_like(name, copy, like.shape, torch.bfloat16, online.device)
    backend = dispatch(kernels, "online", online, gradient, momentum, target)
    settings: dict[str, Any] = {"rule": rule, "eta": eta, "mu": mu, "ema_first": ema_first}
    if backend == "triton":
        check_rule(rule)
        _check_like("rates", rates, (len(rates), 2), online.dtype, online.device)
        _check(online, gradient, momentum, target, table, rates[0, 0], rates[0, 1])
        _check_like("step", step, (), torch.int64, online.device)
        _check_like("loss", loss, (), torch.float32, online.device)
        _check_like("observed", observed, (observed.numel(),), torch.float32, online.device)
        buffers = (online, gradient, momentum, target, online_copy, target_copy)
        return triton.scheduled_step(
            *buffers, table, rates, step, lr, loss, observed, reversible, **settings
        )
    now = rates.index_select(0, step.clamp(max=len(rates) - 1).view(1)).view(2)
    layers = lars_ema(
        online, gradient, momentum, target, table, now[0] if lr is None else lr, now[1],
        kernels=backend, **settings,
    )  # fmt: skip
    for _, copy, like in copies:
        if copy is not None:
            copy.copy_(like)
    taken = (layers[:, 1] < torch.inf).all()
    if reversible is not None:
        reversible.save_or_restore(taken)
    step.add_(1)
    norm = torch.linalg.vector_norm(gradient)
    skipped = torch.logical_not(taken, out=torch.empty_like(norm))
    values = (loss.view(1), observed, norm.view(1), now, skipped.view(1), layers.flatten())
    return torch.cat(values).float()


def _check(
    online: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    target: Tensor,
    table: SegmentTable,
    lr: Tensor,
    tau: Tensor,
) -> None:
    if (
        online.ndim != 1
        or online.dtype not in (torch.float32, torch.float64)
        or not online.is_contiguous()
    ):
        raise ValueError(
            f"online must be flat, contiguous, float32 or float64, not {_kind(online)}"
        )
    if len(online) < table.end:
        raise ValueError(f"online has {len(online)} elements, table ends at {table.end}")
    for name, tensor, shape in (
        ("gradient", gradient, online.shape),
        ("momentum", momentum, online.shape),
        ("target", target, (min(target.numel(), len(online)),)),
        ("table.decay", table.decay, (len(table.offsets),)),
        ("table.lr_mult", table.lr_mult, (len(table.offsets),)),
        ("lr", lr, ()),
        ("tau", tau, ()),
    ):
        _check_like(name, tensor, shape, online.dtype, online.device)
    for offset, numel in zip(table.offsets, table.numels, strict=True):
        if offset < len(target) < offset + numel:
            raise ValueError(f"target's {len(target)} elements end inside the segment at {offset}")


def _check_like(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    like = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
    if not like or not tensor.is_contiguous():
        what = f"contiguous {dtype} {tuple(shape)} on {device}"
        raise ValueError(f"{name} must be {what}, not {_kind(tensor)}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"


def bytes_moved(num_online: int, num_target: int) -> int:
    """Return the bytes that a step on fp32 buffers has to move, without tables, sums and copies.

    It reads weights, gradient, momentum and target and writes all but the gradient. It reads the
    gradient twice, since no weight can change before all of its norms are known. A second read of w
    is not counted: the step before could have kept |w|. The kernels do read w twice, which costs up
    to 4 bytes per element that the L2 has not kept.
    """
    return num_online * (3 * 4 + 2 * 4 + 4) + num_target * 2 * 4
