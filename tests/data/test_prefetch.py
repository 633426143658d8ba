"""Items made ahead by a thread: order, failures, early ends, hangs, and no thread left."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import wait_until

from fastbyol.data import prefetch as prefetching
from fastbyol.data.prefetch import prefetch
from fastbyol.errors import FastbyolError, UsageError


def num_threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def gather(items: Iterator[int], seen: list[int]) -> None:
    for item in items:
        seen.append(item)  # noqa: PERF402


def fail_in_the_loop(items: Iterator[int]) -> None:
    for item in items:
        raise KeyError(item)


@settings(max_examples=20)
@given(st.lists(st.one_of(st.integers(), st.none()), max_size=30), st.integers(1, 5))
def test_items_come_in_order(items: list[int | None], ahead: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetching, "AHEAD", ahead)
        assert list(prefetch(items, name="numbers")) == items
    assert num_threads() == 0


@pytest.mark.parametrize(
    "failure", [UsageError("damaged"), ZeroDivisionError(), MemoryError(), SystemExit(3)]
)
def test_a_failure_comes_after_the_items_before_it(failure: BaseException) -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise failure

    items, seen = prefetch(source(), name="numbers"), []
    with pytest.raises(type(failure)) as caught:
        gather(items, seen)
    assert caught.value is failure
    assert seen == list(range(5))
    assert num_threads() == 0


def test_runs_ahead_but_not_further() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for k in range(100):
            made.append(k)
            yield k

    items = prefetch(source(), name="numbers")
    assert next(items) == 0
    wait_until(lambda: len(made) >= 5)
    time.sleep(0.3)
    # One taken, three queued, one in the thread's hands.
    assert len(made) == 5
    del items
    gc.collect()
    assert num_threads() == 0


def test_nothing_starts_before_the_first_item_is_asked_for() -> None:
    items = prefetch(range(3), name="numbers")
    assert num_threads() == 0
    assert next(items) == 0


def test_breaks_and_exceptions_leave_no_thread() -> None:
    for k in range(30):
        for item in prefetch(range(1000), name="numbers"):
            if item == k:
                break
        with pytest.raises(KeyError):
            fail_in_the_loop(prefetch(range(1000), name="numbers"))
        assert num_threads() == 0


def test_two_at_once() -> None:
    pairs = zip(prefetch(range(500), name="a"), prefetch(range(500), name="b"), strict=True)
    assert all(a == b for a, b in pairs)


def test_a_hang_ends_in_seconds_with_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "STALL_S", 0.3)
    release = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        release.wait(600)

    items = prefetch(source(), name="set.beton")
    assert next(items) == 1
    start = time.monotonic()
    with pytest.raises(FastbyolError, match=r"set\.beton: nothing for 0\.3 s"):
        next(items)
    assert time.monotonic() - start < 300
    release.set()


def test_slow_is_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "STALL_S", 3.0)

    def source() -> Iterator[int]:
        for k in range(4):
            time.sleep(0.8)
            yield k

    assert list(prefetch(source(), name="numbers")) == [0, 1, 2, 3]
