"""A GPU whose graphs cannot be captured, simulated on a cpu, for a test or a program of its own.

    python no_graph.py train ...

Compiling is left out: it takes a minute on a cpu, and steps that are not compiled are the same
    steps. Every start of the
program adds a line to the file that NO_GRAPH_STARTS names: its process number and its arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastbyol.cli import main as command_line
from fastbyol.config import EngineConfig
from fastbyol.engine import capture
from fastbyol.engine.step import forward

WHY = "AcceleratorError: CUDA error: operation not permitted when stream is capturing"


def fail(work: Callable[[], object]) -> Any:
    """Fail like a GPU that cannot capture."""
    work()
    raise torch.AcceleratorError(
        "CUDA error: operation not permitted when stream is capturing\nmore"
    )


def install(
    record: Callable[..., Any] = fail, patch: Callable[[object, str, object], None] = setattr
) -> None:
    """Make runs on the cpu choose as on a GPU, and capture by ``record``."""
    choose = capture.choose

    def on_gpu(config: EngineConfig, device: torch.device, **of_run: Any) -> capture.Choice:
        return choose(config, torch.device("cuda", 0), **of_run)

    patch(capture, "choose", on_gpu)
    patch(capture, "record_cuda", record)
    patch(capture, "compiled_forward", lambda **_: forward)


def main() -> None:
    """Log the start and run the program."""
    with Path(os.environ["NO_GRAPH_STARTS"]).open("a") as starts:
        starts.write(f"{os.getpid()} {' '.join(sys.argv[1:])}\n")
    install()
    command_line.main()


if __name__ == "__main__":
    main()
