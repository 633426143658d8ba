"""lr and tau of every step, as tables that the step number indexes on the device.

t counts steps or whole epochs done; T is the horizon in the same unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbyol.config import ScheduleConfig
from fastbyol.errors import UsageError

# A quarter GiB of fp64; a thousand epochs of ImageNet in batches of 256 are a sixth of it.
MOST_STEPS = 2**25


def lr_table(
    config: ScheduleConfig, lr: float, *, horizon_epochs: int, steps_per_epoch: int
) -> Tensor:
    """Return lr at steps 0 .. max(T, W), float64 on the CPU.

    Cosine: lr (1 + cos(pi t / T)) / 2 (CosineAnnealingLR; byol, section 3.3). With a warm-up of W
    steps lr * step / W before step W, and then the cosine at (t - W) / (T - W), as in
    deepmind-research's byol/utils/schedules.py. Raises UsageError for over ``MOST_STEPS`` steps.
    """
    warmup = int(config.warmup_epochs * steps_per_epoch)
    total = horizon_epochs * steps_per_epoch
    step = _steps(max(total, warmup), horizon_epochs)
    if config.lr == "cosine":
        done = _done(step, config.lr_unit, steps_per_epoch)
        table = lr * _half_cosine((done - warmup) / max(total - warmup, 1))
    else:
        table = torch.full_like(step, lr)
    return torch.where(step < warmup, lr * step / max(warmup, 1), table)


def tau_table(config: ScheduleConfig, *, horizon_epochs: int, steps_per_epoch: int) -> Tensor:
    """Return tau at steps 0 .. T, float64 on the CPU.

    Cosine: 1 - (1 - tau) (1 + cos(pi t / T)) / 2 (byol, section 3.3; the post's code, moco.py).
    Raises UsageError for over ``MOST_STEPS`` steps.
    """
    step = _steps(horizon_epochs * steps_per_epoch, horizon_epochs)
    if config.tau_schedule == "constant":
        return torch.full_like(step, config.tau)
    done = _done(step, config.tau_unit, steps_per_epoch)
    return 1 - (1 - config.tau) * _half_cosine(done / (horizon_epochs * steps_per_epoch))


def joined(*tables: Tensor) -> Tensor:
    """Return the ``tables`` (T_i,) as columns of one; the shorter go on with their last entry."""
    most = max(map(len, tables))
    return torch.stack([torch.cat((t, t[-1:].expand(most - len(t)))) for t in tables], dim=1)


def at(table: Tensor, step: Tensor) -> Tensor:
    """Return the row of ``table`` (T, ...) for ``step`` (0-d int64), past its end the last one."""
    # Not table[step]: indexing with a 0-d tensor waits for the device.
    return table.index_select(0, step.clamp(max=len(table) - 1).view(1)).view(table.shape[1:])


def _steps(last: int, horizon_epochs: int) -> Tensor:
    if last >= MOST_STEPS:
        raise UsageError(
            f"schedule.horizon_epochs: {horizon_epochs} epochs are {last} steps, more than "
            f"{MOST_STEPS}: take a shorter horizon"
        )
    return torch.arange(last + 1, dtype=torch.float64)


def _done(step: Tensor, unit: str, steps_per_epoch: int) -> Tensor:
    """Count the steps done at each step or, for unit "epoch", at the start of its epoch."""
    return step if unit == "step" else torch.floor(step / steps_per_epoch) * steps_per_epoch


def _half_cosine(position: Tensor) -> Tensor:
    """Fall from 1 at position 0 to 0 at position 1, constant outside."""
    return (1 + torch.cos(math.pi * position.clamp(0.0, 1.0))) / 2
