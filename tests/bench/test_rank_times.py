"""Two ranks that are measured take the steps of a run with two ranks, each on its share."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastbyol.engine.ranks import Alone, Ranks, Team
from fastbyol.engine.step import METRICS
from fastbyol_bench import rank_times
from fastbyol_bench.harness import Reading
from fastbyol_bench.peer_process import PeerProcess
from fastbyol_bench.rank_times import CPU, QUICK, Ranked, Work
from together import in_threads

WORK = Work("blog", 4, 16, QUICK)


def losses(ranks: Ranks) -> list[float]:
    step: Callable[[], Any] = rank_times.step_of(ranks, WORK, CPU)
    return [float(step().values[METRICS.index("loss")]) for _ in range(2)]


def test_ranks_take_the_steps_of_one() -> None:
    alone, both = losses(Alone()), in_threads(2, losses)
    assert both[0] == both[1]
    # fp32 sums in another order.
    assert both[0] == pytest.approx(alone, rel=1e-4)


def test_a_reading_begins_when_all_are_ready_and_others_follow() -> None:
    """Three calls of the first rank are three steps of the second, which ends with it."""
    first, second = Team(2, Alone()).ranks()
    thread = threading.Thread(target=_follow, args=(second,))
    thread.start()
    call = rank_times.timed(first, WORK, CPU)
    assert all(0 < call().wall_s < 60 for _ in range(3))
    first.abandon()
    thread.join(60)
    assert not thread.is_alive()


def _follow(ranks: Ranks) -> None:
    with pytest.raises(Exception, match="another rank of this process failed"):
        rank_times.follow(ranks, WORK, CPU)


@pytest.mark.usefixtures("two_threads")
def test_two_processes_answer_and_end() -> None:
    before = multiprocessing.active_children()
    threads = torch.get_num_threads()
    recipe = Ranked(WORK, "processes", ranks=2, threads=1)
    with PeerProcess("two processes", recipe, CPU, ours=True) as peer:
        assert all(isinstance(peer.call("step"), Reading) for _ in range(2))
    assert multiprocessing.active_children() == before
    assert torch.get_num_threads() == threads
