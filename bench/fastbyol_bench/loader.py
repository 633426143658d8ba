"""The suite of the loader: raw images from a beton to batches in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from fastbyol.data.loader import Loader, open_loader
from fastbyol_bench.ceilings import floor
from fastbyol_bench.harness import Variant
from fastbyol_bench.pictures import beton, pictures
from fastbyol_bench.results import Row
from fastbyol_bench.suite import Setting, threads

SUITE = "loader"


def rows(setting: Setting) -> Iterator[Row]:
    """Measure an epoch of shuffled batches, streamed by one thread with and without FFCV.

    The peer is torch's DataLoader over an array in memory. Batches of a resident set cost nothing:
    the views read their rows of it.
    """
    size, count, batch = (32, 64, 8) if setting.quick else (96, 4096, 256)
    name = f"raw {size} px, batches of {batch}, one thread"
    with tempfile.TemporaryDirectory() as folder, threads(1):
        yield from _measured(setting, name, beton(Path(folder), count, size), (size, count, batch))


def _measured(setting: Setting, name: str, path: Path, shape: tuple[int, int, int]) -> list[Row]:
    size, count, batch = shape
    images = TensorDataset(torch.from_numpy(pictures(count, size)[0]))
    plain = DataLoader(images, batch, shuffle=True, drop_last=True)
    epochs = iter(range(2**31))

    def epoch(loader: Loader) -> None:
        for _ in loader.epoch(next(epochs)):
            pass

    common = {"batch_size": batch, "seed": 0, "device": setting.device, "workers": 1, "size": size}
    with (
        open_loader(path, cache="none", **common) as streamed,  # type: ignore[arg-type]
        open_loader(path, cache="none", decoder="torchvision", **common) as without_ffcv,  # type: ignore[arg-type]
    ):
        variants = [
            Variant("streamed", lambda: epoch(streamed), count),
            Variant("streamed without FFCV", lambda: epoch(without_ffcv), count),
            Variant("torch's DataLoader over an array", lambda: list(plain), count),
        ]
        # Each byte is read once and written once.
        moved = floor(setting.ceiling(), num_bytes=2 * count * size * size * 3)
        floors = dict.fromkeys(("streamed", "streamed without FFCV"), moved)
        return setting.rows(SUITE, name, variants, setting.plan(20, 20.0, warmup=2), floors=floors)
