"""The comparison of two results row by row, with a verdict on each: faster, slower or noise."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fastbyol_bench.results import Result, Timing

Verdict = Literal["faster", "slower", "noise", "too few runs", "only in A", "only in B"]
LEAST_CHANGE = 0.02  # two runs of the same code differ by less on a quiet machine
LEAST_RUNS = 3  # quartiles of fewer runs mean nothing


class Change(NamedTuple):
    """A row of both results; ``ratio`` is A's median over B's, above 1 if B is faster."""

    suite: str
    name: str
    variant: str
    a_s: float | None
    b_s: float | None
    ratio: float | None
    verdict: Verdict


def compare(a: Result, b: Result) -> list[Change]:
    """Return the changes of all measured rows: A's in their order, then those that only B has."""
    ours, others = _timed(a), _timed(b)
    return [_change(key, ours.get(key), others.get(key)) for key in dict.fromkeys((*ours, *others))]


def cautions(a: Result, b: Result) -> list[str]:
    """Return the reasons, in words, why the two results should not be compared."""
    sides = (("A", a), ("B", b))
    warnings = [
        f"{field} differs: {getattr(a.machine, field)} and {getattr(b.machine, field)}"
        for field in ("device_name", "cpu", "cores", "torch", "triton", "driver")
        if getattr(a.machine, field) != getattr(b.machine, field)
    ]
    if a.quick or b.quick:
        warnings.append("a --quick result says nothing about speed")
    warnings += [
        f"{name} began on a busy machine (load {r.load:.1f})" for name, r in sides if r.load > 1.0
    ]
    warnings += [
        f"{name} is unfinished: it was cut off after {len(r.rows)} rows"
        for name, r in sides
        if not r.finished
    ]
    return warnings


def verdict(a: Timing, b: Timing) -> Verdict:
    """Return the verdict on B against A.

    Two rows differ if their medians are further apart than both spreads together and than 2 %.
    """
    if min(a.runs, b.runs) < LEAST_RUNS:
        return "too few runs"
    apart = abs(a.median_s - b.median_s)
    if apart <= max(a.spread_s + b.spread_s, LEAST_CHANGE * a.median_s):
        return "noise"
    return "faster" if b.median_s < a.median_s else "slower"


def _timed(result: Result) -> dict[tuple[str, str, str], Timing]:
    return {
        (row.suite, row.name, row.variant): row.timing
        for row in result.rows
        if row.timing is not None
    }


def _change(key: tuple[str, str, str], a: Timing | None, b: Timing | None) -> Change:
    if a is None or b is None:
        only: Verdict = "only in B" if a is None else "only in A"
        return Change(*key, a.median_s if a else None, b.median_s if b else None, None, only)
    return Change(*key, a.median_s, b.median_s, a.median_s / b.median_s, verdict(a, b))
