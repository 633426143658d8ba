"""Worker processes as the runner sees them: started with the right number of threads, given runs, listened to."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.ablations.plan import Run

LOG = "workers.log"
# Runs on one GPU share it by turns; a run of the post's size takes less than this.
GPU_BYTES_A_RUN = 20 * 2**30
MOST_ON_A_GPU = 4


class Worker:
    """One worker process and the run that it works on."""

    def __init__(self, log: Path, device: str) -> None:
        with log.open("ab") as errors:
            # A session of its own: Ctrl-C reaches the runner alone, which then stops its workers.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastbyol.ablations.worker", str(os.getpid())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=_environment(device), start_new_session=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        self.output = self._process.stdout.fileno()
        os.set_blocking(self.output, False)
        self._rest = b""
        self.run: Run | None = None

    def begin(self, run: Run) -> None:
        """Let it work on ``run``. It must be idle."""
        assert self._process.stdin is not None
        self.run = run
        request = {"path": str(run.path), "config": config_io.dump(run.config), "origin": dict(run.origin)}
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end is told by its output

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """What it said since the last time, and whether it is still there."""
        try:
            data = os.read(self.output, 1 << 20)
        except BlockingIOError:
            return [], True
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines], bool(data)

    def stop(self) -> None:
        """Ask it to save and stop."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> str:
        """Let it end, killing it where it does not; returns how it ended, in words."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        try:
            code = self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _environment(device: str) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **threads}


class Pool:
    """Up to ``size`` workers, started when they are needed and started again when one dies."""

    def __init__(self, size: int, log: Path, device: str) -> None:
        self._size, self._log, self._device = size, log, device
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()

    @property
    def busy(self) -> list[Worker]:
        """Workers that have a run."""
        return [worker for worker in self._workers if worker.run is not None]

    def idle(self) -> Worker | None:
        """A worker without a run, a new one where there is room; None where all are busy."""
        free = next((worker for worker in self._workers if worker.run is None), None)
        if free is None and len(self._workers) < self._size:
            free = Worker(self._log, self._device)
            self._workers.append(free)
            self._selector.register(free.output, selectors.EVENT_READ, free)
        return free

    def messages(self, timeout: float) -> Iterator[tuple[Run, dict[str, Any]]]:
        """What workers said within ``timeout`` seconds, with the run each was at; a death is an ``end`` with ``died``."""
        for key, _ in self._selector.select(timeout):
            worker: Worker = key.data
            said, alive = worker.read()
            for message in said:
                run = worker.run
                assert run is not None
                if message["kind"] == "end":
                    worker.run = None
                yield run, message
                if "again" in message:  # nothing more can be asked of it, not even to end
                    worker.kill()
                    alive = False
            if not alive:
                how, run = self._drop(worker), worker.run
                if run is not None:
                    yield run, {"kind": "end", "died": how}

    def _drop(self, worker: Worker) -> str:
        self._selector.unregister(worker.output)
        self._workers.remove(worker)
        return worker.close()

    def stop(self) -> None:
        """Ask all that are at work to save and stop."""
        for worker in self.busy:
            worker.stop()

    def close(self, *, at_once: bool = False) -> None:
        """End all workers."""
        for worker in list(self._workers):
            if at_once:
                worker.kill()
            self._drop(worker)
        self._selector.close()


def default_size(device: str) -> int:
    """How many runs at a time: one a core, or as many as each GPU's memory has room for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device == "cpu":
        return cores
    import torch

    index = int(device.partition(":")[2] or 0)
    room = torch.cuda.get_device_properties(index).total_memory // GPU_BYTES_A_RUN
    return max(1, min(room, MOST_ON_A_GPU, cores))
