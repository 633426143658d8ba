"""A call that asks for runs, starts workers, and tells what became of them.

What is done is skipped, what was stopped goes on, what fails is reported and stops nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastbyol.data import embedded
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.fleet import asking, launchers, ledger
from fastbyol.fleet.asking import FolderStatus
from fastbyol.fleet.launch import Launch
from fastbyol.fleet.ledger import Call, Ledger, Task
from fastbyol.fleet.node import NodeEnd
from fastbyol.runs.folder import CONFIG


@dataclass(frozen=True)
class Outcome:
    """The end of a call: the runs that it finished, skipped as done, left stopped, and failed ones.

    Runs are names; a failed one is (name, why), also if it failed before and was not tried again.
    ``problems`` are what kept workers from working, ``submitted`` the jobs of a cluster that work
    from now on.
    """

    finished: tuple[str, ...]
    skipped: tuple[str, ...]
    stopped: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    interrupted: bool
    seconds: float
    problems: tuple[str, ...] = ()
    submitted: tuple[str, ...] = ()


def execute(
    tasks: Sequence[tuple[Task, FolderStatus]],
    out: Path,
    scale: str,
    *,
    asked: Mapping[str, Any],
    launch: Launch,
    console: Console,
    retry_failed: bool = True,
) -> Outcome:
    """Train ``tasks``, each with what its folder below ``out`` says, by the workers of ``launch``.

    ``scale`` is the kind of runs that the folder is for. ``asked`` goes into the ledger. A run that
    fails does not stop the others; without ``retry_failed`` those that failed before stay so. Other
    workers on the folder, here or elsewhere, share the work. One of ``interrupt.SIGNALS`` saves and
    stops the runs at work; a second SIGINT kills them. Raises UsageError: the folder holds other
    runs, or ``launch`` cannot work here.
    """
    began = time.monotonic()
    launchers.check(launch)
    call, left = _ask(tasks, out, scale, asked, retry_failed)
    end = launchers.start(launch, out, len(left), console) if left else NodeEnd()
    rows = {entry.name: entry for entry in Ledger(out).entries()}
    status = {
        task.name: rows[task.name].status if task.name in rows else "new" for task, _ in tasks
    }
    done = [name for name in status if status[name] == "done"]
    outcome = Outcome(
        finished=tuple(name for name in done if name in left),
        skipped=tuple(name for name in done if name not in left),
        stopped=tuple(name for name in status if status[name] in ("new", "stopped")),
        failed=tuple(
            (name, str(rows[name].row["error"])) for name in status if status[name] == "failed"
        ),
        interrupted=end.stopped_by is not None,
        seconds=time.monotonic() - began,
        problems=end.problems,
        submitted=end.submitted,
    )
    call.end(interrupted=outcome.interrupted, seconds=round(outcome.seconds, 1))
    return outcome


def _ask(
    tasks: Sequence[tuple[Task, FolderStatus]],
    out: Path,
    scale: str,
    asked: Mapping[str, Any],
    retry_failed: bool,
) -> tuple[Call, tuple[str, ...]]:
    """Write down that ``tasks`` are to be trained; return the names of those that are left.

    The sets that they are trained on are made, before several workers would each make them.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{out}: {error.strerror}: name a folder that can be written with --out"
        ) from None
    if (out / CONFIG).exists():
        raise UsageError(f"{out}: holds a single run: name another folder with --out")
    ledger.refuse_other_scale(out, scale)
    call = Call(out, scale, {**asked, "runs": [task.name for task, _ in tasks]})
    left = tuple(entry.name for entry in asking.ask(out, tasks, retry_failed=retry_failed))
    for data in {task.config.data for task, _ in tasks if task.name in left}:
        embedded.training_file(data)
        embedded.held_out_file(data)
    ledger.allow(out)
    return call, left


def refuse_problems(outcome: Outcome) -> None:
    """Raise FastbyolError if runs failed or workers could not work."""
    if outcome.failed:
        name, why = outcome.failed[0]
        raise FastbyolError(f"{len(outcome.failed)} of the runs failed; {name}: {why}")
    if outcome.problems and outcome.stopped:
        raise FastbyolError(f"{len(outcome.stopped)} runs are left: {outcome.problems[0]}")
