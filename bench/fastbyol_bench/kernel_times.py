"""How long each kernel of a call runs on the device, by CUPTI through torch's profiler.

A kernel's own duration does not depend on how long the host takes to launch it: an eager custom operation costs the host
some hundreds of microseconds, which is more than most of our kernels take.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Kernel(NamedTuple):
    """One kernel, copy or fill: its name, when it began (seconds into the record) and how long it ran."""

    name: str
    start_s: float
    seconds: float


def recorded(call: Callable[[], object]) -> tuple[Kernel, ...]:
    """Run ``call`` and return what it ran on the GPU, in order of beginning. Waits for the device before and after.

    What was queued before (a flush of the caches) is over when the record begins, and is no part of it.
    """
    # torch sets this itself only where Inductor makes the graphs (torch/profiler/profiler.py): after a teardown of CUPTI
    # the replay of a CUDA graph may crash. Ours are recorded by the engine.
    os.environ["TEARDOWN_CUPTI"] = "0"
    torch.cuda.synchronize()
    # Without acc_events torch warns that a second cycle would clear the first one's events; there is one.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return on_device(profiler.events() or ())


def on_device(events: Iterable[Any]) -> tuple[Kernel, ...]:
    """Pick the device's work out of profiler events (``torch.autograd.profiler_util.FunctionEvent``, times in microseconds).

    ``time_range`` is read, which all versions have, and no ``*_time_total``: those were renamed once and sum over children.
    """
    kernels = [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return tuple(sorted(kernels, key=lambda kernel: kernel.start_s))
