"""One run as curves over its epochs: what a verdict looks at and what a report draws. Ours and the post's look the same.

Letters: E finished epochs, T steps with per-layer measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fastbyol.ablations.claims import Claim
from fastbyol.ablations.curves import appendix, published
from fastbyol.errors import UsageError, check_choice
from fastbyol.optim.lars import rate_ceiling
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.layers import Layers, read_layers
from fastbyol.runs.metrics import read_events

Scale = Literal["published", "full", "short", "long", "mini"]
MEASURES = ("loss", "pos_cos", "neg_cos", "std_z", "std_y", "grad_norm", "lr", "accuracy", "rank_y", "dead_y")
# The layers whose gradients decide LARS's feedback: the post's rates that explode are layer1's and layer2's.
EARLY = ("encoder.conv1", "encoder.layer1")
PUBLISHED_EPOCHS = int(appendix()["setting"]["epochs"])
PUBLISHED_STEPS_PER_EPOCH = 410  # 105,000 images in whole batches of 256
# How many images an accuracy was scored on where a run does not say: rows 3968..7935 of STL-10's test split at full scale, half
# of the 2,048 that the smaller scales hold out.
PUBLISHED_SCORED, SMALL_SCORED = 3968, 1024


@dataclass(frozen=True, eq=False)
class Evidence:
    """A run's curves.

    ``epoch`` float64 (E,) counted from 0; each of ``MEASURES`` float64 (E,), means over an epoch (accuracy and rank_y: at its
    end), NaN where not measured. ``rate_step`` int64 (T,), ``rates`` by layer group float64 (T,): the mean over the weight
    matrices and kernels of the group, e.g. ``encoder.layer1``. ``early_gradient_norm`` float64 (T,): the norm of the gradient
    of all parameters of ``EARLY``. ``epochs`` is how long the run is to be, ``finished`` whether it got there.
    ``rate_ceiling``: lr * eta / wd at the configured lr, which no rate of the blog's LARS can exceed; None elsewhere.
    ``untrained_accuracy`` in percent: of the run's own weights before the first step, NaN where unknown. ``num_scored``: how
    many images its accuracies were scored on, None where the run does not say. ``warmup_steps``: how long the learning rate
    rises linearly from 0.
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
    early_gradient_norm: np.ndarray = field(default_factory=lambda: np.empty(0))
    rate_ceiling: float | None = None
    untrained_accuracy: float = math.nan
    num_scored: int | None = None
    warmup_steps: int = 0

    @classmethod
    def of_run(cls, path: Path, *, arm: str, seed: int, scale: Scale = "mini") -> Evidence:
        """Read the run folder ``path``, finished or not. Raises UsageError: no run, or no epoch of it has ended."""
        check_choice("scale", scale, get_args(Scale))
        with RunFolder.open(path, lock=False) as folder:
            config = folder.config
        events = read_events(path)
        rows = [event for event in events if event["event"] == "epoch"]
        if not rows:
            raise UsageError(f"{path}: no epoch has ended: go on with `fastbyol resume {path}`")
        layers = read_layers(path)
        steps_per_epoch = rows[0]["step"] // (rows[0]["epoch"] + 1)
        untrained = next((event for event in events if event["event"] == "untrained"), {})
        return cls(
            arm=arm,
            seed=seed,
            scale=scale,
            epochs=config.train.epochs,
            steps_per_epoch=steps_per_epoch,
            finished=rows[-1]["epoch"] + 1 >= config.train.epochs,
            epoch=np.array([row["epoch"] for row in rows], dtype=np.float64),
            **{name: _column(rows, name) for name in MEASURES},
            rate_step=np.asarray(layers.steps),
            rates=_rates(layers),
            early_gradient_norm=_early_gradient_norm(layers),
            rate_ceiling=rate_ceiling(config.optim),
            untrained_accuracy=untrained.get("accuracy", math.nan),
            num_scored=untrained.get("num_scored"),
            warmup_steps=int(config.schedule.warmup_epochs * steps_per_epoch),
        )

    @classmethod
    def of_published(cls, claim: Claim) -> dict[str, tuple[Evidence, ...]]:
        """The post's runs of ``claim`` by arm, one each: from the curves of its figures, and for its table from the numbers.

        Empty for the claim that comes with neither.
        """
        if claim.id == "M1":
            return _of_table(claim.numbers)
        arms = dict.fromkeys(source.arm for source in claim.sources)
        return {arm: (_of_curves(arm, claim),) for arm in arms}

    @property
    def steps(self) -> int:
        """Steps that its epochs have taken so far."""
        return (int(self.epoch[-1]) + 1) * self.steps_per_epoch

    @property
    def scored(self) -> int:
        """``num_scored``, and where the run does not say, what its scale has."""
        return self.num_scored or (PUBLISHED_SCORED if self.scale in ("published", "full") else SMALL_SCORED)

    @property
    def last_accuracy(self) -> float:
        """The newest accuracy in percent; NaN where none was measured."""
        known = self.accuracy[np.isfinite(self.accuracy)]
        return float(known[-1]) if len(known) else math.nan

    def rate_by_epoch(self, group: str) -> np.ndarray:
        """Mean rate of ``group`` in each epoch, float64 (E,), NaN where it was not recorded."""
        return self._by_epoch(self.rates[group]) if group in self.rates else np.full(len(self.epoch), np.nan)

    def rise_by_epoch(self, group: str) -> np.ndarray:
        """Mean rate of ``group`` in each epoch over its first one that is not 0, float64 (E,); the warm-up's part taken out."""
        if group not in self.rates:
            return np.full(len(self.epoch), np.nan)
        warmed = np.minimum(1.0, self.rate_step / self.warmup_steps) if self.warmup_steps else np.ones(len(self.rate_step))
        rates = np.divide(self.rates[group], warmed, out=np.zeros(len(warmed)), where=warmed > 0)
        positive = rates[rates > 0]
        return self._by_epoch(rates / positive[0]) if len(positive) else np.ones(len(self.epoch))

    def ceiling_share(self, group: str) -> np.ndarray:
        """Share of the ceiling of its epoch that the rate of ``group`` reached, float64 (E,): the ceiling falls as the lr does.

        NaN where there is no ceiling or no rate.
        """
        if self.rate_ceiling is None:
            return np.full(len(self.epoch), np.nan)
        return np.asarray(self.rate_by_epoch(group) / (self.rate_ceiling * self.lr / np.nanmax(self.lr)))

    def early_gradient_by_epoch(self) -> np.ndarray:
        """Mean ``early_gradient_norm`` in each epoch, float64 (E,)."""
        return self._by_epoch(self.early_gradient_norm)

    def _by_epoch(self, values: np.ndarray) -> np.ndarray:
        places = self.rate_step // self.steps_per_epoch
        found = {int(place): values[places == place] for place in np.unique(places)}
        return np.array([_mean(found.get(int(epoch), np.empty(0))) for epoch in self.epoch])


def group_of(name: str) -> str:
    """The layer group of a parameter: ``encoder.layer1.0.conv1.weight`` is of ``encoder.layer1``."""
    return ".".join(name.split(".")[:2])


def is_matrix(name: str) -> bool:
    """Whether a parameter is a weight matrix or a convolution's kernel."""
    module = name.split(".")[-2]
    return name.endswith(".weight") and (module.startswith(("conv", "linear")) or name.endswith("downsample.0.weight"))


def _rates(layers: Layers) -> dict[str, np.ndarray]:
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(layers.names):
        if is_matrix(name):
            groups.setdefault(group_of(name), []).append(index)
    rates = np.asarray(layers.values[:, :, layers.metrics.index("rate")], dtype=np.float64)
    return {group: rates[:, members].mean(axis=1) for group, members in groups.items()}


def _early_gradient_norm(layers: Layers) -> np.ndarray:
    members = [index for index, name in enumerate(layers.names) if group_of(name) in EARLY]
    norms = np.asarray(layers.values[:, members, layers.metrics.index("grad_norm")], dtype=np.float64)
    return np.asarray(np.sqrt(np.square(norms).sum(axis=1)))


def _column(rows: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
    values = [row.get(name) for row in rows]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _of_curves(arm: str, claim: Claim) -> Evidence:
    """Points of the figures on one axis of whole epochs; what was hidden in one of them is NaN."""
    curves = {source.measure: published()[source.figure, source.series] for source in claim.sources if source.arm == arm}
    last = int(max(curve.epoch[-1] for curve in curves.values()))
    epoch = np.arange(last + 1, dtype=np.float64)
    columns = {}
    for measure, curve in curves.items():
        columns[measure] = np.full(len(epoch), np.nan)
        columns[measure][np.rint(curve.epoch).astype(int)] = curve.value
    if "accuracy" not in columns and "accuracy@320" in claim.numbers:
        columns["accuracy"] = np.append(np.full(last, np.nan), claim.numbers["accuracy@320"])
    return _published(arm, PUBLISHED_EPOCHS, epoch, columns)


# What the table calls its rows.
_TABLE = {
    "bn-sgd-mlp-bn": "mlp_bn",
    "bn-sgd-projector-bn": "projector_bn",
    "bn-sgd-predictor-bn": "predictor_bn",
    "bn-sgd-mlp-none": "none",
    "bn-sgd-mlp-ln": "ln",
    "random": "random",
    "bn-sgd-contrastive": "contrastive",
}


def _of_table(numbers: Mapping[str, Any]) -> dict[str, tuple[Evidence, ...]]:
    """Runs of ten epochs of which the end is known."""
    cosines = {"bn-sgd-mlp-bn": numbers["positive_negative_cosine_mlp_bn"]}
    cosines |= dict.fromkeys(("bn-sgd-mlp-none", "bn-sgd-mlp-ln"), numbers["positive_negative_cosine_none_and_ln"])
    found: dict[str, tuple[Evidence, ...]] = {}
    for arm, row in _TABLE.items():
        columns = {"accuracy": np.array([numbers[row]])}
        if arm in cosines:
            columns |= {name: np.array([value]) for name, value in zip(("pos_cos", "neg_cos"), cosines[arm], strict=True)}
        found[arm] = (_published(arm, 10, np.array([9.0]), columns),)
    return found


def _published(arm: str, epochs: int, epoch: np.ndarray, columns: Mapping[str, np.ndarray]) -> Evidence:
    nothing = np.full(len(epoch), np.nan)
    return Evidence(
        arm=arm,
        seed=0,
        scale="published",
        epochs=epochs,
        steps_per_epoch=PUBLISHED_STEPS_PER_EPOCH,
        finished=True,
        epoch=epoch,
        **{name: columns.get(name, nothing) for name in MEASURES},
        rate_step=(epoch * PUBLISHED_STEPS_PER_EPOCH).astype(np.int64),
        rates={name.removeprefix("rate:"): values for name, values in columns.items() if name.startswith("rate:")},
        early_gradient_norm=nothing,
        rate_ceiling=None,
        untrained_accuracy=math.nan,
        num_scored=PUBLISHED_SCORED,
        warmup_steps=0,
    )
