"""The workers of one machine: started, listened to, started again when they die, stopped."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from fastbyol.engine import interrupt
from fastbyol.errors import UsageError
from fastbyol.fleet.worker import Options, Tell
from fastbyol.runs.durable import writing

LOGS = "logs"
TICK_S = 0.5
# As many workers in a row may die before they say a word: then something keeps them all from it.
MOST_QUICK = 3


class Process:
    """One worker process. What libraries print goes to the log, what the worker says to us."""

    def __init__(self, options: Options, variables: Mapping[str, str], log: Path) -> None:
        self.variables, self.has_spoken = variables, False
        self._rest = b""
        command = [sys.executable, "-m", "fastbyol.fleet.worker", json.dumps(asdict(options))]
        # SLURM signals every process of a job, which would kill a worker that is still importing.
        with log.open("ab") as errors, interrupt.held_back():
            # A session of its own: Ctrl-C reaches this process alone, which then stops its workers.
            self.process = subprocess.Popen(
                [*command, str(os.getpid())], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=errors, start_new_session=True,
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **variables},
            )  # fmt: skip
        assert self.process.stdout is not None
        self.pipe = self.process.stdout
        os.set_blocking(self.pipe.fileno(), False)

    def lines(self) -> list[str] | None:
        """Return what the worker has said since, None once it cannot say any more."""
        try:
            content = os.read(self.pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return []
        if not content:
            self.pipe.close()
            return None
        self.has_spoken = True
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]


@dataclass(frozen=True)
class NodeEnd:
    """How workers ended: the signal that stopped them, and what went wrong.

    ``submitted`` are the jobs of a cluster, which work on.
    """

    stopped_by: str | None = None
    problems: tuple[str, ...] = ()
    submitted: tuple[str, ...] = ()


class Node:
    """The supervisor of this machine's workers on the folder ``options.out``.

    ``slots`` are the variables of each worker. ``tell`` prints a line.
    """

    def __init__(self, options: Options, slots: Sequence[Mapping[str, str]], tell: Tell) -> None:
        self._options, self._slots, self._tell = options, slots, tell
        self._log = Path(options.out) / LOGS / f"{socket.gethostname()}.log"
        self._selector = selectors.DefaultSelector()
        self._processes: list[Process] = []
        self._num_quick = 0
        self._problems: list[str] = []
        self.stopped_by: str | None = None

    def run(self, tick: Callable[[], None] = lambda: None) -> NodeEnd:
        """Run the workers until they have nothing left to do; call ``tick`` twice a second.

        One that is killed is started again. A signal of ``interrupt.SIGNALS`` saves and stops all;
        a second SIGINT kills them.
        """
        with writing(self._log):
            self._log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with interrupt.handling(self._stop, interrupt.signals_to_handle()):
                for variables in self._slots:
                    self._start(variables)
                while self._processes:
                    for key, _ in self._selector.select(TICK_S):
                        self._listen(key.data)
                    tick()
        finally:
            for process in self._processes:
                process.process.kill()
                process.process.wait()
                process.pipe.close()
            self._selector.close()
        return NodeEnd(self.stopped_by, tuple(dict.fromkeys(self._problems)))

    def _start(self, variables: Mapping[str, str]) -> None:
        try:
            process = Process(self._options, variables, self._log)
        except OSError as error:
            raise UsageError(f"{self._log}: cannot start a worker: {error.strerror}") from None
        self._processes.append(process)
        self._selector.register(process.pipe, selectors.EVENT_READ, process)
        if self.stopped_by is not None:  # asked since; a second SIGINT would kill it
            process.process.terminate()

    def _listen(self, process: Process) -> None:
        """Print what a worker says; if it has ended, start another one where that makes sense."""
        self._selector.unregister(process.pipe)
        lines = process.lines()
        if lines is not None:
            self._selector.register(process.pipe, selectors.EVENT_READ, process)
            for line in lines:
                self._tell(line)
            return
        code = process.process.wait()
        self._processes.remove(process)
        if code == 0 or self.stopped_by is not None:
            return
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        if code == 2:  # it has said why, and another could do no better
            self._problems.append(f"a worker could not go on: see {self._log}")
            return
        self._num_quick = 0 if process.has_spoken else self._num_quick + 1
        if self._num_quick >= MOST_QUICK:
            self._problems.append(f"{self._num_quick} workers in a row were {how}: see {self._log}")
            return
        self._tell(f"worker {process.process.pid} was {how}: another one goes on")
        self._start(process.variables)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is None:
            self.stopped_by = signal.Signals(number).name
            for process in self._processes:
                with suppress(OSError):
                    process.process.send_signal(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
