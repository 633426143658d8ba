"""saving.py: what is written is the state of that time, whatever happens to it meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from fastbyol.engine.saving import Saver
from fastbyol.errors import FastbyolError


@pytest.fixture
def saver() -> Iterator[Saver]:
    with Saver() as saver:
        yield saver


class Writer:
    """Keeps the values of what it is to write, once ``go`` is set, and where they lay."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.values: list[dict[str, list[float]]] = []
        self.addresses = set[int]()

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        self.began.set()
        assert self.go.wait(60)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        self.values.append({name: tensor.tolist() for name, tensor in tensors.items()})
        self.addresses |= {tensor.data_ptr() for tensor in tensors.values()}


def state() -> dict[str, Tensor]:
    arena = torch.arange(6.0)
    return {"all": arena, "transposed": arena.view(2, 3).t(), "step": torch.tensor(7)}


def test_what_is_written_is_the_state_of_that_time(saver: Saver) -> None:
    write, tensors = Writer(), state()
    saver.save(tensors, write)
    assert write.began.wait(60)
    tensors["all"].zero_()
    tensors["step"].add_(1)
    write.go.set()
    saver.wait()
    saver.save(tensors, write)
    saver.wait()
    rows = [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    first = {"all": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "transposed": rows, "step": 7}
    assert write.values == [first, {"all": [0.0] * 6, "transposed": [[0.0] * 2] * 3, "step": 8}]
    assert len(write.addresses) == len(tensors), "the second copy lies where the first one did"


def test_a_second_save_waits_for_the_first(saver: Saver) -> None:
    write, tensors = Writer(), state()
    saver.save(tensors, write)
    assert write.began.wait(60)
    threading.Timer(0.05, write.go.set).start()
    tensors["step"].add_(1)
    saver.save(tensors, write)
    saver.wait()
    assert [values["step"] for values in write.values] == [7, 8]


def test_it_is_announced_in_the_callers_thread_after_it_was_written(saver: Saver) -> None:
    write, heard = Writer(), list[threading.Thread]()
    saver.save(state(), write, lambda: heard.append(threading.current_thread()))
    assert write.began.wait(60)
    saver.poll()
    assert heard == []
    write.go.set()
    saver.wait()
    saver.poll()
    assert (heard, len(write.values)) == ([threading.current_thread()], 1)


def refuse(tensors: Mapping[str, Tensor]) -> None:
    raise FastbyolError("no room")


def poll_for_a_minute(saver: Saver) -> None:
    for _ in range(6000):
        saver.poll()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "notice", [Saver.wait, lambda saver: saver.save(state(), lambda tensors: None)]
)
def test_an_error_is_raised_once_and_nothing_announced(
    saver: Saver, notice: Callable[[Saver], None]
) -> None:
    heard: list[str] = []
    saver.save(state(), refuse, lambda: heard.append("saved"))
    with pytest.raises(FastbyolError, match="no room"):
        notice(saver)
    saver.wait()
    assert heard == []
    saver.save(state(), refuse)
    with pytest.raises(FastbyolError, match="no room"):
        poll_for_a_minute(saver)


def test_only_a_runs_first_checkpoint_is_waited_for_before_records(saver: Saver) -> None:
    write = Writer()
    saver.save(state(), write)
    saver.wait_for_first()
    assert write.values == []
    write.go.set()
    saver.save(state(), write, is_first=True)
    saver.wait_for_first()
    assert len(write.values) == 2


def test_nothing_is_recorded_after_a_first_checkpoint_that_was_not_written() -> None:
    """Also not while the run ends: who goes on could not tell that there never was one."""
    with Saver() as saver:
        saver.save(state(), refuse, is_first=True)
    for _ in range(2):
        with pytest.raises(FastbyolError, match="no room"):
            saver.wait_for_first()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_leaving_writes_what_is_under_way_but_after_a_ctrl_c(error: type[BaseException]) -> None:
    write, ended = Writer(), list[str]()

    def work(tensors: Mapping[str, Tensor]) -> None:
        write(tensors)
        saver.proceed()
        ended.append("written")

    with suppress(error), Saver() as saver:
        saver.save(state(), work)
        assert write.began.wait(60)
        threading.Timer(0.05, write.go.set).start()
        raise error
    assert ended == ([] if error is KeyboardInterrupt else ["written"])
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]
