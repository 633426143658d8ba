"""The nodes of a CUDA graph against numbers counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from compiled_process import printed
from fastbyol import load_config
from fastbyol.engine.step import TrainState, train_step
from fastbyol.model.standardizing import Standardizing
from fastbyol_bench.graph_nodes import (
    ADD,
    AUTOGRAD,
    COPY,
    FILL,
    OTHER,
    Node,
    NodeCounter,
    foreach_launches,
    leaves,
    stand_in,
)

SMALL = ["model.width=8", "model.projector.hidden=16", "model.projector.out=8",
"model.predictor.hidden=16",
         "model.predictor.out=8", "train.precision=fp32", "views.size=32"]  # fmt: skip


def by_kind(nodes: Counter[Node]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for node, count in nodes.items():
        kinds[node.kind] += count
    return dict(kinds)


def test_only_operations_that_launch_are_counted() -> None:
    x = torch.randn(4, 6)
    with NodeCounter() as counter:
        y = (
            x.t()[1:].reshape(2, 10)[:, 2:5].unsqueeze(0).expand(3, -1, -1)
        )  # views, of which reshape copies: 1 copy
        y = y.to(torch.float64).detach()  # 1 copy
        torch.empty(3).new_empty(2).zero_().fill_(1.0)  # 2 fills
        torch.add(y, 1.0)  # 1 add
        torch.promote_types(x.dtype, y.dtype)
        torch.stack(
            (x, x)
        ).sum().isfinite()  # 1 copy; sum, and isfinite as (x == x) * (|x| != inf): 5 others
    assert by_kind(counter.nodes) == {COPY: 3, FILL: 2, ADD: 1, OTHER: 5}


def test_what_a_graph_cannot_hold_is_refused() -> None:
    with (
        NodeCounter(),
        pytest.raises(
            RuntimeError, match="_local_scalar_dense passes data between host and device"
        ),
    ):
        torch.ones(()).item()
    with NodeCounter(), pytest.raises(RuntimeError, match="lift_fresh passes data"):
        torch.tensor([1.0])


@pytest.mark.parametrize(
    ("numels", "depth", "count"),
    [
        ([8] * 86, 2, 2),  # 64 tensors a launch
        ([8] * 64, 2, 1),
        ([8] * 110, 1, 1),
        ([8] * 111, 1, 2),
        ([65536 * 320], 2, 1),  # 320 blocks a launch
        ([65536 * 320 + 1], 2, 2),
        ([65536 * 321, 8], 2, 2),  # the rest of the first goes with the second
        ([], 1, 0),
    ],
)
def test_foreach_operations_launch_as_often_as_tensors_and_blocks_ask(
    numels: list[int], depth: int, count: int
) -> None:
    assert foreach_launches(numels, depth) == count


def test_a_foreach_operation_counts_its_lists() -> None:
    ones, others = ([torch.ones(4) for _ in range(50)] for _ in range(2))
    with NodeCounter() as counter:
        torch._foreach_copy_(ones, others)  # two lists, 64 tensors a launch
        torch._foreach_mul(ones, others)  # three with the result, 48 a launch
    assert counter.nodes == {
        Node(COPY, "outside of fastbyol", "_foreach_copy_"): 1,
        Node(OTHER, "outside of fastbyol", "_foreach_mul"): 2,
    }


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_a_step_copies_gradients_and_statistics_at_once(norm: str) -> None:
    state = TrainState.create(
        load_config("blog", [*SMALL, f"model.norm={norm}", "engine.kernels=reference"]),
        steps_per_epoch=2,
    )
    with NodeCounter() as counter:
        train_step(state, torch.randn(2, 2, 3, 32, 32), stand_in)
    origins: dict[str, Counter[str]] = {}
    for node, count in counter.nodes.items():
        origins.setdefault(node.origin.removeprefix("fastbyol.engine.step."), Counter())[
            node.name
        ] += count
    # Into their slices of the arena's gradient, 64 tensors a launch; nothing is added or zeroed.
    assert AUTOGRAD not in origins
    assert 64 < sum(1 for _ in state.online.parameters()) <= 128
    copying = "fastbyol.engine.working_weights.WorkingWeights.differentiate"
    assert origins[copying] == {"_foreach_copy_": 2, "ones_like": 1}
    # Running mean and variance of every batch norm: 20 in an encoder with bn, one in a head; two
    # encoders, three heads.
    statistics = "fastbyol_kernels.lars_ema.reference.Reversible."
    assert origins[f"{statistics}write"] == {"_foreach_copy_": 2 if norm == "bn" else 1}
    assert origins[f"{statistics}flat"] == {"cat": 1}
    assert origins[f"{statistics}save_or_restore"] == {"where": 1, "copy_": 1}
    assert origins["fastbyol_kernels.lars_ema.scheduled_step"] == {
        "clamp": 1, "index_select": 1,  # the schedule
        "add_": 1,  # of the step's number
        "lt": 1, "all": 1,  # whether it is taken
        "linalg_vector_norm": 1, "logical_not": 1, "cat": 1,  # the metrics
    }  # fmt: skip


def test_working_weights_replace_their_parameters() -> None:
    state = TrainState.create(
        load_config("blog", [*SMALL, "model.ws=true", "engine.kernels=reference"]),
        steps_per_epoch=2,
    )
    parameters = set(map(id, state.online.parameters()))
    for module in state.online.modules():
        if isinstance(module, Standardizing) and module.ws:
            module.precomputed = module.weight.detach().bfloat16().requires_grad_()
    tensors = list(leaves(state.online))
    assert len(tensors) == len(parameters)
    assert [leaf.dtype for leaf in tensors if id(leaf) not in parameters] == [
        torch.bfloat16
    ] * 20  # the convolutions


# A region as torch.compile hands it out, by hand: group norm twice, and something that is not ours.
RECORDED = """
import operator
import torch
from fastbyol_bench import graph_nodes
from fastbyol_kernels import group_norm

graph = torch.fx.Graph()
x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
x.meta["val"] = torch.empty(4, 16, 8, 8, dtype=torch.bfloat16,
device="meta").to(memory_format=torch.channels_last)
weight.meta["val"] = bias.meta["val"] = torch.empty(16, device="meta")
norm = torch.ops.fastbyol.group_norm.default
y = x
for _ in range(2):
    result = graph.call_function(norm, (y, weight, bias, None, 4, 1e-5, True))
    y = graph.call_function(operator.getitem, (result, 0))
    y.meta["val"] = x.meta["val"]
z = graph.call_function(torch.ops.aten.neg.default, (y,))
graph.output((z, None))
for name, (calls, nodes, _) in graph_nodes.of_operations(graph, 90).items():
    print(name, calls, sorted((node.kind, node.name, count) for node, count in nodes.items()))
"""


def test_our_operations_in_a_compiled_region_count_as_what_they_launch() -> None:
    assert printed(RECORDED).splitlines() == [
        "fastbyol.group_norm 2 [('our Triton kernels', '_forward_kernel', 2)]"
    ]
