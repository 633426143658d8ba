"""The losses, and the cosines and spreads that are measured beside them, in fp32 or fp64.

A batch holds the two views one after the other.
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
    """The loss of a step and its numbers; see ``config.MethodConfig``."""

    name: Literal["byol", "contrastive", "simsiam"] = "byol"
    loss_scale: float = 1.0
    temperature: float = 0.2


def byol_loss(q: Tensor, projections: Tensor) -> Tensor:
    """Return (1 - mean cos(q(v), z'(v'))) + (1 - mean cos(q(v'), z'(v))), 0-d.

    ``q`` are predictions, ``projections`` z' (2B, D). Equation 2 of byol, symmetrised, times 1/2.
    """
    # 1 - cos(a, b) as half the squared distance of the unit vectors. After a collapse 1 - cos is
    # all rounding: at a loss of 6e-8 fp32 gave 0, and gradients 1e-2 off (median over layers)
    # where this form is 4e-5 off.
    return (unit(q) - _swap(unit(projections))).square().sum(-1).mean()


def contrastive_loss(
    q: Tensor, projections: Tensor, temperature: float, queue: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of each image's own projection among negatives, 0-d.

    Logits are cosines over ``temperature``: of a prediction q(v) with z'(v') of its image and with
    the negatives. These are the unit vectors of ``queue`` (K, D) or, without one, z'(v') of the
    batch's other images. The batch's mean, summed over both orders of the views.

    Source: MoCo, arXiv:1911.05722, equation 1. As in the post's code (moco.py), predictions are the
    queries and both views take their turn.
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
    """Write ``keys`` (B, D) over the oldest of ``queue`` (K, D) if ``taken``, a 0-d bool.

    They start at row ``step`` * B modulo K, ``step`` being 0-d. Does not wait for the device.
    Raises UsageError if B exceeds K.
    """
    if len(keys) > len(queue):
        raise UsageError(
            f"method.queue: {len(queue)} keys are fewer than the {len(keys)} of a batch: take "
            f"{len(keys)} or more, or 0"
        )
    rows = (step * len(keys) + torch.arange(len(keys), device=step.device)) % len(queue)
    queue.index_copy_(0, rows, torch.where(taken, keys, queue.index_select(0, rows)))


@torch.no_grad()
def observe(
    output: OnlineOutput, projections: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return pos_cos, neg_cos, std_z, std_y and dead_y of a batch, 0-d each (``engine.step``).

    ``projections`` are the target's, (N, D). O(N D): no matrix of pairs.
    """
    z, other = unit(output.z), _swap(unit(projections))
    pos = (z * other).sum(-1).mean()
    num_images = len(z) // NUM_VIEWS
    # The mean over all pairs of the two views is the product of the means; the diagonal is the
    # positive pairs.
    pairs = (_by_view(z).mean(1) * _by_view(other).mean(1)).sum(-1).mean()
    neg = (pairs * num_images - pos) / (num_images - 1)
    return pos, neg, spread(output.z), spread(output.y), dead_share(output.y).to(pos.dtype)


def dead_share(y: Tensor) -> Tensor:
    """Return the share of features of ``y`` (N, D) that are exactly 0 in every row, fp32, 0-d."""
    return (y == 0).all(dim=0).float().mean()


def spread(x: Tensor) -> Tensor:
    """Return how far the directions of ``x`` (N, D) spread: 1 over the whole sphere, 0 not at all.

    The biased standard deviation over a view of x / |x|, times sqrt(D), averaged over features and
    views. Source: Chen & He, SimSiam, arXiv:2011.10566, section 4.1.
    """
    return _by_view(unit(x)).std(dim=1, correction=0).mean() * math.sqrt(x.shape[1])


def unit(x: Tensor) -> Tensor:
    """Scale the rows of ``x`` to length 1, in fp32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-12)


def _swap(x: Tensor) -> Tensor:
    """Exchange the two views of a batch."""
    return x.roll(len(x) // NUM_VIEWS, dims=0)


def _by_view(x: Tensor) -> Tensor:
    return x.view(NUM_VIEWS, -1, x.shape[1])
