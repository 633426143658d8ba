"""A run that takes a second:

48 textures images of 16 px, six steps an epoch, a network of a few thousand parameters.
"""

from __future__ import annotations

from pathlib import Path

from fastbyol import load_config
from fastbyol.config import Config
from fastbyol.data import convert

STEPS_PER_EPOCH = 6
NETWORK = (
    "views.size=16",
    "model.width=4",
    "model.stem=small",
    "model.projector.hidden=16",
    "model.projector.out=8",
    "model.predictor.hidden=16",
    "model.predictor.out=8",
)
TINY = (
    *NETWORK,
    "data.textures_count=64",
    "data.workers=1",
    "optim.sgd_lr=0.1",
    "train.batch_size=8",
    "train.epochs=3",
    "train.precision=fp32",
    "train.device=cpu",
    "run.drain_every_steps=4",
)
# With a tau of 0 and no norm the target is the online net of a step ago: the shortest way to a
# constant.
COLLAPSING = (
    "model.norm=gn", "model.projector.norm=none", "model.predictor.norm=none", "schedule.tau=0.0",
    "schedule.tau_schedule=constant", "optim.sgd_lr=0.5",
)  # fmt: skip


def beton_files(folder: Path) -> tuple[Path, Path]:
    """Write a training and a test file, once per folder."""
    paths = folder / "train.beton", folder / "test.beton"
    for seed, path in enumerate(paths):
        if not path.exists():
            convert.convert("textures", path, count=48 + 2 * seed, size=16, seed=seed)
    return paths


def tiny_config(files: tuple[Path, Path], *sets: str) -> Config:
    """Make the configuration of the tiny run on ``files``, with ``key=value`` changes."""
    return load_config("blog", [*TINY, f"data.train={files[0]}", f"data.test={files[1]}", *sets])
