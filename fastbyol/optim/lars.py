"""LARS's settings per parameter: which adapt their rate, which decay, and their lr factors.

``fastbyol_kernels.lars_ema.reference`` has the formulas: of the rate in ``factors``, of its trust
ratio in ``trust_ratio``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from fastbyol.config import Exclusion, OptimConfig
from fastbyol.errors import UsageError, nearest

if TYPE_CHECKING:
    from fastbyol_kernels.lars_ema import Rule

# The filter of the post's code, on names. It is not "biases and norms": it misses the norms'
# weights of the downsampling paths (`downsample.1.weight`) and of the heads. The blog preset keeps
# it because its published curves came from it.
SUBSTRINGS = (".bias", ".bn")


class Treatment(NamedTuple):
    """The optimizer's treatment of one parameter."""

    adapt: bool
    decay: bool
    lr_mult: float


def rule_of(config: OptimConfig) -> Rule:
    """Return the update rule of ``fastbyol_kernels.lars_ema`` for ``config``."""
    return "sgd" if config.name == "sgd" else config.dialect


def rate_ceiling(config: OptimConfig) -> float | None:
    """Return the upper bound of the rate of a weight that adapts and decays, or None.

    Under ``blog`` and ``bolts`` lr eta |w| / (|g| + wd |w|) < lr eta / wd; ``rate_cap`` if lower.
    SGD, no weight decay and ``deepmind``, whose |g + wd w| may vanish, have no bound. Takes the
    resolved ``config.lr`` and a factor of 1.
    """
    if config.name != "lars" or config.lr is None:
        return None
    bounded = config.dialect != "deepmind" and config.weight_decay
    bounds = (
        [config.lr * config.eta / config.weight_decay] if bounded and config.weight_decay else []
    )
    return min([*bounds, config.rate_cap] if config.rate_cap is not None else bounds, default=None)


def treatments(shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> tuple[Treatment, ...]:
    """Return each parameter's treatment, from ``shapes`` by dotted name, in their order.

    Raises UsageError for a pattern in ``optim.lars_on`` or ``optim.lr_mult`` that matches no name,
    under SGD, too.
    """
    _check_patterns("optim.lars_on", config.lars_on, shapes)
    _check_patterns("optim.lr_mult", [pattern for pattern, _ in config.lr_mult], shapes)
    return tuple(_treatment(name, len(shape), config) for name, shape in shapes.items())


def matches(name: str, pattern: str) -> bool:
    """Return whether ``pattern`` is ``name``, one of its dotted parents, or a glob of all of it."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _treatment(name: str, ndim: int, config: OptimConfig) -> Treatment:
    adapt = config.name == "lars" and any(matches(name, pattern) for pattern in config.lars_on)
    factor = 1.0
    for pattern, value in config.lr_mult:
        factor *= value if matches(name, pattern) else 1.0
    return Treatment(
        adapt=adapt and not _excluded(name, ndim, config.lars_exclude),
        decay=not _excluded(name, ndim, config.decay_exclude),
        lr_mult=factor,
    )


def _excluded(name: str, ndim: int, exclusion: Exclusion) -> bool:
    if exclusion == "substring":
        return any(part in name for part in SUBSTRINGS)
    return exclusion == "bias_and_norm" and ndim <= 1


def _check_patterns(key: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            parents = {
                name.rsplit(".", count)[0] for name in names for count in range(name.count(".") + 1)
            }
            near = nearest(pattern, sorted(parents), most=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise UsageError(f"{key}: {pattern!r} matches no parameter{hint}")
