"""Signals that ask a run to stop: answered between two steps, or at once where nothing is lost by it.

SIGINT is Ctrl-C, SIGTERM what systems send before they kill, SIGHUP what a terminal sends that is closed; SIGUSR1 and SIGUSR2
are what batch systems send on demand some time before a job's end (``sbatch --signal=USR1@60``), SIGXCPU what the system and
they send when the CPU time that a job may take is used up (``ulimit -t``). A SIGHUP that was ignored when the process
began, as by ``nohup``, stays so. SIGQUIT is left to end a process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

from fastbyol.errors import chain

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
AGAIN_S = 0.05
# A terminal that is closed sends SIGHUP, and so does its shell: within this time they are one wish.
SAME_S = 1.0


class Stopped(KeyboardInterrupt):
    """What ``Interrupt.abortable`` raises: clean up as for Ctrl-C."""


class Ended(BaseException):
    """What ``ending`` raises for the signal ``number``: clean up as for Ctrl-C. Typer would make 130 of a KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = signal.Signals(number)


def signals_to_handle() -> tuple[signal.Signals, ...]:
    """Those of ``SIGNALS`` that are to be answered: all but a SIGHUP that is ignored. None outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return ()
    return tuple(n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None], numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """While entered, ``handler`` answers the signals ``numbers``; afterwards who did so before."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def ending() -> Iterator[None]:
    """While entered, a signal that would end the process at once raises ``Ended``, so that what was begun is cleaned up."""
    last = -SAME_S

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if _is_importing(frame):  # compiled modules end the process on an exception, or swallow it
            timers.append(threading.Timer(AGAIN_S, os.kill, (os.getpid(), number)))
            timers[-1].start()
        elif time.monotonic() - last >= SAME_S:
            last = time.monotonic()
            raise Ended(number)

    timers = list[threading.Timer]()
    with handling(end, [number for number in signals_to_handle() if number != signal.SIGINT]), sent_again():
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def sent_again() -> Iterator[None]:
    """A Ctrl-C, or an ``Ended``, that a finalizer or a callback swallows in here comes again, and nothing is printed about it.

    It comes AGAIN_S later. Python cannot raise out of either: it prints the exception, with its trace, and goes on as if nobody
    had asked.
    """
    before, timers = sys.unraisablehook, list[threading.Timer]()

    def hook(args: Any) -> None:
        if not isinstance(args.exc_value, KeyboardInterrupt | Ended):
            before(args)
            return
        number, pause_s = signal.SIGINT, AGAIN_S
        if isinstance(args.exc_value, Ended):
            number, pause_s = args.exc_value.number, SAME_S + AGAIN_S
        timers.append(threading.Timer(pause_s, os.kill, (os.getpid(), number)))
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


def behind(error: BaseException) -> KeyboardInterrupt | Ended | None:
    """The Ctrl-C or ``Ended`` that led to ``error``: compiled modules that are being imported make another exception of it."""
    return next((reason for reason in chain(error) if isinstance(reason, KeyboardInterrupt | Ended)), None)


class Interrupt:
    """While entered, the first of ``SIGNALS`` sets ``requested`` to its name; a second SIGINT raises KeyboardInterrupt at once.

    Outside the main thread signals cannot be caught: the object then never asks for anything.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._abortable = self._has_stopped = False
        self._unraisable_before: Callable[[Any], object] = sys.unraisablehook
        self._answered = ExitStack()

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
        if numbers := signals_to_handle():
            self._answered.enter_context(handling(self._handle, numbers))
            self._answered.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
            self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._answered.close()

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
