"""A mocked GPU: all patches are undone, and Inductor's code for it counts as by hand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process of their own, because torch remembers what it asked of a device.
RESTORED = """
import torch
from torch._dynamo import device_interface
from torch._inductor import config, scheduler
from torch._subclasses import fake_tensor
from triton.runtime import driver
from fastbyol_bench.mocked_gpu import H100, mocked_h100

interface = device_interface.get_interface_for_device("cuda")
owners = (torch.cuda, torch._C, interface, interface.Worker, scheduler, fake_tensor, driver)
def all_of():
    return [dict(vars(owner)) for owner in owners], config.save_config_portable()
before = all_of()
try:
    with mocked_h100():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        assert torch.cuda.get_device_properties(0) is H100
        assert interface.get_compute_capability() == 90
        assert driver.active.get_current_target().arch == 90
        assert all_of() != before
        raise KeyError("left by an error")
except KeyError:
    pass
for owner, old, new in zip(owners, before[0], all_of()[0]):
    changed = {name for name in old.keys() | new.keys() if old.get(name) is not new.get(name)}
    assert not changed, (owner, changed)
assert all_of()[1] == before[1]
"""
# A convolution and the largest of its overlapping windows.
LOWERED = """
import torch
from torch.nn import functional as F
from fastbyol_bench.inductor_code import parse
from fastbyol_bench.mocked_gpu import graphs_of, lower, mocked_h100

def work(x, weight):
    return F.max_pool2d(F.conv2d(x, weight, padding=1), 3, 2, 1)

x = torch.empty(64, 64, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
weight = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16)
weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
how = {"fullgraph": True, "dynamic": False}
graphs = graphs_of(lambda backend: torch.compile(work, backend=backend, **how)(x, weight))
with mocked_h100():
    for graph in graphs:
        text, overlap_gb = lower(graph)
        code = parse(text)
        kernels = (f"{k.kind} {k.gb:.9f}" for k in code.kernels)
        others = (f"{e.name} {e.nodes}" for e in code.external)
        print(*kernels, *others, f"{overlap_gb:.9f}")
"""


def run(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_gpu_that_is_not_there_gets_code_and_leaves_nothing_patched() -> None:
    forward, backward = run(LOWERED + RESTORED).splitlines()
    pixels, pooled = 64 * 64 * 32 * 32, 64 * 64 * 16 * 16
    # Nine taps of two bytes, the maximum, and its place in a byte. The taps need each byte of their
    # buffer once.
    taps, once = 9 * 2 * pooled, 2 * pixels
    assert (
        forward
        == f"pointwise {(taps + 3 * pooled) / 1e9:.9f} convolution 1 {(taps - once) / 1e9:.9f}"
    )
    assert backward.endswith(f"convolution_backward 1 {0:.9f}")  # the images take no gradient
