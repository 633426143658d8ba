"""What a run's weights do to images and gradients, at the checkpoints that it kept.

    python -m fastbyol_bench.science.mechanism RUN... --out FILE.json

In fp64, over the batches that follow each checkpoint: how far images spread after each part of the
network, and the signal and noise of the gradient. Letters: K batches, P elements of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor, nn

from fastbyol import config_io, views
from fastbyol.config import Resolved
from fastbyol.data import beton, decoder, embedded
from fastbyol.data.loader import Batch
from fastbyol.engine import origin
from fastbyol.engine.ranks import Alone
from fastbyol.engine.session import open_batches
from fastbyol.engine.step import TrainState, as_batch, forward
from fastbyol.errors import UsageError
from fastbyol.model.objective import spread
from fastbyol.runs import consistency
from fastbyol.runs.durable import write_text
from fastbyol.runs.folder import CHECKPOINTS, CONFIG
from fastbyol.runs.layers import read_layers
from fastbyol.runs.metrics import read_metrics
from fastbyol_bench.science import KEPT, lines
from fastbyol_bench.science.forks import EARLY, early_stage

# The parts after which the spread is measured, by the names of the online network's modules.
PARTS = {
    "stem": "encoder.bn1", **{f"layer{n}": f"encoder.layer{n}" for n in range(1, 5)},
    "z": "projector", "q": "predictor",
}  # fmt: skip
# Whose gradients are put together. The post's LARS acts on layer1 and layer2 alone in one figure.
STAGES = {
    "early": EARLY,
    "late": ("encoder.layer3", "encoder.layer4"),
    "heads": ("projector", "predictor"),
}
BATCHES = 16
SEEN = KEPT / "mechanism.json"


class Gradient(NamedTuple):
    """Of the gradient of a batch: the norm of its mean, and of its deviation from the mean."""

    signal: float
    noise: float


def look(run: Path, file: Path, batches: int = BATCHES) -> dict[str, Any]:
    """Return what the weights in a checkpoint ``file`` of ``run`` do to the batches that follow.

    ``spread`` by ``PARTS``: of the activations' means over positions, 0 to 1
    (``objective.spread``). ``gradient`` by ``STAGES``: ``Gradient``. Raises UsageError for a
    damaged file.
    """
    state, config = _state(config_io.read_run(run / CONFIG), file)  # which checks the file
    step = consistency.meta_of(file)["step"]
    spreads: dict[str, list[float]] = {name: [] for name in PARTS}
    gradients = []
    with _recorded(state.online, spreads):
        for epoch, batch in islice(_following(config, step), batches):
            gradients.append(_gradient(state, config, batch, epoch))
    return {
        "step": step,
        "spread": {name: math.fsum(values) / len(values) for name, values in spreads.items()},
        "gradient": _by_stage(state, gradients),
    }


def curves(run: Path) -> list[dict[str, Any]]:
    """Return what a run recorded itself, a row an epoch.

    ``growth`` is the slope per step of log std_z over the epoch's steps, by least squares.
    ``early_rate`` and ``early_move`` are means over the weights of the early stage and over steps:
    of the rate, and of rate |g| / |w|, how far a step without momentum moves a weight.
    """
    steps, events = read_metrics(run)
    layers = read_layers(run)
    norms, weights = early_stage(layers)
    move = norms["rate"] * norms["grad_norm"] / np.where(weights, norms["weight_norm"], 1.0)
    rows = []
    for event in (event for event in events if event["event"] == "epoch"):
        own = [row["std_z"] for row in steps if row["epoch"] == event["epoch"]]
        first = event["step"] - len(own)
        at = (layers.steps >= first) & (layers.steps < event["step"])
        rows.append(
            {
                "step": event["step"], "state": event["state"],
                "neg_cos": event["neg_cos"], "std_z": event["std_z"],
                "growth": float(np.polyfit(range(len(own)), np.log(own), 1)[0]),
                "early_rate": float(norms["rate"][at][weights[at]].mean()),
                "early_move": float(move[at][weights[at]].mean()),
            }
        )  # fmt: skip
    return rows


def signal_and_noise(gradients: Tensor) -> Gradient:
    """Return unbiased estimates from ``gradients`` (K, P) of independent batches, K >= 2.

    noise^2 = sum |g_k - m|^2 / (K - 1) and signal^2 = |m|^2 - noise^2 / K with the mean m, 0 where
    that is negative. Source: McCandlish et al., arXiv:1812.06162, appendix A.1.
    """
    mean = gradients.mean(0)
    noise = (gradients - mean).square().sum() / (len(gradients) - 1)
    signal = mean.square().sum() - noise / len(gradients)
    return Gradient(float(signal.clamp(min=0.0).sqrt()), float(noise.sqrt()))


def _state(config: Resolved, file: Path) -> tuple[TrainState, Resolved]:
    """Return the weights in ``file`` in fp64: a collapsed network's gradients are all rounding."""
    train = config.train.model_copy(update={"precision": "fp64", "device": "cpu"})
    engine = config.engine.model_copy(update={"kernels": "reference"})
    exact = config.model_copy(update={"train": train, "engine": engine})
    state = TrainState.create(exact, steps_per_epoch=1)
    origin.copy_weights(state, file)
    return state, exact


def _following(config: Resolved, step: int) -> Iterator[tuple[int, Batch]]:
    """Yield the batches from ``step`` to the end of the next epoch, each with its epoch."""
    file = beton.inspect(
        embedded.training_file(config.data),
        image_field=config.data.image_field,
        label_field=config.data.label_field,
        may_lack_labels=True,
    )
    how = decoder.choose(config.data.decoder)
    with open_batches(config, file, how, "none", torch.device("cpu"), Alone()) as loader:
        epoch, first = divmod(step, loader.steps_per_epoch)
        yield from ((epoch, batch) for batch in loader.epoch(epoch, start_step=first))
        yield from ((epoch + 1, batch) for batch in loader.epoch(epoch + 1))


def _gradient(state: TrainState, config: Resolved, batch: Batch, epoch: int) -> Tensor:
    """Return the loss's gradient on ``batch``, as flat as the arena."""
    pair = views.two_views(
        config.views, batch.images, batch.ids, rows=batch.rows, seed=config.train.seed,
        epoch=epoch, dtype=torch.float64,
    )  # fmt: skip
    inputs = as_batch(pair, torch.float64)
    with state.weights.in_use(len(inputs)) as leaves:
        loss, *_ = forward(state.online, state.target, inputs, state.recipe.objective, state.queue)
    state.weights.differentiate(loss, leaves)
    return state.arena.gradient.clone()


def _by_stage(state: TrainState, gradients: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    split = [state.arena.table.split(gradient) for gradient in gradients]
    return {
        stage: signal_and_noise(
            torch.stack(
                [
                    torch.cat(
                        [
                            part
                            for name, part in zip(state.segment_names, parts, strict=True)
                            if name.startswith(prefixes)
                        ]
                    )
                    for parts in split
                ]
            )
        )._asdict()
        for stage, prefixes in STAGES.items()
    }


@contextmanager
def _recorded(online: nn.Module, spreads: dict[str, list[float]]) -> Iterator[None]:
    """Append the spread after each of ``PARTS`` at every forward pass inside."""

    def record(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        flat = output.detach().mean((2, 3)) if output.ndim == 4 else output.detach()
        spreads[name].append(float(spread(flat)))

    hooks = [
        online.get_submodule(path).register_forward_hook(partial(record, name))
        for name, path in PARTS.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    out: Annotated[Path, typer.Option(metavar="FILE.json")],
    batches: Annotated[int, typer.Option(min=2)] = BATCHES,
) -> None:
    """Look at every checkpoint that the runs kept, and write what was seen."""
    torch.set_num_threads(1)
    seen = []
    for run in runs:
        files = sorted((run / CHECKPOINTS).glob("ckpt-*.safetensors"))
        if not files:
            raise UsageError(f"{run}: no checkpoint: train with run.keep_checkpoints")
        config = config_io.read_run(run / CONFIG)
        about = {"data": config.data.train, "lr": config.optim.lr, "seed": config.train.seed}
        looks = [look(run, file, batches) for file in files]
        seen.append(about | {"curves": curves(run), "looks": looks})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, lines(seen))


if __name__ == "__main__":
    typer.run(main)
