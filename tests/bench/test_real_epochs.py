"""Epochs of real runs: an epoch's end includes its probe but no step, a whole epoch both."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbyol.engine import capture, trainer
from fastbyol.engine.saving import Saver
from fastbyol_bench import real_epochs, train
from fastbyol_bench.harness import Reading
from fastbyol_bench.pictures import beton
from fastbyol_bench.suite import Setting

CPU = torch.device("cpu")
STEP_S, PROBE_S = 0.2, 0.5


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make steps take STEP_S longer and probes PROBE_S, and checkpoints be on disk at once.

    An epoch ends for an observer when its checkpoint is, which a slow disk puts into the next.
    """
    make, save = capture.engine, Saver.save

    class Slow:
        mode = "eager"

        def __init__(self, engine: capture.Engine) -> None:
            self.prepare, self.engine = engine.prepare, engine

        def __call__(self, *arguments: Any) -> Any:
            time.sleep(STEP_S)
            return self.engine(*arguments)

    def probe(*_: object, **__: object) -> dict[str, float]:
        time.sleep(PROBE_S)
        return {"accuracy": 50.0, "rank": 3.0, "num_test": 10}

    def save_now(saver: Saver, *arguments: Any, **named: Any) -> None:
        save(saver, *arguments, **named)
        saver.wait()

    monkeypatch.setattr(Saver, "save", save_now)
    monkeypatch.setattr(capture, "engine", lambda *arguments: Slow(make(*arguments)))
    monkeypatch.setattr(trainer, "evaluate_together", probe)


def config(epochs: int) -> Any:
    made = real_epochs.config("fp32", CPU, size=32, batch=4, epochs=epochs)
    return made.model_copy(update={"model": made.model.model_copy(update={"width": 8})})


def test_an_end_is_all_but_steps(slow: None, tmp_path: Path) -> None:
    began = time.perf_counter()
    files = beton(tmp_path, 12, 32), beton(tmp_path, 20, 32)
    readings = real_epochs.ends(real_epochs.on_files(config(3), *files), tmp_path / "run")
    whole_s = time.perf_counter() - began
    assert len(readings) == 2
    assert all(reading.wall_s >= PROBE_S for reading in readings)
    # Nine steps, and the probes of untrained weights and of the last epoch, lie outside.
    assert sum(reading.wall_s for reading in readings) <= whole_s - 9 * STEP_S - 2 * PROBE_S
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_a_whole_epoch_is_steps_and_end(
    slow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measure as the train suite does on a GPU, on the embedded set."""
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "TEXTURES_TEST", 64)
    began = time.perf_counter()
    made = config(3).model_copy(
        update={"train": config(3).train.model_copy(update={"batch_size": 32})}
    )
    row = train._whole(Setting(CPU, quick=True), made, tmp_path, 80)
    assert row.timing is not None
    assert (row.images, row.timing.runs, row.derived) == (64, 2, False)
    assert 2 * STEP_S + PROBE_S <= row.timing.median_s <= (time.perf_counter() - began) / 2


def test_an_assembled_epoch_is_the_sum_of_its_parts() -> None:
    from fastbyol_bench.harness import timing
    from fastbyol_bench.results import Row

    step, end = (
        Row(suite="train", name=name, variant="v", timing=timing([Reading(wall, 2 * wall)] * 2))
        for name, wall in (("step", 2.0), ("end", 5.0))
    )
    row = train._assembled(step, end, images=1000, batch=100)
    assert row.derived
    assert row.timing is not None
    # Ten steps and an end; the order of a thousand samples takes less than a second.
    assert 25.0 < row.timing.median_s < 26.0
    assert 50.0 < row.timing.cpu_s < 52.0
    assert row.images == 1000
