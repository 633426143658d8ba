"""Confidence intervals of shares, such as right answers among images.

They cover what other test images, drawn like these, would have changed. They say nothing of another
seed, other training images or another training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# The normal distribution's two-sided quantile for 95 %.
Z95 = 1.959963984540054


def wilson(hits: float, total: int, *, z: float = Z95) -> tuple[float, float]:
    """Return the score interval of the share ``hits`` / ``total``; [0, 1] if ``total`` is 0.

    Unlike p +- z sqrt(p (1 - p) / n) it keeps its level for few trials and at shares of 0 and 1.
    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if total == 0:
        return 0.0, 1.0
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # Shares of 0 and 1 have exact ends, whatever the rounding.
    return (0.0 if hits == 0 else max(0.0, centre - half)), (
        1.0 if hits == total else min(1.0, centre + half)
    )


def accuracy_interval(accuracy: float, num_scored: int) -> tuple[float, float]:
    """Return the 95 % interval of an ``accuracy`` on ``num_scored`` images, all in percent."""
    low, high = wilson(accuracy / 100 * num_scored, num_scored)
    return 100 * low, 100 * high


def accuracy_text(accuracy: float, num_scored: int | None) -> str:
    """Format ``accuracy`` in percent as ``62.0% (59.0 to 64.9)``, without ``num_scored`` alone."""
    if not num_scored:
        return f"{accuracy:.1f}%"
    low, high = accuracy_interval(accuracy, num_scored)
    return f"{accuracy:.1f}% ({low:.1f} to {high:.1f})"


@dataclass(frozen=True)
class Accuracy:
    """The right answers in ``percent`` of ``num_scored`` images."""

    percent: float
    num_scored: int

    def in_words(self) -> str:
        """Return it with its interval."""
        return accuracy_text(self.percent, self.num_scored)

    def fields(self, name: str = "accuracy") -> dict[str, float]:
        """Return ``name``, ``name_low`` and ``name_high``, as JSON has them."""
        low, high = accuracy_interval(self.percent, self.num_scored)
        return {name: self.percent, f"{name}_low": low, f"{name}_high": high}


def difference_margin(
    first: float, first_total: int, second: float, second_total: int, *, z: float = Z95
) -> float:
    """Return how far sampling alone may put the share ``first`` above the independent ``second``.

    sqrt((p1 - l1)^2 + (u2 - p2)^2) with the ends l1 and u2 of ``wilson``: it keeps its level at
    shares of 0 and 1. Source: Newcombe, "Interval estimation for the difference between independent
    proportions", 1998, method 10.
    """
    return math.hypot(
        first - wilson(first * first_total, first_total, z=z)[0],
        wilson(second * second_total, second_total, z=z)[1] - second,
    )
