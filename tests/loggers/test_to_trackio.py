"""trackio's own storage has every step once, with its values, whatever was killed when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol.loggers.child import Child, environment
from written_runs import EPOCHS, STEPS, WrittenRun, same

END = STEPS * EPOCHS
READ = """
import json, sys
sys.path[:0] = sys.argv[1:]
from stores import trackio_curves, trackio_rows
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps({
    name: {"rows": rows, "curves": trackio_curves(rows),
           "alerts": SQLiteStorage.get_alerts("fastbyol", name),
           "config": SQLiteStorage.get_run_config("fastbyol", name)}
    for name, rows in trackio_rows("fastbyol").items()
}))
"""


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def read() -> dict[str, dict]:
    import json

    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", READ, str(here), str(here.parent / "engine")],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_runs_of_several_lives_are_there_once(tmp_path: Path) -> None:
    runs = [WrittenRun(tmp_path / folder / "<b>a\nb") for folder in ("one", "two")]
    for run in runs:
        run.write(0, 13)
        run.send_apart("trackio")
        run.write(9, 24)
    runs[0].send_apart("trackio")
    for run in runs:
        run.write(24, END)
        assert run.send_apart("trackio") == []
    stored = read()
    assert len(stored) == 2
    for name, content in stored.items():
        assert name.startswith("<b>a\\nb-")
        curves = {key: [tuple(row) for row in rows] for key, rows in content["curves"].items()}
        assert same(curves, runs[0].expected())
        assert [row["step"] for row in content["rows"]] == list(range(END + 1))
        layers = [row["step"] for row in content["rows"] if "layers/rate" in row]
        assert layers == list(range(0, END, 4))
        assert sorted((alert["title"], alert["level"]) for alert in content["alerts"]) == [
            ("collapsed", "error"), ("collapsing", "warn"), ("dead", "error"),
        ]  # fmt: skip
        assert content["config"]["train.epochs"] == EPOCHS


def test_a_folder_that_cannot_be_made_is_told_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "trackio").write_text("in the way")
    run = WrittenRun(tmp_path / "run")
    run.write(0, 3)
    child = Child(run.path, "trackio", limit_s=60.0)
    child.finish()
    assert child.process.wait() == 1
    assert len(child.lines()) == 1
    child.close()
