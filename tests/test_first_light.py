"""From every kind of source to an accuracy: converted, trained on and evaluated, in its true format on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fastbyol
import foreign_betons
import source_files
from fastbyol.data import beton, textures
from fastbyol.data.convert import convert
from fastbyol.engine.step import METRICS
from tiny import TINY


def train_and_evaluate(train: Path, test: Path, folder: Path, batch_size: int) -> float:
    """Accuracy in percent after an epoch of the tiny network."""
    sets = [*TINY, f"data.train={train}", f"data.test={test}", f"train.batch_size={batch_size}", "train.epochs=1"]
    summary = fastbyol.train(fastbyol.load_config("blog", sets), folder / "run")
    assert summary.finished
    assert np.isfinite(summary.metrics["loss"])
    result = fastbyol.evaluate(folder / "run", "linear", train_data=train, test_data=test)
    assert 0.0 <= result["accuracy"] <= 100.0
    return float(result["accuracy"])


def stl10(folder: Path) -> tuple[Path, Path]:
    source_files.stl10(folder, test=24)
    made = folder / "train.beton", folder / "test.beton"
    convert(str(folder), made[0], split="train+unlabeled")
    convert(str(folder), made[1], split="test")
    return made


def cifar10(folder: Path) -> tuple[Path, Path]:
    source_files.cifar10(folder, test=24)
    made = folder / "train.beton", folder / "test.beton"
    convert(str(folder), made[0], split="train")
    convert(str(folder), made[1], split="test")
    return made


def cifar100(folder: Path) -> tuple[Path, Path]:
    source_files.cifar100(folder, test=200)
    made = folder / "train.beton", folder / "test.beton"
    convert(str(folder), made[0], split="train", mode="jpg", quality=95)
    convert(str(folder), made[1], split="test")
    return made


def class_folders(folder: Path) -> tuple[Path, Path]:
    source_files.class_folders(folder / "tree")
    made = folder / "train.beton", folder / "test.beton"
    for path in made:
        convert(str(folder / "tree"), path, size=16, resize="centre")
    return made


def plain_folder(folder: Path) -> tuple[Path, Path]:
    """Pictures of every mode and size without labels to train on, class folders to score on."""
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


@pytest.mark.parametrize("source", [stl10, cifar10, cifar100, class_folders, plain_folder, npz, embedded])
def test_every_source_trains_and_evaluates(source: Callable[[Path], tuple[Path, Path]], tmp_path: Path) -> None:
    train, test = source(tmp_path)
    batch_size = min(8, beton.inspect(train).num_samples)
    train_and_evaluate(train, test, tmp_path, batch_size)


@pytest.fixture(scope="module")
def small_test_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("test") / "test.beton"
    convert("textures", path, count=40, size=16)
    return path


@pytest.mark.parametrize("name", foreign_betons.FILES[1:])
def test_betons_by_ffcv_itself_train(name: str, small_test_set: Path, tmp_path: Path) -> None:
    """Other field order, extra fields, JPEG, mixed sizes, no label: what FFCV's own writer makes."""
    made = foreign_betons.made()
    sets = [*TINY, f"data.train={made / name}.beton", f"data.test={small_test_set}", "train.epochs=1"]
    summary = fastbyol.train(fastbyol.load_config("blog", sets), tmp_path / "run")
    assert summary.finished
    assert np.isfinite(summary.metrics["loss"])


def test_five_lines_drive_a_step() -> None:
    """As documented in the package's docstring: a state from a configuration, a step, its metrics."""
    import torch

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
    from fastbyol.data.loader import read_all

    convert("textures", tmp_path / "set.beton", count=30, size=24, seed=5)
    images, labels = textures.make(30, 24, 5)
    read = read_all(tmp_path / "set.beton", workers=1, size=24)
    assert np.array_equal(read.images.numpy(), images)
    assert read.labels is not None
    assert np.array_equal(read.labels.numpy(), labels)
