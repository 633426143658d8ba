"""A data set to look at: pictures of a beton beside the two views that training would make of them, in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastbyol import views
from fastbyol.config import Config
from fastbyol.data import beton
from fastbyol.data.decoder import Decoder
from fastbyol.errors import UsageError
from fastbyol.files import open_regular
from fastbyol.runs import durable

# Small pictures are enlarged by a whole factor to about this side, pixels.
SHOWN = 96
GAP = 4
BACKGROUND = 255
# Triples of image, view, view side by side; three fit a screen of 1000 pixels.
ACROSS = 3
MAX_COUNT = 1000


def write(path: str | Path, out: Path, config: Config, *, count: int = 24) -> list[int]:
    """Write ``out``, a PNG of ``count`` samples spread evenly over the beton ``path``; returns their ids.

    Each is followed by the two views that training with ``config`` sees in epoch 0. UsageError: a damaged file, a wrong count.
    """
    _refuse_used(out)
    info = beton.inspect(path, image_field=config.data.image_field, label_field=config.data.label_field)
    if not 1 <= count <= MAX_COUNT:
        raise UsageError(f"--count {count}: must be 1 to {MAX_COUNT}")
    ids = np.unique(np.linspace(0, info.num_samples - 1, count).round().astype(np.int64))
    with Decoder(info, size=config.views.size, workers=1, in_memory=False, decoder=config.data.decoder) as decoder:
        images = np.empty((len(ids), *decoder.shape), np.uint8)
        decoder.decode(ids, images)
    picture = Image.fromarray(sheet(torch.from_numpy(images), torch.from_numpy(ids), config).numpy())
    with durable.writing(out, "; choose another place with --out"):
        durable.write_atomically(out, lambda file: picture.save(file, "PNG"))
    return [int(i) for i in ids]


def _refuse_used(out: Path) -> None:
    """Raise UsageError where something other than a PNG, such as the data set itself, would be replaced."""
    if not out.exists():
        return
    try:
        with open_regular(out) as file:
            is_png = file.read(8) in (b"", b"\x89PNG\r\n\x1a\n")
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}; choose another place with --out") from None
    if not is_png:
        raise UsageError(f"{out}: is there already and no PNG; choose another name with --out")


def sheet(images: Tensor, ids: Tensor, config: Config) -> Tensor:
    """uint8 images (B, H, W, 3) of the samples ``ids`` (B,) -> uint8 (rows, columns, 3): each image, then its views."""
    both = views.two_views(config.views, images, ids, seed=config.train.seed, epoch=0)
    mean, std = (both.new_tensor(values)[:, None, None] for values in (config.views.mean, config.views.std))
    # Rounded, so that an untouched pixel is shown as it is stored.
    shown = (both * std + mean).mul(255.0).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2)
    side = max(SHOWN, *images.shape[1:3], shown.shape[2])
    cells = torch.stack([_cell(part, side) for part in (images, *shown)], 1)  # (B, 3, side, side, 3)
    return _tiled(cells.permute(0, 2, 1, 3, 4).flatten(2, 3))


def _cell(pictures: Tensor, side: int) -> Tensor:
    """(B, h, w, 3) -> (B, side + GAP, side + GAP, 3): enlarged by a whole factor, in the middle."""
    factor = side // max(pictures.shape[1:3])
    large = pictures.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    rest = [side + GAP - large.shape[axis] for axis in (1, 2)]
    return F.pad(large, (0, 0, rest[1] // 2, rest[1] - rest[1] // 2, rest[0] // 2, rest[0] - rest[0] // 2), value=BACKGROUND)


def _tiled(triples: Tensor) -> Tensor:
    """(B, h, w, 3) -> rows of ACROSS, apart."""
    count, height, width, _ = triples.shape
    across = min(ACROSS, count)
    triples = F.pad(triples, (0, 0, GAP, GAP, GAP // 2, GAP // 2), value=BACKGROUND)
    room = triples.new_full((-(-count // across) * across, *triples.shape[1:]), BACKGROUND)
    room[:count] = triples
    rows = room.view(-1, across, height + GAP, width + 2 * GAP, 3).transpose(1, 2)
    return rows.reshape(-1, across * (width + 2 * GAP), 3)
