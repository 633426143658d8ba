"""The kinds of sources that ``fastbyol convert`` reads: the table ``SOURCES``.

CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fastbyol.data import (
    folder_walk,
    source_archive,
    source_cifar,
    source_folders,
    source_idx,
    source_npy,
    source_npz,
    source_stl10,
    source_svhn,
    source_tables,
    source_textures,
    source_torchvision,
    source_webdataset,
    splits,
)
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import Source
from fastbyol.errors import UsageError, check_choice
from fastbyol.files import cache_folder, refuse_special


class Kind(NamedTuple):
    """A kind of source: how it is opened, and how a path is recognised as one.

    ``open`` names those options of ``open_source`` that it reads. ``own_files`` matches its files
    by the last part of their names; other files in its folders are reported as ignored.
    ``needs_folder`` is False where a path may also be a file, or is unused.
    """

    open: Callable[..., Source]
    is_at: Callable[[Path], bool] | None = None
    own_files: str = ""
    needs_folder: bool = True


# In the order in which ``detect`` asks. None stands for pictures whose layout tells the kind.
SOURCES: dict[str | None, Kind] = {
    "textures": Kind(source_textures.open_textures, needs_folder=False),
    "fashion-mnist": Kind(source_idx.open_idx, needs_folder=False),
    "idx": Kind(
        source_idx.open_idx, source_idx.has_idx, r".*(images|labels)[-.]idx.*", needs_folder=False
    ),
    "stl10": Kind(
        source_stl10.open_stl10,
        source_stl10.has_stl10,
        r"(train|test|unlabeled)(_[Xy]\.bin|\.mat)|class_names\.txt|fold_indices\.txt",
    ),
    "cifar10": Kind(
        source_cifar.open_cifar,
        partial(source_cifar.has_cifar, kind="cifar10"),
        r"(data_batch_[1-5]|test_batch|batches\.meta)(\.bin|\.mat|\.txt)?|readme\.html",
    ),
    "cifar100": Kind(
        source_cifar.open_cifar,
        partial(source_cifar.has_cifar, kind="cifar100"),
        r"(train|test|meta)(\.bin|\.mat)?|(fine|coarse)_label_names\.txt|file\.txt~",
    ),
    "svhn": Kind(
        source_svhn.open_svhn,
        source_svhn.has_svhn,
        r"(train|test|extra)_32x32\.mat",
        needs_folder=False,
    ),
    "datasets": Kind(source_tables.open_tables, source_tables.has_arrow, needs_folder=False),
    "parquet": Kind(source_tables.open_tables, source_tables.has_parquet, needs_folder=False),
    "torchvision": Kind(source_torchvision.open_torchvision, needs_folder=False),
    "npz": Kind(source_npz.open_npz, needs_folder=False),
    "npy": Kind(source_npy.open_npy, needs_folder=False),
    "webdataset": Kind(source_archive.open_archive, needs_folder=False),
    "archive": Kind(source_archive.open_archive, needs_folder=False),
    "classes": Kind(source_folders.open_folder),
    "folder": Kind(source_folders.open_folder),
    None: Kind(source_folders.open_folder),
}
# Kinds that are named instead of a path.
MADE = ("textures", "fashion-mnist")
TORCHVISION = source_torchvision.PREFIX
PICTURES = ("classes", "folder", None)


def open_source(
    source: str,
    *,
    kind: str | None = None,
    split: str | None = None,
    fold: int | None = None,
    count: int = 4096,
    size: int | None = None,
    seed: int = 0,
    strict: bool = False,
    scratch: Scratch | None = None,
) -> Source:
    """Open a path, or one of ``MADE``, as ``kind`` or as the kind that ``detect`` returns.

    ``split`` defaults to train where there are splits; ``fold`` (0 to 9) is one of STL-10's parts
    of train. ``count``, ``size`` (default 32) and ``seed`` are for ``textures``; ``strict`` makes
    the first unreadable picture an error. ``scratch``, which the caller keeps until the images are
    read, holds what has to be unpacked. A UsageError says what was expected at the path.
    """
    if not source:
        raise UsageError("no source given: name a folder or a file; for the working folder, '.'")
    if kind is not None:
        check_choice(f"{source}: the kind", kind, filter(None, SOURCES))
    path = Path(source)
    try:
        kind = kind or (source if source in MADE else detect(path))
        if fold is not None and kind != "stl10":
            raise UsageError(
                f"{source} ({kind or 'images in folders'}): has no folds, STL-10 has; leave out "
                "--fold"
            )
        if source == kind == "fashion-mnist":
            path = source_idx.fashion_mnist_folder(cache_folder())
        layout = kind
        if kind in source_archive.LAYOUTS and source_archive.is_packed(path):
            kind = "archive"
        if SOURCES[kind].needs_folder and not path.is_dir():
            raise UsageError(
                f"{path}: no such folder; give the folder that holds the {kind or 'images'} files"
            )
        chosen = split is not None
        # Among pictures a split may be the name of any folder.
        if split is not None and kind not in (*PICTURES, "archive"):
            split = "+".join(splits.canonical(part) or part for part in split.split("+"))
        opened = SOURCES[kind].open(
            path,
            kind=layout,
            split=split,
            fold=fold,
            count=count,
            size=size,
            seed=seed,
            strict=strict,
            scratch=scratch,
        )
        return (
            _with_rest(opened, path, chosen=chosen)
            if SOURCES[opened.kind].own_files and path.is_dir()
            else opened
        )
    except OSError as error:
        raise UsageError(
            f"{error.filename or path}: {error.strerror}; check its name and rights"
        ) from None


def is_path(name: str) -> bool:
    """Return whether ``name`` is a path, and not the name of a set such as torchvision:CIFAR10."""
    return name not in MADE and not name.startswith(TORCHVISION)


def is_source(name: str) -> bool:
    """Return whether ``open_source`` reads what is at the path ``name``, so that it is no beton."""
    try:
        return Path(name).is_dir() or detect(Path(name)) is not None
    except (OSError, ValueError, UsageError):
        return False


def files_of(name: str) -> dict[str, str]:
    """Return by name the paths of the files that a source is read from.

    Of a folder these are all but hidden ones, of an array also those that may lie beside it. Raises
    UsageError if the folder cannot be read.
    """
    path = Path(name)
    if source_torchvision.is_name(path):
        return source_torchvision.files_of(path)
    if not path.is_dir() and source_archive.is_packed(path):
        return source_webdataset.files_of(path)
    try:
        if not path.is_dir():
            kind = detect(path)
            own = r".*\.npy" if kind == "npy" else SOURCES[kind].own_files
            beside = (each for each in path.parent.iterdir() if re.fullmatch(own, each.name))
            return {each.name: str(each) for each in sorted({path, *beside}) if each.is_file()}
        return folder_walk.files_below(path)
    except OSError as error:
        raise UsageError(f"{error.filename or path}: {error.strerror}; check its rights") from None


def _with_rest(source: Source, path: Path, *, chosen: bool) -> Source:
    """Return ``source`` with other files in its folders ignored, and its default split noted."""
    own = re.compile(SOURCES[source.kind].own_files)
    # Some archives unpack to FOLDER/raw.
    files = [
        each for at in ("*", "*/*", "*/*/*") for each in path.glob(at) if own.fullmatch(each.name)
    ]
    folders = {path} | {
        folder for file in files for folder in file.parents if folder.is_relative_to(path)
    }
    beside = [
        each
        for folder in sorted(folders)
        for each in sorted(folder.iterdir())
        if each not in folders
    ]
    names = [each.relative_to(path).as_posix() for each in beside if not own.fullmatch(each.name)]
    ignored = (*source.ignored, *((name, "files and folders beside the arrays") for name in names))
    notes = (
        ()
        if chosen or source.split is None
        else (f"took the split {source.split}; --split takes another",)
    )
    return replace(source, ignored=ignored, notes=(*notes, *source.notes))


def detect(path: Path) -> str | None:
    """Return the kind of source at ``path``; None for a folder in which only pictures can lie."""
    if source_torchvision.is_name(path):
        return "torchvision"
    if not path.exists() and not source_webdataset.is_braces(str(path)):
        raise UsageError(
            f"{path}: no such file or folder; give a folder or archive of images, an .npz file, "
            "'textures' or 'fashion-mnist'"
        )
    if path.exists() and not path.is_dir():
        refuse_special(path, path.stat().st_mode)
    for kind, row in SOURCES.items():
        if row.is_at is not None and row.is_at(path):
            return kind
    if path.is_dir() and source_npy.has_npy(path) and not folder_walk.has_pictures(path):
        return "npy"
    if source_archive.is_packed(path):
        return "archive"
    if path.is_dir():
        return None
    name = path.name.lower()
    if name.endswith(".beton"):
        raise UsageError(f"{path}: is a beton file already; pass it to `fastbyol train --data`")
    if name.endswith((".npz", ".npy")):
        return name[-3:]
    if name.endswith((".mat", ".bin")) or name.startswith(("data_batch_", "test_batch")):
        raise UsageError(
            f"{path}: is read with the files beside it; give the folder of STL-10, CIFAR or SVHN, "
            "or save an .npz"
        )
    if folder_walk.is_picture(name):
        raise UsageError(f"{path}: is one picture; give the folder that it lies in")
    raise UsageError(
        f"{path}: neither a folder nor an .npz file; arrays can be saved with "
        "numpy.savez(images=..., labels=...)"
    )
