"""Workers as jobs of a SLURM cluster, by submitit: an array with one job for each machine."""

from __future__ import annotations

import difflib
import inspect
import io
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
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
# With less, a job would be told to end as soon as it began: the notice comes up to a minute early.
LEAST_MINUTES = 5
# A job may be requeued as often; submitit's own limit is 3.
MOST_REQUEUES = 10_000
# What other options name, what tells submitit where things are, and what would lose the signals,
# which only a step gets.
_OWN = frozenset(
    (
        *("time", "partition", "nodes", "ntasks_per_node"),
        *("command", "folder", "map_count", "use_srun"),
    )
)
# SLURM signals a job's processes also before they have handlers, and one that dies is not requeued.
# What a job misses while it starts, it hears at the end of its grace.
_PYTHON = """sh -c 'trap "" TERM USR2; exec "$0" "$@"' """


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

        job = submitit.JobEnvironment().job_id
        # Others may stay for long with what they have: a job that waited would hold its machine.
        options = Options(self.out, self.minutes, waits=False, stale_s=self.stale_s, job=job)
        end = Node(options, slots(self.device, self.jobs), output.say).run()
        if end.stopped_by == "SIGUSR2":
            # By now the signal is submitit's again, whose handler requeues the job and exits.
            os.kill(os.getpid(), signal.SIGUSR2)
        elif end.stopped_by is not None:
            _wait_for_the_end()
        elif end.problems:
            raise FastbyolError(end.problems[0])
        return "nothing is left to do"

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Return what submitit is to send when it requeues the job: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)


def check(limit: str | None, parameters: Sequence[str]) -> None:
    """Raise UsageError if ``--time`` or ``--slurm`` cannot be read, or this is no SLURM's host."""
    _minutes(limit)
    _parameters(parameters)
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise UsageError(
            f"--launcher slurm: no {' and no '.join(missing)} here: call it where jobs are "
            "submitted, or choose --launcher none and start `fastbyol ablate work` in jobs"
        )


def submit(launch: Launch, out: Path) -> tuple[str, ...]:
    """Submit an array of ``launch.nodes`` jobs that work on ``out``, and return their ids.

    Raises UsageError if SLURM or submitit refuses them.
    """
    import submitit

    job = NodeJob(str(out), launch.device, launch.jobs, launch.minutes)
    parameters = _all_parameters(launch)
    try:
        executor = submitit.SlurmExecutor(
            out / JOBS,
            max_num_timeout=MOST_REQUEUES,
            python=_PYTHON + shlex.quote(sys.executable),
        )
        executor.update_parameters(**parameters)
        # submitit prints sbatch's error, and raises it.
        with redirect_stderr(io.StringIO()), executor.batch():
            made = [executor.submit(job) for _ in range(launch.nodes)]
    except Exception as error:  # whatever submitit and sbatch raise
        raise UsageError(f"--launcher slurm: {one_line(error, 400)}") from None
    return tuple(str(each.job_id) for each in made)


def _all_parameters(launch: Launch) -> dict[str, Any]:
    """Return submitit's parameters of ``launch``'s jobs, of which each has one step of one task."""
    own = _parameters(launch.slurm)
    parameters = {
        "job_name": "fastbyol", "nodes": 1, "ntasks_per_node": 1, "signal_delay_s": NOTICE_S,
        "time": _minutes(launch.time), "array_parallelism": launch.nodes,
        **({"partition": launch.partition} if launch.partition else {}),
        **own,
        # Many sites bind a task to one core; the workers share all that the job has.
        "srun_args": ["--cpu-bind=none", *own.get("srun_args", [])],
        # Where a site's default is otherwise, a job that is pre-empted or whose node dies is lost.
        "additional_parameters": {"requeue": True, **own.get("additional_parameters", {})},
    }  # fmt: skip
    if not any(word in key for key in own for word in ("gpus", "cpus", "gres", "exclusive")):
        parameters["exclusive"] = True  # the whole machine
    return parameters


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
    minutes += seconds > 0
    if minutes < LEAST_MINUTES:
        raise UsageError(f"--time {limit}: is too short: {LEAST_MINUTES} minutes or more")
    return minutes


def _parameters(words: Sequence[str]) -> dict[str, Any]:
    """Return submitit's parameters of ``KEY=VALUE``. Raises UsageError."""
    from submitit.slurm.slurm import _make_sbatch_string

    names = inspect.signature(_make_sbatch_string).parameters.keys() - _OWN
    made: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if not key or not text:
            raise UsageError(f"--slurm {word}: write KEY=VALUE, such as gpus_per_node=8")
        if key not in names:
            near = difflib.get_close_matches(key.replace("-", "_"), names) or sorted(names)
            raise UsageError(f"--slurm {key}: cannot be set; there are {', '.join(near)}")
        value = config_io.value_of(text)
        if key in ("setup", "teardown", "srun_args") and not isinstance(value, list):
            value = shlex.split(text) if key == "srun_args" else [text]
        if key == "additional_parameters" and not isinstance(value, dict):
            raise UsageError(f"--slurm {word}: write a table, such as '{{reservation=\"mine\"}}'")
        made[key] = value
    return made


def _wait_for_the_end() -> None:
    """Wait to be killed. A job that ended by itself would count as done, and not be requeued."""
    while True:
        time.sleep(1.0)
