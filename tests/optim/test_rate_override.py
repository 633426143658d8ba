"""Replaced rates against LARS itself and against the update written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbyol.config import OptimConfig
from fastbyol.errors import UsageError
from fastbyol.optim.rate_override import RateOverride, check_recorded
from fastbyol_kernels.lars_ema import SegmentTable, lars_ema

NUMELS = (12, 5, 7)


def table() -> SegmentTable:
    return SegmentTable(
        offsets=(0, 16, 24), numels=NUMELS,
        adapt=torch.tensor([True, False, True]),
        decay=torch.tensor([1e-4, 0.0, 1e-2], dtype=torch.float64),
        lr_mult=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    )  # fmt: skip


def buffers(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, dtype=torch.float64, generator=generator) for _ in range(4)]


def step(buffers: list[torch.Tensor], segments: SegmentTable, lr: torch.Tensor) -> torch.Tensor:
    tau = torch.tensor(0.99, dtype=torch.float64)
    return lars_ema(*buffers, segments, lr, tau, rule="blog", eta=1e-3, mu=0.9, ema_first=True)


def override(**keys: object) -> RateOverride:
    made = RateOverride.of(OptimConfig(name="lars", **keys), table())
    assert made is not None
    return made


def test_a_cap_that_is_never_reached_is_lars() -> None:
    lr, count = torch.tensor(0.2, dtype=torch.float64), torch.tensor(0)
    plain, capped = buffers(0), buffers(0)
    rates = override(rate_cap=1e6)
    for _ in range(3):
        measured = step(plain, table(), lr)
        rates.set(capped[0], capped[1], lr, count)
        # The same products in another order: a few units in the last place.
        torch.testing.assert_close(
            step(capped, rates.table, rates.lr)[:, 3], measured[:, 3], rtol=1e-14, atol=0
        )
    torch.testing.assert_close(capped, plain, rtol=1e-13, atol=1e-15)


def test_a_cap_holds_what_exceeds_it_and_nothing_else() -> None:
    lr, first = torch.tensor(0.2, dtype=torch.float64), buffers(0)
    free = step(buffers(0), table(), lr)[:, 3]
    rates = override(rate_cap=float(free.sort().values[1]) * 0.5)
    rates.set(first[0], first[1], lr, torch.tensor(0))
    torch.testing.assert_close(
        step(first, rates.table, rates.lr)[:, 3], free.clamp(max=rates.cap), rtol=1e-14, atol=0
    )
    assert int((free > rates.cap).sum()) == 2


def test_a_replay_is_momentum_sgd_at_the_recorded_rates() -> None:
    recorded = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    rates = override(replay_rates="somewhere").replay(recorded)
    flat = buffers(1)
    w, g, m, _ = (buffer.clone() for buffer in flat)
    for index in (0, 1, 7):  # beyond the end the last rates hold
        rates.set(flat[0], flat[1], torch.tensor(9.0), torch.tensor(index))
        step(flat, rates.table, rates.lr)
        for segment, (start, count) in enumerate(zip((0, 16, 24), NUMELS, strict=True)):
            part = slice(start, start + count)
            rate = recorded[min(index, 1), segment]
            m[part] = 0.9 * m[part] + rate * (g[part] + table().decay[segment] * w[part])
            w[part] -= m[part]
            torch.testing.assert_close(flat[0][part], w[part], rtol=1e-13, atol=1e-15)


def test_no_override_is_none_and_sgd_is_refused() -> None:
    assert RateOverride.of(OptimConfig(name="lars"), table()) is None
    for optim in (
        OptimConfig(name="sgd", rate_cap=1.0),
        OptimConfig(name="lars", dialect="deepmind", replay_rates="run"),
    ):
        with pytest.raises(UsageError, match="LARS in the dialect blog only"):
            RateOverride.of(optim, table())


@pytest.mark.parametrize(
    ("steps", "names", "reason"),
    [
        (range(4), ("a", "c"), "another network .first difference 'b'"),
        (range(4), ("b", "a"), "another order"),
        (range(0, 8, 2), ("a", "b"), "layers_every_steps = 1"),
        (range(3), ("a", "b"), "recorded 3 steps and this run has 4"),
    ],
)
def test_rates_that_do_not_fit_are_refused(
    steps: range, names: tuple[str, ...], reason: str
) -> None:
    check_recorded(Path("run"), range(4), ("a", "b"), own_names=("a", "b"), total_steps=4)
    with pytest.raises(UsageError, match=reason):
        check_recorded(Path("run"), steps, names, own_names=("a", "b"), total_steps=4)
