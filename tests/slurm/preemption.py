"""Jobs that a real SLURM pre-empts go on where they were. `make slurm-test` runs this file."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster
import counter
import pytest

# Long enough to be pre-empted on a busy machine, about ten seconds.
TOTAL = 100


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """Yield the variables of a cluster. pytest's own folders are too long for sockets."""
    assert not cluster.missing(), f"no {', '.join(cluster.missing())}: run make slurm-test"
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with cluster.cluster(folder) as given:
            yield given
        assert cluster.running(given) == []
    finally:
        shutil.rmtree(folder)


def await_(happened: Callable[[], object], what: str) -> None:
    end = time.monotonic() + cluster.PATIENCE
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def started(file: Path) -> bool:
    return file.exists() and bool(file.read_text())


def lines(file: Path) -> list[list[str]]:
    return [line.split() for line in file.read_text().splitlines()]


def submit(variables: dict[str, str], folder: Path, *arguments: str) -> None:
    """Submit a job that runs in ``folder``. Not --wait, which asks ever less often."""
    command = ["sbatch", "--chdir", str(folder), *arguments]
    subprocess.run(command, env=os.environ | variables, check=True, timeout=cluster.PATIENCE)


def preempt(variables: dict[str, str], folder: Path) -> None:
    """Submit a job in ``high``, which gets a core of one in ``low``, and wait until it has run."""
    submit(variables, folder, "--partition=high", "--wrap", "touch urgent")
    await_((folder / "urgent").exists, "the urgent job runs")


def fill(variables: dict[str, str], folder: Path, cores: int) -> None:
    """Occupy cores with a job that nobody pre-empts: machines have more than two."""
    if cores > 0:
        submit(variables, folder, "--partition=high", f"--ntasks={cores}", "--wrap", "sleep 3600")


def test_a_job_that_sigterm_tells_is_queued_again_and_goes_on(
    variables: dict[str, str], tmp_path: Path
) -> None:
    """Without submitit: srun's task gets SIGTERM at once, and asks for its restart itself."""
    file = tmp_path / "count"
    task = ["srun", "--ntasks=1", sys.executable, counter.__file__, str(file), str(TOTAL)]
    # All cores: whatever comes pre-empts it.
    submit(variables, tmp_path, f"--ntasks={os.cpu_count()}", "--wrap", shlex.join(task))
    await_(lambda: started(file), "the job starts")
    preempt(variables, tmp_path)
    await_(lambda: "end" in file.read_text(), "the job ends")
    first, told, again, last = lines(file)
    assert first == ["0", "start", "0"]
    assert told[:2] == ["0", "SIGTERM"]
    assert 0 <= int(told[2]) < TOTAL
    assert again == ["1", "start", told[2]]
    assert last == ["1", "end", str(TOTAL)]


def test_submitits_array_survives_the_preemption_of_one(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's own handler of SIGUSR2 saves, queues again and goes on; the other job stays."""
    submitit = pytest.importorskip("submitit")
    fill(variables, tmp_path, (os.cpu_count() or 1) - 2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    executor = submitit.AutoExecutor(folder=tmp_path / "log", cluster="slurm")
    executor.update_parameters(slurm_partition="low", timeout_min=60, slurm_signal_delay_s=60)
    files = [tmp_path / "first", tmp_path / "second"]
    with executor.batch():
        jobs = [executor.submit(counter.Counter(file, TOTAL)) for file in files]
    await_(lambda: all(started(file) for file in files), "both jobs start")
    preempt(variables, tmp_path)
    results = [job.paths.result_pickle for job in jobs]
    # Not by the job's state, which submitit asks of sacct: this cluster keeps no accounts.
    await_(lambda: all(path.exists() for path in results), "both jobs end")
    assert [job.result() for job in jobs] == [TOTAL, TOTAL]
    told, stayed = sorted((lines(file) for file in files), key=len, reverse=True)
    assert stayed == [["0", "start", "0"], ["0", "end", str(TOTAL)]]
    at = told[1][2]
    assert told == [
        ["0", "start", "0"],
        ["0", "save", at],
        ["1", "start", at],
        ["1", "end", str(TOTAL)],
    ]
