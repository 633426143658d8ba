"""The loggers of a run at work: processes that are started with it, looked at, and ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fastbyol.config import Config, LoggerName
from fastbyol.engine.observer import EpochEnd, Observer, Silent, Start, StepReport
from fastbyol.errors import FastbyolError, UsageError, one_line
from fastbyol.loggers.child import ALL_SENT, Child
from fastbyol.runs.metrics import is_finished, read_events

# A batch system kills soon after its signal: a run that was stopped does not wait for longer.
STOPPED_S = 5.0
_POLL_S = 0.05
# A wait for longer is told of.
_TELL_S = 2.0
# What is between the end of the time that a process has and its being killed.
_GRACE_S = 2.0


class Loggers:
    """An observer that passes messages on to another, and has the run logged beside it.

    Nothing of a logger is raised: it is a note at most.
    """

    def __init__(self, run: Path, config: Config, observer: Observer) -> None:
        self._run, self._config, self._observer = run, config, observer
        self._children: list[Child] = []

    def start(self, message: Start) -> None:
        """Start a process for each logger."""
        self._observer.start(message)
        for name in dict.fromkeys(self._config.log.to):
            self._guarded(name, partial(self._start, name))

    def progress(self, message: StepReport) -> None:
        """Hand on, and look at the processes."""
        self._observer.progress(message)
        self._look()

    def epoch_end(self, message: EpochEnd) -> None:
        """Hand on, and look at the processes."""
        self._observer.epoch_end(message)
        self._look()

    def note(self, text: str) -> None:
        """Hand on."""
        self._observer.note(text)

    def end(self, wait_s: float) -> None:
        """Let the processes send what is left, in ``wait_s`` seconds at most, and end them."""
        for child in self._children:
            child.finish()
        began, is_told = time.monotonic(), False
        try:
            while self._children and (waited_s := time.monotonic() - began) < wait_s:
                self._look()
                if waited_s > _TELL_S and not is_told:
                    names = ", ".join(child.name for child in self._children)
                    self._observer.note(f"sending what is left to {names}, {wait_s:g} s at most")
                    is_told = True
                time.sleep(_POLL_S if self._children else 0.0)
        finally:
            for child in self._children:
                child.close()
        for child in self._children:
            self._observer.note(
                f"logger {child.name}: {wait_s:g} s did not do for what is left: send it with "
                f"`{child.command}`"
            )

    def _start(self, name: LoggerName) -> None:
        self._children.append(Child(self._run, name, self._config.log.wait_s + _GRACE_S))

    def _look(self) -> None:
        for child in tuple(self._children):
            self._guarded(child.name, partial(self._look_at, child))

    def _look_at(self, child: Child) -> None:
        code = child.process.poll()
        lines = child.lines()
        for line in lines:
            self._observer.note(f"logger {child.name}: {line}")
        if code is None:
            return
        self._children.remove(child)
        child.close()
        if code != ALL_SENT:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else "ended"
            self._observer.note(
                f"logger {child.name}: {how} (see {child.log}): send what is missing with "
                f"`{child.command}`"
            )

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._children = [child for child in self._children if child.name != name]
            self._observer.note(f"logger {name}: {one_line(error)}")


@contextmanager
def logged(run: Path, config: Config, observer: Observer | None) -> Iterator[Observer | None]:
    """Have the run that is trained inside logged as ``log.to`` says; yield its observer."""
    if not config.log.to:
        yield observer
        return
    loggers, wait_s = Loggers(run, config, observer or Silent()), 0.0
    try:
        yield loggers
        wait_s = config.log.wait_s if _is_finished(run, config) else STOPPED_S
    except FastbyolError:  # such as a collapse: nobody waits for this process to end
        wait_s = config.log.wait_s
        raise
    finally:
        loggers.end(min(wait_s, config.log.wait_s))


def _is_finished(run: Path, config: Config) -> bool:
    try:
        return is_finished(read_events(run), config.train.epochs)
    except UsageError:
        return False
