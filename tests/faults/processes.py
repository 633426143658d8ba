"""Which processes are there, as Linux writes them below /proc. One that ended and waits for its parent to look is not.

What a test starts ends with it. ``own`` marks the process that runs tests: whatever is started from then on, by it or by its
children, in any session, carries the mark in its environment, and what is forked of it dies by the kernel's hand. When the
process dies, of whatever signal, a guard that lives outside of it kills all that carry its mark; when a test fails,
``end_started_since`` does so at once. The mark is a folder's name, which the guard deletes.

    python processes.py PROCESS MARK        is that guard
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

VARIABLE = "FASTBYOL_TESTS"
# What Python starts for all tests of a process, whichever was the first to need it. The tracker ends by itself when nobody is
# left, having removed what they left in /dev/shm. The server's children look like the server.
TRACKER, SERVER = b"multiprocessing.resource_tracker", b"multiprocessing.forkserver"
PRCTL = ctypes.CDLL(None).prctl


def own() -> Path:
    """Mark this process and start its guard; the mark. A worker of pytest-xdist has its own below its master's."""
    mark = tempfile.mkdtemp(prefix="fastbyol-tests-", dir=os.environ.get(VARIABLE))
    os.environ[VARIABLE] = mark
    # A forked child has the environment that its parent was started with.
    os.register_at_fork(after_in_child=_die_with_parent)
    guard = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark]
    away = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    # Not a Popen, which complains when it is forgotten while its process runs: the guard outlives this process.
    _guards.append(str(os.posix_spawn(sys.executable, guard, os.environ, file_actions=away, setsid=True)))
    return Path(mark)


_guards: list[str] = []


def now() -> float:
    """Seconds since the machine started, which is how Linux notes when a process did."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def end_started_since(began: float) -> list[str]:
    """Kill what this process and its children have started since, but for Python's own; their numbers."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    return _end(lambda: [process for process in marked(os.environ[VARIABLE], began) if process not in _guards])


def marked(mark: str, since: float = 0.0) -> list[str]:
    """Processes that carry the mark or one that continues it, or are this one's children, not older than ``since``."""
    whole, found = f"{VARIABLE}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            ours = fields[1] == str(os.getpid()) or any(
                variable == whole or variable.startswith(whole + b"/") for variable in variables
            )
            # To the hundredth of a second, rounded down.
            begun = (int(fields[19]) + 1) / os.sysconf("SC_CLK_TCK")
            command = (folder / "cmdline").read_bytes()
            spared = TRACKER in command or (since and SERVER in command)
            if ours and begun >= since and fields[0] not in "ZX" and not spared:
                found.append(folder.name)
    return found


def _end(find: Callable[[], list[str]]) -> list[str]:
    """Kill what ``find`` finds until it finds nothing: one of them may have been starting another."""
    ended: list[str] = []
    for _ in range(1000):
        found = [process for process in find() if process != str(os.getpid())]
        if not found:
            break
        for process in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(process), signal.SIGKILL)
        ended += [process for process in found if process not in ended]
        time.sleep(0.01)
    return ended


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    PRCTL(pr_set_pdeathsig, signal.SIGKILL)


def _guard(process: int, mark: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ProcessLookupError):
        ends = os.pidfd_open(process)
        if os.getppid() == process:
            select.select([ends], [], [])
    _end(lambda: marked(mark))
    shutil.rmtree(mark, ignore_errors=True)


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


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2])
