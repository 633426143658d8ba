"""Picture files in folders: one folder a class, or one folder of anything."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from fastbyol.data import rgb
from fastbyol.data.beton_write import UnreadableItemError
from fastbyol.data.folder_layout import lay_out
from fastbyol.data.folder_walk import walk
from fastbyol.data.source_arrays import Images, Source
from fastbyol.errors import UsageError


def open_folder(path: Path, *, kind: str | None, split: str | None, strict: bool, **others: object) -> Source:
    """Open the pictures below ``path`` as ``classes``, ``folder`` (no labels) or None (either).

    Reads every file's head, so that what is no picture is left out before decoding. UsageError if
    no picture can be read, or with ``strict`` if one cannot, and as ``lay_out`` raises it.
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
    files = tuple(layout.files[k] for k in keep)
    return Source(
        kind=layout.kind,
        split=layout.split,
        class_names=layout.class_names,
        labels=None if layout.labels is None else np.array(layout.labels, np.int64)[keep],
        num_images=len(files),
        num_bytes=sizes[keep],
        image=partial(_picture, path, files),
        names=files,
        skipped=tuple(skipped),
        ignored=layout.ignored,
        notes=layout.notes,
    )


def _picture(root: Path, files: tuple[str, ...], index: int) -> Images:
    return rgb.read(root / files[index])
