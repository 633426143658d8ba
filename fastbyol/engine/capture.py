"""The execution of a step: eagerly, compiled, or as one CUDA graph over compiled regions.

``compile`` makes one graph of both forward passes and the loss, and one of their backward pass;
views and optimizer are single operations already. ``graph`` captures all of it into one launch.
With ``engine.overlap`` the passes and the loss are graphs of their own (``engine.overlap``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastbyol import views
from fastbyol.config import Config, EngineConfig
from fastbyol.data.loader import Batch
from fastbyol.engine import interrupt
from fastbyol.engine.guards import is_out_of_memory
from fastbyol.engine.overlap import PARTS, CudaSide, Parts, Side, overlapped
from fastbyol.engine.ranks import Ranks, Threads, agree
from fastbyol.engine.step import Forward, StepMetrics, TrainState, forward, train_step
from fastbyol.errors import FastbyolError, NoGraphError, UsageError
from fastbyol.model.byol import Online, Target
from fastbyol.model.objective import Objective

# torch.cuda.graph's documentation asks for a few; the first one compiles and tunes.
WARM_UP_STEPS = 3
# Networks whose compiled forward a process keeps. The ablations have ten, once per seed.
MOST_NETWORKS = 16
# Inductor times its kernels' tilings and keeps the answer in a temporary folder. Tilings change the
# bits of reductions, not of pointwise kernels; ``deterministic`` (torch 2.11 to 2.15) chooses those
# of reductions by rule, pads no products and holds for the backward pass, too. The reductions that
# are left to Inductor are over some 512 rows, too few for a second launch each.
INDUCTOR_OPTIONS: dict[str, Any] = {"deterministic": True, "split_reductions": False}


@cache
def inductor_options() -> dict[str, Any]:
    """Return torch.compile's options for a GPU."""
    # Imported here because it loads Inductor, which an eager run does not need.
    from fastbyol.engine.addends import Addends

    return INDUCTOR_OPTIONS | {"post_grad_custom_pre_pass": Addends()}


# No run is long enough for compiling to pay: .88 s a step eager, 1.27 s compiled after 55 s of
# compiling (bench/LOG.md, "The engine's own step under torch.compile").
EAGER_ON_A_CPU = "compiled steps were slower on a CPU, .7 of the speed, after a minute of compiling"

# A library's network need not be one graph; that of those that are one is not known to pay.
EAGER_FOREIGN = "another library's encoder need not compile: --engine compile tries"


class Choice(NamedTuple):
    """A mode (eager, compile or graph) and the reason for it, in words.

    With ``falls_back`` a run goes on in mode compile if capturing the graph fails.
    """

    mode: str
    why: str
    falls_back: bool = False


class Engine(Protocol):
    """A callable that takes the next step on a batch, with ``epoch``'s views, without waiting."""

    @property
    def mode(self) -> str:
        """The mode of its steps, once prepared: eager, compile or graph."""

    def prepare(self, batch: Batch, epoch: int) -> None:
        """Compile and capture for batches like this one, in minutes, and restore the state."""

    def __call__(self, batch: Batch, epoch: int) -> StepMetrics: ...


# Warms up and captures a function. Returns its outputs and a function that replays it in place.
Recorder = Callable[[Callable[[], StepMetrics]], tuple[StepMetrics, Callable[[], None]]]


def choose(
    config: EngineConfig,
    device: torch.device,
    *,
    before: str | None = None,
    ranks: Ranks | None = None,
    batch_size: int = 0,
    foreign: bool = False,
) -> Choice:
    """Choose the mode of a run on ``device``; ``foreign`` is whether its encoder is a library's.

    ``before`` is the mode of the run's earlier steps. ``auto`` keeps it if it can, because another
    one rounds differently. Raises UsageError for a configured mode that ``device`` lacks, or that
    ``ranks`` cannot share ``batch_size`` images in, and for ``overlap`` where there are no streams.
    """
    on_gpu = device.type == "cuda"
    if config.overlap and not on_gpu:
        raise UsageError(
            f"engine.overlap: streams are a CUDA device's, the run is on {device}: set it to false"
        )
    if config.overlap and ranks is not None and ranks.count > 1:
        # Two networks' batch norms would send their messages in the order of two streams.
        raise UsageError(
            f"engine.overlap: is for one rank, this run has {ranks.count}: set it to false"
        )
    lacks = None if ranks is None or config.mode == "eager" else _lacks(ranks, batch_size)
    if lacks is not None:
        if config.mode != "auto":
            raise UsageError(f"engine.mode: {config.mode} {lacks}, or take --engine eager")
        return Choice("eager", f"a graph {lacks}")
    if config.mode == "graph" and not on_gpu:
        raise UsageError(
            f"engine.mode: graph needs a CUDA device, the run is on {device}: take --engine eager "
            "or compile"
        )
    if config.mode != "auto":
        return Choice(config.mode, "as asked for")
    if before is not None and (before != "graph" or on_gpu):
        return Choice(before, "as the run's steps before", falls_back=before == "graph")
    if foreign:
        return Choice("eager", EAGER_FOREIGN)
    if on_gpu:
        return Choice("graph", "a GPU waits for launches otherwise", falls_back=True)
    return Choice("eager", EAGER_ON_A_CPU)


def _lacks(ranks: Ranks, batch_size: int) -> str | None:
    """Say what compiled steps of ``ranks`` need and what to do for it, or None if nothing."""
    if batch_size % ranks.count:
        # Compiled for other shapes, ranks might send their messages in another order.
        return (
            f"needs equal shares, and {ranks.count} ranks do not divide {batch_size} images: take "
            "another --batch-size"
        )
    if isinstance(ranks, Threads):
        # Two threads that trace at once: torch 2.11 ends the process, or hangs.
        return "needs a process for each rank, and some are threads: start as many"
    if ranks.count > 1 and not compiles_messages():
        return f"with several ranks needs torch 2.15, and this is {torch.__version__}: install that"
    return None


def compiles_messages() -> bool:
    """Tell whether torch compiles steps with messages in them rightly.

    Dynamo of 2.11 drops the gradient of ``batch_norm.moments``; those between were not tried.
    """
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)


def engine(state: TrainState, config: Config, choice: Choice) -> Engine:
    """Make the engine for the steps of ``state``; on a GPU set cuDNN's switches for the process."""
    make_cudnn_deterministic(state.step.device)  # in every mode: a resumed run's bits depend on it
    side = CudaSide() if config.engine.overlap else None
    if choice.mode == "eager":
        return Eager(state, config, eager=overlapped(side) if side else forward)
    compiled = Eager(state, config, compiled_forward(side=side))
    if choice.mode == "compile":
        return compiled
    record: Recorder = record_cuda
    if state.ranks.count > 1:
        record = partial(record_cuda, meet=lambda: agree(state.ranks, 0))
    return Captured(compiled, record, falls_back=choice.falls_back)


def compiled_forward(
    backend: str | Callable[..., Any] = "inductor",
    *,
    deterministic: bool = True,
    side: Side | None = None,
) -> Forward:
    """Return ``step.forward`` under torch.compile, in one graph, for any network and batch.

    With ``side`` each of its parts is a graph, and the target's pass overlaps on that stream.
    Compiled code is kept while the process lives, by network, batch shape and dtype, device and
    backend; it keeps no state alive. On CUDA Inductor may not make choices that depend on timing
    and change bits, unless ``deterministic`` is false (to measure what that costs).
    """

    def chosen(
        online: Online,
        target: Target,
        batch: Tensor,
        objective: Objective,
        queue: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        num_keys = 0 if queue is None else len(queue)
        network = (online.config, batch.shape, batch.dtype, batch.device, objective, num_keys)
        timed = not (deterministic and batch.is_cuda and backend == "inductor")
        made = _compiled(PARTS if side else (forward,), network, backend, timed)
        run = overlapped(side, Parts(*made)) if side else made[0]
        return run(online, target, batch, objective, queue)

    return chosen


@lru_cache(maxsize=MOST_NETWORKS)
def _compiled(
    functions: tuple[Callable[..., Any], ...],
    network: Hashable,
    backend: str | Callable[..., Any],
    timed: bool,
) -> tuple[Callable[..., Any], ...]:
    """Compile ``functions`` for ``network``, a key; Dynamo's own guards decide about reuse."""
    # Dynamo keeps at most eight variants (``recompile_limit``) with a code object and tries their
    # guards one after the other. So each network gets a code object, and frees all with it.
    own = (FunctionType(f.__code__.replace(), f.__globals__, f.__name__) for f in functions)
    options = None if timed else inductor_options()
    compiled = partial(
        torch.compile, fullgraph=True, dynamic=False, backend=backend, options=options
    )
    return tuple(map(compiled, own))


class Eager:
    """An engine that runs ``eager`` operation by operation, or a ``compiled`` forward."""

    def __init__(
        self,
        state: TrainState,
        config: Config,
        compiled: Forward | None = None,
        *,
        eager: Forward = forward,
    ) -> None:
        self.state = state
        self.mode = "eager" if compiled is None else "compile"
        self._views, self._forward = config.views, compiled or eager
        seed = config.train.seed
        self._seed: int | Tensor = seed
        if state.kernels == "triton":  # which would fill one in every step
            self._seed = torch.tensor(seed, device=state.step.device)

    def prepare(self, batch: Batch, epoch: int) -> None:
        """Take a compiled step and restore the state. Raises FastbyolError if that fails."""
        if self.mode == "compile":
            try:
                with kept(self.state):
                    self(batch, epoch)
            except Exception as error:
                _refuse_foreign(error)
                raise FastbyolError(
                    f"engine.mode: torch.compile failed ({_first_line(error)}): take --engine eager"
                ) from error

    def __call__(self, batch: Batch, epoch: int | Tensor) -> StepMetrics:
        pair = views.two_views(
            self._views,
            batch.images,
            batch.ids,
            rows=batch.rows,
            seed=self._seed,
            epoch=epoch,
            dtype=self.state.recipe.views_dtype,
            layout=self.state.recipe.views_layout,
            kernels=self.state.kernels,
        )
        return train_step(self.state, pair, self._forward)


class Captured:
    """An engine that captures a step and replays it.

    The batch and the epoch are copied into buffers that the graph reads; a resident set it reads
    where that lies. ``falls_back`` says whether the user can start again in another mode.
    """

    mode = "graph"

    def __init__(self, inner: Eager, record: Recorder, *, falls_back: bool = False) -> None:
        self._inner, self._record, self._falls_back = inner, record, falls_back
        self._play: Callable[[], None] | None = None

    def __call__(self, batch: Batch, epoch: int) -> StepMetrics:
        self.prepare(batch, epoch)
        if _resident(batch) is not _resident(self._batch):
            raise ValueError("batch: its images are not the set that the graph was captured with")
        torch._foreach_copy_(_copied(self._batch), _copied(batch))
        self._epoch.fill_(epoch)
        self.replay()
        return self._metrics

    def close(self) -> None:
        """Free the graph: with messages in it, it has to go before what sends them."""
        self._play = None

    def replay(self) -> None:
        """Take the captured step once more, on the last batch."""
        assert self._play is not None
        self._play()

    def prepare(self, batch: Batch, epoch: int) -> None:
        """Warm up and capture, once. Raises NoGraphError to fall back, or else FastbyolError.

        After a failure the process must do nothing more on the device: before torch 2.12 the
        caching allocator still hands out the failed graph's memory.
        """
        if self._play is not None:
            return
        own = [tensor.clone() for tensor in _copied(batch)]
        self._batch = Batch(*own) if batch.rows is None else Batch(batch.images, *own)
        self._epoch = torch.full((), epoch, dtype=torch.int64, device=batch.ids.device)
        failure: Exception | None = None
        try:
            with kept(self._inner.state):
                self._metrics, self._play = self._record(
                    lambda: self._inner(self._batch, self._epoch)
                )
        except Exception as error:
            _refuse_foreign(error)
            failure = error
        # If one rank cannot capture, none does.
        if not agree(self._inner.state.ranks, int(failure is not None)):
            return
        reason = "another rank has none" if failure is None else _first_line(failure)
        self._play, what = None, f"no CUDA graph ({reason})"
        if self._falls_back:
            raise NoGraphError(what) from failure
        raise FastbyolError(f"engine.mode: {what}: take --engine compile, or eager") from failure


def _resident(batch: Batch) -> Tensor | None:
    """Return the resident set that ``batch`` is rows of, or None."""
    return None if batch.rows is None else batch.images


def _copied(batch: Batch) -> list[Tensor]:
    """Return the tensors of ``batch`` that a graph has buffers for."""
    return [batch.images, batch.ids] if batch.rows is None else [batch.ids, batch.rows]


def release(engine: Engine) -> None:
    """Free what ``engine`` captured, while the ranks that its messages reach are together."""
    if isinstance(engine, Captured):
        engine.close()


@contextmanager
def kept(state: TrainState) -> Iterator[None]:
    """Restore ``state`` on leaving, whatever happens inside."""
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # a failed device may refuse; its first error counts
            state.load_tensors(saved)
        raise
    state.load_tensors(saved)


def record_cuda(
    work: Callable[[], StepMetrics], *, meet: Callable[[], object] = lambda: None
) -> tuple[StepMetrics, Callable[[], None]]:
    """Warm up and capture ``work`` on a side stream. Return its outputs and its replay.

    Between the two it calls ``meet``, which waits for the other ranks: none may still warm up, with
    messages under way, while another captures its own.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    meet()
    graph, first = torch.cuda.CUDAGraph(), list[BaseException]()
    try:
        # thread_local: the loader's threads may allocate meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            try:
                metrics = work()
            except BaseException as error:
                first.append(error)
                raise
    except BaseException:
        if first:  # the error of the capture's end would hide a Ctrl-C or that memory ran out
            raise first[0] from first[0].__cause__
        raise
    return metrics, graph.replay


def make_cudnn_deterministic(device: torch.device) -> None:
    """Make cuDNN choose its algorithms by rule, and only deterministic ones, for the process."""
    # A benchmark's choice would change from process to process, and a resumed run's bits with it.
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def _refuse_foreign(error: Exception) -> None:
    """Raise ``error`` again if it is a FastbyolError, comes from Ctrl-C or is out of memory.

    All others count as the compiler's: Triton, Inductor, Dynamo and CUDA raise a dozen families.
    """
    if isinstance(error, FastbyolError) or interrupt.behind(error) or is_out_of_memory(error):
        raise error


def _first_line(error: BaseException) -> str:
    """Return the type of ``error`` and the first line of its text."""
    # Triton's text begins with the kernel's source; ``error_message`` has what is wrong.
    text = str(getattr(error, "error_message", None) or error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
