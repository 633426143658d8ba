"""What a live page shows is what the run's files have, whatever happens to them meanwhile."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbyol.runs.metrics import METRICS_FILE
from fastbyol.show import live
from fastbyol.show.live import MOST, Thinned, Watched, finite, merged_states

OLD_RUN = Path(__file__).parent.parent / "runs" / "old" / "finished"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that has not begun: its settings alone."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.toml", "env.json"):
        shutil.copy(OLD_RUN / name, folder / name)
    return folder


def steps(first: int, last: int, loss: float = 0.5) -> str:
    rows = (
        {"step": step, "epoch": step // 4, "loss": loss, "pos_cos": 0.9, "neg_cos": 0.1}
        for step in range(first, last)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def epoch(step: int, number: int, state: str = "healthy", accuracy: object = 50.0) -> str:
    row = {"event": "epoch", "step": step, "epoch": number, "state": state, "neg_cos": 0.1}
    return json.dumps({**row, "accuracy": accuracy}) + "\n"


def seen(watched: Watched) -> Any:
    """Look now, at all that there is; the answer is strict JSON."""
    while True:
        watched._due_s = 0.0
        body, _ = watched.answer()
        shown = json.loads(body, parse_constant=pytest.fail)
        if not shown["is_behind"]:
            return shown


@settings(max_examples=50)
@given(
    gaps=st.lists(
        st.tuples(
            st.integers(1, 9),
            st.none() | st.floats(-10, 10) | st.sampled_from([math.nan, math.inf]),
        ),
        min_size=1,
        max_size=100,
    ),
    scale=st.sampled_from([1, 40, 10**15]),
)
def test_a_thinned_curve_has_the_whole_ones_extremes_and_means(
    gaps: list[tuple[int, float | None]], scale: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(live, "MOST", 16)
        curve, rows, step = Thinned(("loss",)), [], 0
        for gap, value in gaps:
            step += gap * scale
            curve.add(step, {"loss": value})
            rows.append((step, value))
    table = curve.table()
    width, loss = table["width"], table["loss"]
    # Each row is in one bin: the one that begins at the multiple of the width below it.
    assert table["steps"] == sorted({step // width * width for step, _ in rows})
    assert len(table["steps"]) <= 16
    assert width == 1 or len({step // (width // 2) for step, _ in rows}) > 16
    for begin, low, high, mean in zip(
        table["steps"], loss["low"], loss["high"], loss["mean"], strict=True
    ):
        inside = [
            value
            for step, value in rows
            if step // width * width == begin and value is not None and math.isfinite(value)
        ]
        if not inside:
            assert (low, high, mean) == (None, None, None)
        else:
            assert (low, high) == (min(inside), max(inside))
            assert mean == pytest.approx(sum(inside) / len(inside), abs=1e-12)


def test_the_worst_of_neighbouring_states_is_kept() -> None:
    spans = [[0, 1, "healthy"], [1, 2, "collapsed"], [2, 3, "odd"]]
    assert merged_states(spans) == [[0, 2, "collapsed"], [2, 3, "odd"]]


@pytest.mark.parametrize("value", [None, "1", True, [], {}, math.nan, math.inf, 10**400, -1e300])
def test_what_is_no_number_is_missing(value: object) -> None:
    assert finite(value) is None


def test_a_run_grows_is_cut_back_and_ends(folder: Path) -> None:
    watched, path = Watched(folder), folder / METRICS_FILE
    shown = seen(watched)
    assert (shown["status"], shown["step"], shown["state"]) == ("stopped", 0, None)
    untrained = {"event": "untrained", "step": 0, "accuracy": 10.0, "num_scored": 100}
    begin = json.dumps(untrained) + "\n" + steps(0, 4)
    path.write_text(begin + epoch(4, 0) + steps(4, 7))
    with (folder / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shown = seen(watched)
    assert (shown["status"], shown["step"], shown["state"]) == ("running", 7, "healthy")
    assert shown["curves"]["steps"] == list(range(7))
    assert shown["accuracy"]["accuracy"]["mean"] == [50.0]
    # Wilson's interval of 50 of 100, from its table.
    assert shown["accuracy"]["interval"] == [pytest.approx([40.38, 59.62], abs=0.01)]
    # Resumed from the epoch before, and then to its end.
    path.write_text(begin + epoch(4, 0, "collapsing") + steps(4, 6, 0.25))
    shown = seen(watched)
    assert (shown["status"], shown["step"], shown["state"]) == ("stopped", 6, "collapsing")
    assert shown["curves"]["loss"]["mean"] == [0.5] * 4 + [0.25] * 2
    assert shown["spans"] == [[0, 4, "collapsing"]]
    with path.open("a") as file:
        file.write('{"event": "end", "step": 6, "epoch": 1, "state": "collapsed"}\n')
    assert seen(watched)["status"] == "done"


def test_a_folder_is_removed_and_made_again(folder: Path) -> None:
    watched, path = Watched(folder), folder / METRICS_FILE
    path.write_text(steps(0, 5))
    assert seen(watched)["status"] == "stopped"
    path.unlink()  # as removing the folder begins
    assert seen(watched)["step"] == 5
    other = folder.with_name("other")
    folder.rename(other)
    shown = seen(watched)
    assert (shown["status"], shown["step"]) == ("gone", 5)
    assert shown["differences"]
    other.rename(folder)
    env = json.loads((folder / "env.json").read_text())
    (folder / "env.json").write_text(json.dumps({**env, "started": "later"}))
    shown = seen(watched)  # another run, which has no step yet
    assert (shown["status"], shown["step"], shown["curves"]["steps"]) == ("stopped", 0, [])
    path.write_text(steps(0, 3, 0.125))
    assert seen(watched)["curves"]["loss"]["mean"] == [0.125] * 3
    (folder / "config.toml").unlink()
    path.unlink()
    shown = seen(watched)
    assert (shown["status"], shown["step"]) == ("gone", 3)
    assert any("no run is here any more" in note for note in shown["notes"])


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / METRICS_FILE).write_text(steps(0, 9))
    (secret / "timing.jsonl").write_text(
        '{"written": 1, "unix_s": 1.0}\n{"written": 9, "unix_s": 2.0}\n'
    )
    text = (folder / "config.toml").read_text().replace("[data]", '[data]\nname = "x"')
    (secret / "config.toml").write_text(text)
    for name in (METRICS_FILE, "config.toml", "timing.jsonl"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret / name)
    watched = Watched(folder)
    shown = seen(watched)
    assert (shown["step"], shown["images_per_s"], shown["preset"]) == (0, None, None)
    for name in ("config.toml", METRICS_FILE):
        assert f"{name}: cannot read: is a link, not a regular file" in shown["notes"]
    shutil.rmtree(folder)
    folder.symlink_to(secret)
    note = "the way to the run's folder has a link now, which is not followed"
    shown = seen(watched)
    assert (shown["status"], shown["step"], shown["notes"]) == ("gone", 0, [note])


def test_a_parent_that_becomes_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "runs" / "run"
    shutil.copytree(folder, inner)
    watched = Watched(inner)
    inner.parent.rename(tmp_path / "moved")
    shutil.copytree(folder, tmp_path / "other" / "run")
    (tmp_path / "other" / "run" / METRICS_FILE).write_text(steps(0, 9))
    inner.parent.symlink_to(tmp_path / "other")
    shown = seen(watched)
    assert (shown["status"], shown["step"], len(shown["notes"])) == ("gone", 0, 1)
    inner.parent.unlink()
    (tmp_path / "moved").rename(inner.parent)
    assert seen(watched)["status"] == "stopped"


def test_a_link_that_was_typed_and_an_odd_name(folder: Path, tmp_path: Path) -> None:
    odd = folder.rename(tmp_path / "<b>\udce9\x1b[1m")
    (tmp_path / "latest").symlink_to(odd)
    (odd / METRICS_FILE).write_text(steps(0, 2))
    shown = seen(Watched(tmp_path / "latest"))
    assert (shown["name"], shown["step"]) == (r"<b>\udce9\x1b[1m", 2)


def test_damaged_files_are_a_note(folder: Path) -> None:
    watched, config = Watched(folder), folder / "config.toml"
    before = seen(watched)
    text = config.read_text()
    damaged = [
        "<b>",
        "[" * 10_000,
        text.replace("blog", "../../secret"),
        "\x00",
        "#" * (1 << 20) + "\n",
    ]
    for content in damaged:
        config.write_text(content)
        shown = seen(watched)
        (note,) = shown["notes"]
        assert "\n" not in note
        assert len(note) < 400
        assert shown["differences"] == before["differences"]  # the last that could be read
    config.write_bytes(b"\xff")
    assert len(seen(watched)["notes"]) == 1
    config.write_text(text)
    for name in ("env.json", "timing.jsonl"):
        (folder / name).write_text("[" * 10_000 + '\n{"written": "x", "unix_s": null}\n3\n')
    os.mkfifo(folder / METRICS_FILE)
    (folder / ".lock").unlink(missing_ok=True)
    os.mkfifo(folder / ".lock")
    shown = seen(watched)
    assert shown["notes"] == [f"{METRICS_FILE}: cannot read: is a named pipe, not a regular file"]
    assert shown["status"] == "stopped"


def test_odd_rows_are_shown_as_they_are(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 0, "epoch": 0, "loss": math.nan, "pos_cos": 1e300, "neg_cos": 2**62},
        {"event": "untrained", "step": 1, "accuracy": 250, "num_scored": "many"},
        {
            "event": "epoch",
            "step": 1,
            "epoch": 0,
            "state": "<b>" * 1000,
            "neg_cos": 0.0,
            "accuracy": -3.0,
        },
        {"event": "state", "step": 1, "after": 3},
    ]
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / METRICS_FILE).open("a") as file:
        file.write("x\n" + steps(1, 5))
    shown = seen(Watched(folder))
    assert shown["step"] == 1
    assert shown["notes"] == [f"{METRICS_FILE}: damaged behind step 1: the rest is not read"]
    assert shown["curves"]["loss"]["mean"] == [None]
    assert shown["accuracy"]["interval"] == [None]
    assert shown["state"].startswith("<b><b>")
    assert len(shown["state"]) < 300
    assert ["loss", "not finite"] in shown["newest"]


def test_pace_and_time_left(folder: Path) -> None:
    (folder / METRICS_FILE).write_text(steps(0, 4) + epoch(4, 0) + steps(4, 6))
    config = (folder / "config.toml").read_text()
    epochs, batch = (
        int(next(line for line in config.splitlines() if line.startswith(f"{key} = ")).split()[2])
        for key in ("epochs", "batch_size")
    )
    drains = [{"event": "open", "unix_s": 100.0}] + [
        {"event": "drain", "written": written, "unix_s": at}
        for written, at in ((2, 1000.0), (4, 1002.0), (6, 1004.0))
    ]
    timing = '{"event": "drain", "written": 900, "unix_s": 1.0}\n'  # before it was resumed
    (folder / "timing.jsonl").write_text(timing + "".join(json.dumps(row) + "\n" for row in drains))
    with (folder / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shown = seen(Watched(folder))
    assert shown["images_per_s"] == batch  # a step a second
    assert shown["left"] == f"0:{4 * epochs - 6:02d}"
    assert (shown["epoch"], shown["steps"], shown["written_s"]) == (1, 4 * epochs, 1004.0)


def test_a_long_run_is_read_in_slices_and_kept_small(folder: Path) -> None:
    parts = [
        steps(first, first + 4) + epoch(first + 4, first // 4, str(first % 8))
        for first in range(0, 40_000, 4)
    ]
    (folder / METRICS_FILE).write_text("".join(parts))
    watched, answers = Watched(folder), []
    while not answers or answers[-1]["is_behind"]:
        began = time.thread_time()
        body, _ = watched.answer()
        # Own time of a look, far above the quarter second that it reads.
        assert time.thread_time() - began < 2.0
        assert len(body) < 300_000
        answers.append(json.loads(body))
    reached = [answer["step"] for answer in answers]
    assert reached == sorted(reached)
    assert reached[-1] == 40_000
    assert len(answers[-1]["curves"]["steps"]) <= MOST
    assert len(answers[-1]["accuracy"]["steps"]) <= MOST
    assert len(answers[-1]["spans"]) <= MOST


def test_files_are_read_twice_a_second_at_most(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks = [100.0], []
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    watched = Watched(folder)
    look = watched._look
    monkeypatch.setattr(watched, "_look", lambda: looks.append(1) or look())
    for _ in range(50):
        watched.answer()
    assert len(looks) == 0
    clock[0] += live.EVERY_S
    for _ in range(50):
        watched.answer()
    assert len(looks) == 1
