"""The momentum buffer of a run whose update rule changes on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastbyol_kernels.lars_ema import Rule, SegmentTable
from fastbyol_kernels.lars_ema.reference import factors


class Update(NamedTuple):
    """An update rule, its segments (S), and the 0-d learning rate of the next step."""

    rule: Rule
    table: SegmentTable
    lr: Tensor

    @property
    def rate_is_inside(self) -> bool:
        """Whether the momentum has the learning rate in it: the buffer is a velocity."""
        return self.rule == "blog"

    def scale(self) -> Tensor:
        """Return the factors b (S,), float64, that the buffer has in the next update of weights."""
        one = torch.ones_like(self.table.lr_mult)
        return factors(self.rule, self.table, one, one, self.lr)[2].double()


@torch.no_grad()
def carry_over(momentum: Tensor, before: Update, after: Update) -> None:
    """Convert ``momentum`` (L,), a buffer of ``before``, to one of ``after``, in place.

    A segment's weights change by -b m (``lars_ema.reference``). b of ``blog`` is 1, that of the
    other rules lr * lr_mult, and m becomes m b / b' so that without a gradient the next update is
    the one that ``before`` would have made. Where b' is 0 there is no such m, and m becomes 0. Of
    two rules with the same kind of buffer it stays as it is, bit for bit.
    """
    if before.rate_is_inside == after.rate_is_inside:
        return
    own, other = before.scale(), after.scale()
    ratio = torch.where(other > 0, own / other, 0.0)
    for part, factor in zip(after.table.split(momentum), ratio, strict=True):
        part.copy_(part.double() * factor)  # rounded once
