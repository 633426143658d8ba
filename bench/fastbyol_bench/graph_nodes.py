"""The nodes of a CUDA graph of one step, counted without a GPU.

What lies outside the compiled regions is run on the CPU by the engine's own code: a step of ``capture.Eager`` on a real state,
the function that ``record_cuda`` records. Every ATen operation in it is seen and counted as the kernels, copies and fills that
it launches on CUDA; launches of our Triton kernels are recorded, not run. The compiled regions are stood in for by a function
whose gradients go through autograd's accumulation.

Not seen, so not counted: what one operation of PyTorch, cuDNN or cuBLAS adds to its kernel (a workspace's memset, a change of
layout, the second kernel of a split sum).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastbyol.config import Config
from fastbyol.data.loader import Batch
from fastbyol.engine.capture import Eager
from fastbyol.engine.step import TrainState
from fastbyol.model.byol import Online, Target
from fastbyol.model.objective import Objective
from fastbyol_kernels.ahead_of_time import recording

OURS, ADD, COPY, FILL, OTHER = "our Triton kernels", "adds", "copies", "fills", "other ATen operations"
AUTOGRAD = "autograd"
# Allocation, and views that operators do not declare as such.
LAUNCHES_NOTHING = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"})
# What no graph can hold: the host waits for a number, or its memory is copied to the device.
TALKS_TO_HOST = frozenset({"_local_scalar_dense", "equal", "nonzero", "masked_select", "lift_fresh"})
KINDS = {
    ADD: {"add", "add_"},
    COPY: {"copy_", "clone", "_to_copy", "cat", "stack"},
    FILL: {"fill_", "zero_", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_full"},
}
# Tensors, blocks and elements a block that one launch of a foreach operation takes, by how many lists it walks
# (aten/src/ATen/native/cuda/MultiTensorApply.cuh: depth_to_max_tensors, depth_to_max_blocks, kChunkSize).
FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
FOREACH_BLOCKS, FOREACH_CHUNK = 320, 65536


class Node(NamedTuple):
    """Launches of one sort: ``kind`` is one of the constants above, ``place`` the function of ours that makes them, ``name``
    the operation or the Triton kernel."""

    kind: str
    place: str
    name: str


class NodeCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts in ``nodes`` what operations would launch on CUDA while the mode is on.

    Tensors are on the CPU. Our operations are entered, so that what they allocate and fill is counted as well. Raises
    RuntimeError for an operation that a graph cannot hold.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: Counter[Node] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace.startswith("fastbyol"):
            # Below autograd, which has done its part, or it would be seen twice.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        name = func.__name__.split(".")[0]
        if name in TALKS_TO_HOST:
            raise RuntimeError(f"{_place()}: {name} passes data between host and device, which a CUDA graph cannot hold")
        count = launches(func, args)
        if count:
            kind = next((kind for kind, names in KINDS.items() if name.removeprefix("_foreach_") in names), OTHER)
            self.nodes[Node(kind, _place(), name)] += count
        return func(*args, **kwargs)


def launches(func: Any, args: tuple[Any, ...]) -> int:
    """Return how many nodes an ATen operation makes in a CUDA graph: none for views, one, or more for a foreach operation."""
    name = func.__name__.split(".")[0]
    answers = not func._schema.is_mutable and not any("Tensor" in str(result.type) for result in func._schema.returns)
    if func.is_view or answers or name in LAUNCHES_NOTHING:
        return 0
    if name.startswith("_foreach_"):
        lists = [argument for argument in args if isinstance(argument, list | tuple) and isinstance(argument[0], Tensor)]
        # An operation that makes new tensors writes them as one more list.
        return foreach_launches([t.numel() for t in lists[0]], len(lists) + (not name.endswith("_")))
    return 1


def foreach_launches(numels: Iterable[int], depth: int) -> int:
    """Return the launches of a foreach operation over tensors of ``numels`` elements that walks ``depth`` lists at a time."""
    count = tensors = blocks = 0
    for numel in numels:
        tensors += 1
        left = -(-numel // FOREACH_CHUNK)
        while left:
            taken = min(left, FOREACH_BLOCKS - blocks)
            blocks, left = blocks + taken, left - taken
            if blocks == FOREACH_BLOCKS or (not left and tensors == FOREACH_TENSORS[depth]):
                # A tensor that is cut goes on as the first of the next launch.
                count, blocks, tensors = count + 1, 0, int(left > 0)
    return count + (blocks > 0)


def _place() -> str:
    """The function of fastbyol, or of its kernels, that is at work; within a backward pass autograd."""
    if torch._C._current_graph_task_id() != -1:
        return AUTOGRAD
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(("fastbyol.", "fastbyol_kernels.")):
            return f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "outside of fastbyol"


class _StandIn(torch.autograd.Function):
    """A loss of leaves whose backward pass gives each a gradient of its shape, without an operation."""

    @staticmethod
    def forward(ctx: Any, *leaves: Tensor) -> Tensor:
        ctx.leaves = leaves
        return torch.empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(leaf) for leaf in ctx.leaves)


def stand_in(
    online: Online, target: Target, batch: Tensor, objective: Objective, queue: Tensor | None = None
) -> tuple[Tensor, Tensor, None]:
    """Stand in for a compiled ``step.forward``: the loss of all leaves, which are not read, and what is watched beside it."""
    loss: Tensor = _StandIn.apply(*leaves(online))
    return loss, torch.empty(5), None


def leaves(net: nn.Module) -> Iterator[Tensor]:
    """What takes a gradient in ``net``: its parameters, or in their place the standardized weights that were given."""
    for module in net.modules():
        precomputed = getattr(module, "precomputed", None)
        for name, parameter in module.named_parameters(recurse=False):
            yield precomputed if precomputed is not None and name == "weight" else parameter


def of_step(state: TrainState, config: Config, batch: int, architecture: int) -> Counter[Node]:
    """Count the nodes outside the compiled regions in a step on ``batch`` images, from the views to the metrics.

    For a GPU of ``sm_<architecture>``. Takes a step of ``state``, which is on the CPU, and leaves it spoilt.
    """
    size = config.views.size
    images = Batch(torch.zeros(batch, size, size, 3, dtype=torch.uint8), torch.arange(batch))
    epoch = torch.zeros((), dtype=torch.int64)
    take = Eager(state, config, stand_in)
    with recording(architecture) as ours, NodeCounter() as counter:
        take(images, epoch)
    total: Counter[Node] = counter.nodes + _launched(ours)
    return total


class Operation(NamedTuple):
    """An operation of ours in a compiled region: how often it is called, and the nodes that all calls make."""

    calls: int
    nodes: Counter[Node]


def of_operations(region: fx.Graph, architecture: int) -> dict[str, Operation]:
    """Count the nodes that our operations make in a compiled region, by name as in fastbyol.group_norm.

    ``region`` is its graph of ATen operations, whose nodes' ``meta["val"]`` are tensors of the shapes that they will have.
    """
    found: dict[str, Operation] = {}
    for node in region.nodes:
        if not (isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fastbyol"):
            continue
        # Nothing writes to these, so that they take no memory.
        args, kwargs = tree_map_only(fx.Node, lambda n: tree_map_only(Tensor, _like, n.meta["val"]), (node.args, node.kwargs))
        with recording(architecture) as ours, NodeCounter() as counter:
            node.target(*args, **kwargs)
        name = str(node.target).rsplit(".", 1)[0]
        before = found.get(name, Operation(0, Counter()))
        found[name] = Operation(before.calls + 1, before.nodes + counter.nodes + _launched(ours))
    return found


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _launched(ours: Iterable[Any]) -> Counter[Node]:
    return Counter(Node(OURS, launch.module, launch.name) for launch in ours)
