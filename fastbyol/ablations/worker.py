"""A process that trains one run after the other, so that importing and compiling is paid once.

    python -m fastbyol.ablations.worker PARENT_PID

Requests come as JSON lines on standard input ({"path", "config", "origin"}), and what happens goes out as JSON lines on
standard output: the observer's messages, then {"kind": "end"}, with how the run stands, with ``error``, or with ``again`` where
another worker must go on with it and this one can do no more. SIGTERM stops the run as it does everywhere, saved. The process
ends with its input and, where the system can be asked for it, with its parent.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from fastbyol import config_io, output
from fastbyol.config import Resolved
from fastbyol.engine import trainer
from fastbyol.engine.allocator import keep_freed_memory
from fastbyol.engine.observer import EpochEnd, Progress, Start
from fastbyol.engine.precision import choose_precision
from fastbyol.errors import FastbyolError, NoGraphError
from fastbyol.runs import inputs
from fastbyol.runs.folder import CONFIG, RunFolder

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
Say = Callable[[str, Mapping[str, Any]], None]


class Speaker:
    """The observer that writes down what it is told."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def start(self, message: Start) -> None:
        """Pass on the start."""
        self._say("start", asdict(message))

    def progress(self, message: Progress) -> None:
        """Pass on a step."""
        self._say("progress", {"step": message.step, "epoch": message.epoch, "img_s": message.img_s})

    def epoch_end(self, message: EpochEnd) -> None:
        """Pass on an epoch."""
        self._say("epoch", {**asdict(message), "metrics": dict(message.metrics)})

    def note(self, text: str) -> None:
        """Pass on a remark."""
        self._say("note", {"text": text})


def work(request: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Train the run that ``request`` names, or go on with it; returns how it ended."""
    path = Path(request["path"])
    try:
        speaker = Speaker(say)
        with _folder(path, request, speaker) as folder:
            summary = trainer.fit(folder, _with_places(folder.config, request), speaker)
    except NoGraphError as error:
        return {"again": str(error)}
    except FastbyolError as error:
        return {"error": str(error)}
    except KeyboardInterrupt:
        return {"finished": False}
    except Exception as error:  # one run's fault must not cost the others; the traceback is in the log
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
    return asdict(summary)


def _folder(path: Path, request: Mapping[str, Any], speaker: Speaker) -> RunFolder:
    if (path / CONFIG).is_file():
        return RunFolder.open(path, lock=True)
    config = choose_precision(config_io.parse(request["config"], where=str(path)), speaker.note)
    return RunFolder.create(path, inputs.with_paths(config, config), request["origin"])


def _with_places(config: Resolved, request: Mapping[str, Any]) -> Resolved:
    """``config`` of a run that may be gone on with, with its files where the request has them: they may have been moved."""
    return inputs.with_paths(config, config_io.parse(request["config"], where=request["path"]))


def die_with_parent(parent: int) -> None:
    """Ask Linux for SIGKILL when the parent dies, so that nobody trains on in a folder that the next call takes up."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was asked
        sys.exit(1)


def main() -> None:
    """Answer requests until the input ends."""
    die_with_parent(int(sys.argv[1]))
    keep_freed_memory()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log
    with output.guarded():  # a log on a full disk ends no run
        for line in sys.stdin:
            _tell(out, "end", work(json.loads(line), lambda kind, fields: _tell(out, kind, fields)))


def _tell(out: TextIO, kind: str, fields: Mapping[str, Any]) -> None:
    out.write(json.dumps({"kind": kind, **fields}) + "\n")


if __name__ == "__main__":
    main()
