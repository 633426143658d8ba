"""A loader always ends, left early, interrupted, forked or spawned, and leaves nothing behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import BaseContext
from pathlib import Path

import processes
import pytest
import run_rig as rig
import torch
from own_time import OwnTime, ends

import foreign_betons as foreign
from fastbyol.data.loader import Loader, open_loader

EPOCHS = rig.many(100, 300)
SETTLED = 10
SETTLES_S = 0.5
BREAKS = rig.many(100, 1000)
CTRL_CS = rig.many(4, 50)
# The limit for leaving after Ctrl-C.
LEAVE_S = 5.0


def opened(name: str = "jpg", cache: str = "none", batch_size: int = 32) -> Loader:
    path = foreign.made() / f"{name}.beton"
    return open_loader(
        path, batch_size=batch_size, seed=1, device="cpu", cache=cache, workers=2, size=16
    )  # type: ignore[arg-type]


def resident_kib() -> int:
    """Return this process's own memory in KiB, without what it shares with files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def use() -> tuple[int, int]:
    """Return the numbers of threads, native ones too, and of open files."""
    return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))


def settled() -> tuple[int, int]:
    """Return ``use()`` once it is stable: a joined thread may leave the system's list late.

    What earlier tests left to the garbage collector is not counted.
    """
    gc.collect()
    clock, actual = OwnTime(os.getpid()), use()
    while clock.seconds() < SETTLES_S:
        time.sleep(0.005)
        if (now := use()) != actual:
            clock, actual = OwnTime(os.getpid()), now
    return actual


def wait_for(before: tuple[int, int]) -> None:
    """Return once threads and files have come down to ``before``."""
    processes.wait_until(lambda: use() == before)


def _many_epochs(cache: str, pipe: object) -> None:
    """Run in a process whose memory other tests do not touch."""
    with opened(cache=cache) as batches:
        for epoch in range(EPOCHS):
            for _ in batches.epoch(epoch):
                pass
            if epoch + 1 == SETTLED:
                gc.collect()
                before_use, before_kib = settled(), resident_kib()
        gc.collect()
        after_use, after_kib = settled(), resident_kib()
        pipe.send(((before_kib, *before_use), (after_kib, *after_use)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("cache", ["none", "device"])
def test_many_epochs_grow_nothing(cache: str) -> None:
    ours, theirs = rig.PROCESSES.Pipe()
    child = rig.PROCESSES.Process(target=_many_epochs, args=(cache, theirs))
    child.start()
    assert ours.poll(processes.PATIENCE_S)
    before, after = ours.recv()
    child.join(processes.PATIENCE_S)
    print(f"{cache}: KiB, threads, files after epoch {SETTLED}: {before}, after {EPOCHS}: {after}")
    assert after[1:] == before[1:]
    assert after[0] <= 1.01 * before[0]


def test_early_breaks_and_exceptions_leave_nothing() -> None:
    draw = random.Random(0)
    with opened() as batches:
        list(batches.epoch(0))
        num_threads = threading.active_count()
        before = settled()
        for number in range(BREAKS):
            stop = draw.randrange(batches.steps_per_epoch)
            try:
                for step, _ in enumerate(batches.epoch(number)):
                    if step == stop:
                        if number % 2:
                            raise ZeroDivisionError
                        break
            except ZeroDivisionError:
                pass
            assert threading.active_count() == num_threads
            wait_for(before)
    wait_for((before[0], before[1] - 1))  # the file


def test_many_loaders_opened_and_dropped() -> None:
    for cache in ("none", "device"):  # what torch starts and keeps, it starts at the first batch
        with opened(cache=cache) as batches:
            next(batches.epoch(0))
    before = settled()
    for number in range(30):
        batches = opened(cache=("none", "device")[number % 2])
        next(batches.epoch(0))
        if number % 3:
            batches.close()
        del batches
    gc.collect()
    wait_for(before)


def _consume(loader: Loader | None) -> None:
    """Read in a child: by a loader of its own, streamed and resident, and by its parent's."""
    assert sum(len(batch.ids) for batch in (loader or opened()).epoch(3)) == 192
    for cache in ("none", "device"):
        with opened(cache=cache) as batches:
            assert sum(len(batch.ids) for batch in batches.epoch(0)) == 192


FORKED = """
import multiprocessing, sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = {paths!r}
import torch
from test_data_loader import _consume, opened
torch.set_num_threads(2)
torch.randn(1 << 20).exp().sum()
with opened() as batches:
    _consume(None)
    running = batches.epoch(1)
    next(running)
    children = [multiprocessing.get_context("fork").Process(target=_consume,
    args=(batches,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
        assert child.exitcode == 0, child.exitcode
    assert len(list(running)) == 5
"""


def test_forked_after_threads_decoded() -> None:
    """Fork in mid-epoch, after which torch's and numba's pools are dead."""
    foreign.made()
    code = FORKED.format(
        paths=[str(Path(__file__).parent), str(Path(foreign.__file__).parent), *sys.path]
    )
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        timeout=processes.PATIENCE_S,
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "context", [multiprocessing.get_context("spawn"), rig.PROCESSES], ids=["spawn", "forkserver"]
)
def test_other_processes(context: BaseContext) -> None:
    children = [context.Process(target=_consume, args=(None,)) for _ in range(2)]  # type: ignore[attr-defined]
    for child in children:
        child.start()
    for child in children:
        child.join(processes.PATIENCE_S)
        assert child.exitcode == 0


LOOP = """
import sys
from fastbyol.data.loader import open_loader
batches = open_loader({path!r}, batch_size=2, seed=0, device="cpu", cache={cache!r}, workers=2,
size=16)
print("begun", flush=True)
epoch = 0
while True:
    for batch in batches.epoch(epoch):
        batch.images.float().mean()
    epoch += 1
"""


@pytest.mark.parametrize("cache", ["none", "device"])
def test_ctrl_c_at_random_instants(cache: str) -> None:
    """Expect KeyboardInterrupt at once: no thread holds the process."""
    draw, code = (
        random.Random(cache),
        LOOP.format(path=str(foreign.made() / "jpg.beton"), cache=cache),
    )
    for _ in range(CTRL_CS // 2):
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        time.sleep(draw.uniform(0, 0.5))
        child.send_signal(signal.SIGINT)
        assert OwnTime(child.pid).waits(ends(child), LEAVE_S)
        _, errors = child.communicate()
        assert errors.strip().endswith(b"KeyboardInterrupt"), errors
        assert child.returncode == -signal.SIGINT


@pytest.mark.usefixtures("two_threads")
def test_torchs_threads_stay_as_they_were() -> None:
    setting = torch.get_num_threads()
    with opened() as batches:
        assert not batches.resident
        list(batches.epoch(0))
        assert torch.get_num_threads() == setting
