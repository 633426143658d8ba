"""The display of a folder: counts, table and notes; plain lines where nothing is redrawn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fastbyol import output
from fastbyol.fleet import board as module
from fastbyol.fleet import ledger
from fastbyol.fleet.board import MOST_ROWS, Board, drawing, headline
from fastbyol.fleet.survey import Row, Survey, Surveyor
from folders import ask

RUNNING = Row(
    "gn-lars-0.2 seed 0", "running", 5, 20, step=40, state="healthy", neg_cos=0.25, accuracy=33.25,
    img_s=812.4, left_s=300.0, worker="node7:812",
)  # fmt: skip
LOST = Row("gn-lars-0.2 seed 1", "lost", 2, 20, worker="node7:813", note="node7:813 is gone")
FAILED = Row("gn-lars-0.1 seed 0", "failed", 0, 20, note="is not [empty]")
DONE, NEW = Row("gn-lars-0.1 seed 1", "done", 20, 20), Row("gn-lars-0.1 seed 2", "new", 0, 20)
WAITING = Row("gn-lars-0.2-replayed seed 0", "waiting", 0, 20, note="for gn-lars-0.2/seed1")


def made(*rows: Row, notes: tuple[str, ...] = (), left_s: float | None = None) -> Survey:
    return Survey(Path("out"), rows, notes, left_s)


def text(survey: Survey, most: int | None = None) -> str:
    console = output.console()
    console.file, console.width = io.StringIO(), 120
    console.print(drawing(survey, most))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_headline_counts_what_there_is() -> None:
    survey = made(RUNNING, LOST, FAILED, DONE, NEW, WAITING, left_s=3725.0)
    line = "6 runs: 1 done, 1 running, 1 lost, 1 failed, 1 waiting, 1 new; 22 %, 1:02:05 left"
    assert headline(survey) == line
    assert headline(made(DONE, DONE)) == "2 runs: 2 done; 100 %"
    assert headline(made()) == "0 runs: none; 0 %"


def test_the_table_has_who_works_on_what() -> None:
    lines = text(made(LOST, DONE, NEW, WAITING, RUNNING, FAILED)).splitlines()
    assert lines[1].split() == [
        *("run", "status", "epoch", "state", "neg", "cos", "accuracy", "img/s", "worker")
    ]
    # Who works comes first; what is done or has not begun needs no row.
    assert [line.split()[2:4] for line in lines[2:5]] == [
        ["0", "running"],
        ["1", "lost"],
        ["0", "failed"],
    ]
    assert lines[2].split()[4:] == ["5/20", "healthy", "0.2500", "33.2%", "812", "node7:812"]
    assert lines[3].split()[4:] == ["2/20", "node7:813"]
    assert lines[5:] == [
        "gn-lars-0.2 seed 1: node7:813 is gone",
        "gn-lars-0.1 seed 0: is not [empty]",
    ]


def test_notes_on_the_folder_come_last() -> None:
    assert text(made(FAILED, notes=("the disk is full",))).splitlines()[-1] == "the disk is full"


def test_a_screen_has_room_for_so_many_rows() -> None:
    rows = [Row(f"a seed {number}", "stopped", 1, 2, note=f"why {number}") for number in range(40)]
    shown = text(made(*rows), MOST_ROWS)
    assert "and 24 more" in shown
    assert shown.count("why ") == MOST_ROWS
    everything = text(made(*rows))
    assert "more" not in everything
    assert everything.count("why ") == 40


def test_what_comes_from_outside_cannot_draw_on_the_terminal() -> None:
    """The name of a host, an error with a file's name."""
    evil = "x\x1b[31m\x07y"
    row = Row("a seed 0", "failed", 0, 1, worker=evil, note=evil, state=evil)
    shown = text(made(row, notes=(evil,)))
    assert "\x1b" not in shown
    assert "\x07" not in shown


def board(out: Path) -> tuple[Board, io.StringIO]:
    file = io.StringIO()
    return Board(Console(file=file, width=100), Surveyor(out)), file


def test_plain_output_has_one_line_an_event(tmp_path: Path) -> None:
    """Looks are not printed: a log would fill with tables. ``status --watch`` asks for them."""
    ask(tmp_path, "gn-lars-0.1", seeds=2)
    shown, file = board(tmp_path)
    with shown:
        shown.draw()
        assert file.getvalue() == ""
        shown.line(f"gn-lars-0.1 seed 0: done, healthy, {'x' * 200} [red]")
        shown.draw()
        lines = file.getvalue().splitlines()
        assert lines == [f"gn-lars-0.1 seed 0: done, healthy, {'x' * 200} [red]"]
        shown.draw(plain=True)
        assert file.getvalue().splitlines()[1:] == ["2 runs: 2 new; 0 %"]


def test_a_terminal_is_redrawn_and_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path, "gn-lars-0.1", seeds=2)
    monkeypatch.setattr(module, "is_live", lambda console: True)
    file = io.StringIO()
    console = Console(file=file, width=100, height=24, force_terminal=True, color_system=None)
    with Board(console, Surveyor(tmp_path)) as shown:
        shown.draw()
        shown.line("gn-lars-0.1 seed 0: done")
        path = tmp_path / "ledger/gn-lars-0.1/seed0.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "done"}))
        ledger.ask_to_stop(tmp_path)
        shown.draw()
    printed = file.getvalue()
    assert "2 runs: 2 new; 0 %" in printed
    assert "2 runs: 1 done, 1 new; 50 %" in printed
    assert "gn-lars-0.1 seed 0: done" in printed
    assert "--undo" in printed
    assert printed.endswith(("\x1b[?25h", "\x1b[2K", "\r")), "the display is wiped out at the end"
