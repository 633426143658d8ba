"""The measures of a run, from the device into the run's folder without stopping the device.

``metrics.jsonl`` and ``layers.npy`` depend on the training alone: a run that was killed and resumed
leaves the same bytes as one that was not. Clock times go to ``timing.jsonl``, which only grows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fastbyol.errors import FastbyolError
from fastbyol.runs.durable import Written, writing
from fastbyol.runs.layers import LAYERS_FILE, LayersFile
from fastbyol.runs.metrics import METRICS_FILE, MetricsFile


class StepValues(Protocol):
    """A step's ``values`` (metrics,) and ``layers`` (segments, layer metrics), float32."""

    @property
    def values(self) -> torch.Tensor: ...
    @property
    def layers(self) -> torch.Tensor: ...


class Telemetry:
    """The record of the run in ``folder``, whose files are cut back to ``resume_step`` steps.

    Args:
        metric_names: names of ``StepValues.values``.
        layer_names, layer_metric_names: names of the two axes of ``StepValues.layers``.
        drain_every: steps held on the device before they are written.
        layers_every: spacing in steps of the per-layer measures.
        resume_step: number of steps done, 0 for a new run.
        resume_written: ``written`` at that step, from the checkpoint.

    Raises:
        FastbyolError: a file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        metric_names: Sequence[str],
        layer_names: Sequence[str],
        layer_metric_names: Sequence[str],
        steps_per_epoch: int,
        drain_every: int,
        layers_every: int,
        device: torch.device | str,
        resume_step: int = 0,
        resume_written: Mapping[str, Sequence[Any]] | None = None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._fence = fence
        fence()
        self._metrics = MetricsFile(
            folder,
            metric_names,
            steps_per_epoch=steps_per_epoch,
            resume_step=resume_step,
            recorded=Written(*resume_written[METRICS_FILE]) if resume_written else None,
        )
        self._layers = LayersFile(
            folder, layer_names, layer_metric_names, every=layers_every, resume_step=resume_step
        )
        with writing(folder / "timing.jsonl"):
            self._timing = (folder / "timing.jsonl").open("a", buffering=1, encoding="utf-8")
        shape = (len(metric_names), len(layer_names), len(layer_metric_names))
        self._ring = _Ring(*shape, drain_every, layers_every, torch.device(device))
        self._step = resume_step
        self._closed = False
        self.timing("open")

    def record(self, measured: StepValues) -> list[dict[str, float]]:
        """Record the next step's measures, without waiting for the device.

        Returns the steps that were written meanwhile, oldest first: ``drain_every`` of them in each
        ``drain_every``-th call (on a GPU one ring late), else none. A dict has ``step``, ``epoch``
        and the metrics, NaN where not finite.
        """
        self._ring.put(self._step, measured.values, measured.layers)
        self._step += 1
        return self._drain() if self._ring.full else []

    def flush(self) -> list[dict[str, float]]:
        """Write everything recorded so far, before a checkpoint is saved; ``sync`` comes next."""
        return self._drain() + self._receive()

    def sync(self) -> None:
        """Force what was written to disk. Any thread may call this while others record."""
        self._metrics.sync()
        self._layers.sync()

    def event(self, kind: str, *, step: int | None = None, **fields: Any) -> None:
        """Write ``{"event": kind, "step": ..., **fields}`` after the steps recorded so far.

        Values must be functions of the training alone. ``step`` is the number of steps done
        (default: those recorded). A run resumed at ``step`` keeps the event, so write it before the
        checkpoint of that step.
        """
        self._write_pending()
        self._fence()
        self._metrics.append_event(kind, self._step if step is None else step, fields)

    @property
    def written(self) -> dict[str, list[Any]]:
        """The files' content after ``flush`` for a checkpoint: name -> bytes and digest."""
        return {METRICS_FILE: list(self._metrics.written), LAYERS_FILE: list(self._layers.written)}

    @property
    def skipped_in_row(self) -> int:
        """The number of newest consecutive steps, of those written, that were skipped."""
        return self._metrics.skipped_in_row

    def epoch_summary(self) -> dict[str, float]:
        """Return each metric's mean over the newest epoch, steps before a resumption included."""
        self._write_pending()
        return self._metrics.epoch_means()

    def timing(self, kind: str, **fields: Any) -> None:
        """Write a line of ``timing.jsonl``: kind, steps recorded, Unix time in s, ``fields``."""
        line = {"event": kind, "step": self._step, "unix_s": round(time.time(), 6), **fields}
        self._timing.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Write what is buffered and close. May be called twice."""
        if self._closed:
            return
        self._closed = True
        with self._timing, closing(self._metrics), closing(self._layers):
            self.flush()
            self.sync()
            self.timing("close")

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # After a disk has run full closing fails too, with a less useful message.
        with suppress(*(FastbyolError,) if error is not None else ()):
            self.close()

    def _write_pending(self) -> None:
        self._drain()
        self._receive()

    def _drain(self) -> list[dict[str, float]]:
        """Write the ring sent before and send this one. On a CPU nothing overlaps: write both."""
        rows = self._receive()
        if self._ring.num_buffered:
            self._ring.send()
        return rows if self._ring.overlaps else rows + self._receive()

    def _receive(self) -> list[dict[str, float]]:
        first_step, values, layer_steps, layers = self._ring.receive()
        if not len(values):
            return []
        self._fence()
        rows = self._metrics.append_steps(first_step, values)
        self._layers.append(layer_steps, layers)
        self.timing("drain", written=first_step + len(values))
        return rows


class Unrecorded:
    """The telemetry of ranks other than the first, which have the same numbers: it keeps none."""

    skipped_in_row = 0

    def record(self, measured: StepValues) -> list[dict[str, float]]:
        """Keep nothing, and return no step."""
        return []

    def flush(self) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Force nothing to disk."""

    @property
    def written(self) -> dict[str, list[Any]]:
        """No files."""
        return {}

    def epoch_summary(self) -> dict[str, float]:
        """Return no means."""
        return {}

    def event(self, kind: str, *, step: int | None = None, **fields: Any) -> None:
        """Write nothing."""


class _Sent(NamedTuple):
    first_step: int
    num_steps: int
    num_layers: int


class _Ring:
    """One flat float32 buffer on the device, layers behind metrics, with a copy on the host.

    A full ring is sent in one transfer. On a GPU it runs behind the steps and is received when
    the next one is sent.
    """

    def __init__(
        self,
        num_metrics: int,
        num_layers: int,
        num_layer_metrics: int,
        steps: int,
        layers_every: int,
        device: torch.device,
    ) -> None:
        slots = -(-steps // layers_every)
        self._shapes = (steps, num_metrics), (slots, num_layers, num_layer_metrics)
        self._layers_every = layers_every
        size = sum(int(np.prod(shape)) for shape in self._shapes)
        self.overlaps = device.type == "cuda"
        self._buffer = torch.zeros(size, dtype=torch.float32, device=device)
        self._host = torch.zeros(size, dtype=torch.float32, pin_memory=self.overlaps)
        self._metrics, self._layers = self._split(self._buffer)
        self._first_step = self.num_buffered = self._num_layers = 0
        self._sent = _Sent(0, 0, 0)
        self._arrived = torch.cuda.Event() if self.overlaps else None  # type: ignore[no-untyped-call]

    @property
    def full(self) -> bool:
        return self.num_buffered == self._shapes[0][0]

    def put(self, step: int, values: torch.Tensor, layers: torch.Tensor) -> None:
        self._first_step = step if self.num_buffered == 0 else self._first_step
        self._metrics[self.num_buffered].copy_(values.detach())
        self.num_buffered += 1
        if step % self._layers_every == 0:
            self._layers[self._num_layers].copy_(layers.detach())
            self._num_layers += 1

    def send(self) -> None:
        """Start the transfer. Later steps overwrite the ring behind it on the stream."""
        self._host.copy_(self._buffer, non_blocking=self.overlaps)
        if self._arrived is not None:
            self._arrived.record()
        self._sent = _Sent(self._first_step, self.num_buffered, self._num_layers)
        self.num_buffered = self._num_layers = 0

    def receive(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Return the last send: first step, its values, the steps with layers, their layers."""
        sent, self._sent = self._sent, _Sent(0, 0, 0)
        if sent.num_steps and self._arrived is not None:
            self._arrived.synchronize()
        every = self._layers_every
        layer_steps = (
            -(-sent.first_step // every) + np.arange(sent.num_layers, dtype=np.int64)
        ) * every
        metrics, layers = (part.numpy() for part in self._split(self._host))
        return sent.first_step, metrics[: sent.num_steps], layer_steps, layers[: sent.num_layers]

    def _split(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        boundary = int(np.prod(self._shapes[0]))
        return flat[:boundary].view(self._shapes[0]), flat[boundary:].view(self._shapes[1])
