"""The losses, and what is watched beside them: cosines of positive and negative pairs, spread of representations.

All of it is fp32 at least, whatever the networks' precision. Batches hold the two views one after the other.

Letters: V = 2 views, B images, N = V * B, D features, K keys in a queue.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol.errors import UsageError
from fastbyol.model.byol import NUM_VIEWS, OnlineOutput

OBJECTIVES = ("byol", "contrastive", "simsiam")


class Objective(NamedTuple):
    """Which loss a step minimises, and its numbers; see ``config.MethodConfig``. ``loss_scale`` is a factor on any of them."""

    name: Literal["byol", "contrastive", "simsiam"] = "byol"
    loss_scale: float = 1.0
    temperature: float = 0.2


def byol_loss(q: Tensor, projections: Tensor) -> Tensor:
    """(1 - mean cos(q(v), z'(v'))) + (1 - mean cos(q(v'), z'(v))), from predictions and target projections (2B, D).

    Equation 2 of byol, symmetrised, times 1/2. fp32 or fp64; 0-d.
    """
    # 1 - cos(a, b) as half the squared distance of the unit vectors. Once the representation has collapsed 1 - cos is all
    # rounding: at a loss of 6e-8 fp32 gave 0, and gradients 1e-2 off (median over layers) where this form is 4e-5 off.
    return (unit(q) - _swap(unit(projections))).square().sum(-1).mean()


def contrastive_loss(q: Tensor, projections: Tensor, temperature: float, queue: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each image's own projection among negatives, both orders of the views summed.

    Logits are cosines over ``temperature``: of a prediction q(v) with z'(v') of its image and with the negatives. These are the
    unit vectors of ``queue`` (K, D); without one, z'(v') of the batch's other images. Means over the batch; fp32 or fp64, 0-d.

    Source: MoCo, arXiv:1911.05722, equation 1. The post's code takes predictions for queries, and both views in turn (moco.py).
    """
    q, keys = unit(q), _swap(unit(projections))
    if queue is None:
        logits = (_by_view(q) @ _by_view(keys).mT).flatten(0, 1)
        labels = torch.arange(logits.shape[1], device=q.device).repeat(NUM_VIEWS)
    else:
        logits = torch.cat(((q * keys).sum(-1, keepdim=True), q @ queue.T), dim=1)
        labels = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    return NUM_VIEWS * F.cross_entropy(logits / temperature, labels)


@torch.no_grad()
def enqueue(queue: Tensor, keys: Tensor, step: Tensor, taken: Tensor) -> None:
    """Write ``keys`` (B, D) over the oldest of ``queue`` (K, D), from row ``step`` * B modulo K on, unless ``taken`` is false.

    ``step`` and ``taken`` are 0-d tensors on the device, which is not waited for. Raises ``UsageError`` where B exceeds K.
    """
    if len(keys) > len(queue):
        raise UsageError(
            f"method.queue: {len(queue)} keys are fewer than the {len(keys)} of a batch: take {len(keys)} or more, or 0"
        )
    rows = (step * len(keys) + torch.arange(len(keys), device=step.device)) % len(queue)
    queue.index_copy_(0, rows, torch.where(taken, keys, queue.index_select(0, rows)))


@torch.no_grad()
def observe(output: OnlineOutput, projections: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """pos_cos, neg_cos, std_z, std_y, dead_y of a batch, 0-d each; see ``engine.step.StepMetrics``.

    O(B D): no matrix of pairs.
    """
    z, other = unit(output.z), _swap(unit(projections))
    pos = (z * other).sum(-1).mean()
    num_images = len(z) // NUM_VIEWS
    # The mean over all pairs of the two views is the product of the means; the diagonal is the positive pairs.
    pairs = (_by_view(z).mean(1) * _by_view(other).mean(1)).sum(-1).mean()
    neg = (pairs * num_images - pos) / (num_images - 1)
    return pos, neg, spread(output.z), spread(output.y), dead_share(output.y).to(pos.dtype)


def dead_share(y: Tensor) -> Tensor:
    """Share of features of ``y`` (N, D) that are exactly 0 in every row: units whose ReLU passes nothing on. fp32, 0-d."""
    return (y == 0).all(dim=0).float().mean()


def spread(x: Tensor) -> Tensor:
    """Mean over features of the batch's standard deviation (biased) of x / |x|, times sqrt(D), averaged over the views.

    1: directions spread evenly over the sphere; 0: all the same. Source: Chen & He, SimSiam, arXiv:2011.10566, section 4.1.
    """
    return _by_view(unit(x)).std(dim=1, correction=0).mean() * math.sqrt(x.shape[1])


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; in fp32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-12)


def _swap(x: Tensor) -> Tensor:
    """The two views' halves of a batch in the other order."""
    return x.roll(len(x) // NUM_VIEWS, dims=0)


def _by_view(x: Tensor) -> Tensor:
    return x.view(NUM_VIEWS, -1, x.shape[1])
