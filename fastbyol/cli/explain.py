"""The dialects of LARS in numbers: what each makes of the same weights and gradients, and the ceiling of its rate.

Every number comes out of ``fastbyol_kernels.lars_ema``: ``reference`` takes the step on made-up vectors, ``trust_ratio`` reads
the norms that a run recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from fastbyol.ablations.curves import appendix, published
from fastbyol.config import OptimConfig
from fastbyol.errors import UsageError, check_choice
from fastbyol.model.byol import Online
from fastbyol.optim.lars import Treatment, rate_ceiling, rule_of, treatments
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.layers import Layers, read_layers
from fastbyol.runs.metrics import read_metrics
from fastbyol_kernels.lars_ema import BOLTS_EPS, RULES, Rule, SegmentTable, reference, trust_ratio

DIALECTS: tuple[Rule, ...] = ("blog", "deepmind", "bolts")
FORMULAS: dict[Rule, tuple[str, ...]] = {
    "sgd": ("trust = 1", "m <- mu m + (g + wd w)", "w <- w - lr m"),
    "blog": ("trust = eta |w| / (|g| + wd |w|); 0 where the sum is 0", "m <- mu m + lr trust (g + wd w)", "w <- w - m"),
    "deepmind": ("trust = eta |w| / |g + wd w|; 1 where either norm is 0", "m <- mu m + trust (g + wd w)", "w <- w - lr m"),
    "bolts": (
        f"trust = eta |w| / (|g| + wd |w| + {BOLTS_EPS:g}); 1, without decay, where |w| or |g| is 0",
        "m <- mu m + trust (g + wd w)",
        "w <- w - lr m",
    ),
}
ANSWERS = ("weight_norm", "grad_norm", "trust_ratio", "rate", "update_norm")
# The weight decays that the post and its code mention, for the argument from the published peak.
DECAYS = {"byol section 3.3": 1.5e-6, "the post's section on weight decay": 1e-5, "the post's code": 1e-4}


class Example(NamedTuple):
    """A weight vector and its gradient. ``gradient`` may be ``-wd w``, which only a given weight decay fixes: then None."""

    name: str
    weight: tuple[float, float]
    gradient: tuple[float, float] | None


# Gradients across w, as behind a norm layer, where the loss does not depend on the scale of w. 4 times any wd is exact, so that
# the gradient that cancels the decay does so to the last bit.
EXAMPLES = (
    Example("gradient .05", (0.0, 4.0), (0.05, 0.0)),
    Example("gradient 5e-5, collapsing", (0.0, 4.0), (5e-5, 0.0)),
    Example("gradient 5e-9, collapsed", (0.0, 4.0), (5e-9, 0.0)),
    Example("gradient -wd w: no net pull", (0.0, 4.0), None),
    Example("gradient 0", (0.0, 4.0), (0.0, 0.0)),
    Example("weight 0, a norm's bias at first", (0.0, 0.0), (0.05, 0.0)),
    Example("both 0", (0.0, 0.0), (0.0, 0.0)),
)


def dialects(text: str) -> tuple[Rule, ...]:
    """The rules named in ``blog,deepmind,...``. Raises UsageError with the nearest right name."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        check_choice("--compare", name, RULES)
    if not names:
        raise UsageError(f"--compare: name dialects, such as {','.join(DIALECTS)}")
    return cast(tuple[Rule, ...], names)


def step(rule: Rule, *, lr: float, weight_decay: float, eta: float) -> dict[str, dict[str, float]]:
    """One step from zero momentum on each of ``EXAMPLES``, in float64: name -> ``ANSWERS``."""
    weights = torch.tensor([e.weight for e in EXAMPLES], dtype=torch.float64)
    opposite = (-weight_decay * weights).tolist()
    gradient = torch.tensor([e.gradient or tuple(o) for e, o in zip(EXAMPLES, opposite, strict=True)], dtype=torch.float64)
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
        weights.new_tensor(lr), weights.new_tensor(1.0), rule=rule, eta=eta, mu=0.9, ema_first=False,
    )  # fmt: skip
    return {e.name: dict(zip(ANSWERS, row.tolist(), strict=True)) for e, row in zip(EXAMPLES, layers, strict=True)}


def ceiling(rule: Rule, *, lr: float, weight_decay: float, eta: float) -> float | None:
    """What the rate cannot exceed; None where nothing bounds it."""
    check_choice("dialect", rule, RULES)
    if rule == "sgd":
        return lr
    optim = {"name": "lars", "lr": lr, "weight_decay": weight_decay, "eta": eta, "dialect": rule}
    return rate_ceiling(OptimConfig.model_validate(optim))


def lars(rules: Sequence[Rule], *, lr: float = 0.2, weight_decay: float = 1.5e-6, eta: float = 1e-3) -> dict[str, Any]:
    """Formulas, steps on the examples and ceilings of ``rules``, and what the published peak says about the weight decay.

    Raises UsageError for numbers out of range and for other rules.
    """
    for rule in rules:
        check_choice("dialect", rule, RULES)
    for name, value in (("--lr", lr), ("--wd", weight_decay), ("--eta", eta)):
        if not (0.0 <= value < float("inf")) or (name == "--eta" and value == 0.0):
            raise UsageError(f"{name} {value:g}: should be {'above 0' if name == '--eta' else '0 or more'}")
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
    """The highest rate published at lr .1, the weight decay that it leaves room for, and the ceiling at each one mentioned."""
    curve = published()["lars_timing_rate", "lr0.1"]
    top, lr = int(np.argmax(curve.value)), 0.1
    peak = float(curve.value[top])
    ceilings = {source: (decay, ceiling("blog", lr=lr, weight_decay=decay, eta=eta)) for source, decay in DECAYS.items()}
    return {
        "says": appendix()["invariant"],
        "lr": lr,
        "eta": eta,
        "rate": peak,
        "epoch": int(curve.epoch[top]),
        "most_weight_decay": lr * eta / peak,
        "ceilings": [
            {"source": source, "weight_decay": decay, "ceiling": bound, "possible": bound is None or bound >= peak}
            for source, (decay, bound) in ceilings.items()
        ],
    }


def of_run(path: Path, rules: Sequence[Rule], at_step: int | None = None) -> dict[str, Any]:
    """What ``rules`` make of the norms that a run recorded at one step: by default the one of its highest recorded rate.

    Only norms are recorded, so ``deepmind``'s |g + wd w| is known between two bounds; its trust ratio and rate are pairs then.
    Raises UsageError: no run, nothing recorded, or no record of that step, no such rule.
    """
    for rule in rules:
        check_choice("dialect", rule, RULES)
    with RunFolder.open(path, lock=False) as folder:
        config = folder.config
    layers, optim = read_layers(path), config.optim
    if not len(layers.steps):
        raise UsageError(f"{path}: no layer was recorded yet: go on with `fastbyol resume {path}`")
    place = _place(path, layers, at_step)
    chosen = int(layers.steps[place])
    lr = next((row["lr"] for row in read_metrics(path)[0] if row["step"] == chosen), None)
    if lr is None:
        raise UsageError(f"{path}: metrics.jsonl lacks step {chosen}: name another with --step")
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Online(config.model).named_parameters()}
    treated = dict(zip(shapes, treatments(shapes, optim), strict=True))
    values = torch.from_numpy(np.array(layers.values[place], dtype=np.float64))
    columns = {name: values[:, index] for index, name in enumerate(layers.metrics)}
    told = [treated[name] for name in layers.names]
    decay = values.new_tensor([optim.weight_decay or 0.0 if t.decay else 0.0 for t in told])
    compared = {rule: _read(rule, columns, told, decay, optim.eta, lr) for rule in rules}
    rows = [
        {
            "name": name,
            "weight_norm": float(columns["weight_norm"][index]),
            "grad_norm": float(columns["grad_norm"][index]),
            "adapts": told[index].adapt,
            "recorded": {key: float(columns[key][index]) for key in ("trust_ratio", "rate", "update_norm")},
            **{rule: compared[rule][index] for rule in rules},
        }
        for index, name in enumerate(layers.names)
    ]
    return {
        "run": str(path),
        "rule": rule_of(optim),
        "step": chosen,
        "lr": lr,
        "eta": optim.eta,
        "weight_decay": optim.weight_decay,
        "ceilings": {rule: ceiling(rule, lr=lr, weight_decay=optim.weight_decay or 0.0, eta=optim.eta) for rule in rules},
        "layers": rows,
    }


def _place(path: Path, layers: Layers, at_step: int | None) -> int:
    if at_step is None:
        rates = np.nan_to_num(layers.values[:, :, layers.metrics.index("rate")])
        return int(rates.max(axis=1).argmax())
    found = np.flatnonzero(layers.steps == at_step)
    if not len(found):
        raise UsageError(
            f"{path}: step {at_step} was not recorded; those that were go from {layers.steps[0]} to {layers.steps[-1]}"
        )
    return int(found[0])


def _read(
    rule: Rule, columns: dict[str, torch.Tensor], told: Sequence[Treatment], decay: torch.Tensor, eta: float, lr: float
) -> list[dict[str, Any]]:
    """Trust ratio and rate of every layer as if it adapted by ``rule``; a pair where only bounds are known."""
    weight, grad = columns["weight_norm"], columns["grad_norm"]
    bounds = (grad + decay * weight, (grad - decay * weight).abs()) if rule == "deepmind" else (grad,)
    found = [trust_ratio(rule, weight, grad, u, decay, eta) for u in bounds]
    factor = weight.new_tensor([t.lr_mult for t in told])
    rows = []
    for index in range(len(told)):
        trusts = [float(trust[index]) for trust in found]
        rates = [lr * float(factor[index]) * trust for trust in trusts]
        rows.append({"trust_ratio": _pair(trusts), "rate": _pair(rates)})
    return rows


def _pair(values: list[float]) -> float | list[float]:
    """One number where both are the same to three digits."""
    low, high = min(values), max(values)
    return high if high - low <= 1e-3 * abs(high) else [low, high]


def in_words(found: dict[str, Any]) -> str:
    """What ``lars`` found, as text."""
    lines = [
        f"lr {found['lr']:g}, weight decay wd {found['weight_decay']:g}, eta {found['eta']:g}, one step from zero momentum"
    ]
    for rule, told in found["dialects"].items():
        lines += ["", rule, *(f"  {line}" for line in told["formula"]), f"  {_ceiling_in_words(rule, told['ceiling'])}", ""]
        lines.append(f"  {'example':34s}{'|w|':>8s}{'|g|':>10s}{'trust':>12s}{'rate':>12s}{'|update|':>12s}")
        lines += [
            f"  {name:34s}{row['weight_norm']:8.3g}{row['grad_norm']:10.3g}{row['trust_ratio']:12.5g}{row['rate']:12.5g}"
            f"{row['update_norm']:12.3g}"
            for name, row in told["examples"].items()
        ]
    return "\n".join([*lines, "", *_peak_in_words(found["published_peak"])])


def run_in_words(found: dict[str, Any]) -> str:
    """What ``of_run`` found, as text. ``a..b`` stands between bounds, ``-`` marks what does not adapt in the run."""
    rules = list(found["ceilings"])
    wide = max(len(row["name"]) for row in found["layers"]) + 2
    lines = [
        f"{found['run']}: step {found['step']}, lr {found['lr']:.5g}, weight decay {found['weight_decay']:g}, "
        f"eta {found['eta']:g}, trained by {found['rule']}",
        *(f"{rule}: {_ceiling_in_words(rule, bound)}" for rule, bound in found["ceilings"].items()),
        "rates of each layer, as recorded and as they would be if it adapted by each dialect; - does not adapt in this run",
        "",
        f"{'layer':{wide}s}{'|w|':>10s}{'|g|':>10s}{'recorded':>12s}" + "".join(f"{rule:>20s}" for rule in rules),
    ]
    for row in found["layers"]:
        mark = "" if row["adapts"] else " -"
        rates = "".join(f"{_shown(row[rule]['rate']):>20s}" for rule in rules)
        lines.append(
            f"{row['name']:{wide}s}{row['weight_norm']:10.3g}{row['grad_norm']:10.3g}{row['recorded']['rate']:12.4g}{rates}{mark}"
        )
    return "\n".join(lines)


def _ceiling_in_words(rule: str, bound: float | None) -> str:
    if rule == "sgd":
        return f"the rate is lr: {bound:g}"
    if bound is not None:
        where = "where |w| and |g| are above 0, " if rule == "bolts" else ""
        return f"{where}the rate is at most lr eta / wd = {bound:.5g}, whatever the gradient"
    return "no ceiling: " + ("|g + wd w| may vanish" if rule == "deepmind" else "without weight decay |g| may vanish")


def _peak_in_words(peak: dict[str, Any]) -> list[str]:
    return [
        f"The published peak: {peak['rate']:.1f} at lr {peak['lr']:g} (epoch {peak['epoch']}) needs wd <= lr eta / rate = "
        f"{peak['most_weight_decay']:.2g} with blog or bolts:",
        *(
            f"  wd {row['weight_decay']:<8g}{row['source']:36s}ceiling "
            + ("none" if row["ceiling"] is None else f"{row['ceiling']:.3g}")
            + (": possible" if row["possible"] else ": ruled out")
            for row in peak["ceilings"]
        ),
    ]


def _shown(value: float | list[float]) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value[0]:.3g}..{value[1]:.3g}"
