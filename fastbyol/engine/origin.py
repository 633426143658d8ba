"""Where a run's weights and its right to go on come from: the configuration it was made with, and another run's weights."""

from __future__ import annotations

from pathlib import Path

import torch

from fastbyol import config_io
from fastbyol.config import Config, resolve
from fastbyol.engine import checkpoint
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError

# What may change between two stretches of a run: no number of it depends on these.
FREE = frozenset(
    (
        *("data.cache", "data.workers", "train.max_skipped_steps"),
        *("run.checkpoint_every_steps", "run.drain_every_steps", "run.keep_checkpoints"),
    )
)


def refuse_changed(run: Path, config: Config, recorded: str, where: str) -> None:
    """Raise UsageError where ``config`` is not what ``recorded``, a config.toml kept in ``where``, says, but for ``FREE``."""
    now, then = config_io.flatten(config), config_io.flatten(resolve(config_io.parse(recorded, where)))
    for key in now:
        if now[key] != then[key] and key not in FREE:
            raise UsageError(
                f"{run / 'config.toml'}: {key} is {_shown(now[key])}, the run was made with {_shown(then[key])}: put it back, "
                f"or start another run from these weights with `fastbyol train --init-from {run}`"
            )


def _shown(value: object) -> str:
    return "not set" if value is None else config_io.show(value)


def source_file(run_or_file: Path) -> tuple[Path, tuple[str, ...]]:
    """The checkpoint that ``--init-from`` means, and warnings: the file itself, or a run's newest sound one. Checked whole."""
    found = checkpoint.load_latest(run_or_file / "checkpoints") if run_or_file.is_dir() else checkpoint.load(run_or_file)
    return found.path.resolve(), found.warnings


@torch.no_grad()
def take_weights(state: TrainState, file: Path) -> None:
    """Copy both networks of the checkpoint ``file``, statistics of their norms included, into a new ``state``.

    Momentum and step stay those of a new run. Raises UsageError naming the first tensor that is missing or of another shape;
    ``state`` is unchanged then.
    """
    loaded = checkpoint.load(file)
    source = TrainState.create(config_io.parse(loaded.meta["config"], str(file)), steps_per_epoch=1)
    source.load_tensors(loaded.tensors)
    pairs = []
    for name, net, other in (("online", state.online, source.online), ("target", state.target, source.target)):
        mine, theirs = net.state_dict(), other.state_dict()
        for key in sorted(mine.keys() | theirs.keys()):
            if key not in mine or key not in theirs or mine[key].shape != theirs[key].shape:
                kinds = [str(tuple(part[key].shape)) if key in part else "absent" for part in (theirs, mine)]
                raise UsageError(
                    f"{file}: cannot start from it: {name}.{key} is {kinds[0]} there and {kinds[1]} in this network"
                )
            pairs.append((mine[key], theirs[key]))
    for mine_, theirs_ in pairs:
        mine_.copy_(theirs_)
    # Through the front door once more, which brings copies in working precision up to date.
    state.load_tensors({name: tensor.clone() for name, tensor in state.tensors().items()})
