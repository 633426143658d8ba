"""Normalisation layers, in fp32 (fp64 in fp64 runs) whatever the activations' dtype.

CONTRIBUTING.md says how to add one. N = V views x B images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbyol.config import HeadNormName, NormName
from fastbyol.errors import check_choice
from fastbyol.model.adapter import Adapter
from fastbyol_kernels import dispatch
from fastbyol_kernels.batch_norm import Gather, add_and_relu, batch_norm, moments
from fastbyol_kernels.group_norm import EPS, group_norm
from fastbyol_kernels.max_pool import max_pool

BATCH_NORM_EPS = 1e-5  # both are torch's defaults
BATCH_NORM_MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """Batch norm over (N, C) or (N, C, H, W) with training statistics of each view alone.

    In train mode the batch is ``num_views`` equal consecutive chunks. Each is normalised by its own
    statistics and updates the running buffers, in order, like ``num_views`` separate passes through
    ``nn.BatchNorm2d`` (bit for bit with the reference kernels). In eval mode the running buffers
    normalise the whole batch. ``use_kernels`` sets ``kernels``, ``share_statistics`` sets
    ``gather``, with which a view's statistics are those of all ranks.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, num_views: int) -> None:
        super().__init__()
        self.num_views = num_views
        self.kernels = "auto"
        self.gather: Gather | None = None
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False, pool: bool = False
    ) -> Tensor:
        """Return relu(batch norm of ``x`` + ``residual``) in one operation; both are optional.

        With ``pool``, which excludes a residual, return ``max_pool`` of that.
        """
        if not self.training:
            y = F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                False,
                0.0,
                BATCH_NORM_EPS,
            )
            y = add_and_relu(y, residual, relu)
            return max_pool(y, kernels=self.kernels) if pool else y
        _check_views(x, self.num_views)
        return batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.num_views,
            momentum=BATCH_NORM_MOMENTUM, eps=BATCH_NORM_EPS, residual=residual, relu=relu,
            pool=pool, num_batches_tracked=self.num_batches_tracked, kernels=self.kernels,
            gather=self.gather,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, num_views={self.num_views}"


class BatchRenorm(nn.Module):
    """Batch renormalisation over (N, C), per view and in order like ``BatchNorm``.

    In train mode y = ((x - mean) / std * r + d) * weight + bias, with std = sqrt(biased variance) +
    eps and without gradient through r = clamp(std / running_std, 1/rmax, rmax) and
    d = clamp((mean - running_mean) / running_std, -dmax, dmax). In eval mode the running buffers
    normalise. Source: Ioffe, "Batch Renormalization", arXiv:1702.03275; the constants and the
    running std in place of a variance are from the post's code. ``share_statistics`` sets
    ``gather``, as in ``BatchNorm``.
    """

    EPS = 1e-3
    MOMENTUM = 0.01

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, num_views: int) -> None:
        super().__init__()
        self.num_views = num_views
        self.gather: Gather | None = None
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            _check_views(x, self.num_views)
            chunks = zip(x.chunk(self.num_views), *self._statistics(x), strict=True)
            normalised = torch.cat([self._train_chunk(*chunk) for chunk in chunks])
        else:
            normalised = (x - self.running_mean) / self.running_std
        return normalised * self.weight + self.bias

    def _statistics(self, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return mean and biased standard deviation of each view, (C,) each."""
        if self.gather is None:
            stds, means = zip(
                *(torch.std_mean(c, dim=0, correction=0) for c in x.chunk(self.num_views)),
                strict=True,
            )
            return means, stds
        mean, var, _ = moments(x, self.num_views, self.gather)
        # Where all values are equal the root has no gradient; like torch.std's it is 0 there.
        return mean.unbind(), var.clamp_min(torch.finfo(var.dtype).tiny).sqrt().unbind()

    def _train_chunk(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        std = std + self.EPS
        r, d = self._corrections(mean.detach(), std.detach())
        self.running_mean.lerp_(mean.detach(), self.MOMENTUM)
        self.running_std.lerp_(std.detach(), self.MOMENTUM)
        self.num_batches_tracked.add_(1)
        return (x - mean) / std * r + d

    def _corrections(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        # rmax rises from 1 to 3 between batches 5,000 and 40,000, dmax from 0 to 5 by 25,000.
        k = self.num_batches_tracked.to(std.dtype)
        rmax = (2 / 35000 * k + 25 / 35).clamp(1.0, 3.0)
        dmax = (5 / 20000 * k - 25 / 20).clamp(0.0, 5.0)
        r = (std / self.running_std).clamp(1 / rmax, rmax)
        d = ((mean - self.running_mean) / self.running_std).clamp(-dmax, dmax)
        return r, d


class GroupNorm(nn.Module):
    """Group norm over (N, C) or (N, C, H, W), eps 1e-5. One group is layer norm over all but N.

    ``use_kernels`` sets ``kernels``. ``precomputed`` are weight and bias, (N, C) each, if their
    gradient is to be that of each sample (``group_norm``).
    """

    precomputed: tuple[Tensor, Tensor] | None = None

    def __init__(self, num_groups: int, num_channels: int) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, EPS
        self.kernels = "auto"
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """Return relu(group norm of ``x`` + ``residual``) in one operation; both are optional."""
        weight, bias = self.precomputed or (self.weight, self.bias)
        return group_norm(
            x,
            self.num_groups,
            weight,
            bias,
            residual=residual,
            relu=relu,
            eps=self.eps,
            kernels=self.kernels,
        )

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.weight.numel()}"


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return relu(``norm``(x) + ``residual``), in one operation for batch and group norm.

    ``x`` may be overwritten.
    """
    if isinstance(norm, BatchNorm | GroupNorm):
        y: Tensor = norm(x, residual, relu=True)
        return y
    return add_and_relu(norm(x), residual, relu=True)


def norm_relu_pool(norm: nn.Module, x: Tensor, kernels: str) -> Tensor:
    """Return ``max_pool`` on ``kernels`` of ``norm_relu``, in one operation for batch norm."""
    if isinstance(norm, BatchNorm):
        y: Tensor = norm(x, relu=True, pool=True)
        return y
    return max_pool(norm_relu(norm, x), kernels=kernels)


@runtime_checkable
class _HasKernels(Protocol):
    """A module whose operations run on kernels of its choice."""

    kernels: str


def use_kernels(net: nn.Module, kernels: str) -> None:
    """Make the modules of ``net`` run on ``kernels``: auto, triton, cpu or reference.

    Raises ValueError for another word.
    """
    dispatch.check(kernels)
    for module in net.modules():
        if isinstance(module, _HasKernels):
            module.kernels = kernels


def share_statistics(net: nn.Module, gather: Gather) -> None:
    """Make the batch norms of ``net`` take their statistics over all ranks, by ``gather``."""
    for module in net.modules():
        if isinstance(module, BatchNorm | BatchRenorm):
            module.gather = gather


def join_views(net: nn.Module) -> None:
    """Make the batch norms of ``net`` take their statistics over a batch that is one view.

    Encoders of other libraries then take the batch at once.
    """
    for module in net.modules():
        if isinstance(module, BatchNorm | BatchRenorm | Adapter):
            module.num_views = 1


def num_groups(channels: int, most: int) -> int:
    """Return the largest divisor of ``channels`` up to ``most`` with two channels a group."""
    limit = min(most, max(1, channels // 2))
    return max(d for d in range(1, limit + 1) if channels % d == 0)


def make_norm(
    name: NormName | HeadNormName, channels: int, *, groups: int, num_views: int
) -> nn.Module:
    """Make the norm ``name`` for ``channels``: bn, brn, gn (at most ``groups``), ln or none."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "bn": lambda: BatchNorm(channels, num_views),
        "brn": lambda: BatchRenorm(channels, num_views),
        "gn": lambda: GroupNorm(num_groups(channels, groups), channels),
        "ln": lambda: GroupNorm(1, channels),
        "none": nn.Identity,
    }
    check_choice("norm", name, makers)
    return makers[name]()


def _check_views(x: Tensor, num_views: int) -> None:
    if len(x) % num_views:
        raise ValueError(
            f"a batch of {len(x)} cannot be split into {num_views} views of equal size"
        )
