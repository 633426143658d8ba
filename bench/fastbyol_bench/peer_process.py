"""A peer in a process of its own, with the defaults that a process of torch has, and nothing that ours sets.

Our process switches TF32 off, has cuDNN take deterministic algorithms, keeps freed memory and lets idle threads sleep. Each of
these would slow a peer down or speed it up. A peer's calls are asked for one by one, so that they take turns with ours; in
between it waits in a read, and what it started stands still: a DataLoader's workers would otherwise work ahead in our time,
slowing our call and sparing the peer's next. It times itself: on a GPU by events on its own stream.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Protocol, Self

import torch

from fastbyol.data.beton_write import die_with
from fastbyol_bench.harness import PeerError, Reading, clock_of

# The first call waits for torch's import, for data and for a compiler. On a cpu full images take seconds a step, on slow
# machines tens of them; a GPU is lent for minutes.
PATIENCE_S = {"cpu": 600.0, "cuda": 150.0}
# What `fastbyol` sets for itself before it imports torch (fastbyol.cli.main): read once by the OpenMP library.
OWN_VARIABLES = ("OMP_WAIT_POLICY",)


class Recipe(Protocol):
    """How a peer is made, in its own process: small and picklable."""

    def open(self, device: torch.device) -> Mapping[str, Callable[[], object]]:
        """Build the peer on ``device`` and return what it can be asked to do, by name."""


class PeerProcess:
    """The peer of ``recipe`` on ``device``, started at once and without waiting for it.

    Its calls raise PeerError, one line, where it died, failed or did not answer for ``patience_s`` seconds.
    """

    def __init__(self, name: str, recipe: Recipe, device: torch.device, *, patience_s: float | None = None) -> None:
        self.name = name
        self._patience_s = PATIENCE_S[device.type] if patience_s is None else patience_s
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        # However this ends: multiprocessing waits for its children at exit, and this one for the pipe's end.
        util.Finalize(self, self._pipe.close, exitpriority=1)
        arguments = (os.getpid(), theirs, recipe, device, torch.get_num_threads())
        self._process = spawn.Process(target=_serve, args=arguments, name=name)
        with _start():
            self._process.start()
        theirs.close()

    def call(self, what: str, calls: int = 1) -> Reading:
        """Do ``what`` there, on a GPU ``calls`` times in a row; the mean time of one, by the peer's own clock.

        The cpu seconds are those of its process, without those of a DataLoader's workers.
        """
        try:
            self._pipe.send((what, calls))
            if not self._pipe.poll(self._patience_s):
                self._kill()
                raise PeerError(f"{self.name} did not answer within {self._patience_s:.0f} s and was ended")
            answer = self._pipe.recv()
        except (OSError, EOFError):
            self._process.join(10.0)
            raise PeerError(f"{self.name} ended early (exit code {self._process.exitcode})") from None
        if isinstance(answer, Reading):
            return answer
        raise PeerError(f"{self.name} failed: {answer}")

    def caller(self, what: str, calls: int = 1) -> Callable[[], Reading]:
        """Return ``call`` with these arguments, for a ``Variant``."""
        return partial(self.call, what, calls)

    def close(self) -> None:
        """End the process, which may finish a call."""
        self._pipe.close()
        self._process.join(60.0)
        self._kill()

    def _kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def _start() -> Iterator[None]:
    """A process started within has none of ``OWN_VARIABLES``, and Ctrl-C blocked: it would print a trace until ``_serve``."""
    own = {name: os.environ.pop(name) for name in OWN_VARIABLES if name in os.environ}
    resource_tracker.ensure_running()  # its start, else a part of the process's, unblocks Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        os.environ.update(own)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(parent: int, pipe: Connection, recipe: Recipe, device: torch.device, threads: int) -> None:
    """Answer requests (what, calls) with a ``Reading``, or once with a line that says what failed."""
    die_with(parent)  # the pipe's end would be seen after the call, which may take minutes
    # Linux's own for a DataLoader; a spawned process would go on spawning.
    multiprocessing.set_start_method("fork", force=True)
    with suppress(EOFError, ConnectionError):  # whoever asked has gone
        try:
            calls = recipe.open(device)
            torch.set_num_threads(threads)  # ours, after FFCV's import has set one
            while True:
                what, repeats = pipe.recv()
                _signal_children(signal.SIGCONT)
                reading = clock_of(device, repeats).time(calls[what])
                _signal_children(signal.SIGSTOP)
                pipe.send(reading)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # in words, since the exception itself may not pickle
            lines = str(error).strip().splitlines() or [""]
            pipe.send(f"{type(error).__name__}: {lines[0]}")
        finally:
            _signal_children(signal.SIGCONT)  # or they could not follow when they are told to end


def _signal_children(number: signal.Signals) -> None:
    for child in multiprocessing.active_children():
        assert child.pid is not None
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)
