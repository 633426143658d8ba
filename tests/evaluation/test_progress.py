"""A run's accuracies in words, with the intervals that sampling leaves."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from fastbyol.evaluation.progress import Accuracies


def epoch(number: int, accuracy: float | None) -> dict[str, Any]:
    return {"event": "epoch", "epoch": number, "accuracy": accuracy, "step": 8 * (number + 1)}


UNTRAINED = {"event": "untrained", "step": 0, "accuracy": 48.4375, "num_scored": 1024}
EPOCHS = [
    epoch(0, None),
    epoch(1, 50.0),
    epoch(2, None),
    epoch(3, 64.0625),
    epoch(4, None),
    epoch(5, 60.9375),
]


def test_a_run_from_its_events() -> None:
    accuracies = Accuracies.of([UNTRAINED, *EPOCHS, {"event": "state", "step": 9}])
    assert accuracies == Accuracies(
        untrained=48.4375, best=64.0625, best_epoch=3, last=60.9375, num_scored=1024
    )
    low, high = stats.binomtest(624, 1024).proportion_ci(method="wilson")
    assert accuracies.in_words() == (
        f"accuracy 60.9% ({100 * low:.1f} to {100 * high:.1f}), best in epoch 4 64.1% (61.1 to "
        "66.9), "
        "random weights 48.4% (45.4 to 51.5)"
    )


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], ""),
        ([epoch(0, None)], ""),
        ([UNTRAINED], "random weights 48.4% (45.4 to 51.5)"),
        (
            [{**UNTRAINED, "weights": "given"}],
            "weights at the start 48.4% (45.4 to 51.5)",
        ),  # of --init-from
        (
            EPOCHS[:2],
            "accuracy 50.0%, best in epoch 2 50.0%",
        ),  # of a version that recorded neither start nor number
    ],
)
def test_absent_numbers_are_left_out(events: list[dict[str, Any]], words: str) -> None:
    assert Accuracies.of(events).in_words() == words


def test_the_first_of_equals_is_the_best() -> None:
    assert Accuracies.of([epoch(0, 10.0), epoch(1, 10.0)]).best_epoch == 0
