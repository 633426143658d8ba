"""Ranks for tests: as threads of one process, and as processes without torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import run_rig
import torch
from processes import PATIENCE_S
from torch import Tensor

from fastbyol import load_config, views
from fastbyol.config import Resolved
from fastbyol.engine.ranks import Alone, Ranks, Team, run_threads
from fastbyol.engine.step import StepMetrics, TrainState, share_of, train_step
from fastbyol_bench.rank_times import environment, free_port
from tiny import NETWORK

T = TypeVar("T")
BATCH, SIZE = 12, 16
SMALL = (*NETWORK, f"train.batch_size={BATCH}", "train.epochs=3", "train.device=cpu")


def small(*sets: str) -> Resolved:
    """A network of a few thousand parameters, in fp64 unless ``sets`` say otherwise."""
    return load_config("blog", [*SMALL, "train.precision=fp64", *sets])


def in_threads(count: int, work: Callable[[Ranks], T]) -> list[T]:
    """What ``work`` returns as each of ``count`` ranks; the first error is raised."""
    return run_threads(Team(count, Alone()).ranks(), work)


def in_order(count: int, work: Callable[[Ranks], T]) -> list[T]:
    """``in_threads``, and for one rank no thread."""
    return [work(Alone())] if count == 1 else in_threads(count, work)


def images(count: int = 4 * BATCH) -> Tensor:
    """Noise, the same each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)


def train(
    config: Resolved, ranks: Ranks, steps: int = 1, forward: Any = None
) -> tuple[TrainState, list[StepMetrics]]:
    """The state after ``steps`` of this rank's shares of the batches, and their metrics."""
    state = TrainState.create(config, steps_per_epoch=4, ranks=ranks)
    share, batch_size, metrics = share_of(config.train.batch_size, ranks), BATCH, []
    for step in range(steps):
        ids = torch.arange(step * batch_size, (step + 1) * batch_size)
        ids = ids[share.first : share.first + share.count]
        pair = views.two_views(
            config.views,
            images()[ids],
            ids,
            seed=0,
            epoch=0,
            dtype=state.recipe.views_dtype,
            kernels=state.kernels,
        )
        metrics.append(train_step(state, pair, **({} if forward is None else {"forward": forward})))
    return state, metrics


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Copies of the state's tensors."""
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def as_worker(place: dict[str, str], work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """A process's target: ``work`` as a worker of torchrun."""
    os.environ.update(place)
    work(*arguments)


def start(count: int, work: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """``count`` workers, without torchrun."""
    port = free_port()
    started: list[BaseProcess] = [
        run_rig.PROCESSES.Process(
            target=as_worker, args=(environment(rank, count, port), work, arguments)
        )
        for rank in range(count)
    ]
    for process in started:
        process.start()
    return started


def end_well(processes: Sequence[BaseProcess]) -> None:
    """Wait for each, which has to return."""
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
