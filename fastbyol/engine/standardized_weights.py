"""All standardized weights of a network, made in one launch at a step's start instead of one by one in the forward passes.

The layers take views of one flat copy. Those of the online network are leaves of autograd whose gradients gather in a second
flat buffer; one more launch takes that back to the parameters' gradient. The kernels of a GPU and of a CPU work so, and
write the copy in the products' dtype at once; in plain torch each layer standardizes its own weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastbyol.model.standardizing import Linear, Standardizing
from fastbyol.optim.arena import ALIGN_BYTES, Arena, Segment, padded
from fastbyol_kernels.weight_standardization import RowTable, row_table, standardize_rows, standardize_rows_backward


@dataclass(frozen=True)
class _Group:
    """The layers of one network whose products are in one dtype, and their weights' place in the flat copy.

    ``copy`` and ``gradient`` (table.copy_numel,) are in that dtype; ``gradient`` is None for a network that takes none.
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
        places = [0]
        for segment in segments:
            places.append(padded(places[-1] + segment.numel, ALIGN_BYTES // dtype.itemsize))
        table = row_table(
            [s.offset for s in segments],
            [s.shape for s in segments],
            places[:-1],
            flat_numel=len(flat),
            copy_numel=places[-1],
            device=flat.device,
        )
        copy = flat.new_zeros(places[-1], dtype=dtype)
        gradient = torch.zeros_like(copy) if trained else None
        weights = []
        for segment, place in zip(segments, places, strict=False):
            moved = replace(segment, offset=place)
            weight = moved.view(copy).detach()
            if gradient is not None:
                weight.requires_grad_().grad = moved.view(gradient)
            weights.append(weight)
        means, stds = flat.new_zeros(2, len(table.rows)).unbind()
        return _Group(tuple(layers), tuple(weights), flat, copy, gradient, means, stds, table, kernels)

    @torch.no_grad()
    def renew(self) -> None:
        standardize_rows(self.copy, self.means, self.stds, self.flat, self.table, kernels=self.kernels)
        if self.gradient is not None:
            self.gradient.zero_()

    @torch.no_grad()
    def write_gradient(self, out: Tensor) -> None:
        if self.gradient is not None:
            standardize_rows_backward(out, self.gradient, self.flat, self.means, self.stds, self.table, kernels=self.kernels)


@dataclass(frozen=True)
class StandardizedWeights:
    """The standardized weights of both networks; ``gradient`` is the arena's. Without groups it does nothing."""

    groups: tuple[_Group, ...]
    gradient: Tensor

    @staticmethod
    def of(online: nn.Module, target: nn.Module, arena: Arena, dtype: torch.dtype, kernels: str) -> StandardizedWeights:
        """For networks in ``arena`` whose convolutions run in ``dtype`` and whose linear layers in the parameters'.

        A launch each way per network, two where the two dtypes differ and linear layers are standardized, too.
        """
        if kernels == "reference":
            return StandardizedWeights((), arena.gradient)
        nets = ((online, arena.online, True), (target, arena.target, False))
        groups = (group for net, flat, trained in nets for group in _groups(net, arena, flat, dtype, kernels, trained=trained))
        return StandardizedWeights(tuple(groups), arena.gradient)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the weights anew and let the layers take them; what runs backward inside reaches the arena's gradient on
        leaving. Outside, the layers standardize their own."""
        for group in self.groups:
            group.renew()
        self._give(True)
        try:
            yield
        finally:
            self._give(False)
        for group in self.groups:
            group.write_gradient(self.gradient)

    def _give(self, given: bool) -> None:
        for group in self.groups:
            for layer, weight in zip(group.layers, group.weights, strict=True):
                layer.precomputed = weight if given else None


def _groups(net: nn.Module, arena: Arena, flat: Tensor, dtype: torch.dtype, kernels: str, *, trained: bool) -> Iterator[_Group]:
    segments = {segment.name: segment for segment in arena.segments}
    layers = {
        f"{name}.weight": module for name, module in net.named_modules() if isinstance(module, Standardizing) and module.ws
    }
    of = {name: flat.dtype if isinstance(layer, Linear) else dtype for name, layer in layers.items()}
    for own in dict.fromkeys(of.values()):
        names = [name for name in layers if of[name] == own]
        yield _Group.of([layers[n] for n in names], [segments[n] for n in names], flat, own, kernels, trained=trained)
