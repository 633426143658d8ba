"""The post's path in a process of its own: with the memory allocator as a process finds it, and nothing that ours sets.

Its steps are asked for one by one, so that they take turns with ours. In between it waits and takes no time.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fastbyol_bench import blog_path
from fastbyol_bench.blog_path import BlogPath
from fastbyol_bench.harness import Elsewhere

# Steps on full images take seconds, on slow machines tens of them.
PATIENCE_S = 600.0


class BlogProcess:
    """A ``BlogPath`` that trains on views of ``images``, uint8 (N, S, S, 3), made by a DataLoader's ``workers``, or, where
    ``workers`` is None, on the first ``batch_size`` images as they are, twice.

    Raises RuntimeError where the process ends before it is closed.
    """

    def __init__(self, images: np.ndarray, *, batch_size: int, workers: int | None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(theirs, images, batch_size, workers, torch.get_num_threads()), name="the post's path"
        )
        self._process.start()
        theirs.close()

    def step(self) -> Elsewhere:
        """One step; the processor seconds that it took there, those of its workers left out."""
        try:
            self._pipe.send("step")
            if self._pipe.poll(PATIENCE_S):
                return Elsewhere(float(self._pipe.recv()))
        except (EOFError, ConnectionError):
            pass
        raise RuntimeError(f"the post's path ended early (exit code {self._process.exitcode})")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(60.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _serve(pipe: Connection, images: np.ndarray, batch_size: int, workers: int | None, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process gets it too, and closes the pipe
    multiprocessing.set_start_method("fork", force=True)  # Linux's own for a DataLoader; a spawned process would go on spawning
    torch.set_num_threads(threads)
    peer, batches = BlogPath.create(), _batches(images, batch_size, workers)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        began = time.process_time()
        peer.step(*next(batches))
        pipe.send(time.process_time() - began)


def _batches(images: np.ndarray, batch_size: int, workers: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    if workers is None:
        (view,) = blog_path.plain(images[:batch_size], batch_size)
        while True:
            yield view, view
    loader = blog_path.loader(images, size=images.shape[1], batch_size=batch_size, workers=workers)
    while True:
        yield from loader
