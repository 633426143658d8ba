"""Side-by-side timing of the variants of one piece of work.

Each round takes one reading of every variant, in rotating order, and ratios are taken within
rounds. So a slow minute of the machine affects both sides of a ratio.
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

# More than any cache: the L2 of an H100 is 50 MB, the L3 of a server's cpu up to 384 MB.
FLUSH_BYTES = 512 << 20


class Reading(NamedTuple):
    """The wall time of one run, by the device's clock if it has one, and the process's cpu time."""

    wall_s: float
    cpu_s: float


class PeerError(RuntimeError):
    """The failure of a peer process: it died, raised or did not answer. The message is one line."""


class Clock(Protocol):
    """A clock for one call. If the call returns a ``Reading``, the clock returns that."""

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` and return its reading."""


class HostClock:
    """The machine's clock, and the cpu time of all threads."""

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` once and return its reading."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return result if isinstance(result, Reading) else Reading(wall, cpu)


class CudaClock:
    """A clock by CUDA events around ``calls`` consecutive calls, per call.

    A single call on an idle device would include its launch, which a loop hides behind the call
    before.
    """

    def __init__(self, calls: int = 1) -> None:
        self.calls = calls

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` ``calls`` times, wait for the device and return the mean reading."""
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
    """A clock that sums the durations of all kernels, copies and fills of a call on the GPU."""

    def __init__(
        self, record: Callable[[Callable[[], object]], Sequence[Kernel]] = recorded
    ) -> None:
        self._record = record

    def time(self, call: Callable[[], object]) -> Reading:
        """Run ``call`` once. Raises RuntimeError if the profiler recorded no kernel."""
        spent = 0.0

        def timed() -> None:
            nonlocal spent
            cpu = time.process_time()
            call()
            spent = time.process_time() - cpu

        kernels = self._record(timed)
        if not kernels:
            raise RuntimeError(
                "torch's profiler saw no kernel of the call: CUPTI must be allowed to trace this "
                "process"
            )
        return Reading(sum(kernel.seconds for kernel in kernels), spent)


@dataclass(frozen=True)
class Variant:
    """One way to do the work; with ``images``, the number per call, ratios are per image."""

    name: str
    call: Callable[[], object]
    images: int | None = None


@dataclass(frozen=True)
class Plan:
    """The number of rounds and warm-up calls. ``budget_s`` ends the rounds after the second."""

    rounds: int
    warmup: int = 1
    budget_s: float = 30.0


class Flush:
    """A function that evicts all earlier data from the caches by writing ``FLUSH_BYTES``."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


def clock_of(device: torch.device, calls: int = 1) -> Clock:
    """Return the clock for whole pieces of work, on a GPU the mean of ``calls`` calls."""
    return CudaClock(calls) if device.type == "cuda" else HostClock()


def kernel_clock(device: torch.device) -> Clock:
    """Return the clock for single operations, on a GPU without the host's launches."""
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
    """Return the readings of each variant, one per round. ``before`` runs before each, unmeasured.

    A variant whose peer fails is passed to ``ended`` with the error and is missing in the result.
    Without ``ended`` the error is raised.
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
    """Return median, interquartile range and count of ``readings``."""
    wall = [reading.wall_s for reading in readings]
    return Timing(
        median_s=statistics.median(wall),
        spread_s=interquartile(wall),
        runs=len(wall),
        cpu_s=statistics.median(reading.cpu_s for reading in readings),
    )


def ratio(theirs: Sequence[Reading], ours: Sequence[Reading], scale: float = 1.0) -> Ratio:
    """Return their time over ours: median and interquartile range over rounds.

    ``scale`` is the number of our images over theirs.
    """
    wall = [scale * a.wall_s / b.wall_s for a, b in zip(theirs, ours, strict=True)]
    cpu = [scale * a.cpu_s / b.cpu_s for a, b in zip(theirs, ours, strict=True) if b.cpu_s > 0]
    return Ratio(
        median=statistics.median(wall),
        spread=interquartile(wall),
        cpu=statistics.median(cpu) if cpu else None,
    )


def interquartile(values: Sequence[float]) -> float:
    """Return the third quartile minus the first, linearly interpolated; 0 for one value."""
    if len(values) == 1:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def ratios(
    variants: Sequence[Variant], readings: Mapping[str, Sequence[Reading]]
) -> dict[str, Ratio]:
    """Return the ratio of every measured variant to the first, per image if both say ``images``."""
    first = variants[0]
    ratios = {}
    for variant in variants[1:]:
        if variant.name in readings:
            scale = first.images / variant.images if first.images and variant.images else 1.0
            ratios[variant.name] = ratio(readings[variant.name], readings[first.name], scale)
    return ratios
