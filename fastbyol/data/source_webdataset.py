"""WebDataset: samples in the members of tars, which are its shards.

Members of one folder whose names agree up to the first dot are a sample: ``a/07.jpg`` and
``a/07.cls``. ``.cls`` is its label, a whole number or a text, or else ``.json`` has it as
``label``, ``cls`` or ``class``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from fastbyol.data import archives, folder_walk, source_arrays, splits
from fastbyol.data.archives import Archive
from fastbyol.data.folder_layout import picture
from fastbyol.data.pictures import Packed, Stretch
from fastbyol.data.source_arrays import Source
from fastbyol.data.source_folders import readable
from fastbyol.errors import UsageError, one_line
from fastbyol.files import open_regular

LABEL_KEYS = ("label", "cls", "class")
MAX_SHARDS = 100_000
# A label in .cls, and what lies around it in .json, where there may be embeddings.
_MAX_BYTES = {"cls": 256, "json": 1 << 22}
_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_COUNT = re.compile(r"-of-[0-9]+$")  # shard-00000-of-01024
# The picture of a sample that has several; others follow by name.
_BESIDE = frozenset(("cls", "json", "txt"))
_FIRST = ("jpg", "jpeg", "png", "webp")

Label = int | str | None


class Samples(NamedTuple):
    """The samples of a shard: (pictures by suffix, label) each; all else with reasons.

    ``is_sure`` is False where no picture has a text or label beside it.
    """

    samples: list[tuple[dict[str, str], Label]]
    skipped: list[tuple[str, str]]
    ignored: list[tuple[str, str]]
    is_sure: bool

    @property
    def labelled(self) -> bool:
        """True if a sample has a label."""
        return any(label is not None for _, label in self.samples)


def is_braces(name: str) -> bool:
    """Return whether ``name`` is a brace expression of tars, such as shard-{000..099}.tar."""
    return _BRACES.search(name) is not None and name.lower().endswith(archives.TARS)


def expanded(name: str) -> list[Path]:
    """Return the paths that a brace expression stands for, in a shell's order.

    Braces hold numbers ``{000..099}``, with as many zeros as are written, or names ``{a,b}``.
    Raises UsageError for others, and for more than ``MAX_SHARDS``.
    """
    pieces = _BRACES.split(name)
    choices = [_choices(name, braces) for braces in pieces[1::2]]
    if (count := math.prod(map(len, choices))) > MAX_SHARDS:
        raise UsageError(f"{name}: {count:,} shards, more than {MAX_SHARDS:,}; name fewer")
    fixed = pieces[::2]
    return [
        Path(fixed[0] + "".join(map("".join, zip(chosen, fixed[1:], strict=True))))
        for chosen in product(*choices)
    ]


def _choices(name: str, braces: str) -> list[str]:
    if "," in braces:
        return braces.split(",")
    match = _RANGE.fullmatch(braces)
    if match is None:
        raise UsageError(
            f"{name}: {{{braces}}} is no range; write it as {{000..099}}, or names as {{a,b}}"
        )
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_SHARDS:
        raise UsageError(f"{name}: more than {MAX_SHARDS:,} shards; name fewer")
    width = max((len(text) for text in match.groups() if text.startswith("0")), default=0)
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def has_shards(path: Path) -> bool:
    """Return whether a folder has tars, in it or in folders of splits, and no pictures."""
    if not path.is_dir():
        return False
    names = os.listdir(path)  # noqa: PTH208 - maybe a million
    with os.scandir(path) as entries:
        folders = [each.path for each in entries if each.is_dir() and splits.canonical(each.name)]
    names += [name for folder in folders for name in os.listdir(folder)]  # noqa: PTH208
    is_some = any(name.lower().endswith(archives.TARS) for name in names)
    return is_some and not folder_walk.has_pictures(path)


def shards_of(path: Path) -> dict[str | None, list[Path]]:
    """Return the shards of a tar, a brace expression or a folder by split, train first.

    None stands for shards whose name, and folder, is no split's. Raises UsageError where one of a
    brace expression is missing.
    """
    if path.is_dir():
        rows = folder_walk.walk(path).ignored
        names = [name for name, kind in rows if kind not in folder_walk.NOT_LOOKED_AT]
        paths = [path / name for name in names if name.lower().endswith(archives.TARS)]
    elif path.exists() or not is_braces(str(path)):
        paths = [path]
    else:
        paths = expanded(str(path))
        if missing := [each for each in paths if not each.is_file()]:
            raise UsageError(
                f"{missing[0]}: no such file, the first of {len(missing)} that are missing of "
                f"{len(paths)} shards; get it, or correct the braces"
            )
    by_split: dict[str | None, list[Path]] = {}
    for each in paths:
        by_split.setdefault(_split_of(each, path), []).append(each)
    order = (*splits.NAMES, None)
    return {split: by_split[split] for split in order if split in by_split}


def files_of(path: Path) -> dict[str, str]:
    """Return by name the paths of an archive or a brace expression, whether they exist or not."""
    paths = [path] if path.exists() else expanded(str(path))
    return {f"{number} {each.name}": str(each) for number, each in enumerate(paths)}


def _split_of(shard: Path, path: Path) -> str | None:
    """Return the split that a shard's name is of, or that of the innermost folder in ``path``."""
    stem = _COUNT.sub("", stem_of(shard.name))
    around = shard.relative_to(path).parts[-2::-1] if path.is_dir() else (shard.parent.name,)
    named = (splits.canonical(name) for name in (stem, *around))
    return next(filter(None, named), None)


def stem_of(name: str) -> str:
    """Return the name of a tar without its suffix."""
    suffix = max((end for end in archives.TARS if name.lower().endswith(end)), key=len, default="")
    return name[: len(name) - len(suffix)]


def samples_of(archive: Archive) -> Samples:
    """Return the samples of a shard, with their labels read, in the order of their names.

    A sample whose label cannot be read is skipped. Raises OSError where the disk fails.
    """
    listing, parts = archive.listing, dict[str, dict[str, str]]()
    pictures, stretches = set(listing.pictures), archive.stretches
    for name in (*listing.pictures, *(name for name, _ in listing.ignored)):
        match = _KEY.fullmatch(name)
        if match is not None and name in stretches:
            parts.setdefault(match[1], {})[match[2]] = name
    samples, skipped, is_sure, used = [], list(listing.skipped), False, set[str]()
    with open_regular(archive.file) as file:
        for members in parts.values():
            own = {suffix: name for suffix, name in members.items() if name in pictures}
            if not own:
                continue
            is_sure = is_sure or not _BESIDE.isdisjoint(members)
            label, text = None, members.get("cls") or members.get("json")
            try:
                if text is not None:
                    label = _label(file.fileno(), stretches[text], "cls" in members)
            except (ValueError, RecursionError) as error:
                skipped += [(each, f"its label {text}: {one_line(error)}") for each in own.values()]
                continue
            if text is not None and label is not None:
                used.add(text)
            samples.append((own, label))
    ignored = [row for row in listing.ignored if row[0] not in used]
    single = [name for name in listing.pictures if _KEY.fullmatch(name) is None]
    ignored += [(name, "pictures without a sample's name") for name in single]
    return Samples(samples, skipped, ignored, is_sure)


def _label(fd: int, stretch: Stretch, is_cls: bool) -> Label:
    """Read a label; None where there is none. Raises ValueError, and RecursionError of JSON."""
    if stretch.size > (most := _MAX_BYTES["cls" if is_cls else "json"]):
        raise ValueError(f"more than {most:,} bytes")
    text = os.pread(fd, stretch.size, stretch.offset).decode("utf-8").strip()
    if is_cls:
        value: object = int(text) if re.fullmatch(r"[+-]?[0-9]{1,19}", text) else text or None
    else:
        content = json.loads(text)
        values = [content.get(key) for key in LABEL_KEYS] if isinstance(content, dict) else []
        value = next((each for each in values if isinstance(each, int | float | str)), None)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"{value} is no whole number")
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
        raise ValueError("beyond 64 bits with sign")
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def open_samples(
    path: Path,
    shards: Sequence[tuple[str, Archive, Samples]],
    *,
    split: str | None,
    strict: bool,
) -> Source:
    """Open the samples of named ``shards``, which are of one split of ``path``.

    Raises UsageError if no picture can be read.
    """
    rows, skipped, ignored = list[tuple[str, Label]](), [], []
    stretches: dict[str, Stretch] = {}
    # Of pictures such as 07.jpg and 07.mask.png the second are no images of their own.
    is_plain = any(
        "." not in suffix for _, _, shard in shards for own, _ in shard.samples for suffix in own
    )
    for shard_name, archive, shard in shards:
        prefix = f"{shard_name}/" if shard_name else ""
        stretches |= {prefix + name: at for name, at in archive.stretches.items()}
        skipped += [(prefix + name, reason) for name, reason in shard.skipped]
        ignored += [(prefix + name, kind) for name, kind in shard.ignored]
        for own, label in shard.samples:
            first, *others = sorted(own, key=_rank)
            if is_plain and "." in first:
                first, others = "", [first, *others]
            else:
                rows.append((prefix + own[first], label))
            ignored += [(prefix + own[each], "further pictures of samples") for each in others]
    if any(isinstance(label, int) for _, label in rows):
        skipped += [
            (name, f"its label {label!r} is no number, others are")
            for name, label in rows
            if isinstance(label, str)
        ]
        rows = [row for row in rows if not isinstance(row[1], str)]
    if not rows:
        first_reason = f", the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise UsageError(f"{path}: no samples with pictures in it{first_reason}; give other shards")
    names = tuple(name for name, _ in rows)
    labels, class_names = source_arrays.named_labels(
        f"{path}: its labels", [label for _, label in rows], None, remedy="say --kind folder"
    )
    pictures = Packed(tuple(archive.file for _, archive, _ in shards), stretches)
    unlabelled = 0 if labels is None else int((labels < 0).sum())
    source = Source(
        kind="webdataset",
        split=split,
        class_names=class_names,
        labels=labels,
        num_images=len(names),
        num_bytes=0,
        image=partial(picture, pictures, names),
        names=names,
        skipped=tuple(skipped),
        ignored=tuple(sorted(ignored)),
        notes=(
            *((f"{unlabelled} of {len(names)} samples have no label",) if unlabelled else ()),
            *source_arrays.notes_on(class_names),
        ),
    )
    return readable(path, source, pictures, strict=strict)


def _rank(suffix: str) -> tuple[int, int, str]:
    """Return the order of pictures in a sample."""
    short = suffix.lower()
    return short.count("."), _FIRST.index(short) if short in _FIRST else len(_FIRST), suffix
