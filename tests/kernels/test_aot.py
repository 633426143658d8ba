"""Every shipped kernel compiles for sm_80 and sm_90 without a GPU, and costs what the committed table says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "kernels" / "RESOURCES.txt"


def test_every_build_compiles_and_costs_what_the_table_says() -> None:
    """In a process of its own, since interpreted kernels cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fastbyol_kernels.aot"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kept = TABLE.read_text()
    assert done.stdout == kept, "renew with: python -m fastbyol_kernels.aot --write kernels/RESOURCES.txt, and say why"


def test_no_build_spills_or_moves_narrow_words_unexcused() -> None:
    """On sm_90 the memory-bound kernels move 16 bytes an access; an exception carries its reason in the last column."""
    for line in TABLE.read_text().splitlines()[1:]:
        found = re.search(r"(sm_\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) *(.*)$", line)
        assert found, line
        arch, _, spill, _, load, store, why = found.groups()
        assert int(spill) == 0 or why, line
        if arch == "sm_90":
            assert min(int(load), int(store)) >= 128 or why, line
