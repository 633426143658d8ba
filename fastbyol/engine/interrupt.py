"""Signals that ask a run to stop: answered between two steps, or at once where nothing is lost by it.

SIGINT is Ctrl-C, SIGTERM what systems send before they kill; SIGUSR1 and SIGUSR2 are what batch systems send on demand some
time before a job's end (``sbatch --signal=USR1@60``).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from fastbyol.errors import chain

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
AGAIN_S = 0.05


class Stopped(KeyboardInterrupt):
    """What ``Interrupt.abortable`` raises: clean up as for Ctrl-C."""


@contextmanager
def sent_again() -> Iterator[None]:
    """A Ctrl-C that a finalizer or a callback swallows in here comes again AGAIN_S later, and nothing is printed about it.

    Python cannot raise out of either: it prints the exception, with its trace, and goes on as if nobody had asked.
    """
    before, timers = sys.unraisablehook, list[threading.Timer]()

    def hook(args: Any) -> None:
        if not isinstance(args.exc_value, KeyboardInterrupt):
            before(args)
            return
        timers.append(threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


def is_behind(error: BaseException) -> bool:
    """Whether a Ctrl-C led to ``error``: compiled modules that are being imported make another exception of it."""
    return any(isinstance(reason, KeyboardInterrupt) for reason in chain(error))


class Interrupt:
    """While entered, the first of ``SIGNALS`` sets ``requested`` to its name; a second SIGINT raises KeyboardInterrupt at once.

    Outside the main thread signals cannot be caught: the object then never asks for anything.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._abortable = self._has_stopped = False
        self._unraisable_before: Callable[[Any], object] = sys.unraisablehook
        self._previous: dict[int, signal._HANDLER] = {}

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """Work that can be done again and may take long: a request raises ``Stopped`` in it, at its start and at its end."""
        self._abortable = True
        try:
            self._stop()
            yield
            self._stop()  # finalizers and C's callbacks swallow exceptions: what came within one is raised here
        except Exception as error:
            if self._has_stopped:  # compiled code made another error of it
                raise Stopped(self.requested) from error
            raise
        finally:
            self._abortable = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
            self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._previous:
            sys.unraisablehook = self._unraisable_before
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signal.Signals(number).name
        if self._abortable:
            self._stop()

    def _stop(self) -> None:
        if self.requested:
            self._has_stopped = True
            raise Stopped(self.requested)

    def _unraisable(self, args: Any) -> None:
        """A ``Stopped`` that was swallowed is not lost, and half-made objects complain in their finalizers after one."""
        if not self._has_stopped:
            self._unraisable_before(args)
