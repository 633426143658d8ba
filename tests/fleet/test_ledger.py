"""The ledger: a file a run and a file a call, beside the one file of earlier code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol import config_io
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.fleet import ledger
from fastbyol.fleet.ledger import Call, Entry, Ledger, keys
from folders import ask, rows

ARMS = ("gn-lars-0.1", "gn-lars-0.2")


def old(scale: str = "mini", **runs: dict[str, Any]) -> str:
    """A ``ledger.json`` with one call; ``runs`` are rows by ARM__K."""
    made = {}
    for name, row in runs.items():
        arm, _, seed = name.replace("_01", "-0.1").replace("_02", "-0.2").partition("__")
        made[f"{arm}/seed{seed}"] = {"arm": arm, "seed": int(seed), **row}
    names = [f"{row['arm']} seed {row['seed']}" for row in made.values()]
    call = {"command": ["fastbyol", "ablate"], "runs": names, "began": "x", "ended": "y"}
    return json.dumps({"scale": scale, "calls": [call], "runs": made})


def test_an_entry_is_what_was_asked_for(tmp_path: Path) -> None:
    runs = ask(tmp_path, "gn-lars-0.2-replayed", sets=("train.epochs=2",))
    entries = {entry.name: entry for entry in Ledger(tmp_path).entries()}
    assert set(entries) == {run.name for run in runs}
    for run in runs:
        entry = entries[run.name]
        assert entry.path == run.path
        assert entry.config() == run.config
        origins = config_io.origins(entry.row["config"])
        lacking = dict(run.origin).items() - origins.items()  # of values that TOML cannot write
        assert {origin for _, origin in lacking} <= {"default"}
        assert origins.items() <= dict(run.origin).items()
        assert (entry.status, entry.epochs, entry.attempts, entry.is_open) == ("new", 2, (), False)
        assert entry.row["claims"] == list(run.arm.claims)
        assert (tmp_path / "ledger" / f"{entry.key}.json").is_file()
        after = None if run.after is None else f"{run.after.parent.name}/{run.after.name}"
        assert entry.after == after


def test_entries_come_in_the_order_in_which_they_were_asked_for(tmp_path: Path) -> None:
    """Not that of their names; what is asked for later comes later."""
    first = ask(tmp_path, "gn-sgd-mlp-none", seeds=2)
    second = ask(tmp_path, "bn-sgd-mlp-bn", "gn-sgd-mlp-none", seeds=3)
    names = [run.name for run in first]
    names += [run.name for run in second if run.name not in names]
    assert [entry.name for entry in Ledger(tmp_path).entries()] == names
    assert [row["order"] for row in rows(tmp_path).values()].count(0) == 1


def test_an_entry_that_changes_is_read_again(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1")
    book = Ledger(tmp_path)
    (before,) = book.entries()
    assert book.entries()[0] is before
    before.with_row(status="done", after=None, accuracy=50.0).write()
    (after,) = book.entries()
    assert (after.status, after.row["accuracy"], after.after) == ("done", 50.0, None)
    after.with_row(accuracy=None).write()
    assert "accuracy" not in book.entries()[0].row


@pytest.mark.parametrize(
    "change",
    [
        "",
        "[]",
        "{",
        "null",
        "[" * 100_000,
        {"status": "finished"},
        {"order": "1"},
        {"order": True},
        {"claimed": None},
        {"config": None},
        {"device": 0},
        {"seed": 1},
        {"arm": "other"},
        {"attempts": ["x"]},
        {"attempts": 3},
        {"attempts": None},
        {"attempts": [{"device": "cpu", "from_step": 0}]},
        {"attempts": [{"claim": 1, "device": "cpu", "from_step": "0"}]},
        {"attempts": [{"claim": 1, "device": "cpu", "from_step": 0, "how": 5}]},
        {"seconds": "long"},
        {"accuracy": True},
        {"failed_before": "x"},
        {"after": []},
    ],
    ids=lambda change: str(change)[:20],
)
def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path: Path, change: Any) -> None:
    ask(tmp_path, *ARMS)
    path = tmp_path / "ledger/gn-lars-0.1/seed0.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    book = Ledger(tmp_path)
    assert [entry.key for entry in book.entries()] == ["gn-lars-0.2/seed0"]
    assert list(book.damaged) == ["gn-lars-0.1/seed0"]
    assert "damaged: ask for the run again" in book.damaged["gn-lars-0.1/seed0"]
    assert book.entry("gn-lars-0.1/seed0") is None
    with pytest.raises(UsageError, match=r"seed0\.json: damaged"):
        ledger.read(tmp_path)
    path.unlink()
    ask(tmp_path, *ARMS)
    assert len(book.entries()) == 2
    assert book.damaged == {}


def test_a_fifo_does_not_stop_the_others(tmp_path: Path) -> None:
    """Opened for reading, it would wait for a writer for ever."""
    ask(tmp_path, *ARMS)
    path = tmp_path / "ledger/gn-lars-0.1/seed0.json"
    path.unlink()
    os.mkfifo(path)
    book = Ledger(tmp_path)
    assert [entry.key for entry in book.entries()] == ["gn-lars-0.2/seed0"]
    assert list(book.damaged) == ["gn-lars-0.1/seed0"]


@given(st.binary(max_size=300))
def test_bytes_are_no_entry(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger/a/seed0.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        book = Ledger(Path(folder))
        assert book.entries() == ()
        assert list(book.damaged) == ["a/seed0"]


def test_old_rows_stay_beside_new_ones_and_each_run_is_one_row(tmp_path: Path) -> None:
    """Where both name a run, its own file counts."""
    (tmp_path / "ledger.json").write_text(
        old(
            gn_lars_01__0={"status": "stopped", "seconds": 5.0},
            gn_lars_01__7={"status": "done", "seconds": 9.0},
        ).replace("gn_lars", "gn-lars")
    )
    alone = ledger.read(tmp_path)
    assert {key: row["status"] for key, row in alone["runs"].items()} == {
        "gn-lars-0.1/seed0": "stopped",
        "gn-lars-0.1/seed7": "done",
    }
    ask(tmp_path, *ARMS)
    both = ledger.read(tmp_path)
    assert set(both["runs"]) == {
        f"gn-lars-{name}" for name in ("0.1/seed0", "0.1/seed7", "0.2/seed0")
    }
    assert both["runs"]["gn-lars-0.1/seed0"]["config"]
    assert both["runs"]["gn-lars-0.1/seed0"]["seconds"] == 5.0
    assert both["runs"]["gn-lars-0.1/seed7"] == alone["runs"]["gn-lars-0.1/seed7"]
    assert [call.get("scale") for call in both["calls"]] == [None, "mini"]
    assert both["scale"] == "mini"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"scale": 1, "calls": [], "runs": {}}', '{"scale": "mini"}',
             '{"scale": "mini", "calls": [], "runs": {"a": {}}}',
             '{"scale": "mini", "calls": ["x"], "runs": {}}']
)  # fmt: skip
def test_a_damaged_old_ledger_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(UsageError, match=r"ledger\.json: damaged: move it away"):
        ledger.read(tmp_path)
    with pytest.raises(UsageError, match="damaged"):
        ask(tmp_path, "gn-lars-0.1")


def test_calls_of_another_scale_are_refused(tmp_path: Path) -> None:
    ledger.refuse_other_scale(tmp_path, "mini")
    with pytest.raises(UsageError, match="no ablations here"):
        ledger.read(tmp_path)
    first, second = Call(tmp_path, "mini", {"runs": ["a seed 0"]}), Call(tmp_path, "mini", {})
    first.end(interrupted=True)
    content = ledger.read(tmp_path)
    assert [call["runs"] for call in content["calls"] if "runs" in call] == [["a seed 0"]]
    by_end = {call["ended"] is None: call for call in content["calls"]}
    assert by_end[False]["interrupted"] is True
    assert set(by_end) == {True, False}
    second.end()
    ledger.refuse_other_scale(tmp_path, "mini")
    with pytest.raises(UsageError, match="at scale mini, not short"):
        ledger.refuse_other_scale(tmp_path, "short")
    (tmp_path / "ledger.json").write_text(old("long"))
    with pytest.raises(UsageError, match="long, not mini"):
        ledger.refuse_other_scale(tmp_path, "mini")
    with pytest.raises(UsageError, match="several scales, long and mini"):
        ledger.read(tmp_path)


def test_a_damaged_call_is_one_line(tmp_path: Path) -> None:
    Call(tmp_path, "mini", {})
    (path,) = (tmp_path / "calls").iterdir()
    path.write_text('{"scale": 3}')
    with pytest.raises(UsageError, match="damaged: move it away"):
        ledger.refuse_other_scale(tmp_path, "mini")


def test_words_name_runs(tmp_path: Path) -> None:
    ask(tmp_path, *ARMS, seeds=11)
    entries = Ledger(tmp_path).entries()
    assert keys(["gn-lars-0.1/seed1"], entries) == ("gn-lars-0.1/seed1",)
    assert keys(["gn-lars-0.1 seed 10"], entries) == ("gn-lars-0.1/seed10",)
    several = keys(["gn-lars-0.2", "gn-lars-0.1/seed3", "gn-lars-0.2/seed4"], entries)
    expected = [*(f"gn-lars-0.2/seed{seed}" for seed in range(11)), "gn-lars-0.1/seed3"]
    assert list(several) == expected
    for word in ("gn-lars", "gn-lars-0.1/seed11", ""):
        with pytest.raises(UsageError, match="no such run"):
            keys([word], entries)


def test_a_request_to_stop_is_made_and_taken_back(tmp_path: Path) -> None:
    assert not ledger.is_asked_to_stop(tmp_path)
    ledger.allow(tmp_path)
    ledger.ask_to_stop(tmp_path)
    ledger.ask_to_stop(tmp_path)
    assert ledger.is_asked_to_stop(tmp_path)
    ledger.allow(tmp_path)
    assert not ledger.is_asked_to_stop(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1")
    (entry,) = Ledger(tmp_path).entries()
    gone = Entry(tmp_path / "nowhere", entry.key, entry.row)
    with pytest.raises(FastbyolError, match="nowhere"):
        gone.write()
    (tmp_path / "file").touch()
    with pytest.raises(FastbyolError, match="file"):
        Call(tmp_path / "file", "mini", {})
    assert ledger.free_bytes(tmp_path / "nowhere") is None
    status = os.statvfs(tmp_path)
    assert 0 <= ledger.free_bytes(tmp_path) <= status.f_blocks * status.f_frsize  # type: ignore[operator]
