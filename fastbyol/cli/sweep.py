"""`fastbyol sweep`: cross keys of the configuration, train every point, and draw any measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from fastbyol.cli import fleet, image_files
from fastbyol.cli.image_files import Data, TestData
from fastbyol.cli.options import Json, Sets
from fastbyol.errors import UsageError, check_choice
from fastbyol.fleet.launch import Launch
from fastbyol.output import console as make_console
from fastbyol.output import print_json, say

if TYPE_CHECKING:
    from fastbyol.fleet.campaign import Outcome
    from fastbyol.sweeps.grid import Grid

Target = Annotated[
    Path,
    typer.Argument(metavar="GRID.toml|DIR", help="What to cross; or a sweep's folder, to show it."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the runs. Default: sweeps/GRID."),
]
Measure = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What to show of a run's end: any number of its last epoch, such as neg_cos, or "
        "collapsed, recovered, collapses, leaves, epochs_collapsed. Default: accuracy.",
    ),
]
AxisX = Annotated[
    str | None, typer.Option("--x", metavar="KEY", help="Horizontal. Default: of most values.")
]
AxisY = Annotated[str | None, typer.Option("--y", metavar="KEY", help="Vertical. Default: next.")]
Png = Annotated[
    Path | None, typer.Option("--png", metavar="DIR", help="Write the heat map there too.")
]
Seeds = Annotated[int | None, typer.Option(min=1, max=1000, help="Runs per point, over the file.")]


@fleet.with_launch_options
def sweep(
    target: Target,
    out: Out = None,
    measure: Measure = None,
    x: AxisX = None,
    y: AxisY = None,
    png: Png = None,
    seeds: Seeds = None,
    data: Data = None,
    test_data: TestData = None,
    sets: Sets = None,
    *,
    launch: Launch,
    as_json: Json = False,
) -> None:
    """Train every point of GRID.toml that is missing; show one measure over all as a heat map."""
    look, console = _Look(measure, x, y, png), make_console(err=as_json)
    look.check()
    train_or_show(
        target,
        {"--out": out, "--seeds": seeds, "--data": data, "--test-data": test_data, "--set": sets},
        Path("sweeps"),
        launch,
        console,
        read=partial(_read, target, look),
        show=partial(_show, look=look, as_json=as_json),
    )


def train_or_show(
    target: Path,
    asked: Mapping[str, Any],
    root: Path,
    launch: Launch,
    console: Console,
    *,
    read: Callable[[dict[str, Any]], Grid],
    show: Callable[[Path, Outcome | None], None],
) -> None:
    """Show the folder ``target``, or train what it asks for, below ``root`` by default.

    ``asked`` are the typed options by name. ``read`` makes the grid of seeds, sets and flags.
    """
    if target.is_dir():
        _refuse_asking(target, {**asked, "launch options": launch != Launch()})
        show(target, None)
        return
    files = image_files.named(asked["--data"], asked["--test-data"])
    flags = image_files.flags(files, launch.device)
    grid = read({"seeds": asked["--seeds"], "sets": asked["--set"] or (), "flags": flags})
    _check_images(grid)
    folder = (asked["--out"] or root / target.stem).resolve()
    outcome = _train(grid, folder, launch, console)
    show(folder, outcome)
    console.print(fleet.in_words(outcome, folder, launch), markup=False, soft_wrap=True)
    fleet.finish(outcome)


@dataclass(frozen=True)
class _Look:
    """What is shown, as typed."""

    measure: str | None
    x: str | None
    y: str | None
    png: Path | None

    def check(self, axes: Mapping[str, Sequence[object]] | None = None) -> None:
        """Raise UsageError for what could not be shown of ``axes``, before anything is trained."""
        from fastbyol.show import figures

        if self.png is not None:
            figures.demand()
        if axes is not None:
            from fastbyol.engine.step import METRICS
            from fastbyol.sweeps.heat_map import layout
            from fastbyol.sweeps.results import OF_STATES

            layout(axes, self.x, self.y)
            if self.measure is not None:
                names = ("accuracy", "rank_y", *METRICS, *OF_STATES)
                check_choice("--measure", self.measure, names)


def _refuse_asking(target: Path, options: Mapping[str, Any]) -> None:
    typed = [name for name, value in options.items() if value]
    if typed:
        raise UsageError(
            f"{', '.join(typed)}: {target} is a folder, whose sweep is shown as it is; name a "
            "GRID.toml to train more"
        )


def _read(target: Path, look: _Look, options: Mapping[str, Any]) -> Grid:
    """Read the grid, and look at what is to be shown of it."""
    from fastbyol.sweeps import grid as grids

    grid = grids.read(target, **options)
    look.check(grid.axes)
    return grid


def _check_images(grid: Grid) -> None:
    """Raise UsageError for image files that the runs of ``grid`` cannot use."""
    for config in grid.data:
        files = {"data.train": config.train, "data.test": config.test}
        image_files.check({key: name for key, name in files.items() if name}, config)


def _train(grid: Grid, folder: Path, launch: Launch, console: Console) -> Outcome:
    """Train the runs of ``grid`` that are missing in ``folder``, and tell what is asked for."""
    from fastbyol.fleet import campaign
    from fastbyol.sweeps import grid as grids

    tasks = grids.tasks(grid, folder)
    counts = f"{len(grid.points)} points of {' x '.join(grid.axes)}, {len(tasks)} runs, in {folder}"
    for line in (*grid.notes, counts):
        console.print(line, markup=False, soft_wrap=True)
    asked = {**grid.record(), "launch": asdict(launch)}
    how: dict[str, Any] = {"asked": asked, "launch": launch, "console": console}
    how["retry_failed"] = False  # in a sweep divergence is a result
    return campaign.execute(tasks, folder, grids.SCALE, **how)


def _show(folder: Path, outcome: Outcome | None, look: _Look, *, as_json: bool) -> None:
    """Print the table of the sweep in ``folder``, and write its files if a run is finished."""
    from fastbyol.show import figures
    from fastbyol.sweeps import report, results, table
    from fastbyol.sweeps.heat_map import layout

    made = results.read(folder)
    where, measure = layout(made.axes, look.x, look.y), made.chosen_measure(look.measure)
    if as_json:
        call = asdict(outcome) if outcome is not None else {}
        print_json({"out": str(folder), "measure": measure, **call, **made.as_json()})
    else:
        print_rows(table.header(made, measure), table.rows(made, measure))
    if not made.measures or measure is None:
        say(f"{folder}: no run is finished: nothing to draw yet", err=True)
        return
    for path in report.write(made, measure, where, look.png):
        say(str(path), err=as_json)
    if not figures.available():
        say("no heat map: matplotlib is not installed: pip install 'fastbyol[report]'", err=True)


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of points."""
    shown = Table(*(Column(name, overflow="fold") for name in header), box=None)
    for row in rows:
        shown.add_row(*row)
    make_console().print(shown)
