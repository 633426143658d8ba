"""What all tests share: a cache folder that is nobody's, signals as Python has them, and Triton's
interpreter without a GPU.

And an end. pytest-timeout interrupts a test at its limit by a signal: it fails, what it started is
killed, and the others go on. Code that hangs outside of Python never sees the signal, and may hold
the lock that a thread would need to act: ``GRACE_S`` later faulthandler, which needs neither, says
where every thread is and ends the process. pytest-xdist counts that as the test's failure and has
another worker go on, with that test again, which now fails at once. The same clock runs while
pytest itself ends.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# As fastbyol's own command has it: threads that wait for others would spin, and take the cores
# from the tests beside. OpenMP reads this when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# Tests run side by side, and what they compute is small: with a thread for every core in each of
# their processes, the ones that compute took 1.4 times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import processes
import pytest
import torch
from command_line import Command
from hypothesis import HealthCheck, settings

# That a machine is busy, or that the first example waits for a compiler, is no fault of what is
# tested.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Read when a kernel is defined, so it has to stand before the first import of fastbyol_kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# FFCV's own loader starts numba's pool. Of its layers this one survives a fork; on one core TBB's
# waits at exit for ever.
os.environ["NUMBA_THREADING_LAYER"] = "workqueue"

# A compiler's work for every shape, in one test: what its own children are given, and more.
SLOW_S = 2400.0
# How long a test's fixtures may take to end after its limit, and pytest itself.
GRACE_S = 120.0
MARK, BEGAN, STDERR = pytest.StashKey[Path](), pytest.StashKey[float](), pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Whatever is started from now on ends with this process."""
    config.stash[STDERR] = os.dup(2)  # not captured yet
    config.stash[MARK] = processes.own()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Not for ever, either, what runs at exit, which may wait for children that an interrupted test
    left.
    """
    processes.end_started_since(0.0)
    if not hasattr(
        config, "workerinput"
    ):  # a worker waits for its master, which kills it if it must
        faulthandler.dump_traceback_later(GRACE_S, exit=True, file=config.stash[STDERR])


def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """Beside pytest-timeout's own."""
    faulthandler.dump_traceback_later(
        settings.timeout + GRACE_S, exit=True, file=item.config.stash[STDERR]
    )


def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    """With pytest-timeout's own."""
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note when a test began, and in a worker where its successor will look."""
    item.stash[BEGAN] = processes.now()
    if hasattr(item.config, "workerinput"):
        if _begun(item).exists():
            pytest.fail("a worker died in this test", pytrace=False)
        _begun(item).touch()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """No worker died in it."""
    if hasattr(item.config, "workerinput"):
        _begun(item).unlink(missing_ok=True)


def _begun(item: pytest.Item) -> Path:
    return item.config.stash[MARK].with_name(hashlib.sha256(item.nodeid.encode()).hexdigest())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End what a failed test started, before its fixtures wait for it."""
    report = yield
    if report.failed:
        processes.end_started_since(item.stash[BEGAN])
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes the GPU where there is one by its fixture, leave out what can run nowhere
    else, and let slow be slow.

    Spread the files of each folder over the run: tests of some wait, those of others compute, and
    side by side they fill the cores. The last in the alphabet, among them the longest, go first.
    """
    files = sorted({item.path for item in items}, reverse=True)
    of_folder = Counter(path.parent for path in files)
    done, when = Counter[Path](), dict[Path, float]()
    for path in files:
        when[path] = done[path.parent] / of_folder[path.parent]
        done[path.parent] += 1
    items.sort(key=lambda item: when[item.path])
    for item in items:
        if item.get_closest_marker("slow") and item.config.getoption("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_S))
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        needs_gpu = any(mark.kwargs.get("only") for mark in item.iter_markers("gpu"))
        if needs_gpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def run(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Command:
    """A command line in an empty folder; the module may name its first words in COMMAND."""
    monkeypatch.chdir(tmp_path)
    return Command(capsys, *getattr(request.module, "COMMAND", ()))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Give torch two threads, so that a number set to one shows."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_ctrl_c() -> Iterator[None]:
    """A command line that is done lets Ctrl-C kill its process, which here is pytest's."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _own_hangup() -> Iterator[None]:
    """Whoever started the tests may have let SIGHUP be ignored, as nohup does, and the processes
    they start would go on so.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded sets that tests make stay out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("FASTBYOL_CACHE")
    os.environ["FASTBYOL_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["FASTBYOL_CACHE"]
    else:
        os.environ["FASTBYOL_CACHE"] = before
