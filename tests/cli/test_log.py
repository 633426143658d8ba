"""``--log`` and ``fastbyol log`` as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastbyol.runs.metrics import read_metrics
from stores import wandb_rows
from tiny import TINY, beton_files
from written_runs import EPOCHS, STEPS, WrittenRun

SETS = [word for each in TINY for word in ("--set", each)]


def test_a_run_is_logged_resumed_elsewhere_and_sent_to_another_logger(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    train, test = beton_files(tmp_path)
    typed = ["train", *SETS, "--data", train, "--test-data", test, "--out", "here"]
    typed += ["--set", "engine.kernels=reference", "--set", "log.pictures=3"]
    run.output(*typed, "--log", "tensorboard")
    events = EventAccumulator("here/tensorboard", size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    steps = [row["step"] for row in read_metrics(Path("here"))[0]]
    assert [event.step for event in events.Scalars("loss")] == steps
    (picture,) = events.Images("views")
    assert picture.encoded_image_string == Path("here/loggers/views.png").read_bytes()
    assert picture.width > 3 * 16
    # All of it once more to another one, and nothing to the first.
    Path("here").rename("there")
    out = run.output("log", "there", "--to", "tensorboard,wandb")
    assert out.startswith("there: sent to tensorboard\nwandb: offline: ")
    assert len([*Path("there/tensorboard").iterdir()]) == 1
    rows = wandb_rows(Path("there"))
    assert [row["_step"] for row in rows] == [*steps, steps[-1] + 1]
    assert rows[0]["views/_type"] == "image-file"
    # From now on to that one alone.
    run.output("resume", "there", "--log", "wandb")
    text = Path("there/config.toml").read_text()
    assert 'to = ["wandb"]' in text
    assert run.output("resume", "there", "--log", "") is not None
    assert "to = []" in Path("there/config.toml").read_text()


def test_what_cannot_be_is_one_line(run, tmp_path: Path) -> None:
    assert "no run here" in run.refusal("log", "absent", "--to", "tensorboard")
    written = WrittenRun(tmp_path / "run")
    written.write(0, STEPS * EPOCHS)
    assert "the nearest is tensorboard" in run.refusal("log", "run", "--to", "tensorbord")
    assert "log.to" in run.refusal("train", *SETS, "--log", "tensorbord")
    assert "log.project" in run.refusal("train", *SETS, "--set", "log.project=a/b")
    (written.path / "tensorboard").touch()
    code, out, err = run("log", "run", "--to", "tensorboard")
    assert (code, out) == (1, "tensorboard: run/tensorboard: cannot write: File exists\n")
    assert err == (
        "fastbyol: error: run: not sent to tensorboard (see run/loggers/tensorboard/log.txt)\n"
    )


def test_a_run_of_earlier_code_is_sent_whole(run, tmp_path: Path) -> None:
    import shutil

    old = Path(__file__).parents[1] / "runs" / "old" / "finished"
    shutil.copytree(old, "old")
    run.output("log", "old", "--to", "tensorboard")
    events = EventAccumulator("old/tensorboard", size_guidance={"scalars": 0}).Reload()
    rows = read_metrics(Path("old"))[0]
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("loss")] == [
        (row["step"], round(row["loss"], 5)) for row in rows
    ]
    assert [e.step for e in events.Scalars("epoch/accuracy")][-1] == len(rows)
