"""The flat buffers: layout as a property, and what moving a network into them must keep."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastbyol.optim.arena import Arena, Segment, padded, plan
from fastbyol.optim.lars import Treatment

PLAIN = Treatment(adapt=False, decay=True, lr_mult=1.0)
SHAPES = st.lists(
    st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple), min_size=1, max_size=12
)


@given(SHAPES, st.sampled_from([4, 8]), st.data())
def test_segments_are_aligned_disjoint_and_in_order(
    shapes: list[tuple[int, ...]], element_bytes: int, data: st.DataObject
) -> None:
    num_target = data.draw(st.integers(1, len(shapes)))
    segments = plan(
        {f"p{i}": s for i, s in enumerate(shapes)}, [PLAIN] * len(shapes), num_target, element_bytes
    )
    end = 0
    for index, (segment, shape) in enumerate(zip(segments, shapes, strict=True)):
        assert segment.name == f"p{index}"
        assert segment.numel == prod(shape)
        assert segment.offset * element_bytes % 256 == 0
        assert end <= segment.offset < end + 256 // element_bytes
        assert segment.target == (index if index < num_target else None)
        end = segment.offset + segment.numel


@given(SHAPES)
def test_views_cover_their_segment_once_and_nothing_else(shapes: list[tuple[int, ...]]) -> None:
    segments = plan({f"p{i}": s for i, s in enumerate(shapes)}, [PLAIN] * len(shapes), 1, 4)
    buffer = torch.zeros(padded(segments[-1].offset + segments[-1].numel, 64))
    for segment in segments:
        view = segment.view(buffer)
        assert view.shape == segment.shape
        view += 1
        assert view.ndim != 4 or view.is_contiguous(memory_format=torch.channels_last)
    inside = torch.zeros_like(buffer)
    for segment in segments:
        inside[segment.offset : segment.offset + segment.numel] = 1
    assert torch.equal(buffer, inside)


@given(st.integers(0, 10**9), st.integers(1, 512))
def test_padding(count: int, align: int) -> None:
    assert padded(count, align) % align == 0
    assert 0 <= padded(count, align) - count < align


class Pair(nn.Module):
    def __init__(self, *, with_last: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        if with_last:
            self.last = nn.Linear(7, 2)


def adopt() -> tuple[Pair, Pair, Arena, dict[str, torch.Tensor]]:
    online, target = Pair(), Pair(with_last=False).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in online.named_parameters()}
    treatments = [PLAIN] * 3 + [Treatment(adapt=True, decay=False, lr_mult=2.0)] * 3
    return online, target, Arena.adopt(online, target, treatments, weight_decay=0.5), before


def test_parameters_keep_their_values_and_become_views() -> None:
    online, target, arena, before = adopt()
    for name, p in online.named_parameters():
        assert torch.equal(p, before[name]), name
    for name, p in target.named_parameters():
        assert torch.equal(p, before[name]), name
    arena.online.fill_(3.0)
    arena.target.fill_(4.0)
    assert all((p == 3.0).all() for p in online.parameters())
    assert all((p == 4.0).all() for p in target.parameters())
    assert online.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert len(arena.target) < len(arena.online)
    assert not any(
        b.requires_grad for b in (arena.online, arena.gradient, arena.momentum, arena.target)
    )


def test_backward_adds_into_the_gradient_buffer() -> None:
    online, _, arena, _ = adopt()
    grads = [p.grad for p in online.parameters()]
    x = torch.randn(2, 3, 6, 6)
    expected = torch.autograd.grad(
        online.norm(online.conv(x)).square().sum(), (online.conv.weight, online.norm.weight)
    )
    for times in (1.0, 2.0):
        online.norm(online.conv(x)).square().sum().backward()
        for name, g in zip(("conv.weight", "norm.weight"), expected, strict=True):
            torch.testing.assert_close(
                arena.named(arena.gradient)[name], times * g, rtol=1e-5, atol=1e-5
            )
    assert all(a is b for a, b in zip(grads, (p.grad for p in online.parameters()), strict=True))


def test_the_kernels_table_and_named_views_are_the_segments() -> None:
    online, target, arena, _ = adopt()
    table = arena.table
    assert table.offsets == tuple(s.offset for s in arena.segments)
    assert table.numels == tuple(s.numel for s in arena.segments)
    assert table.adapt.tolist() == [False] * 3 + [True] * 3
    assert table.decay.tolist() == [0.5] * 3 + [0.0] * 3
    assert table.lr_mult.tolist() == [1.0] * 3 + [2.0] * 3
    assert arena.segments[0] == Segment("conv.weight", 0, 135, (5, 3, 3, 3), False, True, 1.0, 0)
    assert [s.target for s in arena.segments] == [0, 1, 2, 3, None, None]
    assert list(arena.named(arena.momentum)) == [n for n, _ in online.named_parameters()]
    assert list(arena.named(arena.target)) == [n for n, _ in target.named_parameters()]


def test_a_target_that_is_no_part_of_the_online_network_is_refused() -> None:
    with pytest.raises(ValueError, match="not the first"):
        Arena.adopt(Pair(with_last=False), Pair(), [PLAIN] * 4, weight_decay=0.0)
