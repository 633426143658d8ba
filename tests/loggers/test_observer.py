"""A training with loggers is the same training, whatever they or it come to."""

from __future__ import annotations

import random
import time
from pathlib import Path

import processes
import pytest
import run_rig as rig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastbyol import api
from fastbyol.engine.observer import Silent
from fastbyol.errors import UsageError
from fastbyol.loggers import sink
from fastbyol.runs.lock import is_locked
from fastbyol.runs.metrics import METRICS_FILE, read_metrics
from tiny import beton_files, tiny_config

KILLS = 5
QUICK = ("engine.kernels=reference", "log.pictures=0", "run.checkpoint_every_steps=2")
BROKEN = {
    "wandb": "raise RuntimeError('<b>no\\nlibrary')",
    "mlflow": "import time; time.sleep(1000)",
    "trackio": "import os; os._exit(0)",
    "sqlalchemy": "",
    "alembic": "",
}


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return beton_files(tmp_path_factory.mktemp("betons"))


@pytest.fixture(scope="module")
def whole(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("whole") / "run"
    api.train(tiny_config(files, *QUICK), run)
    return records(run)


def records(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in (METRICS_FILE, "layers.npy")}


def losses(run: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, round(event.value, 5)) for event in events.Scalars("loss")]


def recorded_losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], round(row["loss"], 5)) for row in read_metrics(run)[0]]


def test_broken_loggers_are_notes(
    files: tuple[Path, Path],
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, code in BROKEN.items():
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    run, notes = tmp_path / "run", Notes()
    config = tiny_config(files, *QUICK, "log.to=wandb,mlflow,trackio,tensorboard", "log.wait_s=5")
    began = time.monotonic()
    assert api.train(config, run, observer=notes).finished
    assert time.monotonic() - began < 120
    log = f"see {run}/loggers"
    missing = "send what is missing with `fastbyol log"
    assert [line for line in notes.lines if "wandb" in line] == [
        "logger wandb: wandb cannot be imported: RuntimeError: <b>no library",
        f"logger wandb: ended ({log}/wandb/log.txt): {missing} {run} --to wandb`",
    ]
    assert [line for line in notes.lines if "trackio" in line] == [
        f"logger trackio: ended ({log}/trackio/log.txt): {missing} {run} --to trackio`",
    ]
    assert [line for line in notes.lines if "mlflow" in line] == [
        "sending what is left to mlflow, 5 s at most",
        f"logger mlflow: 5 s did not do for what is left: send it with `fastbyol log {run} --to "
        "mlflow`",
    ]
    assert losses(run) == recorded_losses(run)
    assert records(run) == whole
    assert not is_locked(run / "loggers" / "tensorboard")


def test_killed_and_resumed_trainings_are_logged_without_gap_and_double_step(
    files: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    run, marks = tmp_path / "run", rig.Marks(tmp_path / "marks")
    config = tiny_config(files, *QUICK, "log.to=tensorboard")
    for _ in range(KILLS):
        process = rig.start(run, config, marks)
        marks.wait_for_step(process)
        time.sleep(random.uniform(0.0, 1.0))
        process.kill()
        process.join(processes.PATIENCE_S)
        marks.clear()
    process = rig.start(run, config, marks)
    process.join(processes.PATIENCE_S)
    assert process.exitcode == 0
    assert records(run) == whole
    assert losses(run) == recorded_losses(run)
    assert len(losses(run)) == 18


def test_a_library_that_is_missing_is_refused_before_the_run_begins(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"wandb is not installed: pip install 'fastbyol\[wandb\]'"
    ):
        api.train(tiny_config(files, "log.to=wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_its_name_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nolibrary").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sink.LIBRARIES, "wandb", ("nolibrary",))
    with pytest.raises(UsageError, match="nolibrary is not installed"):
        sink.refuse_missing(tiny_config((tmp_path, tmp_path), "log.to=wandb"))
