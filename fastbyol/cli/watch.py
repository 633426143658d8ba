"""The command watch: a live page of a run, from its files."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated

import typer

from fastbyol.cli.options import RunPath
from fastbyol.errors import UsageError
from fastbyol.output import say

Port = Annotated[
    int | None,
    typer.Option(
        "--port", min=0, max=65535, help="Default: 6007, or a free one where that is in use."
    ),
]


def watch(run: RunPath, port: Port = None) -> None:
    """Serve a page that shows a run while it trains, to this machine alone, until Ctrl-C."""
    from fastbyol.runs.folder import CONFIG
    from fastbyol.show import live_server

    if not os.path.lexists(run / CONFIG):
        raise UsageError(
            f"{run}: no run here (no {CONFIG}); `fastbyol runs` lists those under runs/"
        )
    with live_server.server(run, port) as server:
        say(f"{run}: {server.url} shows it until Ctrl-C")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
