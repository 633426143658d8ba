"""The losses, and the cosines and spreads that are measured beside them, in fp32 or fp64.

A batch holds the two views one after the other. On several ranks it is a rank's share: losses are
then its part of the global one, and measures are sent as moments, which all ranks merge.
Letters: V = 2 views, B images, N = V * B, D features, K keys in a queue, R ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol.errors import UsageError
from fastbyol.model.byol import NUM_VIEWS, OnlineOutput
from fastbyol_kernels.batch_norm import Gather, merge_moments

OBJECTIVES = ("byol", "contrastive", "simsiam")


@dataclass(frozen=True)
class Share:
    """The images of a global batch that a rank has: ``count`` of ``total``, from ``first`` on.

    ``gather`` stacks a tensor of every rank, whose shares are ``counts``.
    """

    first: int
    counts: tuple[int, ...]
    rank: int
    gather: Gather

    @property
    def count(self) -> int:
        """The number of this rank's images."""
        return self.counts[self.rank]

    @property
    def total(self) -> int:
        """The number of images of the global batch."""
        return sum(self.counts)

    def rows(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks for this one's ``x`` (V, B, D): (V, total, D).

        The result has no gradient.
        """
        padded = F.pad(x.detach(), (0, 0, 0, max(self.counts) - self.count))
        every = self.gather(padded)
        return torch.cat(
            [rows[:, :count] for rows, count in zip(every, self.counts, strict=True)], 1
        )


class Objective(NamedTuple):
    """The loss of a step and its numbers; see ``config.MethodConfig``.

    ``share`` is None where the batch is whole. Else ``loss_scale`` has its part of the batch as a
    factor, so that the losses and gradients of all ranks add up.
    """

    name: Literal["byol", "contrastive", "simsiam"] = "byol"
    loss_scale: float = 1.0
    temperature: float = 0.2
    share: Share | None = None


def byol_loss(q: Tensor, projections: Tensor) -> Tensor:
    """Return (1 - mean cos(q(v), z'(v'))) + (1 - mean cos(q(v'), z'(v))), 0-d.

    ``q`` are predictions, ``projections`` z' (2B, D). Equation 2 of byol, symmetrised, times 1/2.
    """
    # 1 - cos(a, b) as half the squared distance of the unit vectors. After a collapse 1 - cos is
    # all rounding: at a loss of 6e-8 fp32 gave 0, and gradients 1e-2 off (median over layers)
    # where this form is 4e-5 off.
    return (unit(q) - _swap(unit(projections))).square().sum(-1).mean()


def contrastive_loss(
    q: Tensor,
    projections: Tensor,
    temperature: float,
    queue: Tensor | None = None,
    share: Share | None = None,
) -> Tensor:
    """Return the cross-entropy of each image's own projection among negatives, 0-d.

    Logits are cosines over ``temperature``: of a prediction q(v) with z'(v') of its image and with
    the negatives. These are the unit vectors of ``queue`` (K, D) or, without one, z'(v') of the
    batch's other images, on all ranks. The batch's mean, summed over both orders of the views.

    Source: MoCo, arXiv:1911.05722, equation 1. As in the post's code (moco.py), predictions are the
    queries and both views take their turn.
    """
    q, keys = unit(q), _swap(unit(projections))
    if queue is None:
        by_view = _by_view(keys)
        every, first = (by_view, 0) if share is None else (share.rows(by_view), share.first)
        logits = (_by_view(q) @ every.mT).flatten(0, 1)
        own = torch.arange(first, first + by_view.shape[1], device=q.device)
        labels = own.repeat(NUM_VIEWS)
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


@torch.no_grad()
def moments(output: OnlineOutput, projections: Tensor) -> Tensor:
    """Return what ``merge`` needs of a rank's share to compute ``observe``, flat (K,)."""
    z, other, y = unit(output.z), _swap(unit(projections)), unit(output.y)
    parts = [(z * other).sum().view(1), _by_view(other).mean(1).flatten()]
    for x in (z, y):
        mean = _by_view(x).mean(1)
        parts += [mean.flatten(), (_by_view(x) - mean[:, None]).square().sum(1).flatten()]
    return torch.cat([*parts, (output.y != 0).any(0).to(z.dtype)])


def num_moments(dim_z: int, dim_y: int) -> int:
    """Return K, the length of ``moments``, for projections and embeddings of these lengths."""
    return 1 + 3 * NUM_VIEWS * dim_z + 2 * NUM_VIEWS * dim_y + dim_y


@torch.no_grad()
def merge(every: Tensor, counts: Tensor, dim_z: int) -> Tensor:
    """Return ``observe`` of a global batch, (5,), from the ``moments`` (R, K) of its shares.

    ``counts`` (R,) are the ranks' numbers of images, ``dim_z`` is the length of projections.
    """
    every = every.double()
    dim_y = (every.shape[1] - 1 - 3 * NUM_VIEWS * dim_z) // (2 * NUM_VIEWS + 1)
    z_size, y_size = NUM_VIEWS * dim_z, NUM_VIEWS * dim_y
    pos, other, *rest, alive = torch.split(every, [1, *[z_size] * 3, *[y_size] * 2, dim_y], dim=1)
    images = counts.double()[:, None]
    total, spreads, means = images.sum(), [], []
    for mean, m2, dim in zip(rest[::2], rest[1::2], (dim_z, dim_y), strict=True):
        count = images.expand(-1, NUM_VIEWS)[..., None]
        by_view = torch.cat((count, *(x.view(-1, NUM_VIEWS, dim) for x in (mean, m2))), -1)
        _, mean, m2 = torch.split(merge_moments(by_view), [1, dim, dim], dim=-1)
        means.append(mean)
        spreads.append((m2 / total).sqrt().mean() * math.sqrt(dim))
    positive = pos.sum() / (NUM_VIEWS * total)
    others = ((images * other).sum(0) / total).view(NUM_VIEWS, dim_z)
    pairs = (means[0] * others).sum(-1).mean()
    negative = (pairs * total - positive) / (total - 1)
    dead = (alive.sum(0) == 0).double().mean()
    return torch.stack((positive, negative, *spreads, dead))


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
