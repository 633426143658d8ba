"""Inductor's code for a step on an H100, generated on a machine without a GPU.

``trace`` returns the graphs that torch.compile would pass to Inductor. Inside ``mocked_h100`` a
CUDA device seems to exist, and ``lower`` lets Inductor write its code over fake tensors on it.
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

from fastbyol.engine.addends import Addends
from fastbyol.engine.capture import compiled_forward, inductor_options
from fastbyol.engine.step import TrainState
from fastbyol_kernels.ahead_of_time import Driver, recording
from fastbyol_kernels.views.blocks import blocks_shape

ARCHITECTURE = 90
DEVICE = torch.device("cuda", 0)
# The properties of an NVIDIA H100 SXM, as torch.cuda.get_device_properties returns them (data
# sheet; CUDA C++ Programming Guide, table of compute capabilities, 9.0).
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
    """One of a step's two graphs: ``module`` of ATen operations, ``inputs`` fake CPU tensors."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any], *, backward: bool) -> None:
        self.module, self.inputs, self.backward = module, inputs, backward

    @property
    def num_results(self) -> int:
        """The number of results; those of the backward graph are the gradients."""
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        return sum(isinstance(result, fx.Node) for result in output.args[0])


class _TracedError(Exception):
    """The exception that replaces the execution of a graph."""


def trace(state: TrainState, batch: int, size: int) -> tuple[Graph, Graph]:
    """Return the forward and backward graph of ``capture.compiled_forward`` for a CPU ``state``.

    ``addends`` has passed over them.

    The step has ``batch`` images, with two views of ``size`` x ``size`` pixels each. Raises
    FastbyolError if torch.compile cannot trace the step as one graph.
    """
    recipe = state.recipe
    shape = blocks_shape(size) if recipe.views_layout == "blocks" else (3, size, size)
    views = torch.empty(
        2 * batch, *shape, dtype=recipe.views_dtype, memory_format=torch.channels_last
    )
    with recording(ARCHITECTURE), state.weights.in_use(len(views)):
        networks = state.online, state.target
        graphs = graphs_of(
            lambda backend: compiled_forward(backend)(
                *networks, views, recipe.objective, state.queue
            )
        )
    for graph in graphs:
        Addends()(graph.module.graph)  # as Inductor does, for whoever counts operations before it
    return graphs


def graphs_of(run: Callable[[Any], object]) -> tuple[Graph, Graph]:
    """Return both graphs of the function that ``run`` compiles with its argument, the backend.

    ``run`` calls the function once, which executes nothing.
    """
    graphs: list[Graph] = []

    def keep(
        *, backward: bool
    ) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., NoReturn]]:
        def compiler(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., NoReturn]:
            graphs.append(Graph(module, inputs, backward=backward))
            return _refuse

        return compiler

    # The work of torch._inductor.compile_fx.compile_fx between dynamo and compile_fx_inner.
    # autograd cannot go backward through tensors of a device without a driver, so graphs are traced
    # on the CPU and moved later. Both devices share decompositions and partitioner. Inductor's
    # choices by timing are not seen, but do not change the list of kernels.
    backend = aot_autograd(
        fw_compiler=keep(backward=False),
        bw_compiler=keep(backward=True),
        partition_fn=_partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    # The backward graph is compiled now, not at the first backward pass.
    now = torch._functorch.config.patch(
        force_non_lazy_backward_lowering=True, enable_autograd_cache=False
    )
    with now, _expecting(_TracedError):
        run(backend)
    forward, backward = graphs
    return forward, backward


def _partition(
    module: fx.GraphModule, inputs: Sequence[Any], **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
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
    """Return Inductor's Python code for ``graph`` and the GB that it counts more than once.

    Inductor counts a read as often as windows overlap, such as the nine taps of a max pool. Works
    inside ``mocked_h100`` only and changes the graph. Raises RuntimeError for a tensor that is not
    on the GPU.
    """
    code: list[str] = []
    # By kernel, one per launch: some versions ask for the same number twice.
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
        warnings.filterwarnings(
            "ignore", "TensorFloat32 tensor cores"
        )  # the heads are fp32 on purpose
        compile_fx.compile_fx_inner(
            graph.module, inputs, graph_id=0, is_backward=graph.backward, static_input_idxs=[]
        )
    (text,) = code
    return text, sum(overlap.values()) / 1e9


def _move(graph: Graph, mode: fake_tensor.FakeTensorMode) -> list[Any]:
    """Propagate fake GPU tensors through a graph traced on the CPU, and return its GPU inputs."""

    class Propagate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if n.op != "output" and isinstance(tensor, Tensor) and tensor.device != DEVICE:
                    raise RuntimeError(
                        f"{n.name} = {n.target} stays on {tensor.device} where the step is on "
                        f"{DEVICE}"
                    )
            if n.op != "output":
                n.meta["val"] = result
            return result

    for node in graph.module.graph.nodes:
        if node.op == "call_function" and node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": DEVICE}
    graph.module.recompile()
    with mode:
        inputs = [
            torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device=DEVICE)
            if isinstance(i, Tensor)
            else i
            for i in graph.inputs
        ]
        Propagate(graph.module).run(*inputs)
    return inputs


def _overlap_bytes(kernel: Any) -> int:
    """Return the bytes that ``estimate_kernel_num_bytes`` counts beyond one read of each buffer."""
    accesses = kernel.features.buf_accesses()
    points = 1
    for numel in kernel.numels.values():
        points *= int(numel)
    _, arguments, _, _ = kernel.args.python_argdefs()
    excess = 0
    for name in arguments:
        if name in accesses and (numel := int(V.graph.get_numel(name))) > points:
            windows = len(
                {
                    access.index if isinstance(access, MemoryDep) else access
                    for access in accesses[name]
                }
            )
            excess += max(0, windows * points - numel) * V.graph.get_dtype(name).itemsize
    return excess


@contextmanager
def mocked_h100() -> Iterator[None]:
    """Make torch see an H100 as device 0, and Inductor write code for it without compiling it.

    All patches are undone on exit, but torch's caches keep what they have learned: use a process of
    its own.
    """
    interface: Any = device_interface.get_interface_for_device("cuda")
    present = {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0}
    properties = {"get_device_properties": lambda device=None: H100}
    replacements: tuple[tuple[Any, dict[str, Any]], ...] = (
        (
            torch.cuda,
            {
                **present,
                **properties,
                "_lazy_init": lambda: None,
                "get_device_capability": lambda device=None: (H100.major, H100.minor),
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
                **present,
                **properties,
                "get_compute_capability": lambda device=None: ARCHITECTURE,
                "is_bf16_supported": lambda including_emulation=False: True,
                "get_raw_stream": lambda device: 0,
                "is_triton_capable": lambda device=None: True,
                "raise_if_triton_unavailable": lambda device=None: None,
            },
        ),
        (interface.Worker, {**properties, "current_device": lambda: 0}),
        (fake_tensor, {"init_gpu_context": lambda device: None}),
        (scheduler, {"has_triton": lambda *_: True}),
        (driver, {"_active": Driver(ARCHITECTURE)}),
    )
    with ExitStack() as patches:
        for owner, new in replacements:
            for name, value in new.items():
                patches.enter_context(
                    mock.patch.object(
                        owner, name, staticmethod(value) if isinstance(owner, type) else value
                    )
                )
        # profile_bandwidth writes each kernel's GB beside it. Caches would keep code that no GPU
        # has run. By the engine's own options rules decide where a real GPU would time kernels.
        configured = {"compile_threads": 1, "profile_bandwidth": True, "fx_graph_cache": False}
        patches.enter_context(torch._inductor.config.patch(configured | inductor_options()))
        yield
