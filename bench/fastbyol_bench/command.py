"""The command ``fastbyol bench``: run suites, print, store and compare results."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastbyol.engine.device import pick_device
from fastbyol.errors import UsageError
from fastbyol_bench import compare as comparison
from fastbyol_bench import results, table, waterfall
from fastbyol_bench.results import Result, Row
from fastbyol_bench.suite import Setting, threads

SUITES = ("kernels", "views", "loader", "optimizer", "step", "train")
NO_PICTURE = (
    "no picture of where a step's time goes: that needs matplotlib (pip install 'fastbyol[report]')"
)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Return the suites ``names`` in their own order, all of them for no name or ``all``.

    Raises UsageError for an unknown name.
    """
    for name in names:
        if name not in (*SUITES, "all"):
            raise UsageError(f"bench: no suite {name!r}: take some of {', '.join(SUITES)}, or all")
    return (
        SUITES if not names or "all" in names else tuple(name for name in SUITES if name in names)
    )


def run(
    names: Sequence[str],
    *,
    device: str,
    quick: bool,
    note: Callable[[str], None],
    keep: Callable[[Result], object] = lambda _: None,
) -> Result:
    """Measure the suites ``names`` on ``device`` (auto, cpu, cuda[:N]).

    Calls ``keep`` after every row with the result so far.
    """
    suites, began, load = chosen(names), time.perf_counter(), os.getloadavg()[0]
    setting = Setting(pick_device(device), quick, note)
    machine, environment = results.machine(setting.device.type)
    commit = results.commit()
    if load > 1.0:
        note(
            f"this machine is busy (load {load:.1f}): ratios are measured side by side and hold "
            "roughly, times do not"
        )
    rows: list[Row] = []

    def measured(finished: bool) -> Result:
        return Result(
            schema="fastbyol-bench/1",
            suites=suites,
            quick=quick,
            machine=machine,
            commit=commit,
            date=environment["started"],
            command=("fastbyol", *sys.argv[1:]),
            finished=finished,
            seconds=time.perf_counter() - began,
            load=load,
            ceilings=tuple(setting.ceilings.values()),
            rows=tuple(rows),
            waterfall=setting.waterfall,
        )

    for name in suites:
        # FFCV sets torch to one thread when it is imported. No such setting may reach the next
        # suite.
        with threads(torch.get_num_threads()):
            for row in importlib.import_module(f"fastbyol_bench.{name}").rows(setting):
                rows.append(row)
                keep(measured(finished=False))
    return measured(finished=True)


def file_of(out: Path, suites: tuple[str, ...], device: str) -> Path:
    """Return the file that ``--out`` names, or the result's file in the folder that it names."""
    return out if out.suffix == ".json" else out / f"{device}-{'-'.join(_short(suites))}.json"


def keep(result: Result, out: Path) -> Path:
    """Write ``result`` atomically to the file or folder ``out`` and return the file's path."""
    path = file_of(out, result.suites, result.machine.device)
    with _writing(path):
        results.write(result, path)
    return path


def picture(result: Result, path: Path) -> Path | None:
    """Draw the waterfall of ``result`` beside its file ``path`` and return the picture's path.

    Returns None if the result has no waterfall or matplotlib is not installed.
    """
    if not result.waterfall or not waterfall.available():
        return None
    drawn = path.with_suffix(".png")
    with _writing(drawn):
        waterfall.draw(
            result.waterfall,
            f"one step on {result.machine.device_name}, torch {result.machine.torch}",
            drawn,
        )
    return drawn


def refuse_unwritable(out: Path) -> None:
    """Raise UsageError if ``keep`` could not write to ``out``, before minutes of measuring."""
    folder = out.parent if out.suffix == ".json" else out
    with _writing(out):
        if out.suffix == ".json" and out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}: name a file or folder that can be written"
        ) from None


def _short(suites: tuple[str, ...]) -> tuple[str, ...]:
    return ("all",) if suites == SUITES else suites


def main(
    names: Sequence[str],
    *,
    out: Path | None,
    compare: tuple[Path, Path] | None,
    device: str,
    quick: bool,
    as_json: bool,
    note: Callable[[str], None],
) -> str:
    """Run the command and return its standard output; ``note`` receives all other messages."""
    if compare is not None:
        if names:
            raise UsageError("bench: --compare measures nothing: leave the suites out")
        return compared(*compare, as_json=as_json, note=note)
    if out is not None:
        chosen(names)
        refuse_unwritable(out)
    kept: Path | None = None

    def keep_it(result: Result) -> None:
        nonlocal kept
        kept = None if out is None else keep(result, out)

    try:
        result = run(names, device=device, quick=quick, note=note, keep=keep_it)
    except KeyboardInterrupt:
        note(
            f"interrupted: {kept} holds every finished row"
            if kept
            else "interrupted: no row was kept"
        )
        raise
    if out is not None:
        path = keep(result, out)
        for written in filter(None, (path, picture(result, path))):
            note(f"wrote {written}")
    if out is not None and result.waterfall and not waterfall.available():
        note(NO_PICTURE)
    return results.dumps(result).rstrip() if as_json else table.text(result)


def compared(a: Path, b: Path, *, as_json: bool, note: Callable[[str], None]) -> str:
    """Return the table, or the JSON, of ``--compare A B``."""
    first, second = results.read(a), results.read(b)
    for caution in comparison.cautions(first, second):
        note(caution)
    changes = comparison.compare(first, second)
    if as_json:
        rows: list[dict[str, Any]] = [change._asdict() for change in changes]
        return json.dumps({"a": str(a), "b": str(b), "changes": rows}, indent=2)
    return "\n".join(table.aligned(table.cells_of(changes)))
