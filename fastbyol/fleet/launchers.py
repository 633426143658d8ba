"""Who starts the workers: this machine, a cluster's scheduler, or the user."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.console import Console

from fastbyol.engine.device import pick_device
from fastbyol.errors import UsageError
from fastbyol.fleet.board import Board
from fastbyol.fleet.launch import Launch
from fastbyol.fleet.node import Node, NodeEnd
from fastbyol.fleet.slots import slots
from fastbyol.fleet.survey import Surveyor
from fastbyol.fleet.worker import Options


def check(launch: Launch) -> None:
    """Raise UsageError if ``launch`` cannot work here, before anything is written."""
    if launch.launcher == "local":
        pick_device(launch.device)
    only = {"nodes": 1, "partition": None, "time": None, "slurm": ()}
    if launch.launcher != "slurm" and any(getattr(launch, key) != no for key, no in only.items()):
        raise UsageError("--nodes, --partition, --time, --slurm: are for --launcher slurm")
    if launch.launcher != "ray" and launch.address is not None:
        raise UsageError("--address: is for --launcher ray")
    module = {"slurm": "submitit", "ray": "ray"}.get(launch.launcher)
    if module is not None and importlib.util.find_spec(module) is None:
        raise UsageError(
            f"--launcher {launch.launcher}: {module} is not installed: pip install "
            f"'fastbyol[{launch.launcher}]'"
        )
    if launch.launcher == "slurm":
        from fastbyol.fleet import slurm

        slurm.check(launch.time, launch.slurm)


def start(launch: Launch, out: Path, num_left: int, console: Console) -> NodeEnd:
    """Start the workers for ``num_left`` runs of ``out``, and wait for those of this machine."""
    options = Options(str(out), minutes=launch.minutes)
    if launch.launcher == "none":
        return NodeEnd()
    if launch.launcher == "slurm":
        from fastbyol.fleet import slurm

        return NodeEnd(submitted=slurm.submit(launch, out))
    with Board(console, Surveyor(out)) as board:
        if launch.launcher == "ray":
            from fastbyol.fleet import on_ray

            return on_ray.run(launch, options, num_left, board)
        places = slots(launch.device, launch.jobs)[:num_left]
        return Node(options, places, board.line).run(board.draw)
