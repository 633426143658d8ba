"""Weighted k-nearest-neighbour accuracy.

Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination",
arXiv:1805.01978, section 3.4. Letters: N bank samples, M queries, D features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol.errors import UsageError
from fastbyol.evaluation.features import check_finite

# Similarities in memory at a time: 64 MiB of float32.
_CHUNK_ELEMENTS = 2**24


def knn_votes(
    bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = 200, temperature: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return the votes for ``queries`` (M, D), float64 (M, K), and the labels that they are for.

    A class's vote is its sum of exp(cosine / temperature) over the ``k`` nearest rows, N at most,
    of ``bank`` (N, D) with ``labels`` (N,), divided by exp(1 / temperature). Defaults are those of
    lightly and solo-learn; the paper has k = 200 and temperature .07. A row of zeros has cosine 0
    to everything. Raises FastbyolError for features that are not finite, UsageError for an empty
    bank.
    """
    if not len(bank):
        raise UsageError(
            "labels: a k-nearest-neighbour probe needs labelled images to compare with, found none"
        )
    check_finite(bank)
    check_finite(queries)
    classes, index = torch.unique(labels.to(bank.device, torch.int64), return_inverse=True)
    bank, queries, k = (
        F.normalize(bank.float(), dim=1),
        F.normalize(queries.float(), dim=1),
        min(k, len(bank)),
    )
    chunk = max(1, _CHUNK_ELEMENTS // len(bank))
    votes = [
        _votes(queries[start : start + chunk] @ bank.T, index, len(classes), k, temperature)
        for start in range(0, len(queries), chunk)
    ]
    return torch.cat(votes), classes


def _votes(cosine: Tensor, index: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Return the votes, float64 (M, K), from cosines (M, N) and class indices (N,)."""
    # The common factor exp(-1 / T) keeps them finite.
    nearest, rows = cosine.topk(k, dim=1)
    weights = ((nearest.double() - 1.0) / temperature).exp()
    # No scatter_add: with a GPU's atomics the order of sums, and so ties, would be random.
    return torch.stack([(weights * (index[rows] == c)).sum(1) for c in range(num_classes)], dim=1)
