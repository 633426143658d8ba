"""Runs that earlier code made are listed, read, reported and resumed by today's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbyol import api
from fastbyol.registry.index import list_runs
from fastbyol.runs import consistency
from fastbyol.runs.layers import LayersFile, read_layers
from fastbyol.runs.metrics import MetricsFile, read_metrics
from fastbyol.show import run_report

OLD = Path(__file__).parent / "old"
# The step of each run's checkpoint, and the spacing in steps of its layers.
RUNS = {
    "finished": (18, 1),
    "killed": (8, 1),
    "stopped": (6, 1),
    "replayed": (9, 2),
    "unpinned": (8, 1),
}
every_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the five folders. Their images are only read, where they lie."""
    return Path(shutil.copytree(OLD, tmp_path / "old", ignore=shutil.ignore_patterns("*.beton")))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_old_runs_are_listed(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {row.name: (row.status, row.epochs_done, row.accuracy) for row in list_runs(old)}
    assert rows == {
        "finished": ("done", 3, 8.0),
        "killed": ("stopped", 1, 8.0),
        "replayed": ("stopped", 1, 8.0),
        "stopped": ("stopped", 0, None),
        "unpinned": ("stopped", 1, 12.0),
    }
    assert caplog.messages == []


@every_run
def test_old_metrics_and_layers_are_read(name: str) -> None:
    run, (step, every) = OLD / name, RUNS[name]
    rows, _ = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(step))
    values = read_layers(run)
    assert values.steps.tolist() == list(range(0, step, every))
    assert values.values.shape == (len(values.steps), 68 if name == "killed" else 72, 5)
    assert np.isfinite(values.values).all()
    assert values.metrics == ("weight_norm", "grad_norm", "trust_ratio", "rate", "update_norm")
    assert consistency.damage(run, consistency.last_meta(run / "checkpoints")["telemetry"]) is None


@every_run
@pytest.mark.parametrize("file", ["metrics.jsonl", "resumed.jsonl"])
def test_old_metrics_are_written_by_the_same_bytes_today(
    tmp_path: Path, name: str, file: str
) -> None:
    rows = lines(OLD / name / file)
    names = [
        key
        for key in next(row for row in rows if "event" not in row)
        if key not in ("step", "epoch")
    ]
    metrics = MetricsFile(tmp_path, names, steps_per_epoch=6, resume_step=0)
    for row in rows:
        if "event" in row:
            metrics.append_event(row.pop("event"), row.pop("step"), row)
        else:
            metrics.append_steps(row["step"], np.array([[row[key] for key in names]], np.float32))
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (OLD / name / file).read_bytes()


@every_run
def test_old_runs_are_reported(old: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert run_report.write(old / name) == [old / name / "report.html"]
    assert (old / name / "report.html").stat().st_size > 20_000
    assert caplog.messages == []


class KilledError(BaseException):
    """The end of a process."""


def dies(*_: object, **options: object) -> None:
    raise KilledError


@pytest.mark.parametrize("name", ["finished", "killed"])
@pytest.mark.parametrize(
    "call",
    [
        "os.fsync",
        "pathlib.Path.replace",
        "fastbyol.runs.durable.sync_folder",
        "pathlib.Path.unlink",
    ],
)
def test_a_kill_while_old_layers_are_converted_loses_none(
    old: Path, name: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (step, every) = old / name, RUNS[name]
    before, written = read_layers(run), consistency.last_meta(run / "checkpoints")["telemetry"]
    with monkeypatch.context() as patch:
        patch.setattr(call, dies)
        with pytest.raises(KilledError):
            LayersFile(run, before.names, before.metrics, every=every, resume_step=step)
    for _ in range(2):
        assert read_layers(run).values.tobytes() == before.values.tobytes()
        assert consistency.damage(run, written) is None
        LayersFile(run, before.names, before.metrics, every=every, resume_step=step).close()
    assert {path.name for path in run.glob("layers.*")} == {"layers.npy"}
    (run / "layers.npy").write_bytes((run / "layers.npy").read_bytes()[:-1])
    assert (
        consistency.damage(run, written)
        == f"{run}/layers.npy: is not what was written: cut, changed or lost"
    )


@every_run
def test_old_runs_are_resumed_to_their_end(old: Path, name: str) -> None:
    run, (step, every) = old / name, RUNS[name]
    if name == "replayed":
        file = run / "config.toml"
        file.write_text(
            file.read_text().replace('"/data/finished"', json.dumps(str(old / "finished")))
        )
    before, layers_before = (run / "metrics.jsonl").read_bytes(), read_layers(run)
    assert api.resume(run, data=OLD / "train.beton", test_data=OLD / "test.beton").finished
    after = (run / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    rows, recorded = (
        [row for row in lines(run / file) if "event" not in row]
        for file in ("metrics.jsonl", "resumed.jsonl")
    )
    assert [row["step"] for row in rows] == list(range(18))
    # What made the recording may round otherwise than the cpu at hand, and chaos does the rest: one
    # step is compared.
    assert [row["loss"] for row in rows[: step + 1]] == pytest.approx(
        [row["loss"] for row in recorded[: step + 1]], rel=1e-4
    )
    assert all(math.isfinite(row["loss"]) for row in rows)
    layers_after = read_layers(run)
    assert layers_after.steps.tolist() == list(range(0, 18, every))
    assert layers_after[2:] == layers_before[2:]
    kept = len(layers_before.steps)
    assert layers_after.values[:kept].tobytes() == layers_before.values.tobytes()
    if name == "finished":
        assert after == before
    else:
        assert {path.name for path in run.glob("layers.*")} == {"layers.npy"}
    assert consistency.damage(run, consistency.last_meta(run / "checkpoints")["telemetry"]) is None
