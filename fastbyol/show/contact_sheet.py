"""A contact sheet of a data set: images beside the two views that training makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastbyol import views
from fastbyol.config import Config
from fastbyol.data import beton
from fastbyol.data.decoder import Decoder
from fastbyol.errors import UsageError
from fastbyol.files import open_regular
from fastbyol.runs import durable

# Side of a cell, pixels. Smaller images are enlarged by a whole factor to about this side.
SIDE = 96
GAP = 4
BACKGROUND = 255
# Triples of image, view, view in a row. Three fit a screen of 1000 pixels.
ACROSS = 3
MAX_COUNT = 1000


def write(path: str | Path, out: Path, config: Config, *, count: int = 24) -> list[int]:
    """Write a PNG of ``count`` samples, spread evenly over the beton ``path``. Return their ids.

    Each sample is followed by the two views that training with ``config`` sees in epoch 0.
    Raises UsageError: the beton is damaged, the count is out of range, or ``out`` is no PNG.
    """
    _refuse_other_files(out)
    info = beton.inspect(
        path, image_field=config.data.image_field, label_field=config.data.label_field
    )
    if not 1 <= count <= MAX_COUNT:
        raise UsageError(f"--count {count}: must be 1 to {MAX_COUNT}")
    ids = np.unique(np.linspace(0, info.num_samples - 1, count).round().astype(np.int64))
    with Decoder(
        info, size=config.views.size, workers=1, in_memory=False, decoder=config.data.decoder
    ) as decoder:
        images = np.empty((len(ids), *decoder.shape), np.uint8)
        decoder.decode(ids, images)
    picture = sheet(images, ids, config)
    with durable.writing(out, "; choose another place with --out"):
        durable.write_atomically(out, lambda file: picture.save(file, "PNG"))
    return [int(i) for i in ids]


def _refuse_other_files(out: Path) -> None:
    """Raise UsageError if ``out`` exists and is no PNG: it may be the data set itself."""
    if not out.exists():
        return
    try:
        with open_regular(out) as file:
            is_png = file.read(8) in (b"", b"\x89PNG\r\n\x1a\n")
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}; choose another place with --out") from None
    if not is_png:
        raise UsageError(f"{out}: is there already and no PNG; choose another name with --out")


def sheet(images: np.ndarray, ids: np.ndarray, config: Config) -> Image.Image:
    """Return a picture of each image followed by its two views.

    ``images`` is uint8 (B, H, W, 3), ``ids`` are the samples' numbers (B,).
    """
    triples = [images, *_pixels_of_views(images, ids, config)]
    side = max(SIDE, *(size for pixels in triples for size in pixels.shape[1:3]))
    across, width, height = min(ACROSS, len(ids)), 3 * (side + GAP) + 2 * GAP, side + 2 * GAP
    made = Image.new("RGB", (across * width, -(-len(ids) // across) * height), (BACKGROUND,) * 3)
    for index, triple in enumerate(zip(*triples, strict=True)):
        row, column = divmod(index, across)
        for number, pixels in enumerate(triple):
            cell = Image.fromarray(pixels)
            factor = side // max(cell.size)
            cell = cell.resize(
                (cell.width * factor, cell.height * factor), Image.Resampling.NEAREST
            )
            left = column * width + GAP + number * (side + GAP) + (side + GAP - cell.width) // 2
            made.paste(cell, (left, row * height + GAP // 2 + (side + GAP - cell.height) // 2))
    return made


def _pixels_of_views(images: np.ndarray, ids: np.ndarray, config: Config) -> np.ndarray:
    """Return the two views of ``images`` in epoch 0 as pixels, uint8 (2, B, h, w, 3)."""
    both = views.two_views(
        config.views,
        torch.from_numpy(images),
        torch.from_numpy(ids),
        seed=config.train.seed,
        epoch=0,
    )
    mean, std = (
        both.new_tensor(values)[:, None, None] for values in (config.views.mean, config.views.std)
    )
    # Rounding gives a pixel that no augmentation touched its stored value.
    return (
        (both * std + mean)
        .mul(255.0)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        .permute(0, 1, 3, 4, 2)
        .numpy()
    )
