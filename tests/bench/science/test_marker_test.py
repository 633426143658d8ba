"""The test of the marker: scores by hand, and runs made so that the answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fastbyol import config_io
from fastbyol.sweeps import phase
from fastbyol_bench.science import marker_test
from fastbyol_bench.science.marker_test import FITTED, UNSEEN, Outcome

GRIDS = Path(marker_test.__file__).parent
RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
SCALES = ("0.1+1.0", "0.3+1.0", "0.5+1.0", "0.9+1.0")


def runs(diagram: str, rs: dict[str, float], border: float = 0.01) -> list[Outcome]:
    """Three runs a point, which end collapsed exactly where r x lr is below ``border``."""
    return [
        Outcome(diagram, diagram, scale, lr, rs[scale] * lr < border)
        for scale in rs
        for lr in RATES
        for _ in range(3)
    ]


def test_scores_by_hand() -> None:
    predicted, ends = np.array([0.9, 0.6, 0.4, 0.2]), np.array([True, False, True, False])
    # Of the four pairs of one that ends so and one that does not, three are in order.
    auc, right, brier, most, count = marker_test.score(predicted, ends)
    assert (auc, right, most, count) == (0.75, 0.5, 0.5, 4)
    assert brier == pytest.approx((0.01 + 0.36 + 0.36 + 0.04) / 4)
    assert math.isnan(marker_test.score(predicted, np.ones(4, bool)).auc)
    assert marker_test.score(predicted, np.array([True, False, False, False])).most == 0.75


def test_a_marker_that_decides_is_told_from_one_that_does_not() -> None:
    here = dict(zip(SCALES, (0.02, 0.05, 0.1, 0.2), strict=True))
    there = dict(zip(SCALES, (0.2, 0.01, 0.05, 0.03), strict=True))
    markers = [
        {
            "data": data, "scale": scale, "r": r,
            # These know how mild the crop is, which is all that they share with r on the first set.
            "variance_ratio": float(scale[:3]), "knn_entropy": 0.5,
        }
        for data, rs in ((FITTED, here), ("textures", there))
        for scale, r in rs.items()
    ]  # fmt: skip
    made = marker_test.judge([*runs(FITTED, here), *runs("textures", there)], markers)
    judged = made["scores"]
    assert judged["r"][FITTED]["right"] == judged["r"]["textures"]["right"] == 1.0
    assert judged["r"]["textures"]["auc"] == 1.0
    assert judged["variance ratio"][FITTED]["right"] == 1.0
    assert judged["variance ratio"]["textures"]["auc"] < 0.9
    # A constant beside the learning rate is the learning rate alone.
    alone, constant = judged["learning rate alone"], judged["neighbours' entropy"]
    assert constant["textures"]["auc"] == alone["textures"]["auc"] < 0.9
    assert judged["r"][f"{FITTED}, a crop left out"]["auc"] > 0.95
    assert judged["r"][UNSEEN] == judged["r"]["textures"]
    assert len(made["cells"]) == 2 * len(SCALES) * len(RATES)
    for cell in made["cells"]:
        assert (cell["runs"], cell["collapsed"]) in ((3, 0), (3, 3))
        assert (cell["predicted"]["r"] > 0.5) == (cell["collapsed"] == 3)


def test_outcomes_are_the_finished_runs_of_a_kept_diagram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marker_test, "KEPT", tmp_path)
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds/sweep.csv").write_text(
        "data.train,views.scale,optim.lr,seed,status,state,collapsed\n"
        "/a/noise-train.beton,0.4+1.0,0.2,0,done,collapsed,1.0\n"
        "textures,0.4+1.0,0.1,0,done,healthy,0.0\n"
        "textures,0.9+1.0,0.1,0,running,,\n"
    )
    assert list(marker_test.outcomes("kinds")) == [
        Outcome("kinds", "noise", "0.4+1.0", 0.2, True),
        Outcome("kinds", "textures", "0.4+1.0", 0.1, False),
    ]
    assert list(marker_test.outcomes("textures")) == []


@pytest.mark.parametrize("name", ["kinds", "digits"])
def test_the_kept_grids_have_the_settings_of_the_diagrams(name: str) -> None:
    """But the images, what is crossed, and for the digits as many steps in shorter epochs."""
    document, _ = config_io.read_document(config_io.read_text(GRIDS / f"{name}.toml"), name)
    like, _ = config_io.read_document(
        config_io.read_text(config_io.config_folder() / "ablations/phases.toml"), "phases"
    )
    like["train"]["end_in"] = phase.END_IN
    if name == "digits":
        longer = document["data"]["limit"] / like["data"]["limit"]
        train = document["train"]
        train["epochs"] = round(train["epochs"] * longer)
        document["schedule"]["horizon_epochs"] *= longer
        train["end_in"] = [[state, round(count * longer)] for state, count in train["end_in"]]
    crossed = document.pop("grid")
    assert crossed.keys() >= {"views.scale", "optim.lr"}
    for section in document:
        if section != "data":
            assert document[section] == like[section]
