"""Eager, compiled and captured steps are the same step, in a healthy and in a collapsed state."""

from __future__ import annotations

import gc
import inspect
import os
import shutil
import signal
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    InternalTorchDynamoError,
    Unsupported,
)
from torch._inductor.exc import CppCompileError, InductorError, LoweringException
from torch._inductor.runtime.triton_heuristics import NoTritonConfigsError
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from fastbyol import api, load_config, views
from fastbyol.config import Config, EngineConfig
from fastbyol.data.loader import Batch
from fastbyol.engine import capture
from fastbyol.engine.observer import Silent
from fastbyol.engine.ranks import Alone
from fastbyol.engine.step import StepMetrics, TrainState, train_step
from fastbyol.engine.step import forward as plain_forward
from fastbyol.errors import FastbyolError, NoGraphError, UsageError
from fastbyol.model import resnet
from fastbyol.model.objective import Objective
from fastbyol.runs import checkpoint
from test_step import METHODS, assert_equal_states, collapse, some_views, tiny
from tiny import TINY, beton_files, tiny_config

CPU = torch.device("cpu")
# Every norm of encoder and heads, standardized or not, and every optimizer, once or more.
COVER = (
    ("bn", "brn", False, "sgd"),
    ("gn", "bn", True, "blog"),
    ("ln", "gn", False, "deepmind"),
    ("none", "ln", False, "bolts"),
)

OTHER_METHODS = ("contrastive, odd queue", "contrastive in the batch", "simsiam")

# Sums in another order round another way, and the collapsed state magnifies it: of one network the
# worst parameter was .6 times as far from fp64 as in eager steps with one thread, and 6 times with
# two.
CHANCE = 16

# One network with all of it, since compiling takes a minute: compiled code is kept on disk, and the
# second test finds it there.
ALL_KINDS = (
    "model.norm=bn",
    "model.ws=true",
    "model.projector.norm=gn",
    "model.predictor.norm=ln",
    "train.precision=bf16",
)


@pytest.fixture(autouse=True)
def _short_compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build one block a stage: half of the code to compile, which is dropped afterwards."""
    short = resnet.Architecture(resnet.BasicBlock, (1, 1, 1, 1))
    monkeypatch.setitem(resnet.ARCHITECTURES, "resnet18", short)
    yield
    torch.compiler.reset()


def fp32(norm: str, heads: str, ws: bool, optimizer: str) -> Config:
    return tiny(norm, heads, ws, optimizer, train__precision="fp32")


def config_of(kinds: tuple[str, str, bool, str] | str) -> Config:
    """Make a configuration of layers and an optimizer, or of a method by name."""
    if isinstance(kinds, str):
        return small_views(
            tiny("bn", "bn", optimizer="blog", train__precision="fp32", **METHODS[kinds])
        )
    return small_views(fp32(*kinds))


def fp64(config: Config) -> Config:
    return config.model_copy(
        update={"train": config.train.model_copy(update={"precision": "fp64"})}
    )


def assert_near(exact: TrainState, eager: TrainState, other: TrainState) -> None:
    """Compare ``other`` with fp64: it may be ``CHANCE`` times as far off as eager steps."""
    for buffer in ("online", "momentum", "target"):
        named = [state.arena.named(getattr(state.arena, buffer)) for state in (exact, eager, other)]
        for name, e in named[0].items():
            allowed = CHANCE * float((named[1][name] - e).abs().max()) + 1e-5 * float(
                e.abs().max().clamp(min=1e-3)
            )
            assert float((named[2][name] - e).abs().max()) <= allowed, f"{buffer}: {name}"
    for (name, e), x, y in zip(
        exact.online.named_buffers(), eager.online.buffers(), other.online.buffers(), strict=True
    ):
        assert float((y - e).abs().max()) <= CHANCE * float((x - e).abs().max()) + 1e-5 * float(
            e.abs().max()
        ), name
    if exact.queue is not None and eager.queue is not None and other.queue is not None:
        allowed = CHANCE * float((eager.queue - exact.queue).abs().max()) + 1e-5
        assert float((other.queue - exact.queue).abs().max()) <= allowed


@pytest.mark.parametrize("kinds", [*COVER, *OTHER_METHODS[:2], "simsiam, no predictor"], ids=str)
def test_one_graph_takes_the_eager_step(kinds: tuple[str, str, bool, str] | str) -> None:
    """Traced whole, forward and backward, with torch's kernels: fullgraph would raise at a break.

    Compiling takes steps and leaves the state, with its queue, as it was.
    """
    config = config_of(kinds)
    exact, eager, traced = states = [
        TrainState.create(c, steps_per_epoch=2) for c in (fp64(config), config, config)
    ]
    forward = capture.compiled_forward("aot_eager")
    capture.Eager(traced, config, forward).prepare(batch_of(0), 0)
    assert_equal_states(eager, traced)
    for collapsed in (False, True)[: 1 if isinstance(kinds, str) else 2]:
        for state in states if collapsed else ():
            collapse(state)
        for step in range(3):
            pair = some_views(step)
            train_step(exact, pair)
            expected, got = (
                train_step(eager, pair.float()),
                train_step(traced, pair.float(), forward),
            )
            torch.testing.assert_close(got.values, expected.values, rtol=1e-3, atol=1e-5)
        assert_near(exact, eager, traced)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_code_compiled_once_serves_a_whole_schedule() -> None:
    """lr, tau and the step are tensors: 300 epochs, 7 scheduled, run the first step's code.

    It is as near to fp64 as eager steps are, healthy and collapsed, and memory stays flat.
    """
    config = load_config("blog", [*TINY, *ALL_KINDS, "schedule.horizon_epochs=7"])
    exact, eager, compiled = states = [
        TrainState.create(c, steps_per_epoch=1) for c in (fp64(config), config, config)
    ]
    forward = capture.compiled_forward()
    for collapsed in (False, True):
        for state in states if collapsed else ():
            collapse(state)
        for step in range(2):
            pair = some_views(step, batch=8)
            for state in (exact, eager):
                train_step(state, pair)
            train_step(compiled, pair, forward)
        assert_near(exact, eager, compiled)
    resident, pair = [], some_views(0, batch=8)
    for _epoch in range(300):
        train_step(compiled, pair, forward)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert int(compiled.step) == 304
    # A leak of 40 kB a step would show.
    assert max(resident[30:]) <= 1.01 * resident[30]


def assert_cut_and_whole_agree(config: Config, folder: Path) -> None:
    """Resume a run that lost all but its first checkpoint, and compare the bytes."""
    api.train(config, folder / "whole")
    shutil.copytree(folder / "whole", folder / "cut")
    checkpoints = sorted((folder / "cut" / "checkpoints").glob("*"))
    assert len(checkpoints) > 2
    for path in checkpoints[1:]:
        path.unlink()
    api.resume(folder / "cut")
    names = [f"checkpoints/{checkpoints[-1].name}", "metrics.jsonl", "layers.npy"]
    assert all(
        (folder / "whole" / name).read_bytes() == (folder / "cut" / name).read_bytes()
        for name in names
    )


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """And the probe at an epoch's end, which takes the encoder out of training and back, makes
    nothing compile again.
    """
    sets = (*ALL_KINDS, "engine.mode=compile", "train.epochs=2", "run.checkpoint_every_steps=4")
    assert_cut_and_whole_agree(tiny_config(beton_files(tmp_path), *sets), tmp_path)
    assert checkpoint.load_latest(tmp_path / "cut" / "checkpoints").meta["engine"] == "compile"


def test_a_run_under_auto_goes_on_in_the_mode_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(beton_files(tmp_path), "train.epochs=1")
    assert config.engine.mode == "auto"
    api.train(config, tmp_path / "run")
    chosen: list[capture.Choice] = []
    engine = capture.engine

    def remember(state: TrainState, config: Config, choice: capture.Choice) -> capture.Engine:
        chosen.append(choice)
        return engine(state, config, choice)

    monkeypatch.setattr(capture, "engine", remember)
    api.resume(tmp_path / "run")
    assert chosen == [capture.Choice("eager", "as the run's steps before")]


def test_compiling_is_left_at_once_when_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes up to minutes, and nothing is lost: the run then starts as if nothing had been."""

    def endless(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on compiling")

    class Listener(Silent):
        text = ""

        def note(self, text: str) -> None:
            self.text += text

    config = tiny_config(beton_files(tmp_path), "engine.mode=compile", "train.epochs=1")
    listener = Listener()
    with monkeypatch.context() as patched:
        patched.setattr(capture, "compiled_forward", lambda **_: endless)
        summary = api.train(config, tmp_path / "stopped", observer=listener)
    assert (summary.finished, summary.step) == (False, 0)
    assert "SIGTERM: stopped before a step was made; go on with" in listener.text
    monkeypatch.setattr(capture, "compiled_forward", lambda **_: plain_forward)
    api.resume(tmp_path / "stopped")
    api.train(config, tmp_path / "whole")
    assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


class Reads(TorchDispatchMode):
    """Operations that wait for a GPU, because a number or a size goes to the host."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or name.lstrip("_").startswith(self.WAIT) or name in self.WAIT:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kinds", [*COVER, *OTHER_METHODS], ids=str)
def test_no_step_reads_the_device(kinds: tuple[str, str, bool, str] | str) -> None:
    """From the views on, in plain torch: a cpu's kernels need not avoid it."""
    plain = EngineConfig(kernels="reference")
    state = TrainState.create(
        config_of(kinds).model_copy(update={"engine": plain}), steps_per_epoch=2
    )
    with Reads() as reads:
        for step in range(2):
            train_step(state, some_views(step))
        assert not reads.seen
        assert bool(state.step == 2)
    assert reads.seen == ["_local_scalar_dense"]


def batch_of(step: int, count: int = 6, device: torch.device = CPU) -> Batch:
    g = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (count, 20, 20, 3), generator=g, dtype=torch.uint8)
    return Batch(images.to(device), (torch.arange(count) + 100 * step).to(device))


def small_views(config: Config) -> Config:
    return config.model_copy(update={"views": views.ViewsConfig(size=16)})


class Tape:
    """A recorder like a GPU's: the captured step does not run, and a replay writes in place."""

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


@pytest.mark.parametrize("kinds", [*COVER[:2], *OTHER_METHODS], ids=str)
def test_recording_leaves_no_trace(kinds: tuple[str, str, bool, str] | str) -> None:
    """All tensors go back to before the warm-up; each batch and epoch reaches the tape."""
    config = config_of(kinds)
    eager, taped = (TrainState.create(config, steps_per_epoch=2) for _ in range(2))
    tape = Tape(taped)
    plain, recorded = (
        capture.Eager(eager, config),
        capture.Captured(capture.Eager(taped, config), tape),
    )
    for step in range(4):
        expected, got = plain(batch_of(step), step // 2), recorded(batch_of(step), step // 2)
        assert torch.equal(expected.values, got.values)
        assert torch.equal(expected.layers, got.layers)
    assert_equal_states(eager, taped)
    assert tape.recordings == 1


def test_a_graph_reads_a_resident_set_where_it_lies(small: tuple[TrainState, Config]) -> None:
    """Batches change in the set itself, as rows of it; another set, or none, is refused."""
    config = small[1]
    states = [TrainState.create(config, steps_per_epoch=2) for _ in range(2)]
    plain = capture.Eager(states[0], config)
    recorded = capture.Captured(capture.Eager(states[1], config), Tape(states[1]))
    resident = torch.zeros(10, 20, 20, 3, dtype=torch.uint8)
    for step in range(3):
        batch = batch_of(step)
        rows = torch.randperm(10, generator=torch.Generator().manual_seed(step))[: len(batch.ids)]
        resident[rows] = batch.images
        got = recorded(Batch(resident, batch.ids, rows), step)
        assert torch.equal(plain(batch, step).values, got.values)
    assert_equal_states(*states)
    for other in (batch, Batch(resident.clone(), batch.ids, rows)):
        with pytest.raises(ValueError, match="not the set that the graph was captured with"):
            recorded(other, 3)


# An error of every family that Triton, Inductor, Dynamo, CUDA and their programs raise, and its
# message.
FAILURES: tuple[tuple[Exception, str], ...] = (
    (
        CompilationError("def kernel():\n    x", None, "no such operation\nmore"),
        "CompilationError: no such operation",
    ),
    (
        OutOfResources(300_000, 232_448, "shared memory"),
        "OutOfResources: out of resource: shared memory, Required: 300000",
    ),
    (PTXASError("ptxas failed\nlog"), "PTXASError: ptxas failed"),
    (
        NoTritonConfigsError("No valid triton configs"),
        "NoTritonConfigsError: No valid triton configs",
    ),
    (
        InductorError(ValueError("bad\nmore"), inspect.currentframe()),
        "InductorError: ValueError: bad",
    ),
    (
        LoweringException(ValueError("bad"), "aten.add", [], {}),
        "LoweringException: ValueError: bad",
    ),
    (CppCompileError(["g++"], "log"), "CppCompileError: C++ compile error"),
    (
        BackendCompilerFailed(plain_forward, ValueError("bad"), None),
        "BackendCompilerFailed: backend='forward' raised:",
    ),
    (InternalTorchDynamoError("assert"), "InternalTorchDynamoError: assert"),
    (Unsupported("graph break\nmore"), "Unsupported: graph break"),
    (FailOnRecompileLimitHit("limit"), "FailOnRecompileLimitHit: limit"),
    (torch.AcceleratorError("CUDA error: invalid\nmore"), "AcceleratorError: CUDA error: invalid"),
    (
        RuntimeError("operation not permitted when stream is capturing\nmore"),
        "RuntimeError: operation not permitted when",
    ),
    (
        subprocess.CalledProcessError(1, ["gcc"]),
        "CalledProcessError: Command '['gcc']' returned non-zero exit status 1.",
    ),
    (
        FileNotFoundError(2, "No such file", "ptxas"),
        "FileNotFoundError: [Errno 2] No such file: 'ptxas'",
    ),
    (AssertionError(), "AssertionError"),
)
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    torch.AcceleratorError("CUDA error: out of memory\nmore"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    InductorError(torch.OutOfMemoryError("CUDA out of memory."), inspect.currentframe()),
)
# A compiler's error after a Ctrl-C.
INTERRUPTED = InductorError(ValueError("bad"), inspect.currentframe())
INTERRUPTED.__cause__ = KeyboardInterrupt()


def failing(error: BaseException) -> capture.Recorder:
    def record(work: Callable[[], StepMetrics]) -> tuple[StepMetrics, Callable[[], None]]:
        work()
        raise error

    return record


@pytest.fixture(scope="module")
def small() -> tuple[TrainState, Config]:
    config = small_views(fp32("bn", "bn", False, "sgd"))
    return TrainState.create(config, steps_per_epoch=2), config


@pytest.mark.parametrize(("error", "message"), FAILURES, ids=lambda value: type(value).__name__)
def test_a_failure_gives_one_line_and_leaves_the_state_alone(
    small: tuple[TrainState, Config], error: Exception, message: str
) -> None:
    state, config = small
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}

    def refuse(*_: object) -> Any:
        raise error

    eager = capture.Eager(state, config)
    graph = f"no CUDA graph ({message}"
    for engine, kind, begin, end in (
        (capture.Captured(eager, failing(error), falls_back=True), NoGraphError, graph, ")"),
        (
            capture.Captured(eager, failing(error)),
            FastbyolError,
            f"engine.mode: {graph}",
            "): take --engine compile, or eager",
        ),
        (
            capture.Eager(state, config, refuse),
            FastbyolError,
            f"engine.mode: torch.compile failed ({message}",
            "take --engine eager",
        ),
    ):
        with pytest.raises(kind) as raised:
            engine.prepare(batch_of(0), 0)
        line = str(raised.value)
        assert type(raised.value) is kind
        assert line.startswith(begin)
        assert line.endswith(end)
        assert "\n" not in line
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())


@pytest.mark.parametrize(
    "error",
    [*OUT_OF_MEMORY, UsageError("one line"), KeyboardInterrupt(), INTERRUPTED],
    ids=lambda e: type(e).__name__,
)
def test_out_of_memory_ctrl_c_and_our_own_errors_pass_through(
    small: tuple[TrainState, Config], error: BaseException
) -> None:
    def refuse(*_: object) -> Any:
        raise error

    eager = capture.Eager(*small)
    for engine in (
        capture.Captured(eager, failing(error), falls_back=True),
        capture.Eager(*small, refuse),
    ):
        with pytest.raises(type(error)) as raised:
            engine.prepare(batch_of(0), 0)
        assert raised.value is error


def test_a_device_that_refuses_more_after_an_error_does_not_hide_it(
    small: tuple[TrainState, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(TrainState, "load_tensors", refuse)
    with pytest.raises(NoGraphError, match="no such operation"):
        capture.Captured(capture.Eager(*small), failing(FAILURES[0][0]), falls_back=True).prepare(
            batch_of(0), 0
        )


class BrokenCapture:
    """A torch.cuda.graph after a captured operation has failed: its end raises, too."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        raise torch.AcceleratorError(
            "CUDA error: operation failed due to a previous error during capture"
        )


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OUT_OF_MEMORY[0], FAILURES[0][0]], ids=lambda e: type(e).__name__
)
def test_the_error_of_a_recording_is_the_one_that_made_it_fail(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    for name in ("Stream", "stream", "current_stream", "synchronize", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", BrokenCapture)
    results: Iterator[Any] = iter([None] * capture.WARM_UP_STEPS)

    def work() -> StepMetrics:
        for result in results:
            return result
        raise error

    with pytest.raises(type(error)) as raised:
        capture.record_cuda(work)
    assert raised.value is error
    with pytest.raises(torch.AcceleratorError, match="previous error"):
        capture.record_cuda(lambda: StepMetrics(torch.ones(1), torch.ones(1)))


@pytest.mark.parametrize("mode", ["eager", "compile", "graph"])
def test_every_mode_on_a_gpu_takes_cudnns_deterministic_algorithms(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A resumed run's bits depend on them."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    state: Any = SimpleNamespace(ranks=Alone(), step=gpu, kernels="reference")
    assert capture.engine(state, Config(), capture.Choice(mode, "")).mode == mode
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)


def test_a_cpu_leaves_cudnn_alone(
    monkeypatch: pytest.MonkeyPatch, small: tuple[TrainState, Config]
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    capture.engine(*small, capture.Choice("eager", ""))
    assert not torch.backends.cudnn.deterministic


def test_inductor_chooses_by_rule_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiles, asked = torch.compile, list[dict[str, Any]]()

    def remember(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        asked.append(options)
        compiles(function, **options)  # which refuses options that this torch has not
        return lambda *_: "done"

    monkeypatch.setattr(torch, "compile", remember)
    monkeypatch.setattr(capture, "_compiled", capture._compiled.__wrapped__)
    nets: Any = SimpleNamespace(config=Config().model)
    for on_gpu, backend, deterministic in (
        (True, "inductor", True),
        (True, "inductor", False),
        (False, "inductor", True),
    ):
        batch: Any = SimpleNamespace(
            shape=(2, 3, 8, 8), dtype=torch.float32, device="of any kind", is_cuda=on_gpu
        )
        assert (
            capture.compiled_forward(backend, deterministic=deterministic)(
                nets, nets, batch, Objective()
            )
            == "done"
        )
    assert [call["options"] for call in asked] == [capture.inductor_options(), None, None]


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
    # auto goes on as before, but for a graph that has lost its GPU.
    assert capture.choose(config("auto"), gpu, before="eager")[::2] == ("eager", False)
    assert capture.choose(config("auto"), gpu, before="graph")[::2] == ("graph", True)
    assert capture.choose(config("auto"), CPU, before="compile").mode == "compile"
    assert capture.choose(config("auto"), CPU, before="graph").mode == "eager"


def test_a_failed_compilation_gives_one_line(small: tuple[TrainState, Config]) -> None:
    """By Dynamo itself, and a backend that refuses."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no compiler\nfound")

    engine = capture.Eager(*small, capture.compiled_forward(refuse))
    with pytest.raises(
        FastbyolError, match=r"torch.compile failed \(BackendCompilerFailed.*take --engine eager$"
    ) as raised:
        engine.prepare(batch_of(0), 0)
    assert "\n" not in str(raised.value)


class Counter:
    """A backend of torch.compile that counts graphs and changes nothing."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.compiled += 1
        return graph.forward


def test_a_network_is_compiled_once_in_a_process_and_no_state_is_kept_by_it() -> None:
    """For another seed and another run, and after others; and each has room of its own:

    Dynamo's limit is of eight variants.
    """
    backend, gone = Counter(), list[weakref.ref[Any]]()

    def run(config: Config, batch: int = 6) -> int:
        state = TrainState.create(config, steps_per_epoch=2)
        eager = TrainState.create(config, steps_per_epoch=2)
        forward = capture.compiled_forward(backend)
        for step in range(2):
            pair = some_views(step, batch=batch).float()
            # A graph may accumulate a gradient's parts in another order.
            torch.testing.assert_close(
                train_step(state, pair, forward).values,
                train_step(eager, pair).values,
                rtol=1e-4,
                atol=0,
            )
        gone.extend(
            map(weakref.ref, (state.online, state.target, state.arena.online, state.arena.gradient))
        )
        return backend.compiled

    first, other = fp32("bn", "brn", True, "sgd"), fp32("gn", "bn", True, "blog")
    with torch._dynamo.config.patch(recompile_limit=1):
        assert [
            run(first),
            run(first.model_copy(update={"train": first.train.model_copy(update={"seed": 1})})),
        ] == [1, 1]
        assert [run(other), run(first), run(other)] == [2, 2, 2]
        assert [run(first, batch=4), run(first), run(first, batch=4)] == [3, 3, 3]
    gc.collect()
    assert len(gone) == 32
    assert not [each() for each in gone if each() is not None]


def test_no_more_than_most_networks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a forward pass of one operation, which compiles in no time."""

    def double(
        online: object, target: object, batch: torch.Tensor, objective: Objective, queue: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return batch * objective.loss_scale, batch

    monkeypatch.setattr(capture, "forward", double)
    backend, nets = Counter(), SimpleNamespace(config=Config().model)
    double_compiled: Any = capture.compiled_forward(backend)
    for scale in (*range(capture.MOST_NETWORKS + 1), 1, 0):  # the last one was forgotten
        assert double_compiled(nets, nets, torch.ones(2), Objective(loss_scale=float(scale)))[
            0
        ].tolist() == [scale, scale]
    assert capture._compiled.cache_info().currsize == capture.MOST_NETWORKS == backend.compiled - 2


@pytest.mark.gpu(only=True)
@pytest.mark.parametrize("kinds", [*COVER, "contrastive, odd queue", "simsiam"], ids=str)
def test_a_graph_takes_the_compiled_step(kinds: tuple[str, str, bool, str] | str) -> None:
    """Bit for bit, without waiting for the device and without allocating; and both are as near to
    fp64 as eager steps are.
    """
    device = torch.device("cuda", 0)
    config = config_of(kinds)
    capture.make_cudnn_deterministic(device)
    exact, eager, compiled, graphed = states = [
        TrainState.create(c, steps_per_epoch=2, device=device)
        for c in (fp64(config), config, config, config)
    ]
    forward = capture.compiled_forward()
    graph = capture.Captured(capture.Eager(graphed, config, forward), capture.record_cuda)
    others = (
        capture.Eager(exact, fp64(config)),
        capture.Eager(eager, config),
        capture.Eager(compiled, config, forward),
    )
    for collapsed in (False, True):
        for state in states if collapsed else ():
            collapse(state)
        for step in range(2):
            batch = batch_of(step, device=device)
            graph.prepare(batch, step)
            torch.cuda.synchronize()
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            torch.cuda.set_sync_debug_mode("error")
            try:
                graph(batch, step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
            for engine in others:
                engine(batch, step)
        assert_equal_states(compiled, graphed)
        assert_near(exact, eager, graphed)


@pytest.mark.gpu(only=True)
def test_a_graphed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    sets = (
        "engine.mode=graph",
        "train.device=cuda",
        "train.epochs=2",
        "run.checkpoint_every_steps=4",
    )
    assert_cut_and_whole_agree(tiny_config(beton_files(tmp_path), *sets), tmp_path)
