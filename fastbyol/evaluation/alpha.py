"""Alpha-ReQ: how fast the eigenvalues of the embeddings' covariance decay, as a power law.

Source: Agrawal et al., "alpha-ReQ: Assessing Representation Quality in Self-Supervised Learning by
measuring eigenspectrum decay", NeurIPS 2022: lambda_j is about c j^-alpha. The paper fits a line to
the logarithms and names neither range nor weights. Its code fits eigenvalues 4 to 100 with weights
1 / j, after Stringer et al., "High-dimensional geometry of population responses in visual cortex",
Nature 2019: the first few are no tail, and later ones crowd a logarithmic axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbyol.evaluation.rank import ROUNDING

FIRST, LAST = 4, 100
# Two points lie on a line whatever they are.
FEWEST = 3


class PowerLaw(NamedTuple):
    """The fit to the eigenvalues ``first`` to ``last``: exponent and share of variance explained.

    ``alpha`` and ``r2`` are None where fewer than ``FEWEST`` eigenvalues are more than rounding, as
    after a collapse.
    """

    alpha: float | None
    r2: float | None
    first: int
    last: int

    def as_json(self) -> dict[str, Any]:
        """Return entries for a result; the range is [first, last]."""
        return {
            "alpha": self.alpha,
            "alpha_r2": self.r2,
            "alpha_range": [self.first, self.last],
        }


def eigenspectrum(features: Tensor) -> Tensor:
    """Return the eigenvalues of the covariance of ``features`` (N, D), the largest first, fp64.

    Those that rounding of float32 features can make are left out: below 2^-46 of the mean square
    length of a row.
    """
    x = features.double()
    size = float(x.square().sum(1).mean())
    x = x - x.mean(0)
    product = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    values: Tensor = torch.linalg.eigvalsh(product / len(x)).flip(0)
    return values[values > ROUNDING**2 * size]


def power_law(spectrum: Tensor, first: int = FIRST, last: int = LAST) -> PowerLaw:
    """Fit log lambda_j = c - alpha log j to eigenvalues ``first`` to ``last``, or those there are.

    Least squares with weights 1 / j. ``r2`` has the same weights; it is 1 for a constant spectrum,
    which is a power law of exponent 0.
    """
    last = min(last, len(spectrum))
    if last - first + 1 < FEWEST:
        return PowerLaw(None, None, first, last)
    j = torch.arange(first, last + 1, dtype=torch.float64, device=spectrum.device)
    x, y = j.log(), spectrum[first - 1 : last].log()
    weights = (1.0 / j) / (1.0 / j).sum()
    x, y = x - (weights * x).sum(), y - (weights * y).sum()
    slope = (weights * x * y).sum() / (weights * x * x).sum()
    total = float((weights * y * y).sum())
    rest = float((weights * (y - slope * x).square()).sum())
    r2 = 1.0 if total <= 1e-24 else 1.0 - rest / total
    return PowerLaw(0.0 - float(slope), r2, first, last)


def alpha_req(features: Tensor) -> PowerLaw:
    """Fit the spectrum of ``features`` (N, D), which must be finite."""
    return power_law(eigenspectrum(features))
