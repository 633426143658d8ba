"""Entries of files that lack something, or are watched while they grow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastbyol import config_io
from fastbyol.loggers.entries import Clock, Entries
from fastbyol.loggers.sink import Entry, Newest
from written_runs import EPOCHS, STEPS, WrittenRun

NOTHING = Newest(-1, -1)


def entries_of(run: WrittenRun, newest: Newest = NOTHING) -> Entries:
    return Entries(run.path, config_io.read_run(run.path / "config.toml"), newest)


def read(entries: Entries) -> list[Entry]:
    ready, is_more = entries.read()
    while is_more:
        further, is_more = entries.read()
        ready += further
    return ready


@pytest.mark.parametrize("late", ["layers.npy", "timing.jsonl"])
def test_a_step_waits_for_its_layers_and_its_time(tmp_path: Path, late: str) -> None:
    run = WrittenRun(tmp_path / "run")
    run.write(0, 8)
    before = (run.path / late).read_bytes()
    run.write(8, 12)
    after = (run.path / late).read_bytes()
    (run.path / late).write_bytes(before)
    entries = entries_of(run)
    assert [entry.step for entry in read(entries)] == [*range(8)]
    assert read(entries) == []
    (run.path / late).write_bytes(after)
    rest = read(entries)
    assert [entry.step for entry in rest] == [*range(8, 12)]
    assert np.array_equal(rest[0].histograms["layers/rate"], run.layers_at(8, "rate"))
    assert rest[0].scalars["epoch/loss"] == 1 / 3


def test_nothing_waits_for_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    for missing in ("layers.npy", "timing.jsonl"):
        for is_there in (False, True):
            run = WrittenRun(tmp_path / f"{missing}-{is_there}")
            run.write(0, 13)
            if is_there:
                (run.path / missing).write_bytes(b"\0\n{}\n\xff damaged\n")
            else:
                (run.path / missing).unlink()
            entries = read(entries_of(run))
            # Times that no line tells might still come.
            expected = 0 if (missing, is_there) == ("timing.jsonl", True) else 13
            assert len(entries) == expected, missing


def test_what_is_long_overdue_is_not_waited_for(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.write(0, 30)
    (run.path / "timing.jsonl").write_text("")
    # Of four drains of four steps.
    assert [entry.step for entry in read(entries_of(run))] == [*range(30 - 16)]


def test_a_step_that_is_written_again_keeps_its_first_time(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.write(0, 12)
    run.write(4, 16)
    clock = Clock(run.path)
    clock.read()
    times = [clock.time_of(step) for step in range(17)]
    assert times == [1e4 + 4] * 4 + [1e4 + 8] * 4 + [1e4 + 12] * 4 + [2e4 + 16] * 4 + [None]


def test_the_end_of_an_epoch_waits_for_the_next_step_or_the_end_of_the_run(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.write(0, 2 * STEPS)
    entries = entries_of(run)
    assert [entry.step for entry in read(entries)] == [*range(2 * STEPS)]
    assert entries.last(splits=False) == []
    (end,) = entries.last(splits=True)
    assert (end.step, sorted(end.scalars)) == (2 * STEPS, ["epoch/loss", "epoch/neg_cos"])
    run.write(2 * STEPS, STEPS * EPOCHS)
    # A store that has it gets the step alone, one that has not gets both.
    for newest, has_end in ((Newest(15, 16), False), (Newest(15, 15), True)):
        first, *rest = read(entries_of(run, newest))
        assert (first.step, "epoch/loss" in first.scalars) == (16, has_end)
        assert "loss" in first.scalars
        assert len(rest) == 15
    entries = entries_of(run, Newest(31, 24))
    assert read(entries) == []
    assert [entry.step for entry in entries.last(splits=False)] == [32]
    assert entries_of(run, Newest(31, 32)).last(splits=True) == []
