"""The tables of lr and tau against torch's scheduler, the original codes' formulas, and their
properties.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.config import ScheduleConfig
from fastbyol.errors import UsageError
from fastbyol.optim.schedule import at, joined, lr_table, tau_table


def test_lr_per_epoch_is_torchs_cosine() -> None:
    epochs, steps = 32, 5
    table = lr_table(
        ScheduleConfig(lr_unit="epoch"), 0.8, horizon_epochs=epochs, steps_per_epoch=steps
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        # torch's is a recursion: it gathers rounding.
        assert table[epoch * steps : (epoch + 1) * steps].tolist() == pytest.approx(
            [optimizer.param_groups[0]["lr"]] * steps
        )
        optimizer.step()
        scheduler.step()
    assert len(table) == epochs * steps + 1
    assert table[-1] == 0.0


def deepmind_lr(step: int, base: float, total: int, warmup: int) -> float:
    """Restate learning_schedule of deepmind-research's byol/utils/schedules.py."""
    if step < warmup:
        return step / warmup * base
    t, length = min(step - warmup, total - warmup), total - warmup
    return 0.5 * base * (1 + math.cos(math.pi * t / length))


@given(st.integers(2, 40), st.integers(1, 30), st.floats(0.0, 1.5))
def test_lr_per_step_with_warm_up_is_deepminds(
    epochs: int, steps: int, warmup_epochs: float
) -> None:
    config = ScheduleConfig(lr_unit="step", warmup_epochs=warmup_epochs)
    table = lr_table(config, 0.2, horizon_epochs=epochs, steps_per_epoch=steps)
    warmup = int(warmup_epochs * steps)
    expected = [
        deepmind_lr(step, 0.2, epochs * steps, warmup) for step in range(epochs * steps + 1)
    ]
    assert table.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_tau_rises_as_published(unit: str) -> None:
    epochs, steps = 320, 4
    table = tau_table(
        ScheduleConfig.model_validate({"tau_unit": unit}),
        horizon_epochs=epochs,
        steps_per_epoch=steps,
    )
    for step in (0, 1, 5, 639, 640, 1279, 1280):
        k, K = (step, epochs * steps) if unit == "step" else (step // steps, epochs)
        assert table[step].item() == pytest.approx(
            1 - (1 - 0.996) * (math.cos(math.pi * k / K) + 1) / 2, rel=1e-15
        )
    assert table[0] == 0.996
    assert table[-1] == 1.0
    assert (table.diff() >= 0).all()


UNITS = st.sampled_from(["step", "epoch"])
SHAPES = st.sampled_from(["cosine", "constant"])


@given(UNITS, SHAPES, st.integers(1, 60), st.integers(1, 20), st.floats(0.0, 1.0))
def test_tau_never_falls_nor_leaves_its_range(
    unit: str, shape: str, epochs: int, steps: int, tau: float
) -> None:
    config = ScheduleConfig.model_validate({"tau_unit": unit, "tau_schedule": shape, "tau": tau})
    table = tau_table(config, horizon_epochs=epochs, steps_per_epoch=steps)
    assert len(table) == epochs * steps + 1
    assert (table.diff() >= 0).all()
    # One rounding of 1 - (1 - tau) may fall short of tau.
    assert table[0] == pytest.approx(tau, rel=1e-15, abs=1e-15)
    assert table[-1] == (1.0 if shape == "cosine" else tau)
    if unit == "epoch":
        assert (table[:-1].view(epochs, steps) == table[:-1:steps, None]).all()


@given(
    UNITS,
    SHAPES,
    st.integers(1, 40),
    st.integers(1, 20),
    st.floats(0.0, 60.0),
    st.floats(0.0, 100.0),
)
def test_lr_rises_through_the_warm_up_and_falls_from_there(
    unit: str, shape: str, epochs: int, steps: int, warmup_epochs: float, lr: float
) -> None:
    config = ScheduleConfig.model_validate(
        {"lr_unit": unit, "lr": shape, "warmup_epochs": warmup_epochs}
    )
    table = lr_table(config, lr, horizon_epochs=epochs, steps_per_epoch=steps)
    warmup = int(warmup_epochs * steps)
    assert len(table) == max(epochs * steps, warmup) + 1
    assert ((table >= 0) & (table <= lr)).all()
    assert (table[:warmup].diff() >= 0).all()
    assert (table[warmup:].diff() <= 0).all()


def test_constants() -> None:
    config = ScheduleConfig(lr="constant", tau_schedule="constant", tau=0.99, warmup_epochs=0.5)
    assert (
        lr_table(config, 0.3, horizon_epochs=2, steps_per_epoch=4).tolist()
        == [0.0, 0.15] + [0.3] * 7
    )
    assert set(tau_table(config, horizon_epochs=2, steps_per_epoch=4).tolist()) == {0.99}


def test_warm_up_per_step_beside_a_cosine_per_epoch() -> None:
    config = ScheduleConfig(lr_unit="epoch", warmup_epochs=1)
    table = lr_table(config, 1.0, horizon_epochs=5, steps_per_epoch=4).tolist()
    assert table[:4] == [0.0, 0.25, 0.5, 0.75]
    for epoch in range(1, 5):
        expected = (1 + math.cos(math.pi * (epoch - 1) / 4)) / 2
        assert table[4 * epoch : 4 * epoch + 4] == pytest.approx([expected] * 4)


def test_a_warm_up_longer_than_the_run_is_all_there_is() -> None:
    config = ScheduleConfig(lr_unit="step", warmup_epochs=10)
    table = lr_table(config, 1.0, horizon_epochs=5, steps_per_epoch=2)
    assert table[:10].tolist() == pytest.approx([step / 20 for step in range(10)])


@given(st.integers(0, 100))
def test_reading_beyond_the_end_holds_the_last_value(step: int) -> None:
    table = torch.linspace(1, 0, 11, dtype=torch.float64)
    assert at(table, torch.tensor(step)).shape == ()
    assert at(table, torch.tensor(step)) == table[min(step, 10)]


def test_absurd_horizons_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"schedule.horizon_epochs: 1000000 epochs are 410000000 steps"
    ):
        tau_table(ScheduleConfig(), horizon_epochs=1_000_000, steps_per_epoch=410)


def test_joined_tables_are_read_as_each_alone() -> None:
    tables = torch.arange(5.0), torch.arange(10.0, 18.0)
    for step in map(torch.tensor, range(12)):
        row = at(joined(*tables), step)
        assert row.tolist() == [float(at(table, step)) for table in tables]
