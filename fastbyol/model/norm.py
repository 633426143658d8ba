"""Normalisation layers: batch norm with statistics per view, batch renormalisation, group norm; and which one a name means.

Statistics and affine parameters are fp32 (fp64 in fp64 runs) whatever the activations' dtype.

Letters: V views, B images, N = V * B, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbyol.config import HeadNormName, NormName
from fastbyol_kernels.group_norm import group_norm

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """Batch norm over (N, C) or (N, C, H, W) whose training statistics are those of each view alone.

    In train mode the batch is ``num_views`` equal consecutive chunks. Each is normalised by its own statistics and the running
    buffers take one update per chunk, in order: bit for bit what ``num_views`` separate passes through ``nn.BatchNorm2d`` give.
    In eval mode the running buffers normalise the whole batch. Constants are torch's defaults (eps 1e-5, momentum 0.1).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, num_views: int) -> None:
        super().__init__()
        self.num_views = num_views
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        running = (self.running_mean, self.running_var)
        if not self.training:
            return F.batch_norm(x, *running, self.weight, self.bias, False, 0.0, BATCH_NORM_EPS)
        _check_views(x, self.num_views)
        self.num_batches_tracked.add_(self.num_views)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            y: Tensor = _BatchNormOfViews.apply(x, self.weight, self.bias, *running, self.num_views)
            return y
        return torch.cat(
            [
                F.batch_norm(chunk, *running, self.weight, self.bias, True, BATCH_NORM_MOMENTUM, BATCH_NORM_EPS)
                for chunk in x.chunk(self.num_views)
            ]
        )

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, num_views={self.num_views}"


class _BatchNormOfViews(torch.autograd.Function):
    """torch's batch norm kernel on each chunk, written straight into its part of one output.

    Saves the copy of a ``torch.cat``, a quarter of the forward's time on a CPU (16 channels of 32x32, 256 samples: 2.6 instead
    of 3.4 ms on one core). Compiled code fuses the copy away, and so takes the plain expression.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, num_views: int) -> Tensor:
        y = torch.empty_like(x)
        saved_mean, saved_invstd = weight.new_empty(2, num_views, weight.numel()).unbind()
        for v, (chunk, out) in enumerate(zip(x.chunk(num_views), y.chunk(num_views), strict=True)):
            torch.ops.aten.native_batch_norm.out(
                chunk, weight, bias, mean, var, True, BATCH_NORM_MOMENTUM, BATCH_NORM_EPS,
                out=out, save_mean=saved_mean[v], save_invstd=saved_invstd[v],
            )  # fmt: skip
        ctx.save_for_backward(x, weight, saved_mean, saved_invstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved_mean, saved_invstd = ctx.saved_tensors
        num_views = len(saved_mean)
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                grad, chunk, weight, None, None, saved_mean[v], saved_invstd[v], True, BATCH_NORM_EPS, [True] * 3
            )
            for v, (grad, chunk) in enumerate(zip(grads[0].chunk(num_views), x.chunk(num_views), strict=True))
        ]
        dx, dweight, dbias = zip(*parts, strict=True)
        return torch.cat(dx), torch.stack(dweight).sum(0), torch.stack(dbias).sum(0), None, None, None


class BatchRenorm(nn.Module):
    """Batch renormalisation over (N, C), per view and in order as ``BatchNorm``.

    In train mode y = ((x - mean) / std * r + d) * weight + bias with the batch's mean and std = sqrt(biased variance) + eps,
    r = clamp(std / running_std, 1/rmax, rmax) and d = clamp((mean - running_mean) / running_std, -dmax, dmax), both constant to
    the gradient; then the running buffers move by ``momentum``. In eval mode they normalise.

    Source: Ioffe, "Batch Renormalization", arXiv:1702.03275. Constants, the ramps of rmax (1 to 3 between batches 5,000 and
    40,000) and dmax (0 to 5 between 5,000 and 25,000), and the running std in place of a variance, are the post's code's.
    """

    EPS = 1e-3
    MOMENTUM = 0.01

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, num_views: int) -> None:
        super().__init__()
        self.num_views = num_views
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            _check_views(x, self.num_views)
            normalised = torch.cat([self._train_chunk(chunk) for chunk in x.chunk(self.num_views)])
        else:
            normalised = (x - self.running_mean) / self.running_std
        return normalised * self.weight + self.bias

    def _train_chunk(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, dim=0, correction=0)
        std = std + self.EPS
        r, d = self._corrections(mean.detach(), std.detach())
        self.running_mean.lerp_(mean.detach(), self.MOMENTUM)
        self.running_std.lerp_(std.detach(), self.MOMENTUM)
        self.num_batches_tracked.add_(1)
        return (x - mean) / std * r + d

    def _corrections(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        k = self.num_batches_tracked.to(std.dtype)
        rmax = (2 / 35000 * k + 25 / 35).clamp(1.0, 3.0)
        dmax = (5 / 20000 * k - 25 / 20).clamp(0.0, 5.0)
        r = (std / self.running_std).clamp(1 / rmax, rmax)
        d = ((mean - self.running_mean) / self.running_std).clamp(-dmax, dmax)
        return r, d


class GroupNorm(nn.Module):
    """Group norm over (N, C) or (N, C, H, W), eps 1e-5. One group is layer norm over all but N.

    ``kernels`` is what ``fastbyol_kernels.group_norm`` takes; ``use_kernels`` sets it.
    """

    def __init__(self, num_groups: int, num_channels: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.kernels = "auto"
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """relu(group norm of ``x`` + ``residual``), either of the two optional, in one operation."""
        return group_norm(x, self.num_groups, self.weight, self.bias, residual=residual, relu=relu, kernels=self.kernels)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.weight.numel()}"


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(``norm``(x) + ``residual``) of a fresh ``x`` that nobody else keeps; one operation where ``norm`` is group norm."""
    if isinstance(norm, GroupNorm):
        y: Tensor = norm(x, residual, relu=True)
        return y
    y = norm(x)
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True)


def use_kernels(net: nn.Module, kernels: str) -> None:
    """Let every group norm in ``net`` run on ``kernels``: auto, triton or reference."""
    for module in net.modules():
        if isinstance(module, GroupNorm):
            module.kernels = kernels


def num_groups(channels: int, most: int) -> int:
    """Groups for ``channels``: the largest divisor that is at most ``most`` and leaves two channels or more to a group."""
    limit = min(most, max(1, channels // 2))
    return max(d for d in range(1, limit + 1) if channels % d == 0)


def make_norm(name: NormName | HeadNormName, channels: int, *, groups: int, num_views: int) -> nn.Module:
    """The layer that ``name`` means for ``channels``: bn, brn, gn (``groups`` at most), ln (one group), none (identity)."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "bn": lambda: BatchNorm(channels, num_views),
        "brn": lambda: BatchRenorm(channels, num_views),
        "gn": lambda: GroupNorm(num_groups(channels, groups), channels),
        "ln": lambda: GroupNorm(1, channels),
        "none": nn.Identity,
    }
    return makers[name]()


def _check_views(x: Tensor, num_views: int) -> None:
    if len(x) % num_views:
        raise ValueError(f"a batch of {len(x)} cannot be split into {num_views} views of equal size")
