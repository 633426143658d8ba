"""The demonstration, minutes on two cores:

BYOL learns from images, a network collapses, another recovers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fastbyol import api, config_io
from fastbyol.ablations import plan
from fastbyol.ablations.arms import arm
from fastbyol.config import Config, DataConfig
from fastbyol.config_io import Flag
from fastbyol.data import embedded, loader
from fastbyol.engine.compiling import compile_kernels
from fastbyol.engine.device import fitting_threads
from fastbyol.errors import FastbyolError, UsageError, quoted
from fastbyol.evaluation.collapse import COLLAPSED_ABOVE
from fastbyol.evaluation.intervals import Accuracy, accuracy_text
from fastbyol.evaluation.supervised import RECIPE, supervised_accuracy
from fastbyol.fleet import campaign
from fastbyol.fleet.launch import Launch
from fastbyol.registry.index import list_runs
from fastbyol.runs.folder import CONFIG
from fastbyol.show import figures, run_report
from fastbyol.show.screen import display, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The post's C7 and C6: the same network and optimizer stays collapsed at half the learning rate.
PAIR = ("gn-lars-0.1", "gn-lars-0.2")


def run(out: Path, *, seed: int = 0, console: Console) -> dict[str, Any]:
    """Train or continue the demo preset, and compare encoders under one probe.

    The two runs of ``PAIR`` are trained too. The images are Fashion-MNIST if it is on this machine
    or can be downloaded, else textures. The runs and their pictures are written into ``out``;
    earlier ones stay. Returns the accuracies in percent and the time in seconds.
    """
    began = time.perf_counter()
    _make_folder(out)
    config = config_io.load(
        preset="demo", sets=[f"train.seed={seed}", f"data.train={_images(console)}"]
    ).config
    compile_kernels(config)
    path = _train(out, config, console)
    _print_command(console, f"fastbyol eval {path} --weights random")
    random = api.evaluate(path, config.probe.protocol, weights="random")
    byol = api.evaluate(path, config.probe.protocol)
    _print_command(console, "the same encoder trained with labels")
    ceiling = supervised(config)
    result = {
        "data": config.data.train,
        "random": random["accuracy"],
        "byol": byol["accuracy"],
        "supervised": ceiling.percent,
        "num_scored": {
            "random": random["num_test"],
            "byol": byol["num_test"],
            "supervised": ceiling.num_scored,
        },
        "protocol": config.probe.protocol,
        "run": str(path),
        "pair": _pair(out / "lars", config, console),
        "pictures": [],
    }
    if figures.available():
        result["pictures"] = [
            str(picture) for picture in run_report.write(path, png=out / "pictures")
        ]
        result["pictures"].append(
            str(_draw_pair({name: Path(row["run"]) for name, row in result["pair"].items()}, out))
        )
    result["seconds"] = time.perf_counter() - began
    _print(console, result)
    return result


def _images(console: Console) -> str:
    """Return the name of the built-in set to train on, and print why it is not real images."""
    try:
        embedded.training_file(DataConfig(train=embedded.FASHION))
    except UsageError as error:
        console.print(
            f"{error}; so this is on textures, where no recovery shows",
            markup=False,
            soft_wrap=True,
        )
        return embedded.TEXTURES
    return embedded.FASHION


def _train(out: Path, config: Config, console: Console) -> Path:
    stopped = _unfinished(out, config)
    path = stopped or next(each for each in _candidates(out / "run") if not each.exists())
    command = f"train --preset demo --data {config.data.train} --seed {config.train.seed} --out"
    _print_command(console, f"fastbyol {'resume' if stopped else command} {path}")
    with display(console) as observer:
        summary = (
            api.resume(path, observer=observer)
            if stopped
            else api.train(config, path, observer=observer)
        )
    if not summary.finished:
        raise FastbyolError(
            f"{path}: interrupted at step {summary.step}; go on with: fastbyol resume "
            f"{quoted(path)}"
        )
    return path


def _pair(out: Path, config: Config, console: Console) -> dict[str, dict[str, Any]]:
    """Train or continue the arms of ``PAIR`` side by side. Return each run's folder and its end."""
    out, runs = _pair_runs(out, config)
    _print_command(
        console,
        f"fastbyol ablate run {' '.join(PAIR)} --seeds 1 --data "
        f"{quoted(Path(config.data.train))} --out {quoted(out)}",
    )
    tasks = plan.tasks(runs, out)
    outcome = campaign.execute(
        tasks, out, "mini", asked={"targets": PAIR}, launch=Launch(), console=console
    )
    campaign.refuse_problems(outcome)
    if outcome.interrupted or outcome.stopped:
        raise FastbyolError(f"{out}: interrupted; the same command goes on from here")
    paths = {each.arm.name: each.path for each in runs}
    return {
        name: {"run": str(paths[name]), **_ending(run_report.read(paths[name]))} for name in PAIR
    }


def _pair_runs(out: Path, config: Config) -> tuple[Path, tuple[plan.Run, ...]]:
    """Return the pair's folder and runs: the first of ``out``, ``out-2``, ... without others."""
    flags = {"data.train": Flag("--data", config.data.train)}
    arms, seed = [arm(name) for name in PAIR], config.train.seed
    planned = (
        (at, plan.make(arms, "mini", at, seeds=1, first_seed=seed, flags=flags))
        for at in _candidates(out)
    )
    return next((at, runs) for at, runs in planned if _can_go_on(runs, at))


def _can_go_on(runs: tuple[plan.Run, ...], out: Path) -> bool:
    try:
        plan.tasks(runs, out)
    except UsageError:
        return False
    return True


def _ending(curves: run_report.RunCurves) -> dict[str, Any]:
    last = curves.epoch_events[-1]
    collapsed = next(
        (event["epoch"] + 1 for event in curves.epoch_events if event["state"] == "collapsed"), None
    )
    return {
        "state": last["state"],
        "neg_cos": last["neg_cos"],
        "accuracy": last["accuracy"],
        "num_scored": curves.accuracies.num_scored,
        "collapsed_in_epoch": collapsed,
    }


def supervised(config: Config) -> Accuracy:
    """Return the accuracy of ``config``'s encoder trained with its images' labels."""
    data, size = config.data, config.views.size
    test_file = embedded.held_out_file(data)
    assert test_file is not None
    read = partial(loader.read_all, workers=data.workers, size=size, decoder=data.decoder)
    train = read(embedded.training_file(data), limit=data.limit)
    test = read(test_file, limit=data.test_limit)
    with fitting_threads(config):
        recipe = replace(RECIPE, seed=config.train.seed)
        return supervised_accuracy(config.model, train, test, config.views, recipe=recipe)


def _draw_pair(runs: dict[str, Path], out: Path) -> Path:
    """Draw the distance of negative pairs and the accuracy of each of ``runs``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for (name, path), colour in zip(runs.items(), (figures.RED, figures.BLUE), strict=True):
        curves = run_report.read(path)
        draw_distance(left, curves, colour, name)
        points = [(event["epoch"] + 1, event["accuracy"]) for event in curves.epoch_events]
        right.plot(
            *zip(*((e, a) for e, a in points if a is not None), strict=True),
            color=colour,
            marker="o",
            ms=3,
            label=name,
        )
    right.set_ylim(0, 100)
    right.set_ylabel("linear accuracy, %")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
    path = out / "pictures" / "recovery.png"
    figure.savefig(path, dpi=110)
    return path


def draw_distance(axes: Axes, curves: run_report.RunCurves, colour: str, label: str) -> None:
    """Draw 1 - the cosine of negative pairs over epochs, logarithmic, and the limit of collapse."""
    axes.semilogy(
        curves.epochs,
        (1 - curves.metrics["neg_cos"]).clip(min=1e-8),
        color=colour,
        lw=0.9,
        label=label,
    )
    axes.axhline(1 - COLLAPSED_ABOVE, color="black", lw=0.7, ls=":")
    axes.annotate("collapsed below", (0.99, 1 - COLLAPSED_ABOVE), (0, -9),
    xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=7.5)  # fmt: skip
    axes.set_ylabel("1 - cosine of z and z', negative pairs")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}: name a folder that can be written") from None


def _unfinished(out: Path, config: Config) -> Path | None:
    """Return the stopped run in ``out`` of an earlier demonstration with the same seed, or None."""
    paths = (Path(row.path) for row in list_runs(out) if row.status == "stopped")
    return next((path for path in paths if config_io.read_run(path / CONFIG) == config), None)


def _candidates(path: Path) -> Iterator[Path]:
    """Yield ``path``, ``path-2``, ``path-3`` ..."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in count(2))


def _print_command(console: Console, command: str) -> None:
    console.print(f"$ {command}", style="dim", markup=False, soft_wrap=True)


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table("encoder", "linear accuracy", box=None, title=None)
    table.columns[1].justify = "right"
    for name, key in (("random weights", "random"), ("BYOL", "byol"), ("supervised", "supervised")):
        table.add_row(name, accuracy_text(result[key], result["num_scored"][key]))
    console.print(table)
    ends = Table(
        "LARS without BatchNorm",
        "collapsed in epoch",
        "at the end",
        "negative cosine",
        "accuracy",
        box=None,
    )
    ends.columns[-1].no_wrap = True
    for name, row in result["pair"].items():
        ends.add_row(
            name,
            str(row["collapsed_in_epoch"] or "none"),
            row["state"],
            f"{row['neg_cos']:.4f}",
            accuracy_text(row["accuracy"], row["num_scored"]),
        )
    console.print(ends)
    for picture in result["pictures"]:
        console.print(f"wrote {picture}", markup=False, soft_wrap=True)
    console.print(
        f"on {result['data']}, {duration(result['seconds'])} in all", markup=False, soft_wrap=True
    )
