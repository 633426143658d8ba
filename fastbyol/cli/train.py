"""The commands that make and continue runs and draw them: train, resume, demo, report."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from fastbyol import config_io
from fastbyol.cli.options import (
    ConfigFile,
    Endpoint,
    Gpus,
    Json,
    LogTo,
    Nodes,
    Processes,
    RunPath,
    Sets,
    config_flags,
    with_config_options,
)
from fastbyol.config import Resolved
from fastbyol.config_io import Loaded
from fastbyol.engine.worker import is_first, program_as_typed, worker
from fastbyol.errors import NoGraphError, UsageError
from fastbyol.output import console as make_console
from fastbyol.output import print_json, say

if TYPE_CHECKING:
    from fastbyol.engine.trainer import Summary


@with_config_options
def train(
    preset: Annotated[
        str | None, typer.Option(help="demo, blog or paper. Default: blog on a GPU, demo on a CPU.")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Run folder. Default: a new one under runs/."),
    ] = None,
    gpus: Gpus = None,
    processes: Processes = None,
    nnodes: Nodes = None,
    rdzv_endpoint: Endpoint = None,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Train a network; without --data on textures that are made for it."""
    from fastbyol import api

    console = training_console(as_json)
    loaded = load(preset, config, sets or (), config_flags(values))
    _prepare(loaded.config)
    _start_processes(loaded.config, out, gpus, processes, nnodes, rdzv_endpoint)
    for line in (_data_in_words(loaded), *loaded.notes):
        console.print(line, markup=False, soft_wrap=True)
    summary = watch(
        console,
        as_json,
        lambda observer: api.train(loaded.config, out, observer=observer, origin=loaded.origin),
    )
    finish(summary, console, as_json)


def training_console(as_json: bool) -> Console:
    """Return the console of a command that trains: silent in processes other than the first.

    Each other machine says once which one that is on: torch numbers them by their names.
    """
    made, here = make_console(err=as_json), worker()
    made.quiet = not is_first()
    if here is not None and here.rank and not here.local_rank and not here.restarts:
        say(f"{os.environ['MASTER_ADDR']} writes the run folder and tells how it goes", err=True)
    return made


def _start_processes(
    config: Resolved,
    out: Path | None,
    gpus: int | None,
    processes: int | None,
    nodes: int | None,
    endpoint: str | None,
    ranks: int | None = None,
) -> None:
    """Start the processes that the command asks for, and end with their exit code.

    A new run's folder is named here, so that they find it again after a restart. Return if this
    process trains by itself, or is one of them.
    """
    from fastbyol.engine import launch
    from fastbyol.runs.folder import default_run_path

    started = launch.processes_of(
        config, gpus=gpus, processes=processes, nodes=nodes, endpoint=endpoint, ranks=ranks
    )
    if started is None:
        return
    arguments = sys.argv[1:]
    if out is None:
        if started.nodes > 1:
            raise UsageError("--out: not given, and every node has to know the same run folder")
        out = default_run_path(config)
        arguments += ["--out", str(out)]
    raise typer.Exit(launch.start(started, arguments, out))


def _prepare(config: Resolved) -> None:
    """Convert images that are no beton and compile kernels, before a screen is drawn and other
    processes begin. An encoder that its library does not have is refused before that.
    """
    from fastbyol.data import embedded
    from fastbyol.engine import compiling
    from fastbyol.model.adapter import check_name

    if worker() is None:
        check_name(config.model)
        embedded.prepare(config.data)
        compiling.compile_kernels(config)


def load(
    preset: str | None,
    file: Path | None,
    sets: Sequence[str],
    flags: Mapping[str, tuple[str, object]],
) -> Loaded:
    """Return the configuration.

    The device decides on the preset if none is named: blog needs a GPU.
    """
    settings = config_io.requested(preset=preset, file=file, sets=sets, flags=flags)
    device = settings["train.device"].value if "train.device" in settings else "auto"
    default = "blog" if "preset" in settings or _has_gpu(str(device)) else "demo"
    return config_io.load(preset=preset, file=file, sets=sets, flags=flags, default=default)


def _has_gpu(device: str) -> bool:
    if device != "auto":
        return device.startswith("cuda")
    import torch

    return torch.cuda.is_available()


def _data_in_words(loaded: Loaded) -> str:
    data, preset = loaded.config.data, loaded.config.preset
    limit = "" if not data.limit else f", {data.limit} of its images at most (data.limit)"
    if data.train != "textures":
        return f"preset {preset}, data {data.train}{limit}"
    source = (
        "data textures"
        if loaded.origin["data.train"] == "--data"
        else "no --data given, so the embedded textures set"
    )
    return (
        f"preset {preset}, {source}: {data.textures_count} images of {data.textures_size} px, "
        f"seed {data.textures_seed}"
    )


def watch(console: Console, as_json: bool, work: Callable[[Any], Summary]) -> Summary:
    """Return what ``work`` returns.

    If its process can go no further, continue the run in a fresh one.
    """
    from fastbyol.show.screen import display

    try:
        with display(console) as observer:
            return work(observer)
    except NoGraphError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        if worker() is not None:
            raise typer.Exit(1) from None  # torchrun starts all processes afresh
        _start_again("resume", str(error.run), *(["--json"] if as_json else []))


def _start_again(*arguments: str) -> NoReturn:
    """Become a fresh process of the same program with other ``arguments``.

    A child would not do: this way the GPU's memory is free again, and the caller sees the same
    process number, terminal, signals and exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *program_as_typed(), *arguments])


def finish(summary: Summary, console: Console, as_json: bool) -> None:
    """Draw the report of a run that is finished, and print how it ended."""
    from fastbyol.show import figures, run_report

    if not is_first():
        return
    if figures.available() and summary.finished:  # a run that was stopped must end now
        run_report.write(Path(summary.run))
    if as_json:
        print_json(asdict(summary))
        return
    state = summary.state if summary.step else ""  # nothing was watched
    words = ", ".join(filter(None, (f"step {summary.step}", state, summary.accuracies.in_words())))
    console.print(f"{summary.run}: {words}", markup=False, soft_wrap=True)


def resume(
    run: RunPath,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE", help="Where the run's training data lie now, unchanged."
        ),
    ] = None,
    test_data: Annotated[
        str | None,
        typer.Option("--test-data", metavar="FILE", help="Where its test data lie now, unchanged."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Another number of ranks, which rounds otherwise.")
    ] = None,
    log: LogTo = None,
    gpus: Gpus = None,
    processes: Processes = None,
    nnodes: Nodes = None,
    rdzv_endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped, bit for bit."""
    from fastbyol import api
    from fastbyol.runs import inputs
    from fastbyol.runs.folder import CONFIG

    console = training_console(as_json)
    if worker() is None and (run / CONFIG).is_file():
        config = config_io.read_run(run / CONFIG)
        _prepare(inputs.moved(config, data, test_data))
        _start_processes(config, run, gpus, processes, nnodes, rdzv_endpoint, ranks)
    summary = watch(
        console,
        as_json,
        lambda observer: api.resume(
            run, data=data, test_data=test_data, ranks=ranks, log=log, observer=observer
        ),
    )
    finish(summary, console, as_json)


def demo(
    out: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder for data, run and pictures.")
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Compare random, BYOL and supervised encoders; let one network stay collapsed, one recover."""
    from fastbyol import demo as demonstration

    console = make_console(err=as_json)
    try:
        result = demonstration.run(out, seed=seed, console=console)
    except NoGraphError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        _start_again(*sys.argv[1:])  # which continues the run
    if as_json:
        print_json(result)


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or RUN.forks with its forks.")
    ],
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="DIR", help="Write the pictures as PNG files too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw a run in RUN/report.html, or the forks in RUN.forks, in its forks.html."""
    from fastbyol.show import fork_report, run_report

    draw = fork_report.write if fork_report.is_of_forks(run) else run_report.write
    paths = draw(run, png=png)
    if as_json:
        print_json({"written": [str(path) for path in paths]})
    else:
        say(*map(str, paths))
