"""From every kind of source to an accuracy: converted, trained on and evaluated, in its true format
on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastbyol
import foreign_betons
import source_files
from fastbyol.data import beton, textures
from fastbyol.data.convert import convert
from fastbyol.data.loader import read_all
from fastbyol.engine.step import METRICS
from tiny import TINY

# As on a user's machine.
pytestmark = pytest.mark.usefixtures("two_threads")


def train(train: Path, test: Path, folder: Path, batch_size: int = 8) -> None:
    """Train the tiny network for an epoch."""
    sets = [
        *TINY,
        f"data.train={train}",
        f"data.test={test}",
        f"train.batch_size={batch_size}",
        "train.epochs=1",
    ]
    summary = fastbyol.train(fastbyol.load_config("blog", sets), folder / "run")
    assert summary.finished
    assert np.isfinite(summary.metrics["loss"])


def of_splits(
    write: Callable[..., None], split: str, test: int, **options: Any
) -> Callable[[Path], tuple[Path, Path]]:
    """Convert two splits of a source that ``write`` makes."""

    def make(folder: Path) -> tuple[Path, Path]:
        write(folder, test=test)
        convert(str(folder), folder / "train.beton", split=split, **options)
        convert(str(folder), folder / "test.beton", split="test")
        return folder / "train.beton", folder / "test.beton"

    return make


def class_folders(folder: Path) -> tuple[Path, Path]:
    source_files.class_folders(folder / "tree")
    made = folder / "train.beton", folder / "test.beton"
    for path in made:
        convert(str(folder / "tree"), path, size=16, resize="centre")
    return made


def plain_folder(folder: Path) -> tuple[Path, Path]:
    """Write pictures of every mode and size to train on, class folders to score on."""
    source_files.odd_pictures(folder / "odd")
    source_files.class_folders(folder / "tree")
    convert(str(folder / "odd"), folder / "train.beton", resize="none")
    convert(str(folder / "tree"), folder / "test.beton", size=16, resize="resize")
    return folder / "train.beton", folder / "test.beton"


def npz(folder: Path) -> tuple[Path, Path]:
    source_files.npz(folder / "images.npz")
    convert(str(folder / "images.npz"), folder / "both.beton")
    return folder / "both.beton", folder / "both.beton"


def embedded(folder: Path) -> tuple[Path, Path]:
    convert("textures", folder / "both.beton", count=40, size=16)
    return folder / "both.beton", folder / "both.beton"


SOURCES = {
    "stl10": of_splits(source_files.stl10, "train+unlabeled", 24),
    "cifar10": of_splits(source_files.cifar10, "train", 24),
    "cifar100": of_splits(source_files.cifar100, "train", 200, mode="jpg", quality=95),
    "class folders": class_folders,
    "plain folder": plain_folder,
    "npz": npz,
    "embedded": embedded,
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_trains_and_evaluates(source: str, tmp_path: Path) -> None:
    fit, score = SOURCES[source](tmp_path)
    train(fit, score, tmp_path, min(8, beton.inspect(fit).num_samples))
    result = fastbyol.evaluate(tmp_path / "run", "linear", train_data=fit, test_data=score)
    assert 0.0 <= result["accuracy"] <= 100.0


@pytest.fixture(scope="module")
def small_test_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("test") / "test.beton"
    convert("textures", path, count=40, size=16)
    return path


@pytest.mark.parametrize("name", foreign_betons.FILES[1:])
def test_betons_by_ffcv_itself_train(name: str, small_test_set: Path, tmp_path: Path) -> None:
    """Other field order, extra fields, JPEG, mixed sizes, no label: FFCV's own writer makes it."""
    train(foreign_betons.made() / f"{name}.beton", small_test_set, tmp_path)


def test_five_lines_drive_a_step() -> None:
    """As in the package's docstring: a state from a configuration, a step, its metrics."""
    config = fastbyol.load_config("blog", list(TINY))
    state = fastbyol.TrainState.create(config, steps_per_epoch=32)
    before = state.arena.online.clone()
    metrics = fastbyol.train_step(state, torch.randn(2, 8, 3, 16, 16))
    named = dict(zip(METRICS, metrics.values.tolist(), strict=True))
    assert 0.0 < named["loss"] < 4.0
    assert int(state.step) == 1
    assert not torch.equal(before, state.arena.online)


def test_the_embedded_set_is_what_textures_makes(tmp_path: Path) -> None:
    """Through converter, FFCV and loader, pixel for pixel."""
    convert("textures", tmp_path / "set.beton", count=30, size=24, seed=5)
    images, labels = textures.make(30, 24, 5)
    read = read_all(tmp_path / "set.beton", workers=1, size=24)
    assert np.array_equal(read.images.numpy(), images)
    assert read.labels is not None
    assert np.array_equal(read.labels.numpy(), labels)
