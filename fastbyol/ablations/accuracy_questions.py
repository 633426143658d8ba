"""Questions about accuracy: whether a run learns, to what level, and which of several runs is better.

To learn is to do better than one's own untrained weights: a random network's embeddings are worth something already. Two
accuracies differ where sampling the scored images does not explain it, at 95 %.
"""

from __future__ import annotations

import math

import numpy as np

from fastbyol.ablations.course import course
from fastbyol.ablations.curves import appendix
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.questions import Finding, Question, Runs, Span, within
from fastbyol.evaluation.intervals import difference_margin

# Levels are of STL-10 at full scale. 5 pp: reading .3, sampling 1.35, and seeds, of which nobody published more than one.
LEVEL_PP = 5.0


def learns(arm: str, *, held_if: bool = True) -> Question:
    """Ask whether the last accuracy is above that of the untrained weights; with ``held_if`` False: whether it is not."""

    def ask(runs: Runs) -> Finding:
        run = runs[arm]
        first, last = untrained_accuracy(run), run.last_accuracy
        if not math.isfinite(first + last):
            return _not_measured(run)
        rose = last - first > margin(last, run, first, run)
        return Finding((rose == held_if) if run.finished else None, f"{_first(run)}, {last:.1f} % at last")

    return ask


def learns_by(arm: str, span: Span) -> Question:
    """Ask whether the accuracy is above that of the untrained weights in some epoch of ``span``."""

    def ask(runs: Runs) -> Finding:
        run = runs[arm]
        first = untrained_accuracy(run)
        if not math.isfinite(first + run.last_accuracy):
            return _not_measured(run)
        known = np.isfinite(run.accuracy)
        pairs = zip(run.epoch[known], run.accuracy[known], strict=True)
        at = next(((int(epoch), value) for epoch, value in pairs if value - first > margin(value, run, first, run)), None)
        if at is None:
            return Finding(False if span.is_over(run) else None, f"{_first(run)}, not above that {within(run)}")
        return Finding(at[0] <= span.last_epoch(run), f"{_first(run)}, {at[1]:.1f} % in {course(run).onset(at[0])}")

    return ask


def untrained_accuracy(run: Evidence) -> float:
    """Return the accuracy of the untrained weights in percent, NaN where unknown. Published: the first of several instead."""
    if run.scale != "published":
        return run.untrained_accuracy
    known = run.accuracy[np.isfinite(run.accuracy)]
    return float(known[0]) if len(known) > 1 else math.nan


def margin(a: float, run_a: Evidence, b: float, run_b: Evidence) -> float:
    """Return by how many points accuracy ``a`` may be above ``b``, both in percent, by sampling alone."""
    return 100 * difference_margin(a / 100, run_a.scored, b / 100, run_b.scored)


def _first(run: Evidence) -> str:
    return f"accuracy {untrained_accuracy(run):.1f} % {'at first' if run.scale == 'published' else 'untrained'}"


def _not_measured(run: Evidence) -> Finding:
    """Some of the post's figures show no accuracy: nobody can ask it of them. Of a run here it is wanting."""
    return Finding(None, "accuracy was not measured both before training and after", asked=run.scale != "published")


def level(arm: str, accuracy: float) -> Question:
    """Ask whether the last accuracy is within LEVEL_PP of the published one. Asked of STL-10 at full length alone."""

    def ask(runs: Runs) -> Finding:
        run = runs[arm]
        last = run.last_accuracy
        if run.scale not in ("published", "full") or not math.isfinite(last):
            return Finding(None, f"published {accuracy:g} %: a level of STL-10 at full scale", asked=False)
        close = abs(last - accuracy) <= LEVEL_PP
        return Finding(close if run.finished else None, f"accuracy {last:.1f} % at last, published {accuracy:g} %")

    return ask


def beats(better: tuple[str, ...], worse: str) -> Question:
    """Ask whether every arm of ``better`` has an accuracy above that of ``worse``, by the table's epoch."""

    def ask(runs: Runs) -> Finding:
        found = {arm: table_accuracy(runs[arm]) for arm in (*better, worse)}
        text = ", ".join(f"{arm} {value:.1f} %" for arm, value in found.items())
        if not all(np.isfinite(list(found.values()))):
            return Finding(None, f"accuracy was not measured: {text}")
        low = found[worse]
        return Finding(all(found[arm] - low > margin(found[arm], runs[arm], low, runs[worse]) for arm in better), text)

    return ask


def no_better(arms: tuple[str, ...], than: str) -> Question:
    """Ask whether no arm of ``arms`` has an accuracy above that of ``than``."""

    def ask(runs: Runs) -> Finding:
        found = [beats((arm,), than)(runs) for arm in arms]
        text = "; ".join(finding.text for finding in found)
        if any(finding.held is None for finding in found):
            return Finding(None, text)
        return Finding(not any(finding.held for finding in found), text)

    return ask


def in_order(arms: tuple[str, ...]) -> Question:
    """Ask whether accuracies fall from each arm to the next, a rise that sampling explains excepted."""

    def ask(runs: Runs) -> Finding:
        values = [table_accuracy(runs[arm]) for arm in arms]
        text = ", ".join(f"{arm} {value:.1f} %" for arm, value in zip(arms, values, strict=True))
        if not np.isfinite(values).all():
            return Finding(None, f"accuracy was not measured: {text}")
        pairs = zip(arms, values, arms[1:], values[1:], strict=False)
        return Finding(all(b - a <= margin(b, runs[other], a, runs[one]) for one, a, other, b in pairs), text)

    return ask


def table_accuracy(run: Evidence) -> float:
    """Return the accuracy in percent after the tenth epoch at full length, as the post's table; at the end of shorter runs."""
    last = 9 if run.scale in ("published", "full") else run.epochs
    known = run.accuracy[np.isfinite(run.accuracy) & (run.epoch <= last)]
    ready = run.finished or len(run.epoch) > last
    return float(known[-1]) if len(known) and ready else float("nan")


def published_accuracy(claim: str) -> float:
    """Return the accuracy in percent at the end of a published curve."""
    numbers = next(row["numbers"] for row in appendix()["claims"] if row["id"] == claim)
    return float(next(value for name, value in numbers.items() if name in ("accuracy@319", "accuracy@320")))
