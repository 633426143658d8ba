"""A step of two ranks against the same step of one, on a CPU: threads, processes, and alone.

Each variant runs in a process of its own, with the settings of a training run. All are measured in
turns, with the views drawn in the step and no images read.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from fastbyol import load_config
from fastbyol.data.beton_write import die_with
from fastbyol.data.loader import Batch
from fastbyol.engine import capture
from fastbyol.engine.ranks import Alone, Processes, Ranks, Team, Threads, agree, current, joined
from fastbyol.engine.step import TrainState, share_of
from fastbyol_bench import results
from fastbyol_bench.harness import HostClock, Reading, Variant
from fastbyol_bench.peer_process import PeerProcess
from fastbyol_bench.results import Result, Row
from fastbyol_bench.suite import Setting, threads, use_training_switches

SUITE = "ranks"
CPU = torch.device("cpu")
# What a peer process enters for as long as it lives.
_STAYS = ExitStack()
ROUNDS, BUDGET_S = 20, 90.0


class Work(NamedTuple):
    """A step of a preset's network on ``batch_size`` images, whose views have ``size`` pixels."""

    preset: str
    batch_size: int
    size: int
    sets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its rows."""
        return f"{self.preset}: {self.batch_size} images of {self.size} px"


# The demonstration's step, and the blog's with a batch that a CPU takes in a second or so.
WORKS = (Work("demo", 32, 32), Work("blog", 64, 96))
QUICK = ("model.width=4", "model.stem=small")


@dataclass(frozen=True)
class Ranked:
    """A recipe for a peer process: ``ranks`` threads or processes, each with ``threads`` threads.

    Its call ``step`` returns the first rank's reading, from when all are ready to the step's end.
    """

    work: Work
    how: Literal["threads", "processes"]
    ranks: int
    threads: int

    def open(self, device: torch.device) -> Mapping[str, Callable[[], object]]:
        """Start the other ranks, which wait for the first one's calls."""
        torch.set_num_threads(self.threads)  # threads that start later have as many
        use_training_switches()
        if self.ranks == 1:
            return {"step": timed(Alone(), self.work, device)}
        if self.how == "threads":
            first, *others = Team(self.ranks, Alone()).ranks()
            for own in others:
                arguments = (own, self.work, device)
                threading.Thread(target=follow, args=arguments, daemon=True).start()
            return {"step": timed(first, self.work, device)}
        port, spawn = free_port(), multiprocessing.get_context("spawn")
        for rank in range(1, self.ranks):
            # A child is killed with this process, even while it is stopped between calls.
            rest = (os.getpid(), self, environment(rank, self.ranks, port), device)
            spawn.Process(target=_beside, args=rest, daemon=True).start()
        os.environ.update(environment(0, self.ranks, port))
        return {"step": timed(_join(device), self.work, device)}


def timed(ranks: Ranks, work: Work, device: torch.device) -> Callable[[], Reading]:
    """Return a function that waits for all ``ranks`` and then times a step of ``work``."""
    step, clock = step_of(ranks, work, device), HostClock()

    def call() -> Reading:
        with current(ranks):
            agree(ranks, 0)
            return clock.time(step)

    return call


def follow(ranks: Ranks, work: Work, device: torch.device) -> None:
    """Take step after step, each when the first rank begins one."""
    call = timed(ranks, work, device)
    try:
        while True:
            call()
    except BaseException:
        if isinstance(ranks, Threads):
            ranks.abandon()
        raise


def step_of(ranks: Ranks, work: Work, device: torch.device) -> Callable[[], object]:
    """Return the step of ``ranks.rank``, with the engine that training takes, on its own share."""
    config = load_config(
        work.preset,
        [
            f"views.size={work.size}",
            f"train.batch_size={work.batch_size}",
            "train.precision=fp32",  # auto is bf16 on some CPUs
            *work.sets,
        ],
    )
    state = TrainState.create(config, steps_per_epoch=1000, device=device, ranks=ranks)
    choice = capture.choose(config.engine, device, ranks=ranks, batch_size=work.batch_size)
    engine = capture.engine(state, config, choice)
    share = share_of(work.batch_size, ranks)
    shape = (work.batch_size, work.size, work.size, 3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    own = slice(share.first, share.first + share.count)
    ids = torch.arange(work.batch_size, device=device)[own]
    batch = Batch(images.to(device), ids, ids)
    return lambda: engine(batch, 0)


def measured(*, quick: bool, note: Callable[[str], None], works: Sequence[Work] = WORKS) -> Result:
    """Measure ``works`` on the CPU and return the rows; ``quick``: tiny networks, two rounds."""
    # As the command line does: peers read it when they import torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    began, load = time.perf_counter(), os.getloadavg()[0]
    machine, environment = results.machine("cpu")
    setting = Setting(CPU, quick, note)
    made = tuple(row for work in works for row in rows(setting, work))
    return Result(
        schema="fastbyol-bench/1",
        suites=(SUITE,),
        quick=quick,
        machine=machine,
        commit=results.commit(),
        date=environment["started"],
        command=("python", "-m", "fastbyol_bench.messages", *sys.argv[1:]),
        seconds=time.perf_counter() - began,
        load=load,
        ceilings=(),
        rows=made,
    )


def rows(setting: Setting, work: Work) -> Iterator[Row]:
    """Measure ``work`` by one rank and by two, in turns."""
    if setting.quick:
        work = work._replace(batch_size=4, size=16, sets=QUICK)
    one = Ranked(work, "threads", ranks=1, threads=2)
    recipes = {
        "1 rank, 2 threads": one,
        "1 rank, 1 thread": replace(one, threads=1),
        "2 ranks, 2 processes (gloo)": Ranked(work, "processes", ranks=2, threads=1),
        "2 ranks, threads of 1 process": Ranked(work, "threads", ranks=2, threads=1),
    }
    with ExitStack() as opened:
        variants = []
        for name, recipe in recipes.items():
            with threads(recipe.threads):
                peer = opened.enter_context(PeerProcess(name, recipe, CPU, ours=True))
            variants.append(Variant(name, peer.caller("step"), work.batch_size))
        measured = setting.rows(SUITE, work.name, variants, setting.plan(ROUNDS, BUDGET_S, 3))
    for row in measured:
        recipe, ratio = recipes[row.variant], row.ratio
        if ratio is not None and recipe.how == "processes":
            ratio = ratio.model_copy(update={"cpu": None})  # the others' cpu time is not counted
        yield row.model_copy(update={"threads": recipe.ranks * recipe.threads, "ratio": ratio})


def _join(device: torch.device) -> Processes:
    """Join the processes of this one's environment, for as long as it lives."""
    processes = _STAYS.enter_context(joined())
    assert isinstance(processes, Processes)
    processes.use(device)
    return processes


def _beside(parent: int, recipe: Ranked, of_rank: Mapping[str, str], device: torch.device) -> None:
    die_with(parent)
    os.environ.update(of_rank)
    torch.set_num_threads(recipe.threads)
    use_training_switches()
    follow(_join(device), recipe.work, device)


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a worker."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
