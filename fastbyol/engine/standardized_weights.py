"""All standardized weights of a network, computed in one launch at the start of a step.

The layers (``model.standardizing``) take views of one flat copy, in the products' dtype. Their
gradients gather in a second flat buffer, which another launch maps to the parameters' gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastbyol.model.standardizing import Linear, Standardizing
from fastbyol.optim.arena import ALIGN_BYTES, Arena, Segment, padded
from fastbyol_kernels.weight_standardization import (
    RowTable,
    row_table,
    standardize_rows,
    standardize_rows_backward,
)


@dataclass(frozen=True)
class _Group:
    """The standardized layers of one network with products in one dtype, and their flat copy.

    ``copy`` and ``gradient`` (table.copy_numel,) have that dtype; the target has no ``gradient``.
    """

    layers: tuple[Standardizing, ...]
    weights: tuple[Tensor, ...]
    flat: Tensor
    copy: Tensor
    gradient: Tensor | None
    means: Tensor
    stds: Tensor
    table: RowTable
    kernels: str

    @staticmethod
    def of(
        layers: Sequence[Standardizing],
        segments: Sequence[Segment],
        flat: Tensor,
        dtype: torch.dtype,
        kernels: str,
        *,
        trained: bool,
    ) -> _Group:
        offsets = [0]
        for segment in segments:
            offsets.append(padded(offsets[-1] + segment.numel, ALIGN_BYTES // dtype.itemsize))
        table = row_table(
            [s.offset for s in segments],
            [s.shape for s in segments],
            offsets[:-1],
            flat_numel=len(flat),
            copy_numel=offsets[-1],
            device=flat.device,
        )
        copy = flat.new_zeros(offsets[-1], dtype=dtype)
        gradient = torch.zeros_like(copy) if trained else None
        weights = []
        for segment, offset in zip(segments, offsets, strict=False):
            moved = replace(segment, offset=offset)
            weight = moved.view(copy).detach()
            if gradient is not None:
                weight.requires_grad_().grad = moved.view(gradient)
            weights.append(weight)
        means, stds = flat.new_zeros(2, len(table.rows)).unbind()
        return _Group(
            tuple(layers), tuple(weights), flat, copy, gradient, means, stds, table, kernels
        )

    @torch.no_grad()
    def renew(self) -> None:
        standardize_rows(
            self.copy, self.means, self.stds, self.flat, self.table, kernels=self.kernels
        )
        if self.gradient is not None:
            self.gradient.zero_()

    @torch.no_grad()
    def write_gradient(self, out: Tensor) -> None:
        if self.gradient is not None:
            standardize_rows_backward(
                out,
                self.gradient,
                self.flat,
                self.means,
                self.stds,
                self.table,
                kernels=self.kernels,
            )


@dataclass(frozen=True)
class StandardizedWeights:
    """The standardized weights of both networks; ``gradient`` is the arena's."""

    groups: tuple[_Group, ...]
    gradient: Tensor

    @staticmethod
    def of(
        online: nn.Module, target: nn.Module, arena: Arena, dtype: torch.dtype, kernels: str
    ) -> StandardizedWeights:
        """Group the layers of both networks in ``arena``; convolutions run in ``dtype``.

        Linear layers run in the parameters' dtype: a second launch where the two differ.
        """
        if kernels == "reference":  # each layer standardizes its own weights in plain torch
            return StandardizedWeights((), arena.gradient)
        nets = ((online, arena.online, True), (target, arena.target, False))
        groups = (
            group
            for net, flat, trained in nets
            for group in _groups(net, arena, flat, dtype, kernels, trained=trained)
        )
        return StandardizedWeights(tuple(groups), arena.gradient)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Compute the weights and lend them to the layers inside; then write ``gradient``.

        Outside, each layer standardizes its own weight.
        """
        for group in self.groups:
            group.renew()
        self._lend(True)
        try:
            yield
        finally:
            self._lend(False)
        for group in self.groups:
            group.write_gradient(self.gradient)

    def _lend(self, lent: bool) -> None:
        for group in self.groups:
            for layer, weight in zip(group.layers, group.weights, strict=True):
                layer.precomputed = weight if lent else None


def _groups(
    net: nn.Module, arena: Arena, flat: Tensor, dtype: torch.dtype, kernels: str, *, trained: bool
) -> Iterator[_Group]:
    segments = {segment.name: segment for segment in arena.segments}
    layers = {
        f"{name}.weight": module
        for name, module in net.named_modules()
        if isinstance(module, Standardizing) and module.ws
    }
    of = {
        name: flat.dtype if isinstance(layer, Linear) else dtype for name, layer in layers.items()
    }
    for own in dict.fromkeys(of.values()):
        names = [name for name in layers if of[name] == own]
        yield _Group.of(
            [layers[n] for n in names],
            [segments[n] for n in names],
            flat,
            own,
            kernels,
            trained=trained,
        )
