"""The start of a run's processes, and of all of them again after one is lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbyol.config import Config
from fastbyol.engine.device import pick_device
from fastbyol.engine.interrupt import SIGNALS, Ended
from fastbyol.engine.ports import meet_launchers
from fastbyol.engine.ranks import count_ranks, run_workers
from fastbyol.engine.worker import OUTCOME, outcome, program_as_typed, worker
from fastbyol.errors import UsageError
from fastbyol.runs.metrics import METRICS_FILE

# Restarts after which a rank is lost for a reason that stays.
MOST_RESTARTS = 10
# A step and a checkpoint on a slow disk end within this.
GRACE_S = 300


@dataclass(frozen=True)
class Processes:
    """The processes to start: ``count`` on each of ``nodes`` nodes, which meet at ``endpoint``."""

    count: int
    nodes: int = 1
    endpoint: str = "localhost:0"

    @property
    def total(self) -> int:
        """The number of processes on all nodes."""
        return self.count * self.nodes


def processes_of(
    config: Config,
    *,
    gpus: int | None,
    processes: int | None,
    nodes: int | None = None,
    endpoint: str | None = None,
    ranks: int | None = None,
) -> Processes | None:
    """Return the processes that a command has to start, or None if this one trains.

    On a cpu there is one for each rank unless ``processes`` says how many, on a GPU one for each of
    ``gpus``. ``ranks`` replaces the configured number. Raises UsageError for numbers that cannot
    be, before anything is started.
    """
    if worker() is not None:
        return None
    import torch

    on_gpu = pick_device(config.train.device).type == "cuda"
    asked, nodes = ranks or config.train.ranks, nodes or 1
    if gpus is not None and not on_gpu:
        raise UsageError(
            f"--gpus: {gpus} asked for, and the run is on a cpu: take --ranks {gpus} instead, or "
            "--device cuda where there are GPUs"
        )
    if gpus is not None and processes not in (None, gpus):
        raise UsageError(f"--processes: {processes} differs from --gpus {gpus}: name one of them")
    if gpus is not None and gpus > torch.cuda.device_count():
        raise UsageError(
            f"--gpus: {gpus} asked for, this machine has {torch.cuda.device_count()}: take as many "
            "or fewer"
        )
    if nodes > 1 and endpoint is None:
        raise UsageError(
            f"--nnodes: {nodes} nodes have to meet: name a free port of one of them with "
            "--rdzv-endpoint HOST:PORT, the same on all"
        )
    if nodes == 1 and endpoint is not None:
        raise UsageError(
            f"--rdzv-endpoint: {endpoint} is where nodes meet, and there is one: say how many with "
            "--nnodes"
        )
    if asked is not None and asked % nodes:
        raise UsageError(
            f"--nnodes: {asked} ranks cannot be spread evenly over {nodes} nodes: take as many "
            "--ranks as they divide"
        )
    count = gpus or processes or (1 if on_gpu or asked is None else asked // nodes)
    started = Processes(count, nodes, endpoint or "localhost:0")
    count_ranks(config, started.total, asked)
    return started if started.total > 1 else None


def start(processes: Processes, arguments: Sequence[str], run: Path) -> int:
    """Run this program with ``arguments`` in ``processes`` and return their exit code.

    Raises the errors of ``ranks.run_workers``, and Ended for a signal before ``run`` had a step.
    """
    if processes.nodes > 1:
        meet_launchers(processes.endpoint)
    with tempfile.TemporaryDirectory(prefix="fastbyol-") as folder:
        os.environ[OUTCOME] = str(Path(folder) / "outcome")
        ended_by = run_workers(
            [*program_as_typed(), *arguments],
            processes=processes.count,
            nodes=processes.nodes,
            endpoint=processes.endpoint,
            restarts=MOST_RESTARTS,
            grace_s=GRACE_S,
            signals=SIGNALS,
            logs=Path(folder),
        )
        if ended_by is not None and not (run / METRICS_FILE).exists():
            raise Ended(ended_by)  # before there was anything to save
        return outcome()
