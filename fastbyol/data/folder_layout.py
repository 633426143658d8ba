"""The layouts of picture folders: splits, folders of classes, annotations, or plain pictures.

``CLASS/...``, ``SPLIT/CLASS/...``, ``SPLIT/...`` and plain pictures are recognised, also below
folders that hold nothing else. Below a class any folders may follow. Ambiguity is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from fastbyol.data import rgb, splits
from fastbyol.data.beton_write import UnreadableItemError
from fastbyol.data.folder_walk import HIDDEN, Listing
from fastbyol.data.pictures import Pictures
from fastbyol.data.source_arrays import Images, Source, listed
from fastbyol.errors import UsageError

# A single folder of one of these names is no class.
_CONTAINERS = frozenset(
    (
        "all",
        "data",
        "image",
        "images",
        "img",
        "imgs",
        "jpegimages",
        "jpegs",
        "photos",
        "pictures",
        "raw",
    )
)
_ANNOTATIONS = "annotations.txt"
_MAX_ANNOTATION_BYTES = 1 << 28


@dataclass(frozen=True)
class _Tree:
    """The pictures in one folder and, by name, its subfolders with pictures; names are relative."""

    direct: tuple[str, ...]
    nested: dict[str, _Tree]

    @classmethod
    def of(cls, names: Iterable[str]) -> _Tree:
        direct, deeper = [], dict[str, list[str]]()
        for name in names:
            first, slash, rest = name.partition("/")
            if slash:
                deeper.setdefault(first, []).append(rest)
            else:
                direct.append(first)
        return cls(tuple(direct), {first: cls.of(rest) for first, rest in deeper.items()})

    def names(self) -> Iterator[str]:
        """Yield the names of all pictures."""
        yield from self.direct
        for first, tree in self.nested.items():
            yield from (f"{first}/{name}" for name in tree.names())

    def at(self, folder: str) -> _Tree:
        """Return the tree below ``folder``, a relative path; empty where it has no pictures."""
        tree = self
        for part in filter(None, folder.split("/")):
            tree = tree.nested.get(part, _EMPTY)
        return tree

    @property
    def is_plain(self) -> bool:
        """True if no folder here is a class: pictures only, or one folder of a container's name."""
        if not self.nested:
            return True
        (name, inner), *others = self.nested.items()
        return not self.direct and not others and name.lower() in _CONTAINERS and not inner.nested


_EMPTY = _Tree((), {})


def lay_out(
    path: Path, listing: Listing, pictures: Pictures, *, kind: str | None, split: str | None
) -> Source:
    """Return the pictures of ``listing``, the content of ``path``, and their labels, all unread.

    ``kind`` None chooses classes or folder by the layout. Raises UsageError if there are no
    pictures, if the split is missing, or if the layout is ambiguous.
    """
    tree = _Tree.of(listing.pictures)
    if not listing.pictures:
        raise UsageError(
            f"{path}: no pictures in it{what_lies(listing)}; give a folder of images, of class "
            "folders, STL-10's or CIFAR's"
        )
    start = _within(tree, kind)
    parts = _parts(tree.at(start))
    chosen = _chosen(path, start, tree, parts, listing, kind, split)
    inside = _join(start, chosen)
    if chosen or kind is None:
        inside = _join(inside, _within(tree.at(inside), kind, in_split=bool(chosen)))
    here = tree.at(inside)
    annotated = cache(
        lambda folder: _annotated(path, folder, tree.at(folder), listing, pictures)
    )  # read once
    names = (
        {name for part in parts for name in _classes(_join(start, part), tree, annotated, None)}
        if chosen
        else set()
    )
    names |= _classes(inside, tree, annotated, kind)
    if kind is None and here.direct and here.nested:
        raise UsageError(
            f"{path / inside}: has pictures beside folders of pictures; say --kind folder (all, "
            "no labels) or --kind classes"
        )
    if (
        chosen
        and kind is None
        and (
            within := [
                name for name in here.nested if splits.canonical(name) not in (None, "train")
            ]
        )
    ):
        raise UsageError(
            f"{path / inside}: {listed(within)} look like splits within a split; give the folder "
            "of one of them"
        )
    untaken = [part for part in parts if chosen and part != chosen.split("/")[0]]
    skipped, ignored = _left_out(listing, tree, [_join(start, part) for part in untaken])
    file, classes = (annotated(inside) if kind != "folder" and here.is_plain else None) or (
        "",
        None,
    )
    labelled, unlabelled, beside = _labelled(path, inside, here, classes, kind)
    class_names = tuple(sorted(names)) if any(of for _, of in labelled) else ()
    numbers = {name: number for number, name in enumerate(class_names)}
    files = tuple(_join(inside, name) for name, _ in labelled)
    return Source(
        kind="classes" if class_names else "folder",
        split=chosen or None,
        class_names=class_names,
        labels=np.array([numbers[of] for _, of in labelled], np.int64) if class_names else None,
        num_images=len(files),
        num_bytes=0,
        image=partial(picture, pictures, files),
        names=files,
        skipped=(*skipped, *unlabelled),
        ignored=(*(row for row in ignored if row[0] != file), *beside),
        notes=_notes(chosen, parts, inside),
        splits=tuple(parts.values()) if chosen else (),
    )


def picture(pictures: Pictures, files: Sequence[str], index: int) -> Images:
    """Read picture ``index`` of ``files``. Raises UnreadableItemError."""
    try:
        with pictures.open(files[index]) as file:
            return rgb.read(file)
    except OSError as error:
        raise UnreadableItemError(error.strerror or str(error)) from None


def _labelled(
    path: Path, inside: str, here: _Tree, annotated: dict[str, str] | None, kind: str | None
) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (picture, class or "") in ``here``, and what is skipped and ignored there."""
    if annotated is not None:
        rows = [(name, annotated.get(Path(name).name)) for name in sorted(here.names())]
        skipped = [
            (_join(inside, name), "not named in the annotations") for name, of in rows if of is None
        ]
        return [(name, of) for name, of in rows if of is not None], skipped, []
    if kind == "folder" or (kind is None and here.is_plain):
        return [(name, "") for name in sorted(here.names())], [], []
    if not here.nested:
        raise UsageError(
            f"{path / inside}: no class folders with pictures in it; say --kind folder, or give "
            "what holds them"
        )
    ignored = [(_join(inside, name), "pictures beside the class folders") for name in here.direct]
    return (
        [
            (f"{of}/{name}", of)
            for of in sorted(here.nested)
            for name in sorted(here.nested[of].names())
        ],
        [],
        ignored,
    )


def _within(tree: _Tree, kind: str | None, *, in_split: bool = False) -> str:
    """Return the relative folder that holds all of ``tree`` and is no class; empty without one.

    With ``in_split``, ``tree`` is a split: a folder of that name inside it is none
    (``seg_train/seg_train/CLASS``).
    """
    folder, named, here = "", "", tree
    while kind is None and len(here.nested) == 1 and not here.direct:
        ((name, inner),) = here.nested.items()
        is_split = splits.canonical(name) is not None
        if is_split and not in_split:
            return folder
        if inner.direct and not is_split:
            break
        folder, here = _join(folder, name), inner
        named = folder if is_split else named
    return folder if len(here.nested) > 1 and not here.direct else named


def _parts(tree: _Tree) -> dict[str, str]:
    """Map the subfolders that are splits to their names in ``splits.NAMES``, train first."""
    named = [
        (splits.NAMES.index(of), name)
        for name in tree.nested
        if (of := splits.canonical(name)) is not None
    ]
    return {name: splits.NAMES[rank] for rank, name in sorted(named)}


def _chosen(
    path: Path,
    start: str,
    tree: _Tree,
    parts: dict[str, str],
    listing: Listing,
    kind: str | None,
    split: str | None,
) -> str:
    """Return the split's folder, relative to ``start``; empty where there are no splits."""
    here = tree.at(start)
    others = [name for name in here.nested if name not in parts]
    if split is not None:
        if _join(start, split) in listing.folders:
            return split
        named = [name for name, of in parts.items() if of == (splits.canonical(split) or split)]
        if len(named) > 1:
            raise UsageError(
                f"{path}: {listed(named)} are all spelled like {split!r}; give one of these names "
                "with --split"
            )
        if not named:
            subfolders = listed([*parts, *others])
            raise UsageError(
                f"{path}: no subfolder {split!r} to take as split; its subfolders are {subfolders}"
            )
        return named[0]
    if parts and not others and not here.direct:
        first, *more = parts
        if more and parts[more[0]] == parts[first]:
            alike = listed(name for name, of in parts.items() if of == parts[first])
            raise UsageError(
                f"{path}: {alike} are all the split {parts[first]}; name one with --split"
            )
        return first
    if kind is None:
        _refuse_ambiguous(path, start, here, parts, others)
    return ""


def _refuse_ambiguous(
    path: Path, start: str, here: _Tree, parts: dict[str, str], others: list[str]
) -> None:
    """Raise UsageError if the subfolders ``parts`` and ``others`` may be more than classes."""
    # A class may be called train, but not val or test, and several splits are no classes.
    if any(of != "train" or here.nested[name].nested for name, of in parts.items()):
        beside = listed(others) if others else "pictures"
        raise UsageError(
            f"{path}: {listed(parts)} look like splits, beside {beside}: name one with --split "
            f"{next(iter(parts))}, or take "
            "every folder as a class with --kind classes"
        )
    if hidden := _hidden(here):
        tops = listed(here.nested)
        raise UsageError(
            f"{path}: {tops} hold no pictures but folders of them ({listed(hidden)}), so labels "
            "may be either: give one of "
            f"{tops} (or --split with its name), or take these as the classes with --kind classes"
        )
    if len(here.nested) > 1 and (
        vague := [name for name in here.nested if name.lower() in _CONTAINERS]
    ):
        beside = listed([name for name in here.nested if name not in vague] or vague[1:])
        raise UsageError(
            f"{path}: {vague[0]} is no class by its name, beside {beside}: give "
            f"{path / start / vague[0]}, or take every "
            "folder as a class with --kind classes"
        )


def _hidden(tree: _Tree) -> list[str]:
    """Name the folders that may be the classes instead of the subfolders that hold them.

    These subfolders have no pictures of their own, and one of them has several folders.
    """
    inner = [one.at(_within(one, None)) for one in tree.nested.values()]
    if tree.direct or len(inner) < 2 or any(one.direct for one in tree.nested.values()):
        return []
    return (
        sorted({name for one in inner for name in one.nested})
        if any(len(one.nested) > 1 for one in inner)
        else []
    )


def _classes(
    folder: str,
    tree: _Tree,
    annotated: Callable[[str], tuple[str, dict[str, str]] | None],
    kind: str | None,
) -> set[str]:
    """Return the names of the classes in ``folder``, relative to the root of ``tree``."""
    folder = _join(folder, _within(tree.at(folder), kind, in_split=True))
    here = tree.at(folder)
    if kind != "folder" and here.is_plain and (named := annotated(folder)):
        return set(named[1].values())
    return set(here.nested) if not here.is_plain or kind == "classes" else set()


def _annotated(
    path: Path, folder: str, tree: _Tree, listing: Listing, pictures: Pictures
) -> tuple[str, dict[str, str]] | None:
    """Read the annotations file in ``folder``: its name, and classes by picture, or None."""
    names = [
        name
        for name, kind in listing.ignored
        if kind != HIDDEN and name.rpartition("/")[0] == folder
    ]
    file = next((name for name in names if name.lower().endswith(_ANNOTATIONS)), None)
    if file is None:
        return None
    try:
        with pictures.open(file) as opened:
            text = opened.read(_MAX_ANNOTATION_BYTES).decode("utf-8-sig", "replace")
    except UnreadableItemError as error:
        raise UsageError(f"{path / file}: {error}; correct or remove it") from None
    rows = [line.split("\t") for line in text.splitlines()]
    pairs = {(row[0], row[1].strip()) for row in rows if len(row) >= 2 and row[1].strip()}
    classes = dict(pairs)
    if len(classes) < len(pairs):
        twice = next(picture for picture, of in pairs if classes[picture] != of)
        raise UsageError(f"{path / file}: gives {twice} several classes; leave one")
    return (
        (file, classes) if any(Path(picture).name in classes for picture in tree.names()) else None
    )


def _left_out(
    listing: Listing, tree: _Tree, others: Sequence[str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return what was skipped and ignored outside the splits ``others``."""
    away = tuple(f"{other}/" for other in others)
    skipped, ignored = (
        [row for row in rows if not row[0].startswith(away)]
        for rows in (listing.skipped, listing.ignored)
    )
    empty = [
        name
        for name in listing.folders
        if not f"{name}/".startswith(away) and tree.at(name) is _EMPTY
    ]
    return skipped, ignored + [(f"{name}/", "folders without pictures") for name in empty]


def _notes(chosen: str, parts: Iterable[str], inside: str) -> tuple[str, ...]:
    others = [part for part in parts if part != chosen]
    split = [f"split {chosen}; there are also {listed(others)}"] if chosen and others else []
    return (
        *split,
        *(
            [f"taken from {inside}/, which holds all the rest"]
            if inside != chosen and inside
            else []
        ),
    )


def what_lies(listing: Listing) -> str:
    """Return what else is listed, counted by kind, for a message that misses pictures."""
    kinds = Counter(reason for _, reason in (*listing.ignored, *listing.skipped))
    return (
        f" but {', '.join(f'{count} {kind}' for kind, count in kinds.most_common(4))}"
        if kinds
        else ""
    )


def _join(*parts: str) -> str:
    return "/".join(filter(None, parts))
