"""Norms that read their gradient in two parts, as traced for torch.compile, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from fastbyol.engine.addends import Addends
from fastbyol.model.norm import BatchNorm, GroupNorm, norm_relu, norm_relu_pool, use_kernels
from fastbyol_kernels.group_norm import triton as group_norm_on_gpu

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS = 8


class Blocks(nn.Module):
    """A stem that pools, and two residual blocks, of ``norms`` and 3x3 convolutions."""

    def __init__(self, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(make_norm() for _ in range(5))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in range(5)
        )
        self.kernels = "reference"
        g = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.2, 0.3, generator=g)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_relu_pool(self.norms[0], self.convolutions[0](x), self.kernels)
        for first in (1, 3):
            inner = norm_relu(self.norms[first], self.convolutions[first](h))
            h = norm_relu(self.norms[first + 1], self.convolutions[first + 1](inner), h)
        return h.mean((2, 3)).square().sum()


def additions(graph: fx.Graph) -> int:
    """Count the sums of two images' gradients."""
    return sum(
        node.meta["val"].ndim == 4
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    )


def gradients(net: nn.Module, x: Tensor) -> tuple[list[Tensor], list[int]]:
    """Return the gradients of ``net``'s parameters, and the additions in each graph as traced and
    as the pass leaves it.
    """
    counts: list[int] = []

    def compiler(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        counts.append(additions(module.graph))
        Addends()(module.graph)
        module.graph.lint()
        module.recompile()
        counts.append(additions(module.graph))
        boxed: Callable[..., Any] = make_boxed_func(module.forward)
        return boxed

    compiled = torch.compile(net, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    return list(torch.autograd.grad(compiled(x), list(net.parameters()))), counts


@pytest.mark.parametrize(("norm", "cut"), [("gn", False), ("gn", True), ("bn", False)])
def test_gradients_in_two_parts_are_those_of_the_sum(
    norm: str, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both blocks and of the stem; where group norm cuts samples into runs, of those, too."""
    if cut:
        monkeypatch.setattr(group_norm_on_gpu, "MAX_BYTES_BACKWARD", 0)
        monkeypatch.setattr(group_norm_on_gpu, "RUN_BYTES", 300)
    net = Blocks(lambda: GroupNorm(2, CHANNELS) if norm == "gn" else BatchNorm(CHANNELS, 2))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, CHANNELS, 5, 4, generator=g).contiguous(memory_format=torch.channels_last)
    use_kernels(net, "reference")
    exact = torch.autograd.grad(net.double()(x.double()), list(net.parameters()))
    net.float().to(DEVICE)
    use_kernels(net, "triton")
    got, counts = gradients(net, x.to(DEVICE))
    assert counts == [0, 0, 2, 0]
    for mine, truth in zip(got, exact, strict=True):
        # Ten roundings of fp32, of the largest term.
        size = 1e-5 * float(truth.abs().max())
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=1e-5, atol=size)


def test_a_sum_that_others_read_or_whose_parts_are_not_alike_is_left_alone() -> None:
    """Another reader, a number, a broadcast part, a factor, and memory in another order."""
    pool = torch.ops.fastbyol.max_pool_backward.default

    def left(**changed: Any) -> bool:
        graph = fx.Graph()
        one, other, taps = (graph.placeholder(name) for name in ("one", "other", "taps"))
        value = torch.empty(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        one.meta["val"], other.meta["val"] = value, changed.get("value", value)
        parts = (one, changed.get("part", other))
        add = torch.ops.aten.add.Tensor
        total = graph.call_function(add, parts, {"alpha": 2} if "alpha" in changed else {})
        total.meta["val"] = value
        results = [graph.call_function(pool, (total, taps, 6, 6))]
        results += [total] if "read" in changed else []
        graph.output(tuple(results))
        Addends()(graph)
        graph.lint()
        return bool(graph.find_nodes(op="call_function", target=add))

    assert not left()
    plain = torch.empty(2, 4, 3, 3)
    for changed in (
        {"read": True}, {"part": 1.0}, {"value": plain[:, :1]}, {"value": plain}, {"alpha": 2},
        {"value": plain.bfloat16().contiguous(memory_format=torch.channels_last)},
    ):  # fmt: skip
        assert left(**changed), changed
