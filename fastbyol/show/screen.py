"""The display of a running training: a live table on a terminal, elsewhere a line per epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastbyol.engine.observer import EpochEnd, Start, StepReport
from fastbyol.evaluation.intervals import accuracy_text
from fastbyol.output import is_live

STATE_STYLE = {
    "healthy": "green",
    "collapsing": "yellow",
    "collapsed": "bold red",
    "recovering": "cyan",
    "dead": "bold white on red",
}
# Finished epochs on the screen. With header and bar they fit a terminal of 24 lines.
EPOCHS_SHOWN = 12


def duration(seconds: float) -> str:
    """Return ``3725`` seconds as ``1:02:05``, less than an hour as ``m:ss``."""
    total = max(0, round(seconds))
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def headline(message: Start) -> str:
    """Return the line that opens a run."""
    at = f", from step {message.first_step}" if message.first_step else ""
    return (
        f"{message.run}: {message.epochs} epochs of {message.steps_per_epoch} steps on "
        f"{message.device}, "
        f"{message.num_samples} images from {message.data}, {message.num_parameters / 1e6:.2f} M "
        f"parameters{at}"
    )


def cells(metrics: Mapping[str, float]) -> list[str]:
    """Return loss, cosines and std as a row shows them."""
    formats = {"loss": ".4g", "pos_cos": ".4f", "neg_cos": ".4f", "std_z": ".3f"}
    return [format(metrics[name], spec) for name, spec in formats.items()]


class PlainDisplay:
    """A display of one line per epoch, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: lines stay."""

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, message: Start) -> None:
        self._line(headline(message))

    def progress(self, message: StepReport) -> None:
        """Do nothing: a log does not show steps."""

    def epoch_end(self, message: EpochEnd) -> None:
        loss, pos, neg, std = cells(message.metrics)
        accuracy = f" accuracy {text}" if (text := _accuracy(message)) else ""
        self._line(
            f"epoch {message.epoch + 1}/{message.epochs} loss {loss} pos_cos {pos} neg_cos {neg} "
            f"std {std} "
            f"{message.state}{accuracy} {message.img_s:.0f} img/s eta {duration(message.eta_s)}"
        )

    def note(self, text: str) -> None:
        self._line(text)


class LiveDisplay(PlainDisplay):
    """A table that is redrawn in place: finished epochs, the current one, a bar."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._epochs: deque[EpochEnd] = deque(maxlen=EPOCHS_SHOWN)
        self._now: StepReport | None = None
        self._start: Start | None = None
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._now = None
        self._live.update(self._draw())
        self._live.stop()

    def start(self, message: Start) -> None:
        self._start = message
        super().start(message)

    def progress(self, message: StepReport) -> None:
        self._now = message
        self._live.update(self._draw())

    def epoch_end(self, message: EpochEnd) -> None:
        self._epochs.append(message)
        self._now = None
        self._live.update(self._draw())

    def _draw(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for name in (
            "epoch",
            "loss",
            "pos cos",
            "neg cos",
            "std",
            "state",
            "accuracy",
            "img/s",
            "left",
        ):
            table.add_column(name, justify="left" if name == "state" else "right")
        for row in self._epochs:
            table.add_row(f"{row.epoch + 1}/{row.epochs}", *_row(row, _accuracy(row)))
        if self._now is None or self._start is None:
            return Group(table)
        table.add_row(f"step {self._now.step}", *_row(self._now, ""))
        total = self._start.steps_per_epoch * self._start.epochs
        return Group(table, ProgressBar(total=total, completed=self._now.step, width=60))


def _accuracy(message: EpochEnd) -> str:
    return "" if message.accuracy is None else accuracy_text(message.accuracy, message.num_scored)


def _row(message: EpochEnd | StepReport, accuracy: str) -> tuple[str | Text, ...]:
    state = Text(message.state, style=STATE_STYLE.get(message.state, ""))
    return *cells(message.metrics), state, accuracy, f"{message.img_s:.0f}", duration(message.eta_s)


def display(console: Console) -> PlainDisplay:
    """Return the live table on a terminal, plain lines elsewhere."""
    return LiveDisplay(console) if is_live(console) else PlainDisplay(console)
