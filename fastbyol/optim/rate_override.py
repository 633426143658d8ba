"""Rates in place of LARS's own: another run's, replayed step by step, or its own under a cap.

Letters: S segments, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastbyol.config import OptimConfig
from fastbyol.errors import UsageError
from fastbyol_kernels.lars_ema import SegmentTable, trust_ratio


@dataclass(frozen=True)
class RateOverride:
    """The rates of a step as a segment table in which nothing adapts.

    A segment's factor ``table.lr_mult`` is its rate and ``lr`` is a 0-d 1, so the update is the
    post's, with the rate inside the momentum (``fastbyol_kernels.lars_ema``, rule ``blog``).
    ``recorded`` (T, S) are rates to replay, ``cap`` is the highest rate; both may be None.
    """

    adaptive: SegmentTable
    table: SegmentTable
    lr: Tensor
    eta: float
    recorded: Tensor | None
    cap: float | None

    @staticmethod
    def of(optim: OptimConfig, table: SegmentTable) -> RateOverride | None:
        """Make what ``optim`` asks for, or None; ``replay`` adds the rates to replay.

        Raises UsageError for an optimizer whose rates cannot be replaced.
        """
        if optim.rate_cap is None and optim.replay_rates is None:
            return None
        key = "optim.rate_cap" if optim.rate_cap is not None else "optim.replay_rates"
        if optim.name != "lars" or optim.dialect != "blog":
            raise UsageError(
                f"{key}: rates can be given to LARS in the dialect blog only: set optim.name to "
                "lars"
            )
        fixed = replace(table, adapt=torch.zeros_like(table.adapt), lr_mult=table.lr_mult.clone())
        return RateOverride(
            table, fixed, table.lr_mult.new_ones(()), optim.eta, None, optim.rate_cap
        )

    def replay(self, rates: Tensor) -> RateOverride:
        """Return a copy that replays ``rates`` (T, S), moved to the table's device and dtype."""
        return replace(self, recorded=rates.to(self.table.lr_mult))

    def set(self, online: Tensor, gradient: Tensor, lr: Tensor, step: Tensor) -> None:
        """Write the rates of ``step`` (0-d) into ``table``, without waiting for the device."""
        if self.recorded is not None:
            index = step.clamp(max=len(self.recorded) - 1).view(1)
            rates = self.recorded.index_select(0, index).view(-1)
        else:
            rates = self._own(online, gradient, lr)
        self.table.lr_mult.copy_(rates if self.cap is None else rates.clamp(max=self.cap))

    def _own(self, online: Tensor, gradient: Tensor, lr: Tensor) -> Tensor:
        table = self.adaptive
        w, g = (
            torch.stack(torch._foreach_norm(table.split(buffer))) for buffer in (online, gradient)
        )
        trust = trust_ratio("blog", w, g, g, table.decay, self.eta)
        return lr * table.lr_mult * torch.where(table.adapt, trust, 1.0)


def check_recorded(
    path: Path,
    steps: Sequence[int],
    names: Sequence[str],
    *,
    own_names: Sequence[str],
    total_steps: int,
) -> None:
    """Raise UsageError if the rates that the run ``path`` recorded do not fit this run."""
    if tuple(names) != tuple(own_names):
        odd = sorted(set(names) ^ set(own_names))
        what = f"first difference {odd[0]!r}" if odd else "in another order"
        raise UsageError(
            f"optim.replay_rates: {path} is a run of another network ({what}): name a run of the "
            "same model"
        )
    if list(steps) != list(range(len(steps))):
        raise UsageError(
            f"optim.replay_rates: {path} did not record every step: it needs "
            "run.layers_every_steps = 1"
        )
    if len(steps) < total_steps:
        raise UsageError(
            f"optim.replay_rates: {path} recorded {len(steps)} steps and this run has "
            f"{total_steps}: finish it first, "
            "or train for fewer epochs"
        )
