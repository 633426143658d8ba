"""Embeddings on disk: NumPy's .npz, and Parquet.

Both are written batch by batch, and hold the numbers of the images, their labels and the names of
the classes if there are any, and an account of where all that comes from.
"""

from __future__ import annotations

import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.beton_write import followed, publish, remove_leftovers, temporary
from fastbyol.errors import UsageError
from fastbyol.runs.durable import writing
from fastbyol.text import utf8

METADATA = "fastbyol"
# numpy has the time of writing in its files; here equal content is equal bytes.
_DATE = (1980, 1, 1, 0, 0, 0)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Table:
    """What a file holds beside the rows of ``column``, which are float32 (N, ``dim``).

    ``ids`` (N,) int64 number the images in their file; ``labels`` (N,) int64, of which negative
    ones are none, or None; ``about`` is JSON.
    """

    column: str
    dim: int
    ids: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    about: Mapping[str, Any]


def check_name(path: Path) -> None:
    """Raise UsageError for a name that says no format, and where pyarrow is missing for one."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: name a file that ends in {' or '.join(FORMATS)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"{path}: pyarrow is not installed: pip install 'fastbyol[hf]'")


def write(path: Path, table: Table, rows: Iterable[Floats], *, overwrite: bool) -> None:
    """Write ``rows``, batches of (B, D) in the order of ``table.ids``, in the format of the name.

    ``path`` holds nothing, or what it held, until all is there. Raises FastbyolError if the disk
    fails, and UsageError for a file that appeared meanwhile.
    """
    put(path, lambda file: FORMATS[path.suffix](file, table, rows), overwrite=overwrite)


def put(path: Path, fill: Callable[[BinaryIO], object], *, overwrite: bool) -> None:
    """Let ``fill`` write a file, force it to disk, and only then give it the name ``path``."""
    target = followed(path)
    remove_leftovers(target)
    unfinished = temporary(target)
    try:
        with writing(path), unfinished.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        publish(unfinished, target, overwrite=overwrite)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_npz(file: BinaryIO, table: Table, rows: Iterable[Floats]) -> None:
    others: dict[str, NDArray[Any]] = {"ids": table.ids.astype("<i8")}
    if table.labels is not None:
        others["labels"] = table.labels.astype("<i8")
    if table.class_names:
        others["class_names"] = np.array([utf8(name) for name in table.class_names])
    others["about"] = np.array(json.dumps(table.about))
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(_member(table.column), "w", force_zip64=True) as member:
            shape = (len(table.ids), table.dim)
            head = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, head)
            for batch in rows:
                member.write(np.ascontiguousarray(batch, "<f4").data)
        for name, array in others.items():
            with archive.open(_member(name), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy", _DATE)


def _write_parquet(file: BinaryIO, table: Table, rows: Iterable[Floats]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    names = [utf8(name) for name in table.class_names]
    fields = [pa.field("id", pa.int64(), nullable=False)]
    if table.labels is not None:
        fields.append(pa.field("label", pa.int64()))
        if names:
            fields.append(pa.field("class_name", pa.string()))
    # Rows of one length, which pandas, polars and datasets read as vectors.
    fields.append(pa.field(table.column, pa.list_(pa.float32(), table.dim), nullable=False))
    schema = pa.schema(fields, {METADATA: json.dumps(table.about)})
    at = 0
    with parquet.ParquetWriter(file, schema, use_dictionary=["class_name"]) as writer:
        for batch in rows:
            part = slice(at, at := at + len(batch))
            columns = {"id": pa.array(table.ids[part])}
            if table.labels is not None:
                labels = [int(label) if label >= 0 else None for label in table.labels[part]]
                columns["label"] = pa.array(labels, pa.int64())
                columns["class_name"] = pa.array(
                    [_name(names, label) for label in labels], pa.string()
                )
            values = pa.array(np.ascontiguousarray(batch, np.float32).ravel())
            columns[table.column] = pa.FixedSizeListArray.from_arrays(values, table.dim)
            arrays = [columns[field.name] for field in fields]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _name(names: list[str], label: int | None) -> str | None:
    return names[label] if label is not None and label < len(names) else None


FORMATS: Mapping[str, Callable[[BinaryIO, Table, Iterable[Floats]], None]] = {
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
