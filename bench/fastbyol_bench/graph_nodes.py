"""The nodes of the CUDA graph of one step, counted without a GPU.

Extra nodes inside an operation of PyTorch, cuDNN or cuBLAS (a workspace's memset, a layout change,
the second kernel of a split sum) are not counted.
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

OURS, ADD, COPY, FILL, OTHER = (
    "our Triton kernels",
    "adds",
    "copies",
    "fills",
    "other ATen operations",
)
AUTOGRAD = "autograd"
# Allocations, and views that operators do not declare as views.
LAUNCHES_NOTHING = frozenset(
    {
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "set_",
    }
)
# Operations that no graph can hold: the host waits for a number, or its memory is copied to the
# device.
TALKS_TO_HOST = frozenset(
    {"_local_scalar_dense", "equal", "nonzero", "masked_select", "lift_fresh"}
)
KINDS = {
    ADD: {"add", "add_"},
    COPY: {"copy_", "clone", "_to_copy", "cat", "stack"},
    FILL: {
        "fill_",
        "zero_",
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "full",
        "full_like",
        "new_zeros",
        "new_full",
    },
}
# The most tensors, blocks and elements per block in one launch of a foreach operation, by its
# number of lists (MultiTensorApply.cuh of ATen/native/cuda: depth_to_max_tensors,
# depth_to_max_blocks, kChunkSize).
FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
FOREACH_BLOCKS, FOREACH_CHUNK = 320, 65536


class Node(NamedTuple):
    """The key of a count of launches.

    ``kind`` is one of the constants above, ``origin`` the function of ours that launches, ``name``
    the operation or the Triton kernel.
    """

    kind: str
    origin: str
    name: str


class NodeCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that counts in ``nodes`` what operations on CPU tensors would launch on CUDA.

    It enters our operations, so that their allocations and fills count too. Raises RuntimeError for
    an operation that a CUDA graph cannot hold.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: Counter[Node] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace.startswith("fastbyol"):
            # Redispatched below autograd, which has done its part, so that it is not counted twice.
            with self:
                return func.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs
                )
        name = func.__name__.split(".")[0]
        if name in TALKS_TO_HOST:
            raise RuntimeError(
                f"{_origin()}: {name} passes data between host and device, which a CUDA graph "
                "cannot hold"
            )
        count = launches(func, args)
        if count:
            kind = next(
                (kind for kind, names in KINDS.items() if name.removeprefix("_foreach_") in names),
                OTHER,
            )
            self.nodes[Node(kind, _origin(), name)] += count
        return func(*args, **kwargs)


def launches(func: Any, args: tuple[Any, ...]) -> int:
    """Return the number of graph nodes of an ATen operation.

    It is 0 for views, 1 for most operations, and 1 or more for a foreach operation.
    """
    name = func.__name__.split(".")[0]
    no_tensors = not func._schema.is_mutable and not any(
        "Tensor" in str(result.type) for result in func._schema.returns
    )
    if func.is_view or no_tensors or name in LAUNCHES_NOTHING:
        return 0
    if name.startswith("_foreach_"):
        lists = [
            argument
            for argument in args
            if isinstance(argument, list | tuple) and isinstance(argument[0], Tensor)
        ]
        # New tensors are one more list.
        return foreach_launches(
            [t.numel() for t in lists[0]], len(lists) + (not name.endswith("_"))
        )
    return 1


def foreach_launches(numels: Iterable[int], depth: int) -> int:
    """Return the launches of a foreach operation on ``depth`` lists of tensors of ``numels``."""
    count = tensors = blocks = 0
    for numel in numels:
        tensors += 1
        left = -(-numel // FOREACH_CHUNK)
        while left:
            taken = min(left, FOREACH_BLOCKS - blocks)
            blocks, left = blocks + taken, left - taken
            if blocks == FOREACH_BLOCKS or (not left and tensors == FOREACH_TENSORS[depth]):
                # The rest of a tensor is the first of the next launch.
                count, blocks, tensors = count + 1, 0, int(left > 0)
    return count + (blocks > 0)


def _origin() -> str:
    """Return the running function of fastbyol or its kernels, or autograd in a backward pass."""
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
    """A loss of leaves whose backward pass gives each an empty gradient, without any operation."""

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
    """Return outputs like those of a compiled ``step.forward``, from a loss of unread leaves."""
    loss: Tensor = _StandIn.apply(*leaves(online))
    return loss, torch.empty(5), None


def leaves(net: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of ``net`` that get a gradient: parameters, or what replaces them."""
    for module in net.modules():
        precomputed = getattr(module, "precomputed", None)
        own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        if isinstance(precomputed, Tensor):
            own["weight"] = precomputed
        elif precomputed is not None:
            own["weight"], own["bias"] = precomputed
        yield from own.values()


def of_step(state: TrainState, config: Config, batch: int, architecture: int) -> Counter[Node]:
    """Count the nodes outside the compiled regions in a step on ``batch`` images, views included.

    The images are rows of a resident set.

    The GPU is ``sm_<architecture>``. The CPU runs the function that ``record_cuda`` records: a step
    of ``state``, a CPU state, which is not usable afterwards. ``stand_in`` replaces the compiled
    regions.
    """
    size = config.views.size
    images, ids = torch.zeros(batch, size, size, 3, dtype=torch.uint8), torch.arange(batch)
    epoch = torch.zeros((), dtype=torch.int64)
    step = Eager(state, config, stand_in)
    with recording(architecture) as ours, NodeCounter() as counter:
        step(Batch(images, ids, ids), epoch)
    total: Counter[Node] = counter.nodes + _launched(ours)
    return total


class Operation(NamedTuple):
    """The calls of one of our operations in a compiled region, their nodes and bytes moved."""

    calls: int
    nodes: Counter[Node]
    num_bytes: int = 0


def of_operations(region: fx.Graph, architecture: int) -> dict[str, Operation]:
    """Count the nodes of our operations in a compiled region, by name, such as fastbyol.group_norm.

    ``region`` is a graph of ATen operations, whose nodes' ``meta["val"]`` have the final shapes.
    """
    operations: dict[str, Operation] = {}
    for node in region.nodes:
        mutates = node.target is torch.ops.higher_order.auto_functionalized_v2
        target = node.args[0] if mutates else node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "fastbyol":
            continue
        # These are never written, so they need no memory.
        args, kwargs = tree_map_only(
            fx.Node, lambda n: tree_map_only(Tensor, _like, n.meta["val"]), (node.args, node.kwargs)
        )
        if mutates:
            args, kwargs = (), _mutated(target, kwargs)
        with recording(architecture) as ours, NodeCounter() as counter:
            target(*args, **kwargs)
        name = str(target).rsplit(".", 1)[0]
        before = operations.get(name, Operation(0, Counter()))
        operations[name] = Operation(
            before.calls + 1,
            before.nodes + counter.nodes + _launched(ours),
            before.num_bytes + sum(launch.num_bytes for launch in ours),
        )
    return operations


def _mutated(target: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation that mutates some, which the graph has as bases."""
    bases = kwargs["_all_bases"]
    names = {argument.name for argument in target._schema.arguments}
    plain = {name: value for name, value in kwargs.items() if name in names}
    of_bases = {name: kwargs.get(f"_{name}_base_index") for name in names - plain.keys()}
    return plain | {
        name: None if index is None else bases[index] for name, index in of_bases.items()
    }


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _launched(ours: Iterable[Any]) -> Counter[Node]:
    return Counter(Node(OURS, launch.module, launch.name) for launch in ours)
