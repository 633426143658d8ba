"""Two results row by row: is one faster, or is it noise?

A row's times differ when the medians lie further apart than both spreads together and than 2 %: less than that, two runs of
the same code differ on a quiet machine. Quartiles say nothing about runs of fewer than three, which are never told apart.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fastbyol_bench.results import Result, Timing

Verdict = Literal["faster", "slower", "noise", "too few runs", "only in A", "only in B"]
LEAST_CHANGE = 0.02
LEAST_RUNS = 3


class Change(NamedTuple):
    """One row of both: ``ratio`` is A's median over B's, above 1 where B is faster."""

    suite: str
    name: str
    variant: str
    a_s: float | None
    b_s: float | None
    ratio: float | None
    verdict: Verdict


def compare(a: Result, b: Result) -> list[Change]:
    """All measured rows of either, in A's order, then what only B has."""
    ours, others = _timed(a), _timed(b)
    return [_change(key, ours.get(key), others.get(key)) for key in dict.fromkeys((*ours, *others))]


def cautions(a: Result, b: Result) -> list[str]:
    """Why the two should not be compared, in words."""
    sides = (("A", a), ("B", b))
    found = [
        f"{field} differs: {getattr(a.machine, field)} and {getattr(b.machine, field)}"
        for field in ("device_name", "cpu", "cores", "torch", "triton", "driver")
        if getattr(a.machine, field) != getattr(b.machine, field)
    ]
    if a.quick or b.quick:
        found.append("a --quick result says nothing about speed")
    found += [f"{name} began on a busy machine (load {r.load:.1f})" for name, r in sides if r.load > 1.0]
    found += [f"{name} is unfinished: it was cut off after {len(r.rows)} rows" for name, r in sides if not r.finished]
    return found


def verdict(a: Timing, b: Timing) -> Verdict:
    """Of B against A."""
    if min(a.runs, b.runs) < LEAST_RUNS:
        return "too few runs"
    apart = abs(a.median_s - b.median_s)
    if apart <= max(a.spread_s + b.spread_s, LEAST_CHANGE * a.median_s):
        return "noise"
    return "faster" if b.median_s < a.median_s else "slower"


def _timed(result: Result) -> dict[tuple[str, str, str], Timing]:
    return {(row.suite, row.name, row.variant): row.timing for row in result.rows if row.timing is not None}


def _change(key: tuple[str, str, str], a: Timing | None, b: Timing | None) -> Change:
    if a is None or b is None:
        only: Verdict = "only in B" if a is None else "only in A"
        return Change(*key, a.median_s if a else None, b.median_s if b else None, None, only)
    return Change(*key, a.median_s, b.median_s, a.median_s / b.median_s, verdict(a, b))
