"""The command ``fork``: another future of a run, from one of its saved steps on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastbyol.cli.options import Json, Sets
from fastbyol.cli.train import finish, training_console, watch
from fastbyol.engine.worker import is_first


def fork(
    source: Annotated[
        str, typer.Argument(metavar="RUN@STEP", help="A run folder and one of its saved steps.")
    ],
    sets: Sets = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of order and views from there on: train.seed.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda[:N]")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Default: RUN.forks/STEP-CHANGES."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train another future of RUN: the same up to STEP, bit for bit, and changed from there on."""
    from fastbyol import api
    from fastbyol.engine.forking import parse
    from fastbyol.show import figures, fork_report

    run, step = parse(source)
    flags = (("train.seed", seed), ("train.device", device))
    changes = [*(sets or ()), *(f"{key}={value}" for key, value in flags if value is not None)]
    console = training_console(as_json)
    summary = watch(
        console,
        as_json,
        lambda observer: api.fork(run, step, changes, out, observer=observer),
    )
    finish(summary, console, as_json)
    folder = Path(summary.run).parent
    if figures.available() and is_first() and summary.finished and fork_report.is_of_forks(folder):
        fork_report.write(folder)
