"""Conversion of any source of images to a beton file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import beton, beton_write, rgb, scratch, source_python, sources
from fastbyol.data.beton import MAX_SIDE, MIN_PAGE_BYTES
from fastbyol.data.beton_write import Mode, Progress
from fastbyol.data.rgb import Resize
from fastbyol.data.source_arrays import Source
from fastbyol.errors import FastbyolError, UsageError, check_choice, size_text

# Defaults: images of textures, and JPEG's quality.
COUNT, QUALITY = 4096, 90
# A file's first page and each worker's last are partly empty: small sets take the smallest page.
SMALL_SET_BYTES = 1 << 28
# The format has 32 bits for a page's size.
MAX_PAGE_BYTES = 1 << 31
# Ignored names shown of each kind.
SHOWN_NAMES = 3


@dataclass(frozen=True)
class Report:
    """The outcome of a conversion.

    ``skipped`` holds (name, reason) of every unreadable image and ``ignored`` (name, kind) of
    everything that is no image. ``notes`` explain choices. ``image_size`` is (height, width) in
    pixels if all images share it.
    """

    path: Path
    kind: str
    split: str | None
    num_written: int
    skipped: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    labelled: bool
    class_names: tuple[str, ...]
    image_size: tuple[int, int] | None
    num_bytes: int

    def in_words(self) -> Iterator[str]:
        """Yield lines that account for everything in the source; the last one sums it up."""
        yield from (f"{self.kind}: {note}" for note in self.notes)
        yield from (f"skipped {name}: {reason}" for name, reason in self.skipped)
        for kind, names in self.ignored_by_kind().items():
            more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
            yield f"ignored {kind}: {', '.join(names[:SHOWN_NAMES])}{more}"
        yield f"{self.path}: {self.summary()}"

    def summary(self) -> str:
        """Return the numbers of images, classes, and what was left out."""
        images = "1 image" if self.num_written == 1 else f"{self.num_written} images"
        classes = "1 class" if len(self.class_names) == 1 else f"{len(self.class_names)} classes"
        left_out = [
            f"{len(rows)} {what}"
            for what, rows in (("skipped", self.skipped), ("ignored", self.ignored))
            if rows
        ]
        return ", ".join((images, classes if self.labelled else "no labels", *left_out))

    def ignored_by_kind(self) -> dict[str, list[str]]:
        """Return the ignored names by kind, the commonest kind first."""
        by_kind: dict[str, list[str]] = {}
        for name, kind in self.ignored:
            by_kind.setdefault(kind, []).append(name)
        return dict(sorted(by_kind.items(), key=lambda item: -len(item[1])))


@dataclass(frozen=True)
class _Items:
    """A source's chosen images at their final size, as ``beton_write.write`` reads them."""

    source: Source
    chosen: NDArray[np.int64]
    resize: Resize
    size: int | None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[object, ...]:
        at = int(self.chosen[index])
        image = rgb.resized(self.source.image(at), self.resize, self.size)
        if max(image.shape) > MAX_SIDE:
            raise beton_write.UnreadableItemError(
                f"{image.shape[1]} x {image.shape[0]} pixels, a side may have {MAX_SIDE}"
            )
        return (image,) if self.source.labels is None else (image, int(self.source.labels[at]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.chosen[index]))

    def image_bytes(self) -> NDArray[np.int64]:
        if self.resize != "none" and self.size is not None:
            return np.full(len(self), 3 * self.size * self.size, np.int64)
        return self.source.image_bytes()[self.chosen]


def convert(
    source: str,
    out: str | Path,
    *,
    kind: str | None = None,
    split: str | None = None,
    fold: int | None = None,
    count: int = COUNT,
    size: int | None = None,
    seed: int = 0,
    resize: Resize | None = None,
    mode: Mode = "raw",
    quality: int = QUALITY,
    workers: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Report:
    """Write ``source``, a path or ``textures``, as the beton file ``out``.

    The fields are ``image`` and, where there are labels, ``label``. ``size`` is a side in pixels:
    textures are made at it, and other images are brought to it by ``resize``: "resize" stretches,
    "centre" (the default with a size) scales the short side and cuts out the middle, "none" leaves
    them. Unreadable images are left out and reported; with ``strict`` the first one is an error.
    Raises UsageError for what the caller can correct, FastbyolError for a full disk or a failed
    writer.
    """
    path = beton_write.followed(Path(out))
    beton_write.check_output(path, overwrite=overwrite)
    made = kind == "textures" or (kind is None and source == "textures")
    resize = _checked_resize(resize, size, made=made)
    _refuse_idle(count, seed, quality, mode, made=made)
    with scratch.beside(path) as folder:
        opened = sources.open_source(
            source,
            kind=kind,
            split=split,
            fold=fold,
            count=count,
            size=size,
            seed=seed,
            strict=strict,
            scratch=folder,
        )
        return write(
            opened,
            path,
            name=source,
            size=None if made else size,
            resize=resize,
            mode=mode,
            quality=quality,
            workers=workers,
            strict=strict,
            progress=progress,
            overwrite=overwrite,
            options={
                "size": size,
                "fold": fold,
                **({"count": count, "seed": seed} if made else {}),
            },
        )


def convert_dataset(
    dataset: Any,
    out: str | Path,
    *,
    size: int | None = None,
    resize: Resize | None = None,
    mode: Mode = "raw",
    quality: int = QUALITY,
    workers: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Report:
    """Write an indexed Python dataset, as ``source_python`` reads it, as the beton file ``out``.

    Arguments and errors are those of ``convert``.
    """
    path, name = beton_write.followed(Path(out)), type(dataset).__name__
    beton_write.check_output(path, overwrite=overwrite)
    resize = _checked_resize(resize, size, made=False)
    _refuse_idle(COUNT, 0, quality, mode, made=False)
    with scratch.beside(path) as folder:
        opened = source_python.open_dataset(
            dataset,
            name,
            scratch=folder,
            strict=strict,
            progress=progress,
            fitted=partial(rgb.resized, resize=resize, size=size),
        )
        return write(
            opened,
            path,
            name=name,
            mode=mode,
            quality=quality,
            workers=workers,
            strict=strict,
            progress=progress,
            overwrite=overwrite,
            options={"size": size},
        )


def write(
    source: Source,
    path: Path,
    *,
    name: str,
    size: int | None = None,
    resize: Resize = "none",
    mode: Mode = "raw",
    quality: int = QUALITY,
    workers: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    options: Mapping[str, int | None] | None = None,
) -> Report:
    """Write an open source, called ``name`` in messages, as the beton file ``path``.

    As ``convert`` does it; ``options`` are noted in the manifest.
    """
    items = _Items(source, np.arange(len(source)), resize, size)
    skipped = list(source.skipped)

    def written(items: _Items) -> beton.BetonInfo:
        return beton_write.write(
            path,
            items,
            labelled=source.labelled,
            mode=mode,
            quality=quality,
            workers=workers,
            progress=progress,
            overwrite=overwrite,
            page_bytes=_page_bytes(path, items, mode),
            stop_at_unreadable=strict,
            note=_note(name, source, **(options or {})),
        )

    try:
        info = written(items)
    except beton_write.UnreadableItemsError as error:
        damaged = [(items.name(index), reason) for index, reason in error.items]
        if strict:
            first, reason = damaged[0]
            raise UsageError(
                f"{name}: {first}: {reason}; correct or remove it, or leave out --strict"
            ) from None
        skipped += damaged
        info = written(_without(name, items, error.items))
    return Report(
        path=path,
        kind=source.kind,
        split=source.split,
        num_written=info.num_samples,
        skipped=tuple(sorted(skipped)),
        ignored=source.ignored,
        notes=source.notes,
        labelled=source.labelled,
        class_names=source.class_names,
        image_size=info.uniform_size,
        num_bytes=info.num_bytes,
    )


def _note(source: str, opened: Source, **options: int | None) -> dict[str, object]:
    """Return the manifest's note on the source of the images."""
    # Class names may come from folders. They are compared with other files', so they are UTF-8
    # whatever the system's encoding.
    names = [os.fsencode(name).decode("utf-8", "surrogateescape") for name in opened.class_names]
    note = {
        "source": source,
        "kind": opened.kind,
        "split": opened.split,
        "splits": list(opened.splits) or None,
        "class_names": names,
        **options,
    }
    return {key: value for key, value in note.items() if value is not None}


def _refuse_idle(count: int, seed: int, quality: int, mode: Mode, *, made: bool) -> None:
    """Raise UsageError for an option that would change nothing."""
    idle = [
        ("count", count != COUNT and not made, "textures"),
        ("seed", seed != 0 and not made, "textures"),
    ]
    idle.append(
        ("quality", quality != QUALITY and 1 <= quality <= 100 and mode == "raw", "--mode jpg")
    )
    for name, is_idle, of in idle:
        if is_idle:
            raise UsageError(f"{name}: is of {of} and changes nothing here; leave it out")


def _checked_resize(resize: Resize | None, size: int | None, *, made: bool) -> Resize:
    if resize is not None:
        check_choice("resize", resize, ("resize", "centre", "none"))
    if made:
        if resize in ("resize", "centre"):
            raise UsageError(f"resize {resize!r}: textures are made at their size; leave it out")
        return "none"
    if size is None and resize in ("resize", "centre"):
        raise UsageError(f"resize {resize!r}: needs a size; pass --size")
    if size is not None and resize == "none":
        raise UsageError(
            f"resize 'none': leaves the images as they are, but size {size} was given; drop one "
            "of the two"
        )
    if size is not None and not 1 <= size <= MAX_SIDE:
        raise UsageError(f"size {size}: must be 1 to {MAX_SIDE} pixels")
    return resize or ("none" if size is None else "centre")


def _without(source: str, items: _Items, damaged: tuple[tuple[int, str], ...]) -> _Items:
    """Return the items without those that cannot be read."""
    chosen = np.delete(items.chosen, [index for index, _ in damaged])
    if not len(chosen):
        raise UsageError(
            f"{source}: none of {len(items)} images can be read, the first: {damaged[0][1]}; look "
            "at the files"
        )
    return replace(items, chosen=chosen)


def _page_bytes(path: Path, items: _Items, mode: Mode) -> int:
    """Return the bytes of a page for the largest image. Raises FastbyolError for a full disk."""
    sizes = items.image_bytes()
    largest, total = int(sizes.max()), int(sizes.sum())
    free = shutil.disk_usage(path.parent).free
    if mode == "raw" and total > free:
        raise FastbyolError(
            f"{path}: needs {size_text(total)} and its disk has {size_text(free)}; make room or "
            "use --mode jpg"
        )
    # JPEG of noise at quality 100 can exceed the raw pixels.
    page = MIN_PAGE_BYTES if total < SMALL_SET_BYTES else beton_write.PAGE_BYTES
    while page < largest * (1 if mode == "raw" else 2):
        page *= 2
    if page > MAX_PAGE_BYTES:
        raise UsageError(
            f"{items.name(int(sizes.argmax()))}: too large for a beton file; pass --size"
        )
    return page
