"""The disk fills up under a run: one line, nothing lost, and it goes on once there is room."""

from __future__ import annotations

import contextlib
import random
import resource
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import run_rig as rig
from small_disk import small_disk

from fastbyol import api
from fastbyol.config import Config
from fastbyol.engine.observer import Silent, StepReport
from fastbyol.errors import FastbyolError
from fastbyol.runs import checkpoint

TIMES = rig.many(4, 60)
DISK_BYTES = 24_000_000


class Filler(Silent):
    """Fills the disk but for ``room`` bytes after a step."""

    def __init__(self, file: Path, at: int, room: int) -> None:
        self.file, self.at, self.room = file, at, room

    def progress(self, message: StepReport) -> None:
        if message.step >= self.at and not self.file.exists():
            with self.file.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            with self.file.open("r+b") as file:
                file.truncate(max(0, self.file.stat().st_size - self.room))


def _train(
    config: Config, run: Path, said: Path, filler: tuple[Path, int, int] | None, limit: int | None
) -> None:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        work = (
            api.resume
            if (run / "config.toml").exists()
            else lambda run, observer: api.train(config, run, observer=observer)
        )
        work(run, observer=Filler(*filler) if filler else Silent())
    except FastbyolError as error:
        said.write_text(str(error))


def train(
    run: Path,
    config: Config,
    said: Path,
    *,
    filler: tuple[Path, int, int] | None = None,
    limit: int | None = None,
) -> str:
    """Train or go on in a child and return the error's line, or nothing."""
    said.write_text("")
    process = rig.PROCESSES.Process(target=_train, args=(config, run, said, filler, limit))
    process.start()
    process.join(processes.PATIENCE_S)
    assert process.exitcode == 0
    return said.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder / "run", make_config(folder), folder / "said") == ""
    return folder / "run"


def make_config(folder: Path) -> Config:
    return rig.make_config(folder, "run.drain_every_steps=1")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


def check_saved(run: Path) -> None:
    """What was saved before is whole, and nothing half-written is beside it."""
    if rig.checkpoints(run):
        assert checkpoint.load_latest(run / "checkpoints").warnings == ()
    assert not list((run / "checkpoints").glob(".*"))


def test_a_disk_filled_at_any_step_costs_nothing(whole: Path, disk: Path, tmp_path: Path) -> None:
    config, draw, where = make_config(whole.parent), random.Random(3), Counter[str]()
    for number in range(TIMES):
        run, filler = disk / f"run{number}", disk / "filler"
        # Some runs find no room at all, others enough for a few lines but not for a checkpoint.
        room = draw.choice((0, 0, draw.randrange(20_000), draw.randrange(600_000)))
        error = train(run, config, tmp_path / "said", filler=(filler, draw.randrange(1, 17), room))
        if error:
            assert len(error.splitlines()) == 1
            assert "No space left on device" in error
            where[Path(error.split(": cannot write")[0]).suffix] += 1
            check_saved(run)
        filler.unlink(missing_ok=True)
        assert train(run, config, tmp_path / "said") == ""
        assert rig.contents(run) == rig.contents(whole)
        subprocess.run(["rm", "-r", str(run)], check=True)
    print(f"{TIMES} full disks: {dict(where)}")
    assert where


def test_a_disk_filled_under_the_metrics_costs_nothing(disk: Path, tmp_path: Path) -> None:
    """24 steps before the first checkpoint and one sample of the layers: nothing but metrics.jsonl
    asks for another page.
    """
    config = rig.make_config(
        tmp_path, "train.batch_size=2", "train.epochs=1", "run.checkpoint_every_steps=0",
        "run.layers_every_steps=1000",
        "run.drain_every_steps=1",
    )  # fmt: skip
    run, filler = disk / "run", disk / "filler"
    error = train(run, config, tmp_path / "said", filler=(filler, 1, 0))
    assert error == f"{run}/metrics.jsonl: cannot write: No space left on device"
    filler.unlink()
    assert train(run, config, tmp_path / "said") == ""
    assert train(tmp_path / "whole", config, tmp_path / "said") == ""
    assert rig.contents(run) == rig.contents(tmp_path / "whole")


def test_a_run_on_a_disk_that_became_read_only_is_refused_in_one_line(
    whole: Path, disk: Path, tmp_path: Path
) -> None:
    run = disk / "run"
    assert train(run, make_config(whole.parent), tmp_path / "said") == ""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for path in (run, disk / "new"):
        error = train(path, make_config(whole.parent), tmp_path / "said")
        assert len(error.splitlines()) == 1
        assert "Read-only file system" in error
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert rig.contents(run) == rig.contents(whole)


def test_files_that_may_not_grow_cost_nothing(whole: Path, tmp_path: Path) -> None:
    """A limit on the size of a file acts as a quota: what is over it is refused in the middle of a
    write.
    """
    config, draw, where = make_config(whole.parent), random.Random(4), Counter[str]()
    largest = rig.checkpoints(whole)[-1].stat().st_size
    for number in range(TIMES):
        run = tmp_path / f"run{number}"
        error = train(
            run,
            config,
            tmp_path / "said",
            limit=draw.choice((draw.randrange(6_000, 60_000), draw.randrange(largest))),
        )
        assert len(error.splitlines()) == 1
        assert "File too large" in error
        where[Path(error.split(": cannot write")[0]).suffix] += 1
        check_saved(run)
        assert train(run, config, tmp_path / "said") == ""
        assert rig.contents(run) == rig.contents(whole)
    print(f"{TIMES} files too large: {dict(where)}")


def test_a_disk_too_small_is_said_before_the_first_step(
    whole: Path, disk: Path, tmp_path: Path
) -> None:
    (disk / "filler").write_bytes(bytes(DISK_BYTES - 500_000))
    error = train(disk / "run", make_config(whole.parent), tmp_path / "said")
    assert "are needed for checkpoints and telemetry" in error
    assert not (disk / "run").exists()
