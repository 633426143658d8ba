"""The command that sends a run to loggers: what they lack of it."""

from __future__ import annotations

from typing import Annotated

import typer

from fastbyol.cli.options import RunPath
from fastbyol.errors import FastbyolError
from fastbyol.output import say


def log(
    run: RunPath,
    to: Annotated[
        list[str],
        typer.Option(
            "--to", metavar="NAME", help="tensorboard, wandb, mlflow or trackio; repeatable."
        ),
    ],
) -> None:
    """Send a run, finished or not, to loggers, as far as they lack it."""
    from fastbyol.loggers.child import ALL_SENT, Child
    from fastbyol.loggers.sink import refuse_missing, with_loggers
    from fastbyol.runs.folder import RunFolder

    with RunFolder.open(run, lock=False) as folder:
        config = with_loggers(folder.config, to)
    refuse_missing(config)
    failed = []
    for name in dict.fromkeys(config.log.to):
        child = Child(run, name, limit_s=0.0)
        try:
            child.finish()
            code = child.process.wait()
            for line in child.lines():
                say(f"{name}: {line}")
        finally:
            child.close()
        if code == ALL_SENT:
            say(f"{run}: sent to {name}")
        else:
            failed.append(f"{name} (see {child.log})")
    if failed:
        raise FastbyolError(f"{run}: not sent to {', '.join(failed)}")
