"""Damaged run folders: an error of one line, a fallback with a warning, or nothing lost.

Never a crash, a hang, a wrong state.

One child works through the damages of one file in order, since a process for each would cost a
second; where it dies or hangs, the damage it was at is known.
"""

from __future__ import annotations

import logging
import multiprocessing
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import processes
import pytest
import run_rig as rig
from own_time import OwnTime

from fastbyol import api
from fastbyol.engine.observer import Silent
from fastbyol.errors import FastbyolError
from fastbyol.registry.index import list_runs
from fastbyol.show import run_report

PER_FILE = rig.many(25, 400)
# What a command may take on a machine that does other things too. All are done in a fraction of a
# second.
HANG_S = 10.0
NEWEST = "checkpoints/newest"
FILES = (NEWEST, "config.toml", "env.json", "metrics.jsonl", "layers.npy")


def damages(
    content: bytes, other: bytes, draw: random.Random
) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the file's new bytes or None for no file) without end.

    ``other`` is a file that is not this one.
    """
    yield "no file", None
    yield "empty", b""
    yield "text", b"This is no such file.\n"
    yield "zeros", bytes(len(content))
    yield "another file", other
    yield "twice", content * 2
    yield "huge header", (2**62).to_bytes(8, "little") + content[8:]
    yield "no UTF-8", b"\xff\xfe" + content
    while True:
        place = draw.randrange(len(content))
        kind = draw.choice(
            ("bit", "bit", "bits", "cut", "hole", "splice", "digit", "number", "shift")
        )
        changed = bytearray(content)
        if kind == "bit":
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == "bits":
            for _ in range(16):
                changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            changed = changed[:place]
        elif kind == "hole":
            changed[place : place + 64] = bytes(len(changed[place : place + 64]))
        elif kind == "splice":
            changed[place : place + 200] = other[: draw.randrange(1, 200)]
        elif kind == "digit":  # damage that is still the right kind of file, where it is text
            digits = [index for index, byte in enumerate(content) if byte in b"0123456789"]
            changed[draw.choice(digits or [place])] = draw.choice(b"0123456789")
        elif kind == "number":
            digits = [index for index, byte in enumerate(content) if byte in b"0123456789"]
            at = draw.choice(digits or [place])
            changed[at : at + 1] = draw.choice(
                (b"9" * 400, b"1e999", b"-1", b"0x10", b"nan", b'"a"', b"[1]", b"9" * 5000)
            )
        else:
            changed[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
        if changed != content:
            yield f"{kind} at {place}", bytes(changed)


class Heard(Silent):
    """What a run said and what was logged."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def weights(run: Path) -> bytes:
    return b"".join(
        parameter.detach().numpy().tobytes() for parameter in api.load_encoder(run).parameters()
    )


def drawn(run: Path) -> Any:
    curves = run_report.read(run)
    numbers = {name: values.tobytes() for name, values in curves.metrics.items()}
    return (
        curves.name,
        curves.epochs.tobytes(),
        numbers,
        repr(curves.epoch_events),
        curves.rates.tobytes(),
        curves.rate_ceiling,
    )


def listed(run: Path) -> Any:
    (row,) = list_runs(run.parent)
    # Copies lie in different places, and when a run was started is in env.json alone.
    return replace(row, path="", started=None)


# What a command does and what of it must be right: the same for the damaged run as for the whole
# one, or it must say so.
COMMANDS: dict[str, Callable[[Path, Heard], Any]] = {
    "resume": lambda run, heard: (api.resume(run, observer=heard), rig.contents(run)),
    "eval": lambda run, heard: weights(run),
    "report": lambda run, heard: drawn(run),
    "runs": lambda run, heard: listed(run),
}
# env.json names no number of the run: its loss goes unnoticed by all, and is said by none.
HEEDED_BY = {
    NEWEST: ("resume", "eval"),
    "config.toml": ("resume", "eval", "report", "runs"),
    "env.json": ("resume", "eval", "report", "runs"),
    "metrics.jsonl": ("resume", "report", "runs"),
    "layers.npy": ("resume", "report"),
}


def outcome(work: Callable[[Path, Heard], Any], run: Path, expected: Any) -> tuple[str, str]:
    """(error, warned, identical or WRONG; what was said)."""
    heard, log = Heard(), Log()
    logging.getLogger("fastbyol").addHandler(log)
    try:
        result = work(run, heard)
    except FastbyolError as error:
        fine = len(str(error).splitlines()) == 1 and error.exit_code in (1, 2)
        return ("error" if fine else "WRONG"), str(error)
    except (
        ValueError
    ) as error:  # `runs` has left the damaged run out of its list, with a line in the log
        if "not enough values to unpack" not in str(error):
            raise
        return ("error" if log.lines else "WRONG"), str(log.lines)
    finally:
        logging.getLogger("fastbyol").removeHandler(log)
    said = heard.notes + log.lines
    if any(len(line.splitlines()) != 1 for line in said):
        return "WRONG", str(said)
    if result == expected:
        return "warned" if said else "identical", str(said)
    return "warned" if said else "WRONG", str(said)


def work_through(whole: Path, folder: Path, name: str, count: int, pipe: Connection) -> None:
    """Damage the file ``name`` of copies of the run ``whole`` in ``count`` ways and tell each
    outcome through ``pipe``.
    """
    draw = random.Random(name)
    base = folder / "base" / "run"
    shutil.copytree(whole, base)
    target = rig.checkpoints(base)[-1].relative_to(base) if name == NEWEST else Path(name)
    content = (base / target).read_bytes()
    other = (rig.checkpoints(base)[0] if name == NEWEST else base / "timing.jsonl").read_bytes()
    expected = {command: COMMANDS[command](base, Heard()) for command in HEEDED_BY[name]}
    run = folder / "copies" / "run"
    run.parent.mkdir()
    cases = damages(content, other, draw)
    pipe.send(("ready", "", "", ""))
    for number in range(count):
        what, damaged = next(cases)
        command = HEEDED_BY[name][number % len(HEEDED_BY[name])]
        pipe.send(("begin", what, command, ""))
        shutil.copytree(base, run)
        (run / target).unlink() if damaged is None else (run / target).write_bytes(damaged)
        try:
            kind, said = outcome(COMMANDS[command], run, expected[command])
        except Exception as error:
            kind, said = "WRONG", f"{type(error).__name__}: {error}"
        pipe.send((kind, what, command, said))
        shutil.rmtree(run)
    pipe.send(("end", "", "", ""))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs of three steps.

    It probes nothing, so that going on from step 4 costs little.
    """
    folder = tmp_path_factory.mktemp("whole")
    config = rig.make_config(folder, "train.epochs=2", "train.batch_size=16", "data.test=none")
    process = rig.PROCESSES.Process(target=api.train, args=(config, folder / "run"))
    process.start()
    process.join(processes.PATIENCE_S)
    assert process.exitcode == 0
    return folder / "run"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_said_or_makes_no_difference(
    whole: Path, tmp_path: Path, name: str
) -> None:
    mine, theirs = multiprocessing.Pipe()
    process = rig.PROCESSES.Process(
        target=work_through, args=(whole, tmp_path, name, PER_FILE, theirs)
    )
    process.start()
    assert process.pid is not None
    theirs.close()
    kinds, at, patience_s = Counter[str](), ("start", "", "", ""), processes.PATIENCE_S
    while at[0] != "end":
        assert OwnTime(process.pid).waits(mine.poll, patience_s), f"hangs after {at}"
        try:
            at = mine.recv()
        except EOFError:
            process.join()
            pytest.fail(f"died with {process.exitcode} after {at}")
        assert at[0] != "WRONG", at
        if at[0] in ("error", "warned", "identical"):
            kinds[at[0]] += 1
        patience_s = HANG_S if at[0] == "begin" else processes.PATIENCE_S
    process.join()
    print(f"{name}: {dict(kinds)}")
    assert sum(kinds.values()) == PER_FILE
