"""The dialects of LARS in numbers: each one's step, and its highest rate.

All steps start from the same weights and gradients. Every number comes from
``fastbyol_kernels.lars_ema``: ``reference`` steps on example vectors, and ``trust_ratio`` is
applied to the norms that a run recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from fastbyol.ablations.curves import appendix, published
from fastbyol.config import OptimConfig
from fastbyol.errors import UsageError, check_choice, quoted
from fastbyol.model.byol import Online
from fastbyol.optim.lars import Treatment, rate_ceiling, rule_of, treatments
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.layers import Layers, read_layers
from fastbyol.runs.metrics import read_metrics
from fastbyol_kernels.lars_ema import BOLTS_EPS, RULES, Rule, SegmentTable, reference, trust_ratio

DIALECTS: tuple[Rule, ...] = ("blog", "deepmind", "bolts")
FORMULAS: dict[Rule, tuple[str, ...]] = {
    "sgd": ("trust = 1", "m <- mu m + (g + wd w)", "w <- w - lr m"),
    "blog": (
        "trust = eta |w| / (|g| + wd |w|); 0 where the sum is 0",
        "m <- mu m + lr trust (g + wd w)",
        "w <- w - m",
    ),
    "deepmind": (
        "trust = eta |w| / |g + wd w|; 1 where either norm is 0",
        "m <- mu m + trust (g + wd w)",
        "w <- w - lr m",
    ),
    "bolts": (
        f"trust = eta |w| / (|g| + wd |w| + {BOLTS_EPS:g}); 1, no decay, where |w| or |g| is 0",
        "m <- mu m + trust (g + wd w)",
        "w <- w - lr m",
    ),
}
# The columns of ``reference``'s result.
COLUMNS = ("weight_norm", "grad_norm", "trust_ratio", "rate", "update_norm")
# The weight decays that the post and its code mention, for the argument from the published peak.
DECAYS = {
    "byol section 3.3": 1.5e-6,
    "the post's section on weight decay": 1e-5,
    "the post's code": 1e-4,
}


class Example(NamedTuple):
    """A weight vector and its gradient. The gradient None stands for ``-wd w``."""

    name: str
    weight: tuple[float, float]
    gradient: tuple[float, float] | None


# Gradients are perpendicular to w, as before a norm layer, where the loss does not depend on the
# scale of w. 4 times any wd is exact, so ``-wd w`` cancels the decay to the last bit.
EXAMPLES = (
    Example("gradient .05", (0.0, 4.0), (0.05, 0.0)),
    Example("gradient 5e-5, collapsing", (0.0, 4.0), (5e-5, 0.0)),
    Example("gradient 5e-9, collapsed", (0.0, 4.0), (5e-9, 0.0)),
    Example("gradient -wd w: no net pull", (0.0, 4.0), None),
    Example("gradient 0", (0.0, 4.0), (0.0, 0.0)),
    Example("weight 0, a norm's bias at first", (0.0, 0.0), (0.05, 0.0)),
    Example("both 0", (0.0, 0.0), (0.0, 0.0)),
)


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Return the rules named in ``blog,deepmind,...``.

    Raises UsageError with the nearest right name.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        check_choice("--compare", name, RULES)
    if not names:
        raise UsageError(f"--compare: name dialects, such as {','.join(DIALECTS)}")
    return cast(tuple[Rule, ...], names)


def step(rule: Rule, *, lr: float, weight_decay: float, eta: float) -> dict[str, dict[str, float]]:
    """Take one step from zero momentum on each of ``EXAMPLES``, in float64.

    Return name -> ``COLUMNS``.
    """
    weights = torch.tensor([e.weight for e in EXAMPLES], dtype=torch.float64)
    opposite = (-weight_decay * weights).tolist()
    gradient = torch.tensor(
        [e.gradient or tuple(o) for e, o in zip(EXAMPLES, opposite, strict=True)],
        dtype=torch.float64,
    )
    count = len(EXAMPLES)
    table = SegmentTable(
        offsets=tuple(range(0, 2 * count, 2)),
        numels=(2,) * count,
        adapt=torch.ones(count, dtype=torch.bool),
        decay=weights.new_full((count,), weight_decay),
        lr_mult=weights.new_ones(count),
    )
    online = weights.flatten()
    layers = reference(
        online, gradient.flatten(), torch.zeros_like(online), online.clone(), table,
        weights.new_tensor(lr), weights.new_tensor(1.0), rule=rule, eta=eta, mu=0.9,
        ema_first=False,
    )  # fmt: skip
    return {
        e.name: dict(zip(COLUMNS, row.tolist(), strict=True))
        for e, row in zip(EXAMPLES, layers, strict=True)
    }


def ceiling(rule: Rule, *, lr: float, weight_decay: float, eta: float) -> float | None:
    """Return the highest rate possible, or None where nothing bounds it."""
    check_choice("dialect", rule, RULES)
    if rule == "sgd":
        return lr
    optim = {"name": "lars", "lr": lr, "weight_decay": weight_decay, "eta": eta, "dialect": rule}
    return rate_ceiling(OptimConfig.model_validate(optim))


def lars(
    rules: Sequence[Rule], *, lr: float = 0.2, weight_decay: float = 1.5e-6, eta: float = 1e-3
) -> dict[str, Any]:
    """Compare ``rules``: formulas, steps on the examples, ceilings, and the published peak.

    Raises UsageError for numbers out of range and for other rules.
    """
    for rule in rules:
        check_choice("dialect", rule, RULES)
    for name, value in (("--lr", lr), ("--wd", weight_decay), ("--eta", eta)):
        if not (0.0 <= value < float("inf")) or (name == "--eta" and value == 0.0):
            raise UsageError(
                f"{name} {value:g}: should be {'above 0' if name == '--eta' else '0 or more'}"
            )
    numbers = {"lr": lr, "weight_decay": weight_decay, "eta": eta}
    compared = {
        rule: {
            "formula": list(FORMULAS[rule]),
            "ceiling": ceiling(rule, **numbers),
            "examples": step(rule, **numbers),
        }
        for rule in rules
    }
    return {**numbers, "dialects": compared, "published_peak": published_peak(eta)}


def published_peak(eta: float = 1e-3) -> dict[str, Any]:
    """Return the highest rate published at lr .1, and the weight decay that allows it.

    The ceilings of ``DECAYS`` are returned too.
    """
    curve = published()["lars_timing_rate", "lr0.1"]
    top, lr = int(np.argmax(curve.value)), 0.1
    peak = float(curve.value[top])

    def row(source: str, decay: float) -> dict[str, Any]:
        bound = ceiling("blog", lr=lr, weight_decay=decay, eta=eta)
        possible = bound is None or bound >= peak
        return {"source": source, "weight_decay": decay, "ceiling": bound, "possible": possible}

    return {
        "says": appendix()["invariant"],
        "lr": lr,
        "eta": eta,
        "rate": peak,
        "epoch": int(curve.epoch[top]),
        "most_weight_decay": lr * eta / peak,
        "ceilings": [row(*each) for each in DECAYS.items()],
    }


def of_run(path: Path, rules: Sequence[Rule], at_step: int | None = None) -> dict[str, Any]:
    """Apply ``rules`` to the norms that a run recorded at one step.

    By default it is the step of the run's highest rate. Only norms are recorded, which bound
    ``deepmind``'s |g + wd w| from both sides. Its trust ratio and rate are pairs then. Raises
    UsageError: no run, nothing recorded, no record of that step, no such rule.
    """
    for rule in rules:
        check_choice("dialect", rule, RULES)
    with RunFolder.open(path, lock=False) as folder:
        optim, model, size = folder.config.optim, folder.config.model, folder.config.views.size
    layers = read_layers(path)
    index = _record_index(path, layers, at_step)
    chosen = int(layers.steps[index])
    lr = next((row["lr"] for row in read_metrics(path)[0] if row["step"] == chosen), None)
    if lr is None:
        raise UsageError(f"{path}: metrics.jsonl lacks step {chosen}: name another with --step")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Online(model, size).named_parameters()}
    by_name = dict(zip(shapes, treatments(shapes, optim), strict=True))
    treated = [by_name[name] for name in layers.names]
    values = torch.from_numpy(np.array(layers.values[index], dtype=np.float64))
    columns = {name: values[:, number] for number, name in enumerate(layers.metrics)}
    numbers = {"lr": lr, "weight_decay": optim.weight_decay, "eta": optim.eta}
    compared = {rule: _rates(rule, columns, treated, **numbers) for rule in rules}
    return {
        "run": str(path),
        "rule": rule_of(optim),
        "step": chosen,
        **numbers,
        "ceilings": {rule: ceiling(rule, **numbers) for rule in rules},
        "layers": [
            _layer(name, columns, treated, compared, number)
            for number, name in enumerate(layers.names)
        ],
    }


def _record_index(path: Path, layers: Layers, at_step: int | None) -> int:
    if not len(layers.steps):
        raise UsageError(
            f"{path}: no layer was recorded yet: go on with `fastbyol resume {quoted(path)}`"
        )
    if at_step is None:
        rates = np.nan_to_num(layers.values[:, :, layers.metrics.index("rate")])
        return int(rates.max(axis=1).argmax())
    matches = np.flatnonzero(layers.steps == at_step)
    if not len(matches):
        raise UsageError(
            f"{path}: step {at_step} was not recorded; those that were go from {layers.steps[0]} "
            f"to {layers.steps[-1]}"
        )
    return int(matches[0])


def _layer(
    name: str,
    columns: Mapping[str, torch.Tensor],
    treated: Sequence[Treatment],
    compared: Mapping[Rule, Sequence[dict[str, Any]]],
    index: int,
) -> dict[str, Any]:
    return {
        "name": name,
        "weight_norm": float(columns["weight_norm"][index]),
        "grad_norm": float(columns["grad_norm"][index]),
        "adapts": treated[index].adapt,
        "recorded": {
            key: float(columns[key][index]) for key in ("trust_ratio", "rate", "update_norm")
        },
        **{rule: rows[index] for rule, rows in compared.items()},
    }


def _rates(
    rule: Rule,
    columns: Mapping[str, torch.Tensor],
    treated: Sequence[Treatment],
    *,
    lr: float,
    weight_decay: float,
    eta: float,
) -> list[dict[str, Any]]:
    """Return trust ratio and rate of every layer adapted by ``rule``, or pairs of bounds."""
    weight, grad = columns["weight_norm"], columns["grad_norm"]
    decay = weight.new_tensor([weight_decay if each.decay else 0.0 for each in treated])
    bounds = (
        (grad + decay * weight, (grad - decay * weight).abs()) if rule == "deepmind" else (grad,)
    )
    ratios = [trust_ratio(rule, weight, grad, bound, decay, eta) for bound in bounds]
    rows = []
    for index, each in enumerate(treated):
        trusts = [float(ratio[index]) for ratio in ratios]
        rates = [lr * each.lr_mult * trust for trust in trusts]
        rows.append({"trust_ratio": _pair(trusts), "rate": _pair(rates)})
    return rows


def _pair(values: list[float]) -> float | list[float]:
    """Return the bounds, or one number where they agree to three digits."""
    low, high = min(values), max(values)
    return high if high - low <= 1e-3 * abs(high) else [low, high]
