"""What each library's store has of a run, read without our sinks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from written_runs import Curves


def wandb_rows(run: Path) -> list[dict[str, Any]]:
    """Return the history of all of a run's offline files, the row of each step as a dict."""
    from wandb.proto.wandb_internal_pb2 import Record

    from fastbyol.loggers.to_wandb import records

    rows = []
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        for content in records(path):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                assert items["_step"] == record.history.step.num
                rows.append(items)
    return rows


def wandb_alerts(run: Path) -> list[tuple[str, str, str]]:
    """Return title, text and level of the alerts in a run's offline files."""
    from wandb.proto.wandb_internal_pb2 import Record

    from fastbyol.loggers.to_wandb import records

    contents = [
        Record.FromString(content)
        for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
        for content in records(path)
    ]
    alerts = [each.alert for each in contents if each.WhichOneof("record_type") == "alert"]
    return [(alert.title, alert.text, alert.level) for alert in alerts]


def wandb_curves(run: Path) -> Curves:
    """Return the numbers of a run's offline files by name."""
    return _curves([(row["_step"], row) for row in wandb_rows(run)])


def mlflow_curves(client: Any, run_id: str) -> Curves:
    """Return the whole history of each measure of a run in MLflow."""
    names = client.get_run(run_id).data.metrics
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]
        for name in names
    }


def trackio_rows(project: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each run of a project in trackio, by the run's name."""
    from trackio.sqlite_storage import SQLiteStorage

    return {name: SQLiteStorage.get_logs(project, name) for name in SQLiteStorage.get_runs(project)}


def trackio_curves(rows: list[dict[str, Any]]) -> Curves:
    """Return the numbers of rows by name."""
    return _curves([(row["step"], row) for row in rows])


def _curves(rows: list[tuple[int, dict[str, Any]]]) -> Curves:
    curves: Curves = {}
    for step, row in rows:
        for name, value in row.items():
            if name.startswith("_") or name in ("step", "timestamp"):
                continue
            if isinstance(value, int | float) or value == "NaN":
                curves.setdefault(name, []).append((step, float(value)))
    return curves
