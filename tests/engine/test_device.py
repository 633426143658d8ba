"""A run's number of threads on a cpu."""

from __future__ import annotations

import pytest
import torch

from fastbyol import load_config
from fastbyol.engine.device import fitting_threads


@pytest.mark.parametrize(
    ("preset", "sets", "variable", "expected"),
    [
        ("demo", [], None, 1),
        ("demo", ["model.width=64"], None, 3),
        ("demo", ["views.size=96"], None, 3),
        ("blog", [], None, 3),
        ("demo", [], "3", 3),
    ],
)
def test_small_steps_take_one_thread_unless_the_environment_has_a_number(
    preset: str,
    sets: list[str],
    variable: str | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with fitting_threads(load_config(preset, [*sets, "train.device=cpu"])):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
