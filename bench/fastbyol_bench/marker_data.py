"""Data of six kinds for the test of the marker, from code and from what installed packages carry.

    python -m fastbyol_bench.marker_data OUT [KIND ...]

Each is 32 px and RGB, in OUT/KIND-train.beton and OUT/KIND-test.beton, labelled:

kind           images (train, test)                          classes
digits         scikit-learn's 8x8 digits (1285, 512)         ten digits
textures       the embedded set (4096, 512)                  ten patterns
noise          coloured noise, 1 / f^a (4096, 512)           five exponents a, grey and coloured
photographs    patches of three photographs (4104, 522)      the cell of a grid, six a photograph
terrain        patches of one map of heights (4098, 516)     the cell of a grid
fashion-mnist  the built-in set, where it is already (4096, 512)

Nothing is downloaded. Patches of one picture overlap, but not those of training and test.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastbyol.config import DataConfig
from fastbyol.data import embedded
from fastbyol.data.convert import convert
from fastbyol.data.loader import read_all
from fastbyol.data.source_idx import DEBIAN
from fastbyol.data.textures import make as make_textures
from fastbyol.errors import UsageError, check_choice
from fastbyol.files import cache_folder
from fastbyol.output import say

SIDE, NUM_TRAIN, NUM_TEST = 32, 4096, 512
# Exponents of the power spectrum, from almost white to the smooth; natural images have about 2.
EXPONENTS = (0.5, 1.0, 1.5, 2.0, 3.0)
# Correlation of two channels: near grey, and independent.
CORRELATIONS = (0.95, 0.0)
# The grid of a picture, and the sides of its patches before they are scaled. The right third of a
# cell, at least 44 px wide, is for the test.
GRID, PATCH_SIDES = (2, 3), (32, 40)


class Labelled(NamedTuple):
    """uint8 images (N, 32, 32, 3) and int64 labels (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def digits(*, test: bool) -> Labelled:
    """Return scikit-learn's digits, scaled up bilinearly by four: each is in one of both parts."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    rows = order[:NUM_TEST] if test else order[NUM_TEST:]
    small = np.round(loaded.images[rows] * (255 / 16)).astype(np.uint8)
    images = np.stack([_scaled(np.stack([grey] * 3, axis=2)) for grey in small])
    return Labelled(images, loaded.target[rows].astype(np.int64))


def textures(*, test: bool) -> Labelled:
    """Return the textures that a run trains on by default, or some that it is scored on."""
    images, labels = make_textures(NUM_TEST if test else NUM_TRAIN, SIDE, int(test))
    return Labelled(images, labels.astype(np.int64))


def noise(*, test: bool) -> Labelled:
    """Return Gaussian noise whose power falls as 1 / f^a, in turn of each class.

    A class has one of ``EXPONENTS`` and one of ``CORRELATIONS``. Mean and deviation are 128 and 48
    over a field of twice the side, of which an image is a quarter: so it is not periodic.
    """
    classes = list(product(EXPONENTS, CORRELATIONS))
    labels = np.arange(NUM_TEST if test else NUM_TRAIN, dtype=np.int64) % len(classes)
    images = [
        coloured_noise(*classes[label], np.random.default_rng((int(test), index)))
        for index, label in enumerate(labels)
    ]
    return Labelled(np.stack(images), labels)


def coloured_noise(
    exponent: float, correlation: float, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Return one image (32, 32, 3) with the power 1 / f^``exponent`` in each channel."""
    field = random.standard_normal((2 * SIDE, 2 * SIDE, 3))
    shared = random.standard_normal((2 * SIDE, 2 * SIDE, 1))
    field = math.sqrt(1 - correlation) * field + math.sqrt(correlation) * shared
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(2 * SIDE)] * 2))[..., None]
    frequency[0, 0] = np.inf  # no mean
    spectrum = np.fft.fft2(field, axes=(0, 1)) * frequency ** (-exponent / 2)
    made = np.fft.ifft2(spectrum, axes=(0, 1)).real
    made /= made.std(axis=(0, 1))
    levels: NDArray[np.uint8] = np.clip(np.round(128 + 48 * made), 0, 255).astype(np.uint8)
    return levels[:SIDE, :SIDE]


def photographs(*, test: bool) -> Labelled:
    """Return patches of scikit-learn's china and flower and of matplotlib's grace_hopper."""
    from sklearn.datasets import load_sample_images

    with Image.open(_of_matplotlib("grace_hopper.jpg")) as file:
        portrait = np.asarray(file.convert("RGB"))
    return patches([*load_sample_images().images, portrait], test=test)


def terrain(*, test: bool) -> Labelled:
    """Return patches of matplotlib's map of heights, 236 to 1,076 m, as grey from 0 to 255."""
    heights = np.load(_of_matplotlib("jacksboro_fault_dem.npz"))["elevation"].astype(np.float64)
    low, high = heights.min(), heights.max()
    grey = np.round((heights - low) * (255 / (high - low))).astype(np.uint8)
    return patches([np.stack([grey] * 3, axis=2)], test=test)


def _of_matplotlib(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / name


def patches(pictures: Sequence[NDArray[np.uint8]], *, test: bool) -> Labelled:
    """Return patches of each cell of ``GRID`` in each picture, none twice, scaled to 32 px.

    The label is the cell, counted through all pictures; all have as many.
    """
    cells = [part for picture in pictures for part in _cells(picture, test)]
    count = math.ceil((NUM_TEST if test else NUM_TRAIN) / len(cells))
    images = [
        image
        for label, cell in enumerate(cells)
        for image in _cut(cell, count, np.random.default_rng((int(test), label)))
    ]
    return Labelled(np.stack(images), np.arange(len(cells), dtype=np.int64).repeat(count))


def _cells(picture: NDArray[np.uint8], test: bool) -> list[NDArray[np.uint8]]:
    """Return the part of each cell of ``picture`` that is for the test, or for training."""
    rows, columns = (length // parts for length, parts in zip(picture.shape, GRID, strict=False))
    wall = columns - columns // 3
    inside = slice(wall, columns) if test else slice(0, wall)
    return [
        picture[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns][:, inside]
        for r, c in product(*map(range, GRID))
    ]


def _cut(
    cell: NDArray[np.uint8], count: int, random: np.random.Generator
) -> list[NDArray[np.uint8]]:
    corners = [
        (top, left, side)
        for side in PATCH_SIDES
        for top, left in product(range(cell.shape[0] - side + 1), range(cell.shape[1] - side + 1))
    ]
    chosen = random.choice(len(corners), count, replace=False)
    return [
        _scaled(cell[top : top + side, left : left + side])
        for top, left, side in (corners[index] for index in chosen)
    ]


def _scaled(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scale to 32 px bilinearly; smaller sizes by the mean of what a pixel covers."""
    resized = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def fashion_mnist(*, test: bool) -> Labelled:
    """Return images of the built-in set, as a run limited to so many sees them.

    Raises UsageError if it is not on this machine.
    """
    parts = [cache_folder() / f"{embedded.FASHION}-{part}-32px.beton" for part in ("train", "test")]
    if not DEBIAN.is_dir() and not parts[test].exists():
        raise UsageError(
            f"{parts[test]}: not there; `fastbyol train --data fashion-mnist` fetches it"
        )
    config = DataConfig(train=embedded.FASHION)
    file = embedded.held_out_file(config) if test else embedded.training_file(config)
    assert file is not None
    limit = NUM_TEST if test else NUM_TRAIN
    read = read_all(file, workers=1, size=SIDE, limit=limit, labels="needed")
    assert read.labels is not None
    return Labelled(read.images.numpy(), read.labels.numpy())


KINDS: dict[str, Callable[..., Labelled]] = {
    "digits": digits, "textures": textures, "noise": noise, "photographs": photographs,
    "terrain": terrain, "fashion-mnist": fashion_mnist,
}  # fmt: skip


def write(out: Path, kind: str) -> tuple[Path, Path]:
    """Write both betons of ``kind`` into the folder ``out``, which is made. Return their paths.

    Raises UsageError for an unknown kind.
    """
    check_choice("KIND", kind, KINDS)
    out.mkdir(parents=True, exist_ok=True)
    paths = out / f"{kind}-train.beton", out / f"{kind}-test.beton"
    for test, path in enumerate(paths):
        made = KINDS[kind](test=bool(test))
        with tempfile.TemporaryDirectory() as folder:
            arrays = Path(folder) / f"{path.stem}.npz"
            np.savez(arrays, images=made.images, labels=made.labels)
            report = convert(str(arrays), path, overwrite=True)
        say(*report.in_words())
    return paths


def main() -> None:
    """Write the kinds on the command line, or all; Fashion-MNIST, the last, may be absent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    arguments = parser.parse_args()
    try:
        for kind in arguments.kinds or KINDS:
            write(arguments.out, kind)
    except UsageError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
