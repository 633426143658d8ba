"""Worker processes as the runner sees them.

They are started with the right number of threads, sent runs, and listened to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.ablations.plan import Run

LOG = "workers.log"
# Runs on one GPU share it by turns; a run of the post's size takes less than this.
GPU_BYTES_A_RUN = 20 * 2**30
MOST_ON_A_GPU = 4
CLOSE_S = 30.0


class Worker:
    """One worker process and the run that it works on."""

    def __init__(self, log: Path, device: str) -> None:
        self.connection, theirs = Pipe()
        threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
        with log.open("ab") as errors, theirs:
            # A session of its own: Ctrl-C reaches the runner alone, which then stops its workers.
            # Everything that a library prints goes to the log.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastbyol.ablations.worker", str(os.getpid()),
                str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **threads}, start_new_session=True,
            )  # fmt: skip
        self.run: Run | None = None

    def begin(self, run: Run) -> None:
        """Send ``run`` to the worker, which must be idle."""
        self.run = run
        with suppress(OSError):  # the worker died: ``receive`` reports it
            self.connection.send(
                {
                    "path": str(run.path),
                    "config": config_io.dump(run.config),
                    "origin": dict(run.origin),
                }
            )

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, or None if the worker died.

        If a message has begun, its rest is waited for.
        """
        try:
            message: dict[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            return None
        return message

    def stop(self) -> None:
        """Ask the worker to save and stop."""
        self._process.terminate()

    def kill(self) -> None:
        """End the worker at once."""
        self._process.kill()

    def close(self) -> str:
        """Let the worker end, kill it where it does not, and return how it ended, in words."""
        self.connection.close()
        try:
            code = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class Pool:
    """Up to ``size`` workers, started when they are needed and started again when one dies."""

    def __init__(self, size: int, log: Path, device: str) -> None:
        self._size, self._log, self._device = size, log, device
        self._workers: list[Worker] = []

    @property
    def busy(self) -> list[Worker]:
        """Workers that have a run."""
        return [worker for worker in self._workers if worker.run is not None]

    def idle(self) -> Worker | None:
        """Return a worker without a run, a new one if there is room; None if all are busy."""
        free = next((worker for worker in self._workers if worker.run is None), None)
        if free is None and len(self._workers) < self._size:
            free = Worker(self._log, self._device)
            self._workers.append(free)
        return free

    def messages(self, timeout: float) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Yield what workers sent within ``timeout`` seconds, with the run of each.

        A worker's death is an ``end`` with ``died``.
        """
        ready = wait([worker.connection for worker in self._workers], timeout)
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            run, message = worker.run, worker.receive()
            if message is None or "again" in message:
                if message is not None:
                    worker.kill()  # nothing more can be asked of it, not even to end
                self._workers.remove(worker)
                how = worker.close()
                message = message or {"kind": "end", "died": how}
            if message["kind"] == "end":
                worker.run = None
            if run is not None:
                yield run, message

    def stop(self) -> None:
        """Ask all workers that have a run to save and stop."""
        for worker in self.busy:
            worker.stop()

    def close(self, *, at_once: bool = False) -> None:
        """End all workers."""
        for worker in self._workers:
            if at_once:
                worker.kill()
            worker.close()
        self._workers.clear()


def default_size(device: str) -> int:
    """Return how many runs to train at a time.

    It is one a core, or as many as each GPU's memory has room for.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if device == "cpu":
        return cores
    import torch

    index = int(device.partition(":")[2] or 0)
    room = torch.cuda.get_device_properties(index).total_memory // GPU_BYTES_A_RUN
    return max(1, min(room, MOST_ON_A_GPU, cores))
