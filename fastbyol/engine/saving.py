"""Checkpoints in the background: the state is copied at once, and written while the run goes on.

A CPU's state is copied from memory to memory. A GPU's is copied on the device, between two steps,
and from there to the host behind the steps that follow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from fastbyol.errors import FastbyolError


class _Pending(NamedTuple):
    written: Future[None]
    announce: Callable[[], None]


class Saver:
    """One thread that writes what ``save`` copies, one state at a time.

    Leaving it waits until the last one is written; after a Ctrl-C it is left unwritten.
    """

    def __init__(self) -> None:
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._is_ending = threading.Event()
        self._pending: _Pending | None = None
        self._first: Future[None] | None = None

    def save(
        self,
        tensors: Mapping[str, Tensor],
        write: Callable[[Mapping[str, Tensor]], None],
        announce: Callable[[], None] = lambda: None,
        *,
        is_first: bool = False,
    ) -> None:
        """Copy ``tensors``; let the thread ``write`` the copies, contiguous ones on the CPU.

        Waits first for what is still being written, so that memory holds one copy. ``announce`` is
        called after it was written, in the caller's thread, by the next ``save``, ``poll`` or
        ``wait``, which raise the error of ``write``. ``is_first``: see ``wait_for_first``.
        """
        self.wait()
        arrived = self._snapshot.copy(tensors)
        written = self._thread.submit(lambda: write(arrived()))
        self._pending = _Pending(written, announce)
        if is_first:
            self._first = written

    def poll(self) -> None:
        """Do what ``wait`` does, if nothing has to be waited for."""
        if self._pending is not None and self._pending.written.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written; announce it, or raise why it was not written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.written.result()
            pending.announce()

    def wait_for_first(self) -> None:
        """Wait until a run's first checkpoint is written. Raise, every time, why it was not."""
        if self._first is not None:
            self._first.result()
            self._first = None

    def proceed(self) -> None:
        """Raise FastbyolError in the thread after a Ctrl-C: for ``write`` to call now and then."""
        if self._is_ending.is_set():
            raise FastbyolError("a Ctrl-C left the checkpoint unwritten")

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._is_ending.set()
        self._thread.shutdown()


class Snapshot:
    """A copy of tensors on the host, in memory that the next copy overwrites."""

    def __init__(self) -> None:
        self._host: dict[str, Tensor] = {}
        self._beside: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
        """Copy ``tensors``, whose names, shapes and dtypes are those of the first call.

        They may change at once. Returns a function, for any thread, that waits until the copies
        are on the host and returns them: they must not be in use any more at the next call.
        """
        device = next(iter(tensors.values())).device
        on_gpu = device.type == "cuda"
        if not self._host:
            self._host = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
                for name, tensor in tensors.items()
            }
        if not on_gpu:
            for name, tensor in tensors.items():
                self._host[name].copy_(tensor)
            return lambda: self._host
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._beside = {
                name: torch.empty_like(tensor, memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
        for name, tensor in tensors.items():
            self._beside[name].copy_(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        # The thread sleeps until then, and leaves its core to the loop.
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            for name, tensor in self._beside.items():
                self._host[name].copy_(tensor, non_blocking=True)
            arrived.record()

        def on_host() -> Mapping[str, Tensor]:
            arrived.synchronize()
            return self._host

        return on_host
