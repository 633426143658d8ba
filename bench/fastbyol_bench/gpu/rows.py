"""Rows of results, one JSON line each, that are on disk as soon as they are measured."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
# The keys of every row; the others are figures.
HEAD = ("job", "part", "name", "at_s")


class Rows:
    """A file to which several processes append rows; ``failures`` counts the failed ones here."""

    def __init__(self, path: Path, job: str) -> None:
        self._path, self._job, self._began = path, job, time.monotonic()
        self.failures = 0

    def add(self, part: str, name: str, **values: Any) -> None:
        """Append a row with the figures ``values`` and print it."""
        row = dict(
            zip(
                HEAD, (self._job, part, name, round(time.monotonic() - self._began, 1)), strict=True
            )
        )
        line = json.dumps({**row, **values}, allow_nan=True) + "\n"
        # One write to a file opened for appending: the lines of two processes do not mix, and a
        # killed process leaves whole lines.
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
        self.failures += "failed" in values
        print(shown({**row, **values}), flush=True)

    @contextmanager
    def guarded(self, part: str, name: str) -> Iterator[None]:
        """Turn an exception inside into a failed row and print its trace, so that others run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            text = " ".join(str(error).split())
            self.add(part, name, failed=f"{type(error).__name__}: {text}"[:300])

    def check(self, part: str, name: str, *, holds: bool, says: str, **values: Any) -> None:
        """Append a row, which fails with the message ``says`` unless ``holds``."""
        self.add(part, name, **values, **({} if holds else {"failed": says}))


def parser() -> argparse.ArgumentParser:
    """Return a parser of the arguments that all jobs have."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path, help="the file to append rows to")
    parser.add_argument("job", help="the name under which they stand")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    return parser


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that ``Rows`` wrote, without lines that a full disk has cut."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def shown(row: Row) -> str:
    """Return a row as a line: its name, then each figure to four digits."""
    figures = "  ".join(f"{key} {_figure(value)}" for key, value in row.items() if key not in HEAD)
    return f"{row['part']:9s} {row['name']:44s} {figures}"


def table(rows: Sequence[Row]) -> str:
    """Return all rows as text, grouped by job."""
    lines = []
    for job in dict.fromkeys(row["job"] for row in rows):
        lines += ["", f"{job}:", *(f"  {shown(row)}" for row in rows if row["job"] == job)]
    return "\n".join(lines).lstrip("\n")


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
