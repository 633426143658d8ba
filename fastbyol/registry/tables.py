"""Many runs as a table for other programs: CSV and Parquet, a line for each run."""

from __future__ import annotations

import csv
import importlib.util
import io
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.errors import UsageError
from fastbyol.registry.row import FIELDS, Row
from fastbyol.registry.selection import known_keys
from fastbyol.runs.durable import write_output
from fastbyol.text import utf8

# A text that begins so is a formula for spreadsheets, which may run programs.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")

# Types of Python, and Arrow's name for them; all others are texts.
_ARROW = {
    frozenset(("float",)): "float64",
    frozenset(("float", "int")): "float64",
    frozenset(("int",)): "int64",
    frozenset(("bool",)): "bool",
}


def csv_text(rows: Sequence[Row]) -> str:
    """Return the runs as CSV in UTF-8, with names in the first line and lists as TOML.

    No value is an empty cell. A text that a spreadsheet would run as a formula gets an apostrophe
    before it, and what UTF-8 cannot hold becomes a visible escape.
    """
    names, out = known_keys(rows), io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(map(_cell, names))
    writer.writerows([_cell(row.value(name)) for name in names] for row in rows)
    return out.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return utf8(f"'{value}" if value.startswith(_FORMULA) else value)
    return utf8(config_io.toml_value(value))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the runs as CSV. Raises FastbyolError where the file cannot be written."""
    write_output(path, csv_text(rows).encode())


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Write the runs as Parquet: numbers, truth values, texts and lists by their settings' types.

    Raises UsageError where pyarrow is missing, FastbyolError where the file cannot be written.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError("--parquet: pyarrow is not installed: pip install 'fastbyol[hf]'")
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {}
    for name in known_keys(rows):
        kind = _kind(name)
        cells = [_as_kind(row.value(name), kind) for row in rows]
        arrays[utf8(name)] = pa.array(cells, pa.type_for_alias(kind))
    buffer = io.BytesIO()
    parquet.write_table(pa.table(arrays), buffer)
    write_output(path, buffer.getvalue())


def _kind(name: str) -> str:
    """Return Arrow's name of a column's type, the same whatever the runs: lists are TOML texts."""
    if name in FIELDS:
        kinds = set(Row.__annotations__[name].removesuffix(" | None").split())
    elif field := config_io.keys().get(name):
        kinds = set().union(*map(_kind_names, config_io.alternatives(field))) - {"NoneType"}
    else:
        kinds = {"float"}
    return _ARROW.get(frozenset(kinds), "string")


def _kind_names(kind: Any) -> set[str]:
    """Return the names of the types that one alternative of a setting's type stands for."""
    if typing.get_origin(kind) is typing.Literal:
        return {type(value).__name__ for value in typing.get_args(kind)}
    plain = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
    return {getattr(plain, "__name__", "")}


def _as_kind(value: Any, kind: str) -> Any:
    if value is None or (kind == "int64" and not -(2**63) <= value < 2**63):
        return None
    if kind == "string":
        return utf8(value if isinstance(value, str) else config_io.toml_value(value))
    return float(value) if kind == "float64" else value
