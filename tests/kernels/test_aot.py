"""Every shipped kernel compiles for sm_80 and sm_90 without a GPU, and costs what the committed table says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "kernels" / "RESOURCES.txt"


def compiling(*arguments: str) -> str:
    """What Python prints in a process of its own, since interpreted kernels cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_build_compiles_and_costs_what_the_table_says() -> None:
    kept = TABLE.read_text()
    assert compiling("-m", "fastbyol_kernels.aot") == kept, (
        "renew with: python -m fastbyol_kernels.aot --write kernels/RESOURCES.txt, and say why"
    )


BARRIERS = """
from fastbyol_kernels import aot, two_views
for build in two_views.BUILDS:
    if "blur" in build.name:
        for architecture in aot.ARCHITECTURES:
            ptx = aot.compile_ahead(build, architecture).asm["ptx"]
            print(build.constants["KERNEL"], ptx.count("bar.sync"))
"""


def test_every_pass_of_a_blur_ends_in_a_barrier() -> None:
    """A program's threads read what others of it have written to global memory: bar.sync orders that within a block."""
    counted = [tuple(map(int, line.split())) for line in compiling("-c", BARRIERS).splitlines()]
    assert {taps == 0 for taps, _ in counted} == {True, False}
    for taps, barriers in counted:
        assert barriers >= (5 if taps == 0 else 1)


def test_no_build_spills_or_moves_narrow_words_unexcused() -> None:
    """On sm_90 the memory-bound kernels move 16 bytes an access; an exception carries its reason in the last column."""
    for line in TABLE.read_text().splitlines()[1:]:
        found = re.search(r"(sm_\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) *(.*)$", line)
        assert found, line
        arch, _, spill, _, load, store, why = found.groups()
        assert int(spill) == 0 or why, line
        if arch == "sm_90":
            assert min(int(load), int(store)) >= 128 or why, line
