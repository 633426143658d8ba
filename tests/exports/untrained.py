"""Run folders whose encoders have random weights, statistics and affine parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from fastbyol import config_io
from fastbyol.engine.step import TrainState
from fastbyol.runs import checkpoint
from fastbyol.runs.folder import RunFolder

STEP = 12
# Fashion-MNIST is of Debian's package, and real.
SETS = (
    "data.train=fashion-mnist",
    "data.workers=1",
    "model.projector.hidden=8",
    "model.projector.out=8",
    "model.predictor.hidden=8",
    "model.predictor.out=8",
)


def write_run(path: Path, *sets: str) -> None:
    """Write a run that was stopped at ``STEP``, with another target than online network."""
    config = config_io.load(preset="demo", sets=[*SETS, *sets]).config
    state = TrainState.create(config, steps_per_epoch=1)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for net in (state.online, state.target):
            for name, tensor in net.state_dict().items():
                if tensor.ndim == 1 and ("var" in name or "weight" in name):
                    tensor.uniform_(0.5, 1.5, generator=draws)
                elif tensor.ndim == 1:
                    tensor.normal_(0.0, 0.1, generator=draws)
    text = config_io.dump(config)
    with RunFolder.create(path, config) as folder:
        checkpoint.save(folder.checkpoints, STEP, state.tensors(), {"config": text})
