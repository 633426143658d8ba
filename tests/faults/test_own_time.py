"""The clock of the fault tests: it counts sleeping and computing, not waiting for a core."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from own_time import OwnTime

BUSY = (
    "import os, time; os.sched_setaffinity(0, {core}); os.nice({nice}); "
    "print(flush=True)\nwhile True: pass"
)
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this system does not count waiting in line"
)


def busy(nice: int) -> subprocess.Popen[bytes]:
    """Start a process that computes for ever on the one core that all of these share."""
    core = {min(os.sched_getaffinity(0))}
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(core=core, nice=nice)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_sleeping_is_own_time() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        began, clock = time.monotonic(), OwnTime(process.pid)
        assert not clock.waits(lambda wait_s: time.sleep(wait_s), 1.0)
        assert time.monotonic() - began >= 1.0
        process.kill()


def test_standing_in_line_is_not() -> None:
    """Run two on a core: the nicer one gets a hundredth (15 / 1024, weights of nice 19 and 0)."""
    with busy(0) as greedy, busy(19) as starved:
        clock = OwnTime(starved.pid)
        time.sleep(2.0)
        own_s = clock.seconds()
        greedy.kill()
        starved.kill()
    assert 0.0 <= own_s < 1.0


def test_a_process_that_ended_has_its_time() -> None:
    with subprocess.Popen(["sleep", "0"]) as process:
        clock = OwnTime(process.pid)
    assert clock.waits(lambda wait_s: process.poll() is not None, 1.0)
    assert 0.0 <= clock.seconds() < 60.0
