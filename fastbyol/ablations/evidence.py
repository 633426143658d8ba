"""One run as curves over its epochs, for verdicts and for pictures.

Ours and the post's look the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fastbyol.config import Config
from fastbyol.errors import UsageError, check_choice
from fastbyol.optim.lars import rate_ceiling
from fastbyol.runs.layers import Layers, read_layers
from fastbyol.runs.metrics import is_finished

Scale = Literal["published", "full", "short", "long", "mini"]
MEASURES = (
    "loss",
    "pos_cos",
    "neg_cos",
    "std_z",
    "std_y",
    "grad_norm",
    "lr",
    "accuracy",
    "rank_y",
    "dead_y",
)
# The layers whose gradients decide LARS's feedback: the post's rates that explode are layer1's and
# layer2's.
EARLY = ("encoder.conv1", "encoder.layer1")
PUBLISHED_STEPS_PER_EPOCH = 410  # 105,000 images in whole batches of 256
# How many images an accuracy was scored on where a run does not say: rows 3968..7935 of STL-10's
# test split at full scale, half of the 2,048 that the smaller scales hold out.
PUBLISHED_SCORED, SMALL_SCORED = 3968, 1024


@dataclass(frozen=True, eq=False)
class Evidence:
    """The curves of one run, over E finished epochs and T steps with per-layer measures.

    ``epoch`` float64 (E,) counts from 0. Each of ``MEASURES`` is float64 (E,): the mean over an
    epoch (accuracy and rank_y: the value at its end), NaN where not measured. ``rate_step`` int64
    (T,); ``matrix_rates`` float32 (T,) by weight matrix or kernel; ``rates`` float64 (T,): their
    means by layer group, e.g. ``encoder.layer1``. ``early_gradient_norm`` float64 (T,): the norm of
    the gradient of all parameters of ``EARLY``. ``epochs`` is the length that the run is to have,
    ``finished`` says that it has it. ``rate_ceiling``: lr * eta / wd at the configured lr, which no
    rate of the blog's LARS can exceed; None elsewhere. ``untrained_accuracy`` in percent is that of
    the run's own weights before the first step, NaN if unknown. ``num_scored`` images give an
    accuracy, None if the run does not say. ``warmup_steps``: how long the learning rate rises
    linearly from 0.
    """

    arm: str
    seed: int
    scale: Scale
    epochs: int
    steps_per_epoch: int
    finished: bool
    epoch: np.ndarray
    loss: np.ndarray
    pos_cos: np.ndarray
    neg_cos: np.ndarray
    std_z: np.ndarray
    std_y: np.ndarray
    grad_norm: np.ndarray
    lr: np.ndarray
    accuracy: np.ndarray
    rank_y: np.ndarray
    dead_y: np.ndarray
    rate_step: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    rates: Mapping[str, np.ndarray] = field(default_factory=dict)
    matrix_rates: Mapping[str, np.ndarray] = field(default_factory=dict)
    early_gradient_norm: np.ndarray = field(default_factory=lambda: np.empty(0))
    rate_ceiling: float | None = None
    untrained_accuracy: float = math.nan
    num_scored: int | None = None
    warmup_steps: int = 0

    @classmethod
    def of_run(
        cls,
        path: Path,
        config: Config,
        events: Sequence[Mapping[str, Any]],
        *,
        arm: str,
        seed: int,
        scale: Scale,
    ) -> Evidence:
        """Make the evidence of the run in ``path`` from its ``events`` and its layers.

        The layers are read here. Raises UsageError: no epoch of the run has ended.
        """
        check_choice("scale", scale, get_args(Scale))
        rows = [event for event in events if event["event"] == "epoch"]
        if not rows:
            raise UsageError(f"{path}: no epoch has ended yet")
        layers = read_layers(path)
        matrix_rates = _matrix_rates(layers)
        steps_per_epoch = rows[0]["step"] // (rows[0]["epoch"] + 1)
        untrained = next((event for event in events if event["event"] == "untrained"), {})
        return cls(
            arm=arm,
            seed=seed,
            scale=scale,
            epochs=config.train.epochs,
            steps_per_epoch=steps_per_epoch,
            finished=is_finished(events, config.train.epochs),
            epoch=np.array([row["epoch"] for row in rows], dtype=np.float64),
            **{name: _column(rows, name) for name in MEASURES},
            rate_step=np.asarray(layers.steps),
            rates=_rates(matrix_rates),
            matrix_rates=matrix_rates,
            early_gradient_norm=_early_gradient_norm(layers),
            rate_ceiling=rate_ceiling(config.optim),
            untrained_accuracy=untrained.get("accuracy", math.nan),
            num_scored=untrained.get("num_scored"),
            warmup_steps=int(config.schedule.warmup_epochs * steps_per_epoch),
        )

    @property
    def steps(self) -> int:
        """The steps that finished epochs have taken."""
        return (int(self.epoch[-1]) + 1) * self.steps_per_epoch

    @property
    def scored(self) -> int:
        """``num_scored``, or what the scale has if the run does not say."""
        return self.num_scored or (
            PUBLISHED_SCORED if self.scale in ("published", "full") else SMALL_SCORED
        )

    @property
    def last_accuracy(self) -> float:
        """The newest accuracy in percent; NaN if none was measured."""
        measured = self.accuracy[np.isfinite(self.accuracy)]
        return float(measured[-1]) if len(measured) else math.nan

    def rate_by_epoch(self, group: str) -> np.ndarray:
        """Return the mean rate of ``group`` by epoch, float64 (E,), NaN where none is recorded."""
        return (
            self._by_epoch(self.rates[group])
            if group in self.rates
            else np.full(len(self.epoch), np.nan)
        )

    def rise_by_epoch(self, group: str) -> np.ndarray:
        """Return the mean rate of ``group`` by epoch over its first that is not 0, float64 (E,).

        The warm-up of the learning rate is divided out.
        """
        if group not in self.rates:
            return np.full(len(self.epoch), np.nan)
        warmed = (
            np.minimum(1.0, self.rate_step / self.warmup_steps)
            if self.warmup_steps
            else np.ones(len(self.rate_step))
        )
        rates = np.divide(self.rates[group], warmed, out=np.zeros(len(warmed)), where=warmed > 0)
        positive = rates[rates > 0]
        return self._by_epoch(rates / positive[0]) if len(positive) else np.ones(len(self.epoch))

    def ceiling_share(self, group: str) -> np.ndarray:
        """Return the share of its epoch's ceiling that the rate of ``group`` reached, float64 (E,).

        The ceiling falls as the lr does. NaN where there is no ceiling or no rate.
        """
        if self.rate_ceiling is None:
            return np.full(len(self.epoch), np.nan)
        return np.asarray(
            self.rate_by_epoch(group) / (self.rate_ceiling * self.lr / np.nanmax(self.lr))
        )

    def early_gradient_by_epoch(self) -> np.ndarray:
        """Return the mean ``early_gradient_norm`` in each epoch, float64 (E,)."""
        return self._by_epoch(self.early_gradient_norm)

    def _by_epoch(self, values: np.ndarray) -> np.ndarray:
        epochs = self.rate_step // self.steps_per_epoch
        return np.array([_mean(values[epochs == epoch]) for epoch in self.epoch])


def group_of(name: str) -> str:
    """Return the layer group of a parameter:

    ``encoder.layer1`` of ``encoder.layer1.0.conv1.weight``.
    """
    return ".".join(name.split(".")[:2])


def is_matrix(name: str) -> bool:
    """Return whether a parameter is a weight matrix or a convolution's kernel."""
    module = name.split(".")[-2]
    return name.endswith(".weight") and (
        module.startswith(("conv", "linear")) or name.endswith("downsample.0.weight")
    )


def _matrix_rates(layers: Layers) -> dict[str, np.ndarray]:
    rate = layers.metrics.index("rate")
    return {
        name: layers.values[:, index, rate].copy()
        for index, name in enumerate(layers.names)
        if is_matrix(name)
    }


def _rates(matrix_rates: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    groups: dict[str, list[np.ndarray]] = {}
    for name, rates in matrix_rates.items():
        groups.setdefault(group_of(name), []).append(rates.astype(np.float64))
    return {group: np.stack(rates, axis=1).mean(axis=1) for group, rates in groups.items()}


def _early_gradient_norm(layers: Layers) -> np.ndarray:
    members = [index for index, name in enumerate(layers.names) if group_of(name) in EARLY]
    norms = np.asarray(
        layers.values[:, members, layers.metrics.index("grad_norm")], dtype=np.float64
    )
    return np.asarray(np.sqrt(np.square(norms).sum(axis=1)))


def _column(rows: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
    values = [row.get(name) for row in rows]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    measured = values[np.isfinite(values)]
    return float(measured.mean()) if len(measured) else float("nan")
