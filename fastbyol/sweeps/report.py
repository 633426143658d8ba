"""The files that a sweep leaves beside its runs: ``sweep.csv``, ``sweep.html``; and its picture."""

from __future__ import annotations

from pathlib import Path

from fastbyol.runs.durable import write_text, writing
from fastbyol.show import figures
from fastbyol.sweeps import heat_map, table
from fastbyol.sweeps.heat_map import Layout
from fastbyol.sweeps.results import Sweep

CSV, HTML = "sweep.csv", "sweep.html"


def write(sweep: Sweep, measure: str, where: Layout, png: Path | None = None) -> list[Path]:
    """Write all runs as CSV, and where matplotlib is the page and, into ``png``, the picture.

    Return the paths. Raises FastbyolError where one cannot be written.
    """
    paths = [sweep.out / CSV]
    with writing(paths[0]):
        write_text(paths[0], table.as_csv(sweep))
    if figures.available():
        paths.append(sweep.out / HTML)
        with writing(paths[1]):
            write_text(paths[1], page(sweep, measure, where))
    if png is not None:
        paths.append(heat_map.write(sweep, measure, where, png))
    return paths


def page(sweep: Sweep, measure: str, where: Layout) -> str:
    """Return the page: the heat map of ``measure``, the table, and what became of the runs."""
    with figures.settings():
        picture = figures.svg(heat_map.draw(sweep, measure, where))
    return figures.page(
        "sweep.html.j2", "fastbyol.sweeps", title=f"Sweep {sweep.out.name}", measure=measure,
        axes=list(sweep.axes), picture=picture, num_points=len(sweep.points),
        num_runs=len(sweep.runs), num_done=sum(run.is_done for run in sweep.runs),
        header=table.header(sweep, measure), rows=table.rows(sweep, measure),
        notes=[f"{run.point} seed {run.seed}: {run.note}" for run in sweep.runs if run.note],
    )  # fmt: skip
