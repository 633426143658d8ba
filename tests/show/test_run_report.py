"""A run's report: which layers share a line."""

from __future__ import annotations

import pytest

from fastbyol.show.run_report import MOST_STAGES, stages

NET = "encoder.net"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["encoder.conv1.weight", "encoder.layer1.0.conv1.weight", "encoder.layer1.1.bn1.bias"],
            {"encoder.conv1": [0], "encoder.layer1": [1]},
        ),
        (
            [f"{NET}.stem.0.weight", f"{NET}.stages.0.a.weight", f"{NET}.stages.1.b.weight",
             f"{NET}.stages.1.b.bias", "projector.linear1.weight"],
            {"encoder.stem.0": [0], "encoder.stages.0": [1], "encoder.stages.1": [2],
             "projector.linear1": [4]},
        ),
        (
            [f"{NET}.blocks.{n}.weight" for n in range(MOST_STAGES + 1)],
            {"encoder.blocks": list(range(MOST_STAGES + 1))},
        ),
    ],
)  # fmt: skip
def test_weights_are_grouped_by_stage(names: list[str], expected: dict[str, list[int]]) -> None:
    assert stages(names) == expected
