"""Inductor's code for a step on an H100, made on a machine that has none.

``trace`` takes both graphs of the step, forward and backward, as torch.compile would hand them to Inductor, from a state on
the CPU. Inside ``mocked_h100`` a device "cuda" seems to be there, and ``lower`` lets Inductor write its code for one of the
graphs over fake tensors of that device. Nothing is allocated there, compiled by Triton, or run.

Where this may differ from a real GPU: autograd cannot go backward through tensors of a device without a driver, so the graphs
are traced on the CPU and moved afterwards. Both devices share torch's decompositions and the partitioner; what Inductor would
choose by timing on the card cannot be seen, and does not change which kernels there are.

Process-wide switches are patched and put back, but what torch caches meanwhile stays: use a process of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, scheduler
from torch._inductor.codegen.simd import SIMDKernel
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from triton.runtime import driver

from fastbyol.engine.capture import compiled_forward
from fastbyol.engine.step import TrainState
from fastbyol_kernels.ahead_of_time import Driver, recording

ARCHITECTURE = 90
DEVICE = torch.device("cuda", 0)
# NVIDIA H100 SXM: what torch.cuda.get_device_properties says of it (data sheet; CUDA C++ Programming Guide, table of compute
# capabilities, 9.0).
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
    uuid="mocked",
)


class Graph:
    """One of the two graphs of a step: ``module`` in ATen operations, ``inputs`` fake tensors on the CPU."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any], *, backward: bool) -> None:
        self.module, self.inputs, self.backward = module, inputs, backward

    @property
    def num_results(self) -> int:
        """How many tensors it gives out; of the backward graph these are the gradients."""
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        return sum(isinstance(result, fx.Node) for result in output.args[0])


class _TracedError(Exception):
    """Raised in place of running a graph."""


def trace(state: TrainState, batch: int, size: int) -> tuple[Graph, Graph]:
    """Return the forward and the backward graph of ``capture.compiled_forward`` for ``state``, which is on the CPU.

    ``batch`` images, two views of ``size`` pixels a side each. Raises FastbyolError where torch.compile cannot trace the step
    in one graph.
    """
    views = torch.empty(2 * batch, 3, size, size, dtype=state.recipe.views_dtype, memory_format=torch.channels_last)
    with recording(ARCHITECTURE), state.standardized.in_use():
        networks = state.online, state.target
        return graphs_of(lambda backend: compiled_forward(backend)(*networks, views, state.recipe.objective, state.queue))


def graphs_of(run: Callable[[Any], object]) -> tuple[Graph, Graph]:
    """Return both graphs of what ``run`` compiles with the backend that it is given and calls once, which runs nothing."""
    graphs: list[Graph] = []

    def keep(*, backward: bool) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., NoReturn]]:
        def compiler(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., NoReturn]:
            graphs.append(Graph(module, inputs, backward=backward))
            return _refuse

        return compiler

    # What torch._inductor.compile_fx.compile_fx does between dynamo and compile_fx_inner.
    backend = aot_autograd(
        fw_compiler=keep(backward=False),
        bw_compiler=keep(backward=True),
        partition_fn=_partition,
        decompositions=select_decomp_table(),
    )
    # The backward graph is compiled at once, not when the first backward pass comes.
    now = torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False)
    with now, _expecting(_TracedError):
        run(backend)
    forward, backward = graphs
    return forward, backward


def _partition(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    compile_fx._recursive_joint_graph_passes(module)
    parts: tuple[fx.GraphModule, fx.GraphModule] = min_cut_rematerialization_partition(
        module, inputs, compiler="inductor", **options
    )
    return parts


def _refuse(*_: object) -> NoReturn:
    raise _TracedError


@contextmanager
def _expecting(error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error:
        return
    raise RuntimeError("torch.compile ran the step instead of handing it out")


def lower(graph: Graph) -> tuple[str, float]:
    """Return Inductor's Python code for ``graph``, and how many of its GB are overlapping reads; inside ``mocked_h100`` only.

    Inductor counts a read as often as windows overlap (the nine taps of a max pool); the second number is what goes beyond a
    read of each buffer once. Changes the graph. Raises RuntimeError where a tensor of the graph is not on the GPU.
    """
    code: list[str] = []
    # By kernel, of which each launch has its own: some versions ask for the same number twice.
    overlap: dict[Any, int] = {}
    count: Any = SIMDKernel.estimate_kernel_num_bytes

    def keep(lowering: GraphLowering) -> ModuleType:
        wrapper, _ = lowering.codegen()
        code.append(wrapper.value)
        module = ModuleType("lowered")
        module.__file__ = "lowered"
        module.call = _refuse  # type: ignore[attr-defined]
        return module

    def counting(kernel: Any) -> Any:
        overlap[kernel] = _overlap_bytes(kernel)
        return count(kernel)

    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    inputs = _move(graph, mode)
    with (
        tracing(TracingContext(mode)),
        mock.patch.object(GraphLowering, "compile_to_module", keep),
        mock.patch.object(SIMDKernel, "estimate_kernel_num_bytes", counting),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # the heads are fp32 on purpose
        compile_fx.compile_fx_inner(graph.module, inputs, graph_id=0, is_backward=graph.backward, static_input_idxs=[])
    (text,) = code
    return text, sum(overlap.values()) / 1e9


def _move(graph: Graph, mode: fake_tensor.FakeTensorMode) -> list[Any]:
    """Propagate fake tensors of the GPU through a graph that was traced on the CPU; return its inputs there."""

    class Propagate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if n.op != "output" and isinstance(tensor, Tensor) and tensor.device != DEVICE:
                    raise RuntimeError(f"{n.name} = {n.target} stays on {tensor.device} where the step is on {DEVICE}")
            if n.op != "output":
                n.meta["val"] = result
            return result

    for node in graph.module.graph.nodes:
        if node.op == "call_function" and node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": DEVICE}
    graph.module.recompile()
    with mode:
        inputs = [
            torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device=DEVICE) if isinstance(i, Tensor) else i
            for i in graph.inputs
        ]
        Propagate(graph.module).run(*inputs)
    return inputs


def _overlap_bytes(kernel: Any) -> int:
    """Bytes by which ``estimate_kernel_num_bytes`` exceeds each buffer read once: several windows on a larger buffer."""
    accesses = kernel.features.buf_accesses()
    points = 1
    for numel in kernel.numels.values():
        points *= int(numel)
    _, arguments, _, _ = kernel.args.python_argdefs()
    found = 0
    for name in arguments:
        if name in accesses and (numel := int(V.graph.get_numel(name))) > points:
            windows = len({access.index if isinstance(access, MemoryDep) else access for access in accesses[name]})
            found += max(0, windows * points - numel) * V.graph.get_dtype(name).itemsize
    return found


@contextmanager
def mocked_h100() -> Iterator[None]:
    """Let torch believe in an H100 as device 0, and let Inductor write code for it that is not compiled. Restores all."""
    interface: Any = device_interface.get_interface_for_device("cuda")
    capability = (H100.major, H100.minor)
    replacements: tuple[tuple[Any, dict[str, Any]], ...] = (
        (
            torch.cuda,
            {
                "is_available": lambda: True,
                "device_count": lambda: 1,
                "current_device": lambda: 0,
                "_lazy_init": lambda: None,
                "get_device_capability": lambda device=None: capability,
                "get_device_properties": lambda device=None: H100,
                "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
                "set_rng_state": lambda state, device=None: None,
                "device": lambda device: nullcontext(),
                "_DeviceGuard": lambda device: nullcontext(),
            },
        ),
        (
            torch._C,
            {
                "_cuda_getDevice": lambda: 0,
                "_cuda_setDevice": lambda device: None,
                "_cuda_getCurrentRawStream": lambda device: 0,
                # The rule for channels-last operands is C++ that asks the device: cuDNN keeps them.
                "_conv_determine_backend_memory_format": lambda *_: torch.channels_last,
            },
        ),
        (
            interface,
            {
                "is_available": lambda: True,
                "device_count": lambda: 1,
                "current_device": lambda: 0,
                "get_compute_capability": lambda device=None: ARCHITECTURE,
                "get_device_properties": lambda device=None: H100,
                "is_bf16_supported": lambda including_emulation=False: True,
                "get_raw_stream": lambda device: 0,
                "is_triton_capable": lambda device=None: True,
                "raise_if_triton_unavailable": lambda device=None: None,
            },
        ),
        (interface.Worker, {"get_device_properties": lambda device=None: H100, "current_device": lambda: 0}),
        (fake_tensor, {"init_gpu_context": lambda device: None}),
        (scheduler, {"has_triton": lambda *_: True}),
        (driver, {"_active": Driver(ARCHITECTURE)}),
    )
    with ExitStack() as patches:
        for owner, new in replacements:
            for name, value in new.items():
                patches.enter_context(mock.patch.object(owner, name, staticmethod(value) if isinstance(owner, type) else value))
        # profile_bandwidth writes each kernel's GB beside it; caches would keep code that no GPU has seen; a real GPU would be
        # asked to time kernels where deterministic does not say that a rule decides, as the engine has it there (audit, D12).
        configured = {"compile_threads": 1, "profile_bandwidth": True, "fx_graph_cache": False, "deterministic": True}
        patches.enter_context(torch._inductor.config.patch(configured))
        yield
