"""Traces of dead processes on the machine."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from processes import runs, wait_until

# Names that Python and FFCV give to shared memory, semaphores and arenas, and we to any file there.
NAMES = ("psm_", "sem.", "pym-", "fastbyol-")
# A living process maps or removes what it has made within this time, on a busy machine, too.
LASTING_S = 20.0


def in_shared_memory() -> set[str]:
    """Return the files in /dev/shm that no living process has mapped, since others may use FFCV."""
    names = {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(NAMES)}
    for maps in Path("/proc").glob("[0-9]*/maps") if names else ():
        with contextlib.suppress(OSError):
            used = maps.read_text()
            names = {name for name in names if name not in used}
    return names


def lasting_in_shared_memory(before: set[str]) -> set[str]:
    """Return the files of ``in_shared_memory`` that are not in ``before`` and stay."""
    until = time.monotonic() + LASTING_S
    while (left := in_shared_memory() - before) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def writers(parent: int) -> list[int]:
    """Return the living processes that write a beton for ``parent``, whether that lives or not."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            ours = b"beton_worker" in b" ".join(words) and words[-1] == str(parent).encode()
            if ours and runs(folder.name):
                found.append(int(folder.name))
    return found


def wait_for_writers(parent: int) -> None:
    """Return once no process writes for ``parent`` any more."""
    wait_until(lambda: not writers(parent))
