"""The training of a plan's runs, several at a time.

What is done is skipped, what was stopped goes on, what fails is reported and stops nothing else.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from fastbyol.ablations import plan
from fastbyol.ablations.arms import ScaleName
from fastbyol.ablations.board import Board, board
from fastbyol.ablations.ledger import Ledger
from fastbyol.ablations.plan import Run, epochs_done
from fastbyol.ablations.pool import LOG, Pool, default_size
from fastbyol.data import embedded
from fastbyol.engine import interrupt
from fastbyol.engine.device import pick_device
from fastbyol.errors import UsageError
from fastbyol.runs.lock import Lock

TICK_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """The end of a call: the runs that it finished, skipped, left stopped or saw fail.

    Runs are names; a failed one is (name, why).
    """

    finished: tuple[str, ...]
    skipped: tuple[str, ...]
    stopped: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    interrupted: bool
    seconds: float


class Runner:
    """One call of ``ablate run``."""

    def __init__(self, runs: Sequence[Run], ledger: Ledger, pool: Pool, shown: Board) -> None:
        self._ledger, self._pool, self._board = ledger, pool, shown
        self._waiting = list(runs)
        self._unfinished = {run.path for run in self._waiting}
        self._began: dict[str, float] = {}
        self.finished: list[str] = []
        self.stopped: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.interrupted = False

    def execute(self) -> None:
        """Hand out runs and listen until everything is done, failed or stopped."""
        with interrupt.handling(self._interrupt, interrupt.signals_to_handle()):
            while True:
                self._hand_out()
                if not self._pool.busy:
                    break
                for run, message in self._pool.messages(TICK_S):
                    if message["kind"] == "end":
                        self._end(run, message)
                    elif message["kind"] == "note":
                        self._board.line(f"{run.name}: {message['text']}")
                    else:
                        self._board.message(run, message)

    def _hand_out(self) -> None:
        """Start the runs that can start."""
        while not self.interrupted and (run := self._next()) and (worker := self._pool.idle()):
            self._waiting.remove(run)
            self._began[run.name] = time.monotonic()
            worker.begin(run)

    def _next(self) -> Run | None:
        """Return the first run whose rates are there; fail those whose rates cannot come."""
        for run in list(self._waiting):
            failed = {name for name, _ in self.failed}
            if (
                run.after is not None
                and f"{run.arm.rates_of} seed {run.after.name.removeprefix('seed')}" in failed
            ):
                self._waiting.remove(run)
                self._fail(run, f"the run whose rates it replays failed: {run.after}", 0.0)
            elif run.after not in self._unfinished:
                return run
        return None

    def _end(self, run: Run, message: Mapping[str, Any]) -> None:
        seconds = time.monotonic() - self._began[run.name]
        if "died" in message and not self.interrupted:
            self._fail(
                run,
                f"its process was {message['died']}"
                if "killed" in message["died"]
                else message["died"],
                seconds,
            )
        elif "again" in message and not self.interrupted:
            self._board.line(f"{run.name}: {message['again']}")
            self._waiting.insert(0, run)
        elif "error" in message:
            self._fail(run, message["error"], seconds)
        elif message.get("finished"):
            self._unfinished.discard(run.path)
            self.finished.append(run.name)
            kept = {key: message[key] for key in ("step", "state", "accuracy")}
            self._ledger.record(run, {"status": "done", **kept, "seconds": seconds})
            accuracy = "" if message["accuracy"] is None else f", {message['accuracy']:.1f}%"
            self._board.ended(run, "done", f", {message['state']}{accuracy}", seconds)
        else:
            self._stop(run, seconds)

    def _stop(self, run: Run, seconds: float) -> None:
        """Record a run that a signal, perhaps not ours, has stopped.

        The run is saved, and the next call goes on with it.
        """
        self.stopped.append(run.name)
        self._ledger.record(run, {"status": "stopped", "seconds": seconds})
        self._board.ended(run, "stopped", "", seconds)

    def _fail(self, run: Run, why: str, seconds: float) -> None:
        self.failed.append((run.name, why))
        self._ledger.record(run, {"status": "failed", "error": why, "seconds": seconds})
        self._board.ended(run, "failed", f": {why}", seconds)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.interrupted = True
        self._pool.stop()


def execute(
    runs: Sequence[Run],
    out: Path,
    scale: ScaleName,
    *,
    asked: Mapping[str, Any],
    jobs: int | None,
    device: str,
    console: Console,
) -> Outcome:
    """Train ``runs``, which lie in ``out``, ``jobs`` at a time.

    If ``jobs`` is None, as many are trained as the device has room for. ``asked`` goes into the
    ledger. A run that fails does not stop the others. One of ``interrupt.SIGNALS`` saves and stops
    the runs at work; a second SIGINT kills them. Raises UsageError: another call works in ``out``,
    or a folder holds another run.
    """
    began = time.monotonic()
    where = str(pick_device(device))
    with _locked(out):
        left = plan.left(runs, out)
        size = min(jobs or default_size(where), max(len(left), 1))
        ledger = Ledger(out, scale, {**asked, "jobs": size, "runs": [run.name for run in runs]})
        _make_data(left)
        with board(console, runs, {run.name: epochs_done(run.path) for run in runs}) as shown:
            runner = _drive(left, ledger, Pool(size, out / LOG, where), shown)
        ended = {*runner.finished, *(name for name, _ in runner.failed)}
        outcome = Outcome(
            finished=tuple(runner.finished),
            skipped=tuple(run.name for run in runs if run not in left),
            stopped=tuple(run.name for run in left if run.name not in ended),
            failed=tuple(runner.failed),
            interrupted=runner.interrupted,
            seconds=time.monotonic() - began,
        )
        ledger.end(interrupted=outcome.interrupted, seconds=round(outcome.seconds, 1))
    return outcome


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = Lock(out)
    except OSError as error:
        raise UsageError(
            f"{out}: {error.strerror}: name a folder that can be written with --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _drive(runs: Sequence[Run], ledger: Ledger, pool: Pool, shown: Board) -> Runner:
    runner = Runner(runs, ledger, pool, shown)
    try:
        runner.execute()
    except BaseException:
        pool.close(at_once=True)
        raise
    pool.close()
    return runner


def _make_data(runs: Sequence[Run]) -> None:
    """Write the embedded sets once, before several workers would each write them."""
    for data in {run.config.data for run in runs}:
        embedded.training_file(data)
        embedded.held_out_file(data)
