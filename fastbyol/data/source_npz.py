"""npz files with an array of images and, if there is one, an array of labels, of one split or of several."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray

from fastbyol.data.source_arrays import (
    MOST_PER_BYTE,
    Images,
    Labels,
    Source,
    as_rgb,
    class_labels,
    demand_labels,
    fit_labels,
    image_size,
    notes_on,
    planes_first,
)
from fastbyol.data.source_npy import NO_ARRAYS, Head, Named, demand_held, read_head, read_values
from fastbyol.errors import UsageError, one_line
from fastbyol.files import open_regular


def open_npz(path: Path, split: str | None) -> Source:
    """Open an npz file: uint8 images (N, H, W, 3), (N, 3, H, W), or grey with one channel or none; labels (N,) if any.

    Keys: ``images`` or ``x`` (``labels`` or ``y``), or of a split ``train_images``, ``x_train`` and so on; without ``split``
    train is taken where all are of splits.
    """
    with _archive(path) as archive:
        members = archive.namelist()
    named = Named(str(path), tuple(name.removesuffix(".npy") for name in members if name.endswith(".npy")))
    wanted, split = split, named.split(split)
    key, label_key = str(named.find(split, labels=False)), named.find(split, labels=True)
    head = _head(path, key)
    num_labels = None if label_key is None else math.prod(_head(path, label_key).shape)
    height, width = image_size(f"{path}: {key!r}", head.shape, head.dtype, num_labels)
    labels: Labels | None = None
    names: tuple[str, ...] = ()
    if label_key is not None:
        others = fit_labels(partial(_labels, path), (other for other in named.all_labels() if other != label_key))
        labels, names = class_labels(f"{path}: {label_key!r}", _labels(path, label_key, head.shape[0]), others)
    _kept_array.cache_clear()
    return Source(
        kind="npz",
        split=split,
        class_names=names,
        labels=labels,
        num_images=head.shape[0],
        num_bytes=3 * height * width,
        image=partial(_image, path, key),
        ignored=(*named.ignored(split), *((name, NO_ARRAYS) for name in members if not name.endswith(".npy"))),
        notes=named.notes(wanted, split) + notes_on(names),
    )


def _image(path: Path, key: str, index: int) -> Images:
    images = _kept_array(path, key)
    return as_rgb(images[index], planes_first(images.shape))


@lru_cache(maxsize=1)
def _kept_array(path: Path, key: str) -> NDArray[Any]:
    return _array(path, key)


def _labels(path: Path, key: str, count: int | None = None) -> NDArray[Any]:
    head = _head(path, key)
    demand_labels(f"{path}: {key!r}", head.shape, head.dtype, math.prod(head.shape) if count is None else count)
    return _array(path, key)


def _array(path: Path, key: str) -> NDArray[Any]:
    head = _head(path, key)
    with _archive(path) as archive, archive.open(f"{key}.npy") as file:
        values = read_values(file, f"{path}: {key!r}", head)  # type: ignore[arg-type]
        file.read(1)  # at the end the archive's checksum is looked at
    return values


def _head(path: Path, key: str) -> Head:
    """The head of an array, which its part of the archive can hold."""
    where = f"{path}: {key!r}"
    with _archive(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        packed = member.compress_type == zipfile.ZIP_DEFLATED
        if not packed and member.compress_type != zipfile.ZIP_STORED:  # zipfile unpacks such without a bound
            raise UsageError(f"{where}: compressed in a way that numpy does not write; save it with numpy.savez_compressed")
        if member.file_size > member.compress_size * (MOST_PER_BYTE if packed else 1):
            what = f"{member.compress_size} bytes cannot hold the {member.file_size} that are said"
            raise UsageError(f"{where}: {what}; save it again")
        with archive.open(member) as file:
            head = read_head(file, where)  # type: ignore[arg-type]
    demand_held(where, head, member.file_size)
    return head


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever reading it meets is a UsageError."""
    try:
        with open_regular(path) as file:
            if file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
                raise UsageError(f"{path}: is a single array, as .npy files are; give it that suffix")
            with zipfile.ZipFile(file) as archive:
                yield archive
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or one_line(error)}); save it again") from None
    except Exception as error:  # zip's heads are parsed from untrusted bytes
        raise UsageError(f"{path}: not a whole npz file ({one_line(error)}); save it again") from None
