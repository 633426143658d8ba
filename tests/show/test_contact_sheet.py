"""The contact sheet shows the file's pixels and the views that training sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol import views
from fastbyol.config_io import load
from fastbyol.data import convert, textures
from fastbyol.errors import FastbyolError
from fastbyol.show import contact_sheet

CONFIG = load(preset="demo", file=None, sets=["views.size=24", "train.seed=9"]).config
CELL = contact_sheet.SIDE + contact_sheet.GAP


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preview") / "set.beton"
    convert.convert("textures", path, count=50, size=32, seed=2)
    return path


def cells(path: Path) -> np.ndarray:
    """Return the cells of a sheet, (rows, triples, cells of a triple, side, side, 3)."""
    with Image.open(path) as file:
        sheet = np.asarray(file)
    gap = contact_sheet.GAP
    rows, columns = sheet.shape[0] // (CELL + gap), sheet.shape[1] // (3 * CELL + 2 * gap)
    triples = sheet.reshape(rows, CELL + gap, columns, 3 * CELL + 2 * gap, 3)[
        :, gap // 2 : -(gap // 2), :, gap:-gap
    ]
    framed = triples.reshape(rows, CELL, columns, 3, CELL, 3).transpose(0, 2, 3, 1, 4, 5)
    return framed[..., gap // 2 : -(gap // 2), gap // 2 : -(gap // 2), :]


def test_images_and_their_views(beton: Path, tmp_path: Path) -> None:
    ids = contact_sheet.write(beton, tmp_path / "sheet.png", CONFIG, count=4)
    assert ids == [0, 16, 33, 49]
    shown = cells(tmp_path / "sheet.png")
    assert shown.shape == (2, 3, 3, 96, 96, 3)
    images = textures.make(50, 32, 2)[0][ids]
    triples = shown.reshape(6, 3, 96, 96, 3)[:4]
    np.testing.assert_array_equal(triples[:, 0, ::3, ::3], images)
    both = views.two_views(
        CONFIG.views, torch.from_numpy(images), torch.tensor(ids), seed=9, epoch=0
    )
    mean, std = (
        np.array(values)[:, None, None] for values in (CONFIG.views.mean, CONFIG.views.std)
    )
    for view in (0, 1):
        wanted = (both[view].numpy() * std + mean).transpose(0, 2, 3, 1) * 255
        assert (
            np.abs(triples[:, 1 + view, ::4, ::4] - wanted).max() <= 0.5 + 1e-3
        )  # rounded to a byte, from float32
    assert (shown[1, 1:] == contact_sheet.BACKGROUND).all()


def test_more_samples_than_there_are(beton: Path, tmp_path: Path) -> None:
    assert contact_sheet.write(beton, tmp_path / "sheet.png", CONFIG, count=200) == list(range(50))


@pytest.mark.parametrize(
    ("out", "count"), [("sheet.png", 0), ("sheet.png", 1001), ("no/sheet.png", 1), ("set.toml", 1)]
)
def test_wrong_counts_and_places(beton: Path, tmp_path: Path, out: str, count: int) -> None:
    (tmp_path / "set.toml").write_text("not a picture")
    with pytest.raises(FastbyolError, match="--count" if out == "sheet.png" else "--out"):
        contact_sheet.write(beton, tmp_path / out, CONFIG, count=count)
    assert [path.name for path in tmp_path.iterdir()] == ["set.toml"]
