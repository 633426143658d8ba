"""Kernels are compiled as for a launch, without a GPU, and everything is restored."""

from __future__ import annotations

import pytest

from compiled_process import printed
from fastbyol_kernels import ahead_of_time

STEP = """
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from fastbyol_kernels import ahead_of_time, dispatch
from fastbyol_kernels.group_norm import group_norm, triton as ops

x = torch.zeros(4, 64, 24, 24,
dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
kernels = (ops._forward_kernel, ops._backward_kernel)

def step():
    group_norm(x, 32, weight, bias, relu=True, kernels="triton").sum().backward()
"""

RECORDED = """
plan = ops.launch(576, 64, 32, 2, 1, ops.MAX_BYTES_FORWARD)
back = ops.launch(576, 64, 32, 2, 2, ops.MAX_BYTES_BACKWARD)
expected = [
    ("_forward_kernel", (4 * 64 // plan.slab, 1, 1), plan.num_warps),
    ("_backward_kernel", (4 * 64 // back.slab, 1, 1), back.num_warps),
]
for architecture in (80, 90):
    with ahead_of_time.recording(architecture) as launches:
        step()
        step()
    assert [(launch.name, launch.grid, launch.num_warps) for launch in launches] == 2 * expected
    assert {launch.module for launch in launches} == {"fastbyol_kernels.group_norm.triton"}
    for first, second in zip(launches[:2], launches[2:], strict=True):
        assert first.compiled is second.compiled
        assert f".target sm_{architecture}" in first.compiled.asm["ptx"]
        assert first.compiled.asm["cubin"]
        assert ahead_of_time.resources(first.compiled.asm["ptx"]).registers <= ops.MAX_REGISTERS
    # Left to itself Triton takes three, which is what a launch that does not ask for stages gets.
    assert {launch.num_stages for launch in launches} == {3}
"""

RESTORED = """
before = driver._active, JITFunction.run, dispatch.TRITON_ON_CPU
kernels[0].device_caches["kept"] = "compiled before"
for _ in range(2):
    try:
        with ahead_of_time.recording(90) as outer:
            step()
            with ahead_of_time.recording(80) as inner:
                step()
            step()
            1 / 0
    except ZeroDivisionError:
        pass
    assert (len(outer), len(inner)) == (4, 2)
    assert [launch.compiled.metadata.target.arch for launch in outer] == 4 * [90]
    assert [launch.compiled.metadata.target.arch for launch in inner] == 2 * [80]
    assert (driver._active, JITFunction.run, dispatch.TRITON_ON_CPU) == before
    assert dict(kernels[0].device_caches) == {"kept": "compiled before"}
    assert not kernels[1].device_caches
try:
    step()
except ValueError as error:
    print(error)
"""


def test_launches_are_recorded_as_they_would_be_made() -> None:
    printed(STEP + RECORDED)


def test_all_is_as_it_was_afterwards() -> None:
    assert "needs CUDA, x is on cpu" in printed(STEP + RESTORED)


def test_interpreted_kernels_are_refused() -> None:
    refused = (
        "try:\n    ahead_of_time.recording(90).__enter__()\nexcept RuntimeError as error:\n "
        "   print(error)"
    )
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\nfrom fastbyol_kernels import "
        f"ahead_of_time\n{refused}"
    )
    assert "start a process without it" in printed(code)


@pytest.mark.parametrize(
    ("instruction", "ptx", "bits"),
    [
        ("ld", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];", 128),
        (
            "ld",
            "ld.global.L1::evict_first.v2.b32 {%r1, %r2}, [ %rd1 + 0 ];\nld.global.b16 %rs1, [ "
            "%rd1 ];",
            64,
        ),
        ("ld", "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 128),
        ("ld", "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 4, 4;", 32),
        ("st", "st.global.v2.b64 [ %rd1 ], {%rd2, %rd3};\nst.shared.v4.b32 [ %r1 ], {%r2};", 128),
        ("st", "ld.global.b32 %r1, [ %rd1 ];", 0),
    ],
)
def test_the_widest_access_is_read_off_the_ptx(instruction: str, ptx: str, bits: int) -> None:
    assert ahead_of_time._widest(ptx, instruction) == bits
