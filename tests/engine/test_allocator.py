"""Blocks that are freed and asked for again cost no new pages."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

from fastbyol.engine import allocator

CHILD = """
import resource, sys, torch
from fastbyol.engine.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for count in (20, 8):  # the heap settles, then is measured
    before = faults()
    for _ in range(count):
        torch.ones(16 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_blocks_are_used_again() -> None:
    pages = 8 * (64 << 20) // resource.getpagesize()

    def faults(how: str) -> int:
        return int(
            subprocess.run(
                [sys.executable, "-c", CHILD, how], capture_output=True, text=True, check=True
            ).stdout
        )

    # Nothing but the eight blocks is allocated in between; a tenth is left for the interpreter.
    # With huge pages the default takes few faults too, so the comparison is with the pages that
    # small ones would take.
    assert faults("kept") < pages / 10


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
