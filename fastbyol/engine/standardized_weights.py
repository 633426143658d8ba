"""All standardized weights of a network, computed in one launch at the start of a step.

The layers (``model.standardizing``) take views of one flat copy, in the products' dtype. Their
gradients are copied to a second flat buffer, which another launch maps to the parameters' gradient.
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
    """The standardized weights of both networks, and the loss's gradient by all weights.

    ``leaves`` are the tensors that get a gradient, parameters or standardized weights; the
    ``.grad`` of each is a view of a flat buffer. ``gradient`` is the arena's, ``one`` a 0-d 1.
    """

    groups: tuple[_Group, ...]
    leaves: tuple[Tensor, ...]
    gradient: Tensor
    one: Tensor

    @staticmethod
    def of(
        online: nn.Module, target: nn.Module, arena: Arena, dtype: torch.dtype, kernels: str
    ) -> StandardizedWeights:
        """Group the layers of both networks in ``arena``; convolutions run in ``dtype``.

        Linear layers run in the parameters' dtype: a second launch where the two differ.
        """
        nets = ((online, arena.online, True), (target, arena.target, False))
        groups = tuple(
            group
            for net, flat, trained in nets
            for group in _groups(net, arena, flat, dtype, kernels, trained=trained)
            if kernels != "reference"  # there each layer standardizes its own weights
        )
        lent = {
            layer.weight: weight
            for group in groups
            for layer, weight in zip(group.layers, group.weights, strict=True)
        }
        leaves = tuple(lent.get(parameter, parameter) for parameter in online.parameters())
        return StandardizedWeights(groups, leaves, arena.gradient, arena.gradient.new_ones(()))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Compute the weights and lend them to the layers inside.

        Outside, each layer standardizes its own weight.
        """
        for group in self.groups:
            group.renew()
        self._lend(True)
        try:
            yield
        finally:
            self._lend(False)

    def differentiate(self, loss: Tensor) -> None:
        """Write the gradient of ``loss``, 0-d, to ``gradient``; zeros where it has none.

        The loss must have been computed inside ``in_use``.
        """
        gradients = torch.autograd.grad(loss, self.leaves, self.one, materialize_grads=True)
        with torch.no_grad():
            for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
                own = [i for i, gradient in enumerate(gradients) if gradient.dtype == dtype]
                # Copied once, where AccumulateGrad would add each to zeros in a launch of its own.
                torch._foreach_copy_(
                    [_home(self.leaves[i]) for i in own], [gradients[i] for i in own]
                )
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


def _home(leaf: Tensor) -> Tensor:
    """Return the part of a flat buffer that holds the gradient of ``leaf``."""
    assert leaf.grad is not None
    return leaf.grad
