"""A process's own time, so that a limit does not fire because others hold the cores.

Linux counts how long each thread was ready and waited for a core (``schedstat``, second number,
ns). The rest of the wall time is its own: computing, sleeping, waiting for a lock or disk.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.05


def ends(child: subprocess.Popen[bytes]) -> Callable[[float], bool]:
    """Return a wait for the end of ``child``, whose output must fit into a pipe, 64 KiB."""

    def ready(wait_s: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(wait_s)
        return child.returncode is not None

    return ready


class OwnTime:
    """A clock that starts when it is made; waits of threads that have ended are not seen."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._before = self._in_line()
        self._now = dict(self._before)
        self._began = time.monotonic()

    def seconds(self) -> float:
        """Return the process's own time since; all time where the system does not count."""
        self._now |= self._in_line()
        in_line_ns = sum(ns - self._before.get(thread, 0) for thread, ns in self._now.items())
        return time.monotonic() - self._began - in_line_ns / 1e9

    def waits(self, ready: Callable[[float], object], limit_s: float) -> bool:
        """Wait until ``ready(seconds)`` is true; return False after ``limit_s`` of own time."""
        while not ready(POLL_S):
            if self.seconds() > limit_s:
                return False
        return True

    def _in_line(self) -> dict[str, int]:
        times = {}
        for folder in Path(f"/proc/{self._process}/task").glob("*"):
            with contextlib.suppress(OSError, IndexError):
                times[folder.name] = int((folder / "schedstat").read_text().split()[1])
        return times
