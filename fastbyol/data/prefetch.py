"""Items made in a thread a few ahead of their use, whose failure cannot hang the consumer."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

from fastbyol.errors import FastbyolError

T = TypeVar("T")
POLL_S = 0.05
# A network disk may hiccup for minutes, and a batch of large pictures may take as long.
STALL_S = 300.0
# Items that wait for their use: three bridge an item that takes longer than others.
AHEAD = 3
# The item under way is no longer needed when the consumer stops: wait for it at most this long.
STOP_S = 60.0
# Python ends a daemon thread when it returns from native code, which C++ takes for an error and may
# abort the process. So all workers are stopped at exit.
_running: weakref.WeakSet[_Worker[Any]] = weakref.WeakSet()


def prefetch(source: Iterable[T], *, name: str) -> Iterator[T]:
    """Yield the items of ``source`` in order, up to ``AHEAD`` + 1 of them made early by a thread.

    An error of ``source`` is raised here, after the items before it. Raises FastbyolError about
    ``name`` if no item comes for ``STALL_S`` seconds. Closing or dropping the iterator ends the
    thread and waits for it, at most as long as one item takes.
    """
    worker = _Worker(source, name)
    worker.start()
    _running.add(worker)
    try:
        while (box := worker.next_box()) is not None:
            yield box[0]
    finally:
        worker.stop(min(STALL_S, STOP_S))


class _Worker(threading.Thread, Generic[T]):
    def __init__(self, source: Iterable[T], name: str) -> None:
        super().__init__(name=f"prefetch {name}", daemon=True)
        self._source = source
        self._boxes: Queue[tuple[T] | None] = Queue(AHEAD)
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._hangs = False

    def run(self) -> None:
        try:
            for item in self._source:
                self._offer((item,))
                if self._stopping.is_set():
                    return
        except BaseException as error:  # SystemExit, too: the consumer waits
            self._failure = error
        self._offer(None)

    def _offer(self, box: tuple[T] | None) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(Full):
                self._boxes.put(box, timeout=POLL_S)
                return

    def next_box(self) -> tuple[T] | None:
        """Return the next item in a box, or None at the end."""
        deadline = time.monotonic() + STALL_S
        while True:
            try:
                box = self._boxes.get(timeout=POLL_S)
            except Empty:
                if time.monotonic() > deadline:
                    self._hangs = True
                    raise FastbyolError(
                        f"{self.name}: nothing for {STALL_S:g} s, its thread hangs; start again"
                    ) from None
                continue
            if box is None and self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            return box

    def stop(self, patience_s: float) -> None:
        self._stopping.set()
        deadline = time.monotonic() + patience_s
        while self.is_alive() and not self._hangs and time.monotonic() < deadline:
            while not self._boxes.empty():
                self._boxes.get_nowait()
            self.join(POLL_S)


@atexit.register
def _stop_all() -> None:
    for worker in list(_running):
        worker.stop(STOP_S)
