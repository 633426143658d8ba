"""The launches of a module that Inductor wrote: Triton kernels with their GB, and other calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

# Calls that launch nothing: checks, allocations, views, the guard of the device. copy_if_misaligned
# copies if a pointer is not a multiple of 16, but the arena's and the allocator's are.
LAUNCHES_NOTHING = frozenset((
    "assert_alignment", "assert_size_stride", "assert_size_stride_grouped",
    "assert_tensor_metadata",
    "clear", "copy_if_misaligned", "empty_strided_cuda", "end_graph", "get_raw_stream",
    "reinterpret_tensor", "set_device", "start_graph", "_DeviceGuard",
))  # fmt: skip


class Kernel(NamedTuple):
    """A Triton kernel of a ``kind`` (pointwise, reduction ...), with the GB that a launch moves.

    Inductor counts the GB. With ``atomic`` additions the result depends on the order of its
    programs.
    """

    name: str
    kind: str
    gb: float
    atomic: bool = False


class External(NamedTuple):
    """A call of foreign code (convolution, mm, fastbyol.group_norm ...) and its assumed launches.

    A call is one launch; a convolution's backward pass is one per gradient that it returns.
    """

    name: str
    nodes: int


class Code(NamedTuple):
    """The launches of a module, in order."""

    kernels: tuple[Kernel, ...]
    external: tuple[External, ...]


def parse(text: str) -> Code:
    """Parse the Python text of a module.

    Raises ValueError for a call that this module does not list.
    """
    module = ast.parse(text)
    defined = {kernel.name: kernel for kernel in _kernels(module)}
    (body,) = (
        node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    kernels, external = [], []
    # ast.walk is breadth first, so the statements of a block keep their order.
    for call in (node for node in ast.walk(body) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        last = name.rsplit(".", 1)[-1]
        if last == "run" and name.removesuffix(".run") in defined:
            kernels.append(defined[name.removesuffix(".run")])
        elif name.startswith("extern_kernels."):
            external.append(External(last, 1))
        elif name.startswith("torch.ops."):
            external.append(_operation(name, call))
        elif last not in LAUNCHES_NOTHING:
            raise ValueError(
                f"line {call.lineno} of Inductor's code: what {name} launches is not known: say "
                f"so in {__name__}"
            )
    return Code(tuple(kernels), tuple(external))


def _operation(name: str, call: ast.Call) -> External:
    """Return the call ``torch.ops.<namespace>.<operation>.<overload>(...)`` with its launches."""
    namespace, operation = name.removeprefix("torch.ops.").split(".")[:2]
    if (namespace, operation) == ("aten", "convolution_backward"):
        wanted = ast.literal_eval(call.args[-1])  # of input, weight, bias
        return External(operation, sum(wanted))
    return External(operation if namespace == "aten" else f"{namespace}.{operation}", 1)


def _kernels(module: ast.Module) -> Iterator[Kernel]:
    """Yield the kernels of ``name = async_compile.triton('name', '''source''', ...)``.

    A decorator in the source names kind and GB.
    """
    for statement in module.body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
            continue
        call = statement.value
        if ast.unparse(call.func) != "async_compile.triton":
            continue
        name, source = (ast.literal_eval(argument) for argument in call.args[:2])
        yield _kernel(name, source)


def _kernel(name: str, source: str) -> Kernel:
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).startswith(
            "triton_heuristics."
        ):
            (meta,) = (
                keyword.value for keyword in decorator.keywords if keyword.arg == "inductor_meta"
            )
            assert isinstance(meta, ast.Dict)
            values = {
                ast.unparse(key): value
                for key, value in zip(meta.keys, meta.values, strict=True)
                if key is not None
            }
            if (gb := values.get("'kernel_num_gb'")) is not None:
                kind, atomic = (
                    ast.unparse(decorator.func).split(".")[-1],
                    values.get("'atomic_add_found'"),
                )
                return Kernel(
                    name,
                    kind,
                    float(ast.literal_eval(gb)),
                    atomic is not None and bool(ast.literal_eval(atomic)),
                )
    raise ValueError(
        f"Inductor's kernel {name} does not say how many GB it moves: lower it with "
        "profile_bandwidth"
    )
