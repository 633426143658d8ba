"""The image share of a data set: against pairs one by one, and at the ends of its range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastbyol import views
from fastbyol.ablations import image_share
from fastbyol.config import Config
from fastbyol.config_io import load
from fastbyol.data import convert, loader
from fastbyol.engine.step import TrainState
from tiny import TINY


def config(train: Path, *sets: str) -> Config:
    return load(preset="demo", sets=[*TINY, f"data.train={train}", "model.norm=gn", *sets]).config


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("some") / "some.beton"
    convert.convert("textures", path, count=24, size=16)
    return path


def test_equals_all_pairs_one_by_one(some: Path) -> None:
    chosen = config(some)
    images = loader.read_all(some, workers=1, size=16).images
    shares = []
    for seed in image_share.SEEDS:
        train = chosen.train.model_copy(update={"seed": seed})
        state = TrainState.create(chosen.model_copy(update={"train": train}), steps_per_epoch=1)
        pair = views.two_views(chosen.views, images, torch.arange(24), seed=seed, epoch=0)
        with torch.no_grad():
            first, second = (
                state.online.encoder(view.contiguous()).double().numpy() for view in pair
            )
        cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in second] for a in first]
        positive = np.mean(np.diag(cosines))
        negative = np.mean([cosines[i][j] for i in range(24) for j in range(24) if i != j])
        shares.append((positive - negative) / (1 - negative))
    assert image_share.image_share(chosen) == pytest.approx(np.mean(shares), rel=1e-4)


def test_is_one_without_augmentation_and_nothing_without_images(some: Path, tmp_path: Path) -> None:
    none = (
        "views.scale=1,1",
        "views.ratio=1,1",
        "views.jitter_p=0",
        "views.grayscale_p=0",
        "views.flip_p=0",
    )
    assert image_share.image_share(config(some, *none)) == pytest.approx(1.0, abs=1e-5)
    same = np.repeat(loader.read_all(some, workers=1, size=16).images[:1].numpy(), 24, axis=0)
    np.savez(tmp_path / "same.npz", images=same)
    convert.convert(str(tmp_path / "same.npz"), tmp_path / "same.beton")
    assert abs(image_share.image_share(config(tmp_path / "same.beton"))) < 0.1
