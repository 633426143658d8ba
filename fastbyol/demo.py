"""The demonstration: images on disk to three linear accuracies, in minutes on two cores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastbyol import api, config_io, figures, report
from fastbyol.config import Config
from fastbyol.data import convert, loader
from fastbyol.display import display, duration
from fastbyol.engine.run_folder import CONFIG, list_runs
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.evaluation.supervised import supervised_accuracy


def run(out: Path, *, seed: int = 0, console: Console) -> dict[str, Any]:
    """Convert the textures set, train with the demo preset or go on with it, and compare encoders under the same probe.

    Writes into ``out``: two beton files, the run folder and the report. What an earlier demonstration left there under
    the same names is replaced. Returns the accuracies in percent and the time taken in seconds.
    """
    began = time.perf_counter()
    _claim(out)
    train_file, test_file = out / "textures-train.beton", out / "textures-test.beton"
    base = config_io.load(preset="demo", sets=[f"train.seed={seed}"]).config
    data = base.data
    for path, count, offset in ((train_file, data.textures_count, 0), (test_file, data.textures_test_count, 1)):
        _say(console, f"fastbyol convert textures {path} --count {count} --size {data.textures_size} --seed {seed + offset}")
        convert.convert("textures", path, count=count, size=data.textures_size, seed=seed + offset, overwrite=True)
    config = base.model_copy(update={"data": data.model_copy(update={"train": str(train_file), "test": str(test_file)})})
    left = _unfinished(out, config)
    path = left or _fresh(out / "run")
    command = f"train --preset demo --data {train_file} --test-data {test_file} --seed {seed} --out"
    _say(console, f"fastbyol {'resume' if left else command} {path}")
    with display(console) as observer:
        summary = api.resume(path, observer=observer) if left else api.train(config, path, observer=observer)
    if not summary.finished:
        raise FastbyolError(f"{path}: interrupted at step {summary.step}; go on with: fastbyol resume {path}")
    _say(console, f"fastbyol eval {path} --weights random")
    random = api.evaluate(path, config.probe.protocol, weights="random")
    byol = api.evaluate(path, config.probe.protocol)
    _say(console, "the same encoder trained with labels")
    supervised = _supervised(config, train_file, test_file)
    pictures = report.write(path, png=out / "pictures") if figures.available() else []
    result = {
        "random": random["accuracy"],
        "byol": byol["accuracy"],
        "supervised": supervised,
        "state": summary.state,
        "neg_cos": summary.metrics["neg_cos"],
        "protocol": config.probe.protocol,
        "run": str(path),
        "pictures": [str(picture) for picture in pictures],
        "seconds": time.perf_counter() - began,
    }
    _print(console, result)
    return result


def _supervised(config: Any, train_file: Path, test_file: Path) -> float:
    size = config.views.size
    train = loader.read_all(train_file, workers=config.data.workers, size=size)
    test = loader.read_all(test_file, workers=config.data.workers, size=size)
    return supervised_accuracy(config.model, train, test, config.views, seed=config.train.seed)


def _claim(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}: name a folder that can be written") from None


def _unfinished(out: Path, config: Config) -> Path | None:
    """The run in ``out`` that an earlier demonstration of the same seed left behind, or None."""
    stopped = (Path(row.path) for row in list_runs(out) if row.status == "stopped")
    return next((path for path in stopped if config_io.read_run(path / CONFIG) == config), None)


def _fresh(path: Path) -> Path:
    """The first of ``path``, ``path-2``, ``path-3`` ... that is not there: an earlier demonstration's run is kept."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _say(console: Console, command: str) -> None:
    console.print(f"$ {command}", style="dim", markup=False, soft_wrap=True)


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table("encoder", "linear accuracy", box=None, title=None)
    table.columns[1].justify = "right"
    for name, key in (("random weights", "random"), ("BYOL", "byol"), ("supervised", "supervised")):
        table.add_row(name, f"{result[key]:.1f}%")
    console.print(table)
    console.print(
        f"BYOL {result['byol'] - result['random']:+.1f} points over random weights; state {result['state']}, "
        f"negative cosine {result['neg_cos']:.3f}; {duration(result['seconds'])} in all",
        markup=False,
        soft_wrap=True,
    )
    for picture in result["pictures"]:
        console.print(f"wrote {picture}", markup=False, soft_wrap=True)
