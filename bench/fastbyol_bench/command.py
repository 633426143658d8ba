"""``fastbyol bench``: run suites, print, keep, compare."""

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
NO_PICTURE = "no picture of where a step's time goes: that needs matplotlib (pip install 'fastbyol[report]')"


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The suites of that name in their own order; none and ``all`` are all. ``UsageError``: there is none of that name."""
    for name in names:
        if name not in (*SUITES, "all"):
            raise UsageError(f"bench: no suite {name!r}: take some of {', '.join(SUITES)}, or all")
    return SUITES if not names or "all" in names else tuple(name for name in SUITES if name in names)


def run(
    names: Sequence[str],
    *,
    device: str,
    quick: bool,
    note: Callable[[str], None],
    keep: Callable[[Result], object] = lambda _: None,
) -> Result:
    """Measure the suites ``names`` on ``device`` (auto, cpu, cuda[:N]). ``keep`` is given what is known after every row."""
    suites, began, load = chosen(names), time.perf_counter(), os.getloadavg()[0]
    setting = Setting(pick_device(device), quick, note)
    machine, environment = results.machine(setting.device.type)
    commit = results.commit()
    if load > 1.0:
        note(f"this machine is busy (load {load:.1f}): ratios are measured side by side and hold roughly, times do not")
    rows: list[Row] = []

    def known(finished: bool) -> Result:
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
        # FFCV sets torch to one thread when it is imported, and whatever a suite sets must not reach the next.
        with threads(torch.get_num_threads()):
            for row in importlib.import_module(f"fastbyol_bench.{name}").rows(setting):
                rows.append(row)
                keep(known(finished=False))
    return known(finished=True)


def file_of(out: Path, suites: tuple[str, ...], device: str) -> Path:
    """Return the file that ``--out`` means: itself, or in the folder that it names one for ``suites`` on ``device``."""
    return out if out.suffix == ".json" else out / f"{device}-{'-'.join(_short(suites))}.json"


def keep(result: Result, out: Path) -> Path:
    """Write ``result`` to the file or into the folder ``out``, whole or not at all. Returns where."""
    path = file_of(out, result.suites, result.machine.device)
    with _writing(path):
        results.write(result, path)
    return path


def picture(result: Result, path: Path) -> Path | None:
    """Draw the waterfall of ``result``, if it has one and matplotlib is there, beside its file ``path``. Returns where."""
    if not result.waterfall or not waterfall.available():
        return None
    drawn = path.with_suffix(".png")
    with _writing(drawn):
        waterfall.draw(result.waterfall, f"one step on {result.machine.device_name}, torch {result.machine.torch}", drawn)
    return drawn


def refuse_unwritable(out: Path) -> None:
    """``UsageError`` where ``keep`` could not write to ``out``: before minutes of measuring, not after them."""
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
        raise UsageError(f"{path}: {error.strerror}: name a file or folder that can be written") from None


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
    """What the command prints on standard output; ``note`` takes the rest."""
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
        note(f"interrupted: {kept} holds every finished row" if kept else "interrupted: no row was kept")
        raise
    if out is not None:
        path = keep(result, out)
        for written in filter(None, (path, picture(result, path))):
            note(f"wrote {written}")
    if out is not None and result.waterfall and not waterfall.available():
        note(NO_PICTURE)
    return results.dumps(result).rstrip() if as_json else table.text(result)


def compared(a: Path, b: Path, *, as_json: bool, note: Callable[[str], None]) -> str:
    """The table of ``--compare A B``."""
    first, second = results.read(a), results.read(b)
    for caution in comparison.cautions(first, second):
        note(caution)
    changes = comparison.compare(first, second)
    if as_json:
        found: list[dict[str, Any]] = [change._asdict() for change in changes]
        return json.dumps({"a": str(a), "b": str(b), "changes": found}, indent=2)
    return "\n".join(table.aligned(table.cells_of(changes)))
