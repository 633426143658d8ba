"""The display of a folder of runs: a redrawn table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from fastbyol.evaluation.intervals import accuracy_text
from fastbyol.fleet.survey import Row, Survey, Surveyor
from fastbyol.output import is_live
from fastbyol.show.screen import STATE_STYLE, duration
from fastbyol.text import printable

STATUS_STYLE = {
    "running": "green",
    "silent": "yellow",
    "lost": "yellow",
    "stopped": "cyan",
    "failed": "bold red",
    "damaged": "bold red",
}
# Rows on a screen of 24 lines.
MOST_ROWS = 16


def headline(survey: Survey) -> str:
    """Return the counts of all statuses that occur, the share that is done, and the time left."""
    counts = ", ".join(f"{count} {status}" for status, count in survey.counts.items() if count)
    share = f"{100 * survey.epochs_done / max(survey.epochs, 1):.0f} %"
    left = "" if survey.left_s is None else f", {duration(survey.left_s)} left"
    return f"{len(survey.rows)} runs: {counts or 'none'}; {share}{left}"


def table(rows: Sequence[Row]) -> Table:
    """Return the table of ``rows``, without their notes."""
    names = ("status", "epoch", "state", "neg cos", "accuracy", "img/s")
    made = Table(Column("run", no_wrap=True), *names, "worker", box=None, pad_edge=False)
    for row in rows:
        made.add_row(
            row.run,
            Text(row.status, style=STATUS_STYLE.get(row.status, "")),
            f"{row.epochs_done}/{row.epochs}",
            Text(printable(row.state or ""), style=STATE_STYLE.get(row.state or "", "")),
            "" if row.neg_cos is None else f"{row.neg_cos:.4f}",
            "" if row.accuracy is None else accuracy_text(row.accuracy, row.num_scored),
            "" if row.img_s is None else f"{row.img_s:.0f}",
            row.worker or "",
        )
    return made


def drawing(survey: Survey, most: int | None = None) -> RenderableType:
    """Return the headline, notes, and the rows that are neither done nor new; ``most`` of them.

    With ``most``, as on a screen that is redrawn, there is a bar, too.
    """
    rows = [row for row in survey.rows if row.status not in ("done", "new", "waiting")]
    rows.sort(key=lambda row: row.status != "running")
    shown = rows[:most]
    parts: list[RenderableType] = [Text(headline(survey))]
    if most is not None:
        bar = Table.grid()
        bar.add_row(ProgressBar(max(survey.epochs, 1), survey.epochs_done, width=60))
        parts.append(bar)
    if shown:
        parts.append(table(shown))
    if len(shown) < len(rows):
        parts.append(Text(f"and {len(rows) - len(shown)} more"))
    notes = [*(f"{row.run}: {row.note}" for row in shown if row.note), *survey.notes]
    parts += [Text(printable(note)) for note in notes]
    return Group(*parts)


class Board:
    """The display of a surveyor's folder: on a terminal redrawn at every ``draw``."""

    def __init__(self, console: Console, surveyor: Surveyor) -> None:
        self.console, self._surveyor = console, surveyor
        self._live: Live | None = None
        if is_live(console):
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str) -> None:
        """Print one line of text, above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def draw(self, *, plain: bool = False) -> None:
        """Look, and draw what is seen. Where nothing is redrawn, print it if ``plain``."""
        if self._live is not None:
            self._live.update(drawing(self._surveyor.look(), MOST_ROWS), refresh=True)
        elif plain:
            self.console.print(drawing(self._surveyor.look()))
