"""How a step is executed: eagerly, compiled, or as one CUDA graph over compiled regions.

All three draw the views of a batch and take the same ``train_step``. Under ``compile`` both forward passes with the loss, and
their backward pass, are one graph of torch.compile without a break; views and optimizer are single operations already. A CUDA
graph holds all of it, from the views to the optimizer, so that a step is one launch. What changes from step to step is on the
device: the batch and the epoch in buffers that stay, the schedules in tables that the state's own step counter indexes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastbyol import views
from fastbyol.config import Config, EngineConfig
from fastbyol.data.loader import Batch
from fastbyol.engine import interrupt
from fastbyol.engine.guards import is_out_of_memory
from fastbyol.engine.step import Forward, StepMetrics, TrainState, forward, train_step
from fastbyol.errors import FastbyolError, NoGraphError, UsageError
from fastbyol.model.byol import Online, Target
from fastbyol.model.objective import Objective

# torch.cuda.graph's documentation asks for a few; the first compiles and tunes.
WARM_UP_STEPS = 3
# Networks whose compiled forward a process keeps. The ablations go through their arms once per seed, and have ten networks.
MOST_NETWORKS = 16
# bench/LOG.md, "The engine's own step under torch.compile": .88 s a step eager, 1.27 s compiled after 55 s of compiling, so
# that no run is long enough for it to pay.
EAGER_ON_A_CPU = "compiled steps were slower on a CPU, .7 of the speed, after a minute of compiling"


class Choice(NamedTuple):
    """A mode, eager, compile or graph, and the reason for it, in words. ``falls_back``: to compile where it cannot be done."""

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
        return Choice(before, "as the run's steps before", falls_back=before == "graph")
    if on_gpu:
        return Choice("graph", "a GPU waits for launches otherwise", falls_back=True)
    return Choice("eager", EAGER_ON_A_CPU)


def engine(state: TrainState, config: Config, choice: Choice) -> Engine:
    """Return what takes the steps of ``state``. Sets cuDNN's switches for the process where the state is on a GPU."""
    make_cudnn_deterministic(state.step.device)  # in every mode: a resumed run's bits depend on it
    if choice.mode == "eager":
        return Eager(state, config)
    compiled = Eager(state, config, compiled_forward())
    return compiled if choice.mode == "compile" else Captured(compiled, record_cuda, falls_back=choice.falls_back)


def compiled_forward(backend: str | Callable[..., Any] = "inductor", *, deterministic: bool = True) -> Forward:
    """Return ``step.forward`` under torch.compile, in one graph, for any network and batch.

    What was compiled for a network, a batch's shape and dtype, a device and a backend serves every state of the kind for as
    long as the process lives, and keeps none of them alive. On CUDA Inductor is kept from choices that depend on timing and
    change bits; ``deterministic=False`` lets it, to measure what that costs.
    """

    def chosen(
        online: Online, target: Target, batch: Tensor, objective: Objective, queue: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        num_keys = 0 if queue is None else len(queue)
        network = (online.config, batch.shape, batch.dtype, batch.device, objective, num_keys)
        timed = not (deterministic and batch.is_cuda and backend == "inductor")
        return _compiled(network, backend, timed)(online, target, batch, objective, queue)

    return chosen


@lru_cache(maxsize=MOST_NETWORKS)
def _compiled(network: Hashable, backend: str | Callable[..., Any], timed: bool) -> Forward:
    """``step.forward`` compiled for ``network`` and for what else Dynamo finds in it: its guards decide, not this key.

    Dynamo keeps what it compiles with the code object, eight variants at most (``recompile_limit``), and tries the guards of
    one after the other: each network has a code object of its own, with which all of it goes.
    """
    own = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
    # Inductor times the tilings of its kernels and keeps the answer in a temporary folder. For pointwise kernels they give the
    # same bits, for reductions not; ``deterministic`` (torch 2.11 to 2.15) takes those by rule, leaves padded products alone,
    # and holds for the backward pass, too, which is compiled after this call.
    options: dict[str, Any] | None = None if timed else {"deterministic": True}
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)


class Eager:
    """Operation by operation, or with a compiled ``forward``."""

    def __init__(self, state: TrainState, config: Config, compiled: Forward | None = None) -> None:
        self.state = state
        self.mode = "eager" if compiled is None else "compile"
        self._views, self._seed, self._forward = config.views, config.train.seed, compiled or forward

    def prepare(self, batch: Batch, epoch: int) -> None:
        """Take a compiled step once, and take it back. Raises FastbyolError where that fails."""
        if self.mode == "compile":
            try:
                with kept(self.state):
                    self(batch, epoch)
            except Exception as error:
                _refuse_foreign(error)
                raise FastbyolError(f"engine.mode: torch.compile failed ({_first_line(error)}): take --engine eager") from error

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
    """A recorded step, played back. ``falls_back``: where it cannot be recorded, its user can start again in another mode."""

    mode = "graph"

    def __init__(self, inner: Eager, record: Recorder, *, falls_back: bool = False) -> None:
        self._inner, self._record, self._falls_back = inner, record, falls_back
        self._play: Callable[[], None] | None = None

    def __call__(self, batch: Batch, epoch: int) -> StepMetrics:
        self.prepare(batch, epoch)
        self._batch.images.copy_(batch.images)
        self._batch.ids.copy_(batch.ids)
        self._epoch.fill_(epoch)
        self.replay()
        return self._metrics

    def replay(self) -> None:
        """Take the recorded step once more, on the batch of the last."""
        assert self._play is not None
        self._play()

    def prepare(self, batch: Batch, epoch: int) -> None:
        """Warm up and record, once. Raises NoGraphError where that fails and falls back, else FastbyolError.

        Nothing more is to be done on the device by a process in which it failed: before torch 2.12 the caching allocator
        still believes in the recording, and hands out its pool's memory.
        """
        if self._play is not None:
            return
        self._batch = Batch(batch.images.clone(), batch.ids.clone())
        self._epoch = torch.full((), epoch, dtype=torch.int64, device=batch.ids.device)
        try:
            with kept(self._inner.state):
                self._metrics, self._play = self._record(lambda: self._inner(self._batch, self._epoch))
        except Exception as error:
            _refuse_foreign(error)
            what = f"no CUDA graph ({_first_line(error)})"
            if self._falls_back:
                raise NoGraphError(what) from error
            raise FastbyolError(f"engine.mode: {what}: take --engine compile, or eager") from error


@contextmanager
def kept(state: TrainState) -> Iterator[None]:
    """Bring ``state`` back to what it was, whatever happens inside."""
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # a device that has failed may refuse, and its first error is the one that counts
            state.load_tensors(saved)
        raise
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
    graph, own = torch.cuda.CUDAGraph(), list[BaseException]()
    try:
        # thread_local: the loader's threads may allocate meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            try:
                metrics = work()
            except BaseException as error:
                own.append(error)
                raise
    except BaseException:
        if own:  # ending the capture raised another error, which says nothing and hides a Ctrl-C or a want of memory
            raise own[0] from own[0].__cause__
        raise
    return metrics, graph.replay


def make_cudnn_deterministic(device: torch.device) -> None:
    """Let cuDNN take algorithms that give the same bits every time, chosen by rule: a benchmark's choice would change from
    process to process, and with it the bits of a resumed run. Process-wide."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def _refuse_foreign(error: Exception) -> None:
    """Raise ``error`` again where no compiler or recorder is to blame: it is a Ctrl-C's, a want of memory, or said already.

    All others are: Triton, Inductor, Dynamo, CUDA and the programs that they call raise errors of a dozen families.
    """
    if isinstance(error, FastbyolError) or interrupt.behind(error) or is_out_of_memory(error):
        raise error


def _first_line(error: BaseException) -> str:
    """Say ``error`` in a line: its type and how its text begins.

    Triton's compiler begins with the kernel's source, and keeps what is wrong in ``error_message``.
    """
    said = str(getattr(error, "error_message", None) or error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0]}" if said else type(error).__name__
