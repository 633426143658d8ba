"""What is kept of a folder's runs is what their files say, whatever becomes of either."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run, write_metrics

from fastbyol.errors import UsageError
from fastbyol.files import cache_folder
from fastbyol.registry import index, reading, tables
from fastbyol.registry.index import list_runs
from fastbyol.registry.row import Row
from fastbyol.runs import folder as folder_module
from fastbyol.runs.environment import ENV
from fastbyol.runs.layers import LAYERS_FILE
from fastbyol.runs.lock import Lock
from fastbyol.runs.metrics import METRICS_FILE
from fastbyol.show import runs_page


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "runs"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as unchanged however new they are."""
    monkeypatch.setattr(index, "_RACY_NS", 0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs whose files are read."""
    names, read = [], reading.read

    def noted(path: Path) -> tuple[Row | None, list[str]]:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(reading, "read", noted)
    return names


def test_runs_are_listed_from_their_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "runs"
    make_run(root / "a-new", "train.epochs=2")
    done = ({"accuracy": 31.5}, {"state": "collapsed", "neg_cos": 0.99})
    make_run(root / "b-done", "train.epochs=2", epochs=done)
    make_run(root / "c-stopped", "train.epochs=2", epochs=[{"accuracy": 12.0, "neg_cos": None}])
    make_run(root / "d-damaged")
    (root / "d-damaged" / "config.toml").write_text("[optim\n")
    (root / "not-a-run").mkdir()
    lock = Lock(root / "a-new")
    for _ in range(2):  # from the files, and from what was kept of them
        caplog.clear()
        assert [
            (row.name, row.status, row.state, row.epochs_done, row.epochs, row.accuracy)
            for row in list_runs(root)
        ] == [
            ("a-new", "running", None, 0, 2, None),
            ("b-done", "done", "collapsed", 2, 2, 31.5),
            ("c-stopped", "stopped", "healthy", 1, 2, 12.0),
        ]
        assert [message[: len(str(root)) + 10] for message in caplog.messages] == [
            f"{root}/d-damaged"
        ]
    lock.release()
    assert list_runs(root)[0].status == "stopped"
    with pytest.raises(UsageError, match="no such folder of runs"):
        list_runs(root / "absent")


def test_a_row_has_what_the_run_measured_and_was_set_to(tmp_path: Path) -> None:
    fork = {"run": "/runs/parent", "step": 7, "digest": "0", "changes": {}}
    probed = ({"accuracy": 60.0}, {"accuracy": 50.0}, {"accuracy": None, "rank_y": 8.5})
    make_run(tmp_path / "run", "optim.name=lars", "train.epochs=3", epochs=probed, fork=fork)
    (row,) = list_runs(tmp_path)
    assert (row.best_accuracy, row.best_epoch, row.untrained_accuracy) == (60.0, 0, 20.0)
    # Wilson's interval for 50 of 100, from the textbook.
    assert (row.accuracy, row.num_scored) == (50.0, 100)
    assert (row.accuracy_low, row.accuracy_high) == pytest.approx((40.383, 59.617), abs=1e-3)
    assert row.measures == {"loss": 1.0, "pos_cos": 0.9, "neg_cos": 0.25, "rank_y": 8.5}
    assert row.forked_from == "/runs/parent@7"
    assert row.started is not None
    assert row.started.startswith("2026-11-05")
    assert row.settings["optim.name"] == "lars"
    assert row.settings["views.scale"] == [0.2, 1.0]
    assert row.curves["accuracy"] == [[1, 60.0], [2, 50.0]]
    assert [row.value(key) for key in ("name", "neg_cos", "optim.name", "x")] == [
        "run", 0.25, "lars", None,
    ]  # fmt: skip


def test_pipes_in_place_of_files_block_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = (".lock", "env.json", "metrics.jsonl", "layers.npy", "config.toml")
    for name in names:
        run = make_run(tmp_path / name.strip("."), epochs=[{}])
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    assert [row.name for row in list_runs(tmp_path)] == ["env.json", "layers.npy", "lock"]
    assert "metrics.jsonl: cannot read: is a named pipe" in caplog.text
    assert "config.toml: no run here" in caplog.text


@pytest.mark.parametrize(
    "odd", ["NaN", "1e999", "-5.0", "110.0", "2.5", '"10"', "[]", "true", str(2**64)]
)
def test_odd_numbers_in_a_file_stop_no_list(tmp_path: Path, odd: str) -> None:
    run = make_run(tmp_path / "runs" / "a", epochs=[{"accuracy": 77.0, "neg_cos": 0.5, "x": 0.125}])
    whole = (run / "metrics.jsonl").read_text()
    for number in ("77.0", "0.5,", "0.125", "20.0", ": 100}"):
        text = odd + number.strip("0123456789. :")
        (run / "metrics.jsonl").write_text(
            whole.replace(number, f": {text}" if "}" in number else text)
        )
        rows = list_runs(tmp_path / "runs")
        json.dumps(rows[0].as_json())
        assert runs_page.page(rows, "Runs", tmp_path).count("<tr>") == 2
        assert tables.csv_text(rows).count("\n") == 2
        tables.write_parquet(rows, tmp_path / "x.parquet")


def test_long_curves_keep_their_end(tmp_path: Path) -> None:
    epochs = [{"neg_cos": n / 1000} for n in range(1000)]
    make_run(tmp_path / "run", "train.epochs=1000", epochs=epochs)
    curve = list_runs(tmp_path)[0].curves["neg_cos"]
    assert len(curve) <= 60
    assert curve[-1] == [1000, 0.999]
    assert all(y == pytest.approx((x - 1) / 1000) for x, y in curve)


def test_files_of_a_run_have_these_names() -> None:
    written = {folder_module.CONFIG, ENV, METRICS_FILE, LAYERS_FILE, folder_module.CHECKPOINTS}
    assert written < set(index.FILES)


@pytest.mark.usefixtures("settled")
def test_only_changed_runs_are_read_again(tmp_path: Path, read: list[str]) -> None:
    for name in "abc":
        make_run(tmp_path / "runs" / name)
    rows = list_runs(tmp_path / "runs")
    assert read == ["a", "b", "c"]
    read.clear()
    assert list_runs(tmp_path / "runs") == rows
    assert read == []
    write_metrics(tmp_path / "runs" / "b", [{"accuracy": 5.0}])
    (tmp_path / "runs" / "a").rename(tmp_path / "runs" / "z")
    shutil.rmtree(tmp_path / "runs" / "c")
    assert [(row.name, row.accuracy) for row in list_runs(tmp_path / "runs")] == [
        ("b", 5.0), ("z", None),
    ]  # fmt: skip
    assert read == ["b", "z"]


@pytest.mark.usefixtures("settled")
def test_a_folder_may_be_named_in_several_ways(
    tmp_path: Path,
    read: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "bad")
    (tmp_path / "runs" / "bad" / "config.toml").write_text("[")
    list_runs(tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    caplog.clear()
    assert [row.path for row in list_runs(Path())] == ["a"]
    assert caplog.messages[0].startswith("bad/config.toml: not valid TOML")
    monkeypatch.chdir(tmp_path)
    assert [row.path for row in list_runs(Path("runs"))] == ["runs/a"]
    assert read == ["a", "bad"]


@pytest.mark.usefixtures("settled")
def test_a_changed_run_is_named_at_every_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("momentum = 0.9", "momentum = 0.8"))
    for _ in range(2):
        caplog.clear()
        assert list_runs(tmp_path)[0].settings["optim.momentum"] == 0.8
        assert "optim.momentum is 0.8, the run was made with 0.9" in caplog.text


def test_what_changes_just_now_is_not_kept(tmp_path: Path, read: list[str]) -> None:
    make_run(tmp_path / "run", epochs=[{"accuracy": 11.0}])
    (tmp_path / "run" / "metrics.jsonl").touch()
    list_runs(tmp_path)
    file = tmp_path / "run" / "metrics.jsonl"
    before = file.stat()
    with file.open("r+") as same:
        same.write(file.read_text().replace("11.0", "22.0"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert list_runs(tmp_path)[0].accuracy == 22.0
    assert read == ["run", "run"]


def damages(file: Path) -> Iterator[None]:
    whole = file.read_bytes()
    digest, _, content = whole.partition(b"\n")
    texts = (b"", b"\n", whole[:-1], whole[:40], digest, whole.replace(b"healthy", b"HEALTHY"))
    for text in (*texts, b"\xff" * 99, b"[]", whole + b" ", content):
        file.write_bytes(text)
        yield
    of_others: list[Any] = [None, [], {}, {"of": None}, {"of": json.loads(content)["of"]}]
    for value in of_others:
        text = json.dumps(value).encode()
        file.write_bytes(index._digest(text).encode() + b"\n" + text)
        yield
    file.unlink()
    file.mkdir()
    yield
    file.rmdir()
    os.mkfifo(file)
    yield
    file.unlink()
    file.symlink_to(file)
    yield


@pytest.mark.usefixtures("settled")
def test_a_damaged_cache_costs_time_alone(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_run(tmp_path / "runs" / "a", epochs=[{}]).parent
    rows = list_runs(root)
    (file,) = own_cache.iterdir()
    for _ in damages(file):
        assert list_runs(root) == rows
    assert caplog.messages == []


@pytest.mark.parametrize("where", ["/proc/fastbyol", "/dev/null/cache", "file"])
def test_a_cache_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / where))
    make_run(tmp_path / "runs" / "a")
    assert [row.name for row in list_runs(tmp_path / "runs")] == ["a"]


def test_without_a_home_folder_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "runs" / "a")

    def no_cache() -> Path:
        raise UsageError("no home folder")

    monkeypatch.setattr(index, "cache_folder", no_cache)
    assert [row.name for row in list_runs(tmp_path / "runs")] == ["a"]


def _list_often(root: Path) -> None:
    for _ in range(20):
        assert len(list_runs(root)) == 3
        shutil.rmtree(cache_folder() / "runs", ignore_errors=True)


def test_two_processes_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    for name in "abc":
        make_run(tmp_path / "runs" / name)
    processes = [
        multiprocessing.get_context("fork").Process(target=_list_often, args=(tmp_path / "runs",))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def change(root: Path, rng: random.Random) -> None:
    """Do something to some run that a user, a training or an accident may do."""
    runs = sorted(root.iterdir())
    run = rng.choice(runs) if runs else root / "0"
    number = rng.randrange(10)
    kind = rng.choice(("new", "epochs", "cut", "edit", "env", "rename", "remove", "damage", "swap"))
    if kind == "new" or not runs:
        sets = (f"optim.lr=0.{number}1", f"train.epochs={number + 1}")
        make_run(root / f"{number}", *sets, epochs=[{"accuracy": float(number)}] * number)
    elif kind == "epochs":
        write_metrics(run, [{"accuracy": float(number)}] * 2)
    elif kind == "cut":
        file = run / "metrics.jsonl"
        file.write_bytes(file.read_bytes()[: -number - 1] if file.exists() else b"")
    elif kind == "edit" and (run / "config.toml").exists():
        file = run / "config.toml"
        file.write_bytes(file.read_bytes().replace(b"seed = 0", f"seed = {number}".encode()))
    elif kind == "env":
        (run / "env.json").write_text(json.dumps({"started": f"200{number}"}))
    elif kind == "rename" and not (root / f"{number}-moved").exists():
        run.rename(root / f"{number}-moved")
    elif kind == "remove":
        shutil.rmtree(run)
    elif kind == "damage":
        (run / rng.choice(index.FILES[:3])).write_bytes(b"\xff\n" * number)
    elif kind == "swap":
        other = rng.choice(runs)
        if other != run:
            run.rename(root / ".swap")
            other.rename(run)
            (root / ".swap").rename(other)


def test_rows_are_those_of_the_files_after_any_changes(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    read: list[str],
) -> None:
    # Times of files have the grain of the system's clock, some milliseconds.
    monkeypatch.setattr(index, "_RACY_NS", 15_000_000)
    rng = random.Random(0)
    root = tmp_path / "runs"
    root.mkdir()
    num_listed = num_read = 0
    for _ in range(80):
        for _ in range(rng.randrange(4)):
            change(root, rng)
        time.sleep(rng.choice((0.0, 0.02)))
        caplog.clear()
        read.clear()
        rows, said = list_runs(root), list(caplog.messages)
        paths = sorted(path for path in root.iterdir() if (path / "config.toml").exists())
        num_listed, num_read = num_listed + len(paths), num_read + len(read)
        fresh = [reading.read(path) for path in paths]
        assert rows == [row for row, _ in fresh if row is not None]
        assert said == [line for _, lines in fresh for line in lines]
    assert num_read < 0.7 * num_listed


def test_a_cached_list_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    os.utime(tmp_path / "runs" / "a" / "config.toml")
    code = (
        "import sys; from pathlib import Path; import fastbyol.cli.runs\n"
        "from fastbyol.registry import index; index._RACY_NS = 0\n"
        "assert len(index.list_runs(Path(sys.argv[1]))) == 1\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    for imported in ("False True", "False False"):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == imported.split()
