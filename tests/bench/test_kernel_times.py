"""Kernel durations from profiler events, of torch's own event class."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import pytest
import torch
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import ProfilerActivity

from fastbyol_bench import kernel_times
from fastbyol_bench.kernel_times import Kernel, on_device, recorded

CPU, CUDA = kernel_times.DeviceType.CPU, kernel_times.DeviceType.CUDA


def event(
    name: str, start_us: float, end_us: float, device: Any = CUDA, annotation: bool = False
) -> FunctionEvent:
    return FunctionEvent(
        id=1, name=name, thread=1, start_us=start_us, end_us=end_us, device_type=device,
        use_device="cuda",
        is_user_annotation=annotation, stack=[],
    )  # fmt: skip


# One launch as a profiler sees it: the host's call, the kernel, a copy, and an annotated region
# that spans both.
EVENTS = [
    event("cudaLaunchKernel", 0.0, 8.0, CPU),
    event("Memcpy DtoD (Device -> Device)", 14.5, 16.0),
    event("_sweep_kernel", 10.0, 14.0),
    event("a region", 10.0, 16.0, annotation=True),
]


def test_what_ran_on_the_device_is_kept_in_order() -> None:
    first, second = on_device(EventList(EVENTS))
    assert (first.name, second.name) == ("_sweep_kernel", "Memcpy DtoD (Device -> Device)")
    assert (first.start_s, first.seconds) == pytest.approx((10e-6, 4e-6))
    assert (second.start_s, second.seconds) == pytest.approx((14.5e-6, 1.5e-6))
    assert on_device([]) == ()


def test_device_totals_of_torch_agree() -> None:
    """Compare with torch's own sum over its averages, which its table prints."""
    events = EventList(
        [event for event in EVENTS if not event.is_user_annotation], use_device="cuda"
    )
    events._build_tree()
    theirs = sum(
        row.self_device_time_total for row in events.key_averages() if row.device_type == CUDA
    )
    assert sum(kernel.seconds for kernel in on_device(EVENTS)) == pytest.approx(theirs / 1e6)


def test_a_record_holds_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the device is idle at start and stop, and that CUPTI stays loaded."""
    order: list[str] = []

    class Profiler:
        def __init__(self, activities: list[ProfilerActivity], acc_events: bool) -> None:
            assert activities == [ProfilerActivity.CUDA]

        def __enter__(self) -> Profiler:
            order.append("start")
            return self

        def __exit__(
            self, kind: type | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            order.append("stop")

        def events(self) -> EventList:
            return EventList(EVENTS)

    monkeypatch.setenv("TEARDOWN_CUPTI", "1")
    monkeypatch.setattr(kernel_times, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    kernels = recorded(lambda: order.append("call"))
    assert order == ["wait", "start", "call", "wait", "stop"]
    assert [kernel.name for kernel in kernels] == [
        "_sweep_kernel",
        "Memcpy DtoD (Device -> Device)",
    ]
    assert isinstance(kernels[0], Kernel)
    assert os.environ["TEARDOWN_CUPTI"] == "0"
