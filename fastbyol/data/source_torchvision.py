"""The classification sets of torchvision by name: torchvision:CIFAR10, torchvision:MNIST:ROOT."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbyol.data import folder_walk
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import Source, listed
from fastbyol.data.source_python import open_dataset
from fastbyol.errors import UsageError, check_choice, one_line
from fastbyol.files import cache_folder

PREFIX = "torchvision:"
# A network that swallows packets would otherwise be waited for without end.
NETWORK_S = 60.0
# The constructor's argument that chooses a part, and its value for each of our splits.
_FLAG: tuple[str, dict[str, object]] = "train", {"train": True, "test": False}


def _words(*names: str, **renamed: str) -> tuple[str, dict[str, object]]:
    return "split", {**dict(zip(names, names, strict=True)), **renamed}


SETS: dict[str, tuple[str, dict[str, object]]] = {
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST", "QMNIST"), _FLAG),
    **dict.fromkeys(("CIFAR10", "CIFAR100", "USPS"), _FLAG),
    **dict.fromkeys(("Food101", "GTSRB", "StanfordCars"), _words("train", "test")),
    **dict.fromkeys(("Flowers102", "DTD", "PCAM", "RenderedSST2"), _words("train", "val", "test")),
    "FGVCAircraft": _words("train", "val", "test", "trainval"),
    "OxfordIIITPet": _words("test", train="trainval"),
    "Country211": _words("train", "test", val="valid"),
    "Places365": _words("val", train="train-standard"),
    "Imagenette": _words("train", "val"),
    "SVHN": _words("train", "test", "extra"),
    "STL10": _words("train", "test", "unlabeled", "train+unlabeled"),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), ("", {})),
    "FakeData": ("", {}),
}


def is_name(path: Path) -> bool:
    """Return whether a source is the name of a set of torchvision, and no path."""
    return str(path).startswith(PREFIX)


def absolute(name: str) -> str:
    """Return torchvision:SET:ROOT with an absolute ROOT; other names stay."""
    parts = name.split(":", 2)
    if parts[0] + ":" == PREFIX and len(parts) == 3 and parts[2]:
        parts[2] = str(Path(parts[2]).expanduser().absolute())
    return ":".join(parts)


def files_of(path: Path) -> dict[str, str]:
    """Return by name the files below the ROOT of torchvision:SET:ROOT; none without one."""
    name, root = _parts(path)
    if root is None or not root.is_dir():
        return {}
    return {f"{name}/{each}": path for each, path in folder_walk.files_below(root).items()}


def open_torchvision(
    path: Path, *, split: str | None, strict: bool, scratch: Scratch, **others: object
) -> Source:
    """Read a set from ROOT, or from the cache folder, into which it is downloaded if missing.

    ``split`` defaults to train where there are splits. Raises UsageError for an unknown set or
    split, and for one that cannot be had, with the files that are wanted.
    """
    name, root = _parts(path)
    argument, values = SETS[name]
    if not values and split is not None:
        raise UsageError(f"{path}: torchvision has no splits of it; leave out --split")
    split = split or ("train" if values else None)
    if split is not None:
        check_choice(f"{path}: the split", split, values)
    options = {argument: values[split]} if split is not None else {}
    dataset = _opened(path, name, root, options)
    source = open_dataset(
        dataset, str(path), scratch=scratch, kind="torchvision", split=split, strict=strict
    )
    parts = tuple(part for part in values if "+" not in part)
    if root is not None:
        # Of splits whose files are missing nothing can be read.
        parts = tuple(
            part
            for part in parts
            if part == split or _is_there(name, root, {argument: values[part]})
        )
    return replace(source, splits=parts)


def _parts(path: Path) -> tuple[str, Path | None]:
    """Return the set's name as torchvision spells it, and ROOT. Raises UsageError."""
    name, _, root = str(path).removeprefix(PREFIX).partition(":")
    by_lower = {each.lower(): each for each in SETS}
    name = by_lower.get(name.lower(), name)
    check_choice("torchvision's set", name, SETS)
    return name, Path(root) if root else None


def _opened(path: Path, name: str, root: Path | None, options: dict[str, object]) -> Any:
    from torchvision import datasets

    make = getattr(datasets, name)
    if name == "FakeData":  # made, as textures are
        return make(size=64, image_size=(3, 32, 32))
    folder = cache_folder() / "torchvision" if root is None else root
    reason = ""
    # A folder that is named is read only: nothing is put beside the user's files.
    for download in (False, True) if root is None else (False,):
        try:
            with patience():
                folder.mkdir(parents=True, exist_ok=True) if download else None
                return make(str(folder), download=download, **options)
        except Exception as error:  # torchvision and its downloads raise anything
            reason = one_line(error)
    wanted = _files_wanted(make)
    files = f", as it wants them ({wanted})" if wanted else ""
    raise UsageError(
        f"{path}: {'cannot be had' if root is None else 'not in that folder'} ({reason}); "
        f"put its files{files} below {folder}"
        + (f", or name their folder, {PREFIX}{name}:ROOT" if root is None else "")
    )


def _is_there(name: str, root: Path, options: dict[str, object]) -> bool:
    from torchvision import datasets

    try:
        getattr(datasets, name)(str(root), download=False, **options)
    except Exception:  # as above
        return False
    return True


def _files_wanted(make: Any) -> str:
    """Return the names of a set's archives, or addresses, where torchvision's class has them."""
    rows = getattr(make, "resources", None)
    if isinstance(rows, list):  # MNIST's relatives: (name, checksum)
        folder = f"{make.__name__}/raw/"
        return listed(folder + str(row[0]) for row in rows if isinstance(row, tuple))
    names = [getattr(make, key, None) for key in ("filename", "_URL", "url")]
    return next((name for name in names if isinstance(name, str)), "")


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Stop waiting for a silent network after ``NETWORK_S`` while the body runs."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
