"""A process that trains one run after the other, so that importing and compiling is paid once.

    python -m fastbyol.ablations.worker PARENT_PID DESCRIPTOR

Requests come through the connection DESCRIPTOR, and messages go back through it: see ``work``.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastbyol import config_io, output
from fastbyol.config import Resolved
from fastbyol.engine import trainer
from fastbyol.engine.allocator import keep_freed_memory
from fastbyol.engine.observer import EpochEnd, Start, StepReport
from fastbyol.engine.precision import choose_precision
from fastbyol.errors import FastbyolError, NoGraphError
from fastbyol.runs import inputs
from fastbyol.runs.folder import CONFIG, RunFolder

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
Send = Callable[[dict[str, Any]], None]


class JsonObserver:
    """The observer that sends a run's messages as plain values."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def start(self, message: Start) -> None:
        """Send the start."""
        self._send({"kind": "start", **asdict(message)})

    def progress(self, message: StepReport) -> None:
        """Send a step."""
        self._send(
            {
                "kind": "progress",
                "step": message.step,
                "epoch": message.epoch,
                "img_s": message.img_s,
            }
        )

    def epoch_end(self, message: EpochEnd) -> None:
        """Send an epoch."""
        self._send({"kind": "epoch", **asdict(message), "metrics": dict(message.metrics)})

    def note(self, text: str) -> None:
        """Send a remark."""
        self._send({"kind": "note", "text": text})


def work(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Train the run that ``request`` names (path, config, origin), or go on with it.

    Return how it ended: its summary, ``error``, or ``again`` where another worker must go on with
    the run and this process can do no more on its device. SIGTERM stops the run, saved.
    """
    path, observer = Path(request["path"]), JsonObserver(send)
    try:
        asked = config_io.parse(request["config"], where=str(path))
        with _folder(path, asked, request["origin"], observer) as folder:
            # The files of a run that goes on may have been moved: they are where the request has
            # them.
            summary = trainer.fit(folder, inputs.with_paths(folder.config, asked), observer)
    except NoGraphError as error:
        return {"again": str(error)}
    except FastbyolError as error:
        return {"error": str(error)}
    except KeyboardInterrupt:
        return {"finished": False}
    except (
        Exception
    ) as error:  # one run's fault must not cost the others; the traceback is in the log
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
    return asdict(summary)


def _folder(
    path: Path, asked: Resolved, origin: Mapping[str, str], observer: JsonObserver
) -> RunFolder:
    if (path / CONFIG).is_file():
        return RunFolder.open(path, lock=True)
    config = choose_precision(asked, observer.note)
    return RunFolder.create(path, inputs.with_paths(config, config), origin)


def die_with_parent(parent: int) -> None:
    """Ask Linux for SIGKILL when the parent dies, so that the next call finds every folder free."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the request
        sys.exit(1)


def main() -> None:
    """Answer requests until the connection is closed."""
    die_with_parent(int(sys.argv[1]))
    keep_freed_memory()
    connection = Connection(int(sys.argv[2]))
    os.set_inheritable(
        connection.fileno(), False
    )  # else the runner would not see this process's end in time
    with output.guarded():  # a log on a full disk ends no run
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            connection.send({"kind": "end", **work(request, connection.send)})


if __name__ == "__main__":
    main()
