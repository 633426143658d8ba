"""The weights that a step's products read where they are not the parameters, and their gradient.

Standardized weights of a network are computed in one launch at the start of a step. Weights of
convolutions in bf16 are rounded once, by the optimizer's sweep, instead of at every forward pass.
The layers (``model.standardizing``) take views of one flat copy, in the products' dtype. On Triton
an encoder's group norms have a gradient for each sample, and one launch sums those of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from fastbyol.model.norm import GroupNorm
from fastbyol.model.resnet import StemConv2d
from fastbyol.model.standardizing import Linear, Standardizing
from fastbyol.optim.arena import ALIGN_BYTES, Arena, Segment, padded
from fastbyol_kernels.group_norm import sum_samples, sum_table
from fastbyol_kernels.views.blocks import KERNEL_SHAPE, kernel_places
from fastbyol_kernels.weight_standardization import (
    Moved,
    RowTable,
    row_table,
    standardize_rows,
    standardize_rows_backward,
)


@dataclass(frozen=True)
class _Group:
    """The standardized layers of one network with products in one dtype, and their flat copy.

    ``copy`` and ``gradient`` (table.copy_numel,) have that dtype; the target has no ``gradient``.
    ``homes`` are the views of ``gradient`` that belong to the ``weights``, views of ``copy``.
    """

    layers: tuple[Standardizing, ...]
    weights: tuple[Tensor, ...]
    homes: tuple[Tensor, ...]
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
        blocks: bool,
    ) -> _Group:
        copied, end, moved = list[Segment](), 0, None
        for index, (layer, segment) in enumerate(zip(layers, segments, strict=True)):
            part = replace(segment, offset=end)
            if blocks and isinstance(layer, StemConv2d):
                shape = (segment.shape[0], *KERNEL_SHAPE)
                part = replace(part, numel=prod(shape), shape=shape)
                moved = Moved(index, kernel_places(), prod(KERNEL_SHAPE))
            copied.append(part)
            end = padded(end + part.numel, ALIGN_BYTES // dtype.itemsize)
        table = row_table(
            [s.offset for s in segments],
            [s.shape for s in segments],
            [s.offset for s in copied],
            flat_numel=len(flat),
            copy_numel=end,
            moved=moved,
            device=flat.device,
        )
        copy = flat.new_zeros(end, dtype=dtype)
        gradient = torch.zeros_like(copy) if trained else None
        weights = tuple(s.view(copy).detach().requires_grad_(trained) for s in copied)
        homes = () if gradient is None else tuple(s.view(gradient) for s in copied)
        means, stds = flat.new_zeros(2, len(table.rows)).unbind()
        return _Group(
            tuple(layers), weights, homes, flat, copy, gradient, means, stds, table, kernels
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
class _Rounded:
    """The convolutions of one network whose weights are only rounded, to the products' dtype.

    ``copy`` (L,) has that dtype and all of ``flat``, the network's buffer; ``weights`` are views of
    it, ``homes`` of the arena's gradient.
    """

    layers: tuple[Standardizing, ...]
    weights: tuple[Tensor, ...]
    homes: tuple[Tensor, ...]
    flat: Tensor
    copy: Tensor

    @staticmethod
    def of(
        layers: Sequence[Standardizing],
        segments: Sequence[Segment],
        flat: Tensor,
        gradient: Tensor,
        dtype: torch.dtype,
        *,
        trained: bool,
    ) -> _Rounded:
        copy = flat.to(dtype)
        weights = (segment.view(copy).detach().requires_grad_(trained) for segment in segments)
        homes = (segment.view(gradient) for segment in segments)
        return _Rounded(tuple(layers), tuple(weights), tuple(homes), flat, copy)


@dataclass(frozen=True)
class _Affine:
    """The group norms whose gradient comes sample by sample.

    ``parameters`` (C,) are each norm's weight and bias, ``names`` theirs; ``table`` says where in
    the arena's gradient their sums go.
    """

    layers: tuple[GroupNorm, ...]
    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    table: Tensor

    @staticmethod
    def of(online: nn.Module, arena: Arena) -> _Affine:
        norms = {
            name: module
            for name, module in online.named_modules()
            # Those of heads have no pixels to sum over.
            if isinstance(module, GroupNorm) and name.startswith("encoder.")
        }
        names = tuple(f"{name}.{part}" for name in norms for part in ("weight", "bias"))
        segments = {segment.name: segment for segment in arena.segments}
        parts = [segments[name] for name in names]
        parameters = tuple(part.view(arena.online).detach() for part in parts)
        offsets, numels = [part.offset for part in parts], [part.numel for part in parts]
        table = sum_table(offsets, numels, arena.online.device)
        return _Affine(tuple(norms.values()), names, parameters, table)

    def lend(self, num_samples: int) -> tuple[Tensor, ...]:
        leaves = tuple(p.expand(num_samples, -1).requires_grad_() for p in self.parameters)
        for layer, weight, bias in zip(self.layers, leaves[::2], leaves[1::2], strict=True):
            layer.precomputed = weight, bias
        return leaves


@dataclass(frozen=True)
class WorkingWeights:
    """The working weights of both networks, and the loss's gradient by all weights.

    ``leaves`` are the tensors that get a gradient, parameters or their working weights, ``homes``
    the parts of flat buffers that hold it; those of ``affine`` come on top. ``gradient`` is the
    arena's, ``start`` a 0-d 1 or None, the loss's own gradient.
    """

    groups: tuple[_Group, ...]
    rounded: tuple[_Rounded, ...]
    affine: _Affine | None
    leaves: tuple[Tensor, ...]
    homes: tuple[Tensor, ...]
    gradient: Tensor
    start: Tensor | None

    @staticmethod
    def of(
        online: nn.Module,
        target: nn.Module,
        arena: Arena,
        dtype: torch.dtype,
        kernels: str,
        *,
        blocks: bool = False,
    ) -> WorkingWeights:
        """Group the layers of both networks in ``arena``; convolutions run in ``dtype``.

        Linear layers run in the parameters' dtype: a second launch where the two differ. With
        kernels "reference" each layer standardizes and rounds its own weight. With ``blocks``, on
        Triton, the stem's standardized weight is written as views in blocks need it.
        """
        groups, rounded = list[_Group](), list[_Rounded]()
        homes = arena.named(arena.gradient)
        pairs: dict[str, tuple[Tensor, Tensor]] = {
            name: (p, homes[name]) for name, p in online.named_parameters()
        }
        nets = ((online, arena.online, True), (target, arena.target, False))
        for net, flat, trained in nets if kernels != "reference" else ():
            for (ws, own), (layers, segments) in _kinds(net, arena, flat.dtype, dtype).items():
                part: _Group | _Rounded
                if ws:
                    part = _Group.of(
                        layers, segments, flat, own, kernels, trained=trained, blocks=blocks
                    )
                    groups.append(part)
                elif own != flat.dtype:
                    part = _Rounded.of(layers, segments, flat, arena.gradient, own, trained=trained)
                    rounded.append(part)
                else:
                    continue
                if trained:
                    names = (segment.name for segment in segments)
                    pairs |= zip(names, zip(part.weights, part.homes, strict=True), strict=True)
        affine = _Affine.of(online, arena) if kernels == "triton" else None
        for name in () if affine is None else affine.names:
            del pairs[name]
        leaves, of_leaves = zip(*pairs.values(), strict=True)
        # Without it autograd fills one, in a launch; with it torch imports sympy, for nothing on a
        # CPU.
        start = arena.gradient.new_ones(()) if kernels == "triton" else None
        return WorkingWeights(
            tuple(groups), tuple(rounded), affine, leaves, of_leaves, arena.gradient, start
        )

    @property
    def rounded_copies(self) -> tuple[Tensor | None, Tensor | None]:
        """The flat copies of the online and the target network that the optimizer's sweep writes.

        None where no layer reads them.
        """
        online, target = (part.copy for part in self.rounded) if self.rounded else (None, None)
        return online, target

    @torch.no_grad()
    def renew(self) -> None:
        """Round the weights again, after anything but a step has written them."""
        for part in self.rounded:
            part.copy.copy_(part.flat)

    @contextmanager
    def in_use(self, num_samples: int) -> Iterator[tuple[Tensor, ...]]:
        """Standardize the weights and lend all working weights to the layers inside.

        They work on ``num_samples`` images. Outside, each layer computes its own. Yields all
        tensors that get a gradient, for ``differentiate``.
        """
        for group in self.groups:
            group.renew()
        self._lend(True)
        try:
            of_samples = () if self.affine is None else self.affine.lend(num_samples)
            yield *self.leaves, *of_samples
        finally:
            self._lend(False)

    def differentiate(self, loss: Tensor, leaves: tuple[Tensor, ...]) -> None:
        """Write the gradient of ``loss``, 0-d, to ``gradient``; zeros where it has none.

        The loss must have been computed inside the ``in_use`` that yielded ``leaves``.
        """
        gradients = torch.autograd.grad(loss, leaves, self.start, materialize_grads=True)
        with torch.no_grad():
            # Copied at once, where AccumulateGrad would add each to zeros in a launch of its own.
            # On a GPU a launch has one dtype on each side (ForeachBinaryOpList.cu of ATen).
            kinds: dict[tuple[torch.dtype, ...], list[tuple[Tensor, Tensor]]] = {}
            for pair in zip(self.homes, gradients[: len(self.homes)], strict=True):
                kinds.setdefault((pair[0].dtype, pair[1].dtype), []).append(pair)
            for pairs in kinds.values():
                torch._foreach_copy_([home for home, _ in pairs], [grad for _, grad in pairs])
            if self.affine is not None and self.affine.layers:
                sum_samples(gradients[len(self.homes) :], self.gradient, self.affine.table)
        for group in self.groups:
            group.write_gradient(self.gradient)

    def _lend(self, lent: bool) -> None:
        parts: tuple[_Group | _Rounded, ...] = (*self.groups, *self.rounded)
        for part in parts:
            for layer, weight in zip(part.layers, part.weights, strict=True):
                layer.precomputed = weight if lent else None
        if self.affine is not None and not lent:
            for norm in self.affine.layers:
                norm.precomputed = None


def _kinds(
    net: nn.Module, arena: Arena, own: torch.dtype, dtype: torch.dtype
) -> dict[tuple[bool, torch.dtype], tuple[list[Standardizing], list[Segment]]]:
    """Group the layers of ``net`` and their segments by whether they standardize, and by dtype.

    Linear layers multiply in the parameters' ``own`` dtype, convolutions in ``dtype``.
    """
    segments = {segment.name: segment for segment in arena.segments}
    kinds: dict[tuple[bool, torch.dtype], tuple[list[Standardizing], list[Segment]]] = {}
    for name, module in net.named_modules():
        if isinstance(module, Standardizing):
            key = module.ws, own if isinstance(module, Linear) else dtype
            layers, parts = kinds.setdefault(key, ([], []))
            layers.append(module)
            parts.append(segments[f"{name}.weight"])
    return kinds
