"""How a step is executed: eagerly, compiled, or as one CUDA graph over compiled regions.

All three draw the views of a batch and take the same ``train_step``. Under ``compile`` both forward passes with the loss, and
their backward pass, are one graph of torch.compile without a break; views and optimizer are single operations already. A CUDA
graph holds all of it, from the views to the optimizer, so that a step is one launch. What changes from step to step is on the
device: the batch and the epoch in buffers that stay, the schedules in tables that the state's own step counter indexes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastbyol import views
from fastbyol.config import Config, EngineConfig
from fastbyol.data.loader import Batch
from fastbyol.engine.guards import is_out_of_memory
from fastbyol.engine.step import Forward, StepMetrics, TrainState, forward, train_step
from fastbyol.errors import FastbyolError, UsageError

# torch.cuda.graph's documentation asks for a few; the first compiles and tunes.
WARM_UP_STEPS = 3
# bench/LOG.md, "The engine's own step under torch.compile": .88 s a step eager, 1.27 s compiled after 55 s of compiling, so
# that no run is long enough for it to pay.
EAGER_ON_A_PROCESSOR = "compiled steps were slower on a processor, .7 of the speed, after a minute of compiling"


class Choice(NamedTuple):
    """A mode, eager, compile or graph, and the reason for it, in words. ``falls_back``: eager where it cannot be done."""

    mode: str
    why: str
    falls_back: bool = False


class Engine(Protocol):
    """Takes the next step on a batch, whose epoch says which views are drawn. Never waits for the device."""

    def __call__(self, batch: Batch, epoch: int) -> StepMetrics: ...

    def prepare(self, batch: Batch, epoch: int) -> None:
        """Compile and record for batches like this one: it may take minutes, can be done again, and leaves the state alone."""

    @property
    def mode(self) -> str:
        """How steps are taken, once prepared: eager, compile or graph."""


class Recorder(Protocol):
    """Runs ``work`` a few times and records it once more: what it returned then, and the call that does it again in place."""

    def __call__(self, work: Callable[[], StepMetrics]) -> tuple[StepMetrics, Callable[[], None]]: ...


def choose(config: EngineConfig, device: torch.device, *, before: str | None = None) -> Choice:
    """The mode that a run on ``device`` takes.

    ``before`` is the mode of the run's steps until now, which ``auto`` keeps where it can: another rounds differently. Raises
    UsageError where a mode was asked for that cannot be had.
    """
    on_gpu = device.type == "cuda"
    if config.mode == "graph" and not on_gpu:
        raise UsageError(f"engine.mode: graph needs a CUDA device, the run is on {device}: take --engine eager or compile")
    if config.mode != "auto":
        return Choice(config.mode, "as asked for")
    if before is not None and (before != "graph" or on_gpu):
        return Choice(before, "as the run's steps before")
    if on_gpu:
        return Choice("graph", "a GPU waits for launches otherwise", falls_back=True)
    return Choice("eager", EAGER_ON_A_PROCESSOR)


def engine(state: TrainState, config: Config, choice: Choice, note: Callable[[str], None]) -> Engine:
    """What takes the steps of ``state``. ``note`` is told of a graph that could not be had."""
    if choice.mode == "eager":
        return Eager(state, config)
    settle_cudnn(state.step.device)
    compiled = Eager(state, config, compiled_forward())
    if choice.mode == "compile":
        return compiled
    return Captured(compiled, record_cuda, Eager(state, config) if choice.falls_back else None, note)


def compiled_forward(backend: str = "inductor") -> Forward:
    """``step.forward`` under torch.compile, in one graph. Forgets what was compiled before: one network at a time."""
    torch.compiler.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)

    def checked(*arguments: Any) -> tuple[Tensor, Tensor]:
        try:
            return compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise FastbyolError(f"engine.mode: torch.compile failed ({_first_line(error)}): take --engine eager") from error

    return checked


class Eager:
    """Operation by operation, or with a compiled ``forward``."""

    def __init__(self, state: TrainState, config: Config, compiled: Forward | None = None) -> None:
        self.state = state
        self.mode = "eager" if compiled is None else "compile"
        self._views, self._seed, self._forward = config.views, config.train.seed, compiled or forward

    def prepare(self, batch: Batch, epoch: int) -> None:
        """Take a compiled step once, and take it back."""
        if self.mode == "compile":
            with kept(self.state):
                self(batch, epoch)

    def __call__(self, batch: Batch, epoch: int | Tensor) -> StepMetrics:
        pair = views.two_views(
            self._views,
            batch.images,
            batch.ids,
            seed=self._seed,
            epoch=epoch,
            dtype=self.state.recipe.views_dtype,
            kernels=self.state.kernels,
        )
        return train_step(self.state, pair, self._forward)


class Captured:
    """A recorded step, played back; where it cannot be recorded, steps of ``fallback``, if there is one."""

    def __init__(self, inner: Eager, record: Recorder, fallback: Engine | None, note: Callable[[str], None]) -> None:
        self._inner, self._record, self._fallback, self._note = inner, record, fallback, note
        self._play: Callable[[], None] | None = None
        self._instead: Engine | None = None

    @property
    def mode(self) -> str:
        """graph, or the fallback's."""
        return self._instead.mode if self._instead is not None else "graph"

    def __call__(self, batch: Batch, epoch: int) -> StepMetrics:
        self.prepare(batch, epoch)
        if self._instead is not None:
            return self._instead(batch, epoch)
        assert self._play is not None
        self._batch.images.copy_(batch.images)
        self._batch.ids.copy_(batch.ids)
        self._epoch.fill_(epoch)
        self._play()
        return self._metrics

    def prepare(self, batch: Batch, epoch: int) -> None:
        """Warm up and record, once. Raises FastbyolError where that fails and there is nothing to fall back on."""
        if self._play is not None or self._instead is not None:
            return
        self._batch = Batch(batch.images.clone(), batch.ids.clone())
        self._epoch = torch.full((), epoch, dtype=torch.int64, device=batch.ids.device)
        try:
            with kept(self._inner.state):
                self._metrics, self._play = self._record(lambda: self._inner(self._batch, self._epoch))
        except (RuntimeError, FastbyolError) as error:
            if is_out_of_memory(error):
                raise
            if self._fallback is None:
                raise FastbyolError(f"engine.mode: no CUDA graph ({_first_line(error)}): take --engine eager") from error
            self._instead = self._fallback
            self._note(f"no CUDA graph ({_first_line(error)}): steps are taken eagerly")


@contextmanager
def kept(state: TrainState) -> Iterator[None]:
    """Bring ``state`` back to what it was, whatever happens inside."""
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    try:
        yield
    finally:
        state.load_tensors(saved)


def record_cuda(work: Callable[[], StepMetrics]) -> tuple[StepMetrics, Callable[[], None]]:
    """Warm up and record ``work`` on a stream of its own, as torch.cuda.graph asks for it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: the loader's threads may allocate meanwhile.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        metrics = work()
    return metrics, graph.replay


def settle_cudnn(device: torch.device) -> None:
    """Let cuDNN take algorithms that give the same bits every time, chosen by rule: a benchmark's choice would change from
    process to process, and with it the bits of a resumed run. Process-wide."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else type(error).__name__
