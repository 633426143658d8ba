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


def knn_predict(
    bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """Predict the int64 labels (M,) of ``queries`` (M, D) from ``bank`` (N, D) and ``labels`` (N,).

    A class's vote is its sum of exp(cosine / temperature) over the ``k`` nearest rows, N at most;
    of equal classes the smallest label wins. Defaults are those of lightly and solo-learn; the
    paper has k = 200 and temperature .07. A row of zeros has cosine 0 to everything. Raises
    FastbyolError for features that are not finite, UsageError for an empty bank.
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
    predicted: Tensor = classes[torch.cat(votes).argmax(1)]
    return predicted


def knn_accuracy(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Return the percentage of ``queries`` for which ``knn_predict`` gives ``query_labels``."""
    predicted = knn_predict(bank, labels, queries, k=k, temperature=temperature)
    return 100.0 * float((predicted == query_labels.to(predicted)).double().mean())


def _votes(cosine: Tensor, index: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Return the votes, float64 (M, K), from cosines (M, N) and class indices (N,)."""
    # The common factor exp(-1 / T) keeps them finite.
    nearest, rows = cosine.topk(k, dim=1)
    weights = ((nearest.double() - 1.0) / temperature).exp()
    # No scatter_add: with a GPU's atomics the order of sums, and so ties, would be random.
    return torch.stack([(weights * (index[rows] == c)).sum(1) for c in range(num_classes)], dim=1)
