"""A run goes on as fast as it went when its update rule changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastbyol.optim.momentum import Update, carry_over
from fastbyol_kernels.lars_ema import RULES, Rule, SegmentTable, lars_ema

MU, LR = 0.9, 0.3
LR_MULT = torch.tensor([1.0, 4.0, 0.25])


def table() -> SegmentTable:
    """Three segments with gaps between, of which one adapts, without weight decay."""
    return SegmentTable(
        offsets=(0, 8, 20),
        numels=(5, 8, 4),
        adapt=torch.tensor([True, False, False]),
        decay=torch.zeros(3),
        lr_mult=LR_MULT.clone(),
    )


def update(rule: Rule, lr: float = LR) -> Update:
    return Update(rule, table(), torch.tensor(lr))


def next_change(momentum: torch.Tensor, by: Update) -> torch.Tensor:
    """The change of weights (L,) in a step of ``lars_ema`` whose gradient is zero."""
    weights, buffer = torch.zeros(24), momentum.clone()
    lars_ema(
        weights, torch.zeros(24), buffer, torch.zeros(24), by.table, by.lr, torch.tensor(0.5),
        rule=by.rule, eta=1e-3, mu=MU, ema_first=True, kernels="reference",
    )  # fmt: skip
    return weights


def buffer() -> torch.Tensor:
    momentum = torch.zeros(24)
    for part in table().split(momentum):
        part.copy_(torch.randn(len(part), generator=torch.Generator().manual_seed(len(part))))
    return momentum


@pytest.mark.parametrize("after", RULES)
@pytest.mark.parametrize("before", RULES)
def test_without_gradient_the_next_update_is_that_of_the_rule_before(
    before: Rule, after: Rule
) -> None:
    """By hand: weights of a segment change by -mu m under blog, by -mu lr lr_mult m else."""
    was, now, momentum = update(before), update(after), buffer()
    carried = momentum.clone()
    carry_over(carried, was, now)
    if (before == "blog") == (after == "blog"):
        assert torch.equal(carried, momentum)
    change = next_change(carried, now)
    for index, (part, moved) in enumerate(
        zip(table().split(momentum), table().split(change), strict=True)
    ):
        velocity = part if before == "blog" else LR * LR_MULT[index] * part
        # Three roundings of fp32, of 6e-8 each.
        torch.testing.assert_close(moved, -MU * velocity, rtol=4e-7, atol=0.0)


def test_another_learning_rate_changes_no_velocity_but_where_the_kind_stays() -> None:
    momentum = buffer()
    carried = momentum.clone()
    carry_over(carried, update("sgd", 0.3), update("deepmind", 0.1))
    assert torch.equal(carried, momentum)
    carry_over(carried, update("blog", 7.0), update("sgd", 0.1))
    torch.testing.assert_close(
        next_change(carried, update("sgd", 0.1)), -MU * momentum, rtol=4e-7, atol=0.0
    )


def test_where_the_new_rate_is_zero_the_buffer_is_too() -> None:
    now = update("sgd")
    still = replace(now.table, lr_mult=torch.tensor([1.0, 0.0, 1.0]))
    momentum, carried = buffer(), buffer()
    carry_over(carried, update("blog"), now._replace(table=still))
    parts = table().split(carried)
    assert not parts[1].any()
    torch.testing.assert_close(parts[0], table().split(momentum)[0] / LR)
    carry_over(momentum, update("blog"), update("sgd", 0.0))
    assert not momentum.any()
