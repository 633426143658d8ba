"""Workers as jobs of a SLURM cluster, by submitit: an array with one job for each machine."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol import config_io, output
from fastbyol.errors import FastbyolError, UsageError, one_line
from fastbyol.fleet.claim import STALE_S
from fastbyol.fleet.launch import Launch
from fastbyol.fleet.node import Node
from fastbyol.fleet.slots import slots
from fastbyol.fleet.worker import Options

JOBS = "slurm"
# SLURM sends USR2 so long before a job's time is over: a step, a checkpoint and a probe fit in.
NOTICE_S = 120
# A job may be requeued as often; submitit's own limit is 3.
MOST_REQUEUES = 10_000


@dataclass
class NodeJob:
    """The workers of one machine as a job, which submitit sends there as a pickle.

    Called, it works until nothing is left to do. Told by USR2 that its time is over, it saves and
    lets submitit requeue it, and the next call goes on.
    """

    out: str
    device: str = "auto"
    jobs: int | None = None
    minutes: float | None = None
    stale_s: float = STALE_S

    def __call__(self) -> str:
        """Run the workers, and return how that ended."""
        import submitit

        stopped_by = self.run(submitit.JobEnvironment().job_id)
        if stopped_by == "SIGUSR2":
            # By now the signal is submitit's again, whose handler requeues the job and exits.
            os.kill(os.getpid(), signal.SIGUSR2)
        elif stopped_by is not None:
            _wait_for_the_end()
        return stopped_by or "nothing is left to do"

    def run(self, job: str) -> str | None:
        """Run the workers under the scheduler's name ``job``; return the signal that stopped them.

        Raises FastbyolError if they could not work.
        """
        # Others may stay for long with what they have: a job that waited would hold its machine.
        options = Options(self.out, self.minutes, waits=False, stale_s=self.stale_s, job=job)
        end = Node(options, slots(self.device, self.jobs), output.say).run()
        if end.problems:
            raise FastbyolError(end.problems[0])
        return end.stopped_by

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Return what submitit is to send when it requeues the job: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)


def check(limit: str | None, parameters: Sequence[str]) -> None:
    """Raise UsageError if ``--time`` or ``--slurm`` cannot be read."""
    _minutes(limit)
    _parameters(parameters)


def submit(launch: Launch, out: Path) -> tuple[str, ...]:
    """Submit an array of ``launch.nodes`` jobs that work on ``out``, and return their ids.

    Raises UsageError if SLURM or submitit refuses them.
    """
    import submitit

    parameters = {
        "job_name": "fastbyol", "nodes": 1, "ntasks_per_node": 1, "signal_delay_s": NOTICE_S,
        "time": _minutes(launch.time), "array_parallelism": launch.nodes,
        **({"partition": launch.partition} if launch.partition else {}),
        **_parameters(launch.slurm),
    }  # fmt: skip
    if not any("gpus" in key or "cpus" in key for key in parameters):
        parameters["exclusive"] = True  # the whole machine
    job = NodeJob(str(out), launch.device, launch.jobs, launch.minutes)
    try:
        executor = submitit.SlurmExecutor(out / JOBS, max_num_timeout=MOST_REQUEUES)
        executor.update_parameters(**parameters)
        with executor.batch():
            made = [executor.submit(job) for _ in range(launch.nodes)]
    except Exception as error:  # whatever submitit and sbatch raise
        raise UsageError(f"--launcher slurm: {one_line(error, 400)}") from None
    return tuple(str(each.job_id) for each in made)


def _minutes(limit: str | None) -> int:
    """Return the minutes of ``D-HH:MM:SS``, ``HH:MM:SS``, ``MM:SS`` or ``MM``, as SLURM reads it.

    Raises UsageError.
    """
    if limit is None:
        return 60
    words = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if words is None:
        raise UsageError(f"--time {limit}: write hours:minutes:seconds, such as 4:00:00")
    days, *parts = words.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        minutes += 60 * (hours + 24 * int(days))
    elif len(numbers) == 3:
        minutes, seconds = 60 * numbers[0] + numbers[1], numbers[2]
    else:
        minutes, seconds = (*numbers, 0)[:2]
    if not minutes + seconds:
        raise UsageError(f"--time {limit}: is no time")
    return minutes + (seconds > 0)


def _parameters(words: Sequence[str]) -> dict[str, Any]:
    """Return submitit's parameters of ``KEY=VALUE``. Raises UsageError."""
    made: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9_]*", key):
            raise UsageError(f"--slurm {word}: write KEY=VALUE, such as gpus_per_node=8")
        made[key] = config_io.value_of(text)
    return made


def _wait_for_the_end() -> None:
    """Wait to be killed.

    A job that ends by itself before it is pre-empted counts as done, and is not requeued.
    """
    while True:
        time.sleep(1.0)
