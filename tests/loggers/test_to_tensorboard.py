"""TensorBoard's own reader sees every step once, with its values, whatever was killed when."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastbyol.loggers import follow as following
from fastbyol.loggers import to_tensorboard
from fastbyol.loggers.child import Child
from fastbyol.loggers.sink import LoggedRun
from written_runs import EPOCHS, STEPS, Curves, WrittenRun, as_float32, same

ALL = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
END = STEPS * EPOCHS


class Over:
    """A trainer that is over after a few looks, and for which nobody waits."""

    def __init__(self) -> None:
        self._looks = iter(range(100))

    def is_over(self) -> bool:
        return next(self._looks) > 5

    def wait(self, seconds: float) -> None:
        pass


def read(run: WrittenRun) -> EventAccumulator:
    return EventAccumulator(str(run.path / "tensorboard"), size_guidance=ALL).Reload()


def curves(run: WrittenRun) -> Curves:
    accumulator = read(run)
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_a_finished_run_has_all_values(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.write(0, END)
    assert run.send("tensorboard") == []
    assert same(curves(run), as_float32(run.expected()))
    events = read(run)
    for measure in ("rate", "grad_norm"):
        histograms = events.Histograms(f"layers/{measure}")
        assert [histogram.step for histogram in histograms] == list(range(0, END, 4))
        for step, histogram in ((item.step, item.histogram_value) for item in histograms):
            values = run.layers_at(step, measure).astype(np.float64)
            assert (histogram.min, histogram.max) == (values.min(), values.max())
            assert sum(histogram.bucket) == values.size
    # The times are those at which the steps were written.
    assert [event.wall_time for event in events.Scalars("loss")][:5] == [1e4 + 4] * 4 + [1e4 + 8]
    # Nothing is left to send.
    before = sorted((run.path / "tensorboard").iterdir())
    run.send("tensorboard")
    assert sorted((run.path / "tensorboard").iterdir()) == before


def test_a_change_of_state_is_a_text_and_so_are_the_settings(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run", "log.project=a b")
    run.write(0, END)
    run.send("tensorboard")
    events = read(run)
    texts = [
        (item.step, item.tensor_proto.string_val[0].decode()) for item in events.Tensors("state")
    ]
    assert [step for step, _ in texts] == [2 * STEPS, 3 * STEPS, END]
    assert "collapsed after 24 steps, collapsing before; neg_cos 0.5" in texts[1][1]
    (words,) = events.Tensors("settings")
    assert '    log.project = "a b"' in words.tensor_proto.string_val[0].decode().split("\n")


@settings(max_examples=25)
@given(
    lives=st.lists(
        st.tuples(st.integers(0, END), st.integers(0, 20), st.booleans()), min_size=1, max_size=5
    ),
    cut=st.integers(0, 60),
)
def test_killed_and_resumed_runs_leave_no_gap_and_no_double_step(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, int, bool]], cut: int
) -> None:
    run, done = WrittenRun(tmp_path_factory.mktemp("run") / "run"), 0
    for start, more, torn in lives:
        start = min(start, done)
        done = min(start + more, END)
        run.write(start, done, torn=torn)
        if torn:  # else nobody looked at this life's files
            run.send("tensorboard")
            seen = curves(run) if (run.path / "tensorboard").exists() else {}
            for rows in seen.values():
                assert len({step for step, _ in rows}) == len(rows)
        if files := sorted((run.path / "tensorboard").glob("events*")):
            # What a kill of the logger in the middle of a record leaves.
            os.truncate(files[-1], max(0, files[-1].stat().st_size - cut))
    run.write(done, END)
    run.send("tensorboard")
    assert same(curves(run), as_float32(run.expected()))


def test_a_logger_that_is_killed_at_work_goes_on_where_it_was(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.write(0, 10)
    child = Child(run.path, "tensorboard", limit_s=0.0)
    wait_until(lambda: (run.path / "tensorboard").exists() and curves(run), child.process)
    os.kill(child.process.pid, signal.SIGKILL)
    child.close()
    run.write(7, 20)
    run.send("tensorboard")
    assert same(curves(run), as_float32(run.expected()))


def test_a_disk_that_runs_full_tears_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = WrittenRun(tmp_path / "run")
    run.write(0, 20)
    monkeypatch.setattr(following, "MOST", 6)
    calls, append = iter(range(100)), to_tensorboard.append

    def fill(file, data: bytes) -> None:
        if next(calls) in (0, 3, 4):
            append(file, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        append(file, data)

    monkeypatch.setattr(to_tensorboard, "append", fill)
    lines: list[str] = []
    assert following.follow(run.path, "tensorboard", Over(), os.getppid(), lines.append)
    # Told once, although it happened again.
    assert lines == [
        f"{run.path}/tensorboard: cannot write: No space left on device; it is tried again"
    ]
    assert same(curves(run), as_float32(run.expected()))


def test_a_store_that_cannot_be_made_is_told_in_a_line(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.write(0, 9)
    (run.path / "tensorboard").write_text("in the way")
    child = Child(run.path, "tensorboard", limit_s=0.0)
    child.finish()
    assert child.process.wait() == 1
    assert child.lines() == [f"{run.path}/tensorboard: cannot write: File exists"]
    child.close()


def test_names_with_markup_are_text(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "<b>a\nb [x](http:)")
    run.write(0, 3)
    run.send("tensorboard")
    assert same(curves(run), as_float32(run.expected()))
    assert LoggedRun(run.path, "tensorboard").name == "<b>a\\nb [x](http:)"
