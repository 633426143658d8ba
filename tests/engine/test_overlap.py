"""The target's pass on another stream: the order of its parts, and the same step bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastbyol.config import EngineConfig
from fastbyol.engine import capture
from fastbyol.engine.overlap import PARTS, CudaSide, Parts, overlapped
from fastbyol.engine.step import TrainState, train_step
from fastbyol.errors import UsageError
from fastbyol.model import resnet
from test_capture import batch_of, config_of
from test_step import METHODS, assert_equal_states, collapse, some_views, tiny
from together import in_threads

# Dynamo hides this warning of its own, unless warnings are errors.
DYNAMOS = "ignore:The .grad attribute of a Tensor that is not a leaf"
ORDER = ["fork", "project", "back", "predict", "join", "measure"]


@pytest.fixture(autouse=True)
def _short_compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build one block a stage."""
    short = resnet.Architecture(resnet.BasicBlock, (1, 1, 1, 1))
    monkeypatch.setitem(resnet.ARCHITECTURES, "resnet18", short)
    yield
    torch.compiler.reset()


class Notes:
    """A side that only notes when it is called, and parts that note it, too."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.parts = Parts(*map(self._noting, PARTS))

    def _noting(self, part: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.order.append(part.__name__)
            return part(*arguments)

        return call

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.order.append("fork")
        yield
        self.order.append("back")

    def join(self) -> None:
        self.order.append("join")


@pytest.mark.parametrize("method", ["byol", "no predictor", "contrastive, odd queue"])
def test_parts_in_their_order_are_the_step_bit_for_bit(method: str) -> None:
    config = tiny("bn", "bn", True, "blog", train__precision="fp32", **METHODS.get(method, {}))
    config = config.model_copy(update={"engine": EngineConfig(kernels="reference")})
    whole, parted = (TrainState.create(config, steps_per_epoch=2) for _ in range(2))
    notes = Notes()
    for step in range(2):
        pair = some_views(step).float()
        expected = train_step(whole, pair)
        got = train_step(parted, pair, overlapped(notes, notes.parts))
        assert torch.equal(expected.values, got.values)
        assert torch.equal(expected.layers, got.layers)
        assert torch.equal(whole.arena.gradient, parted.arena.gradient)
    assert_equal_states(whole, parted)
    assert notes.order == 2 * ORDER


@pytest.mark.filterwarnings(DYNAMOS)
def test_each_part_is_one_graph() -> None:
    """Traced whole. Without a predictor z, which needs no gradient, lies in q's memory."""
    config = tiny("none", "bn", train__precision="fp32", **METHODS["no predictor"])
    eager, traced = (TrainState.create(config, steps_per_epoch=2) for _ in range(2))
    notes = Notes()
    forward = capture.compiled_forward("aot_eager", side=notes)
    for step in range(2):
        pair = some_views(step).float()
        torch.testing.assert_close(
            train_step(traced, pair, forward).values,
            train_step(eager, pair).values,
            rtol=1e-3,
            atol=1e-5,
        )
    assert notes.order == 2 * ["fork", "back", "join"]


def test_a_cuda_stream_waits_at_the_fork_and_is_waited_for_at_the_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        calls.append(f"on {stream.name}")
        yield
        calls.append("back")

    main = Stream("main")
    for name, value in (("Stream", Stream), ("current_stream", lambda: main), ("stream", on)):
        monkeypatch.setattr(torch.cuda, name, value)
    side = CudaSide()
    with side.beside():
        calls.append("target")
    side.join()
    assert calls == [
        "side waits for main", "on side", "target", "back", "main waits for side",
    ]  # fmt: skip


def test_where_there_is_nothing_to_overlap_it_says_so() -> None:
    asked = EngineConfig(overlap=True)
    gpu = torch.device("cuda", 0)
    assert capture.choose(asked, gpu).mode == "graph"
    with pytest.raises(UsageError, match="the run is on cpu: set it to false"):
        capture.choose(asked, torch.device("cpu"))
    with pytest.raises(UsageError, match="this run has 2: set it to false"):
        in_threads(2, lambda ranks: capture.choose(asked, gpu, ranks=ranks, batch_size=4))
    simsiam = tiny(method__name="simsiam").model_copy(update={"engine": asked})
    with pytest.raises(UsageError, match="has no forward pass: set it to false"):
        TrainState.create(simsiam, steps_per_epoch=2)


@pytest.mark.gpu(only=True)
@pytest.mark.filterwarnings(DYNAMOS)
@pytest.mark.parametrize("method", ["byol", "contrastive, odd queue"])
def test_branches_of_a_graph_are_the_parts_one_after_the_other(method: str) -> None:
    """Bit for bit, in a healthy and in a collapsed state."""
    device = torch.device("cuda", 0)
    config = config_of(("bn", "brn", False, "sgd") if method == "byol" else method)
    capture.make_cudnn_deterministic(device)
    parted, branched = states = [
        TrainState.create(config, steps_per_epoch=2, device=device) for _ in range(2)
    ]
    engines = [
        capture.Captured(
            capture.Eager(state, config, capture.compiled_forward(side=side)), capture.record_cuda
        )
        for state, side in zip(states, (Notes(), CudaSide()), strict=True)
    ]
    for collapsed in (False, True):
        for state in states if collapsed else ():
            collapse(state)
        for step in range(3):
            batch = batch_of(step, device=device)
            for engine in engines:
                engine(batch, step)
        assert_equal_states(parted, branched)
