"""The post's own runs as evidence: from the curves of its figures, and for its table from the
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastbyol.ablations import curves
from fastbyol.ablations.claims import TABLE_COSINES, TABLE_ROWS, Claim
from fastbyol.ablations.evidence import (
    MEASURES,
    PUBLISHED_SCORED,
    PUBLISHED_STEPS_PER_EPOCH,
    Evidence,
)

PUBLISHED_EPOCHS = int(curves.appendix()["setting"]["epochs"])


def published(claim: Claim) -> dict[str, tuple[Evidence, ...]]:
    """Return the post's runs of ``claim`` by arm, one each; empty for a claim without curves or
    numbers.
    """
    if claim.id == "M1":
        return _of_table(claim.numbers)
    return {source.arm: (_of_curves(source.arm, claim),) for source in claim.sources}


def _of_curves(arm: str, claim: Claim) -> Evidence:
    """Points of the figures on one axis of whole epochs; what was hidden in one of them is NaN."""
    lines = {
        source.measure: curves.published()[source.figure, source.series]
        for source in claim.sources
        if source.arm == arm
    }
    last = int(max(curve.epoch[-1] for curve in lines.values()))
    epoch = np.arange(last + 1, dtype=np.float64)
    columns = {}
    for measure, curve in lines.items():
        columns[measure] = np.full(len(epoch), np.nan)
        columns[measure][np.rint(curve.epoch).astype(int)] = curve.value
    if "accuracy" not in columns and "accuracy@320" in claim.numbers:
        columns["accuracy"] = np.append(np.full(last, np.nan), claim.numbers["accuracy@320"])
    return _published(arm, PUBLISHED_EPOCHS, epoch, columns)


def _of_table(numbers: Mapping[str, Any]) -> dict[str, tuple[Evidence, ...]]:
    """Return runs of ten epochs of which only the end is known."""
    runs = {}
    for arm, row in TABLE_ROWS.items():
        cosines = numbers[TABLE_COSINES[arm]] if arm in TABLE_COSINES else ()
        ends = {
            "accuracy": numbers[row],
            **dict(zip(("pos_cos", "neg_cos"), cosines, strict=False)),
        }
        columns = {name: np.array([value]) for name, value in ends.items()}
        runs[arm] = (_published(arm, 10, np.array([9.0]), columns),)
    return runs


def _published(
    arm: str, epochs: int, epoch: np.ndarray, columns: Mapping[str, np.ndarray]
) -> Evidence:
    nothing = np.full(len(epoch), np.nan)
    return Evidence(
        arm=arm,
        seed=0,
        scale="published",
        epochs=epochs,
        steps_per_epoch=PUBLISHED_STEPS_PER_EPOCH,
        finished=True,
        epoch=epoch,
        **{name: columns.get(name, nothing) for name in MEASURES},
        rate_step=(epoch * PUBLISHED_STEPS_PER_EPOCH).astype(np.int64),
        rates={
            name.removeprefix("rate:"): values
            for name, values in columns.items()
            if name.startswith("rate:")
        },
        early_gradient_norm=nothing,
        num_scored=PUBLISHED_SCORED,
    )
