"""Picture files in folders: one folder a class, or one folder of anything."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fastbyol.data import rgb
from fastbyol.data.beton_write import UnreadableItemError
from fastbyol.data.folder_layout import lay_out, picture
from fastbyol.data.folder_walk import walk
from fastbyol.data.source_arrays import Source
from fastbyol.errors import UsageError


def open_folder(
    path: Path, *, kind: str | None, split: str | None, strict: bool, **others: object
) -> Source:
    """Open the pictures below ``path`` as ``classes``, ``folder`` (no labels) or None (either).

    Reads every file's head, so that what is no picture is left out before decoding. Raises
    UsageError if no picture can be read, or with ``strict`` if one cannot, and as ``lay_out``
    raises it.
    """
    source = lay_out(path, walk(path), kind=kind, split=split)
    sizes, skipped = np.zeros(len(source), np.int64), list(source.skipped)
    for k, name in enumerate(source.names):
        try:
            height, width = rgb.probe(path / name)
            sizes[k] = 3 * height * width
        except UnreadableItemError as error:
            skipped.append((name, str(error)))
    if strict and skipped:
        raise UsageError(
            f"{path / skipped[0][0]}: {skipped[0][1]}; correct or remove it, or leave out --strict"
        )
    keep = np.flatnonzero(sizes)
    if not len(keep):
        first = f", the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise UsageError(
            f"{path}: no readable pictures in it{first}; give a folder of images or of class "
            "folders"
        )
    files = tuple(source.names[k] for k in keep)
    return replace(
        source,
        labels=None if source.labels is None else source.labels[keep],
        num_images=len(files),
        num_bytes=sizes[keep],
        image=partial(picture, path, files),
        names=files,
        skipped=tuple(skipped),
    )
