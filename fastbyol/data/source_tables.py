"""Pictures in parquet files, and in the arrow files that the library ``datasets`` saves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastbyol.data import beton_write, folder_walk, source_arrays, splits
from fastbyol.data.folder_layout import picture
from fastbyol.data.pictures import Packed, Stretch
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import Source, listed
from fastbyol.data.source_folders import readable
from fastbyol.errors import FastbyolError, UsageError

PARQUET, ARROW = ".parquet", ".arrow"
STATE, INFO, PARTS = "state.json", "dataset_info.json", "dataset_dict.json"
# What `datasets` keeps of computations on a set.
_CACHE = "cache-"
_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]+)?$")


def has_parquet(path: Path) -> bool:
    """Return whether ``path`` is a parquet file, or a folder of some without pictures."""
    return _has(path, PARQUET)


def has_arrow(path: Path) -> bool:
    """Return whether ``path`` is an arrow file, or a folder that ``datasets`` has saved."""
    return (path / STATE).is_file() or (path / PARTS).is_file() or _has(path, ARROW)


def _has(path: Path, ending: str) -> bool:
    if not path.is_dir():
        return path.name.lower().endswith(ending)
    names = (name for _, _, names in os.walk(path) for name in names)
    return not folder_walk.has_pictures(path) and any(
        name.lower().endswith(ending) for name in names
    )


@dataclass(frozen=True)
class _Tables:
    """The tables of each split, by its name or None, and what the folder's own files say."""

    of: Mapping[str | None, tuple[Path, ...]]
    features: Mapping[str, Any] | None = None
    ignored: source_arrays.NamesAndReasons = ()


def open_tables(
    path: Path, *, kind: str, split: str | None, strict: bool, scratch: Scratch, **others: object
) -> Source:
    """Open the pictures and labels of ``split`` in a table, or in a folder of tables.

    Splits are told by the names of files and folders, ``train-00000-of-00002.parquet``. Columns are
    those of the features ``Image`` and ``ClassLabel``, or of usual names. The pictures are copied
    to ``scratch``. Raises UsageError for what is ambiguous or damaged, FastbyolError for a full
    disk.
    """
    tables = _tables(path, PARQUET if kind == "parquet" else ARROW)
    named = [part for part in tables.of if part is not None]
    order = {name: k for k, name in enumerate(splits.NAMES)}
    named.sort(key=lambda part: order.get(part, len(order)))
    chosen: list[str | None] = [split] if split in named else [*(split or "").split("+")]
    if split is None:
        chosen = [None] if None in tables.of else [*named[:1]]
    if missing := [part for part in chosen if part not in tables.of]:
        raise UsageError(
            f"{path}: no split {missing[0]!r}; its splits are {listed(named)}, leave out --split "
            "or name one of them"
        )
    files = list(dict.fromkeys(file for part in chosen for file in tables.of[part]))
    rest = [file for part, of in tables.of.items() if part not in chosen for file in of]
    root = path if path.is_dir() else path.parent
    pictures, rows = scratch.file("pictures"), scratch.file("rows")
    answer = _extracted(root, files, rest, tables.features, pictures, rows)
    notes = tuple(answer["notes"])
    if split is None and len(tables.of) > 1:
        untaken = " or ".join(part for part in named if part not in chosen)
        taken = "the tables of no split" if chosen == [None] else f"the split {chosen[0]}"
        notes = (f"took {taken}; --split takes {untaken}", *notes)
    packed, values, skipped = _located(root, pictures, rows)
    labels, class_names = source_arrays.named_labels(
        f"{path}: the labels", values, answer["class_names"], answer["others"]
    )
    source = Source(
        kind=kind,
        split="+".join(part for part in chosen if part) or None,
        class_names=class_names,
        labels=labels,
        num_images=len(packed.stretches),
        num_bytes=0,
        image=partial(picture, packed, tuple(packed.stretches)),
        names=tuple(packed.stretches),
        skipped=tuple(skipped),
        ignored=tables.ignored,
        notes=(*notes, *source_arrays.notes_on(class_names)),
        splits=tuple(named),
    )
    return readable(path, source, packed, strict=strict)


def _located(
    root: Path, pictures: Path, rows: Path
) -> tuple[Packed, list[Any], list[tuple[str, str]]]:
    """Return the pictures in the file ``rows``, the label of each, and what is left out."""
    stretches: dict[str, Stretch] = {}
    skipped, values, files = list[tuple[str, str]](), list[Any](), [pictures]
    with rows.open("rb") as lines:
        for name, file, offset, size, label in map(json.loads, lines):
            if size is None:
                skipped.append((name, label))
                continue
            if file is None:
                stretches[name] = Stretch(0, offset, size)
            else:
                beside = Path(os.path.normpath(file))
                if not beside.is_relative_to(os.path.normpath(root)):
                    skipped.append((name, "a file outside of the folder"))
                    continue
                try:
                    stretches[name] = Stretch(len(files), 0, beside.stat().st_size)
                except (OSError, ValueError) as error:
                    skipped.append((name, getattr(error, "strerror", None) or "no name of a file"))
                    continue
                files.append(beside)
            values.append(label)
    return Packed(tuple(files), stretches), values, skipped


def _tables(path: Path, ending: str) -> _Tables:
    """Find the tables at ``path``, and their splits. Raises UsageError if there are none."""
    if not path.is_dir():
        return _Tables({_split_of(path.name): (path,)})
    if (path / PARTS).is_file():
        parts = _json(path / PARTS).get("splits")
        if not isinstance(parts, list) or not all(map(_is_name, parts)) or not parts:
            raise UsageError(f"{path / PARTS}: names no splits; save the set again")
        saved = {part: _saved(path / part) for part in parts}
        return _Tables(
            _by_split(path, [(part, each.of[None]) for part, each in saved.items()]),
            next(iter(saved.values())).features,
        )
    if (path / STATE).is_file():
        return _saved(path)
    others = [name for name, kind in folder_walk.walk(path).ignored if kind != folder_walk.HIDDEN]
    files = sorted(
        path / name
        for name in others
        if name.lower().endswith(ending) and not Path(name).name.startswith(_CACHE)
    )
    if not files:
        raise UsageError(f"{path}: no {ending} files in it; give the folder that holds them")
    groups: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        folders = file.relative_to(path).parts[:-1]
        own = _split_of(file.name)
        of = own or next((part for part in map(splits.canonical, folders) if part), None)
        # What is left names the configuration, if the set has several.
        where = "/".join(part for part in folders if own or splits.canonical(part) is None)
        groups.setdefault((of or "", where), []).append(file)
    wheres = sorted({where for _, where in groups})
    if len(wheres) > 1:
        raise UsageError(
            f"{path}: has tables in {listed(where or '.' for where in wheres)}; give one of these "
            "folders"
        )
    ignored = tuple(
        (name, "files beside the tables") for name in others if path / name not in files
    )
    of_splits = {of or None: tuple(group) for (of, _), group in groups.items()}
    return _Tables(of_splits, _info(path), ignored)


def _saved(folder: Path) -> _Tables:
    """Return the tables of a folder that ``Dataset.save_to_disk`` has written."""
    state = _json(folder / STATE)
    rows = state.get("_data_files")
    names = [row.get("filename") if isinstance(row, dict) else None for row in rows or ()]
    if not isinstance(rows, list) or not names or not all(map(_is_name, names)):
        raise UsageError(f"{folder / STATE}: names no arrow files; save the set again")
    if state.get("_indices_data_files"):
        raise UsageError(
            f"{folder}: holds a selection of rows, as early versions of datasets saved it; save "
            "set.flatten_indices()"
        )
    return _Tables({None: tuple(folder / str(name) for name in names)}, _info(folder))


def _by_split(
    path: Path, rows: list[tuple[str, tuple[Path, ...]]]
) -> dict[str | None, tuple[Path, ...]]:
    by: dict[str | None, tuple[Path, ...]] = {}
    for part, files in rows:
        name = splits.canonical(part) or part
        if name in by:
            raise UsageError(f"{path}: has two splits {name}; give the folder of one of them")
        by[name] = files
    return by


def _split_of(name: str) -> str | None:
    """Return the split that the name of a file says: its last word, before the number of a shard.

    ``datasets`` calls a file of its cache SET-train-00000-of-00002.arrow.
    """
    stem = _SHARD.sub("", name.rpartition(".")[0])
    return splits.canonical(stem) or splits.canonical(stem.rpartition("-")[2])


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\0]", name)


def _info(folder: Path) -> Mapping[str, Any] | None:
    """Return the features in dataset_info.json, which old sets have beside their tables only."""
    features = _json(folder / INFO).get("features") if (folder / INFO).is_file() else None
    return features if isinstance(features, dict) else None


def _json(path: Path) -> dict[str, Any]:
    if source_arrays.size_of(path) > source_arrays.MAX_TEXT_BYTES:
        raise UsageError(f"{path}: too large for what it is; save the set again")
    with source_arrays.untrusted(path, "no JSON", "save the set again"):
        value = json.loads(source_arrays.read_whole(path))
    if not isinstance(value, dict):
        raise UsageError(f"{path}: no JSON object; save the set again")
    return value


def _extracted(
    root: Path,
    files: list[Path],
    others: list[Path],
    features: Mapping[str, Any] | None,
    pictures: Path,
    rows: Path,
) -> dict[str, Any]:
    """Have ``table_worker`` copy the pictures, and write the rows; return its answer."""
    request = {
        "tables": [(str(file), file.relative_to(root).as_posix()) for file in files],
        "others": [str(file) for file in others],
        "pictures": str(pictures),
        "rows": str(rows),
        "features": features,
        "parent": os.getpid(),
    }
    with (
        beton_write.memory("request") as payload,
        beton_write.memory("answer") as out,
        beton_write.memory("errors") as errors,
    ):
        beton_write.write_at(payload.fileno(), json.dumps(request).encode(), 0)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from fastbyol.data.table_worker import main; main()"],
            stdin=payload,
            stdout=out,
            stderr=errors,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)},
        )
        try:
            code = _watched(process, files, (pictures, rows))
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        errors.seek(0)
        text, last = out.read(), errors.read().decode(errors="replace").splitlines()[-1:]
    if code or not text:
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        why = f" ({' '.join(last[0].split())[:200]})" if last else ""
        raise UsageError(
            f"{_called(files)}: reading it ended by {how}{why}; it may be damaged, get it again"
        )
    answer: dict[str, Any] = json.loads(text)
    if "error" in answer:
        raise UsageError(answer["error"])
    if "disk" in answer:
        raise FastbyolError(f"{rows.parent}: {answer['disk']}")
    return answer


def _watched(process: subprocess.Popen[bytes], files: list[Path], written: tuple[Path, ...]) -> int:
    """Wait for the end of ``process``; return its exit code. Raises UsageError where it hangs."""
    size, moved = -1, time.monotonic()
    while True:
        try:
            return process.wait(beton_write.POLL_S)
        except subprocess.TimeoutExpired:
            now = sum(file.stat().st_size for file in written if file.exists())
        if now != size:
            size, moved = now, time.monotonic()
        elif time.monotonic() - moved > beton_write.STALL_S:
            raise UsageError(
                f"{_called(files)}: no picture was read for {beton_write.STALL_S:g} s; look at the "
                "disk, or get it again"
            ) from None


def _called(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
