"""Runs that never were: evidence made of a few points per curve, straight lines between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fastbyol.ablations.evidence import MEASURES, Evidence, Scale

Points = Mapping[int, float]
STEPS = 32

# Negative cosines over 24 epochs, as runs of a narrow network show them.
HEALTHY = {0: 0.93, 2: 0.6, 5: 0.3, 23: 0.25}
COLLAPSED = {0: 0.97, 1: 0.999, 23: 0.9999}
RECOVERED = {0: 0.97, 1: 0.999, 6: 0.998, 9: 0.95, 12: 0.45, 23: 0.3}
RECOVERED_LATE = {0: 0.97, 1: 0.999, 15: 0.998, 18: 0.95, 20: 0.45, 23: 0.3}
COLLAPSED_LATE = {0: 0.93, 5: 0.3, 12: 0.3, 16: 0.8, 18: 0.999, 23: 0.9999}
HALF_OUT = {0: 0.97, 1: 0.999, 9: 0.998, 11: 0.955, 23: 0.93}
COMES_AND_GOES = {
    0: 0.97,
    1: 0.999,
    5: 0.999,
    7: 0.3,
    9: 0.3,
    11: 0.9,
    14: 0.3,
    16: 0.85,
    19: 0.2,
    23: 0.2,
}
DISTURBED = {0: 0.97, 1: 0.999, 10: 0.999, 12: 0.955, 14: 0.999, 23: 0.9999}


def line(points: Points, length: int) -> np.ndarray:
    return np.interp(np.arange(length), sorted(points), [points[at] for at in sorted(points)])


def made_up(
    arm: str,
    neg: Points,
    *,
    seed: int = 0,
    accuracy: Sequence[float] | Points | None = None,
    num_scored: int | None = 1024,
    rates: Mapping[str, Points] | None = None,
    loss: Points | None = None,
    scale: Scale = "mini",
    epochs: int = 24,
    done: int | None = None,
    steps_per_epoch: int = STEPS,
    warmup_steps: int = 0,
) -> Evidence:
    """Make a run of ``epochs`` epochs, ``done`` of them finished.

    ``accuracy``: before training, which the first epoch leaves as it is, and at the last epoch; or
    points. Positives are nearer than negatives by a tenth of the negatives' spread, or by .5 where
    those are far apart.
    """
    length = epochs if done is None else done
    negative = line(neg, length)
    columns = {name: np.full(length, np.nan) for name in MEASURES}
    columns |= {
        "neg_cos": negative,
        "pos_cos": negative + np.where(negative < 0.5, 0.5, 0.1) * (1 - negative),
        "std_z": np.sqrt(np.maximum(1 - negative, 1e-9)),
        "loss": line(loss, length) if loss is not None else 0.3 * (1 - negative),
    }
    if accuracy is not None:
        points = (
            accuracy if isinstance(accuracy, Mapping) else {0: accuracy[0], length - 1: accuracy[1]}
        )
        columns["accuracy"] = line(points, length)
    steps = np.arange(length * steps_per_epoch)
    return Evidence(
        arm=arm,
        seed=seed,
        scale=scale,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        finished=length == epochs,
        epoch=np.arange(length, dtype=np.float64),
        **columns,
        rate_step=steps,
        rates={
            group: np.interp(steps / steps_per_epoch, sorted(p), [p[at] for at in sorted(p)])
            for group, p in (rates or {}).items()
        },
        early_gradient_norm=np.full(len(steps), 1e-3),
        rate_ceiling=None,
        untrained_accuracy=math.nan if accuracy is None else float(columns["accuracy"][0]),
        num_scored=num_scored,
        warmup_steps=warmup_steps,
    )
