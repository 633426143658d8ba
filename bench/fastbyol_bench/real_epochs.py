"""Epochs of real training runs: how long a whole one takes, and how long the end of one does.

An epoch costs more than its steps: metrics are written, the network is probed, a checkpoint is saved and digested, the next
epoch's order is drawn and its first batch read. On a GPU that is a quarter of an epoch.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from fastbyol import api, load_config
from fastbyol.config import Config, DataConfig
from fastbyol.data.embedded import TEXTURES
from fastbyol.data.loader import Batch
from fastbyol.engine import capture
from fastbyol.engine.observer import EpochEnd, Silent
from fastbyol.engine.step import StepMetrics
from fastbyol_bench.harness import Reading


class Instant(NamedTuple):
    """A moment of this process, seconds of the clock and of all threads' cpu time."""

    wall_s: float
    cpu_s: float

    @staticmethod
    def now() -> Instant:
        """This moment."""
        return Instant(time.perf_counter(), time.process_time())

    def until(self, later: Instant) -> Reading:
        """What passed from here to ``later``."""
        return Reading(later.wall_s - self.wall_s, later.cpu_s - self.cpu_s)


def config(precision: str, device: torch.device, *, size: int, batch: int, epochs: int) -> Config:
    """The blog preset for ``epochs``, each probed and saved, in a run without data yet."""
    sets = {"train.precision": precision, "train.device": device, "train.batch_size": batch, "train.epochs": epochs}
    return load_config("blog", [f"views.size={size}", *(f"{key}={value}" for key, value in sets.items())])


def on_files(config: Config, train: Path, test: Path) -> Config:
    """``config`` with two betons, the second one labelled."""
    return _on(config, DataConfig(train=str(train), test=str(test)))


def on_textures(config: Config, train: int, test: int) -> Config:
    """``config`` with so many images of the embedded set, made at the first call and kept in the user's cache folder."""
    return _on(config, DataConfig(train=TEXTURES, textures_count=train, textures_test_count=test))


def _on(config: Config, data: DataConfig) -> Config:
    return config.model_copy(update={"data": data})


def whole(config: Config, run: Path) -> list[Reading]:
    """Train ``config`` in the new folder ``run``; what passed from one epoch's end to the next, the first epoch left out."""
    observer = _EpochEnds()
    api.train(config, run, observer=observer)
    return [earlier.until(later) for earlier, later in pairwise(observer.instants)]


class _EpochEnds(Silent):
    """Remembers when each epoch ended. The checkpoint is saved after that, and so counted to the next epoch."""

    def __init__(self) -> None:
        self.instants: list[Instant] = []

    def epoch_end(self, message: EpochEnd) -> None:
        self.instants.append(Instant.now())


def ends(config: Config, run: Path) -> list[Reading]:
    """Train ``config`` in the new folder ``run``; what passed from the last step of each epoch but the last to the next step.

    For a cpu: on a GPU a step is over long after its call has returned.
    """
    engines: list[_Noting] = []
    make = capture.engine

    def noting(*arguments: object) -> capture.Engine:
        engines.append(_Noting(make(*arguments)))  # type: ignore[arg-type]
        return engines[-1]

    with mock.patch.object(capture, "engine", noting):
        api.train(config, run)
    (engine,) = engines
    return [before.ended.until(after.began) for before, after in pairwise(engine.steps) if before.epoch != after.epoch]


class _Step(NamedTuple):
    epoch: int
    began: Instant
    ended: Instant


class _Noting:
    """An engine that remembers when its steps began and ended."""

    def __init__(self, engine: capture.Engine) -> None:
        self._engine = engine
        self.steps: list[_Step] = []

    @property
    def mode(self) -> str:
        return self._engine.mode

    def prepare(self, batch: Batch, epoch: int) -> None:
        self._engine.prepare(batch, epoch)

    def __call__(self, batch: Batch, epoch: int) -> StepMetrics:
        began = Instant.now()
        metrics = self._engine(batch, epoch)
        self.steps.append(_Step(epoch, began, Instant.now()))
        return metrics
