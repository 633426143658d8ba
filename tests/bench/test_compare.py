"""The verdicts on two results."""

from __future__ import annotations

import pytest

from fastbyol_bench.compare import cautions, compare, verdict
from fastbyol_bench.results import Row
from sample_results import GPU, result, timed


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (timed(1.0, 0.05), timed(0.8, 0.05), "faster"),
        (timed(0.8, 0.05), timed(1.0, 0.05), "slower"),
        (timed(1.0, 0.15), timed(0.8, 0.05), "noise"),  # .2 apart is no more than both spreads
        (timed(1.0, 0.0), timed(0.981, 0.0), "noise"),  # less than 2 %
        (timed(1.0, 0.0), timed(0.979, 0.0), "faster"),
        (timed(1.0, 0.0, runs=2), timed(0.1, 0.0), "too few runs"),
    ],
)
def test_verdicts(a: object, b: object, expected: str) -> None:
    assert verdict(a, b) == expected  # type: ignore[arg-type]


def test_rows_are_matched_by_name() -> None:
    a = result()
    moved = a.rows[0].model_copy(update={"timing": timed(0.05)})
    new = Row(suite="views", name="two views of 96 px", variant="new", timing=timed(1.0))
    b = result(rows=(a.rows[1], moved, new))
    changes = {change.variant: change for change in compare(a, b) if change.suite == "views"}
    assert (changes["ours"].ratio, changes["ours"].verdict) == (2.0, "faster")
    assert (changes["Pillow"].ratio, changes["Pillow"].verdict) == (1.0, "noise")
    assert (changes["new"].verdict, changes["new"].a_s) == ("only in B", None)
    assert [change.verdict for change in compare(a, b) if change.suite == "kernels"] == [
        "only in A"
    ]
    assert "fused, Triton" not in changes


def test_cautions() -> None:
    assert cautions(result(), result()) == []
    assert cautions(result(), result(finished=False)) == [
        "B is unfinished: it was cut off after 4 rows"
    ]
    warnings = " ".join(cautions(result(), result(machine=GPU, quick=True, load=7.0)))
    assert all(word in warnings for word in ("device_name", "--quick", "busy"))
