"""Traces of dead processes on the machine."""

from __future__ import annotations

import contextlib
from pathlib import Path

# Names that Python and FFCV give to shared memory, semaphores and arenas, and we to any file there.
NAMES = ("psm_", "sem.", "pym-", "fastbyol-")


def in_shared_memory() -> set[str]:
    """Return the files in /dev/shm that no living process has mapped, since others may use FFCV."""
    names = {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(NAMES)}
    for maps in Path("/proc").glob("[0-9]*/maps") if names else ():
        with contextlib.suppress(OSError):
            used = maps.read_text()
            names = {name for name in names if name not in used}
    return names
