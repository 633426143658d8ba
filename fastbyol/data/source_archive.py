"""Pictures in a tar or zip, laid out as a folder's, and WebDataset's shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from fastbyol.data import archives, source_webdataset, splits, tar
from fastbyol.data.archives import Archive
from fastbyol.data.folder_layout import lay_out, what_lies
from fastbyol.data.folder_walk import Listing, walk
from fastbyol.data.members import list_members
from fastbyol.data.pictures import Packed, Stretch
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import Source, listed
from fastbyol.data.source_folders import readable
from fastbyol.data.source_webdataset import stem_of
from fastbyol.errors import UsageError, quoted
from fastbyol.files import open_regular

LAYOUTS = ("classes", "folder")
Shards = Mapping[str | None, list[Path]]


def is_packed(path: Path) -> bool:
    """Return whether ``path`` is a tar, a zip, a brace expression of tars, or a folder of some."""
    if path.is_dir():
        return source_webdataset.has_shards(path)
    exists = path.exists() or source_webdataset.is_braces(str(path))
    return exists and path.name.lower().endswith(archives.SUFFIXES)


def open_archive(
    path: Path,
    *,
    kind: str | None,
    split: str | None,
    strict: bool,
    scratch: Scratch | None,
    **others: object,
) -> Source:
    """Open what ``is_packed``: WebDataset's samples, or pictures, laid out as in a folder.

    ``kind`` is classes, folder, webdataset, or another where the content shows it. Raises
    UsageError for what is damaged, holds no pictures, or may be either.
    """
    shards = source_webdataset.shards_of(path)
    if path.is_dir() or not path.exists():
        if kind in LAYOUTS:
            return _unpacked_by_name(path, shards, kind, split, strict, scratch)
        return _sharded(path, shards, kind, split, strict, scratch)
    archive = archives.read(path, scratch)
    if kind not in LAYOUTS and not archive.is_zip:
        samples = source_webdataset.samples_of(archive)
        if samples.labelled or kind == "webdataset":
            chosen = _chosen(path, shards, split)
            read = [("", archive, samples)]
            return source_webdataset.open_samples(path, read, split=chosen, strict=strict)
    archive = _with_inner(path, archive)
    if not archive.listing.pictures:
        command = f"unzip {quoted(path)}" if archive.is_zip else f"tar -xf {quoted(path)}"
        raise UsageError(
            f"{path}: no pictures in it{what_lies(archive.listing)}; if it holds the arrays of a "
            f"data set, unpack it (`{command}`) and give the folder"
        )
    return _laid_out(path, [archive], archive.listing, archive.stretches, kind, split, strict)


def _sharded(
    path: Path,
    shards: Shards,
    kind: str | None,
    split: str | None,
    strict: bool,
    scratch: Scratch | None,
) -> Source:
    """Open several shards as WebDataset's."""
    chosen = _chosen(path, shards, split)
    read = []
    for number, shard in enumerate(shards[chosen]):
        archive = archives.read(shard, scratch, number)
        read.append((_name(path, shard), archive, source_webdataset.samples_of(archive)))
    if kind != "webdataset" and path.is_dir() and not any(part.is_sure for *_, part in read):
        raise UsageError(
            f"{path}: its archives hold pictures with nothing beside them; say --kind classes "
            "(each archive is a class), folder (no labels) or webdataset (shards without labels)"
        )
    source = source_webdataset.open_samples(path, read, split=chosen, strict=strict)
    ignored = walk(path).ignored if path.is_dir() else []
    others = [each for each in shards if each not in (None, chosen)]
    return replace(
        source,
        ignored=(*(row for row in ignored if not _is_tar(row[0])), *source.ignored),
        notes=(
            *((f"split {chosen}; there are also {listed(map(str, others))}",) if others else ()),
            *source.notes,
        ),
        splits=tuple(each for each in shards if each is not None),
    )


def _unpacked_by_name(
    path: Path,
    shards: Shards,
    kind: str | None,
    split: str | None,
    strict: bool,
    scratch: Scratch | None,
) -> Source:
    """Open several archives as if each were unpacked into a folder of its name."""
    paths = sorted(each for part in shards.values() for each in part)
    read = [archives.read(each, scratch, number) for number, each in enumerate(paths)]
    names = (stem_of(_name(path, each)) for each in paths)
    ignored = walk(path).ignored if path.is_dir() else []
    listing, stretches = _merged(
        (
            (name, archive.listing, archive.stretches)
            for name, archive in zip(names, read, strict=True)
        ),
        [row for row in ignored if not _is_tar(row[0])],
    )
    return _laid_out(path, read, listing, stretches, kind, split, strict)


def _laid_out(
    path: Path,
    read: list[Archive],
    listing: Listing,
    stretches: dict[str, Stretch],
    kind: str | None,
    split: str | None,
    strict: bool,
) -> Source:
    pictures = Packed(tuple(archive.file for archive in read), stretches)
    layout = kind if kind in LAYOUTS else None
    source = lay_out(path, listing, pictures, kind=layout, split=split)
    return readable(path, source, pictures, strict=strict)


def _with_inner(path: Path, archive: Archive) -> Archive:
    """Return an archive without pictures with the tars in it, such as ImageNet's, unpacked."""
    names = [name for name, _ in archive.listing.ignored if name in archive.stretches]
    inner = [name for name in names if name.lower().endswith(".tar")]
    if archive.listing.pictures or archive.is_zip or not inner:
        return archive
    parts = []
    with open_regular(archive.file) as file:
        for name in inner:
            at = archive.stretches[name]
            members = tar.members(file, path / name, at.file, at.offset, at.offset + at.size)
            parts.append((stem_of(name), *list_members(members)))
    rest = [row for row in archive.listing.ignored if row[0] not in inner]
    listing, stretches = _merged(parts, rest)
    return archive._replace(listing=listing, stretches=archive.stretches | stretches)


def _merged(
    parts: Iterable[tuple[str, Listing, dict[str, Stretch]]], ignored: list[tuple[str, str]]
) -> tuple[Listing, dict[str, Stretch]]:
    """Return the content of several archives, each below a folder of its own, and ``ignored``."""
    merged, stretches, folders = Listing(ignored=ignored), dict[str, Stretch](), set[str]()
    for folder, listing, own in parts:
        merged.pictures += [f"{folder}/{name}" for name in listing.pictures]
        merged.skipped += [(f"{folder}/{name}", reason) for name, reason in listing.skipped]
        merged.ignored += [(f"{folder}/{name}", kind) for name, kind in listing.ignored]
        folders |= {f"{folder}/{name}" for name in listing.folders}
        folders |= {folder, *map(str, Path(folder).parents)} - {"."}
        stretches |= {f"{folder}/{name}": at for name, at in own.items()}
    merged.folders = list(folders)
    merged.sort()
    return merged, stretches


def _chosen(path: Path, shards: Shards, split: str | None) -> str | None:
    """Return the split to open. Raises UsageError unless there is one of that name."""
    names = [each for each in shards if each is not None]
    if split is None and None in shards and names:
        raise UsageError(
            f"{path}: shards of {listed(names)} lie beside {shards[None][0].name}; name one with "
            f"--split {names[0]}"
        )
    if split is None:
        return next(iter(shards))
    split = splits.canonical(split) or split
    if split not in shards:
        raise UsageError(f"{path}: has no shards of the split {split!r}, but of {listed(names)}")
    return split


def _name(path: Path, shard: Path) -> str:
    return shard.relative_to(path).as_posix() if path.is_dir() else shard.name


def _is_tar(name: str) -> bool:
    return name.lower().endswith(archives.TARS)
