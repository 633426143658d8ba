"""All parameters in flat buffers: online weights, gradient, momentum and target.

The modules' parameters and their ``.grad`` are views into the buffers, so one operation over a
buffer reaches them all. Buffers of norm layers stay in their modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fastbyol.optim.lars import Treatment
from fastbyol_kernels.lars_ema import SegmentTable

# Vector loads and compiled kernels assume aligned pointers; CUDA's own allocator aligns to 256.
ALIGN_BYTES = 256


@dataclass(frozen=True)
class Segment:
    """One parameter's offset and treatment, in elements.

    ``target`` is the index of the target's segment of that name; the predictor's have None.
    """

    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]
    adapt: bool
    decay: bool
    lr_mult: float
    target: int | None

    def view(self, buffer: Tensor) -> Tensor:
        """View this segment of a flat ``buffer`` in the parameter's shape."""
        flat = buffer.narrow(0, self.offset, self.numel)
        if len(self.shape) != 4:
            return flat.view(self.shape)
        o, i, kh, kw = self.shape  # stored as (O, kh, kw, I): a channels-last tensor
        return flat.view(o, kh, kw, i).permute(0, 3, 1, 2)


def plan(
    shapes: Mapping[str, Sequence[int]],
    treatments: Sequence[Treatment],
    num_target: int,
    element_bytes: int,
) -> tuple[Segment, ...]:
    """Lay parameters out one after the other, each at a multiple of 256 bytes.

    The first ``num_target`` are also the target's, at the same offsets.
    """
    align, offset, segments = ALIGN_BYTES // element_bytes, 0, []
    for index, ((name, shape), treatment) in enumerate(
        zip(shapes.items(), treatments, strict=True)
    ):
        numel = prod(shape)
        target = index if index < num_target else None
        segments.append(Segment(name, offset, numel, tuple(shape), *treatment, target))
        offset = padded(offset + numel, align)
    return tuple(segments)


def padded(count: int, align: int) -> int:
    """Round ``count`` up to a multiple of ``align``."""
    return -(-count // align) * align


def _end(segment: Segment, like: Tensor) -> int:
    return padded(segment.offset + segment.numel, ALIGN_BYTES // like.element_size())


@dataclass(frozen=True)
class Arena:
    """The flat buffers (zeros between segments), their segments and the kernel's segment table."""

    online: Tensor
    gradient: Tensor
    momentum: Tensor
    target: Tensor
    segments: tuple[Segment, ...]
    table: SegmentTable

    @staticmethod
    def adopt(
        online: nn.Module,
        target: nn.Module,
        treatments: Sequence[Treatment],
        *,
        weight_decay: float,
        tail: int = 0,
    ) -> Arena:
        """Move both networks' parameters into new buffers; the target starts as the online one.

        ``gradient`` has room for ``tail`` more elements behind it, which are sent along with it.
        ``target``'s parameters must be the first of ``online``'s, by name and shape, in order;
        raises ValueError otherwise.
        """
        parameters, followers = dict(online.named_parameters()), dict(target.named_parameters())
        first = next(iter(parameters.values()))
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        if list(shapes.items())[: len(followers)] != [
            (name, tuple(p.shape)) for name, p in followers.items()
        ]:
            raise ValueError(
                "the target network's parameters are not the first of the online network's"
            )
        segments = plan(shapes, treatments, len(followers), first.element_size())
        end, target_end = _end(segments[-1], first), _end(segments[len(followers) - 1], first)
        arena = Arena(
            online=first.new_zeros(end, requires_grad=False),
            gradient=first.new_zeros(end + tail, requires_grad=False)[:end],
            momentum=first.new_zeros(end, requires_grad=False),
            target=first.new_zeros(target_end, requires_grad=False),
            segments=segments,
            table=segment_table(segments, weight_decay, first),
        )
        arena._bind(parameters, followers)
        return arena

    @torch.no_grad()
    def _bind(
        self, parameters: Mapping[str, nn.Parameter], followers: Mapping[str, nn.Parameter]
    ) -> None:
        for segment in self.segments:
            parameter, home = parameters[segment.name], segment.view(self.online)
            home.copy_(parameter)
            parameter.data = home
            # Set once: the backward pass adds to an existing gradient in place.
            parameter.grad = segment.view(self.gradient)
            if segment.target is not None:
                followers[segment.name].data = segment.view(self.target)
        self.target.copy_(self.online[: len(self.target)])

    def named(self, buffer: Tensor) -> dict[str, Tensor]:
        """View one of the flat buffers as tensors by parameter name, in the parameters' shapes."""
        return {s.name: s.view(buffer) for s in self.segments if s.offset + s.numel <= len(buffer)}


def segment_table(segments: Sequence[Segment], weight_decay: float, like: Tensor) -> SegmentTable:
    """Make the kernel's table of ``segments``, on the device and in the dtype of ``like``."""
    return SegmentTable(
        offsets=tuple(s.offset for s in segments),
        numels=tuple(s.numel for s in segments),
        adapt=torch.tensor([s.adapt for s in segments], device=like.device),
        decay=like.new_tensor([weight_decay if s.decay else 0.0 for s in segments]),
        lr_mult=like.new_tensor([s.lr_mult for s in segments]),
    )
