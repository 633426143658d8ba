"""MLflow's client sees every step once, with its values, whatever was killed when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastbyol.loggers.child import Child, environment
from written_runs import EPOCHS, STEPS, WrittenRun, same

END = STEPS * EPOCHS
# mlflow is read in a process of its own, too: its import changes much, and warns.
READ = """
import json, sys
sys.path[:0] = sys.argv[3:]
from mlflow.tracking import MlflowClient
from stores import mlflow_curves
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name(sys.argv[2])
print(json.dumps([
    {"curves": mlflow_curves(client, run.info.run_id), "name": run.info.run_name,
     "status": run.info.status, "tags": run.data.tags, "params": run.data.params}
    for run in client.search_runs([experiment.experiment_id])
]))
"""


def read(folder: Path, project: str = "fastbyol") -> list[dict]:
    import json

    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "engine")]
    done = subprocess.run(
        [sys.executable, "-c", READ, f"sqlite:///{folder / 'mlflow.db'}", project, *paths],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def numbers(curves: dict) -> dict:
    return {
        name: [tuple(row) for row in rows]
        for name, rows in curves.items()
        if not name.startswith("layers/")
    }


def test_a_run_of_several_lives_is_there_once(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "<b>a\nb", "log.project=p q")
    run.write(0, 13)
    run.send_apart("mlflow")
    run.write(9, 24)
    run.send_apart("mlflow")
    (stored,) = read(tmp_path, "p q")
    assert same(numbers(stored["curves"]), run.expected())
    assert stored["status"] == "KILLED"
    run.write(24, END)
    # As if the last call had been written, and its answer lost.
    state = run.path / "loggers" / "mlflow" / "state.json"
    assert run.send_apart("mlflow") == []
    assert state.exists()
    (stored,) = read(tmp_path, "p q")
    assert same(numbers(stored["curves"]), run.expected())
    assert (stored["name"], stored["status"]) == ("<b>a\\nb", "FINISHED")
    assert stored["tags"]["state"] == "dead"
    assert stored["tags"]["state.24"].startswith("collapsed after 24 steps")
    assert stored["params"]["log.project"] == '"p q"'
    assert stored["params"]["train.epochs"] == str(EPOCHS)
    medians = stored["curves"]["layers/rate/median"]
    assert medians == [
        [step, float(np.median(run.layers_at(step, "rate").astype(np.float64)))]
        for step in range(0, END, 4)
    ]


def test_a_server_that_is_missing_is_told_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run = WrittenRun(tmp_path / "run")
    run.write(0, 3)
    child = Child(run.path, "mlflow", limit_s=60.0)
    child.finish()
    assert child.process.wait() == 1
    (line,) = child.lines()
    child.close()
    assert "127.0.0.1" in line
    assert not (tmp_path / "mlflow.db").exists()
