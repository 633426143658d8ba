"""The duration of each kernel of a call on the device, from CUPTI through torch's profiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Kernel(NamedTuple):
    """A kernel, copy or fill: its name, its start (seconds into the record) and its duration."""

    name: str
    start_s: float
    seconds: float


def recorded(call: Callable[[], object]) -> tuple[Kernel, ...]:
    """Run ``call`` and return its work on the GPU in order of its start.

    Waits for the device before and after, so that earlier work, such as a flush of the caches, is
    not recorded. A kernel's own duration leaves out its launch: an eager custom operation costs the
    host some hundred microseconds, more than most of our kernels take.
    """
    # torch sets this only for Inductor's graphs (torch/profiler/profiler.py): after a teardown of
    # CUPTI the replay of a CUDA graph may crash. Our graphs are recorded by the engine.
    os.environ["TEARDOWN_CUPTI"] = "0"
    torch.cuda.synchronize()
    # Without acc_events torch warns that a second cycle clears the first one's events. There is
    # only one.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return on_device(profiler.events() or ())


def on_device(events: Iterable[Any]) -> tuple[Kernel, ...]:
    """Return the device's work among profiler events, whose times are in microseconds.

    Every torch version has ``time_range``; ``*_time_total`` was renamed once and sums over
    children.
    """
    kernels = [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return tuple(sorted(kernels, key=lambda kernel: kernel.start_s))
