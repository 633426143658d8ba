"""Our step in the bench is that of a training run: engine, switches and numbers are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastbyol import load_config, views
from fastbyol.engine import capture
from fastbyol.engine.step import StepMetrics, TrainState, forward, train_step
from fastbyol_bench.own_step import OwnStep

CPU = torch.device("cpu")
SETS = ["train.precision=fp32", "model.width=8"]


def test_takes_the_step_of_training() -> None:
    torch.manual_seed(0)
    own = OwnStep.create(SETS, size=32, batch=4, device=CPU)
    config = load_config("blog", [*SETS, "views.size=32", "train.batch_size=4"])
    state = TrainState.create(config, steps_per_epoch=1000)
    assert own.mode == "eager"
    for _ in range(2):
        # Its set is its batch, in order.
        pair = views.two_views(
            config.views, own.batch.images, own.batch.ids, seed=0, epoch=0, dtype=torch.float32
        )
        assert torch.equal(own().values, train_step(state, pair).values)


def test_a_graph_is_recorded_once_and_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check with a fake recorder that each call is one replay of the graph."""
    counted = {"recorded": 0, "played": 0}

    def record(work: Callable[[], StepMetrics]) -> tuple[StepMetrics, Callable[[], None]]:
        counted["recorded"] += 1

        def play() -> None:
            counted["played"] += 1

        return work(), play

    monkeypatch.setattr(capture, "choose", lambda *_, **__: capture.Choice("graph", "a test"))
    monkeypatch.setattr(capture, "compiled_forward", lambda *_, **__: forward)
    monkeypatch.setattr(capture, "record_cuda", record)
    own = OwnStep.create(SETS, size=32, batch=4, device=CPU)
    assert (own.mode, counted) == ("graph", {"recorded": 1, "played": 0})
    for _ in range(3):
        own()
    assert counted == {"recorded": 1, "played": 3}


def test_switches_are_those_of_a_run() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        OwnStep.create(SETS, size=32, batch=4, device=CPU)
        assert not matmul.allow_tf32
        assert not cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
