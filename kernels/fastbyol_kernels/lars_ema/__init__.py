"""SGD or LARS over flat buffers and the target's moving average: ``reference`` has the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch
from fastbyol_kernels.lars_ema import triton
from fastbyol_kernels.lars_ema.reference import (
    BOLTS_EPS,
    LAYER_METRICS,
    RULES,
    Rule,
    SegmentTable,
    check_rule,
    reference,
    trust_ratio,
)

__all__ = ["BOLTS_EPS", "LAYER_METRICS", "RULES", "Rule", "SegmentTable", "bytes_moved", "lars_ema", "reference", "trust_ratio"]


def lars_ema(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor, table: SegmentTable, lr: Tensor, tau: Tensor,
    *, rule: Rule, eta: float, mu: float, ema_first: bool, kernels: str = "auto",
) -> Tensor:  # fmt: skip
    """Take one step of ``rule`` on ``online`` and ``momentum``, and of the moving average on ``target``, all in place.

    Buffers (L,) are flat, fp32 or fp64, with zeros between segments; ``target`` (T,), T <= L, holds the first segments at the
    same offsets. ``lr`` and ``tau`` are 0-d tensors on the device in the buffers' dtype; ``eta`` is the trust coefficient,
    ``mu`` the momentum's. Returns (S, 5): ``LAYER_METRICS`` of each segment, the norms of w and g from before the step and the
    norm of the change in w. Never waits for the device.

    A gradient whose norm is not finite in some segment changes no weight, momentum or target; then |g| is as measured there
    and trust ratio, rate and update norm are 0 in all rows.

    ``kernels``: "reference" (plain torch), "triton" (fp32, three launches; on a CPU only in Triton's interpreter), "cpu"
    (fp32 on a CPU, two passes), or "auto", which is "triton" for CUDA tensors and "cpu" for others. fp64 never takes the
    kernels, nor does what does not run at once on a CPU (``dispatch.at_once``). Triton's want segments that start and buffers
    that end at multiples of 4 elements. Raises ValueError, naming the argument, for what does not fit.
    """
    check_rule(rule)
    _check(online, gradient, momentum, target, table, lr, tau)
    backend = dispatch(kernels, "online", online, gradient, momentum, target, lr, tau)
    step = triton.step if backend == "triton" else reference
    if backend == "cpu":
        from fastbyol_kernels.lars_ema import cpu  # numba: who has a GPU need not wait for it

        step = cpu.step
    return step(online, gradient, momentum, target, table, lr, tau, rule=rule, eta=eta, mu=mu, ema_first=ema_first)


def _check(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor, table: SegmentTable, lr: Tensor, tau: Tensor
) -> None:
    if online.ndim != 1 or online.dtype not in (torch.float32, torch.float64) or not online.is_contiguous():
        raise ValueError(f"online must be flat, contiguous, float32 or float64, not {_kind(online)}")
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
        like = tensor.shape == shape and tensor.dtype == online.dtype and tensor.device == online.device
        if not like or not tensor.is_contiguous():
            what = f"contiguous {online.dtype} {tuple(shape)} on {online.device}"
            raise ValueError(f"{name} must be {what}, not {_kind(tensor)}")
    for offset, numel in zip(table.offsets, table.numels, strict=True):
        if offset < len(target) < offset + numel:
            raise ValueError(f"target's {len(target)} elements end inside the segment at {offset}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"


def bytes_moved(num_online: int, num_target: int) -> int:
    """Return the bytes that a step on fp32 buffers must read and write; tables and sums are left out.

    Weights, gradient, momentum and target in, all but the gradient out, and the gradient once more: no weight can move before
    all of it was seen. |w| needs no second reading in principle, since the step before could have kept it. These kernels do
    read w twice, which costs up to 4 bytes per element where the L2 has not kept it.
    """
    return num_online * (3 * 4 + 2 * 4 + 4) + num_target * 2 * 4
