"""Launch Triton's kernels without a GPU: compile what would run there, record how, and say what it costs the chip.

``recording`` pretends that a GPU is there. Whatever is launched meanwhile takes Triton's own way, ``JITFunction.run``, which
specialises a kernel on its arguments and compiles it down to a cubin; only the launch itself is left out. So a step of training
on a CPU gives every launch that the same step makes on a GPU, with the options that it makes it with:

    with ahead_of_time.recording(90) as launches:
        group_norm(x, 32, weight, bias, kernels="triton")
    print(launches[0].name, launches[0].grid, launches[0].num_warps)

What the kernels would have written stays as it was allocated: nothing may depend on it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastbyol_kernels import choice

WARP_SIZE = 32


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, as the GPU would have had it.

    ``compiled`` is Triton's compiled kernel: ``asm["ptx"]``, ``metadata``, ``src``. Launches of the same code share it.
    """

    function: JITFunction
    grid: tuple[int, int, int]
    compiled: Any

    @property
    def name(self) -> str:
        """The function's name in the source."""
        name: str = self.function.fn.__name__
        return name

    @property
    def module(self) -> str:
        """The dotted name of the module that defines it."""
        module: str = self.function.fn.__module__
        return module

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return int(self.compiled.metadata.num_warps)

    @property
    def num_stages(self) -> int:
        """Stages of its software pipeline."""
        return int(self.compiled.metadata.num_stages)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program, in bytes."""
        return int(self.compiled.metadata.shared)


@dataclass(frozen=True)
class Driver:
    """A GPU of compute capability ``architecture`` / 10, as far as Triton asks before it launches. It cannot launch."""

    architecture: int

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what Triton compiles for."""
        return GPUTarget("cuda", self.architecture, WARP_SIZE)

    def get_active_torch_device(self) -> torch.device:
        """Return where torch's tensors are."""
        return torch.device("cuda", 0)


@contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Let Triton believe in a GPU of ``sm_<architecture>``; gather in a list what is launched, and run none of it.

    Operations with ``kernels="triton"`` take tensors on a CPU meanwhile. On leaving, all is as it was: the active driver, what
    operations take, and what each kernel has compiled. May be nested. Grids must be tuples. Raises RuntimeError where kernels
    are interpreted.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled, so start a process without it")
    launches: list[Launch] = []
    run = JITFunction.run
    touched: set[JITFunction] = set()

    def record(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        if self not in touched:
            # Compiled code is kept by the device's number, whatever the driver.
            touched.add(self)
            caches.enter_context(mock.patch.object(self, "device_caches", type(self.device_caches)(self.create_binder)))
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            x, y, z = (*grid, 1, 1)[:3]
            launches.append(Launch(self, (x, y, z), compiled))
        return compiled

    with (
        ExitStack() as caches,
        mock.patch.object(driver, "_active", Driver(architecture)),
        mock.patch.object(choice, "TRITON_ON_CPU", True),
        mock.patch.object(JITFunction, "run", record),
    ):
        yield launches


class Resources(NamedTuple):
    """What a kernel costs on one architecture. Widths are bits of the widest global access, 0 where there is none."""

    registers: int
    spill_bytes: int
    load_bits: int
    store_bits: int


def resources(ptx: str) -> Resources:
    """Return what ptxas makes of ``ptx``, per thread, and how wide its accesses are."""
    registers, spill = _ptxas(ptx)
    return Resources(registers, spill, _widest(ptx, "ld"), _widest(ptx, "st"))


def _ptxas(ptx: str) -> tuple[int, int]:
    target = re.search(r"\.target\s+(sm_(\d+)\w*)", ptx)
    assert target is not None
    tool = get_ptxas(int(target[2])).path  # Triton's own choice: the oldest of its two does not read the newest PTX
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={target[1]}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    stores = re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None, said
    return int(registers[1]), int(stores[1]) if stores else 0


def _widest(ptx: str, instruction: str) -> int:
    """Bits of the widest global access: ``ld.global.v4.b32`` is 128. Asynchronous copies count as loads."""
    found = [
        int(vector or 1) * int(bits)
        for vector, bits in re.findall(rf"{instruction}\.global(?:\.[\w:]+)*?(?:\.v([248]))?\.[bfsu](\d+)", ptx)
    ]
    if instruction == "ld":
        copies = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?,\s*(0x[0-9a-fA-F]+|\d+)", ptx)
        found += [8 * int(size, 0) for size in copies]
    return max(found, default=0)
