"""idx files: MNIST (LeCun, Cortes, Burges, 1998), Fashion-MNIST, KMNIST, EMNIST, QMNIST.

A file is two zero bytes, a type, the number of dimensions, each as a big-endian int32, and the
values, maybe gzipped. EMNIST's images are transposed in its files, and are left so.
"""

from __future__ import annotations

import gzip
import math
import re
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import source_arrays
from fastbyol.data.source_arrays import Images, Labels, Source
from fastbyol.errors import UsageError, check_choice, one_line
from fastbyol.files import open_regular

# Splits by the word for them in file names.
SPLITS = {"train": "train", "t10k": "test", "test": "test"}
# LeNet-5's padding of MNIST's 28 pixels, of which five halvings would leave nothing.
SIDE = 32
MAX_SIDE = 4096
# Xiao, Rasul, Vollgraf, "Fashion-MNIST", arXiv:1708.07747, table 2.
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
# The folder of Debian's package dataset-fashion-mnist.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_TIMEOUT_S = 30.0

# For names in lower case.
_STEM = r"(?P<set>.*?)[-_]?(?P<split>train|t10k|test)[-_]"
_IMAGES = re.compile(_STEM + r"images[-.]idx3[-.]ubyte(\.gz)?")
_LABELS = re.compile(_STEM + r"labels[-.]idx(?P<kind>1[-.]ubyte|2[-.]int)(?P<packed>\.gz)?")
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4"}
# Folders of torchvision's downloads and of common archives.
_INNER = ("raw", "FashionMNIST/raw", "MNIST/raw", "KMNIST/raw", "EMNIST/raw", "QMNIST/raw", "gzip")


def has_idx(path: Path) -> bool:
    """Return whether ``path`` is an idx file of images, or a folder that holds some."""
    return bool(_IMAGES.fullmatch(path.name.lower())) if path.is_file() else any(_image_files(path))


def open_idx(path: Path, *, kind: str, split: str | None, **others: object) -> Source:
    """Open the grey images of ``split`` (default: train, or that of the file) with their labels.

    Labels are idx1 bytes, or the first column of QMNIST's idx2 integers. Raises UsageError for
    files that are missing, cut or of another type or split, and for several sets in one folder.
    """
    images = path if path.exists() and not path.is_dir() else _chosen(path, split or "train")
    named = _IMAGES.fullmatch(images.name.lower())
    if named is None:
        raise UsageError(
            f"{images}: not named like idx images; call it train-images-idx3-ubyte, and its "
            "labels alike"
        )
    of = SPLITS[named["split"]]
    if split not in (None, of):
        raise UsageError(
            f"{images}: is of the split {of} by its name, not {split}; name the other file, or "
            "their folder"
        )
    shape, _, dtype = _head(images)
    if len(shape) != 3 or dtype != np.dtype(">u1"):
        raise UsageError(
            f"{images}: its head says {len(shape)} dimensions of {dtype}; images are (N, H, W) "
            "bytes"
        )
    count, height, width = shape
    if not (count >= 1 and 1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise UsageError(
            f"{images}: its head says {count} images of {width} x {height} pixels; fetch the file "
            "again"
        )
    labels_file = _labels_file(images)
    labels, names = (None, ()) if labels_file is None else _labels(labels_file, count)
    _kept.cache_clear()
    if kind == "fashion-mnist":
        if labels is not None and labels.max() >= len(FASHION_CLASSES):
            raise UsageError(
                f"{labels_file}: label {labels.max()} is none of Fashion-MNIST's ten; take --kind "
                "idx"
            )
        names = FASHION_CLASSES
    num_bytes = 3 * max(SIDE, height) * max(SIDE, width)
    return Source(
        kind,
        of,
        names,
        labels,
        count,
        num_bytes,
        partial(_image, images),
        notes=source_arrays.notes_on(names),
        splits=tuple(
            split
            for split in dict.fromkeys(SPLITS.values())
            if path.is_dir() and _image_files(path, split)
        ),
    )


def fashion_mnist_folder(cache: Path) -> Path:
    """Return a folder of Fashion-MNIST: Debian's, else ``cache``, where torchvision downloads it.

    Raises UsageError if the download fails.
    """
    for folder in (DEBIAN, cache):
        files = _image_files(folder)
        if len(files) == 2 and all(map(_labels_file, files)):  # it may be half downloaded
            return folder
    import torchvision

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets no limit of its own
    try:
        for train in (True, False):
            torchvision.datasets.FashionMNIST(str(cache), train=train, download=True)
    except (OSError, RuntimeError) as error:  # the network's, and torchvision's own
        why = one_line(error, 120)
        raise UsageError(
            f"fashion-mnist: not on this machine, and the download failed ({why}): install "
            "Debian's package "
            "dataset-fashion-mnist, convert a folder of its files (`fastbyol convert FOLDER "
            "train.beton`), or take textures"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return cache


def _image(path: Path, index: int) -> Images:
    """Return image ``index``, grey as RGB, padded with black to ``SIDE``."""
    grey = _kept(path)[index]
    margins = [
        (missing // 2, missing - missing // 2)
        for missing in (max(0, SIDE - side) for side in grey.shape)
    ]
    return source_arrays.as_rgb(np.pad(grey, margins), planes=False)


def _image_files(folder: Path, split: str | None = None) -> list[Path]:
    """Return the image files of ``split`` (None: any), one a set, of the first folder with some."""
    for inside in (folder, *(folder / name for name in _INNER)):
        by_set = {}
        for path in sorted(inside.iterdir(), reverse=True) if inside.is_dir() else ():  # .gz last
            named = _IMAGES.fullmatch(path.name.lower())
            if named and split in (None, SPLITS[named["split"]]) and not path.is_dir():
                by_set[path.name[: named.end("split")]] = path
        if by_set:
            return list(by_set.values())
    return []


def _chosen(folder: Path, split: str) -> Path:
    check_choice(f"{folder}: the split of idx files", split, dict.fromkeys(SPLITS.values()))
    files = _image_files(folder, split)
    if not files:
        word = next(word for word, of in SPLITS.items() if of == split)
        raise UsageError(
            f"{folder}: no {word}-images-idx3-ubyte (or .gz) in it; give the folder that holds it"
        )
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UsageError(
            f"{folder}: holds several sets ({names}); name one of these files instead of the folder"
        )
    return files[0]


def _labels(path: Path, count: int) -> tuple[Labels | None, tuple[str, ...]]:
    shape, _, _ = _head(path)
    if len(shape) not in (1, 2) or shape[0] != count or 0 in shape:
        raise UsageError(
            f"{path}: its head says shape {shape} for {count} images; fetch both files again"
        )
    values = _values(path)
    return source_arrays.class_labels(str(path), values if values.ndim == 1 else values[:, 0])


def _labels_file(images: Path) -> Path | None:
    """Return the labels file beside ``images``, idx1 and unpacked files first; None without one."""
    stem = _IMAGES.fullmatch(images.name.lower())
    named = [(_LABELS.fullmatch(path.name.lower()), path) for path in images.parent.iterdir()]
    files = [
        (of["kind"], of["packed"] is not None, path)
        for of, path in named
        if of and stem and of.group("set", "split") == stem.group("set", "split")
    ]
    return min(files)[2] if files else None


def _head(path: Path) -> tuple[tuple[int, ...], int, np.dtype[np.generic]]:
    """Read the shape in a file's head, the offset of the values, and their type."""
    with _opened(path) as file:
        magic = file.read(4)
        if (
            len(magic) < 4
            or magic[:2] != b"\0\0"
            or magic[2] not in _TYPES
            or not 1 <= magic[3] <= 4
        ):
            raise UsageError(
                f"{path}: not an idx file of whole numbers (it begins "
                f"{magic.hex() or 'nowhere'}); fetch it again"
            )
        dims = file.read(4 * magic[3])
    if len(dims) < 4 * magic[3]:
        raise UsageError(f"{path}: ends within its head; fetch it again")
    shape = tuple(int(size) for size in np.frombuffer(dims, ">i4"))
    if min(shape) < 0:
        raise UsageError(f"{path}: its head says shape {shape}; fetch it again")
    return shape, 4 + len(dims), np.dtype(_TYPES[magic[2]])


def _values(path: Path) -> NDArray[np.uint8]:
    """Read the file's values, after a check that the file and memory can hold them."""
    shape, offset, dtype = _head(path)
    wanted = math.prod(shape) * dtype.itemsize
    size = source_arrays.size_of(path)
    if wanted > size * (source_arrays.MOST_PER_BYTE if path.suffix.lower() == ".gz" else 1):
        raise UsageError(
            f"{path}: {size} bytes cannot hold the {wanted} that its head says; fetch it again"
        )
    source_arrays.demand_memory(str(path), wanted)
    with _opened(path) as file:
        content = file.read(offset + wanted + 1)
    if len(content) != offset + wanted:
        raise UsageError(
            f"{path}: {len(content) - offset} bytes of values or more, its head says {wanted}; "
            "fetch it again"
        )
    return np.frombuffer(content, dtype, offset=offset).reshape(shape)


_kept = lru_cache(maxsize=1)(_values)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open the file, unpacked on the way; turn reading errors into UsageErrors."""
    try:
        with open_regular(path) as file:
            yield gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"{path}: cannot be read ({why}); fetch it again") from None
