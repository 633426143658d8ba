"""What a folder's sweep has brought: every run's final measures, gathered by point.

A measure is a number of the last ``epoch`` event of a finished run, or one that follows from its
states: ``SHARES``, 0 or 1 for a run and a share for a point, and ``epochs_collapsed``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastbyol.config import IN_COLLAPSE
from fastbyol.errors import FastbyolError, UsageError, check_choice, quoted
from fastbyol.evaluation.intervals import wilson
from fastbyol.fleet import ledger
from fastbyol.fleet.ledger import CALLS, LEDGER, RUNS
from fastbyol.fleet.survey import Surveyor
from fastbyol.runs.metrics import METRICS_FILE, is_finished, read_events
from fastbyol.sweeps.grid import SCALE, Values

# Shares of a point's runs that end collapsed; that were ever collapsed and do not end so; that
# were ever collapsed; and of these alone, those that do not end so.
SHARES = ("collapsed", "recovered", "collapses", "leaves")
# And how many epochs ended collapsed.
OF_STATES = (*SHARES, "epochs_collapsed")
_NO_MEASURES = ("event", "step", "epoch")
# What is shown where nothing else is asked for, the first that was measured.
USUAL = ("accuracy", "neg_cos")


@dataclass(frozen=True)
class Result:
    """One run: its status as ``fleet.survey`` has it, and of a finished one its end.

    ``note`` says what is odd about it, or is empty.
    """

    point: str
    seed: int
    values: Values
    path: Path
    status: str
    note: str = ""
    state: str | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether all of its epochs are there."""
        return self.state is not None


@dataclass(frozen=True)
class Summary:
    """A measure over the finished seeds of a point that have it."""

    mean: float
    least: float
    most: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of a share (``evaluation.intervals.wilson``)."""
        return wilson(self.mean * self.count, self.count)


@dataclass(frozen=True)
class PointResult:
    """One combination of values, and what became of its runs."""

    name: str
    values: Values
    runs: tuple[Result, ...]

    @property
    def done(self) -> tuple[Result, ...]:
        """The finished runs, which alone count."""
        return tuple(run for run in self.runs if run.is_done)

    @property
    def states(self) -> Mapping[str, int]:
        """How many finished runs end in each state, the most frequent first."""
        return dict(Counter(str(run.state) for run in self.done).most_common())

    @property
    def left(self) -> Mapping[str, int]:
        """How many of the other runs are in each status."""
        return dict(Counter(run.status for run in self.runs if not run.is_done).most_common())

    def summary(self, measure: str) -> Summary | None:
        """Return mean, least and most of ``measure``; None where no finished run has it."""
        values = [run.measures[measure] for run in self.done if measure in run.measures]
        if not values:
            return None
        return Summary(math.fsum(values) / len(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Sweep:
    """All points that were ever asked for in ``out``, in the order of the grid.

    ``axes`` are the values by dotted key: those of the last call, and what earlier calls had more.
    """

    out: Path
    axes: Mapping[str, tuple[object, ...]]
    points: tuple[PointResult, ...]

    @property
    def runs(self) -> tuple[Result, ...]:
        """All runs, by point and seed."""
        return tuple(run for point in self.points for run in point.runs)

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that any finished run has, those that follow from states first."""
        return tuple(dict.fromkeys(name for run in self.runs for name in run.measures))

    def chosen_measure(self, name: str | None) -> str | None:
        """Return the measure to show: ``name``, else accuracy, else neg_cos; None where none is.

        Raises UsageError, with the nearest name, if no finished run has ``name``.
        """
        if not self.measures:
            return name
        if name is not None:
            check_choice("--measure", name, self.measures)
            return name
        return next((usual for usual in USUAL if usual in self.measures), self.measures[0])

    def as_json(self) -> dict[str, Any]:
        """Return axes, points and runs as JSON values."""
        points = []
        for point in self.points:
            summaries = {name: point.summary(name) for name in self.measures}
            measures = {name: asdict(summary) for name, summary in summaries.items() if summary}
            points.append(
                {
                    "point": point.name, "values": point.values, "seeds": len(point.runs),
                    "done": len(point.done), "states": point.states, "left": point.left,
                    "measures": measures,
                }
            )  # fmt: skip
        runs = [
            {
                "point": run.point, "seed": run.seed, "status": run.status, "state": run.state,
                "note": run.note, "path": str(run.path), "measures": run.measures,
            }
            for run in self.runs
        ]  # fmt: skip
        return {"axes": self.axes, "points": points, "runs": runs}


def read(out: Path) -> Sweep:
    """Read the sweep in the folder ``out``.

    Raises UsageError: none is there, or its ledger is damaged. A damaged run is one without an end.
    """
    if not (out / CALLS).is_dir():
        raise UsageError(
            f"{out}: no sweep here (no {CALLS}); make one with `fastbyol sweep GRID.toml --out "
            f"{quoted(out)}`"
        )
    content = ledger.read(out)
    if content["scale"] != SCALE:
        raise UsageError(
            f"{out}: holds no sweep, but ablations: see `fastbyol ablate report --out "
            f"{quoted(out)}`"
        )
    try:
        axes = _axes([call["axes"] for call in content["calls"]])
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{out / CALLS}: damaged: a call without its axes: move it away") from None
    now = {row.run: row for row in Surveyor(out).look().rows}
    by_point: dict[str, list[Result]] = {}
    for key, row in content["runs"].items():
        if not isinstance(row.get("point"), dict):
            raise UsageError(f"{out / LEDGER / key}.json: damaged: no point of a sweep: remove it")
        seen = now.get(f"{row['arm']} seed {row['seed']}")
        status, note = (seen.status, seen.note) if seen else ("damaged", "")
        run = _result(out / RUNS / key, row, status, note)
        by_point.setdefault(run.point, []).append(run)
    points = (
        PointResult(name, runs[0].values, tuple(sorted(runs, key=lambda run: run.seed)))
        for name, runs in by_point.items()
    )
    return Sweep(out, axes, tuple(sorted(points, key=_order(axes))))


def _axes(calls: Sequence[Mapping[str, Sequence[object]]]) -> dict[str, tuple[object, ...]]:
    """Return all values of each axis: the last call's in their order, then those of earlier calls.

    Numbers are sorted if earlier calls have more of them.
    """
    axes = {}
    for key, last in calls[-1].items():
        values: list[Any] = list(map(frozen, last))
        more = (frozen(value) for call in reversed(calls) for value in call.get(key, ()))
        whole = tuple(dict.fromkeys((*values, *more)))
        if len(whole) > len(values) and all(type(value) in (int, float) for value in whole):
            whole = tuple(sorted(whole))
        axes[key] = whole
    return axes


def frozen(value: Any) -> Any:
    """Return a JSON value with tuples for lists, as configurations have them."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def _order(axes: Mapping[str, Sequence[object]]) -> Any:
    places = {key: {value: index for index, value in enumerate(axes[key])} for key in axes}

    def order(point: PointResult) -> tuple[int, ...]:
        return tuple(places[key].get(point.values[key], len(axes[key])) for key in axes)

    return order


def _result(path: Path, row: Mapping[str, Any], status: str, note: str) -> Result:
    values = {key: frozen(value) for key, value in row["point"].items()}
    run = Result(str(row["arm"]), int(row["seed"]), values, path, status, note)
    try:
        events = read_events(path) if (path / METRICS_FILE).exists() else []
    except FastbyolError as error:
        if status == "failed":  # which says why already
            return run
        return replace(run, status="damaged", note=str(error))
    epochs = [event for event in events if event["event"] == "epoch"]
    if not is_finished(events, row["epochs"]):
        if status != "done":
            return run
        return replace(run, status="lost", note="done by the ledger, and its folder is not whole")
    return replace(run, status="done", state=str(epochs[-1]["state"]), measures=measures_of(events))


def measures_of(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the measures of a finished run from the events of its ``metrics.jsonl``.

    What was not measured, or was not finite, is left out.
    """
    epochs, states = [], []
    for event in events:
        if event["event"] == "epoch":
            epochs.append(event)
            states.append(event["state"])
        elif event["event"] == "state":
            states.append(event.get("after"))
    ends_so = epochs[-1]["state"] in IN_COLLAPSE
    was_so = any(state in IN_COLLAPSE for state in states)
    return {
        "collapsed": float(ends_so),
        "recovered": float(was_so and not ends_so),
        "collapses": float(was_so),
        **({"leaves": float(not ends_so)} if was_so else {}),
        "epochs_collapsed": float(sum(event["state"] in IN_COLLAPSE for event in epochs)),
        **{
            name: float(value)
            for name, value in epochs[-1].items()
            if name not in _NO_MEASURES and isinstance(value, int | float)
        },
    }
