"""MLflow: a run with the tag ``fastbyol.id``, in MLFLOW_TRACKING_URI or else mlflow.db beside RUN.

A measure's time is when the trainer wrote it, so that a row that is sent twice is the same row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

# MLflow tries for minutes by itself; read when it is imported.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
# Nothing goes to a third party unasked.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import numpy as np
from mlflow.entities import Experiment, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fastbyol.config_io import show
from fastbyol.loggers.sink import Alert, Entry, LoggedRun, Newest

TAG = "fastbyol.id"
# What MLflow allows in a call, and of a parameter's letters.
MOST_METRICS, MOST_PARAMS, MOST_LETTERS = 1000, 100, 6000
QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}


class MLflow:
    """A run of MLflow, made or gone on with."""

    def __init__(self, run: LoggedRun) -> None:
        self._run = run
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri:  # the run may go on where the variable is not set
            run.remember(uri=uri)
        parent = run.path.resolve().parent
        own = run.memory.get("uri")
        self._client = MlflowClient(own or f"sqlite:///{parent / 'mlflow.db'}")
        artifacts = None if own else (parent / "mlartifacts").as_uri()
        experiment = self._experiment(artifacts)
        stored = self._stored(experiment)
        self._id = stored.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._write_settings(stored)
        # These are each measure's newest. A call adds all of an entry or nothing.
        self.newest = Newest.of((each.step, (each.key,)) for each in stored.data._metric_objs)
        self.splits = True
        self.where = ""

    def send(self, entries: Sequence[Entry]) -> None:
        """Add the entries, many in a call."""
        batch: list[Metric] = []
        for entry in entries:
            metrics = [*_metrics(entry)]
            if len(batch) + len(metrics) > MOST_METRICS:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            batch += metrics
            if entry.picture is not None:
                self._client.log_artifact(self._id, str(entry.picture))
        self._client.log_batch(self._id, metrics=batch)

    def alert(self, alert: Alert) -> None:
        """Set tags: the state, and a text for each change."""
        self._client.set_tag(self._id, "state", alert.state)
        self._client.set_tag(self._id, f"state.{alert.step}", alert.text)

    def close(self, *, is_finished: bool) -> None:
        """Write how the run ended; nothing is buffered."""
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "KILLED")

    def _experiment(self, artifacts: str | None) -> str:
        own = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if own:
            return own
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self._run.config.log.project
        stored: Experiment | None = self._client.get_experiment_by_name(name)
        if stored is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:  # another run's logger may have been faster
                stored = self._client.get_experiment_by_name(name)
                if stored is None:
                    raise
        return str(stored.experiment_id)

    def _stored(self, experiment: str) -> Run:
        query = f"tags.`{TAG}` = '{self._run.id}'"
        for each in self._client.search_runs([experiment], query):
            return self._client.get_run(each.info.run_id)
        return self._client.create_run(
            experiment, run_name=self._run.name, tags={TAG: self._run.id, "folder": self._folder}
        )

    @property
    def _folder(self) -> str:
        return str(self._run.path.resolve())

    def _write_settings(self, stored: Run) -> None:
        """Add what is missing: MLflow's cannot change, and some settings of ours may."""
        missing = [
            Param(key, show(value)[:MOST_LETTERS])
            for key, value in self._run.settings.items()
            if key not in stored.data.params
        ]
        for first in range(0, len(missing), MOST_PARAMS):
            self._client.log_batch(self._id, params=missing[first : first + MOST_PARAMS])


def open_sink(run: LoggedRun) -> MLflow:
    """Open a run of MLflow."""
    return MLflow(run)


def _metrics(entry: Entry) -> Iterator[Metric]:
    unix_ms = int(entry.unix_s * 1000)
    for name, value in entry.scalars.items():
        yield Metric(name, value, unix_ms, entry.step)
    for name, values in entry.histograms.items():
        for word, value in zip(QUANTILES, np.quantile(values, [*QUANTILES.values()]), strict=True):
            yield Metric(f"{name}/{word}", float(value), unix_ms, entry.step)
