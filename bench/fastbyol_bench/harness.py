"""Time variants of one piece of work side by side: each round runs all, in turning order, so that drift meets all alike.

A round gives one reading per variant. Ratios are taken within rounds and then their median, so that a slow minute of the
machine weighs on both sides of a ratio.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from fastbyol_bench.results import Ratio, Timing

# More than any cache that a figure is to be free of: the L2 of an H100 is 50 MB, the L3 of a server's processor up to 384 MB.
FLUSH_BYTES = 512 << 20


class Reading(NamedTuple):
    """One run: seconds that passed (on the GPU, where the clock is the GPU's), and processor seconds of this process."""

    wall_s: float
    cpu_s: float


class Elsewhere(NamedTuple):
    """What a call returns whose work is done in another process: the processor seconds it took there."""

    cpu_s: float


class Clock(Protocol):
    """Times one call."""

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` once."""


class HostClock:
    """The machine's clock, and all threads' processor time."""

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` once."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Reading(wall, cpu + (result.cpu_s if isinstance(result, Elsewhere) else 0.0))


class CudaClock:
    """CUDA events. What was queued before (a flush) hides the time that the host takes to launch."""

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` once and wait for the device."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        cpu = time.process_time()
        first.record()
        call()
        last.record()
        spent = time.process_time() - cpu
        last.synchronize()
        return Reading(first.elapsed_time(last) / 1e3, spent)


@dataclass(frozen=True)
class Variant:
    """One way to do the work. ``images``: how many images a call works on, for rates; ratios are per image then."""

    name: str
    call: Callable[[], object]
    images: int | None = None


@dataclass(frozen=True)
class Plan:
    """How often. ``budget_s`` ends the rounds early, but never before the second."""

    rounds: int
    warmup: int = 1
    budget_s: float = 30.0


class Flush:
    """Writes ``FLUSH_BYTES`` on ``device``, after which nothing that was read before is in a cache."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


def clock_of(device: torch.device) -> Clock:
    """The clock of ``device``."""
    return CudaClock() if device.type == "cuda" else HostClock()


def measure(
    variants: Sequence[Variant],
    plan: Plan,
    clock: Clock,
    *,
    before: Callable[[], object] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Reading]]:
    """Readings per variant, one a round, round by round. ``before`` runs ahead of each reading, outside of it."""
    readings: dict[str, list[Reading]] = {variant.name: [] for variant in variants}
    if len(readings) != len(variants):
        raise ValueError(f"variants must differ in name: {[variant.name for variant in variants]}")
    for variant in variants:
        for _ in range(plan.warmup):
            variant.call()
    began = now()
    gc.collect()
    gc.disable()
    try:
        for turn in range(plan.rounds):
            if turn >= 2 and now() - began > plan.budget_s:
                break
            for index in range(len(variants)):
                variant = variants[(turn + index) % len(variants)]
                if before is not None:
                    before()
                readings[variant.name].append(clock.time(variant.call))
    finally:
        gc.enable()
    return readings


def timing(readings: Sequence[Reading]) -> Timing:
    """Median, interquartile range and count."""
    wall = [reading.wall_s for reading in readings]
    return Timing(
        median_s=statistics.median(wall),
        spread_s=interquartile(wall),
        runs=len(wall),
        cpu_s=statistics.median(reading.cpu_s for reading in readings),
    )


def ratio(theirs: Sequence[Reading], ours: Sequence[Reading], scale: float = 1.0) -> Ratio:
    """How many times as long theirs takes: median and interquartile range over rounds. ``scale``: our images over theirs."""
    wall = [scale * a.wall_s / b.wall_s for a, b in zip(theirs, ours, strict=True)]
    cpu = [scale * a.cpu_s / b.cpu_s for a, b in zip(theirs, ours, strict=True) if b.cpu_s > 0]
    return Ratio(median=statistics.median(wall), spread=interquartile(wall), cpu=statistics.median(cpu) if cpu else None)


def interquartile(values: Sequence[float]) -> float:
    """Third quartile minus first, linearly interpolated (numpy's default); 0 for one value."""
    ordered = sorted(values)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return quantile(0.75) - quantile(0.25)


def ratios(variants: Sequence[Variant], readings: Mapping[str, Sequence[Reading]]) -> dict[str, Ratio]:
    """Every variant against the first, per image where both say how many they work on."""
    first = variants[0]
    found = {}
    for variant in variants[1:]:
        scale = first.images / variant.images if first.images and variant.images else 1.0
        found[variant.name] = ratio(readings[variant.name], readings[first.name], scale)
    return found
