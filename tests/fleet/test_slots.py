"""Where workers run: eight GPUs that are not there, cores, and SLURM's share of them."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch

from fastbyol.errors import FastbyolError, UsageError
from fastbyol.fleet import slots as module
from fastbyol.fleet.slots import VISIBLE, cores, slots

GIB = 2**30


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Eight GPUs with 80 GB free each, which a test may change, and 64 cores."""
    free = [80 * GIB] * 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(module, "free_bytes", lambda: list(free))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for name in (VISIBLE, "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return free


def visible(device: str, jobs: int | None = None) -> list[str]:
    """The GPU of each worker. Workers on GPUs have as many threads as they want."""
    made = slots(device, jobs)
    assert all(set(each) == {VISIBLE} for each in made)
    return [each[VISIBLE] for each in made]


@pytest.mark.parametrize("word", ["auto", "cuda"])
def test_every_gpu_has_workers_before_one_has_two(gpus: list[int], word: str) -> None:
    names = visible(word)
    assert names[:8] == [str(index) for index in range(8)]
    assert Counter(names) == dict.fromkeys(map(str, range(8)), 4)


def test_free_memory_says_how_many_share_a_gpu(gpus: list[int]) -> None:
    """One needs 20 GiB. A GPU that is full gets one too: the user named it, and sees the error."""
    gpus[:] = [79 * GIB, 60 * GIB, 45 * GIB, 20 * GIB, 5 * GIB, 0, 500 * GIB, 40 * GIB]
    counts = Counter(visible("auto"))
    assert [counts[str(index)] for index in range(8)] == [3, 3, 2, 1, 1, 1, 4, 2]


def test_few_cores_let_fewer_workers_share_but_no_gpu_idle(
    gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10)))
    assert visible("auto") == [*map(str, range(8)), "0", "1"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert visible("auto") == [*map(str, range(8))]


def test_one_gpu_alone(gpus: list[int]) -> None:
    gpus[3] = 45 * GIB
    assert visible("cuda:3") == ["3", "3"]
    assert visible("cuda:3", 5) == ["3"] * 5
    with pytest.raises(UsageError, match="cuda:8 is not there"):
        slots("cuda:8")


def test_a_number_of_workers_is_dealt_out_in_turns(gpus: list[int]) -> None:
    gpus[:] = [0] * 8  # which --jobs overrules
    assert visible("cuda", 3) == ["0", "1", "2"]
    assert visible("auto", 11) == [*map(str, range(8)), "0", "1", "2"]


def test_gpus_that_a_scheduler_allotted_keep_their_names(
    gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Index i of this process is the i-th name of its variable, whatever those are."""
    names = ["GPU-4f1a", "GPU-77bc", "MIG-9d20"]
    monkeypatch.setenv(VISIBLE, ", ".join(names))
    gpus[:] = [30 * GIB] * 3
    assert visible("auto") == names
    assert visible("cuda:1") == names[1:2]
    assert visible("cuda", 4) == [*names, names[0]]
    monkeypatch.setenv(VISIBLE, "5,2,7")
    assert visible("auto") == ["5", "2", "7"]


def test_a_cpu_has_one_worker_a_core_with_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    assert slots("cpu") == ({"OMP_NUM_THREADS": "1"},) * 6
    assert slots("cpu", 2) == ({"OMP_NUM_THREADS": "1"},) * 2
    assert slots("cpu", 9) == ({"OMP_NUM_THREADS": "1"},) * 9


@pytest.mark.parametrize(
    ("allotted", "count"), [("4", 4), ("16", 6), ("", 6), ("4(x2)", 6), ("none", 6)]
)
def test_slurms_share_of_the_cores_counts(
    monkeypatch: pytest.MonkeyPatch, allotted: str, count: int
) -> None:
    """Not every SLURM binds a job to it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", allotted)
    assert cores() == count
    assert len(slots("cpu")) == count


def test_where_the_system_does_not_say_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no ``sched_getaffinity``."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="device"):
        slots("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="take --device cpu"):
            slots("cuda")


def test_free_memory_that_cannot_be_asked_for_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that asks fails, as it does under a broken driver."""
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(FastbyolError, match=r"free memory: .*name the workers with --jobs"):
        module.free_bytes()
