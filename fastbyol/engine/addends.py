"""A pass of torch.compile: norms' backward kernels read two addends instead of their sum.

What a residual block takes in goes to its first convolution and to its output. Autograd adds the
gradients of the two in a kernel of its own, which reads both and writes a third for the one kernel
that reads it, that of the norm or pooling before the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

# Operations whose first argument may come in two parts, the second as ``more``, and when. Batch
# norm's two passes both read a pooled gradient; of others the second reads what the first masked.
TAKERS: dict[str, Callable[[fx.Node], bool]] = {
    "fastbyol.group_norm_backward.default": lambda node: True,
    "fastbyol.max_pool_backward.default": lambda node: True,
    "fastbyol.batch_norm_sums.default": lambda node: (
        node.args[2] is not None or node.args[3] is not None
    ),
    "fastbyol.batch_norm_backward.default": lambda node: node.args[2] is not None,
}


class Addends(CustomGraphPass):
    """The pass. It leaves a sum alone that anything else reads, or whose parts are not alike."""

    def __call__(self, graph: fx.Graph) -> None:
        for total in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
            users = list(total.users)
            if not _is_of_two(total) or not all(_takes(user, total) for user in users):
                continue
            one, more = total.args
            for user in users:
                user.args = (one, *user.args[1:])
                user.kwargs = {**user.kwargs, "more": more}
            graph.erase_node(total)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _is_of_two(total: fx.Node) -> bool:
    """Tell whether sum and parts are channels-last tensors of one shape and dtype."""
    values = [part.meta.get("val") for part in (total, *total.args) if isinstance(part, fx.Node)]
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim == 4]
    return (
        len(tensors) == 3
        and not total.kwargs
        and len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1
        and all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    )


def _takes(user: fx.Node, total: fx.Node) -> bool:
    """Tell whether ``user`` reads ``total`` as a gradient that may come in two parts, and once."""
    accepts = TAKERS.get(str(user.target))
    return (
        accepts is not None
        and accepts(user)
        and user.args[0] is total
        and user.args.count(total) == 1
        and not user.kwargs
    )
