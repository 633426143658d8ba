"""trackio: a run in TRACKIO_DIR, or on TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, as its users set it.

Rows of a local run go into its database by trackio's own writer, which raises where it fails: what
``log`` cannot write it drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage

from fastbyol.config_io import show
from fastbyol.loggers.sink import Alert, Entry, LoggedRun, Newest


class Trackio:
    """A run of trackio, resumed if there is one of its name."""

    def __init__(self, run: LoggedRun) -> None:
        self._project = run.config.log.project
        self._settings = {
            key: value if isinstance(value, bool | int | float | str) else show(value)
            for key, value in run.settings.items()
        }
        self._live = trackio.init(
            project=self._project,
            # trackio knows runs by their names: those in other folders may have the same.
            name=f"{run.name}-{run.id[:6]}",
            resume="allow",
            config=self._settings,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        newest = self._live._next_step - 1
        if self._live._is_local:
            stored = SQLiteStorage.get_max_step_for_run(
                self._project, self._live.name, run_id=self._live.id
            )
            newest = -1 if stored is None else int(stored)
        self.newest, self.splits = Newest(newest, newest), False
        self.where = ""

    def send(self, entries: Sequence[Entry]) -> None:
        """Add a row for each entry."""
        rows = [self._row(entry) for entry in entries]
        if not self._live._is_local:
            for entry, row in zip(entries, rows, strict=True):
                self._live.log(row, step=entry.step)
            return
        SQLiteStorage.bulk_log(
            project=self._project,
            run=self._live.name,
            run_id=self._live.id,
            metrics_list=rows,
            steps=[entry.step for entry in entries],
            timestamps=[datetime.fromtimestamp(entry.unix_s, UTC).isoformat() for entry in entries],
            config=self._live.config,
            log_ids=[f"{self._live.id}-{entry.step}" for entry in entries],
        )

    def alert(self, alert: Alert) -> None:
        """Send an alert."""
        self._live.alert(
            alert.state, alert.text, level=trackio.AlertLevel(alert.level), step=alert.step
        )

    def close(self, *, is_finished: bool) -> None:
        """Wait until all is written or sent."""
        self._live.finish()

    def _row(self, entry: Entry) -> dict[str, Any]:
        row: dict[str, Any] = dict(entry.scalars)
        for name, values in entry.histograms.items():
            row[name] = trackio.Histogram(values)._to_dict()
        if entry.picture is not None:
            picture = trackio.Image(str(entry.picture))
            row["views"] = self._live._process_media(picture, entry.step)
        return row


def open_sink(run: LoggedRun) -> Trackio:
    """Open a run of trackio."""
    return Trackio(run)
