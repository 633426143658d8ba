"""Indexed Python datasets: torch's, torchvision's, the library ``datasets``', or a list.

Their items are read in the caller's process, since code from a notebook reaches no other, and their
pixels are put down in a file.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastbyol.data import beton_write, rgb, source_arrays
from fastbyol.data.beton_write import Progress, UnreadableItemError
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import IMAGE_NAMES, LABEL_NAMES, Images, Source
from fastbyol.errors import FastbyolError, UsageError, one_line

_PROGRESS_EVERY = 64


def open_dataset(
    dataset: Any,
    name: str,
    *,
    scratch: Scratch,
    kind: str = "dataset",
    split: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    fitted: Callable[[Images], Images] = lambda image: image,
) -> Source:
    """Read all items of ``dataset``, called ``name`` in messages; return them as a source.

    It has ``__len__`` and ``__getitem__``, or is a tuple of arrays (images, labels). An item is an
    image, a tuple (image, label, ...), or a dict with an image and maybe a label under usual names.
    Images are Pillow's, uint8 arrays or tensors (H, W), (H, W, 3) or (3, H, W),
    or floats in [0, 1], which become ``round(255 x)``. Labels are whole numbers, texts or None.
    ``fitted`` is applied to every image. An item whose picture cannot be read, by an OSError, is
    left out, or with ``strict`` an error. Raises UsageError for what is no such dataset or item,
    and for any other error of its own code, FastbyolError for a full disk.
    """
    if _are_arrays(dataset):
        dataset = list(zip(*dataset, strict=True))
    num_items = _length(dataset, name)
    skipped, labels = list[tuple[str, str]](), list[Any]()
    shapes, offsets, names = list[tuple[int, ...]](), list[int](), list[str]()
    path, end = scratch.file("pixels"), 0
    with _new(path) as file:
        for index in range(num_items):
            called = f"item {index}"
            try:
                value, label = _parts(_item(dataset, index, f"{name}: {called}"))
                image = fitted(_image(value, f"{name}: {called}"))
                label = _label(label, f"{name}: {called}")
            except (UnreadableItemError, OSError) as error:
                reason = one_line(error)
                if strict:
                    raise UsageError(
                        f"{name}: {called}: {reason}; correct or remove it, or leave out strict"
                    ) from None
                skipped.append((called, reason))
                continue
            try:
                file.write(image.data)
            except OSError as error:
                raise FastbyolError(f"{path.parent}: {beton_write.disk_error(error)}") from None
            offsets.append(end)
            shapes.append(image.shape)
            labels.append(label)
            names.append(called)
            end += image.nbytes
            if progress is not None and index % _PROGRESS_EVERY == 0:
                progress(index, num_items)
    if not shapes:
        raise UsageError(
            f"{name}: none of {num_items} images can be read, the first: {skipped[0][1]}; look at "
            "the files"
        )
    largest = max((label for label in labels if isinstance(label, int)), default=0)
    own_names = _class_names(dataset, labels)
    chosen, class_names = source_arrays.named_labels(
        f"{name}: the labels", labels, own_names if largest < len(own_names or ()) else None
    )
    sizes = np.array(shapes, np.int64)
    return Source(
        kind=kind,
        split=split,
        class_names=class_names,
        labels=chosen,
        num_images=len(sizes),
        num_bytes=sizes.prod(1),
        image=partial(_pixels, path, sizes, np.array(offsets, np.int64)),
        names=tuple(names),
        skipped=tuple(skipped),
        notes=source_arrays.notes_on(class_names),
    )


def _pixels(path: Path, sizes: NDArray[np.int64], offsets: NDArray[np.int64], index: int) -> Images:
    num_bytes, offset = int(sizes[index].prod()), int(offsets[index])
    return source_arrays.read_row(path, num_bytes, offset, 0).reshape(sizes[index])


def _new(path: Path) -> io.BufferedWriter:
    try:
        return path.open("wb")
    except OSError as error:
        raise FastbyolError(f"{path.parent}: {beton_write.disk_error(error)}") from None


def _are_arrays(dataset: Any) -> bool:
    """Return whether this is no list of two items, but an array of images and one of labels."""
    if not isinstance(dataset, tuple) or len(dataset) != 2:
        return False
    images, labels = (tuple(getattr(part, "shape", ())) for part in dataset)
    return len(labels) == 1 and len(images) > 2 and labels == images[:1]


def _length(dataset: Any, name: str) -> int:
    if isinstance(dataset, Mapping):
        raise UsageError(
            f"{name}: is a dict with {source_arrays.listed(map(str, dataset))}; convert one of its "
            "values, such as dataset['train']"
        )
    try:
        if isinstance(dataset, str | bytes) or not hasattr(dataset, "__getitem__"):
            raise TypeError
        num_items = len(dataset)
    except (TypeError, NotImplementedError):
        raise UsageError(
            f"{name}: has no length or no items by index; give a path, or an object with __len__ "
            "and __getitem__, such as list(dataset)"
        ) from None
    if num_items < 1:
        raise UsageError(f"{name}: is empty; give a dataset with images")
    return num_items


def _item(dataset: Any, index: int, where: str) -> Any:
    try:
        return dataset[index]
    except (OSError, UnreadableItemError):
        raise
    except Exception as error:  # a dataset's own code raises anything
        raise UsageError(
            f"{where}: {type(error).__name__}: {one_line(error)}; look at the dataset's code"
        ) from None


def _parts(item: Any) -> tuple[Any, Any]:
    """Return the image and the label, None for none, of an item."""
    if isinstance(item, Mapping):
        image, label = (
            next((item[name] for name in names if name in item), None)
            for names in (IMAGE_NAMES, LABEL_NAMES)
        )
        return (item if image is None else image), label
    if isinstance(item, tuple | list) and item:
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _image(value: Any, where: str) -> Images:
    """Return an item's image as (H, W, 3). Raises UsageError, or UnreadableItemError."""
    if isinstance(value, Image.Image):
        return rgb.of_image(value)
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):  # not decoded
        return rgb.read(io.BytesIO(value["bytes"]))
    if hasattr(value, "detach"):  # a tensor; numpy has no bfloat16
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray):
        what = (
            f"is a dict with {source_arrays.listed(map(str, value))}"
            if isinstance(value, Mapping)
            else f"begins with a {type(value).__name__}"
        )
        raise UsageError(f"{where}: {what}; return (image, label), of Pillow or a uint8 array")
    if value.dtype.kind == "f" and value.size:
        low, high = float(value.min()), float(value.max())
        if not (low >= 0 and high <= 1):
            raise UsageError(
                f"{where}: numbers from {low:.3g} to {high:.3g}, not from 0 to 1; leave Normalize "
                "out of the transform, or return uint8"
            )
        value = np.rint(255 * value).astype(np.uint8)
    shape = (1, *value.shape)
    source_arrays.image_size(where, shape, value.dtype, num_labels=1)
    return source_arrays.as_rgb(value, source_arrays.planes_first(shape))


def _label(value: Any, where: str) -> int | str | None:
    """Return an item's label: a whole number or the only one in an array, text, or None."""
    if value is None or isinstance(value, str):
        return value
    try:
        label = operator.index(value.item() if getattr(value, "size", None) == 1 else value)
    except (TypeError, ValueError, RuntimeError):
        what = " ".join(f"{type(value).__name__} {value!r}".split())[:80]
        raise UsageError(
            f"{where}: the label is a {what}; return one whole number, or no label"
        ) from None
    if not -(1 << 63) <= label < 1 << 63:
        raise UsageError(f"{where}: the label {label} does not fit 64 bits; return a smaller one")
    return label


def _class_names(dataset: Any, labels: list[Any]) -> list[str] | None:
    """Return ``classes``, of ``datasets`` the names of the label, also through torch's Subset."""
    if any(isinstance(label, str) for label in labels):
        return None
    while dataset is not None:
        features = getattr(dataset, "features", None)
        if isinstance(features, Mapping):
            label = next((features[name] for name in LABEL_NAMES if name in features), None)
            names = getattr(label, "names", None)
        else:
            names = getattr(dataset, "classes", None)
        if isinstance(names, list | tuple) and names:
            # ImageNet's are tuples of synonyms.
            return [", ".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in names]
        dataset = getattr(dataset, "dataset", None)
    return None
