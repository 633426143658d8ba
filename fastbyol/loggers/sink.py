"""What a logger is sent, and the libraries that it can be sent to."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np

from fastbyol import config_io
from fastbyol.config import Config, LoggerName, Resolved
from fastbyol.errors import FastbyolError, UsageError, check_choice, one_line
from fastbyol.files import open_regular
from fastbyol.runs.durable import write_text, writing
from fastbyol.runs.folder import CONFIG
from fastbyol.text import printable

FOLDER = "loggers"
Level = Literal["info", "warn", "error"]
# The modules that must be there, which extra has them, and which of ours writes to them.
LIBRARIES: Mapping[LoggerName, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}


# What the names of an epoch's end begin with, and of the weights before the first step.
ENDS = ("epoch/", "untrained/")


@dataclass
class Entry:
    """What belongs to one step: ``scalars`` by name, the layers' values (segments,) by measure.

    Its step is a training step's number, from 0, and the number of steps done where an epoch ended.
    ``unix_s`` is when the trainer wrote it, the same however often the entry is made.
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    unix_s: float = 0.0
    picture: Path | None = None


@dataclass(frozen=True)
class Alert:
    """A change of the run's state, after ``step`` steps."""

    step: int
    state: str
    text: str
    level: Level
    unix_s: float = 0.0


class Newest(NamedTuple):
    """The newest step that a store has, and its newest epoch's end, in steps done; -1 is none."""

    step: int
    end: int

    @staticmethod
    def of(rows: Iterable[tuple[int, Iterable[str]]]) -> Newest:
        """Return the newest of ``rows``, each of them a step and names of what is there at it."""
        step = end = -1
        for number, names in rows:
            for name in names:
                if name == "epoch":  # which every step has
                    step = max(step, number)
                elif name.startswith(ENDS):
                    end = max(end, number)
        return Newest(step, end)


class Sink(Protocol):
    """A library's store of one run, open for adding."""

    # What the store had when it was opened.
    newest: Newest
    # Whether an epoch's end may come in an entry before its step's: the store tells them apart.
    splits: bool
    # Where to look at it, empty where the documents say enough.
    where: str

    def send(self, entries: Sequence[Entry]) -> None:
        """Add entries that are not there yet, in order."""

    def alert(self, alert: Alert) -> None:
        """Tell whoever watches of a change of state."""

    def close(self, *, is_finished: bool) -> None:
        """Write what is buffered, and close."""


class LoggedRun:
    """A run as one logger sees it, with what that logger remembers of it in ``folder``.

    ``trainer`` is the process that trains the run, None where none does.
    """

    def __init__(self, path: Path, name: LoggerName, trainer: int | None = None) -> None:
        self.path, self.trainer = path, trainer
        self.folder = path / FOLDER / name
        self.config = config_io.read_run(path / CONFIG)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.memory = self._read()
        if not isinstance(self.memory.get("id"), str):
            # Written before it is used: a process that is killed here leaves no second run behind.
            self.remember(id=uuid.uuid4().hex)

    @property
    def name(self) -> str:
        """The name to show: the folder's, without invisible characters."""
        return printable(self.path.resolve().name)

    @property
    def settings(self) -> dict[str, Any]:
        """Every number of the run by its dotted key."""
        return config_io.flatten(self.config)

    @property
    def id(self) -> str:
        """The run's own id, 32 hexadecimal digits."""
        return str(self.memory["id"])

    def remember(self, **values: Any) -> None:
        """Write ``values`` down for later processes."""
        self.memory |= values
        with writing(self.folder / "state.json"):
            write_text(self.folder / "state.json", json.dumps(self.memory, indent=2) + "\n")

    def _read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, RecursionError):
            with open_regular(self.folder / "state.json") as file:
                memory = json.load(file)
            if isinstance(memory, dict):
                return memory
        return {}


def load(name: LoggerName) -> ModuleType:
    """Return the module that writes to the library ``name``, which is imported here.

    Raises FastbyolError, whatever it is that the library raises.
    """
    try:
        return import_module(f"fastbyol.loggers.to_{name}")
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise FastbyolError(f"{name} cannot be imported: {kind}: {one_line(error)}") from error


def open_sink(name: LoggerName, run: LoggedRun) -> Sink:
    """Open the store of ``run`` in the library ``name``."""
    return cast(Sink, load(name).open_sink(run))


def refuse_missing(config: Config) -> None:
    """Raise UsageError where a library that ``log.to`` names is not installed."""
    for name in config.log.to:
        missing = [module for module in LIBRARIES[name] if not _is_installed(module)]
        if missing:
            raise UsageError(
                f"log.to = {name}: {', '.join(missing)} is not installed: "
                f"pip install 'fastbyol[{name}]'"
            )


def with_loggers(config: Resolved, names: Iterable[str]) -> Resolved:
    """Return ``config`` with other loggers, whose ``names`` may be joined by commas.

    Raises UsageError for a name of none.
    """
    words = [word for name in names for word in name.split(",") if word]
    for word in words:
        check_choice("--log", word, LIBRARIES)
    return config.model_copy(update={"log": config.log.model_copy(update={"to": tuple(words)})})


def _is_installed(module: str) -> bool:
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return False
    # A folder of that name, which W&B makes where it is called, has no origin.
    return spec is not None and spec.origin is not None


def as_floats(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return a row's numbers by name, NaN for null, which stands for what was not finite."""
    return {
        prefix + name: math.nan if value is None else float(value)
        for name, value in row.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }
