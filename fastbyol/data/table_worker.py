"""The process that reads parquet and arrow files; it alone imports pyarrow.

pyarrow's code may die of a damaged file, so ``source_tables`` starts this process and watches it.
It copies the encoded pictures of the tables, one after another, into one file.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastbyol.data import beton_write
from fastbyol.data.memory import cpu_bytes
from fastbyol.data.pictures import MAX_BYTES
from fastbyol.data.source_arrays import IMAGE_NAMES, LABEL_NAMES, MAX_CLASSES, listed
from fastbyol.errors import FastbyolError, UsageError, one_line
from fastbyol.files import open_regular

# Among several columns of labels one of these is chosen.
FIRST_LABELS = LABEL_NAMES[:4]
# Rows of parquet that are in memory at a time. Of arrow files the system maps batches.
BATCH_ROWS = 16
# Beyond the largest picture and a few pages of it.
MOST_MEMORY = 4 << 30
MAX_NAME_LETTERS = 80
PARQUET = ".parquet"
_ARROW_FILE = b"ARROW1"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ENDED = "no whole parquet or arrow file"


def main() -> None:
    """Read the request, JSON in standard input, and answer with JSON in standard output.

    The request has ``tables`` (paths, and the names to call them), ``pictures`` and ``rows`` (files
    to write), ``features`` (of dataset_info.json, or None), ``others`` (tables whose labels count
    for the names of classes) and ``parent``, a process id. A line of ``rows`` is JSON: name, a
    picture's file or None, offset, size, and label, which is the reason where the size is None. The
    answer has ``error`` or ``disk``, or else ``labelled``, ``class_names``, ``others`` and
    ``notes``.
    """
    request = json.load(sys.stdin)
    beton_write.die_with(request["parent"])
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    try:
        answer = _read(request)
    except UsageError as error:
        answer = {"error": str(error)}
    except FastbyolError as error:
        answer = {"disk": str(error)}
    json.dump(answer, sys.stdout)


def _read(request: dict[str, Any]) -> dict[str, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            "parquet and arrow files need the package pyarrow; pip install 'fastbyol[hf]'"
        ) from None
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    # Of memory that is the process's own; files that are mapped do not count.
    most, hard = min(cpu_bytes(), MOST_MEMORY), resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    tables = [(Path(path), name) for path, name in request["tables"]]
    columns: _Columns | None = None
    with (
        _written(request["pictures"]) as pictures,
        _written(request["rows"]) as rows,
    ):
        for path, name in tables:
            with _checked(path), open_regular(path) as file:
                schema, batches = _opened(path, file)
                own = _Columns(path, schema, request["features"])
                if columns is not None and own.key != columns.key:
                    raise UsageError(
                        f"{path}: has other columns than {tables[0][0]}; give one of them alone"
                    )
                columns = own
                _copy(path, name, own, batches, pictures, rows)
    assert columns is not None
    others = set[Any]()
    if columns.label is not None and columns.class_names is None:
        for other in map(Path, request["others"]):
            others |= _labels_of(other, request["features"])
    return {
        "labelled": columns.label is not None,
        "class_names": columns.class_names,
        "others": sorted(others, key=str),
        "notes": columns.notes,
    }


class _Columns:
    """The columns of a table that hold the pictures and the labels, by their names and types.

    ``class_names`` come from the features that the library ``datasets`` writes, or are None.
    """

    def __init__(self, path: Path, schema: Any, features: dict[str, Any] | None) -> None:
        with suppress(KeyError, TypeError, ValueError):
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        features = features if isinstance(features, dict) else {}
        self.fields = {field.name: field.type for field in schema}
        if len(self.fields) < len(schema):
            raise UsageError(f"{path}: two columns have one name; save it with different ones")
        self.image = self._image(path, features)
        self.label, beside = self._label(path, features)
        self.class_names = self._class_names(features)
        left = sorted(self.fields.keys() - {self.image, self.label})
        self.notes = [f"left out the columns {listed(left)}"] if left else []
        if beside:
            self.notes.insert(0, f"took the labels of {self.label}, not of {listed(beside)}")
        self.key = self.image, self.label, self.class_names
        self.wanted = [self.image] if self.label is None else [self.image, self.label]

    def _image(self, path: Path, features: dict[str, Any]) -> str:
        marked = [name for name in self.fields if _kind_of(features, name) == "Image"]
        structs = [name for name, of in self.fields.items() if _is_struct(of)]
        packed = [name for name, of in self.fields.items() if _is_binary(of)]
        for names in (marked, structs, packed):
            names = [name for name in names if name in structs or name in packed]
            usual = [name for name in names if name.lower() in IMAGE_NAMES]
            if len(names) == 1 or len(usual) == 1:
                return str((usual or names)[0])
            if names:
                raise UsageError(
                    f"{path}: columns {listed(names)} may all hold the pictures; save it with one "
                    "of them, called image"
                )
        raise UsageError(
            f"{path}: no column of encoded pictures, its columns are "
            f"{listed(f'{name} ({of})' for name, of in self.fields.items())}; save the bytes of "
            "PNG or JPEG files under image"
        )

    def _label(self, path: Path, features: dict[str, Any]) -> tuple[str | None, list[str]]:
        """Return the column of labels, if there is one, and those that were not chosen."""
        marked = [name for name in self.fields if _kind_of(features, name) == "ClassLabel"]
        usual = [name for name in self.fields if name.lower() in LABEL_NAMES]
        names = [name for name in dict.fromkeys(usual + marked) if _is_label(self.fields[name])]
        for first in FIRST_LABELS:
            if first in names:
                return first, [name for name in names if name != first]
        if len(names) > 1:
            raise UsageError(
                f"{path}: columns {listed(names)} may all hold the labels; save it with one of "
                "them called label"
            )
        return (names[0] if names else None), []

    def _class_names(self, features: dict[str, Any]) -> list[str] | None:
        if self.label is None or _kind_of(features, self.label) != "ClassLabel":
            return None
        names = features[self.label].get("names")
        if isinstance(names, dict):  # as YAML has them: {"0": "cat", "1": "dog"}
            names = list(names.values())
        return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else None


def _kind_of(features: dict[str, Any], name: str) -> object:
    feature = features.get(name)
    return feature.get("_type") if isinstance(feature, dict) else None


def _is_binary(of: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(of) or types.is_large_binary(of))


def _is_struct(of: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_struct(of)
        and of.get_field_index("bytes") >= 0
        and _is_binary(of.field("bytes").type)
    )


def _is_label(of: Any) -> bool:
    from pyarrow import types

    kinds = types.is_integer, types.is_boolean, types.is_string, types.is_large_string
    return any(is_one(_plain(of)) for is_one in kinds)


def _plain(of: Any) -> Any:
    """Return the type of the values, if ``of`` is the type of categories."""
    from pyarrow import types

    return of.value_type if types.is_dictionary(of) else of


def _opened(path: Path, file: BinaryIO) -> tuple[Any, Any]:
    """Return the schema of a table and a function from names of columns to its batches."""
    import pyarrow
    from pyarrow import ipc, parquet

    if path.name.lower().endswith(PARQUET):
        # Without a buffer whole row groups, often all of the file, are in memory.
        table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        return table.schema_arrow, lambda names: table.iter_batches(
            BATCH_ROWS, columns=names, use_threads=False
        )
    if not os.fstat(file.fileno()).st_size:
        raise ValueError("it is empty")
    mapped = pyarrow.memory_map(f"/dev/fd/{file.fileno()}")
    if file.read(len(_ARROW_FILE)) == _ARROW_FILE:
        whole = ipc.open_file(mapped)
        return whole.schema, lambda names: (
            whole.get_batch(k).select(names) for k in range(whole.num_record_batches)
        )
    stream = ipc.open_stream(mapped)
    return stream.schema, lambda names: (batch.select(names) for batch in stream)


def _copy(
    path: Path, name: str, columns: _Columns, batches: Any, pictures: BinaryIO, rows: BinaryIO
) -> None:
    """Append the pictures of a table to one file, and to another what ``main`` describes."""
    row = 0
    for batch in batches(columns.wanted):
        # Otherwise offsets in it are used as they are.
        batch.validate(full=True)
        data, paths = _encoded(batch.column(columns.image))
        labels = [None] * len(data) if columns.label is None else _values(batch, columns.label)
        for k, label in enumerate(labels):
            of = "" if paths is None or not paths[k].is_valid else paths[k].as_py()
            called = f"{name} row {row}"
            if of:
                called += f" ({' '.join(of.split())[-MAX_NAME_LETTERS:]})"
            where: list[Any]
            if data[k].is_valid:
                buffer = data[k].as_buffer()
                if buffer.size <= MAX_BYTES:
                    where = [None, pictures.tell(), buffer.size, label]
                    with beton_write.disk_errors():
                        pictures.write(buffer)
                else:
                    where = [None, 0, None, f"more than {MAX_BYTES:,} bytes"]
            elif _URL.match(of):
                raise UsageError(
                    f"{path}: row {row} is a link, {' '.join(of.split())[:200]}; only pictures "
                    "inside of tables or beside them are read"
                )
            elif of:
                where = [str(path.parent / of), 0, 0, label]
            else:
                where = [None, 0, None, "no picture"]
            with beton_write.disk_errors():
                rows.write(json.dumps([called, *where]).encode() + b"\n")
            row += 1


def _encoded(column: Any) -> tuple[Any, Any]:
    """Return the bytes of pictures and their paths, or None for a column without paths."""
    if _is_binary(column.type):
        return column, None
    from pyarrow import types

    parts = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
    paths = parts.get("path")
    is_text = paths is not None and (
        types.is_string(paths.type) or types.is_large_string(paths.type)
    )
    return parts["bytes"], paths if is_text else None


def _values(batch: Any, name: str) -> list[Any]:
    """Return labels as whole numbers of 64 bits with sign, texts, or None."""
    import pyarrow
    from pyarrow import types

    column = batch.column(name)
    column = column.cast(_plain(column.type))
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    values: list[Any] = (column if is_text else column.cast(pyarrow.int64())).to_pylist()
    return values


def _labels_of(path: Path, features: dict[str, Any] | None) -> set[Any]:
    """Return the distinct labels of another split; none if they cannot be read."""
    distinct = set[Any]()
    with suppress(UsageError), _checked(path), open_regular(path) as file:
        schema, batches = _opened(path, file)
        label = _Columns(path, schema, features).label
        if label is None:
            return distinct
        for batch in batches([label]):
            batch.validate(full=True)
            distinct |= set(_values(batch, label)) - {None}
            if len(distinct) > MAX_CLASSES:
                break
    return distinct


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """Turn whatever pyarrow raises into a UsageError."""
    try:
        yield
    except FastbyolError:
        raise
    except MemoryError:
        raise UsageError(
            f"{path}: takes more memory than there is to read; save it in smaller batches"
        ) from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UsageError(f"{path}: {_ENDED} ({reason}); get it again") from None
    except Exception as error:
        raise UsageError(f"{path}: {_ENDED} ({one_line(error)}); get it again") from None


@contextmanager
def _written(path: str) -> Iterator[BinaryIO]:
    with beton_write.disk_errors(), Path(path).open("wb") as file:
        yield file
