"""Signals that ask a run to stop.

At the first one, SIGTERM for example, ``Interrupt`` notes the request, and the trainer finishes its
step, saves a checkpoint and ends. A second Ctrl-C stops at once. ``ending`` serves other commands.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from fastbyol.errors import chain

SIGNALS = (
    signal.SIGINT,  # Ctrl-C
    signal.SIGTERM,  # what systems send before they kill
    signal.SIGHUP,  # the terminal was closed
    signal.SIGUSR1,  # batch systems on demand, before a job's end (``sbatch --signal=USR1@60``)
    signal.SIGUSR2,
    signal.SIGXCPU,  # the job's CPU time is used up (``ulimit -t``)
)  # SIGQUIT still ends a process at once
AGAIN_S = 0.05
# A closed terminal sends SIGHUP, and so does its shell: within this time they are one request.
SAME_S = 1.0


class Stopped(KeyboardInterrupt):
    """The request that ``Interrupt.abortable`` raises: clean up as for Ctrl-C."""


class Ended(BaseException):
    """The signal ``number`` that ``ending`` raises: clean up as for Ctrl-C.

    Not a KeyboardInterrupt, for which Typer exits with 130.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = signal.Signals(number)


def signals_to_handle() -> tuple[signal.Signals, ...]:
    """Return ``SIGNALS`` without a SIGHUP that ``nohup`` ignores; none outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return ()
    return tuple(n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers,
    numbers: Iterable[signal.Signals],
) -> Iterator[None]:
    """Handle the signals ``numbers`` with ``handler`` inside; restore the handlers on leaving."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold ``SIGNALS`` back inside, also in processes that are started there, which ``let_in``.

    Else a signal to all processes of a job kills those that have no handlers yet.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_in() -> None:
    """Handle what ``held_back`` of the parent process held back, now that there are handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def ending() -> Iterator[None]:
    """Raise ``Ended`` inside at a signal that would kill the process, so that it cleans up."""
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
    with (
        handling(end, [number for number in signals_to_handle() if number != signal.SIGINT]),
        sent_again(),
    ):
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
    """Send a Ctrl-C or an ``Ended`` again that a finalizer or a callback swallows inside.

    Python cannot raise out of either: it would print the exception and go on.
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
    """Return the Ctrl-C or ``Ended`` that led to ``error``: importing compiled modules wraps it."""
    return next(
        (reason for reason in chain(error) if isinstance(reason, KeyboardInterrupt | Ended)), None
    )


class Interrupt:
    """A request to stop: while entered, the first of ``SIGNALS`` sets ``requested`` to its name.

    A SIGINT after it raises KeyboardInterrupt at once. Outside the main thread, where Python cannot
    handle signals, ``requested`` stays None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._abortable = self._has_stopped = False
        self._unraisable_before: Callable[[Any], object] = sys.unraisablehook
        self._answered = ExitStack()

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """Let a request raise ``Stopped`` inside, for long work that can be done again."""
        self._abortable = True
        try:
            self._stop()
            yield
            self._stop()  # what a finalizer or a callback of C swallowed is raised here
        except Exception as error:
            if self._has_stopped:  # compiled code turned it into another error
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

    def __exit__(self, *_: object) -> None:
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
        """Drop messages about a swallowed ``Stopped`` and the finalizers of half-made objects."""
        if not self._has_stopped:
            self._unraisable_before(args)
