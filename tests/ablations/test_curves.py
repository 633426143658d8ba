"""The published data as shipped, against the figures of the appendix as its claims tell them."""

from __future__ import annotations

import numpy as np
import pytest

from fastbyol.ablations.claims import CLAIMS
from fastbyol.ablations.curves import appendix, published


def test_all_29_curves_are_there_with_4774_points() -> None:
    assert len(published()) == 29
    assert sum(len(curve.value) for curve in published().values()) == 4774
    for curve in published().values():
        assert np.all(np.diff(curve.epoch) > 0)
        assert np.isfinite(curve.value).all()


def test_every_curve_belongs_to_one_claim() -> None:
    told = [(source.figure, source.series) for claim in CLAIMS for source in claim.sources]
    assert sorted(told) == sorted(published())


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_accuracies_at_an_epoch_are_the_curves_own(claim: object) -> None:
    """``accuracy@EPOCH`` of a claim is its curve there, to the reading's error."""
    tolerance = appendix()["accuracy_of_reading"]["accuracy_pp"]
    for name, value in claim.numbers.items():  # type: ignore[attr-defined]
        what, _, epoch = name.partition("@")
        source = next((s for s in claim.sources if s.measure == what), None)  # type: ignore[attr-defined]
        if source is not None and epoch:
            curve = published()[source.figure, source.series]
            assert curve.value[np.searchsorted(curve.epoch, float(epoch))] == pytest.approx(
                value, abs=tolerance
            )
