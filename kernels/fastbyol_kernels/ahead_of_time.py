"""Compilation of Triton kernels without a GPU: the launches of an operation and what they cost."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
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
    """A launch of a Triton kernel.

    ``compiled`` is Triton's compiled kernel, with ``asm["ptx"]``, ``metadata`` and ``src``.
    Launches of the same code have the same one. ``num_bytes`` are those of all tensors that it has:
    what it moves if it reads or writes each once.
    """

    function: JITFunction
    grid: tuple[int, int, int]
    compiled: Any
    num_bytes: int = 0

    @property
    def name(self) -> str:
        """The function's name in the source."""
        return str(self.function.fn.__name__)

    @property
    def module(self) -> str:
        """The dotted name of the module that defines the function."""
        return str(self.function.fn.__module__)

    @property
    def build(self) -> str:
        """The values that the code is specialised on: pointer types, integers, flags and words.

        ``n/16`` is an integer argument that is a multiple of 16. ``x@`` is a pointer that is not,
        which keeps accesses narrow. Constants of other types are left out.
        """
        source, names = self.compiled.src, self.function.arg_names
        # A tuple's elements, of one type here, have paths of their own.
        kinds = {n: k if isinstance(k, str) else k[0] for n, k in source.signature.items()}
        pointers = [name for name, kind in kinds.items() if kind.startswith("*")]
        multiple = ["tt.divisibility", 16]
        multiples = Counter(
            names[path[0]] for path, attributes in source.attrs.items() if multiple in attributes
        )
        aligned = {
            name
            for name, count in multiples.items()
            if isinstance(source.signature[name], str) or count == len(source.signature[name])
        }
        words = list(dict.fromkeys(kinds[name][1:] for name in pointers))
        words += [f"{name}@" for name in pointers if name not in aligned]
        words += [f"{name}/16" for name in names if name in aligned and name not in pointers]
        constants = {
            names[path[0]]: value for path, value in source.constants.items() if len(path) == 1
        }
        for name, value in constants.items():
            if isinstance(value, int | str) and value is not False:
                words.append(name if value is True else f"{name}={value}")
        return " ".join(words)

    @property
    def num_warps(self) -> int:
        """The warps of a program."""
        return int(self.compiled.metadata.num_warps)

    @property
    def num_stages(self) -> int:
        """The stages of a program's software pipeline."""
        return int(self.compiled.metadata.num_stages)

    @property
    def shared_bytes(self) -> int:
        """The shared memory of a program, in bytes."""
        return int(self.compiled.metadata.shared)


@dataclass(frozen=True)
class Driver:
    """A stand-in for the driver of one ``sm_<architecture>`` GPU, with what a launch asks for."""

    architecture: int

    def get_current_device(self) -> int:
        """Return the device's number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return the target that Triton compiles for."""
        return GPUTarget("cuda", self.architecture, WARP_SIZE)

    def get_active_torch_device(self) -> torch.device:
        """Return the device of torch's tensors."""
        return torch.device("cuda", 0)


@contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Record launches, compiled for a GPU of ``sm_<architecture>``, without running them.

        with ahead_of_time.recording(90) as launches:
            group_norm(x, 32, weight, bias, kernels="triton")
        print(launches[0].name, launches[0].grid, launches[0].num_warps)

    Inside, operations with ``kernels="triton"`` accept CPU tensors, so a training step on a CPU
    lists every launch that it makes on a GPU. Outputs stay unwritten: nothing may depend on their
    values. On exit the active driver, the accepted devices and the kernels' caches are restored.
    Contexts nest. Grids must be tuples. Raises RuntimeError if kernels are interpreted.
    """
    if knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels cannot be compiled: start a process without it"
        )
    launches: list[Launch] = []
    run = JITFunction.run
    touched: set[JITFunction] = set()

    def record(
        self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any
    ) -> Any:
        if self not in touched:
            # Triton keeps compiled code under the device's number, whatever the driver.
            touched.add(self)
            empty = type(self.device_caches)(self.create_binder)
            caches.enter_context(mock.patch.object(self, "device_caches", empty))
        # Triton's own path with its own options: it specialises the kernel on its arguments and
        # compiles it to a cubin, but ``warmup`` keeps it from launching.
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            x, y, z = (*grid, 1, 1)[:3]
            tensors = {id(leaf): leaf for leaf in _tensors(args)}
            num_bytes = sum(map(_num_bytes, tensors.values()))
            launches.append(Launch(self, (x, y, z), compiled, num_bytes))
        return compiled

    with (
        ExitStack() as caches,
        mock.patch.object(driver, "_active", Driver(architecture)),
        mock.patch.object(dispatch, "TRITON_ON_CPU", True),
        mock.patch.object(JITFunction, "run", record),
    ):
        yield launches


def _tensors(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)


def _num_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor without repetitions of an expanded one."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sides if stride)


class Resources(NamedTuple):
    """The cost of a kernel per thread on one architecture.

    ``load_bits`` and ``store_bits`` are the widths of the widest global accesses, 0 without any.
    """

    registers: int
    spill_bytes: int
    load_bits: int
    store_bits: int


def resources(ptx: str) -> Resources:
    """Return ptxas' registers and spills for ``ptx``, and the widths of its accesses."""
    target = re.search(r"\.target\s+(sm_(\d+)\w*)", ptx)
    assert target is not None
    # Triton ships two versions of ptxas and chooses: the older one cannot read the newest PTX.
    tool = get_ptxas(int(target[2])).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            str(tool),
            "-v",
            f"--gpu-name={target[1]}",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    stores = re.search(r"(\d+) bytes spill stores", report)
    assert registers is not None, report
    return Resources(
        int(registers[1]), int(stores[1]) if stores else 0, _widest(ptx, "ld"), _widest(ptx, "st")
    )


def _widest(ptx: str, instruction: str) -> int:
    """Return the bits of the widest global access: 128 for ``ld.global.v4.b32``.

    Asynchronous copies count as loads.
    """
    access = rf"{instruction}\.global(?:\.[\w:]+)*?(?:\.v([248]))?\.[bfsu](\d+)"
    widths = [int(vector or 1) * int(bits) for vector, bits in re.findall(access, ptx)]
    if instruction == "ld":
        copy = r"cp\.async\.\w+\.shared\.global[^;]*?,\s*(0x[0-9a-fA-F]+|\d+)"
        widths += [8 * int(size, 0) for size in re.findall(copy, ptx)]
    return max(widths, default=0)
