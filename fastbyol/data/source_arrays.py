"""What sources that lie in arrays share: images of one size, found by number, with labels or without.

A source holds paths and numbers only, so that it can be handed to another process; arrays are read on first use there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.errors import UsageError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ArraySource:
    """Images of one size, found by number. ``labels`` is None where there are none; -1 marks an unlabelled image."""

    kind: str
    split: str | None
    class_names: tuple[str, ...]
    labels: Labels | None
    num_images: int
    size: tuple[int, int]
    load: Callable[[int], Images]
    skipped: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.num_images

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def name(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int) -> Images:
        """(H, W, 3) uint8."""
        return self.load(index)

    def label(self, index: int) -> int:
        assert self.labels is not None
        return int(self.labels[index])

    def image_bytes(self) -> NDArray[np.int64]:
        """(N,) bytes of each image."""
        return np.full(self.num_images, 3 * self.size[0] * self.size[1], np.int64)


def demand_range(path: Path, labels: Labels, num_classes: int) -> None:
    """UsageError unless all labels are classes."""
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UsageError(f"{path}: labels go beyond {num_classes} classes; unpack the archive again")


def size_of(path: Path) -> int:
    """Bytes of a file that has to be there."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; is the archive unpacked whole?") from None
