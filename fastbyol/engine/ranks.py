"""The ranks that train one run together, and what they tell one another.

A logical rank has its share of every batch and all of the weights. There is one in a process, or
several in threads of it: what they compute depends on their number alone, since sums are taken in
the order of ranks and not as messages arrive. No other module imports torch.distributed.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastbyol.config import Config
from fastbyol.engine.interrupt import handling, signals_to_handle
from fastbyol.engine.ports import meet
from fastbyol.engine.worker import Worker, claim, leave_outcome, outcome, worker
from fastbyol.errors import FastbyolError, LostRankError, UsageError, one_line, size_text

T = TypeVar("T")
InThread = TypeVar("InThread", bound="Threads")
# The longest that a rank works alone while others wait: the first one's probe or its checkpoint.
PATIENCE = timedelta(hours=1)
SHARED_MEMORY = Path("/dev/shm")


class Ranks(Protocol):
    """The logical ranks of a run, of which this is number ``rank`` of ``count``.

    All must call the same methods in the same order. Each raises LostRankError if a rank is gone.
    """

    rank: int
    count: int

    def gather(self, x: Tensor) -> Tensor:
        """Stack ``x`` of every rank: the same bits on all, with a dimension more. Read it only."""

    def sum_(self, flat: Tensor) -> None:
        """Sum ``flat`` (N,) over the ranks, in place, as a fixed binary tree of them."""

    def copy_first_(self, x: Tensor) -> None:
        """Overwrite ``x`` with the first rank's."""

    def share(
        self, shape: Sequence[int], fill: Callable[[Tensor], None], device: torch.device
    ) -> Tensor:
        """Return a uint8 tensor that ``fill`` filled on the cpu, once per node, on ``device``.

        The memory is shared where it can be: do not write to it.
        """


class Alone:
    """One rank: nothing is sent."""

    rank, count = 0, 1

    def gather(self, x: Tensor) -> Tensor:
        """Return ``x`` as the only row."""
        return x.detach()[None]

    def sum_(self, flat: Tensor) -> None:
        """Leave ``flat`` as it is."""

    def every(self, value: T) -> list[T]:
        """Return ``value`` as that of the only process."""
        return [value]

    def total(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the sum of ``parts``, those of this process's ranks."""
        return tree(parts)

    def copy_first_(self, x: Tensor) -> None:
        """Leave ``x`` as it is."""

    def share(
        self, shape: Sequence[int], fill: Callable[[Tensor], None], device: torch.device
    ) -> Tensor:
        """Return a tensor that ``fill`` filled, on ``device``."""
        tensor = torch.empty(*shape, dtype=torch.uint8)
        fill(tensor)
        return tensor.to(device)


class Processes:
    """A rank for each process that torchrun started: gloo for cpu tensors, NCCL for CUDA's."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._on_gpu: dist.ProcessGroup | None = None

    def use(self, device: torch.device) -> None:
        """Prepare to send tensors of ``device``."""
        if device.type == "cuda" and self._on_gpu is None:
            with _reaching():
                # Named, the device's communicator is made now: a graph cannot capture its making.
                group = dist.new_group(backend="nccl", timeout=PATIENCE, device_id=device)
                assert isinstance(group, dist.ProcessGroup)  # all processes are members
                self._on_gpu = group
                dist.barrier(self._on_gpu, device_ids=[device.index or 0])

    def gather(self, x: Tensor) -> Tensor:
        """Stack ``x`` of every rank."""
        x = x.detach().contiguous()
        every = x.new_empty((self.count, *x.shape))
        with _reaching():
            dist.all_gather_into_tensor(
                every.view(-1, *x.shape[1:]) if x.ndim else every, x if x.ndim else x.view(1),
                group=self._group(x),
            )  # fmt: skip
        return every

    def sum_(self, flat: Tensor) -> None:
        """Sum ``flat`` over the ranks, in place."""
        flat.copy_(self.total([flat]))

    def total(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the sum over all ranks, of which ``parts`` (N,) are this process's.

        Each process sums a slice and sends it to all: as many bytes as a ring moves, in an order
        that does not depend on the number of processes.
        """
        if len(parts) & (len(parts) - 1) == 0:  # a whole branch of the tree, summed here
            parts = [tree(parts)]
        size = -(-len(parts[0]) // self.count)
        sent = parts[0].new_zeros(self.count, len(parts), size)
        for number, part in enumerate(parts):
            for peer, piece in enumerate(torch.split(part, size)):
                sent[peer, number, : len(piece)] = piece
        received, group = torch.empty_like(sent), self._group(sent)
        every = sent.new_empty(self.count * size)
        with _reaching():
            dist.all_to_all_single(received, sent, group=group)
            dist.all_gather_into_tensor(every, tree(received.flatten(0, 1)), group=group)
        return every[: len(parts[0])]

    def copy_first_(self, x: Tensor) -> None:
        """Overwrite ``x`` with the first rank's."""
        # Strided tensors, channels-last weights for example, are sent as plain ones.
        whole = x.detach().contiguous()
        with _reaching():
            dist.broadcast(whole, 0, group=self._group(whole))
        x.copy_(whole)

    def share(
        self, shape: Sequence[int], fill: Callable[[Tensor], None], device: torch.device
    ) -> Tensor:
        """Return a tensor that a node's first process filled, in a file in the node's memory."""
        here, name = worker() or Worker(), ""
        with ExitStack() as opened:
            if here.local_rank == 0:
                file = opened.enter_context(_reserve(prod(shape)))
                name = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            name = self.every(name)[self.rank - here.local_rank]
            flat = torch.from_file(name, shared=True, size=prod(shape), dtype=torch.uint8)
            self.every("opened")
        tensor = flat.view(*shape)
        if here.local_rank == 0:
            fill(tensor)
        self.every("filled")
        return tensor.to(device)

    def every(self, value: Any) -> list[Any]:
        """Return ``value`` of every process, in their order."""
        values: list[Any] = [None] * self.count
        with _reaching():
            dist.all_gather_object(values, value)
        return values

    def _group(self, x: Tensor) -> dist.ProcessGroup | None:
        return self._on_gpu if x.is_cuda else None


class Team:
    """The meeting place of the logical ranks that are threads of one process, within ``outer``."""

    def __init__(self, size: int, outer: Alone | Processes) -> None:
        self.size, self.outer = size, outer
        self.boxes: list[Any] = [None] * size
        self.result: Any = None
        self.barrier = threading.Barrier(size)

    def ranks(self) -> list[Threads]:
        """Return the ranks of the threads, the first for the thread that may send messages."""
        return [Threads(index, self) for index in range(self.size)]


class Threads:
    """A logical rank in a thread of its own. The first thread of a process sends its messages."""

    def __init__(self, index: int, team: Team) -> None:
        self._index, self._team = index, team
        self.rank, self.count = team.outer.rank * team.size + index, team.outer.count * team.size

    def _together(self, value: Any, work: Callable[[list[Any]], T]) -> T:
        """Return ``work`` of all threads' values, done by the first."""
        team = self._team
        team.boxes[self._index] = value
        try:
            team.barrier.wait()
            if self._index == 0:
                team.result = work(team.boxes)
            team.barrier.wait()
        except threading.BrokenBarrierError:
            raise LostRankError("another rank of this process failed") from None
        except BaseException:
            team.barrier.abort()
            raise
        result: T = team.result
        return result

    def gather(self, x: Tensor) -> Tensor:
        """Stack ``x`` of every rank."""
        outer = self._team.outer
        return self._together(
            x.detach(), lambda values: outer.gather(torch.stack(values)).flatten(0, 1)
        )

    def sum_(self, flat: Tensor) -> None:
        """Sum ``flat`` over the ranks, in place."""
        flat.copy_(self._together(flat, self._team.outer.total))

    def copy_first_(self, x: Tensor) -> None:
        """Overwrite ``x`` with the first rank's."""

        def first(values: list[Tensor]) -> Tensor:
            self._team.outer.copy_first_(values[0])
            return values[0]

        source = self._together(x, first)
        if source is not x:
            x.copy_(source)
        self._together(None, lambda _: None)  # the first one may change it again

    def share(
        self, shape: Sequence[int], fill: Callable[[Tensor], None], device: torch.device
    ) -> Tensor:
        """Return a tensor that a node's first rank filled, once per process on ``device``."""
        outer = self._team.outer
        return self._together(None, lambda _: outer.share(shape, fill, device))

    def abandon(self) -> None:
        """Tell the other threads that this one is gone."""
        self._team.barrier.abort()


def run_threads(ranks: Sequence[InThread], work: Callable[[InThread], T]) -> list[T]:
    """Return what ``work`` returns as each of a team's ``ranks``, the first one in this thread.

    Raises the first error once all threads have ended.
    """
    results, errors = dict[int, T](), list[BaseException]()

    def one(own: InThread) -> None:
        try:
            with current(own):
                results[own.rank] = work(own)
        except BaseException as error:
            errors.append(error)
            own.abandon()

    first, *others = ranks
    threads = [threading.Thread(target=one, args=(own,), daemon=True) for own in others]
    for thread in threads:
        thread.start()
    one(first)
    for thread in threads:
        thread.join()
    if errors:
        # That another rank is gone is no reason, unless it is in another process.
        raise min(errors, key=lambda error: isinstance(error, LostRankError))
    return [results[own.rank] for own in ranks]


def count_ranks(config: Config, num_processes: int, ranks: int | None = None) -> int:
    """Return how many logical ranks train ``config`` in so many processes.

    ``ranks`` replaces the configured number. Raises UsageError where the processes do not divide
    them, or where a rank would have too few images of a batch.
    """
    asked = ranks or config.train.ranks
    count, batch_size = asked or num_processes, config.train.batch_size
    if count % num_processes:
        raise UsageError(
            f"train.ranks: {count} ranks cannot be spread evenly over {num_processes} processes: "
            "take as many as divide them, or another number with --ranks, which rounds otherwise"
        )
    least = 2 if config.model.norm_scope == "rank" else 1
    if batch_size < least * count:
        raise UsageError(
            f"train.ranks: {count} ranks need {least * count} images a batch or more, and "
            f"train.batch_size is {batch_size}: take fewer --ranks or a larger --batch-size"
        )
    return count


def shares(total: int, count: int) -> tuple[int, ...]:
    """Return how many of ``total`` consecutive images each of ``count`` ranks has."""
    ends = [rank * total // count for rank in range(count + 1)]
    return tuple(end - start for start, end in pairwise(ends))


def tree(parts: Sequence[Tensor] | Tensor) -> Tensor:
    """Sum ``parts`` as a balanced binary tree: the first and the second, the third and so on."""
    level: list[Tensor] = list(parts)
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [a + b for a, b in pairs] + ([level[-1]] if len(level) % 2 else [])
    return level[0]


def agree(ranks: Ranks, value: int) -> int:
    """Return the largest ``value`` of the ranks. Waits for all: not for use within a step."""
    return int(ranks.gather(torch.tensor(value)).max())


def from_first(ranks: Ranks, value: T | None) -> T:
    """Return the first rank's ``value``; what the others pass is not looked at."""
    if ranks.count == 1:
        return value  # type: ignore[return-value]
    data = pickle.dumps(value) if ranks.rank == 0 else b""
    buffer = torch.zeros(agree(ranks, len(data)), dtype=torch.uint8)
    if ranks.rank == 0:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    ranks.copy_first_(buffer)
    # From a process of the same run, and read by no other.
    return value if ranks.rank == 0 else pickle.loads(buffer.numpy().tobytes())  # type: ignore[return-value]


def _reserve(num_bytes: int) -> IO[bytes]:
    """Make a file of ``num_bytes`` in the node's memory or, where that has no room, on a disk.

    It has no name, so that nothing stays once the last process is gone that has it open or mapped.
    """
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        with suppress(OSError), ExitStack() as opened:
            file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
            # A file without its blocks would end the process when the memory runs out.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            opened.pop_all()
            return file
    raise FastbyolError(
        f"{tempfile.gettempdir()}: no room for {size_text(num_bytes)} of decoded images, nor in "
        f"{SHARED_MEMORY}: make room, or take --set data.cache=none"
    )


@contextmanager
def _reaching() -> Iterator[None]:
    """Turn torch's many errors about a peer that is gone into LostRankError."""
    try:
        yield
    except RuntimeError as error:
        words = re.sub(r"\[[^]\s]*/[^]\s]*:\d+\] ?", "", one_line(error, None))  # a line of C++
        raise LostRankError(f"another rank is gone ({words[:120]}): see what it said") from error


# A thread's ranks, or else its process's: the backward pass of a GPU runs in torch's own threads.
_of_thread = threading.local()
_of_process: Ranks = Alone()


@contextmanager
def current(ranks: Ranks) -> Iterator[None]:
    """Make ``gather`` inside that of ``ranks``: for a thread's in it alone, else in the process."""
    global _of_process
    if isinstance(ranks, Threads):
        _of_thread.ranks = ranks
        # The backward pass waits for the other ranks': in torch's one thread they would come late.
        with torch.autograd.set_multithreading_enabled(False):
            try:
                yield
            finally:
                del _of_thread.ranks
        return
    before, _of_process = _of_process, ranks
    try:
        yield
    finally:
        _of_process = before


@cache
def gather_of(count: int) -> Callable[[Tensor], Tensor]:
    """Return the function that stacks a tensor of the ``count`` current ranks.

    It is one node of a compiled graph, and the same function for the same count, which keeps
    compiled code valid.
    """

    def gather(x: Tensor) -> Tensor:
        every: Tensor = torch.ops.fastbyol.gather(x, count)
        return every

    return gather


@torch.library.custom_op("fastbyol::gather", mutates_args=())
def _gather(x: Tensor, count: int) -> Tensor:
    ranks: Ranks = getattr(_of_thread, "ranks", _of_process)
    if ranks.count != count:
        raise RuntimeError(f"a step of {count} ranks runs outside of them: enter ranks.current")
    return ranks.gather(x).clone()  # an operator's result may not be another's


@_gather.register_fake
def _(x: Tensor, count: int) -> Tensor:
    return x.new_empty((count, *x.shape))


@contextmanager
def joined() -> Iterator[Alone | Processes]:
    """Join the processes that torchrun started, if it did; leave them at the end.

    Raises LostRankError if they do not all come, UsageError if they cannot meet, and SystemExit if
    they are started again although one has failed for good.
    """
    here = worker()
    if here is None:
        yield Alone()
        return
    # Who waits for a rank that died has nothing to save, and would not see a signal for C++ code.
    with handling(signal.SIG_DFL, signals_to_handle()), _reaching():
        meet(here)
        store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
        if here.is_on_only_node:
            # Torchrun's own store still holds where the ranks before a restart were
            # (pytorch#135712). Several nodes may count their restarts otherwise.
            store = PrefixStore(f"start {here.restarts}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        processes = Processes()
        if code := agree(processes, outcome()):
            leave_outcome(code)
            sys.exit(0)
        yield processes
    except FastbyolError as error:
        claim(error)
        raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def run_workers(
    command: Sequence[str],
    *,
    processes: int,
    nodes: int,
    endpoint: str,
    restarts: int,
    grace_s: int,
    signals: Sequence[signal.Signals],
    logs: Path,
) -> signal.Signals | None:
    """Run ``command`` in so many ``processes`` on this node, one of ``nodes``, as torchrun does.

    If one is lost all are started again, up to ``restarts`` times. Of ``signals`` the first is sent
    on to them, and they have ``grace_s`` seconds to end. ``endpoint`` is HOST:PORT, where nodes
    meet. What torch writes goes into the folder ``logs``. Returns the signal that ended it, or
    None. Raises LostRankError where they are lost too often, and UsageError where the nodes cannot
    meet.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its warnings and traces are about what is said here in a line.
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # With torchrun's own store in between, several nodes would wait for ever after a restart.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(grace_s)
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id="fastbyol" if nodes > 1 else uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        signals_to_handle=",".join(number.name for number in signals),
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise LostRankError(
            f"a rank was lost {restarts + 1} times, the last one, rank {rank}, with "
            f"code {failure.exitcode}"
        ) from None
    except RendezvousError as error:
        raise UsageError(
            f"--rdzv-endpoint: {endpoint}: {one_line(error)}: name a free port of the first node"
        ) from None
    except SignalException as error:
        return signal.Signals(error.sigval)
    return None
