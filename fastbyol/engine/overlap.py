"""The target's forward pass beside the online network's, on a stream of its own.

A GPU that one pass leaves idle in part works on the other; in a CUDA graph they are two branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastbyol.engine.step import Forward, measure, project
from fastbyol.model.byol import Online, OnlineOutput, Target
from fastbyol.model.objective import Objective


class Side(Protocol):
    """A stream beside the current one."""

    def beside(self) -> AbstractContextManager[None]:
        """Run the block on this stream, after all that the current one was asked for: a fork."""

    def join(self) -> None:
        """Let the current stream wait for all that this one was asked for: a join."""


class CudaSide:
    """A stream of the current CUDA device, for passes that are joined before the next fork.

    The caching allocator hands memory out again on the stream that it was allocated on. That of the
    side stream is read elsewhere after a join alone and used again after a fork alone, which waits
    for those readers; that of the current stream is freed after the join. So no tensor needs
    ``record_stream``, which would keep memory back, and in a graph could not free any.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run the block on the stream. A capture takes it in where it waits for one that is in."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait. A capture asks that of every branch before its end."""
        torch.cuda.current_stream().wait_stream(self._stream)


def predict(online: Online, batch: Tensor) -> OnlineOutput:
    """Run the online network on a batch (2B, 3, S, S). Only q has a gradient."""
    y, z, q = online(batch)
    # A gradient that compiled code could get from a result is zeros to be added, if it gets none.
    return OnlineOutput(y.detach(), z.detach(), q)


class Parts(NamedTuple):
    """The parts of ``step.forward``, as they are or compiled each."""

    project: Callable[[Target, Tensor], Tensor] = project
    predict: Callable[[Online, Tensor], OnlineOutput] = predict
    measure: Callable[
        [OnlineOutput, Tensor, Objective, Tensor | None], tuple[Tensor, Tensor, Tensor | None]
    ] = measure


PARTS = Parts()


def overlapped(side: Side, parts: Parts = PARTS) -> Forward:
    """Return ``step.forward`` of ``parts`` with the target's pass on ``side``. Not for simsiam."""

    def forward(
        online: Online,
        target: Target,
        batch: Tensor,
        objective: Objective,
        queue: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with side.beside():
            projections = parts.project(target, batch)
        output = parts.predict(online, batch)
        side.join()
        return parts.measure(output, projections, objective, queue)

    return forward
