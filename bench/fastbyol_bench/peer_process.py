"""Peers in processes of their own, with torch's default settings instead of ours.

Our process disables TF32, uses deterministic cuDNN algorithms, keeps freed memory and lets idle
threads sleep. Each of these would slow a peer down or speed it up.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from typing import Protocol, Self

import torch

from fastbyol.data.beton_write import die_with
from fastbyol_bench.harness import PeerError, Reading, clock_of

# The first call waits for torch's import, for data and for a compiler. On a cpu a step on full
# images takes seconds, on slow machines tens of them. A GPU is lent for minutes.
PATIENCE_S = {"cpu": 600.0, "cuda": 150.0}
# Variables that `fastbyol` sets before it imports torch (fastbyol.cli.main); the OpenMP library
# reads them once.
OWN_VARIABLES = ("OMP_WAIT_POLICY",)


class Recipe(Protocol):
    """A small, picklable description of a peer, which builds it in the peer's own process."""

    def open(self, device: torch.device) -> Mapping[str, Callable[[], object]]:
        """Build the peer on ``device`` and return its calls by name."""


class PeerProcess:
    """A process that runs the peer of ``recipe`` on ``device``, started without waiting for it.

    Calls raise PeerError, with one line, if it died, failed or did not answer for ``patience_s``
    seconds. A process that is ``ours`` keeps ``OWN_VARIABLES``.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        device: torch.device,
        *,
        patience_s: float | None = None,
        ours: bool = False,
    ) -> None:
        self.name = name
        self._patience_s = PATIENCE_S[device.type] if patience_s is None else patience_s
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        # At exit multiprocessing waits for its children, and this child for the pipe's end.
        util.Finalize(self, self._pipe.close, exitpriority=1)
        arguments = (os.getpid(), theirs, recipe, device, torch.get_num_threads())
        self._process = spawn.Process(target=_serve, args=arguments, name=name)
        with _start(() if ours else OWN_VARIABLES):
            self._process.start()
        theirs.close()

    def call(self, what: str, calls: int = 1) -> Reading:
        """Run ``what`` in the peer, on a GPU ``calls`` times, and return the mean reading.

        The peer times itself. The cpu time is its process's, without a DataLoader's workers.
        """
        try:
            self._pipe.send((what, calls))
            if not self._pipe.poll(self._patience_s):
                self._kill()
                raise PeerError(
                    f"{self.name} did not answer within {self._patience_s:.0f} s and was ended"
                )
            answer = self._pipe.recv()
        except (OSError, EOFError):
            self._process.join(10.0)
            raise PeerError(
                f"{self.name} ended early (exit code {self._process.exitcode})"
            ) from None
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

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _start(without: Sequence[str]) -> Iterator[None]:
    """Remove the variables ``without`` and block Ctrl-C for a process that is started inside.

    An interrupted process would print a trace before it reaches ``_serve``.
    """
    own = {name: os.environ.pop(name) for name in without if name in os.environ}
    resource_tracker.ensure_running()  # its start, else a part of the process's, unblocks Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        os.environ.update(own)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    parent: int, pipe: Connection, recipe: Recipe, device: torch.device, threads: int
) -> None:
    """Answer requests (what, calls) with readings, or once with a line that describes a failure."""
    die_with(parent)  # the pipe's end is noticed only after the call, which may take minutes
    # Linux's default for a DataLoader, which a spawned process does not use.
    multiprocessing.set_start_method("fork", force=True)
    with suppress(EOFError, ConnectionError):  # the other side has gone
        try:
            calls = recipe.open(device)
            torch.set_num_threads(threads)  # ours, after FFCV's import has set one
            while True:
                what, repeats = pipe.recv()
                # Between calls its children are stopped: a DataLoader's workers would prepare
                # batches during our call, slowing it down and speeding up the peer's next one.
                _signal_children(signal.SIGCONT)
                reading = clock_of(device, repeats).time(calls[what])
                _signal_children(signal.SIGSTOP)
                pipe.send(reading)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # as text, since the exception itself may not pickle
            lines = str(error).strip().splitlines() or [""]
            pipe.send(f"{type(error).__name__}: {lines[0]}")
        finally:
            _signal_children(signal.SIGCONT)  # a stopped process could not end


def _signal_children(number: signal.Signals) -> None:
    for child in multiprocessing.active_children():
        assert child.pid is not None
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)
