"""The display of `ablate run`: a redrawn table on a terminal, a plain line per event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastbyol.ablations.plan import Run
from fastbyol.output import is_live
from fastbyol.show.screen import STATE_STYLE, duration


class Board:
    """Plain lines: one for each run that starts, ends or fails.

    Each also tells the share that is done and the time that is left.
    """

    def __init__(
        self, console: Console, runs: Sequence[Run], done_epochs: Mapping[str, int]
    ) -> None:
        self.console, self._began = console, time.monotonic()
        self._epochs = {run.name: run.config.train.epochs for run in runs}
        self._done = {run.name: done_epochs.get(run.name, 0) for run in runs}
        self._done_at_start = sum(self._done.values())
        self.now: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the lines as they are."""

    def line(self, text: str) -> None:
        """Print one line of text."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def message(self, run: Run, message: Mapping[str, Any]) -> None:
        """Show a worker's message on ``run``."""
        row = self.now.setdefault(
            run.name, {"state": "", "img_s": 0.0, "neg_cos": None, "accuracy": None}
        )
        if message["kind"] == "epoch":
            self._done[run.name] = message["epoch"] + 1
            row |= {"state": message["state"], "neg_cos": message["metrics"]["neg_cos"]}
            row["accuracy"] = (
                row["accuracy"] if message["accuracy"] is None else message["accuracy"]
            )
        if message["kind"] in ("progress", "epoch"):
            row["img_s"] = message["img_s"]
        if message["kind"] == "start" and message["first_step"]:
            self.line(f"{run.name}: goes on at step {message['first_step']}")

    def ended(self, run: Run, status: str, what: str, seconds: float) -> None:
        """Show that ``run`` is done, stopped or failed."""
        self.now.pop(run.name, None)
        self.line(f"{run.name}: {status}{what}, {duration(seconds)}; {self.share()}")

    def share(self) -> str:
        """Return the share that is done, and the time left at this pace."""
        done, total = sum(self._done.values()), sum(self._epochs.values())
        fresh = done - self._done_at_start
        left = (
            f", {duration((time.monotonic() - self._began) / fresh * (total - done))} left"
            if fresh and done < total
            else ""
        )
        return f"{100 * done / max(total, 1):.0f} %{left}"


class LiveBoard(Board):
    """The table: what runs now, and a bar over everything."""

    def __init__(
        self, console: Console, runs: Sequence[Run], done_epochs: Mapping[str, int]
    ) -> None:
        super().__init__(console, runs, done_epochs)
        self._live = Live(console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> LiveBoard:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def message(self, run: Run, message: Mapping[str, Any]) -> None:
        super().message(run, message)
        self._live.update(self._draw())

    def _draw(self) -> Group:
        table = Table(
            "run", "epoch", "state", "neg cos", "accuracy", "img/s", box=None, pad_edge=False
        )
        for name, row in self.now.items():
            neg = "" if row["neg_cos"] is None else f"{row['neg_cos']:.4f}"
            accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1f}%"
            state = Text(row["state"], style=STATE_STYLE.get(row["state"], ""))
            table.add_row(
                name,
                f"{self._done[name]}/{self._epochs[name]}",
                state,
                neg,
                accuracy,
                f"{row['img_s']:.0f}",
            )
        bar = ProgressBar(
            total=sum(self._epochs.values()), completed=sum(self._done.values()), width=60
        )
        return Group(table, bar, Text(self.share()))


def board(console: Console, runs: Sequence[Run], done_epochs: Mapping[str, int]) -> Board:
    """Return the live table on a terminal, plain lines elsewhere."""
    return (LiveBoard if is_live(console) else Board)(console, runs, done_epochs)
