"""Compile every shipped kernel ahead of time, without a GPU, and say what it costs the chip.

Each op's file lists what the engine launches in ``BUILDS``, a tuple of ``Build``. ``python -m fastbyol_kernels.aot``
compiles them all for sm_80 and sm_90 and prints one line each: registers and spilled bytes per thread (from ptxas),
shared memory per block, and the widest global load and store (from the PTX). The lines are kept in
``kernels/RESOURCES.txt``; a test compares, so that a regression shows as a diff. ``--write FILE`` renews it.

Unset TRITON_INTERPRET here: interpreted functions cannot be compiled.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

OPS = ("philox", "two_views", "weight_standardization", "group_norm", "lars_ema")
ARCHITECTURES = (80, 90)
WARP_SIZE = 32


@dataclass(frozen=True)
class Build:
    """One kernel as the engine launches it.

    ``signature`` gives the Triton type of every argument that is no constexpr (``*fp32``, ``*bf16``, ``i32``, ...),
    ``constants`` the constexprs. ``aligned`` names the arguments that are divisible by 16: base pointers of segments
    padded to 256 bytes, row lengths. Without ``fp_fusion`` products and sums stay apart. ``why`` excuses spills or narrow
    accesses in the report.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    fp_fusion: bool = True
    why: str = ""


class Resources(NamedTuple):
    """What one build costs on one architecture. Widths are bits of the widest access, 0 where there is none."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    load_bits: int
    store_bits: int


def builds() -> dict[str, tuple[Build, ...]]:
    """Op name -> its builds. An op without kernels of its own has none."""
    return {op: getattr(importlib.import_module(f"fastbyol_kernels.{op}"), "BUILDS", ()) for op in OPS}


def resources(build: Build, architecture: int) -> Resources:
    """Compile ``build`` for ``sm_<architecture>`` and read its cost off the PTX and ptxas."""
    compiled = compile_ahead(build, architecture)
    ptx = compiled.asm["ptx"]
    registers, spill = _ptxas(ptx, architecture)
    return Resources(registers, spill, compiled.metadata.shared, _widest(ptx, "ld"), _widest(ptx, "st"))


def compile_ahead(build: Build, architecture: int) -> Any:
    """``build`` for ``sm_<architecture>`` as Triton's compiled kernel: ``asm["ptx"]``, ``metadata``."""
    names = build.kernel.arg_names
    signature = {name: "constexpr" if name in build.constants else build.signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned}
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=dict(build.constants), attrs=attrs)
    options = {
        "num_warps": build.num_warps,
        "num_stages": build.num_stages,
        "maxnreg": build.max_registers,
        "enable_fp_fusion": build.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", architecture, WARP_SIZE), options=options)


def _ptxas(ptx: str, architecture: int) -> tuple[int, int]:
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None
    tool = get_ptxas(architecture).path  # Triton's own choice: the oldest of its two does not read the newest PTX
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
        found += [8 * int(size) for size in re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?,\s*(?:0x)?(\d+)", ptx)]
    return max(found, default=0)


def report() -> str:
    """The table, one line per build and architecture."""
    lines = [f"{'op':24}{'build':40}{'arch':6}{'regs':>5}{'spill B':>8}{'shared B':>9}{'load b':>7}{'store b':>8}  why"]
    for op, made in builds().items():
        for build in made:
            for architecture in ARCHITECTURES:
                cost = resources(build, architecture)
                figures = f"{cost.registers:5}{cost.spill_bytes:8}{cost.shared_bytes:9}{cost.load_bits:7}{cost.store_bits:8}"
                lines.append(f"{op:24}{build.name:40}sm_{architecture:<3}{figures}  {build.why}".rstrip())
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table; with ``--write FILE`` keep it."""
    text = report()
    print(text, end="")
    if len(sys.argv) == 3 and sys.argv[1] == "--write":
        Path(sys.argv[2]).write_text(text)


if __name__ == "__main__":
    main()
