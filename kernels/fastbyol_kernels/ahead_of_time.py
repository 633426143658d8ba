"""Launch Triton's kernels without a GPU: compile what would run there, and say what it costs.

``recording`` pretends that a GPU is there. Whatever is launched meanwhile takes Triton's own way,
``JITFunction.run``, which specialises a kernel on its arguments and compiles it down to a cubin;
only the launch itself is left out. So a step of training on a CPU gives every launch that the same
step makes on a GPU, with the same options:

    with ahead_of_time.recording(90) as launches:
        group_norm(x, 32, weight, bias, kernels="triton")
    print(launches[0].name, launches[0].grid, launches[0].num_warps)

What the kernels would have written is never written: nothing may depend on it.
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

from fastbyol_kernels import dispatch

WARP_SIZE = 32


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, as the GPU would have had it.

    ``compiled`` is Triton's compiled kernel, with ``asm["ptx"]``, ``metadata`` and ``src``. Launches of
    the same code share it.
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
    def build(self) -> str:
        """What the code is made for: types that it points to, integers that it knows, flags.

        ``n/16`` is an integer argument that is a multiple of 16, ``x@`` a pointer that is none, which
        keeps accesses narrow. Constants that are neither integers, flags nor words are left out.
        """
        source, names = self.compiled.src, self.function.arg_names
        pointers = [name for name, kind in source.signature.items() if kind.startswith("*")]
        multiple = ["tt.divisibility", 16]
        aligned = {names[path[0]] for path, found in source.attrs.items() if multiple in found}
        words = list(dict.fromkeys(source.signature[name][1:] for name in pointers))
        words += [f"{name}@" for name in pointers if name not in aligned]
        words += [f"{name}/16" for name in names if name in aligned and name not in pointers]
        constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        words += [name if value is True else f"{name}={value}" for name, value in constants.items() if _is_known(value)]
        return " ".join(words)

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
    """A GPU of ``sm_<architecture>``, as far as Triton asks before it launches. It cannot launch."""

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
    """Let Triton believe in a GPU of ``sm_<architecture>``; list what is launched, and run none of it.

    Operations with ``kernels="triton"`` take tensors on a CPU meanwhile. On leaving, all is as it was:
    the active driver, what operations take, and what each kernel has compiled. May be nested. Grids
    must be tuples. Raises RuntimeError where kernels are interpreted.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled: start a process without it")
    launches: list[Launch] = []
    run = JITFunction.run
    touched: set[JITFunction] = set()

    def record(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        if self not in touched:
            # Compiled code is kept by the device's number, whatever the driver.
            touched.add(self)
            empty = type(self.device_caches)(self.create_binder)
            caches.enter_context(mock.patch.object(self, "device_caches", empty))
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            x, y, z = (*grid, 1, 1)[:3]
            launches.append(Launch(self, (x, y, z), compiled))
        return compiled

    with (
        ExitStack() as caches,
        mock.patch.object(driver, "_active", Driver(architecture)),
        mock.patch.object(dispatch, "TRITON_ON_CPU", True),
        mock.patch.object(JITFunction, "run", record),
    ):
        yield launches


def _is_known(value: object) -> bool:
    return isinstance(value, int | str) and value is not False


class Resources(NamedTuple):
    """What a kernel costs on one architecture, per thread.

    Widths are bits of the widest global access, 0 where there is none.
    """

    registers: int
    spill_bytes: int
    load_bits: int
    store_bits: int


def resources(ptx: str) -> Resources:
    """Return what ptxas makes of ``ptx``, and how wide its accesses are."""
    registers, spill = _ptxas(ptx)
    return Resources(registers, spill, _widest(ptx, "ld"), _widest(ptx, "st"))


def _ptxas(ptx: str) -> tuple[int, int]:
    target = re.search(r"\.target\s+(sm_(\d+)\w*)", ptx)
    assert target is not None
    # Triton's own choice: the older of its two does not read the newest PTX.
    tool = get_ptxas(int(target[2])).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        result = Path(folder) / "kernel.cubin"
        command = [str(tool), "-v", f"--gpu-name={target[1]}", str(source), "-o", str(result)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    stores = re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None, said
    return int(registers[1]), int(stores[1]) if stores else 0


def _widest(ptx: str, instruction: str) -> int:
    """Bits of the widest global access: ``ld.global.v4.b32`` is 128. Asynchronous copies count as loads."""
    access = rf"{instruction}\.global(?:\.[\w:]+)*?(?:\.v([248]))?\.[bfsu](\d+)"
    found = [int(vector or 1) * int(bits) for vector, bits in re.findall(access, ptx)]
    if instruction == "ld":
        copy = r"cp\.async\.\w+\.shared\.global[^;]*?,\s*(0x[0-9a-fA-F]+|\d+)"
        found += [8 * int(size, 0) for size in re.findall(copy, ptx)]
    return max(found, default=0)
