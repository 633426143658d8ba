"""output.py: whatever becomes of the streams, the command does its work and says in its exit code
what was lost.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from fastbyol import config_io, output
from fastbyol.show.screen import LiveDisplay, PlainDisplay, display

EVIL = os.fsdecode(b"caf\xe9") + "\x1b[31m\r\n\u202e[bold]:cat:[/x] b\u00e4d \u65e5"
SHOWN = r"caf\udce9\x1b[31m\r\n\u202e[bold]:cat:[/x] b\xe4d \u65e5"
# One line, and "Exception ignored", which Python says where the last flush fails, is another.
LOST = "fastbyol: error: standard output: cannot write: "


def command(
    *arguments: str, shell: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """``fastbyol`` with its streams as ``shell`` says, such as ``>/dev/full``."""
    program = f'exec "$0" -m fastbyol.cli.main "$@" {shell}'
    return subprocess.run(
        ["bash", "-c", program, sys.executable, *arguments],
        check=False, capture_output=True, text=True, errors="surrogateescape", timeout=600,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ("presets", "show", "blog"),
        ("presets", "list", "--json"),
        ("explain", "--diff", "blog", "paper"),
        ("train", "--help"),
        ("runs", str(Path(__file__).parent / "runs" / "old")),
    ],
    ids=lambda words: words[0],
)
def test_a_full_disk_under_standard_output_is_one_line(arguments: tuple[str, ...]) -> None:
    done = command(*arguments, shell=">/dev/full")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"{LOST}No space left on device; ")


def test_where_nothing_can_be_said_the_exit_code_says_it() -> None:
    assert command("presets", "list", shell=">/dev/full 2>&1").returncode == 1
    assert command("presets", "show", "blgo", shell="2>/dev/full").returncode == 2


def test_a_reader_that_left_is_no_news() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fastbyol.cli.main", "presets", "show", "blog"],
        check=False,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_working_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    program = 'cd "$1" && rmdir "$1" && exec "$0" -m fastbyol.cli.main eval some/run'
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["bash", "-c", program, sys.executable, gone], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "working folder" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_nobodys_file(closed: str, tmp_path: Path) -> None:
    """The first file that a process opens gets the lowest free number, which is the one that text
    is printed to.
    """
    file = tmp_path / "blog.toml"
    done = command("presets", "copy", "blog", str(file), shell=closed)
    assert (done.returncode, done.stderr) == (0, "")
    assert file.read_text("utf-8") == config_io.preset_text("blog")


IN_ASCII = {"PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (("eval", EVIL), IN_ASCII),
        (("eval", EVIL), {"PYTHONIOENCODING": "latin-1"}),
        (("eval", EVIL), {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
        (("eval", EVIL), {"LC_ALL": "C.UTF-8"}),
        (("presets", "show", EVIL), IN_ASCII),
        ((EVIL,), IN_ASCII),
        (("train", f"--{EVIL}"), IN_ASCII),
        (("explain", "--diff", "blog", EVIL), IN_ASCII),
    ],
    ids=lambda value: " ".join(map(str, value)).encode("ascii", "replace").decode()[:20],
)
def test_a_name_in_an_error_is_escaped_in_every_encoding(
    arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    done = command(*arguments, **environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("fastbyol: error: ")
    assert r"\x1b[31m" in done.stderr or r"\u001b[31m" in done.stderr  # TOML's escape of a value
    assert not set(done.stderr) & set("\x1b\r\u202e\udce9\ufffd")


@contextmanager
def guarded_on_files(folder: Path) -> Iterator[output.Failures]:
    """Standard output and error as Python has them, in ASCII, on files in ``folder``."""
    kept = [os.dup(number) for number in (1, 2)]
    with (
        pytest.MonkeyPatch.context() as patch,
        (folder / "out").open("wb") as out,
        (folder / "err").open("wb") as err,
    ):
        for number, name, file in ((1, "stdout", out), (2, "stderr", err)):
            stream = io.TextIOWrapper(file, "ascii")
            patch.setattr(sys, name, stream)
            patch.setattr(sys, f"__{name}__", stream)
            os.dup2(file.fileno(), number)
        try:
            with output.guarded() as failures:
                yield failures
        finally:
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def test_names_on_consoles_in_lines_in_tables_and_in_logs(tmp_path: Path) -> None:
    with guarded_on_files(tmp_path) as failures:
        output.console().print(EVIL, soft_wrap=True)
        table = Table("name", box=None, show_header=False)
        table.add_row(EVIL)
        output.console().print(table)
        output.say(EVIL, EVIL)
        output.say(EVIL, err=True)
    assert not failures
    # The last two letters are a matter of the encoding; Python's own escapes and those of what is
    # unseen look alike.
    assert [line.strip() for line in (tmp_path / "out").read_text("ascii").splitlines()] == [
        SHOWN
    ] * 4
    assert (tmp_path / "err").read_text("ascii") == f"{SHOWN}\n"


def test_our_log_lines_stay_lines() -> None:
    with output.guarded():
        assert logging.lastResort is not None
        shown = [
            logging.lastResort.format(
                logging.makeLogRecord({"name": name, "msg": "%s", "args": ("a\n\x1b[2Jb",)})
            )
            for name in ("fastbyol.runs.lock", "torch")
        ]
    assert shown == [r"a\n\x1b[2Jb", "a\n\\x1b[2Jb"]


def test_json_is_strict_and_gives_names_back(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    output.print_json(
        {"name": EVIL, "loss": math.nan, "row": [math.inf, (1.5, -math.inf)], "path": Path("a/b")}
    )
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text, parse_constant=refuse) == {
        "name": EVIL, "loss": None, "row": [None, [1.5, None]], "path": "a/b",
    }  # fmt: skip


def test_a_tiny_terminal_still_gets_its_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in ("1", "0", "-5", "many"):
        monkeypatch.setenv("COLUMNS", columns)
        table = Table("run", "state", box=None)
        table.add_row("run-1", "healthy")
        output.console().print(table)
        assert "run-1" in capsys.readouterr().out, columns


def test_a_stream_that_fails_once_is_left_alone_and_the_other_goes_on(tmp_path: Path) -> None:
    with guarded_on_files(tmp_path) as failures:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.close(full)
        for _ in range(3):
            output.say("lost")
            output.say("kept", err=True)
    assert list(failures) == ["standard output"]
    assert failures.in_words().startswith(
        "standard output: cannot write: No space left on device; "
    )
    assert (tmp_path / "err").read_text() == "kept\n" * 3


@pytest.mark.parametrize(
    "environment",
    [
        {"FORCE_COLOR": "1"},
        {"TERM": "dumb"},
        {"COLUMNS": "1", "LINES": "1"},
        {"NO_COLOR": "1"},
        {"TTY_COMPATIBLE": "1"},
    ],
    ids=str,
)
def test_only_a_terminal_gets_a_table_that_is_drawn_again(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    assert type(display(Console(file=io.StringIO()))) is PlainDisplay
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        drawn = type(display(Console(file=terminal)))
    os.close(master)
    assert drawn is (PlainDisplay if environment == {"TERM": "dumb"} else LiveDisplay)
