"""The effective rank of embeddings: the number of directions that they use.

Source: Garrido et al., "RankMe", arXiv:2210.02885 (ICML 2023), equation 1; after Roy and Vetterli,
"The effective rank", EUSIPCO 2007.
"""

from __future__ import annotations

import torch
from torch import Tensor

# RankMe's epsilon, added to every share of the singular values.
EPSILON = 1e-7
# Differences between embeddings below this part of their length are float32's rounding.
ROUNDING = 2.0**-23


def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of ``features`` (N, D).

    Features are not centred. The rank is between 1 (all rows along one direction, as after a
    collapse) and min(N, D), but for ``EPSILON``, which adds less than 2e-6 per feature. Zeros have
    rank 0.
    """
    # From the smaller of the two products, in fp64: products of fp32 features are exact there, and
    # squaring loses values below 1e-8 of the largest, a tenth of EPSILON.
    x = features.double()
    product = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(product).clamp_min(0.0).sqrt()
    return smooth_rank(singular)


def relative_spread(features: Tensor) -> float:
    """Return the root mean square distance of ``features`` (N, D) from their mean, by its length.

    It tells what no rank does: how small the differences are. 0 if the mean is 0.
    """
    x = features.double()
    mean = x.mean(0)
    length = float(mean.norm())
    return float((x - mean).square().sum(1).mean().sqrt()) / length if length else 0.0


def smooth_rank(values: Tensor) -> float:
    """Return exp of the entropy of the shares that ``values`` (D,) >= 0 have in their sum.

    ``EPSILON`` is added to each share. Zeros have rank 0.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total + EPSILON
    return float((-(shares * shares.log()).sum()).exp())
