"""What a module that Inductor wrote launches: its own Triton kernels, with the GB that they move, and calls of others' code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

# What the code calls that launches nothing: checks, allocation, views of what is there, the guard of the device.
LAUNCHES_NOTHING = frozenset(
    {
        "assert_alignment",
        "assert_size_stride",
        "assert_size_stride_grouped",
        "assert_tensor_metadata",
        "clear",
        # A copy only where a pointer is not a multiple of 16; the arena's and the allocator's are.
        "copy_if_misaligned",
        "empty_strided_cuda",
        "end_graph",
        "get_raw_stream",
        "reinterpret_tensor",
        "set_device",
        "start_graph",
        "_DeviceGuard",
    }
)


class Kernel(NamedTuple):
    """A Triton kernel: pointwise, reduction, persistent_reduction ..., and the GB that a launch moves as Inductor counts.

    ``atomic``: whether it adds atomically, so that the bits of its results depend on the order of its programs.
    """

    name: str
    kind: str
    gb: float
    atomic: bool = False


class External(NamedTuple):
    """A call of code that is not Inductor's: ``name`` as in convolution, mm, fastbyol.group_norm; ``nodes`` launches assumed.

    One launch a call, and one per gradient that is asked of a convolution's backward.
    """

    name: str
    nodes: int


class Code(NamedTuple):
    """Everything that a module launches, in order."""

    kernels: tuple[Kernel, ...]
    external: tuple[External, ...]


def parse(text: str) -> Code:
    """Read the Python text of a module.

    Raises ValueError for a call that is neither known to launch something nor known to launch nothing.
    """
    module = ast.parse(text)
    known = {kernel.name: kernel for kernel in _kernels(module)}
    (body,) = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == "call")
    kernels, external = [], []
    # ast.walk goes breadth first; statements of one block keep their order.
    for call in (node for node in ast.walk(body) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        last = name.rsplit(".", 1)[-1]
        if last == "run" and name.removesuffix(".run") in known:
            kernels.append(known[name.removesuffix(".run")])
        elif name.startswith("extern_kernels."):
            external.append(External(last, 1))
        elif name.startswith("torch.ops."):
            external.append(_operation(name, call))
        elif last not in LAUNCHES_NOTHING:
            raise ValueError(f"line {call.lineno} of Inductor's code: what {name} launches is not known: say so in {__name__}")
    return Code(tuple(kernels), tuple(external))


def _operation(name: str, call: ast.Call) -> External:
    """``torch.ops.<namespace>.<operation>.<overload>(...)``."""
    namespace, operation = name.removeprefix("torch.ops.").split(".")[:2]
    if (namespace, operation) == ("aten", "convolution_backward"):
        wanted = ast.literal_eval(call.args[-1])  # of input, weight, bias
        return External(operation, sum(wanted))
    return External(operation if namespace == "aten" else f"{namespace}.{operation}", 1)


def _kernels(module: ast.Module) -> Iterator[Kernel]:
    """``name = async_compile.triton('name', '''source''', ...)``, in whose source a decorator names kind and GB."""
    for statement in module.body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
            continue
        call = statement.value
        if ast.unparse(call.func) != "async_compile.triton":
            continue
        name, source = (ast.literal_eval(argument) for argument in call.args[:2])
        yield _kernel(name, source)


def _kernel(name: str, source: str) -> Kernel:
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).startswith("triton_heuristics."):
            (meta,) = (keyword.value for keyword in decorator.keywords if keyword.arg == "inductor_meta")
            assert isinstance(meta, ast.Dict)
            said = {ast.unparse(key): value for key, value in zip(meta.keys, meta.values, strict=True) if key is not None}
            if (gb := said.get("'kernel_num_gb'")) is not None:
                kind, atomic = ast.unparse(decorator.func).split(".")[-1], said.get("'atomic_add_found'")
                return Kernel(name, kind, float(ast.literal_eval(gb)), atomic is not None and bool(ast.literal_eval(atomic)))
    raise ValueError(f"Inductor's kernel {name} does not say how many GB it moves: lower it with profile_bandwidth")
