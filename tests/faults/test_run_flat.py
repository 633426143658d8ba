"""Three hundred epochs leave no more threads, handles or memory behind than ten."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from pathlib import Path

import processes
import pytest
import run_rig as rig

from fastbyol import api
from fastbyol.config import Config
from fastbyol.engine.observer import EpochEnd, Silent

EPOCHS = rig.many(100, 300)
SHARED_MEMORY = Path("/dev/shm")


class Meter(Silent):
    """Counts at every epoch's end: (threads, open files, resident pages)."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int, int]] = []

    def epoch_end(self, message: EpochEnd) -> None:
        gc.collect()
        own = Path("/proc/self")
        threads, handles = (len(list((own / name).iterdir())) for name in ("task", "fd"))
        self.counts.append((threads, handles, int((own / "statm").read_text().split()[1])))


def _train(config: Config, run: Path, result: Path) -> None:
    meter = Meter()
    # the imported modules: going through them at every epoch would take most of the time
    gc.freeze()
    api.train(config, run, observer=meter)
    result.write_text(json.dumps(meter.counts))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "device"])
def test_threads_handles_and_memory_stay_flat_over_many_epochs(tmp_path: Path, cache: str) -> None:
    """The run's folder is in memory: forcing every checkpoint to a disk would take a minute and
    measure nothing.
    """
    with tempfile.TemporaryDirectory(
        dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    ) as folder:
        check_flat(tmp_path, Path(folder) / "run", cache)


def check_flat(tmp_path: Path, run: Path, cache: str) -> None:
    config = rig.make_config(
        tmp_path, f"train.epochs={EPOCHS}", "train.batch_size=48", "views.size=8", "model.width=2",
        f"data.cache={cache}",
        "data.size=16", "data.test=none", "run.checkpoint_every_steps=0",
    )  # fmt: skip
    process = rig.PROCESSES.Process(target=_train, args=(config, run, tmp_path / "counts"))
    process.start()
    process.join(10 * processes.PATIENCE_S)
    assert process.exitcode == 0
    counts = json.loads((tmp_path / "counts").read_text())
    assert len(counts) == EPOCHS
    threads, handles, pages = (list(column) for column in zip(*counts, strict=True))
    megabytes = [
        round(count * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
        for count in (pages[9], max(pages[10:]), pages[-1])
    ]
    print(
        f"cache {cache}: threads {threads[9]}-{max(threads[10:])}, handles "
        f"{handles[9]}-{max(handles[10:])}, MB {megabytes}"
    )
    for column in (threads, handles, pages):
        assert max(column[10:]) <= 1.01 * column[9]
