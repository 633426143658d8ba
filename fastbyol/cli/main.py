"""The program ``fastbyol``: its commands, its one-line errors and its exit codes.

Modules of commands import torch and numpy inside commands only, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

import fastbyol
from fastbyol.cli import (
    ablate,
    data,
    data_marker,
    doctor,
    embed,
    evaluate,
    explain,
    export,
    fork,
    log,
    presets,
    runs,
    sweep,
    train,
    watch,
)
from fastbyol.engine import interrupt, worker
from fastbyol.engine.allocator import keep_freed_memory
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.output import guarded, say

app = typer.Typer(
    help="Train BYOL, watch it collapse or not, and measure what it learned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]


@app.callback(invoke_without_command=True)
def _about(context: typer.Context, version: Version = False) -> None:
    if version:
        say(f"fastbyol {fastbyol.__version__}")
        raise typer.Exit


# In the order of --help.
app.command()(data.convert)
app.command()(train.train)
app.command()(train.resume)
app.command()(fork.fork)
app.command()(watch.watch)
app.command("eval")(evaluate.evaluate)
app.command()(embed.embed)
app.command()(export.export)
app.command()(train.report)
app.command()(explain.explain)
app.command()(log.log)
app.command()(sweep.sweep)
app.command()(doctor.doctor)
app.command()(doctor.bench)
app.command()(train.demo)
data.app.command()(data_marker.marker)
app.add_typer(runs.app, name="runs")
app.add_typer(presets.app, name="presets")
app.add_typer(data.app, name="data")
app.add_typer(ablate.app, name="ablate")


def main() -> None:
    """Run the program: every expected failure is one line on standard error and an exit code.

    A command whose output cannot be written finishes its work, and then fails.
    """
    # Read when torch is imported. Threads that spin while they wait take cores from other
    # processes: beside one on two cores an epoch of the demo ran at 193 images/s spinning and at
    # 320 sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    worker.begin()
    try:
        with guarded() as failures:
            code = _run_command()
            if failures and not code:
                code = 1
                if words := failures.in_words():
                    _print_error(words)
        sys.exit(code)
    except (
        interrupt.Ended
    ) as error:  # everything is cleaned up: end as the signal would have ended the process
        signal.signal(error.number, signal.SIG_DFL)
        os.kill(os.getpid(), error.number)
    finally:
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # nothing is left to save, and Python's own handler would print a trace


def _run_command() -> int:
    """Run the command line, print its error, return its exit code. Raises ``Ended`` on a signal."""
    try:
        with interrupt.ending():
            _demand_working_folder()
            code = app(standalone_mode=False, prog_name="fastbyol")
        return code if isinstance(code, int) else 0
    except FastbyolError as error:
        if worker.speaks(error):
            _print_error(str(error))
        return error.exit_code
    except typer.TyperException as error:
        message = error.format_message() or "say what to do: see fastbyol --help"
        if message.startswith(
            "Usage: "
        ):  # a group without a command: its help, not a one-line error
            say(*message.split("\n"), err=True)
        else:
            _print_error(" ".join(message.split()))
        return error.exit_code
    except (KeyboardInterrupt, interrupt.Ended, Exception) as error:
        reason = interrupt.behind(error)
        if reason and worker.tells_of_signals():
            is_ended = isinstance(reason, interrupt.Ended)
            _print_error(f"ended by {reason}" if is_ended else "interrupted")
        if isinstance(reason, interrupt.Ended):
            raise reason from None
        if reason:
            return 130
        if not isinstance(error, OSError):
            raise
        # The machine's, and not expected: a folder that was removed, a disk that fails.
        _print_error(f"{error.filename or 'system'}: {error.strerror or error}")
        return 1


def _demand_working_folder() -> None:
    """Raise UsageError if the working folder was removed: torch's libraries end a process there."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(f"the working folder: {error.strerror}: cd to one that is there") from None


def _print_error(message: str) -> None:
    say(f"fastbyol: error: {message.strip()}", err=True)


if __name__ == "__main__":
    main()
