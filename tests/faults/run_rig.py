"""What the tests that hurt runs share: a tiny run in a process of its own, and what must be equal
in the end.

Processes come from a fork server that has the slow imports behind it and no threads yet, so that
one costs about a second. Counts are small in ``make test`` and those of the table in README.md with
``FASTBYOL_FAULTS=full`` (``make faults``).
"""

from __future__ import annotations

import faulthandler
import mmap
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fastbyol import api, config_io
from fastbyol.cli import main, train
from fastbyol.config import Config
from fastbyol.engine import trainer
from fastbyol.runs import checkpoint
from fastbyol.show import figures
from tiny import beton_files, tiny_config

FULL = os.environ.get("FASTBYOL_FAULTS") == "full"
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["fastbyol.api", "fastbyol.cli.main", "fastbyol.show.run_report", "ffcv.loader", "rich.live"]
)
PHASES = ("start", "step", "probe", "end")


def many(small: int, full: int) -> int:
    """How often a fault is injected: the count for every day, or that of ``make faults``."""
    return full if FULL else small


def make_config(folder: Path, *sets: str) -> Config:
    """Three epochs of six steps, a checkpoint every other step."""
    return tiny_config(beton_files(folder), "run.checkpoint_every_steps=2", *sets)


class Marks:
    """What a child is doing, in two bytes that outlive it: its loop, and its saver beside that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clear()

    def clear(self) -> None:
        """Back to the start, for the next child."""
        self.path.write_bytes(b"\0\0")

    @property
    def phase(self) -> str:
        """What its loop does, and ``checkpoint`` where its saver writes one meanwhile."""
        loop, writing = self.path.read_bytes()
        return "checkpoint" if writing else PHASES[loop]

    def wait_for_step(self, process: BaseProcess) -> None:
        """Return once the child has begun its loop, or is dead."""
        while self.phase == "start" and process.is_alive():
            time.sleep(0.002)

    def wait_for_write(self, process: BaseProcess, count: int) -> None:
        """Return as soon as the child has begun to write so many checkpoints, or is dead."""
        was_writing = False
        while count and process.is_alive():
            time.sleep(0.0005)
            writing = bool(self.path.read_bytes()[1])
            count -= writing and not was_writing
            was_writing = writing


def _marking(
    bytes_: mmap.mmap, index: int, value: int, work: Callable[..., Any]
) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        before, bytes_[index] = bytes_[index], value
        try:
            return work(*args, **kwargs)
        finally:
            bytes_[index] = before

    return marked


def _mark_phases(path: Path) -> None:
    with path.open("r+b") as file:
        bytes_ = mmap.mmap(file.fileno(), 2)
    bytes_[:2] = b"\0\0"
    for owner, name, phase in (
        (trainer.Loop, "run", "step"),
        (trainer, "evaluate_together", "probe"),
        (train, "finish", "end"),
    ):
        marked = _marking(bytes_, 0, PHASES.index(phase), getattr(owner, name))
        setattr(owner, name, marked)
    checkpoint.save = _marking(bytes_, 1, 1, checkpoint.save)


def _go_on(run: Path, config: Config, marks: Path) -> None:
    _mark_phases(marks)
    if (run / "config.toml").exists():
        api.resume(run)
    else:
        api.train(config, run)


def start(run: Path, config: Config, marks: Marks) -> BaseProcess:
    """A child that trains the run or goes on with it."""
    marks.clear()
    process = PROCESSES.Process(target=_go_on, args=(run, config, marks.path))
    process.start()
    return process


def _command(arguments: tuple[str, ...], output: Path, marks: Path) -> None:
    os.setsid()
    descriptor = os.open(
        output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    )  # a terminal is this session's from here on
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()  # a child that hangs is ended by SIGABRT, and says where it was
    _mark_phases(marks)
    figures.available = lambda: False  # two seconds of drawing that these tests are not about
    sys.argv = ["fastbyol", *arguments]
    main.main()


def command(run: Path, config: Config, output: Path, marks: Marks) -> BaseProcess:
    """``fastbyol train`` or ``resume`` in a session of its own, what it says in ``output``."""
    arguments: tuple[str, ...] = ("resume", str(run))
    if not (run / "config.toml").exists():
        file = Path(config.data.train).with_name("config.toml")  # one place, since origins name it
        file.write_text(config_io.dump(config))
        arguments = ("train", "--config", str(file), "--out", str(run))
    marks.clear()
    process = PROCESSES.Process(target=_command, args=(arguments, output, marks.path))
    process.start()
    return process


def checkpoints(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run / "checkpoints").glob("ckpt-*.safetensors"))


def contents(run: Path) -> dict[str, bytes]:
    """Every byte that must be the same whatever happened on the way: the last checkpoint and both
    records.
    """
    files = (checkpoints(run)[-1], run / "metrics.jsonl", run / "layers.npy")
    return {path.name: path.read_bytes() for path in files}


def leftovers(run: Path) -> list[str]:
    """Files that no finished run holds."""
    known = {
        "config.toml",
        "env.json",
        "metrics.jsonl",
        "layers.npy",
        "timing.jsonl",
        ".lock",
        "checkpoints",
        "report.html",
    }
    return [path.name for path in run.iterdir() if path.name not in known]
