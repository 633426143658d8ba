"""The recipes of the peers: the post's path, and tuned eager PyTorch with or without a compiler."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbyol.data.beton_write import die_with
from fastbyol_bench import blog_path
from fastbyol_bench.blog_path import BlogPath
from fastbyol_bench.eager_peer import EagerPeer
from fastbyol_bench.pictures import pictures

# Several sets, since a cache might keep a single one.
NUM_RESIDENT = 3


@dataclass(frozen=True)
class Post:
    """The post's path on batches of ``batch`` images of ``size`` x ``size`` pixels.

    A DataLoader with ``workers`` makes views from ``count`` pictures; without workers (None) the
    views are resident. ``probed`` is the number of labelled images of the probe.
    """

    size: int
    batch: int
    count: int = 0
    workers: int | None = None
    probed: int = 0

    def open(self, device: torch.device) -> Mapping[str, Callable[[], object]]:
        """Return the calls ``step`` and ``probe``."""
        peer = BlogPath.create(device=device)
        views: Iterator[Sequence[Tensor] | Tensor]
        views = (
            resident(self.size, self.batch, device) if self.workers is None else self._made(device)
        )

        images, labels = pictures(self.probed, self.size, seed=1)

        def probe() -> float:
            features = peer.embed(batch.to(device) for batch in blog_path.plain(images))
            return blog_path.probe(features, labels)

        return {"step": lambda: peer.step(*next(views)), "probe": probe}

    def _made(self, device: torch.device) -> Iterator[Sequence[Tensor]]:
        images, _ = pictures(self.count, self.size)
        assert self.workers is not None
        loader = blog_path.loader(
            images, size=self.size, batch_size=self.batch, workers=self.workers
        )
        # torch's workers check whether their parent lives, which a stopped worker cannot.
        loader.worker_init_fn = partial(_die_with, os.getpid())
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))
        return ([view.to(device) for view in pair] for pair in epochs)


@dataclass(frozen=True)
class Tuned:
    """Tuned eager PyTorch, ``compiled`` or not, on batches of ``batch`` images of ``size`` pixels.

    Views are drawn by our kernels from the resident set ``beton``; without it (None) they are
    resident.
    """

    size: int
    batch: int
    optimizer: str = "sgd"
    norm: str = "bn"
    ws: bool = False
    compiled: bool = False
    beton: Path | None = None
    network: str = "resnet18"

    def open(self, device: torch.device) -> Mapping[str, Callable[[], object]]:
        """Return the call ``step``."""
        # cuDNN tries its algorithms first, as is usual for networks of fixed shapes.
        torch.backends.cudnn.benchmark = True
        peer = EagerPeer.create(
            optimizer=self.optimizer,
            norm=self.norm,
            ws=self.ws,
            compiled=self.compiled,
            device=device,
            network=self.network,
        )
        views = (
            resident(self.size, self.batch, device)
            if self.beton is None
            else self._ours(self.beton, device)
        )
        return {"step": lambda: peer.step(next(views))}

    def _ours(self, path: Path, device: torch.device) -> Iterator[Tensor]:
        from fastbyol import load_config, views
        from fastbyol.data.loader import open_loader
        from fastbyol_bench.own_step import batches_of

        config = load_config("blog", [f"views.size={self.size}"]).views
        common: dict[str, Any] = {
            "batch_size": self.batch,
            "seed": 0,
            "workers": 0,
            "size": self.size,
        }
        loader = open_loader(path, device=device, cache="device", **common)
        return (
            views.two_views(
                config,
                batch.images,
                batch.ids,
                rows=batch.rows,
                seed=0,
                epoch=epoch,
                dtype=torch.bfloat16,
            )
            for batch, epoch in batches_of(loader)
        )


def _die_with(parent: int, _: int) -> None:
    die_with(parent)


def resident(size: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Yield fp32 views (2, B, 3, S, S) on ``device`` from a few fixed sets, endlessly."""
    return itertools.cycle(
        [torch.randn(2, batch, 3, size, size, device=device) for _ in range(NUM_RESIDENT)]
    )
