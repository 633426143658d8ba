"""A new run from another run's weights."""

from __future__ import annotations

from pathlib import Path

import torch

from fastbyol import config_io
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from fastbyol.runs import checkpoint


def source_file(run_or_file: Path) -> tuple[Path, tuple[str, ...]]:
    """The checkpoint that ``--init-from`` means, and warnings: the file itself, or a run's newest sound one. Checked whole."""
    found = checkpoint.load_latest(run_or_file / "checkpoints") if run_or_file.is_dir() else checkpoint.load(run_or_file)
    return found.path.resolve(), found.warnings


@torch.no_grad()
def copy_weights(state: TrainState, file: Path) -> str:
    """Copy both networks of the checkpoint ``file``, statistics of their norms included, into a new ``state``.

    Momentum and step stay those of a new run. Returns the checkpoint's digest. Raises UsageError naming the first tensor that
    is missing or of another shape; ``state`` is unchanged then.
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
    return loaded.digest
