"""The effective rank of embeddings: how many directions they use, as a number without labels.

Source: Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their
Rank", arXiv:2210.02885 (ICML 2023), equation 1; after Roy and Vetterli, "The effective rank", EUSIPCO 2007.

Letters: N samples, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

# RankMe's epsilon, added to every share of the singular values.
EPSILON = 1e-7


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values of ``features`` (N, D), each divided by their sum; they are not centred.

    Between 1 (all rows along one direction, as after a collapse) and min(N, D), but for what ``EPSILON`` adds: less than
    2e-6 per feature. Zeros, along no direction, have rank 0.
    """
    # Singular values of the columns from the smaller of the two products, in fp64: fp32 features have exact products there,
    # and what squaring loses lies below 1e-8 of the largest value, a tenth of EPSILON.
    x = features.double()
    product = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(product).clamp_min(0.0).sqrt()
    total = singular.sum()
    if total == 0:
        return 0.0
    shares = singular / total + EPSILON
    return float((-(shares * shares.log()).sum()).exp())
