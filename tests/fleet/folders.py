"""Folders of tiny runs for tests of workers, asked for without training any."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fastbyol.ablations import plan
from fastbyol.ablations.arms import arm
from fastbyol.engine import interrupt
from fastbyol.fleet import campaign, worker
from fastbyol.fleet.launch import Launch
from fastbyol.fleet.worker import Options
from fastbyol.output import guarded, say
from small import SETS

# Four arms of three seeds.
TWELVE = ("gn-sgd-mlp-none", "gn-lars-0.1", "gn-lars-0.2", "bn-sgd-mlp-bn")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115, PTH123


def ask(
    out: Path, *names: str, seeds: int = 1, sets: tuple[str, ...] = (), launch: str = "none"
) -> tuple[plan.Run, ...]:
    """Ask for runs of the arms ``names`` in ``out``, and train none of them."""
    runs = plan.make([arm(name) for name in names], "mini", out, seeds=seeds, sets=(*SETS, *sets))
    how: dict[str, Any] = {"asked": {}, "launch": Launch(launch), "console": QUIET}  # type: ignore[arg-type]
    campaign.execute(plan.tasks(runs, out), out, "mini", **how)
    return runs


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """The ledger's rows by ARM/seedK."""
    paths = sorted((out / "ledger").glob("*/seed*.json"))
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text()) for path in paths}


def claims_in(out: Path) -> list[str]:
    """The claims that lie in the folder."""
    return [path.name for path in out.rglob("*.claim.*")]


def work(options: Mapping[str, Any], said: Path | None = None) -> None:
    """A worker, for a child process; what it says goes to the file ``said``."""
    if said is not None:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    os.setsid()
    with guarded(), interrupt.ending():
        try:
            reason = worker.work(Options(**options), say)
        except worker.FastbyolError as error:
            say(f"fastbyol: error: {error}", err=True)
            sys.exit(2)
        say(f"ends: {reason}")


@contextmanager
def another_host(name: str) -> Iterator[None]:
    """Make this process one of another machine, which sees the folder and no locks of others."""
    from fastbyol.fleet import claim
    from fastbyol.runs import lock

    before = (claim.boot, lock._try_lock)
    claim.boot, lock._try_lock = (lambda: name), (lambda descriptor: True)
    try:
        yield
    finally:
        claim.boot, lock._try_lock = before
