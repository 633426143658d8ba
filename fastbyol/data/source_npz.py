"""npz files with an array of images and, if there is one, an array of labels."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.source_arrays import ArraySource, Images, Labels
from fastbyol.errors import UsageError

IMAGE_KEYS = ("images", "x", "X", "data", "arr_0")
LABEL_KEYS = ("labels", "label", "targets", "y", "Y", "arr_1")


def open_npz(path: Path, split: str | None) -> ArraySource:
    """An npz file: uint8 images (N, H, W, 3), (N, 3, H, W), or grey with one channel or none; integer labels (N,) if any.

    Keys: ``images`` or ``x`` (``labels`` or ``y``), or with a split ``train_images``, ``x_train`` and so on.
    """
    arrays = _heads(path)
    image_key = _first(arrays, IMAGE_KEYS, split)
    if image_key is None:
        wanted = ", ".join(_keys(IMAGE_KEYS, split)[:4])
        raise UsageError(f"{path}: no images under {wanted}; its arrays are {', '.join(arrays) or 'none'}, save them so")
    shape, dtype = arrays[image_key]
    _demand_images(path, image_key, shape, dtype)
    label_key = _first(arrays, LABEL_KEYS, split)
    labels = None if label_key is None else _labels(path, label_key, arrays[label_key], shape[0])
    _kept_array.cache_clear()
    load = Loader(path, image_key)
    height, width = (shape[2], shape[3]) if _planes_first(shape) else (shape[1], shape[2])
    classes = () if labels is None else tuple(str(k) for k in range(int(labels.max()) + 1))
    return ArraySource("npz", split, classes, labels, shape[0], (height, width), load)


@dataclass(frozen=True)
class Loader:
    """Loads image i of one array; the array is read whole."""

    path: Path
    key: str

    def __call__(self, index: int) -> Images:
        images = _kept_array(self.path, self.key)
        image = images[index]
        if image.ndim == 2:
            image = image[:, :, None]
        elif _planes_first(images.shape):
            image = image.transpose(1, 2, 0)
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


@lru_cache(maxsize=1)
def _kept_array(path: Path, key: str) -> NDArray[Any]:
    return _array(path, key)


def _planes_first(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3)


def _array(path: Path, key: str) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[key])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise UsageError(f"{path}: array {key!r} cannot be read ({' '.join(str(error).split())}); save it again") from None


def _heads(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of every array, without reading the arrays."""
    heads = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, _, dtype = header(file)
                    heads[member.removesuffix(".npy")] = (shape, dtype)
    except Exception as error:  # zip and npy heads are parsed from untrusted bytes
        raise UsageError(f"{path}: not a whole npz file ({' '.join(str(error).split())[:200]}); save it again") from None
    return heads


def _keys(names: Sequence[str], split: str | None) -> list[str]:
    if split is None:
        return list(names)
    return [key for name in names for key in (f"{split}_{name}", f"{name}_{split}")]


def _first(arrays: dict[str, Any], names: Sequence[str], split: str | None) -> str | None:
    return next((key for key in _keys(names, split) if key in arrays), None)


def _demand_images(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if dtype != np.uint8:
        remedy = (
            "(255 * images).round().astype('uint8')" if dtype.kind == "f" else "images.astype('uint8') in the range 0 to 255"
        )
        raise UsageError(f"{path}: {key!r} is {dtype}, not uint8; save {remedy}")
    channels = len(shape) == 3 or (len(shape) == 4 and (shape[3] in (1, 3) or _planes_first(shape)))
    if not channels or min(shape) < 1:
        raise UsageError(f"{path}: {key!r} has shape {shape}; save it as (N, H, W, 3), (N, 3, H, W) or (N, H, W)")


def _labels(path: Path, key: str, head: tuple[tuple[int, ...], np.dtype[Any]], count: int) -> Labels:
    shape, dtype = head
    if dtype.kind not in "iu" or shape not in ((count,), (count, 1)):
        what = f"{key!r} is {dtype} of shape {shape} for {count} images"
        raise UsageError(f"{path}: {what}; save one integer label for each image")
    labels = _array(path, key).reshape(-1)
    if labels.dtype == np.uint64 and labels.max() >= 1 << 63:
        raise UsageError(f"{path}: {key!r} has labels beyond 64 bits with sign; save smaller ones")
    return labels.astype(np.int64)
