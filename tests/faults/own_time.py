"""How long a process took by itself: a limit in seconds must not fire because others hold the cores.

Linux counts for every thread how long it was ready to run and stood in line (``schedstat``, the second number, nanoseconds).
What is left of the time on the wall is the process's own: computing, sleeping, waiting for a lock or a disk. A hang is that.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.05


def ends(child: subprocess.Popen[bytes]) -> Callable[[float], bool]:
    """For ``OwnTime.waits``: whether ``child`` has ended. What it says must fit into a pipe, 64 KiB."""

    def ready(wait_s: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(wait_s)
        return child.returncode is not None

    return ready


class OwnTime:
    """A clock that starts when it is made. What threads that ended stood in line after the last look is not seen."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._before = self._in_line()
        self._now = dict(self._before)
        self._began = time.monotonic()

    def seconds(self) -> float:
        """What the process had of the time since. Where the system does not count, all of it."""
        self._now |= self._in_line()
        in_line_ns = sum(ns - self._before.get(thread, 0) for thread, ns in self._now.items())
        return time.monotonic() - self._began - in_line_ns / 1e9

    def waits(self, ready: Callable[[float], object], limit_s: float) -> bool:
        """Until ``ready``, which is given a time to wait, says so: true, or false after ``limit_s`` of the process's own."""
        while not ready(POLL_S):
            if self.seconds() > limit_s:
                return False
        return True

    def _in_line(self) -> dict[str, int]:
        found = {}
        for folder in Path(f"/proc/{self._process}/task").glob("*"):
            with contextlib.suppress(OSError, IndexError):
                found[folder.name] = int((folder / "schedstat").read_text().split()[1])
        return found
