"""Many futures of a collapsed network: is it LARS's high rate, or its dependence on the gradient?

    python -m fastbyol_bench.science.forks train FOLDER      # fork the runs in FOLDER/parents
    python -m fastbyol_bench.science.forks collect FOLDER    # write results/science/forks.json

The parents are the appendix's run of LARS at .2 on Fashion-MNIST, a seed each:

    fastbyol ablate run gn-lars-0.2 --seeds 7 --out FOLDER/parents --set probe.every_epochs=0
      --set train.epochs=16 --set run.layers_every_steps=1 --set run.keep_checkpoints=20

The first five seeds that collapse are forked, each at two moments: at its deepest collapse, where
an epoch's negative cosine is highest, and at the end of the first epoch that is collapsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from fastbyol import api, config_io
from fastbyol.config import IN_COLLAPSE
from fastbyol.errors import FastbyolError
from fastbyol.runs.durable import write_text
from fastbyol.runs.folder import CONFIG
from fastbyol.runs.layers import Layers, read_layers
from fastbyol.runs.metrics import is_finished, read_events, read_metrics
from fastbyol_bench.science import KEPT, lines

ROWS = KEPT / "forks.json"
# SGD's learning rate and decay in the appendix's arm gn-sgd-mlp-none at batches of 32.
SGD = {"optim.name": "sgd", "optim.lr": 0.1, "optim.weight_decay": 1e-4}
EARLY = ("encoder.layer1", "encoder.layer2")
# What each future changes. The first is the parent itself, since an unchanged fork has its bytes.
# The two that need recorded rates are made in ``changes``.
FUTURES: Mapping[str, Mapping[str, Any]] = {
    "lars": {},
    "sgd-mean-rates": {},
    "replayed": {},
    "capped": {"optim.rate_cap": 0.8},
    "sgd-x10": {**SGD, "optim.lr_mult": [[layer, 10.0] for layer in EARLY]},
    "early-only": {"optim.lars_on": list(EARLY)},
}
PARENTS = 5
MOMENTS = ("deepest", "first")


def parents(folder: Path) -> list[Path]:
    """Return the first runs that collapse, by seed, ``PARENTS`` at most.

    Raises FastbyolError for none, and for one that is not finished.
    """
    runs = sorted((folder / "parents/runs/gn-lars-0.2").glob("seed*"))
    for run in runs:
        if not is_finished(read_events(run), config_io.read_run(run / CONFIG).train.epochs):
            raise FastbyolError(f"{run}: is not finished: see the head of {__name__}")
    collapsed = [run for run in runs if _is_collapsed(run, moment_of(run, "deepest"))]
    if not collapsed:
        raise FastbyolError(f"{folder}: no parents: see the head of {__name__}")
    return collapsed[:PARENTS]


def _is_collapsed(run: Path, step: int) -> bool:
    ended = (event for event in read_events(run) if event["event"] == "epoch")
    return any(event["step"] == step and event["state"] in IN_COLLAPSE for event in ended)


def moment_of(run: Path, moment: str) -> int:
    """Return the step at which ``run`` is forked, the end of an epoch, for one of ``MOMENTS``."""
    epochs = [event for event in read_events(run) if event["event"] == "epoch"]
    if moment == "deepest":
        return int(max(epochs, key=lambda event: event["neg_cos"])["step"])
    return next(int(event["step"]) for event in epochs if event["state"] in IN_COLLAPSE)


def left_at(run: Path, after: int) -> int | None:
    """Return the first step from ``after`` on at which the run had left its collapse, or None."""
    return next(
        (
            int(event["step"])
            for event in read_events(run)
            if event["event"] == "state" and event["step"] > after
            and event["before"] == "collapsed" and event["after"] == "recovering"
        ),
        None,
    )  # fmt: skip


def mean_rates(run: Path, first: int, end: int) -> dict[str, float]:
    """Return each parameter's mean recorded rate over the steps ``first`` to ``end``, by name."""
    layers = read_layers(run)
    within = (layers.steps >= first) & (layers.steps < end)
    rates = layers.values[within, :, layers.metrics.index("rate")]
    return dict(zip(layers.names, rates.astype(np.float64).mean(0).tolist(), strict=True))


def early_stage(
    layers: Layers,
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
    """Return what was recorded of layer1 and layer2, by name (rows, tensors), and the weights.

    The latter is a mask of the same shape. Biases start at zero, where LARS leaves them.
    """
    early = [n for n, name in enumerate(layers.names) if name.startswith(EARLY)]
    norms = {name: layers.values[:, early, n] for n, name in enumerate(layers.metrics)}
    return norms, norms["weight_norm"] > 0


def changes(name: str, run: Path, step: int, runs: list[Path]) -> dict[str, Any]:
    """Return the settings of the future ``name`` of ``run``, one of ``runs``, from ``step`` on.

    Mean rates are those of the same run, from the fork to where it leaves the collapse or ends. The
    replayed ones are the next seed's, at the same steps.
    """
    settings = dict(FUTURES[name])
    if name == "replayed":
        other = runs[(runs.index(run) + 1) % len(runs)]
        settings["optim.replay_rates"] = str(other.resolve())
    if name == "sgd-mean-rates":
        end = left_at(run, step) or len(read_metrics(run)[0])
        rates = mean_rates(run, step, end)
        # The weight decay stays LARS's: the rate alone is in question.
        settings |= {"optim.name": "sgd", "optim.lr": 1.0, "optim.lr_mult": list(rates.items())}
    return settings


class Job(NamedTuple):
    """A future to be trained: its name, its parent, one of ``runs``, the step, and its folder."""

    name: str
    run: Path
    step: int
    out: Path
    runs: list[Path]


def work(job: Job) -> str:
    """Train one future; return its folder."""
    made = changes(job.name, job.run, job.step, job.runs)
    sets = [f"{key}={config_io.toml_value(value)}" for key, value in made.items()]
    return api.fork(job.run, job.step, sets, out=job.out).run


def jobs(folder: Path, moment: str) -> Iterator[Job]:
    """Yield every future of every parent at ``moment``, a first parent's futures first.

    That of LARS has no folder of its own: it is the parent.
    """
    runs = parents(folder)
    for run in runs:
        step = moment_of(run, moment)
        for name in FUTURES:
            out = run if name == "lars" else folder / "futures" / name / f"{run.name}@{step}"
            yield Job(name, run, step, out, runs)


def measured(run: Path, step: int) -> dict[str, Any]:
    """Return what became of a run since ``step``: states, negative cosines, the early rates."""
    epochs = [event for event in read_events(run) if event["event"] == "epoch"]
    layers = read_layers(run)
    norms, weights = early_stage(layers)
    rows = layers.steps // epochs[0]["step"]
    return {
        "state": epochs[-1]["state"],
        "left_at": left_at(run, step),
        "steps": epochs[-1]["step"],
        "accuracy": epochs[-1].get("accuracy"),
        "neg_cos": [event["neg_cos"] for event in epochs],
        "loss": [event["loss"] for event in epochs],
        "early_rate": [
            float(f"{norms['rate'][at][weights[at]].mean():.5g}")
            for event in epochs
            for at in [rows == event["epoch"]]
        ],
    }


app = typer.Typer(add_completion=False, help=__doc__)
Folder = Annotated[Path, typer.Argument(metavar="FOLDER")]


@app.command()
def train(folder: Folder, processes: Annotated[int, typer.Option(min=1)] = 2) -> None:
    """Train all futures that FOLDER lacks."""
    every = (job for moment in MOMENTS for job in jobs(folder, moment) if job.out != job.run)
    todo = {job.out: job for job in every}  # a run's two moments may be one
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    with pool:
        for out in pool.map(work, todo.values()):
            typer.echo(out)


@app.command()
def collect(folder: Folder) -> None:
    """Write what became of every future."""
    rows = [
        {"future": job.name, "parent": job.run.name, "moment": moment, "step": job.step}
        | measured(job.out, job.step)
        for moment in MOMENTS
        for job in jobs(folder, moment)
        if (job.out / CONFIG).exists()
    ]
    KEPT.mkdir(parents=True, exist_ok=True)
    write_text(ROWS, lines(rows))


if __name__ == "__main__":
    app()
