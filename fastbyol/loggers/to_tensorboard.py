"""Event files for TensorBoard in RUN/tensorboard, one more for each process that writes them.

They are written with TensorBoard's own records, without torch. A step is one record: a reader
ignores one that a kill has torn. TensorBoard has scalars as float32, which the metrics are.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from fastbyol.config_io import show
from fastbyol.loggers.sink import Alert, Entry, LoggedRun, Newest
from fastbyol.runs.durable import append, writing

FOLDER = "tensorboard"
_BUCKETS = 30


class TensorBoard:
    """A new event file. It is made with its first record, so that idle processes leave none."""

    def __init__(self, run: LoggedRun) -> None:
        self._run, self._folder = run, run.path / FOLDER
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        self._files = sorted(self._folder.glob("events.out.tfevents.*"))
        self.newest = Newest.of(
            (event.step, (value.tag for value in event.summary.value))
            for event in events(self._files)
        )
        self.splits = True
        self._file: io.FileIO | None = None
        self.where = ""

    def send(self, entries: Sequence[Entry]) -> None:
        """Append a record for each entry, and the settings before the first."""
        if self._file is None and not self._files:
            first = entries[0]
            self._write([self._settings(first.unix_s)])
        self._write([_event(entry) for entry in entries])

    def alert(self, alert: Alert) -> None:
        """Append a text."""
        value = _text("state", f"**{alert.state}**\n\n    {alert.text}")
        self._write(
            [
                event_pb2.Event(
                    wall_time=alert.unix_s,
                    step=alert.step,
                    summary=summary_pb2.Summary(value=[value]),
                )
            ]
        )

    def close(self, *, is_finished: bool) -> None:
        """Close the file; nothing is buffered."""
        if self._file is not None:
            self._file.close()

    def _settings(self, unix_s: float) -> event_pb2.Event:
        """Return the run's settings for the tab of hyperparameters, and as a text."""
        settings = {
            key: value if isinstance(value, bool | int | float | str) else show(value)
            for key, value in self._run.settings.items()
        }
        lines = [f"    {key} = {show(value)}" for key, value in self._run.settings.items()]
        summary = hparams_pb(settings, trial_id=self._run.id)
        summary.value.append(_text("settings", "\n".join(lines)))
        return event_pb2.Event(wall_time=unix_s, step=0, summary=summary)

    def _write(self, batch: Sequence[event_pb2.Event]) -> None:
        content = io.BytesIO()
        writer = RecordWriter(content)
        with writing(self._folder):
            if self._file is None:
                self._file = self._new_file()
                head = event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")
                writer.write(head.SerializeToString())
            for event in batch:
                writer.write(event.SerializeToString())
            size = self._file.tell()
            try:
                append(self._file, content.getvalue())
            except OSError:
                # A reader stops at a record that is torn: none may come behind it.
                self._file.truncate(size)
                if size == 0:
                    self._files.pop().unlink()
                raise

    def _new_file(self) -> io.FileIO:
        """Return a file whose name comes behind those of earlier ones: they are read by name."""
        last = self._files[-1].name.split(".")[3] if self._files else "0"
        second = max(int(time.time()), int(last) + 1 if last.isdecimal() else 0)
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
        path = self._folder / name
        self._files.append(path)
        return io.FileIO(path, "xb")


def events(files: Iterable[Path]) -> Iterator[event_pb2.Event]:
    """Yield the events of files, each up to its first record that is not whole."""
    for path in files:
        yield from map(event_pb2.Event.FromString, RawEventFileLoader(str(path)).Load())


def open_sink(run: LoggedRun) -> TensorBoard:
    """Open a run's event files."""
    return TensorBoard(run)


def _event(entry: Entry) -> event_pb2.Event:
    values = [
        summary_pb2.Summary.Value(tag=name, simple_value=value)
        for name, value in entry.scalars.items()
    ]
    values += [
        summary_pb2.Summary.Value(tag=name, histo=_histogram(column))
        for name, column in entry.histograms.items()
    ]
    if entry.picture is not None:
        values.append(_picture(entry.picture))
    return event_pb2.Event(
        wall_time=entry.unix_s, step=entry.step, summary=summary_pb2.Summary(value=values)
    )


def _histogram(values: np.ndarray) -> summary_pb2.HistogramProto:
    counts, edges = np.histogram(values, bins=_BUCKETS)
    return summary_pb2.HistogramProto(
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=(values**2).sum(),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )


def _picture(path: Path) -> summary_pb2.Summary.Value:
    content = path.read_bytes()
    # A PNG's header has its sides as two big-endian words.
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    return summary_pb2.Summary.Value(
        tag="views",
        image=summary_pb2.Summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=content
        ),
    )


def _text(tag: str, text: str) -> summary_pb2.Summary.Value:
    """Return a text, which TensorBoard shows as Markdown: lines of four spaces as they are."""
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
    )
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()])
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
