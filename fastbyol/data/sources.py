"""What can be converted: tell the kind of a source from what lies at its path, and open it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastbyol.data import (
    folder_walk,
    source_cifar,
    source_folders,
    source_idx,
    source_npy,
    source_npz,
    source_stl10,
    source_svhn,
    source_textures,
    splits,
)
from fastbyol.data.source_arrays import Source
from fastbyol.errors import UsageError, check_choice
from fastbyol.files import cache_folder, refuse_special

KINDS = ("textures", "fashion-mnist", "stl10", "cifar10", "cifar100", "svhn", "idx", "npz", "npy", "classes", "folder")
# Sources that are named and have no path.
MADE = ("textures", "fashion-mnist")
# Arrays in folders, in the order in which they are told from each other: what tells them, and a source's own files by the last
# parts of their names; what else lies in its folder is told.
_ARRAYS: dict[str, tuple[Callable[[Path], bool], str]] = {
    "idx": (source_idx.has_idx, r".*(images|labels)[-.]idx.*"),
    "stl10": (source_stl10.has_stl10, r"(train|test|unlabeled)(_[Xy]\.bin|\.mat)|class_names\.txt|fold_indices\.txt"),
    "cifar10": (
        partial(source_cifar.has_cifar, kind="cifar10"),
        r"(data_batch_[1-5]|test_batch|batches\.meta)(\.bin|\.mat|\.txt)?|readme\.html",
    ),
    "cifar100": (
        partial(source_cifar.has_cifar, kind="cifar100"),
        r"(train|test|meta)(\.bin|\.mat)?|(fine|coarse)_label_names\.txt|file\.txt~",
    ),
    "svhn": (source_svhn.has_svhn, r"(train|test|extra)_32x32\.mat"),
}
ARCHIVES = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tar.xz", ".zip")


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
) -> Source:
    """Open a path, or one of ``MADE``, as the ``kind`` given or found; UsageError says what was expected there.

    ``split`` defaults to train where the source has splits; ``fold`` (0 to 9) is one of STL-10's parts of train. ``count``,
    ``size`` (default 32) and ``seed`` are for ``textures``; ``strict`` makes the first file that is no picture an error.
    """
    if not source:
        raise UsageError("no source given: name a folder or a file; for the working folder, '.'")
    if kind is not None:
        check_choice(f"{source}: the kind", kind, KINDS)
    path = Path(source)
    try:
        kind = kind or (source if source in MADE else detect(path))
        if fold is not None and kind != "stl10":
            raise UsageError(f"{source} ({kind or 'images in folders'}): has no folds, STL-10 has; leave out --fold")
        if kind == "textures":
            if split is not None:
                raise UsageError(f"textures: has no split {split!r}; take another --seed for another set")
            return source_textures.open_textures(count=count, size=32 if size is None else size, seed=seed)
        if source == kind == "fashion-mnist":
            path = source_idx.fashion_mnist_folder(cache_folder())
        opened = _opened(path, kind, split, fold, strict=strict)
        return _accounted(opened, path, chosen=split is not None) if opened.kind in _ARRAYS and path.is_dir() else opened
    except OSError as error:
        raise UsageError(f"{error.filename or path}: {error.strerror}; check its name and rights") from None


def _opened(path: Path, kind: str | None, split: str | None, fold: int | None, *, strict: bool) -> Source:
    if kind not in (None, "classes", "folder") and split is not None:
        split = "+".join(splits.canonical(part) or part for part in split.split("+"))
    if kind in ("idx", "fashion-mnist"):
        return source_idx.open_idx(path, kind, split)
    if kind == "npz":
        return source_npz.open_npz(path, split)
    if kind == "npy":
        return source_npy.open_npy(path, split)
    if kind == "svhn":
        return source_svhn.open_svhn(path, split)
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give the folder that holds the {kind or 'images'} files")
    if kind == "stl10":
        return source_stl10.open_stl10(path, split, fold)
    if kind in ("cifar10", "cifar100"):
        return source_cifar.open_cifar(path, kind, split)
    return source_folders.open_folder(path, kind, split, strict=strict)


def _accounted(source: Source, path: Path, *, chosen: bool) -> Source:
    """Return ``source`` with a word on what else lies in its folders, and on a split that nobody asked for."""
    own = re.compile(_ARRAYS[source.kind][1])
    # Some archives unpack to FOLDER/raw.
    files = [each for at in ("*", "*/*", "*/*/*") for each in path.glob(at) if own.fullmatch(each.name)]
    folders = {path} | {folder for file in files for folder in file.parents if folder.is_relative_to(path)}
    beside = [each for folder in sorted(folders) for each in sorted(folder.iterdir()) if each not in folders]
    names = [each.relative_to(path).as_posix() for each in beside if not own.fullmatch(each.name)]
    ignored = (*source.ignored, *((name, "files and folders beside the arrays") for name in names))
    notes = () if chosen or source.split is None else (f"took the split {source.split}; --split takes another",)
    return replace(source, ignored=ignored, notes=(*notes, *source.notes))


def detect(path: Path) -> str | None:
    """Return the kind of what lies at ``path``, one of KINDS; None for a folder in which only pictures can lie."""
    if not path.exists():
        raise UsageError(
            f"{path}: no such file or folder; give a folder of images, an .npz file, 'textures' or 'fashion-mnist'"
        )
    if not path.is_dir():
        refuse_special(path, path.stat().st_mode)
    for kind, (lies_at, _) in _ARRAYS.items():
        if lies_at(path):
            return kind
    if path.is_dir():
        return "npy" if source_npy.has_npy(path) and not folder_walk.has_pictures(path) else None
    name = path.name.lower()
    if name.endswith(ARCHIVES):
        command = f"unzip {path}" if name.endswith(".zip") else f"tar -xf {path}"
        raise UsageError(f"{path}: is packed; unpack it (`{command}`) and give the folder")
    if name.endswith(".beton"):
        raise UsageError(f"{path}: is a beton file already; pass it to `fastbyol train --data`")
    if name.endswith((".npz", ".npy")):
        return name[-3:]
    if name.endswith((".mat", ".bin")) or name.startswith(("data_batch_", "test_batch")):
        raise UsageError(f"{path}: is read with the files beside it; give the folder of STL-10, CIFAR or SVHN, or save an .npz")
    if folder_walk.is_picture(name):
        raise UsageError(f"{path}: is one picture; give the folder that it lies in")
    raise UsageError(f"{path}: neither a folder nor an .npz file; arrays can be saved with numpy.savez(images=..., labels=...)")
