"""The post's appendix as numbers: its claims and the 29 curves read off its figures.

Both are shipped with the package. ``published/claims.json`` holds the fourteen claims with the
numbers of their figures, ``published/curves.csv`` the points of the curves
(``figure,series,epoch,value``). Figures are of single runs; no error bands were published.

Source: "Understanding self-supervised and contrastive learning with BYOL", Appendix (2020).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import numpy as np

_DATA = files("fastbyol.ablations") / "published"


@dataclass(frozen=True, eq=False)
class Curve:
    """One series of one figure.

    ``epoch`` is float64 (P,) and rises from 0 on; ``value`` is float64 (P,) in the figure's unit.
    Accuracies are in percent; cosines, losses and rates have no unit. Epochs that were hidden in
    the figure are left out.
    """

    figure: str
    series: str
    epoch: np.ndarray
    value: np.ndarray


@cache
def published() -> Mapping[tuple[str, str], Curve]:
    """Return every curve by (figure, series), in the order of the file."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in csv.DictReader((_DATA / "curves.csv").read_text("utf-8").splitlines()):
        points.setdefault((row["figure"], row["series"]), []).append(
            (float(row["epoch"]), float(row["value"]))
        )
    return MappingProxyType(
        {key: Curve(*key, *np.array(sorted(values)).T) for key, values in points.items()}
    )


@cache
def appendix() -> Mapping[str, Any]:
    """``claims.json``:

    ``setting``, ``claims``, ``unsettled`` and how accurately the figures were read.
    """
    content: dict[str, Any] = json.loads((_DATA / "claims.json").read_text("utf-8"))
    return MappingProxyType(content)
