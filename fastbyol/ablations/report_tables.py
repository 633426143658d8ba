"""The rows of the tables in the ablations' report, and the accuracies of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fastbyol.ablations.claims import TABLE_COSINES, TABLE_ROWS, Claim
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.phases import phases_of, rate_peak
from fastbyol.ablations.questions import table_accuracy, untrained_accuracy
from fastbyol.ablations.suite import Suite
from fastbyol.config import Resolved
from fastbyol.evaluation.intervals import accuracy_interval
from fastbyol.runs import differences

NOTHING = "-"
SIGNALS = ("neg_cos", "pos_cos", "std_z", "rank_y", "dead_y", "grad_norm")
# Keys that differ between the seeds of an arm, or that say how and where a run was made.
NOT_COMPARED = {"train.seed", "train.device"} | {
    f"data.{key}" for key in ("workers", "cache", "train", "test")
}

Row = tuple[object, ...]


def number_rows(claim: Claim, suite: Suite) -> list[Row]:
    """Return a row per arm and control of ``claim``: accuracy and cosines, the post's and ours."""
    numbers, rows = claim.numbers, list[Row]()
    for arm in (*claim.arms, *claim.controls):
        ours = [run for run in suite.evidence(arm) if run.finished]
        accuracy = numbers[TABLE_ROWS[arm]] if arm in TABLE_ROWS else np.nan
        pos_cos, neg_cos = numbers[TABLE_COSINES[arm]] if arm in TABLE_COSINES else (np.nan, np.nan)
        cells = (
            _over_seeds([accuracy], 1),
            _over_seeds([table_accuracy(run) for run in ours], 1),
            _over_seeds([pos_cos], 4),
            _over_seeds([run.pos_cos[-1] for run in ours], 4),
            _over_seeds([neg_cos], 4),
            _over_seeds([run.neg_cos[-1] for run in ours], 4),
        )
        rows.append((arm, len(ours), *cells))
    return rows


def _over_seeds(values: Sequence[float], digits: int) -> str:
    """Return median and range of the values that were measured."""
    measured = [value for value in values if np.isfinite(value)]
    if not measured:
        return NOTHING
    span = f" ({min(measured):.{digits}f} to {max(measured):.{digits}f})"
    return f"{np.median(measured):.{digits}f}{span if len(measured) > 1 else ''}"


def run_rows(suite: Suite) -> list[Row]:
    """Return a row per run: its phases, losses, accuracies, peak rate and early gradient."""
    return [(run.evidence.arm, *_run_cells(run.evidence)) for run in suite.records]


def _run_cells(run: Evidence) -> Row:
    phases = phases_of(run)
    peak, norms = rate_peak(run, "encoder.layer1"), run.early_gradient_by_epoch()
    share = run.ceiling_share("encoder.layer1")[run.epoch == peak.epoch] if peak else np.empty(0)
    low = int(np.nanargmin(norms)) if np.isfinite(norms).any() else None
    return (
        run.seed,
        len(run.epoch) if run.finished else f"{len(run.epoch)} of {run.epochs}",
        phases.end,
        NOTHING if phases.collapse is None else phases.collapse,
        NOTHING if phases.leaving is None else phases.leaving,
        ", ".join(map(str, phases.separations)) or NOTHING,
        _number(np.nanmin(run.loss)),
        _number(run.loss[-1]),
        f"{run.neg_cos[-1]:.4f}",
        *map(_accuracy, accuracies(run).values()),
        f"{peak.rate:.3g} ({peak.rise:.3g} times the first) in {peak.epoch}" if peak else NOTHING,
        _number(100 * share[0], " %") if len(share) else NOTHING,
        f"{norms[low]:.2g} in {int(run.epoch[low])}" if low is not None else NOTHING,
    )


def accuracies(run: Evidence) -> dict[str, dict[str, float] | None]:
    """Return a run's accuracies in percent, with 95 % intervals. The best has its epoch.

    One that was not measured is None.
    """
    best = None
    if np.isfinite(run.accuracy).any():
        top = int(np.nanargmax(run.accuracy))
        best = (_with_interval(run.accuracy[top], run) or {}) | {"epoch": int(run.epoch[top])}
    return {
        "untrained": _with_interval(untrained_accuracy(run), run),
        "best": best,
        "last": _with_interval(run.last_accuracy, run),
    }


def _with_interval(accuracy: float, run: Evidence) -> dict[str, float] | None:
    if not np.isfinite(accuracy):
        return None
    low, high = accuracy_interval(float(accuracy), run.scored)
    return {"accuracy": round(float(accuracy), 3), "low": round(low, 2), "high": round(high, 2)}


def _accuracy(measured: Mapping[str, float] | None) -> str:
    if measured is None:
        return NOTHING
    epoch = f" in {measured['epoch']}" if "epoch" in measured else ""
    return f"{measured['accuracy']:.1f} ({measured['low']:.1f} to {measured['high']:.1f}){epoch}"


def _number(value: float, unit: str = "") -> str:
    return f"{value:.3g}{unit}" if np.isfinite(value) else NOTHING


def timeline(suite: Suite) -> list[tuple[str, int, int, list[tuple[int, int, str]]]]:
    """Return arm, seed, epochs, and (first epoch, last epoch, state) of each stretch in a state."""
    rows = []
    for run in suite.records:
        states = enumerate(event["state"] for event in run.events if event["event"] == "epoch")
        parts = (list(part) for _, part in groupby(states, key=lambda pair: pair[1]))
        stretches = [(part[0][0], part[-1][0], part[0][1]) for part in parts]
        rows.append((run.evidence.arm, run.evidence.seed, run.evidence.epochs, stretches))
    return rows


def event_rows(suite: Suite) -> list[Row]:
    """Return a row per change of state, with the ``SIGNALS`` that brought it."""
    rows = list[Row]()
    for run in suite.records:
        for event in (event for event in run.events if event["event"] == "state"):
            change, values = f"{event['before']} → {event['after']}", map(event.get, SIGNALS)
            signals = (NOTHING if value is None else f"{value:.4g}" for value in values)
            rows.append((run.evidence.arm, run.evidence.seed, event["step"], change, *signals))
    return rows


def configurations(suite: Suite) -> dict[str, Any]:
    """Return the presets, the changes that all arms share, and the other changes by arm.

    A change is (key, preset's value, arm's value).
    """
    first = {arm: runs[0].config for arm, runs in suite.runs.items()}
    changes = {arm: _against_preset(config) for arm, config in first.items()}
    shared = set.intersection(*map(set, changes.values()))
    return {
        "presets": sorted({config.preset for config in first.values()}),
        "shared": sorted(shared),
        "own": {arm: [row for row in rows if row not in shared] for arm, rows in changes.items()},
    }


def _against_preset(config: Resolved) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (row.key, differences.text(row.a), _value(row.key, row.b))
        for row in differences.against_preset(config)
        if row.key not in NOT_COMPARED
    )


def _value(key: str, value: object) -> str:
    # Of a run's path only arm and seed matter, wherever the folder of runs is.
    is_run = key == "optim.replay_rates"
    return "/".join(Path(str(value)).parts[-2:]) if is_run else differences.text(value)


def environment(suite: Suite) -> dict[str, Counter[str]]:
    """Return by name how many runs have each value of their environment."""
    counts: dict[str, Counter[str]] = {}
    for run in suite.records:
        for name, value in run.env.items():
            if name not in ("config", "command", "started"):
                counts.setdefault(name, Counter())[_plain(value)] += 1
    return counts


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
