"""The harness with a fake clock: order of readings, medians, spreads, ratios within rounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol_bench import harness
from fastbyol_bench.harness import (
    CudaClock,
    HostClock,
    KernelClock,
    PeerError,
    Plan,
    Reading,
    Variant,
    interquartile,
    measure,
    ratio,
    ratios,
    timing,
)
from fastbyol_bench.kernel_times import Kernel


class WoundClock:
    """A clock whose times are the calls' results, doubled from round to round by a drift."""

    def __init__(self, per_round: int) -> None:
        self.calls, self.per_round = 0, per_round

    def time(self, call: Callable[[], object]) -> Reading:
        drift = 2.0 ** (self.calls // self.per_round)
        self.calls += 1
        seconds = float(call())  # type: ignore[arg-type]
        return Reading(seconds * drift, 3 * seconds * drift)


def test_rounds_turn_and_ratios_survive_drift() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> Callable[[], float]:
        def call() -> float:
            order.append(name)
            return seconds

        return call

    variants = [
        Variant("a", work("a", 1.0), images=10),
        Variant("b", work("b", 3.0), images=10),
        Variant("c", work("c", 3.0), 5),
    ]
    before: list[int] = []
    readings = measure(
        variants, Plan(4, warmup=1), WoundClock(3), before=lambda: before.append(len(order))
    )
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # the first three warm up
    assert before == list(range(3, 15))
    assert [reading.wall_s for reading in readings["a"]] == [1.0, 2.0, 4.0, 8.0]
    against = ratios(variants, readings)
    assert (against["b"].median, against["b"].spread, against["b"].cpu) == (3.0, 0.0, 3.0)
    assert against["c"].median == 6.0  # per image
    medians = timing(readings["b"])
    assert (medians.median_s, medians.runs, medians.cpu_s) == (9.0, 4, 27.0)


def test_a_budget_ends_rounds_after_the_second() -> None:
    clock = iter(range(100))
    readings = measure(
        [Variant("a", lambda: 1.0)],
        Plan(10, 0, budget_s=0.5),
        WoundClock(1),
        now=lambda: float(next(clock)),
    )
    assert len(readings["a"]) == 2
    assert (
        len(measure([Variant("a", lambda: 1.0)], Plan(10, 0, budget_s=9e9), WoundClock(1))["a"])
        == 10
    )


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="differ in name"):
        measure([Variant("a", int), Variant("a", int)], Plan(1), HostClock())


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30))
def test_the_spread_is_numpys_interquartile_range(values: list[float]) -> None:
    expected = float(np.subtract(*np.percentile(values, [75, 25])))
    assert interquartile(values) == pytest.approx(
        expected, rel=1e-9, abs=1e-6
    )  # other order of the same sums


def test_ratios_are_of_rounds_and_not_of_medians() -> None:
    ours, theirs = (
        [Reading(t, t) for t in (1.0, 10.0, 2.0)],
        [Reading(t, 2 * t) for t in (2.0, 20.0, 40.0)],
    )
    of_rounds = ratio(theirs, ours)
    assert (of_rounds.median, of_rounds.cpu) == (2.0, 4.0)
    assert of_rounds.spread == pytest.approx(9.0)  # of 2, 2, 20


def test_the_host_clock_counts_both_times() -> None:
    def work() -> None:
        sum(range(300_000))

    reading = HostClock().time(work)
    assert reading.cpu_s > 0
    assert reading.wall_s > 0
    assert harness.clock_of(harness.torch.device("cpu")).__class__ is HostClock


def test_a_peer_that_ends_leaves_the_others_their_rounds() -> None:
    order: list[str] = []

    def work(name: str, ends_at: int = 99) -> Callable[[], float]:
        def call() -> float:
            order.append(name)
            if order.count(name) == ends_at:
                raise PeerError(f"{name} ended early")
            return 1.0

        return call

    variants = [
        Variant("ours", work("o")),
        Variant("first", work("f", 1)),
        Variant("later", work("l", 3)),
    ]
    lost: list[str] = []
    readings = measure(
        variants,
        Plan(4, warmup=1),
        WoundClock(9),
        ended=lambda variant, error: lost.append(f"{variant.name}: {error}"),
    )
    assert lost == ["first: f ended early", "later: l ended early"]
    assert "".join(order) == "ofl" + "ol" + "lo" + "o" + "o"
    assert {name: len(taken) for name, taken in readings.items()} == {"ours": 4}
    assert ratios(variants, readings) == {}
    with pytest.raises(PeerError):
        measure([Variant("first", work("again", 1))], Plan(1), WoundClock(1))


def test_kernels_are_summed_whatever_the_host_takes() -> None:
    def record(call: Callable[[], object]) -> list[Kernel]:
        call()
        return [Kernel("a", 0.0, 2e-6), Kernel("b", 900e-6, 3e-6)]

    calls: list[int] = []
    reading = KernelClock(record).time(lambda: calls.append(sum(range(300_000))))
    assert reading.wall_s == pytest.approx(5e-6)
    assert reading.cpu_s > 0
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="no kernel of the call"):
        KernelClock(lambda call: []).time(int)


def test_events_span_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a reading is the mean of the calls between two events."""
    device_ms = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = device_ms[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def call() -> None:
        device_ms[0] += 4.0

    monkeypatch.setattr(harness.torch.cuda, "Event", Event)
    assert CudaClock(5).time(call).wall_s == pytest.approx(4e-3)
    assert device_ms == [20.0]
    asked: list[int] = []
    elsewhere = Reading(1.0, 2.0)
    assert CudaClock(5).time(lambda: asked.append(1) or elsewhere) == elsewhere
    assert asked == [1]
