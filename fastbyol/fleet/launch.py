"""How a call wants its workers started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LauncherName = Literal["local", "slurm", "ray", "none"]


@dataclass(frozen=True)
class Launch:
    """How workers are started: ``launcher``, and how many there are.

    ``jobs``: workers on each machine, None for as many as its devices have room for. ``device``:
    auto, cpu, cuda or cuda:N. ``minutes``: after so many each worker saves and ends. ``nodes``:
    machines of a SLURM cluster, for ``time`` in ``partition``; ``slurm`` are further parameters
    KEY=VALUE of its jobs. ``address``: of a Ray cluster.
    """

    launcher: LauncherName = "local"
    jobs: int | None = None
    device: str = "auto"
    minutes: float | None = None
    nodes: int = 1
    partition: str | None = None
    time: str | None = None
    slurm: tuple[str, ...] = ()
    address: str | None = None
