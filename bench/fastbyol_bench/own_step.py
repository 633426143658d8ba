"""Our step as ``fastbyol train`` takes it, with the engine that it chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastbyol import load_config
from fastbyol.data.loader import Batch, Loader
from fastbyol.engine import capture
from fastbyol.engine.step import StepMetrics, TrainState
from fastbyol_bench.suite import use_training_switches

# The settings of both measured methods.
METHODS: dict[str, tuple[str, ...]] = {
    "bn": (),
    "gn_ws": ("model.norm=gn", "model.ws=true", "optim.name=lars"),
}


@dataclass(frozen=True)
class OwnStep:
    """An engine ready for its next step, and a batch of a resident set of random images."""

    engine: capture.Engine
    batch: Batch

    @staticmethod
    def create(sets: Sequence[str], *, size: int, batch: int, device: torch.device) -> OwnStep:
        """Build and prepare an engine of the blog preset with the settings ``sets`` (KEY=VALUE).

        ``batch`` images have ``size`` x ``size`` pixels. Sets the process's switches as a training
        run does. Raises FastbyolError if the engine's mode fails.
        """
        use_training_switches()
        config = load_config("blog", [f"views.size={size}", f"train.batch_size={batch}", *sets])
        state = TrainState.create(config, steps_per_epoch=1000, device=device)
        engine = capture.engine(state, config, capture.choose(config.engine, device))
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
        ids = torch.arange(batch, device=device)
        step = OwnStep(engine, Batch(images, ids, ids))
        engine.prepare(step.batch, 0)
        return step

    def __call__(self) -> StepMetrics:
        """Draw views and take the next step, without waiting for the device."""
        return self.engine(self.batch, 0)

    @property
    def mode(self) -> str:
        """The mode of the engine: eager, compile or graph."""
        return self.engine.mode


def batches_of(loader: Loader) -> Iterator[tuple[Batch, int]]:
    """Yield the loader's batches with their epoch, endlessly."""
    for epoch in range(2**31):
        for batch in loader.epoch(epoch):
            yield batch, epoch
