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
from fastbyol.data.pictures import Folder, Pictures
from fastbyol.data.source_arrays import Source
from fastbyol.errors import UsageError


def open_folder(
    path: Path, *, kind: str | None, split: str | None, strict: bool, **others: object
) -> Source:
    """Open the pictures below ``path``, as ``readable`` does."""
    source = lay_out(path, walk(path), Folder(path), kind=kind, split=split)
    return readable(path, source, Folder(path), strict=strict)


def readable(path: Path, source: Source, pictures: Pictures, *, strict: bool) -> Source:
    """Return ``source``, laid out from ``path``, with the sizes of its ``pictures``.

    Reads every picture's head, so that what is none is left out before decoding. Raises UsageError
    if no picture can be read, or with ``strict`` if one cannot.
    """
    sizes, skipped = np.zeros(len(source), np.int64), list(source.skipped)
    for k, name in enumerate(source.names):
        try:
            with pictures.head(name) as file:
                height, width = rgb.probe(file)
            sizes[k] = 3 * height * width
        except UnreadableItemError as error:
            skipped.append((name, str(error)))
        except OSError as error:
            skipped.append((name, error.strerror or str(error)))
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
        image=partial(picture, pictures, files),
        names=files,
        skipped=tuple(skipped),
    )
