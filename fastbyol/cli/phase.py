"""`fastbyol ablate phase`: two keys crossed, which runs collapse and leave, and the marker."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastbyol.cli import fleet, sweep
from fastbyol.cli.image_files import Data, TestData
from fastbyol.cli.options import Json, Sets
from fastbyol.cli.sweep import Png, Seeds
from fastbyol.fleet.launch import Launch
from fastbyol.output import console as make_console
from fastbyol.output import print_json, say

if TYPE_CHECKING:
    from fastbyol.fleet.campaign import Outcome

Target = Annotated[
    str,
    typer.Argument(
        metavar="NAME|GRID.toml|DIR",
        help="lr-crop, lr-data, lr-width or lr-decay; two keys to cross; or a folder, to show it.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the runs. Default: phases/NAME."),
]


@fleet.with_launch_options
def phase(
    target: Target,
    out: Out = None,
    png: Png = None,
    seeds: Seeds = None,
    data: Data = None,
    test_data: TestData = None,
    sets: Sets = None,
    *,
    launch: Launch,
    as_json: Json = False,
) -> None:
    """Draw which settings collapse and which leave the collapse; train what is missing."""
    from fastbyol.show import figures
    from fastbyol.sweeps import phase as phases

    console = make_console(err=as_json)
    if png is not None:
        figures.demand()
    sweep.train_or_show(
        Path(target),
        {"--out": out, "--seeds": seeds, "--data": data, "--test-data": test_data, "--set": sets},
        Path("phases"),
        launch,
        console,
        read=lambda options: phases.read(target, **options),
        show=partial(_show, png=png, as_json=as_json),
    )


def _show(folder: Path, outcome: Outcome | None, *, png: Path | None, as_json: bool) -> None:
    """Print the table of the diagram in ``folder``, and write its files if a run is finished."""
    from fastbyol.show import figures
    from fastbyol.sweeps import markers, results
    from fastbyol.sweeps import phase as phases

    made = results.read(folder)
    phases.layout(made)
    is_begun = any(run.is_done for run in made.runs)
    measured = markers.of(made) if is_begun else {}
    if as_json:
        call = asdict(outcome) if outcome is not None else {}
        print_json(
            {"out": str(folder), **call, **made.as_json(), "markers": markers.as_rows(measured)}
        )
    else:
        sweep.print_rows(phases.header(made), phases.rows(made))
    if not is_begun:
        say(f"{folder}: no run is finished: nothing to draw yet", err=True)
        return
    for path in phases.write(made, markers.under(measured), png):
        say(str(path), err=as_json)
    if not figures.available():
        say("no picture: matplotlib is not installed: pip install 'fastbyol[report]'", err=True)
