"""consistency.py: a run goes on as what it was, or says which key or file is not what it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastbyol import api
from fastbyol.engine import capture
from fastbyol.engine.observer import Silent
from fastbyol.engine.step import Forward, StepMetrics, TrainState
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.runs import checkpoint, consistency
from fastbyol.runs.metrics import read_metrics
from tiny import beton_files, tiny_config


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return beton_files(tmp_path_factory.mktemp("betons"))


@pytest.fixture(scope="module")
def made(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("made") / "run"
    api.train(
        tiny_config(
            files, "probe.every_epochs=0", "train.epochs=2", "run.checkpoint_every_steps=2"
        ),
        run,
    )
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def edit(run: Path, old: str, new: str) -> None:
    text = (run / "config.toml").read_text()
    assert text.count(old) == 1
    (run / "config.toml").write_text(text.replace(old, new))


def test_a_changed_key_is_refused_by_name(run: Path) -> None:
    edit(run, "momentum = 0.9", "momentum = 0.8")
    for work in (api.resume, api.load_encoder):
        with pytest.raises(
            UsageError, match=r"optim.momentum is 0.8, the run was made with 0.9.*--init-from"
        ) as caught:
            work(run)
        assert len(str(caught.value).splitlines()) == 1


def test_a_key_changed_before_the_first_checkpoint_is_refused_too(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    edit(run, "momentum = 0.9", "momentum = 0.8")
    with pytest.raises(UsageError, match="the run was made with"):
        api.resume(run)


def test_what_no_number_depends_on_may_change(run: Path, made: Path) -> None:
    edit(run, 'cache = "auto"', 'cache = "none"')
    edit(run, "keep_checkpoints = 3", "keep_checkpoints = 1")
    checkpoint.newest(run / "checkpoints").unlink()  # type: ignore[union-attr]
    assert api.resume(run).finished
    assert (run / "metrics.jsonl").read_bytes() == (made / "metrics.jsonl").read_bytes()


def test_lost_checkpoints_do_not_start_a_run_again(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="no checkpoint, though the run had made some"):
        api.resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_turned_clock_changes_nothing(
    run: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files dated in reverse order, and a clock that runs backwards."""
    for age, path in enumerate(sorted((run / "checkpoints").iterdir())):
        os.utime(path, (2e9 - age * 1e6,) * 2)
    checkpoint.newest(run / "checkpoints").unlink()  # type: ignore[union-attr]
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    api.resume(run)
    for name in ("metrics.jsonl", "layers.npy"):
        assert (run / name).read_bytes() == (made / name).read_bytes()


def poisoned(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Views of NaN at some steps: the shortest way to a gradient that is not finite."""
    step = capture.train_step

    def poison(state: TrainState, views: Tensor, forward: Forward) -> StepMetrics:
        return step(state, views * float("nan") if int(state.step) in steps else views, forward)

    monkeypatch.setattr(capture, "train_step", poison)


def test_a_few_bad_steps_are_left_out_counted_and_said(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 2, 3, 7)
    summary = api.train(tiny_config(files, "probe.every_epochs=0"), tmp_path / "run")
    assert summary.finished
    rows, events = read_metrics(tmp_path / "run")
    assert [
        (event["step"], event["in_a_row"]) for event in events if event["event"] == "skipped"
    ] == [(3, 1), (4, 2), (8, 1)]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [2, 3, 7]
    assert [row["skipped"] for row in rows[:8]] == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    first = next(event for event in events if event["event"] == "epoch")
    losses = [row["loss"] for row in rows[:6] if row["grad_norm"] is not None]
    assert first["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert first["skipped"] == pytest.approx(2 / 6)
    meta = checkpoint.load_latest(tmp_path / "run" / "checkpoints").meta
    assert consistency.damage(tmp_path / "run", meta["telemetry"]) is None


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, *range(8, 18))
    config = tiny_config(
        files, "train.max_skipped_steps=3", "run.drain_every_steps=1", "probe.every_epochs=0"
    )
    with pytest.raises(
        FastbyolError, match=r"4 steps in a row.*--init-from \S*ckpt-000000006.safetensors"
    ) as caught:
        api.train(config, tmp_path / "run")
    assert caught.value.exit_code == 1
    with pytest.raises(FastbyolError, match="4 steps in a row"):
        api.resume(tmp_path / "run")


def test_weights_that_are_no_numbers_are_never_saved(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[TrainState] = []
    create = TrainState.create

    def created(*args: Any, **options: Any) -> TrainState:
        states.append(create(*args, **options))
        return states[-1]

    class Vandal(Silent):
        def progress(self, message: object) -> None:
            if message.step == 9:  # type: ignore[attr-defined]
                states[0].arena.online[5] = float("inf")

    monkeypatch.setattr(TrainState, "create", created)
    config = tiny_config(
        files, "probe.every_epochs=0", "run.drain_every_steps=1", "run.checkpoint_every_steps=3"
    )
    with pytest.raises(
        FastbyolError, match=r"arena.online holds NaN or infinity: not saved.*ckpt-000000006"
    ):
        api.train(config, tmp_path / "run", observer=Vandal())
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").meta["step"] == 6
