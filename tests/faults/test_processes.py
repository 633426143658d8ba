"""The tests themselves end: at their limit, and with all they started when pytest is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[2]

# A session's only file: ``{body}`` is what the first test does after its children have begun.
SESSION = """
import ctypes, multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import conftest

def reach_the_limit(test, grace_s):  # in a second
    conftest.GRACE_S = grace_s
    conftest.pytest_timeout_set_timer(test, SimpleNamespace(timeout=1.0))
    signal.setitimer(signal.ITIMER_REAL, 1.0)

def deadlock():  # outside of Python, with its lock held, and no signal ends it
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)

PARENT = '''
import subprocess
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, flush=True)
child.wait()
'''

def test_that_hangs(request):
    away = subprocess.Popen([sys.executable, "-c", PARENT], start_new_session=True,
    stdout=subprocess.PIPE, text=True)
    started = [away.pid, int(away.stdout.readline())]
    forked = os.fork()
    if not forked:
        time.sleep(600)
    started.append(forked)
    served = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,))
    served.start()
    started.append(served.pid)
    Path("started.tmp").write_text(" ".join(map(str, [os.getpid(), os.getppid(), *started])))
    Path("started.tmp").rename("started")
    {body}

def test_that_passes():
    pass
"""


def session(folder: Path, body: str, *options: str) -> subprocess.Popen[str]:
    """Start pytest in ``folder`` with the fixtures that all tests share."""
    (folder / "test_session.py").write_text(SESSION.replace("{body}", body))
    (folder / "pytest.ini").write_text("[pytest]\ntimeout = 600\ntimeout_method = signal\n")
    paths = [str(ROOT / "tests"), str(ROOT / "tests" / "faults"), *sys.path]
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        *options,
        "test_session.py",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def started(folder: Path, child: subprocess.Popen[str]) -> list[int]:
    """Return the process of the test, its parent, and its four children, once they are there."""
    processes.wait_until((folder / "started").exists, child)
    return [int(word) for word in (folder / "started").read_text().split()]


@pytest.mark.parametrize(
    ("killed", "number"),
    [
        ("pytest", signal.SIGKILL),
        ("pytest", signal.SIGINT),
        ("worker", signal.SIGKILL),
        ("master", signal.SIGKILL),
        ("master", signal.SIGTERM),
    ],
)
def test_killed_in_a_test_it_leaves_nobody(
    tmp_path: Path, killed: str, number: signal.Signals
) -> None:
    """Start children in their own sessions, a grandchild, a fork and a fork server's."""
    options = (
        ("-p", "no:xdist") if killed == "pytest" else ("--numprocesses", "2", "--dist", "loadfile")
    )
    child = session(tmp_path, "time.sleep(600)", *options)
    runner, parent, *others = started(tmp_path, child)
    assert all(map(processes.runs, others))
    os.kill({"pytest": runner, "worker": runner, "master": parent}[killed], number)
    output, _ = child.communicate(timeout=processes.PATIENCE_S)
    assert child.returncode != 0, output
    processes.wait_for_end([runner, *others])
    if killed == "worker":
        assert "1 failed, 1 passed, 1 error" in output


def test_at_its_limit_a_test_fails_and_the_others_go_on(tmp_path: Path) -> None:
    """Wait for a child that does not end, as the session's end would, too."""
    child = session(
        tmp_path, "reach_the_limit(request.node, 100.0); served.join()", "-p", "no:xdist"
    )
    output, _ = child.communicate(timeout=processes.PATIENCE_S)
    assert child.returncode == 1, output
    assert "1 failed, 1 passed" in output
    processes.wait_for_end([int(word) for word in (tmp_path / "started").read_text().split()][2:])


def test_a_hang_outside_of_python_ends_the_process(tmp_path: Path) -> None:
    child = session(tmp_path, "reach_the_limit(request.node, 1.0); deadlock()", "-p", "no:xdist")
    output, _ = child.communicate(timeout=processes.PATIENCE_S)
    assert child.returncode == 1, output
    assert re.search(r"line \d+ in deadlock\n", output), output
    processes.wait_for_end([int(word) for word in (tmp_path / "started").read_text().split()][2:])


def test_a_hang_outside_of_python_costs_a_worker(tmp_path: Path) -> None:
    """Expect another worker, to which xdist gives the same test again."""
    child = session(
        tmp_path,
        "reach_the_limit(request.node, 1.0); deadlock()",
        "--numprocesses",
        "2",
        "--dist",
        "loadfile",
    )
    output, _ = child.communicate(timeout=processes.PATIENCE_S)
    assert child.returncode == 1, output
    assert "1 failed, 1 passed, 1 error" in output
    assert "a worker died in this test" in output
    assert "crashed while running 'test_session.py::test_that_hangs'" in output


def test_a_hang_at_exit_is_a_failure(tmp_path: Path) -> None:
    child = session(
        tmp_path,
        "import atexit; atexit.register(deadlock); conftest.GRACE_S = 1.0; served.kill(); "
        "served.join()",
        "-p",
        "no:xdist",
    )
    output, _ = child.communicate(timeout=processes.PATIENCE_S)
    assert child.returncode == 1, output
    assert "2 passed" in output


def test_waiting_for_what_an_ended_process_would_have_done_is_over_at_once() -> None:
    with (
        subprocess.Popen(
            [sys.executable, "-c", "raise SystemExit('no room')"], stderr=subprocess.PIPE, text=True
        ) as child,
        pytest.raises(AssertionError, match="no room"),
    ):
        processes.wait_until(lambda: False, child)
    processes.wait_until(lambda: True, child)
