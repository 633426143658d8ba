"""Eager, compiled and recorded steps are the same step, in a healthy and in a collapsed state."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastbyol import api, views
from fastbyol.config import Config
from fastbyol.data.loader import Batch
from fastbyol.engine import capture
from fastbyol.engine.step import LAYER_METRICS, METRICS, StepMetrics, TrainState, train_step
from fastbyol.engine.telemetry import Telemetry
from fastbyol.errors import FastbyolError, UsageError
from test_step import assert_equal_states, collapse, some_views, tiny
from tiny import beton_files, tiny_config

CPU = torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Every norm of encoder and heads, standardized or not, and every optimizer, once or more.
COVER = (
    ("bn", "bn", False, "sgd"),
    ("gn", "none", True, "blog"),
    ("ln", "ln", False, "deepmind"),
    ("none", "brn", False, "bolts"),
    ("gn", "gn", False, "blog"),
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def fp32(norm: str, heads: str, ws: bool, optimizer: str) -> Config:
    return tiny(norm, heads, ws, optimizer, train__precision="fp32")


def fp64(config: Config) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp64"})})


def assert_near(exact: TrainState, eager: TrainState, other: TrainState) -> None:
    """``other`` is as near to fp64 as eager fp32 is: four times its distance, and a few last bits of fp32."""
    for buffer in ("online", "momentum", "target"):
        named = [state.arena.named(getattr(state.arena, buffer)) for state in (exact, eager, other)]
        for name, e in named[0].items():
            allowed = 4 * float((named[1][name] - e).abs().max()) + 1e-5 * float(e.abs().max().clamp(min=1e-3))
            assert float((named[2][name] - e).abs().max()) <= allowed, f"{buffer}: {name}"
    for (name, e), x, y in zip(exact.online.named_buffers(), eager.online.buffers(), other.online.buffers(), strict=True):
        assert float((y - e).abs().max()) <= 4 * float((x - e).abs().max()) + 1e-5 * float(e.abs().max()), name


@pytest.mark.parametrize("kinds", [COVER[0], *(pytest.param(kinds, marks=pytest.mark.slow) for kinds in COVER[1:])], ids=str)
def test_one_graph_takes_the_eager_step(kinds: tuple[str, str, bool, str]) -> None:
    """Traced whole, forward and backward, with torch's own kernels: no break, or fullgraph would raise."""
    config = fp32(*kinds)
    exact, eager, traced = states = [TrainState.create(c, steps_per_epoch=2) for c in (fp64(config), config, config)]
    forward = capture.compiled_forward("aot_eager")
    for collapsed in (False, True):
        for state in states if collapsed else ():
            collapse(state)
        for step in range(2):
            pair = some_views(step)
            train_step(exact, pair)
            expected, got = train_step(eager, pair.float()), train_step(traced, pair.float(), forward)
            torch.testing.assert_close(got.values, expected.values, rtol=1e-3, atol=1e-5)
        assert_near(exact, eager, traced)


def test_compiled_code_is_made_once_for_a_whole_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """lr, tau and the step are tensors: a step of another number runs what was compiled for the first, and fits fp64."""
    config = fp32("bn", "bn", False, "blog")
    exact, eager, compiled = (TrainState.create(c, steps_per_epoch=2) for c in (fp64(config), config, config))
    forward = capture.compiled_forward()
    for step in range(20):  # 14 are the schedule's
        pair = some_views(step)
        if step < 2:
            train_step(exact, pair)
            train_step(eager, pair.float())
        train_step(compiled, pair.float(), forward)
        if step == 0:
            monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
        if step == 1:
            assert_near(exact, eager, compiled)
    assert int(compiled.step) == 20


def assert_cut_and_whole_agree(config: Config, folder: Path) -> None:
    """A run that lost all but its first checkpoint and is resumed leaves the same bytes as it did whole."""
    api.train(config, folder / "whole")
    shutil.copytree(folder / "whole", folder / "cut")
    checkpoints = sorted((folder / "cut" / "checkpoints").glob("*"))
    assert len(checkpoints) > 2
    for path in checkpoints[1:]:
        path.unlink()
    api.resume(folder / "cut")
    names = [f"checkpoints/{checkpoints[-1].name}", "metrics.jsonl"]
    assert all((folder / "whole" / name).read_bytes() == (folder / "cut" / name).read_bytes() for name in names)


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    sets = ("engine.mode=compile", "train.epochs=2", "run.checkpoint_every_steps=4")
    assert_cut_and_whole_agree(tiny_config(beton_files(tmp_path), *sets), tmp_path)


def batch_of(step: int, count: int = 6) -> Batch:
    g = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (count, 20, 20, 3), generator=g, dtype=torch.uint8)
    return Batch(images, torch.arange(count) + 100 * step)


def small_views(config: Config) -> Config:
    return config.model_copy(update={"views": views.ViewsConfig(size=16)})


class Tape:
    """Records as a GPU does: warm-up steps run, the recorded one does not, and playing it back writes into the same tensors."""

    def __init__(self, state: TrainState, warm_up: int = capture.WARM_UP_STEPS) -> None:
        self.state, self.warm_up, self.recordings = state, warm_up, 0

    def __call__(self, work: Callable[[], StepMetrics]) -> tuple[StepMetrics, Callable[[], None]]:
        self.recordings += 1
        for _ in range(self.warm_up):
            metrics = work()
        out = StepMetrics(*(torch.full_like(tensor, torch.nan) for tensor in metrics))

        def play() -> None:
            for static, new in zip(out, work(), strict=True):
                static.copy_(new)

        return out, play


@pytest.mark.parametrize("kinds", COVER[:2], ids=str)
def test_recording_leaves_no_trace(kinds: tuple[str, str, bool, str]) -> None:
    """Buffers of norms, momentum, target and step go back to before the warm-up; each batch and epoch reaches the tape."""
    config = small_views(fp32(*kinds))
    eager, taped = (TrainState.create(config, steps_per_epoch=2) for _ in range(2))
    tape = Tape(taped)
    plain, recorded = capture.Eager(eager, config), capture.Captured(capture.Eager(taped, config), tape, None, print)
    for step in range(4):
        expected, got = plain(batch_of(step), step // 2), recorded(batch_of(step), step // 2)
        assert torch.equal(expected.values, got.values)
        assert torch.equal(expected.layers, got.layers)
    assert_equal_states(eager, taped)
    assert tape.recordings == 1


def test_a_failed_recording_falls_back_once_and_says_so() -> None:
    config = small_views(fp32("bn", "bn", False, "sgd"))
    eager, other = (TrainState.create(config, steps_per_epoch=2) for _ in range(2))
    tried: list[str] = []
    said: list[str] = []

    def fail(work: Callable[[], StepMetrics]) -> tuple[StepMetrics, Callable[[], None]]:
        tried.append("once")
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    inner = capture.Eager(other, config)
    with pytest.raises(RuntimeError, match="not permitted"):
        capture.Captured(inner, fail, None, said.append)(batch_of(0), 0)
    recorded = capture.Captured(inner, fail, inner, said.append)
    for step in range(2):
        capture.Eager(eager, config)(batch_of(step), 0)
        recorded(batch_of(step), 0)
    assert_equal_states(eager, other)
    assert len(tried) == 2
    assert said == ["no CUDA graph (RuntimeError: operation not permitted when stream is capturing): steps are taken eagerly"]


def test_modes_that_can_be_had() -> None:
    def config(mode: str) -> object:
        return Config.model_validate({"engine": {"mode": mode}}).engine

    gpu = torch.device("cuda", 0)
    assert capture.choose(config("auto"), CPU).mode == "eager"
    assert capture.choose(config("auto"), gpu)[::2] == ("graph", True)
    assert capture.choose(config("graph"), gpu)[::2] == ("graph", False)
    assert capture.choose(config("compile"), CPU).mode == "compile"
    with pytest.raises(UsageError, match="graph needs a CUDA device"):
        capture.choose(config("graph"), CPU)


def test_what_cannot_be_compiled_is_said_in_a_line() -> None:
    config = fp32("bn", "bn", False, "sgd")

    def refuse(*_: object) -> None:
        raise RuntimeError("no compiler\nfound")

    forward = capture.compiled_forward(refuse)
    with pytest.raises(FastbyolError, match="take --engine eager") as raised:
        train_step(TrainState.create(config, steps_per_epoch=2), some_views(0).float(), forward)
    assert "\n" not in str(raised.value)


def test_memory_stays_flat(tmp_path: Path) -> None:
    """300 epochs of two steps with their telemetry."""
    config = small_views(fp32("gn", "bn", True, "blog"))
    state = TrainState.create(config, steps_per_epoch=2)
    take = capture.Eager(state, config)
    names = {"metric_names": METRICS, "layer_names": state.segment_names, "layer_metric_names": LAYER_METRICS}
    with Telemetry(tmp_path, **names, steps_per_epoch=2, drain_every=4, layers_every=1, device=CPU) as telemetry:
        for epoch in range(300):
            for step in range(2):
                telemetry.record(take(batch_of(step), epoch))
            telemetry.epoch_summary()
            if epoch == 30:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # What was reached at most: it cannot come back down, so growth would show.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.01 * before


@on_gpu
@pytest.mark.parametrize("kinds", COVER, ids=str)
def test_a_graph_takes_the_eager_step(kinds: tuple[str, str, bool, str]) -> None:
    device = torch.device("cuda", 0)
    config = small_views(fp32(*kinds))
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"mode": "graph"})})
    exact, eager, graphed = (TrainState.create(c, steps_per_epoch=2, device=device) for c in (fp64(config), config, config))
    steps = [capture.Eager(exact, fp64(config)), capture.Eager(eager, config)]
    steps.append(capture.engine(graphed, config, capture.choose(config.engine, device), print))
    for step in range(4):
        batch = Batch(*(tensor.to(device) for tensor in batch_of(step)))
        for number, take in enumerate(steps):
            torch.cuda.set_sync_debug_mode("error" if step > 0 and number == 2 else "default")
            take(batch, step // 2)
            torch.cuda.set_sync_debug_mode("default")
        if step == 1:
            assert_near(exact, eager, graphed)


@on_gpu
def test_a_graphed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    sets = ("engine.mode=graph", "train.device=cuda", "train.epochs=2", "run.checkpoint_every_steps=4")
    assert_cut_and_whole_agree(tiny_config(beton_files(tmp_path), *sets), tmp_path)
