"""Offline files of W&B have every step once, with its values, whatever was killed when."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from processes import wait_until

from fastbyol.loggers import to_wandb
from fastbyol.loggers.child import Child
from stores import wandb_alerts, wandb_curves, wandb_rows
from written_runs import EPOCHS, STEPS, WrittenRun, same

END = STEPS * EPOCHS


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without WANDB_MODE, nor a key: as a user who never logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_run_of_several_lives_is_there_once_and_offline_without_an_account(
    tmp_path: Path,
) -> None:
    run = WrittenRun(tmp_path / "<b>a\nb")
    run.write(0, 13)
    (line,) = run.send_apart("wandb")
    assert line.startswith("offline: `wandb sync ")
    assert same(wandb_curves(run.path), run.expected())
    # This life's logger is killed once something is on the disk.
    run.write(9, 24)
    child = Child(run.path, "wandb", limit_s=0.0)
    wait_until(lambda: len(wandb_rows(run.path)) >= 15, child.process)
    os.kill(child.process.pid, signal.SIGKILL)
    child.close()
    run.write(24, END)
    run.send_apart("wandb")
    rows = wandb_rows(run.path)
    assert [row["_step"] for row in rows] == list(range(END + 1))
    # The times are those at which the steps were written, in the first life that had them.
    assert [row["_timestamp"] for row in rows[11:14]] == [1e4 + 12, 1e4 + 13, 2e4 + 17]
    assert same(wandb_curves(run.path), run.expected())
    assert [row["_step"] for row in rows if "layers/rate/values" in row] == list(range(0, END, 4))
    assert sum(rows[4]["layers/rate/values"]) == len(run.layers_at(4, "rate"))
    assert [alert[::2] for alert in wandb_alerts(run.path)] == [
        ("collapsing", "WARN"), ("collapsed", "ERROR"), ("dead", "ERROR"),
    ]  # fmt: skip


def test_a_server_that_is_missing_is_told_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run = WrittenRun(tmp_path / "run")
    run.write(0, 3)
    child = Child(run.path, "wandb", limit_s=5.0)
    child.finish()
    code = child.process.wait()
    lines = child.lines()
    child.close()
    assert code == -signal.SIGALRM or (code == 1 and lines), (code, lines)


def test_a_file_is_read_up_to_its_first_record_that_is_not_whole(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run", "log.layers_every_steps=1")
    run.write(0, END)
    run.send_apart("wandb")
    (file,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
    content, whole = file.read_bytes(), [*to_wandb.records(file)]
    assert len(content) > 1 << 15  # records lie across two blocks
    assert [step for step, _ in to_wandb.rows([file])] == list(range(END + 1))
    for size in range(0, len(content), 997):
        file.write_bytes(content[:size])
        cut = [*to_wandb.records(file)]
        assert cut == whole[: len(cut)]
        assert sum(map(len, cut)) <= size
