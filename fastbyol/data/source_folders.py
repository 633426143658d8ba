"""Picture files in folders: one folder a class, or one folder of anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import rgb
from fastbyol.data.beton import UnreadableItemError
from fastbyol.data.folder_layout import NamesAndReasons, lay_out
from fastbyol.data.folder_walk import walk
from fastbyol.errors import UsageError


@dataclass(frozen=True)
class FolderSource:
    """Picture files under ``root``. ``labels`` is None for a plain folder; ``sizes`` (N,) are the bytes of decoded images.

    ``skipped`` holds (name, reason) of pictures that are left out, ``ignored`` the same of whatever is no picture, ``notes``
    what was chosen where there was a choice.
    """

    kind: str
    split: str | None
    class_names: tuple[str, ...]
    root: Path
    files: tuple[str, ...]
    labels: NDArray[np.int64] | None
    sizes: NDArray[np.int64]
    skipped: NamesAndReasons
    ignored: NamesAndReasons
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def name(self, index: int) -> str:
        return self.files[index]

    def image(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8; UnreadableItemError if the file is damaged."""
        return rgb.read(self.root / self.files[index])

    def label(self, index: int) -> int:
        assert self.labels is not None
        return int(self.labels[index])

    def image_bytes(self) -> NDArray[np.int64]:
        """(N,) bytes of each decoded image."""
        return self.sizes


def open_folder(path: Path, kind: str | None, split: str | None, *, strict: bool) -> FolderSource:
    """Open the pictures below ``path``: ``classes``, ``folder`` (without labels), or None for what the layout says.

    Looks at every file's head: what is no picture at all is left out before any decoding. Raises UsageError where no picture
    can be read, with ``strict`` for the first one that cannot, and what ``lay_out`` does.
    """
    layout = lay_out(path, walk(path), kind=kind, split=split)
    sizes = np.zeros(len(layout.files), np.int64)
    skipped = list(layout.skipped)
    for k, name in enumerate(layout.files):
        try:
            height, width = rgb.probe(path / name)
            sizes[k] = 3 * height * width
        except UnreadableItemError as error:
            skipped.append((name, str(error)))
    if strict and skipped:
        raise UsageError(f"{path / skipped[0][0]}: {skipped[0][1]}; correct or remove it, or leave out --strict")
    keep = np.flatnonzero(sizes)
    if not len(keep):
        first = f", the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise UsageError(f"{path}: no readable pictures in it{first}; give a folder of images or of class folders")
    return FolderSource(
        kind=layout.kind,
        split=layout.split,
        class_names=layout.class_names,
        root=path,
        files=tuple(layout.files[k] for k in keep),
        labels=None if layout.labels is None else np.array(layout.labels, np.int64)[keep],
        sizes=sizes[keep],
        skipped=tuple(skipped),
        ignored=layout.ignored,
        notes=layout.notes,
    )
