"""The ``Source`` of numbered images, and the checks that sources share.

Every number in a file is checked against the file's size and the free memory before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import beton
from fastbyol.data.memory import cpu_bytes
from fastbyol.errors import UsageError, one_line, size_text
from fastbyol.files import open_regular, refuse_special

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
NamesAndReasons = tuple[tuple[str, str], ...]

# Labels below this are class numbers; a larger label is rather a name.
MAX_CLASSES = 1 << 16
# Smaller arrays are not checked against the free memory.
SMALL_BYTES = 1 << 26
CHANNELS = (1, 3)
# Usual names of the columns of tables, in the order in which they are chosen.
IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "pixels")
LABEL_NAMES = ("label", "labels", "fine_label", "fine_labels", *sorted(beton.LABEL_NAMES))
# The class names and the folds of STL-10 take far less.
MAX_TEXT_BYTES = 1 << 24
# Deflate's best ratio: 258 bytes for two bits (RFC 1951).
MOST_PER_BYTE = 1032


@dataclass(frozen=True)
class Source:
    """Numbered images, small enough to be pickled for another process.

    ``image(i)`` reads image i there, (H, W, 3) uint8. ``labels`` (N,) is None without labels; -1
    marks an unlabelled image. ``num_bytes`` is the size of each decoded image, (N,) or one number
    for all; ``names`` are file names. ``skipped`` and ``ignored`` hold (name, reason) of pictures
    and of other things that are left out; ``notes`` say how the images were chosen. ``splits`` are
    those that there are, by their names in ``data.splits``, if the source consists of some.
    """

    kind: str
    split: str | None
    class_names: tuple[str, ...]
    labels: Labels | None
    num_images: int
    num_bytes: int | NDArray[np.int64]
    image: Callable[[int], Images]
    names: tuple[str, ...] = ()
    skipped: NamesAndReasons = ()
    ignored: NamesAndReasons = ()
    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.num_images

    @property
    def labelled(self) -> bool:
        """True if there are labels."""
        return self.labels is not None

    def name(self, index: int) -> str:
        """Name an image for a message."""
        return self.names[index] if self.names else f"image {index}"

    def image_bytes(self) -> NDArray[np.int64]:
        """Return the bytes of each decoded image, (N,)."""
        return np.full(self.num_images, self.num_bytes, np.int64)


def read_row(path: Path, row_bytes: int, offset: int, index: int) -> NDArray[np.uint8]:
    """Read row ``index`` (row_bytes,) of the rows that begin at ``offset`` in a file.

    Raises UsageError where the file ends before.
    """
    with open_regular(path) as file:
        data = os.pread(file.fileno(), row_bytes, offset + index * row_bytes)
    if len(data) != row_bytes:
        raise UsageError(f"{path}: ends within image {index}; it became shorter, get it again")
    return np.frombuffer(data, np.uint8)


def image_size(
    where: str, shape: Sequence[int], dtype: np.dtype[Any], num_labels: int | None
) -> tuple[int, int]:
    """Return (H, W) of the images in a uint8 array.

    The shape is (N, H, W, 3), (N, H, W, 1), (N, 3, H, W), (N, 1, H, W) or grey (N, H, W). Raises
    UsageError for any other, and for one image without N; ``num_labels`` shows whether (32, 32, 3)
    is 32 narrow grey images.
    """
    if dtype != np.uint8:
        remedy = "images.astype('uint8') in the range 0 to 255"
        if dtype.kind == "f":
            remedy = "(255 * images).round().astype('uint8')"
        elif dtype.hasobject:
            remedy = (
                "numpy.stack(images), which needs images of one size; others go into a "
                "folder of pictures"
            )
        raise UsageError(f"{where} is {dtype}, not uint8; save {remedy}")
    shape, fault = tuple(shape), None
    first, last = (
        (shape[1] in CHANNELS, shape[3] in CHANNELS) if len(shape) == 4 else (False, False)
    )
    if len(shape) == 3 and num_labels != shape[0] and (shape[2] in (1, 3, 4) or shape[0] == 3):
        fault = "it looks like one image: save images[None] for one, images[..., None] for grey"
    elif len(shape) == 2:
        fault = "save images[None] if it is one image, images.reshape(N, H, W, 3) if rows are"
    elif len(shape) == 4 and 4 in (shape[1], shape[3]) and not (first or last):
        fault = "what a fourth channel means is not said: save the first three, or shown on white"
    elif first and last and shape[2] > 3:
        fault = "its channels may be the second or the last: pad the images"
    elif not (len(shape) == 3 or first or last) or min(shape) < 1:
        fault = "save it as (N, H, W, 3), (N, 3, H, W) or (N, H, W)"
    if fault is not None:
        raise UsageError(f"{where} has shape {shape}; {fault}")
    return (shape[2], shape[3]) if planes_first(shape) else (shape[1], shape[2])


def planes_first(shape: Sequence[int]) -> bool:
    """Return whether a shape is (N, 3, H, W) rather than (N, H, W, 3)."""
    return len(shape) == 4 and shape[3] not in CHANNELS


def as_rgb(image: NDArray[np.uint8], planes: bool) -> Images:
    """Return (H, W), (H, W, 1 or 3) or, with ``planes``, (1 or 3, H, W) as an (H, W, 3) image."""
    if image.ndim == 2:
        image = image[:, :, None]
    elif planes:
        image = image.transpose(1, 2, 0)
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def demand_one_label_each(
    where: str, shape: Sequence[int], dtype: np.dtype[Any], num_images: int
) -> None:
    """Raise UsageError unless an array has one whole number, boolean or text per image."""
    shape, what = (
        tuple(shape),
        f"{where} is {dtype} of shape {tuple(shape)} for {num_images} images",
    )
    if len(shape) == 2 and shape[0] == num_images and shape[1] > 1:
        raise UsageError(
            f"{what}; save one label for each image: labels.argmax(1) if they are one-hot"
        )
    if (
        dtype.kind not in "iubfUS"
        or dtype.itemsize == 0
        or shape not in ((num_images,), (num_images, 1), (1, num_images))
    ):
        raise UsageError(f"{what}; save one integer label for each image")


def class_labels(
    where: str, values: NDArray[Any], others: Iterable[NDArray[Any]] = ()
) -> tuple[Labels | None, tuple[str, ...]]:
    """Return labels as classes 0 to K - 1, or None if all are -1, and the names of the classes.

    ``values`` have passed ``demand_one_label_each``. Whole numbers below ``MAX_CLASSES`` stay as
    they are. Larger numbers and texts are mapped to their place among the sorted distinct values of
    all splits (``others`` has the other splits), so that a class is the same in every split; the
    names keep the values. -1 means no label. Raises UsageError for other negative numbers and for
    fractions.
    """
    own = _whole(where, values)
    all_values = [own, *(_whole(where, other) for other in others)]
    if len({part.dtype.kind for part in all_values}) > 1:
        raise UsageError(f"{where}: texts in one split and numbers in another; save one kind")
    distinct = np.unique(np.concatenate(all_values))
    texts = distinct.dtype.kind == "U"
    if not texts:
        if distinct.tolist() == [-1, 1]:
            raise UsageError(
                f"{where}: labels are -1 and 1, and -1 stands for no label; save (labels > "
                "0).astype(int)"
            )
        if distinct[0] < -1:
            raise UsageError(
                f"{where}: label {distinct[0]} is negative; save numpy.unique(labels, "
                "return_inverse=True)[1]"
            )
        distinct = distinct[distinct >= 0]
        if not distinct.size:
            return None, ()
        if distinct[-1] < MAX_CLASSES:
            return own, tuple(map(str, range(int(distinct[-1]) + 1)))
    if len(distinct) > MAX_CLASSES:
        raise UsageError(
            f"{where}: {len(distinct):,} distinct labels are no classes; leave them out, or save "
            "fewer"
        )
    labels = np.searchsorted(distinct, own).astype(np.int64)
    return labels if texts else np.where(own < 0, -1, labels), tuple(map(str, distinct))


def named_labels(
    where: str,
    values: Sequence[int | str | None],
    names: Sequence[str] | None,
    others: Sequence[int | str] = (),
    remedy: str = "leave them out",
) -> tuple[Labels | None, tuple[str, ...]]:
    """Return labels, None for no label, as ``class_labels`` does; ``names`` are the classes'.

    Without names, ``others`` are labels of the other splits. Raises UsageError for labels beyond
    the names, for texts among numbers, and, with ``remedy``, for too many texts.
    """
    if all(value is None for value in values):
        return None, ()
    distinct = {value for value in (*values, *others) if value is not None}
    if len({isinstance(value, str) for value in distinct}) > 1 or (
        names is not None and any(isinstance(value, str) for value in distinct)
    ):
        raise UsageError(f"{where} are texts and numbers; save one kind")
    if any(isinstance(value, str) for value in distinct):
        if len(distinct) > MAX_CLASSES:
            raise UsageError(f"{where}: {len(distinct):,} texts are no classes; {remedy}")
        texts = sorted(map(str, distinct))
        ranks = {text: k for k, text in enumerate(texts)}
        ids = [-1 if value is None else ranks[str(value)] for value in values]
        return np.array(ids, np.int64), tuple(texts)
    numbers = np.array([-1 if value is None else value for value in values], np.int64)
    if names is None:
        return class_labels(where, numbers, [np.array(others, np.int64)] if others else ())
    if not -1 <= numbers.min() <= numbers.max() < len(names):
        raise UsageError(f"{where} go beyond the {len(names)} classes; save it again")
    return numbers, tuple(names)


def notes_on(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Explain the classes to the reader if ``class_labels`` mapped the labels."""
    numbers = [int(name) for name in class_names if name.isdecimal()]
    if (
        len(numbers) < len(class_names)
        or numbers == list(range(len(numbers)))
        or numbers != sorted(numbers)
    ):
        return ()
    return (
        f"labels up to {class_names[-1]} became 0 to {len(class_names) - 1}, the classes' names "
        "say what they were",
    )


def _whole(where: str, values: NDArray[Any]) -> NDArray[Any]:
    """Return (N,) int64, or str where the values are texts."""
    values = values.reshape(-1)
    if values.dtype.kind == "S":
        return np.array([value.decode("utf-8", "replace") for value in values.tolist()])
    if values.dtype.kind == "U":
        # Python refuses code points beyond the last character, and lone surrogates.
        codes = np.ascontiguousarray(values).view(values.dtype.byteorder.replace("|", "=") + "u4")
        if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
            raise UsageError(f"{where}: holds texts that are no Unicode; save others")
        return values
    if values.dtype.kind == "f" and not (
        np.isfinite(values).all() and (values == np.floor(values)).all()
    ):
        raise UsageError(
            f"{where}: is {values.dtype} and not all are whole numbers; save one integer label "
            "for each image"
        )
    if values.dtype.kind in "fu" and values.size and np.abs(values).max() >= 1 << 63:
        raise UsageError(f"{where}: has labels beyond 64 bits with sign; save smaller ones")
    return values.astype(np.int64)


@contextmanager
def untrusted(where: object, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises on untrusted bytes into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{where}: {what} ({one_line(error)}); {remedy}") from None


def demand_range(path: Path, labels: Labels, num_classes: int) -> None:
    """Raise UsageError unless all labels are classes."""
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UsageError(
            f"{path}: labels go beyond {num_classes} classes; unpack the archive again"
        )


def demand_memory(where: str, num_bytes: int) -> None:
    """Raise UsageError unless an array of ``num_bytes`` fits into the free memory."""
    if num_bytes >= SMALL_BYTES and num_bytes > (free := cpu_bytes()):
        raise UsageError(
            f"{where}: is said to take {size_text(num_bytes)}, memory has {size_text(free)}; save "
            "it in parts"
        )


def size_of(path: Path) -> int:
    """Return the bytes of a regular file. Raises UsageError where it is missing."""
    try:
        status = path.stat()
        refuse_special(path, status.st_mode)
        return status.st_size
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; is the archive unpacked whole?") from None


def count_rows(path: Path, num_bytes: int, row_bytes: int) -> int:
    """Count the rows in a file of ``num_bytes``. Raises UsageError unless they fill it."""
    if num_bytes == 0 or num_bytes % row_bytes:
        raise UsageError(
            f"{path}: {num_bytes} bytes is no whole number of {row_bytes}-byte images; unpack the "
            "archive again"
        )
    return num_bytes // row_bytes


def read_whole(path: Path) -> bytes:
    """Read a whole file. Raises UsageError where it exceeds memory, OSError where reading fails."""
    num_bytes = size_of(path)
    demand_memory(str(path), num_bytes)
    with open_regular(path) as file:
        return file.read(num_bytes)


def text_lines(path: Path) -> tuple[str, ...]:
    """Return the non-empty lines of a small text file."""
    if size_of(path) > MAX_TEXT_BYTES:
        raise UsageError(
            f"{path}: {size_of(path)} bytes are too many for what it is; unpack the archive again"
        )
    return tuple(
        line.strip()
        for line in read_whole(path).decode("utf-8", "replace").splitlines()
        if line.strip()
    )


def inner(path: Path, *names: str) -> Path:
    """Return the first of the folders ``names`` that is in ``path``, else ``path`` itself."""
    return next((path / name for name in names if (path / name).is_dir()), path)


def listed(names: Iterable[str]) -> str:
    """Join names for a message, twelve of them at most."""
    names = [" ".join(name.split())[:60] for name in names]
    return (
        ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    ) or "none"
