"""The README's runs and pictures: the demonstration, and group norm with and without BatchNorm in the MLPs.

    python -m fastbyol_bench.first_light bench/results/first_light

trains in a temporary folder and leaves ``results.json``, ``demo.png`` and ``collapse.png``; takes minutes on two cores.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastbyol
from fastbyol import api, demo, figures, report
from fastbyol.display import display

# The post's claims C5 and C4, at the demo preset's size.
ARMS = {"no norm in the MLPs": "none", "BatchNorm in the MLPs": "bn"}


def collapse_runs(folder: Path, console: Console) -> dict[str, dict[str, Any]]:
    """Train both arms on the demonstration's files in ``folder``; returns name -> state, cosines, accuracy, run."""
    results = {}
    for name, norm in ARMS.items():
        sets = [
            "model.norm=gn",
            "optim.name=sgd",
            f"model.projector.norm={norm}",
            f"model.predictor.norm={norm}",
            f"data.train={folder / 'textures-train.beton'}",
            f"data.test={folder / 'textures-test.beton'}",
        ]
        began = time.perf_counter()
        with display(console) as observer:
            summary = api.train(fastbyol.load_config("demo", sets), folder / f"gn-mlp-{norm}", observer=observer)
        results[name] = {
            "state": summary.state,
            "neg_cos": summary.metrics["neg_cos"],
            "pos_cos": summary.metrics["pos_cos"],
            "loss": summary.metrics["loss"],
            "accuracy": summary.accuracy,
            "seconds": time.perf_counter() - began,
            "run": summary.run,
        }
    return results


def draw_demo(story: report.Story, result: dict[str, Any], path: Path) -> None:
    """Cosines and accuracy side by side, with the two encoders that BYOL is measured against."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    report.draw_cosines(left, story)
    report.draw_accuracy(right, story)
    for name, colour in (("random", figures.ORANGE), ("supervised", figures.GREEN)):
        right.axhline(result[name], color=colour, lw=0.9, ls="--")
        right.annotate(name, (0.02, result[name] + 1), xycoords=("axes fraction", "data"), fontsize=8, color=colour)
    finish(figure, path)


def draw_collapse(stories: dict[str, report.Story], path: Path) -> None:
    """Negative cosine and loss of both arms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, story), colour in zip(stories.items(), (figures.RED, figures.BLUE), strict=True):
        left.plot(story.epochs, story.metrics["neg_cos"], color=colour, lw=0.9, label=name)
        right.semilogy(story.epochs, story.metrics["loss"], color=colour, lw=0.9, label=name)
    left.set_ylabel("cosine of z and z', negative pairs")
    right.set_ylabel("loss")
    left.legend(frameon=False, fontsize=8)
    finish(figure, path)


def finish(figure: Any, path: Path) -> None:
    """Common axes dressing, and the file."""
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run everything and write into the folder named on the command line."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, width=140)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = demo.run(folder, console=console)
        arms = collapse_runs(folder, console)
        draw_demo(report.read(folder / "run"), result, out / "demo.png")
        draw_collapse({name: report.read(Path(arm["run"])) for name, arm in arms.items()}, out / "collapse.png")
    machine = {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastbyol": fastbyol.__version__,
    }
    kept = {name: value for name, value in result.items() if name not in ("run", "pictures")}
    arms = {name: {key: value for key, value in arm.items() if key != "run"} for name, arm in arms.items()}
    (out / "results.json").write_text(json.dumps({"machine": machine, "demo": kept, "gn_sgd": arms}, indent=2) + "\n")


if __name__ == "__main__":
    main()
