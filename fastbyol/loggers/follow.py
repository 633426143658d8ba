"""The process of one logger: it follows a run's files and sends what they have.

Whatever its library does, hang, crash or exit, it does here, beside the training. The process ends
by itself: when the trainer closes a pipe, or is gone, it sends what is left within a limited time.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

from fastbyol.config import LoggerName
from fastbyol.engine.interrupt import SIGNALS
from fastbyol.errors import FastbyolError, one_line
from fastbyol.loggers.child import ALL_SENT, environment, program
from fastbyol.loggers.entries import Entries
from fastbyol.loggers.sink import FOLDER, Entry, LoggedRun, Sink, load, open_sink
from fastbyol.runs.lock import Lock
from fastbyol.text import printable

POLL_S = 2.0
# Pauses between two attempts to reach a store, in seconds.
FIRST_PAUSE_S, LAST_PAUSE_S = 2.0, 60.0
# Entries that are sent at a time.
MOST = 512
PICTURE = "views.png"
Report = Callable[[str], None]


class Trainer:
    """The process that started this one, as long as it keeps the pipe ``end`` open and lives.

    ``limit_s`` is how long this process may go on without it; 0: as long as it takes.
    """

    def __init__(self, end: int, parent: int, limit_s: float) -> None:
        self._end, self._parent, self._limit_s = end, parent, limit_s
        self._is_over = False

    def is_over(self) -> bool:
        """Return whether nothing more will be written."""
        self.wait(0.0)
        return self._is_over

    def wait(self, seconds: float) -> None:
        """Wait, at most until it is over."""
        if not self._is_over:
            readable, _, _ = select.select([self._end], [], [], seconds)
            if readable or os.getppid() != self._parent:
                self._is_over = True
                if self._limit_s:
                    # The system's own: nothing that a library does can keep it off.
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.setitimer(signal.ITIMER_REAL, self._limit_s)


class ViewsPicture:
    """The picture of a few samples' views, drawn once for all loggers by a process of its own."""

    def __init__(self, run: LoggedRun) -> None:
        self.file = run.path / FOLDER / PICTURE
        self._process: subprocess.Popen[bytes] | None = None
        self._is_due = bool(run.config.log.pictures) and not run.memory.get("picture")
        if self._is_due and not self.file.exists():
            with suppress(OSError):
                self._process = subprocess.Popen(
                    program("fastbyol.loggers.views_picture", str(run.path), str(self.file)),
                    stdin=subprocess.DEVNULL,
                    env=environment(),
                )

    def ready(self, *, wait: bool = False) -> Path | None:
        """Return the picture that is to be sent, None where there is none, or not yet."""
        if not self._is_due:
            return None
        if self._process is not None and wait:
            self._process.wait()
        return self.file if self._is_drawn() and self.file.exists() else None

    def _is_drawn(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def sent(self) -> None:
        """Record that it need not be sent again."""
        self._is_due = False

    def close(self) -> None:
        """End the process that draws it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def follow(path: Path, name: LoggerName, trainer: Trainer, parent: int, report: Report) -> bool:
    """Send the run in ``path`` to ``name`` until the trainer is over; return whether all is sent.

    A store that fails is opened again after a growing pause, and once more at the end. Raises
    FastbyolError where the library cannot be imported or the run cannot be read.
    """
    run = LoggedRun(path, name, parent)
    load(name)
    pause_s, before = FIRST_PAUSE_S, ""
    while True:
        is_last = trainer.is_over()
        try:
            with ExitStack() as opened:
                opened.callback(Lock(run.folder).release)
                _send(run, name, trainer, report)
                return True
        except (Exception, SystemExit) as error:
            words = one_line(error)
            if words != before:
                report(words if is_last else f"{words}; it is tried again")
            before = words
        if is_last:
            return False
        trainer.wait(pause_s)
        pause_s = min(2 * pause_s, LAST_PAUSE_S)


def _send(run: LoggedRun, name: LoggerName, trainer: Trainer, report: Report) -> None:
    """Send until the trainer is over and nothing is left."""
    sink, is_finished = open_sink(name, run), False
    if sink.where:
        report(sink.where)
    picture = ViewsPicture(run)
    try:
        entries = Entries(run.path, run.config, sink.newest)
        while True:
            # Asked before the files are read: what they have then is all that comes.
            is_over = trainer.is_over()
            try:
                ready, is_more = entries.read()
            except FileNotFoundError:
                ready, is_more = [], False
            _send_entries(run, sink, ready, picture, wait=False)
            _send_alerts(run, sink, entries)
            if not is_more and is_over:
                break
            if not is_more:
                trainer.wait(POLL_S)
        _send_entries(run, sink, entries.last(splits=sink.splits), picture, wait=True)
        is_finished = entries.is_finished
    except BaseException:
        with suppress(Exception):
            sink.close(is_finished=False)
        raise
    finally:
        picture.close()
    sink.close(is_finished=is_finished)


def _send_entries(
    run: LoggedRun, sink: Sink, entries: list[Entry], picture: ViewsPicture, *, wait: bool
) -> None:
    for first in range(0, len(entries), MOST):
        batch = entries[first : first + MOST]
        file = batch[0].picture = picture.ready(wait=wait)
        sink.send(batch)
        if file is not None:
            run.remember(picture=True)
            picture.sent()


def _send_alerts(run: LoggedRun, sink: Sink, entries: Entries) -> None:
    done = run.memory.get("alerts", 0)
    for alert in entries.alerts[done:]:
        sink.alert(alert)
        done += 1
        run.remember(alerts=done)


def main() -> None:
    """Work as the arguments say: run, logger, pipe, parent's number, limit in s, temporary folder.

    A line on standard output is for the run's observer; what the library prints goes to standard
    error. Exits with ``ALL_SENT``, or with 1 where something is missing.
    """
    path, name, end, parent, limit_s, scratch = sys.argv[1:]
    tempfile.tempdir = os.environ["TMPDIR"] = scratch
    for number in SIGNALS:  # of a batch system to all of a job: the trainer says when it is over
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(10)  # the training comes first
    lines = os.dup(1)
    os.dup2(2, 1)

    def report(text: str) -> None:
        with suppress(OSError):
            os.write(lines, f"{printable(text)}\n".encode())

    trainer = Trainer(int(end), int(parent), float(limit_s))
    code = 1
    try:
        if follow(Path(path), cast(LoggerName, name), trainer, int(parent), report):
            code = ALL_SENT
    except FastbyolError as error:
        report(str(error))
    sys.stdout.flush()
    sys.stderr.flush()
    shutil.rmtree(scratch, ignore_errors=True)  # the parent may be gone
    # Threads of a library must not keep the process: the store is closed.
    os._exit(code)


if __name__ == "__main__":
    main()
