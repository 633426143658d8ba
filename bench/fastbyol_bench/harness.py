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
from functools import partial
from typing import NamedTuple, Protocol

import torch

from fastbyol_bench.kernel_times import Kernel, recorded
from fastbyol_bench.results import Ratio, Timing

# More than any cache that a figure is to be free of: the L2 of an H100 is 50 MB, the L3 of a server's cpu up to 384 MB.
FLUSH_BYTES = 512 << 20


class Reading(NamedTuple):
    """One run: seconds that passed, on the clock of the device where it has one, and cpu seconds of the process."""

    wall_s: float
    cpu_s: float


class PeerError(RuntimeError):
    """A peer in a process of its own that died, failed or did not answer; one line that says which and how."""


class Clock(Protocol):
    """Times one call. A call that returns a ``Reading`` was timed where it was done, and that reading stands."""

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call``."""


class HostClock:
    """The machine's clock, and all threads' cpu time."""

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` once."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return result if isinstance(result, Reading) else Reading(wall, cpu)


class CudaClock:
    """CUDA events around ``calls`` calls one after the other, per call: what a loop over them gets.

    One call alone, on an idle device, would also be charged for its launch, which a loop hides behind the call before.
    """

    def __init__(self, calls: int = 1) -> None:
        self.calls = calls

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` and wait for the device."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        cpu = time.process_time()
        first.record()
        for _ in range(self.calls):
            result = call()
            if isinstance(result, Reading):
                return result
        last.record()
        spent = time.process_time() - cpu
        last.synchronize()
        return Reading(first.elapsed_time(last) / 1e3 / self.calls, spent / self.calls)


class KernelClock:
    """The sum of the durations of all kernels, copies and fills that a call runs on the GPU (``kernel_times``)."""

    def __init__(self, record: Callable[[Callable[[], object]], Sequence[Kernel]] = recorded) -> None:
        self._record = record

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` once. Raises RuntimeError where the profiler saw no kernel of it."""
        spent = 0.0

        def timed() -> None:
            nonlocal spent
            cpu = time.process_time()
            call()
            spent = time.process_time() - cpu

        kernels = self._record(timed)
        if not kernels:
            raise RuntimeError("torch's profiler saw no kernel of the call: CUPTI must be allowed to trace this process")
        return Reading(sum(kernel.seconds for kernel in kernels), spent)


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


def clock_of(device: torch.device, calls: int = 1) -> Clock:
    """Return the clock for whole pieces of work on ``device``; on a GPU a reading is the mean of ``calls`` calls."""
    return CudaClock(calls) if device.type == "cuda" else HostClock()


def kernel_clock(device: torch.device) -> Clock:
    """Return the clock for single operations on ``device``: on a GPU their kernels alone count, not the host's launches."""
    return KernelClock() if device.type == "cuda" else HostClock()


def measure(
    variants: Sequence[Variant],
    plan: Plan,
    clock: Clock,
    *,
    before: Callable[[], object] | None = None,
    ended: Callable[[Variant, PeerError], object] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Reading]]:
    """Readings per variant, one a round, round by round. ``before`` runs ahead of each reading, outside of it.

    A variant whose peer ends is told to ``ended`` and has no readings in the result; without ``ended`` that is raised.
    """
    readings: dict[str, list[Reading]] = {variant.name: [] for variant in variants}
    if len(readings) != len(variants):
        raise ValueError(f"variants must differ in name: {[variant.name for variant in variants]}")

    def attempt(variant: Variant, work: Callable[[], object]) -> None:
        try:
            if variant.name in readings:
                work()
        except PeerError as error:
            if ended is None:
                raise
            del readings[variant.name]
            ended(variant, error)

    def read(variant: Variant) -> None:
        if before is not None:
            before()
        readings[variant.name].append(clock.time(variant.call))

    for variant in variants:
        for _ in range(plan.warmup):
            attempt(variant, variant.call)
    began = now()
    gc.collect()
    gc.disable()
    try:
        for turn in range(plan.rounds):
            if turn >= 2 and now() - began > plan.budget_s:
                break
            for index in range(len(variants)):
                variant = variants[(turn + index) % len(variants)]
                attempt(variant, partial(read, variant))
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
    """Every variant that has readings against the first, per image where both say how many they work on."""
    first = variants[0]
    found = {}
    for variant in variants[1:]:
        if variant.name not in readings:
            continue
        scale = first.images / variant.images if first.images and variant.images else 1.0
        found[variant.name] = ratio(readings[variant.name], readings[first.name], scale)
    return found
