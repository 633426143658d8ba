"""Our step as `fastbyol train` takes it: the engine that it chooses, which on a GPU plays back a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastbyol import load_config
from fastbyol.data.loader import Batch, Loader
from fastbyol.engine import capture
from fastbyol.engine.step import StepMetrics, TrainState
from fastbyol_bench.suite import settle_as_training_does


@dataclass(frozen=True)
class OwnStep:
    """An engine ready for its next step, and a batch of random images on its device. A call draws views and takes a step."""

    engine: capture.Engine
    batch: Batch

    @staticmethod
    def create(sets: Sequence[str], *, size: int, batch: int, device: torch.device) -> OwnStep:
        """The blog preset with ``sets`` (KEY=VALUE) on ``batch`` images of ``size`` pixels; compiled and recorded already.

        Sets the process's switches as a training run does. Raises FastbyolError where the mode fails.
        """
        settle_as_training_does()
        config = load_config("blog", [f"views.size={size}", f"train.batch_size={batch}", *sets])
        state = TrainState.create(config, steps_per_epoch=1000, device=device)
        engine = capture.engine(state, config, capture.choose(config.engine, device))
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
        step = OwnStep(engine, Batch(images, torch.arange(batch, device=device)))
        engine.prepare(step.batch, 0)
        return step

    def __call__(self) -> StepMetrics:
        """Take the next step, without waiting for the device."""
        return self.engine(self.batch, 0)

    @property
    def mode(self) -> str:
        """eager, compile or graph: how steps are taken."""
        return self.engine.mode


def batches_of(loader: Loader) -> Iterator[tuple[Batch, int]]:
    """Our batches with their epoch, epoch after epoch without end."""
    for epoch in range(2**31):
        for batch in loader.epoch(epoch):
            yield batch, epoch
