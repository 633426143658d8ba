"""Processes of tests, as Linux lists them below /proc (zombies aside), and their end with the test.

Whatever the marked process or its children start carries the mark, a folder's name, in its
environment, and its forks die with it. When it dies, a guard kills all that carry the mark.
``python processes.py PROCESS MARK`` is that guard.
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
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

VARIABLE = "FASTBYOL_TESTS"
# What a process may take on a machine that does other things too.
PATIENCE_S = 600.0
# Python starts these for all tests of a process. The tracker ends by itself after its last user and
# cleans /dev/shm. The server's children look like the server.
TRACKER, SERVER = b"multiprocessing.resource_tracker", b"multiprocessing.forkserver"
PRCTL = ctypes.CDLL(None).prctl


def own() -> Path:
    """Mark this process, start its guard and return the mark.

    A worker of pytest-xdist has its own mark below its master's.
    """
    mark = tempfile.mkdtemp(prefix="fastbyol-tests-", dir=os.environ.get(VARIABLE))
    os.environ[VARIABLE] = mark
    # A forked child has the environment that its parent was started with.
    os.register_at_fork(after_in_child=_die_with_parent)
    guard = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark]
    away = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    # Not a Popen, which complains when it is forgotten while its process runs: the guard outlives
    # this process.
    _guards.append(
        str(os.posix_spawn(sys.executable, guard, os.environ, file_actions=away, setsid=True))
    )
    return Path(mark)


_guards: list[str] = []


def now() -> float:
    """Return seconds since the machine started, Linux's unit for a process's start."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def end_started_since(began: float) -> list[str]:
    """Kill what this process and its children started since, but for Python's own; return ids."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    return _end(
        lambda: [
            process for process in marked(os.environ[VARIABLE], began) if process not in _guards
        ]
    )


def marked(mark: str, since: float = 0.0) -> list[str]:
    """Return processes with the mark or a longer one, or this one's children, since ``since``."""
    whole, matches = f"{VARIABLE}={mark}".encode(), []
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
                matches.append(folder.name)
    return matches


def _end(find: Callable[[], list[str]]) -> list[str]:
    """Kill what ``find`` finds until it finds nothing: one may have been starting another."""
    ended: list[str] = []
    for _ in range(1000):
        matches = [process for process in find() if process != str(os.getpid())]
        if not matches:
            break
        for process in matches:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(process), signal.SIGKILL)
        ended += [process for process in matches if process not in ended]
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


def wait_until(true: Callable[[], object], *needed: Any) -> None:
    """Return once ``true()`` holds; fail after ``PATIENCE_S``, or when one of ``needed`` has ended.

    Each of ``needed`` is a process of subprocess or multiprocessing or a job of submitit.
    """
    until = time.monotonic() + PATIENCE_S
    while not true():
        for process in needed:
            # It may have become true just before the end.
            if _has_ended(process) and not true():
                raise AssertionError(f"{process} ended before: {_last_words(process)}")
        if time.monotonic() > until:
            raise AssertionError(f"not true after {PATIENCE_S:.0f} s")
        time.sleep(0.01)


def _has_ended(process: Any) -> bool:
    if hasattr(process, "poll"):
        return process.poll() is not None
    return process.done() if hasattr(process, "done") else not process.is_alive()


def _last_words(process: Any) -> object:
    if hasattr(process, "communicate"):
        return process.communicate()
    return process.stderr() if hasattr(process, "stderr") else process.exitcode


def wait_for_end(numbers: Collection[int | str]) -> None:
    """Return once none of the processes runs."""
    wait_until(lambda: not any(map(runs, numbers)))


def runs(process: int | str) -> bool:
    """Return whether the process has not ended."""
    return bool(_state_and_group(Path(f"/proc/{process}/stat")))


def left(group: int, within_s: float) -> list[str]:
    """Return ids and commands of a group's processes still there after ``within_s`` seconds."""
    until = time.monotonic() + within_s
    while (matches := of_group(group)) and time.monotonic() < until:
        time.sleep(0.02)
    return matches


def of_group(group: int) -> list[str]:
    """Return id and command of each process of a group."""
    matches = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if _state_and_group(stat)[1:] == [str(group)]:
            with contextlib.suppress(OSError):
                matches.append(f"{stat.parent.name} {(stat.parent / 'cmdline').read_text()}")
    return matches


def _state_and_group(stat: Path) -> list[str]:
    with contextlib.suppress(OSError):
        state, _, group = stat.read_text().rpartition(") ")[2].split()[:3]
        return [] if state in "ZX" else [state, group]
    return []


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2])
