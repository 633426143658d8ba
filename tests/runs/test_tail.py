"""A tail sees what a reader of the whole file sees, however the file grows, is cut or replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.runs.metrics import METRICS_FILE, read_metrics
from fastbyol.runs.tail import Tail


def line(step: int, loss: float = 0.5) -> bytes:
    return json.dumps({"step": step, "epoch": step // 4, "loss": loss}).encode() + b"\n"


def event(step: int) -> bytes:
    return json.dumps({"event": "state", "step": step}).encode() + b"\n"


def look(tail: Tail, seen: list[dict[str, Any]], most: int = 1 << 22) -> list[dict[str, Any]]:
    """Return the rows ``seen`` so far after all that is left has been read."""
    while True:
        news = tail.read(most)
        seen = news.rows if news.is_fresh else seen + news.rows
        if not news.rows:
            return seen


def whole(folder: Path) -> list[dict[str, Any]]:
    steps, events = read_metrics(folder)
    return sorted([*steps, *events], key=lambda row: row["step"] + ("event" not in row))


@given(
    lives=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=6),
    most=st.sampled_from([1, 50, 200, 1 << 22]),
    torn=st.integers(0, 20),
    looks=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_a_run_that_is_killed_and_resumed_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory,
    lives: list[tuple[int, int]],
    most: int,
    torn: int,
    looks: list[bool],
) -> None:
    # Every life begins at a step that an earlier one had reached, writes some more and is torn.
    folder = tmp_path_factory.mktemp("run")
    path, tail, seen, lines = folder / METRICS_FILE, Tail(folder), [], []
    for (start, more), is_read in zip(lives, looks, strict=False):
        lines = lines[: min(start, len(lines))]
        lines += [line(step) for step in range(len(lines), len(lines) + more)]
        path.write_bytes(b"".join(lines) + line(len(lines))[:torn])
        if is_read:
            seen = look(tail, seen, most)
            assert seen == whole(folder)
    assert look(tail, seen, most) == whole(folder)


def test_events_come_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(line(0) + event(1) + line(1))
    assert [row.get("event") for row in Tail(tmp_path).read().rows] == [None, "state", None]


def test_another_run_of_the_same_name_is_fresh(tmp_path: Path) -> None:
    path, tail = tmp_path / METRICS_FILE, Tail(tmp_path)
    path.write_bytes(line(0, 0.5) + line(1, 0.5))
    assert tail.read().is_fresh
    assert not tail.read().is_fresh
    path.unlink()
    with pytest.raises(FileNotFoundError):
        tail.read()
    path.write_bytes(line(0, 0.25) + line(1, 0.25) + line(2, 0.25))
    news = tail.read()
    assert news.is_fresh
    assert [row["loss"] for row in news.rows] == [0.25] * 3


def test_lines_behind_a_damaged_one_are_not_read(tmp_path: Path) -> None:
    path, tail = tmp_path / METRICS_FILE, Tail(tmp_path)
    path.write_bytes(line(0) + b"\x00\x00\n" + line(1))
    news = tail.read()
    assert [row["step"] for row in news.rows] == [0]
    assert news.is_damaged
    assert tail.read() == ([], False, True)
    path.write_bytes(line(0) + line(1)[:-1])
    assert tail.read() == ([], False, False)


def test_a_link_is_followed_unless_it_must_not_be(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(line(0))
    (tmp_path / METRICS_FILE).symlink_to(tmp_path / "elsewhere")
    assert len(Tail(tmp_path).read().rows) == 1
    with pytest.raises(OSError, match="is a link, not a regular file"):
        Tail(tmp_path, follow_links=False).read()
