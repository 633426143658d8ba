"""The commands on a folder of runs that workers share: work, status, stop, retry.

And the options of commands that start workers.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastbyol.cli.options import Device, Json
from fastbyol.errors import UsageError, quoted
from fastbyol.fleet.claim import STALE_S
from fastbyol.fleet.launch import Launch, LauncherName
from fastbyol.output import console as make_console
from fastbyol.output import print_json, say

if TYPE_CHECKING:
    from fastbyol.fleet.campaign import Outcome

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder that --out named.")]
Minutes = Annotated[
    float | None,
    typer.Option(
        "--minutes", metavar="M", min=0.0, help="Save and end after so many, such as 230 of 240."
    ),
]
Runs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN]...", help="Such as gn-lars-0.2/seed0, or gn-lars-0.2."),
]
WATCH_S = 2.0
# Nobody who reads from a pipe is helped by cut words.
PIPED_WIDTH = 200


def _launch_options(
    *,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at a time on a machine. Default: one a core, or what GPUs have room for.",
        ),
    ] = None,
    device: Device = "auto",
    minutes: Minutes = None,
    launcher: Annotated[
        LauncherName,
        typer.Option(help="Who starts workers. none: you do, with `fastbyol ablate work DIR`."),
    ] = "local",
    nodes: Annotated[int, typer.Option(min=1, help="SLURM: machines.")] = 1,
    partition: Annotated[str | None, typer.Option(help="SLURM: partition.")] = None,
    time: Annotated[
        str | None, typer.Option("--time", metavar="H:MM:SS", help="SLURM: a job's limit; 1:00:00.")
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            "--slurm",
            metavar="KEY=VALUE",
            help="SLURM: more, as gpus_per_node=8. Default: exclusive.",
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT|auto", help="Ray: the cluster's.")
    ] = None,
) -> None:
    """Name the options that make a ``Launch``."""


def with_launch_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``launch`` of ``command`` by the options that make it."""

    def called(**values: Any) -> None:
        own = {name: values.pop(name) for name in options}
        own["slurm"] = tuple(own["slurm"] or ())
        command(**values, launch=Launch(**own))

    options = inspect.signature(_launch_options, eval_str=True).parameters
    signature = inspect.signature(command, eval_str=True)
    arranged: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name == "launch":
            arranged += options.values()
        else:
            arranged.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = signature.replace(parameters=arranged)  # type: ignore[attr-defined]
    return called


def in_words(outcome: Outcome, out: Path, launch: Launch) -> str:
    """Return what became of a call, and what to do next."""
    from fastbyol.show.screen import duration

    counts = (
        f"{out}: {len(outcome.finished)} runs done, {len(outcome.skipped)} were done before, "
        f"{len(outcome.stopped)} left, {len(outcome.failed)} failed; {duration(outcome.seconds)}"
    )
    if outcome.interrupted:
        return f"{counts}; interrupted, the same command goes on"
    if outcome.submitted:
        jobs = ", ".join(outcome.submitted)
        return f"{counts}; jobs {jobs} work on them: `fastbyol ablate status {quoted(out)} --watch`"
    if launch.launcher == "none" and outcome.stopped:
        return f"{counts}; start workers: `fastbyol ablate work {quoted(out)}`"
    if outcome.failed:
        return f"{counts}; `fastbyol ablate retry {quoted(out)}` lets failed ones be tried again"
    return counts


def finish(outcome: Outcome) -> None:
    """End a command whose call was interrupted, or in which runs failed, with its exit code."""
    from fastbyol.fleet.campaign import refuse_problems

    if outcome.interrupted:
        raise typer.Exit(130)
    refuse_problems(outcome)


def work(
    out: Folder,
    minutes: Minutes = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait",
            help="Whether to stay while others work on all that is left, or leave once each of "
            "them has given a sign of life.",
        ),
    ] = True,
    stale: Annotated[
        float,
        typer.Option(
            "--stale",
            metavar="S",
            min=1.0,
            help="Seconds without a sign of life after which others may have this worker's run.",
        ),
    ] = STALE_S,
) -> None:
    """Train the runs of DIR that nobody has, one after the other.

    Start as many as there is room for, on any machine that sees DIR.
    """
    from fastbyol.fleet.board import headline
    from fastbyol.fleet.survey import Surveyor
    from fastbyol.fleet.worker import Options, work

    options = Options(str(out.resolve()), minutes, wait, stale)
    reason = work(options, say)
    if reason is not None:
        say(f"worker ends: {reason}")
    say(f"{out}: {headline(Surveyor(out).look())}")


def status(
    out: Folder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how far the runs of DIR are, who works on them, and what is wrong."""
    from fastbyol.fleet.board import Board, drawing
    from fastbyol.fleet.survey import Surveyor

    if watch and as_json:
        raise UsageError("--watch: has no JSON: call `status --json` as often as you want")
    surveyor, console = Surveyor(out), make_console()
    if not console.is_terminal:
        console.width = max(console.width, PIPED_WIDTH)
    if as_json:
        print_json(surveyor.look().as_json())
    elif not watch:
        console.print(drawing(surveyor.look()))
    else:
        with Board(console, surveyor) as board, suppress(KeyboardInterrupt):
            while True:
                board.draw(plain=True)
                time.sleep(WATCH_S)


def stop(
    out: Folder,
    undo: Annotated[bool, typer.Option("--undo", help="Let workers go on.")] = False,
) -> None:
    """Ask all workers on DIR to save and end, on every machine; `ablate run` goes on."""
    from fastbyol.fleet import ledger
    from fastbyol.fleet.survey import Surveyor

    surveyor = Surveyor(out)
    if undo:
        ledger.allow(out)
        say(f"{out}: workers may go on: `fastbyol ablate work {quoted(out)}`")
        return
    ledger.ask_to_stop(out)
    running = surveyor.look().counts["running"]
    say(f"{out}: asked the workers to save and end; {running} runs are being trained")


def retry(out: Folder, runs: Runs = None) -> None:
    """Let failed runs of DIR be tried again: all, or those that are named."""
    from fastbyol.fleet.asking import retry
    from fastbyol.fleet.survey import Surveyor

    Surveyor(out)
    entries = retry(out, runs or ())
    lines = [f"{entry.name}: is tried again by the next worker" for entry in entries]
    say(*(lines or [f"{out}: no run has failed"]))
