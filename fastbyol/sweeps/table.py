"""The table of a sweep: a row a point, the same on a terminal and in a page; and a CSV of runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

from fastbyol.sweeps.names import labels, text
from fastbyol.sweeps.results import SHARES, PointResult, Summary, Sweep


def number(value: float, measure: str) -> str:
    """Return a value of ``measure`` in the digits that it is read with."""
    if measure == "accuracy":
        return f"{value:.1f}"
    return f"{value:.2f}" if measure in SHARES else f"{value:.4g}"


def span(summary: Summary, measure: str) -> str:
    """Return how far seeds lie apart, or between what a share lies with a probability of 95 %."""
    if measure not in SHARES:
        return f"{number(summary.least, measure)} to {number(summary.most, measure)}"
    return " to ".join(number(end, measure) for end in summary.interval)


def name_of_span(measure: str) -> str:
    """Return the name of ``span``."""
    return "95 % interval" if measure in SHARES else "least to most"


def header(sweep: Sweep, measure: str | None) -> list[str]:
    """Return the names of the columns."""
    name = measure or "measure"
    return [*labels(sweep.axes).values(), "seeds", "ends", name, name_of_span(name), ""]


def rows(sweep: Sweep, measure: str | None) -> list[list[str]]:
    """Return a row a point: values, finished seeds, final states, mean and span of ``measure``."""
    return [_row(point, sweep, measure) for point in sweep.points]


def _row(point: PointResult, sweep: Sweep, measure: str | None) -> list[str]:
    summary = point.summary(measure) if measure else None
    mean = apart = ""
    if measure and summary:
        mean = number(summary.mean, measure)
        if summary.count > 1 or measure in SHARES:
            apart = span(summary, measure)
    return [
        *(text(point.values[key]) for key in sweep.axes),
        seeds(point),
        counts(point.states) if len(point.states) > 1 else "".join(point.states),
        mean,
        apart,
        counts(point.left),
    ]


def seeds(point: PointResult) -> str:
    """Return how many of a point's runs are done: ``3``, or ``2 of 3``."""
    done, asked = len(point.done), len(point.runs)
    return str(done) if done == asked else f"{done} of {asked}"


def counts(counts: Mapping[str, int]) -> str:
    """Return numbers with their names: ``2 new, 1 failed``."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def as_csv(sweep: Sweep) -> str:
    """Return all runs with all measures, a row a run. What was not measured is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*sweep.axes, "seed", "status", "state", *sweep.measures, "folder"])
    for run in sweep.runs:
        values = [text(run.values[key]) for key in sweep.axes]
        measures = [run.measures.get(name, "") for name in sweep.measures]
        folder = run.path.relative_to(sweep.out)
        writer.writerow([*values, run.seed, run.status, run.state or "", *measures, folder])
    return file.getvalue()
