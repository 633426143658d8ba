"""The epochs of real training runs: the time of a whole one, and of the end of one.

On a GPU the end (metrics, probe, checkpoint, the next order and first batch) is a quarter of an
epoch.
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
    """A moment of this process: seconds of the clock and of all threads' cpu time."""

    wall_s: float
    cpu_s: float

    @staticmethod
    def now() -> Instant:
        """Return the current moment."""
        return Instant(time.perf_counter(), time.process_time())

    def until(self, later: Instant) -> Reading:
        """Return the time that passed from here to ``later``."""
        return Reading(later.wall_s - self.wall_s, later.cpu_s - self.cpu_s)


def config(precision: str, device: torch.device, *, size: int, batch: int, epochs: int) -> Config:
    """Return the blog preset for ``epochs``, each with a probe and a checkpoint, without data."""
    sets = {
        "train.precision": precision,
        "train.device": device,
        "train.batch_size": batch,
        "train.epochs": epochs,
    }
    return load_config(
        "blog", [f"views.size={size}", *(f"{key}={value}" for key, value in sets.items())]
    )


def on_files(config: Config, train: Path, test: Path) -> Config:
    """Return ``config`` with two betons, of which ``test`` is labelled."""
    return _on(config, DataConfig(train=str(train), test=str(test)))


def on_textures(config: Config, train: int, test: int) -> Config:
    """Return ``config`` with the embedded textures, which are cached in the user's folder."""
    return _on(config, DataConfig(train=TEXTURES, textures_count=train, textures_test_count=test))


def _on(config: Config, data: DataConfig) -> Config:
    return config.model_copy(update={"data": data})


def whole(config: Config, run: Path) -> list[Reading]:
    """Train in the new folder ``run`` and return the times between the ends of epochs."""
    observer = _EpochEnds()
    api.train(config, run, observer=observer)
    return [earlier.until(later) for earlier, later in pairwise(observer.instants)]


class _EpochEnds(Silent):
    """An observer of the ends of epochs. A checkpoint, saved later, counts to the next epoch."""

    def __init__(self) -> None:
        self.instants: list[Instant] = []

    def epoch_end(self, message: EpochEnd) -> None:
        self.instants.append(Instant.now())


def ends(config: Config, run: Path) -> list[Reading]:
    """Train in the new folder ``run`` and return the times from each epoch's last step to the next.

    For CPUs only: on a GPU a step ends long after its call has returned.
    """
    engines: list[_Noting] = []
    make = capture.engine

    def noting(*arguments: object) -> capture.Engine:
        engines.append(_Noting(make(*arguments)))  # type: ignore[arg-type]
        return engines[-1]

    with mock.patch.object(capture, "engine", noting):
        api.train(config, run)
    (engine,) = engines
    return [
        before.ended.until(after.began)
        for before, after in pairwise(engine.steps)
        if before.epoch != after.epoch
    ]


class _Step(NamedTuple):
    epoch: int
    began: Instant
    ended: Instant


class _Noting:
    """An engine that records when its steps start and end."""

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
