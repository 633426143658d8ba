"""Which processes are there, as Linux writes them below /proc. One that ended and waits for its parent to look is not."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path


def runs(process: int | str) -> bool:
    """Whether the process has not ended."""
    return bool(_state_and_group(Path(f"/proc/{process}/stat")))


def left(group: int, within_s: float) -> list[str]:
    """Number and command of each process of a group that is still there after ``within_s`` seconds; none as soon as none is."""
    until = time.monotonic() + within_s
    while (found := of_group(group)) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def of_group(group: int) -> list[str]:
    """Number and command of each process of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if _state_and_group(stat)[1:] == [str(group)]:
            with contextlib.suppress(OSError):
                found.append(f"{stat.parent.name} {(stat.parent / 'cmdline').read_text()}")
    return found


def _state_and_group(stat: Path) -> list[str]:
    with contextlib.suppress(OSError):
        state, _, group = stat.read_text().rpartition(") ")[2].split()[:3]
        return [] if state in "ZX" else [state, group]
    return []
