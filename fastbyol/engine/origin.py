"""A new run that starts from another run's weights."""

from __future__ import annotations

from pathlib import Path

import torch

from fastbyol import config_io
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from fastbyol.runs import checkpoint


def source_file(run_or_file: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the checkpoint that ``--init-from`` means, and warnings.

    A run folder means its newest sound checkpoint. The whole file is checked.
    """
    loaded = (
        checkpoint.load_latest(run_or_file / "checkpoints")
        if run_or_file.is_dir()
        else checkpoint.load(run_or_file)
    )
    return loaded.path.resolve(), loaded.warnings


@torch.no_grad()
def copy_weights(state: TrainState, file: Path) -> str:
    """Copy both networks, with norm statistics, from the checkpoint ``file`` into ``state``.

    Momentum and step stay a new run's. Returns the checkpoint's digest. Raises UsageError naming
    the first tensor that is missing or has another shape, and leaves ``state`` alone then.
    """
    loaded = checkpoint.load(file)
    source = TrainState.create(config_io.parse(loaded.meta["config"], str(file)), steps_per_epoch=1)
    source.load_tensors(loaded.tensors)
    pairs = []
    for name, net, other in (
        ("online", state.online, source.online),
        ("target", state.target, source.target),
    ):
        mine, theirs = net.state_dict(), other.state_dict()
        for key in sorted(mine.keys() | theirs.keys()):
            if key not in mine or key not in theirs or mine[key].shape != theirs[key].shape:
                kinds = [
                    str(tuple(part[key].shape)) if key in part else "absent"
                    for part in (theirs, mine)
                ]
                raise UsageError(
                    f"{file}: cannot start from it: {name}.{key} is {kinds[0]} there and "
                    f"{kinds[1]} in this network"
                )
            pairs.append((mine[key], theirs[key]))
    for mine_, theirs_ in pairs:
        mine_.copy_(theirs_)
    state.renew()
    return loaded.digest
