"""Unusual callers of an operation get plain torch's result or a one-line error."""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fastbyol_kernels
from fastbyol_kernels import (
    batch_norm,
    dispatch,
    group_norm,
    lars_ema,
    max_pool,
    weight_standardization,
)
from fastbyol_kernels.native import F32, kernel

N, C, S = 4, 16, 6


class Op(torch.nn.Module):
    """An operation of x (N, C, S, S) with its parameters, on the backend ``kernels``."""

    def __init__(self, call: Callable[..., Tensor], reference: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call, self.plain, self.kernels = call, reference, "auto"
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(1 + 0.1 * torch.randn(C, generator=g))
        self.bias = torch.nn.Parameter(torch.randn(C, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias, kernels=self.kernels)

    def reference(self, x: Tensor) -> Tensor:
        return self.plain(x, self.weight, self.bias)


def _running(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_zeros(C, dtype=dtype), x.new_ones(C, dtype=dtype)


def _kernel_of(weight: Tensor) -> Tensor:
    """Return a convolution's weight (C, C, 3, 3) that depends on the parameter."""
    ramp = torch.linspace(-1, 1, C * 9, device=weight.device).view(1, C, 3, 3).to(weight)
    return weight.view(C, 1, 1, 1) * ramp + weight.view(1, C, 1, 1)


def _standardized(weight: Tensor) -> Tensor:
    """Return ``weight`` standardized per output channel, by the formula."""
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    return centred / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)


OPS: dict[str, Callable[[], Op]] = {
    "group_norm": lambda: Op(
        lambda x, w, b, kernels: group_norm.group_norm(
            x, 4, w, b, residual=x, relu=True, kernels=kernels
        ),
        lambda x, w, b: torch.relu(torch.nn.functional.group_norm(x, 4, w, b) + x),
    ),
    "batch_norm": lambda: Op(
        lambda x, w, b, kernels: batch_norm.batch_norm(
            x, w, b, *_running(x), 2, momentum=0.1, eps=1e-5, residual=x, relu=True, kernels=kernels
        ),
        lambda x, w, b: torch.cat(
            [
                torch.relu(torch.nn.functional.batch_norm(half, None, None, w, b, True) + half)
                for half in x.chunk(2)
            ]
        ),
    ),
    "max_pool": lambda: Op(
        lambda x, w, b, kernels: max_pool.max_pool(
            x * w.view(-1, 1, 1) + b.view(-1, 1, 1), kernels=kernels
        ),
        lambda x, w, b: torch.nn.functional.max_pool2d(
            x * w.view(-1, 1, 1) + b.view(-1, 1, 1), 3, 2, 1
        ),
    ),
    "weight_standardization": lambda: Op(
        lambda x, w, b, kernels: torch.nn.functional.conv2d(
            x, weight_standardization.weight_standardization(_kernel_of(w), kernels=kernels), b
        ),
        lambda x, w, b: torch.nn.functional.conv2d(x, _standardized(_kernel_of(w)), b),
    ),
}
KERNELS = ("auto", "cpu", "triton", "reference")
close = torch.testing.assert_close


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(N, C, S, S, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def traced(op: Op, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", kind)
        made, file = torch.jit.trace(op, x, check_trace=False), io.BytesIO()
        torch.jit.save(made, file)
        return torch.jit.load(io.BytesIO(file.getvalue()))(x)


def ensemble(op: Op, x: Tensor) -> Tensor:
    """Apply the parameters twice, under vmap over the parameters alone."""
    stacked = {name: torch.stack((p, p)).detach() for name, p in op.named_parameters()}
    return vmap(lambda parameters: functional_call(op, parameters, (x,)))(stacked)[1]


def gradient(op: Op, x: Tensor) -> Tensor:
    """Return the gradient of a sum of squares under torch.func.grad."""
    return grad(lambda x: op(x).square().sum())(x)


def forward_mode(op: Op, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(op(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def inferred(op: Op, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return op(x).clone()


def with_default_dtype(op: Op, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return op(x)
    finally:
        torch.set_default_dtype(torch.float32)


def with_default_device(op: Op, x: Tensor) -> Tensor:
    with torch.device("meta"):
        return op(x)


def reference_jvp(op: Op, x: Tensor) -> Tensor:
    return jvp(op.reference, (x,), (torch.ones_like(x),))[1]


CALLERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "jit.trace": traced,
    "export": lambda op, x: torch.export.export(op, (x,)).module()(x),
    "compile": lambda op, x: torch.compile(op, backend="aot_eager", fullgraph=True)(x),
    "make_fx": lambda op, x: make_fx(op)(x)(x),
    "vmap": lambda op, x: vmap(op)(torch.stack((x, x)))[0],
    "ensemble": ensemble,
    "func.grad": gradient,
    "func.jvp": lambda op, x: jvp(op, (x,), (torch.ones_like(x),))[1],
    "forward_ad": forward_mode,
    "inference_mode": inferred,
    "default dtype": with_default_dtype,
    "default device": with_default_device,
    "deepcopy": lambda op, x: copy.deepcopy(op)(x),
    "contiguous": lambda op, x: op(x.contiguous()),
    "strided": lambda op, x: op(torch.stack((x, x), -1)[..., 0]),
    "expanded": lambda op, x: op(x[:1].expand_as(x)),
}
# The expected results of callers that do not return the operation of x itself.
REFERENCES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "func.grad": lambda op, x: grad(lambda x: op.reference(x).square().sum())(x),
    "func.jvp": reference_jvp,
    "forward_ad": reference_jvp,
    "expanded": lambda op, x: op.reference(x[:1].expand_as(x)),
}


# What torch.func.jvp imports of torch's own; 2.11 has the other kind of warning.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("kernels", ["auto", "cpu"])
def test_an_unusual_caller_gets_plain_torchs_result(op: Op, caller: str, kernels: str) -> None:
    # The last three callers' layouts fit no kernels.
    op.kernels = kernels if caller not in ("contiguous", "strided", "expanded") else "auto"
    x = images()
    try:
        expected = REFERENCES.get(caller, Op.reference)(op, x)
        if caller == "vmap":
            vmap(op.reference)(torch.stack((x, x)))
    except RuntimeError as error:
        if "querying is_contiguous" not in str(error) and "view size" not in str(error):
            raise
        pytest.skip("torch 2.11 cannot transform its group norm of channels-last memory")
    close(CALLERS[caller](op, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["auto", "cpu"])
def test_tensors_without_numbers_keep_to_shapes(op: Op, kernels: str) -> None:
    op.kernels, x = kernels, images()
    wanted = op.reference(x)
    meta = copy.deepcopy(op).to("meta")(x.to("meta"))
    assert (meta.shape, meta.dtype, meta.device.type) == (wanted.shape, wanted.dtype, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(op)(mode.from_tensor(x))
        assert (fake.shape, fake.dtype) == (wanted.shape, wanted.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):  # real inputs, whose results are not
        assert op(x).shape == wanted.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(op: Op, dtype: torch.dtype) -> None:
    x, tolerance = images(dtype), 1e-9 if dtype == torch.float64 else 0.05
    if dtype == torch.float64:
        op = op.double()
    wanted = copy.deepcopy(op).double().reference(x.double())
    try:
        got = op(x)
    except RuntimeError:  # torch's own norms and convolutions want one dtype for all
        assert dtype != torch.float64
        return
    close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0, C, S, S), (2, C, 0, S), (0, C, 0, 0)])
def test_nothing_in_is_nothing_out_or_an_error(op: Op, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    try:
        wanted = op.reference(x)
    except (RuntimeError, ValueError):
        with pytest.raises((RuntimeError, ValueError)):
            op(x)
        return
    close(op(x), wanted)


def test_second_derivatives_are_right_or_refused(op: Op) -> None:
    x = images().requires_grad_()
    (first,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(op.reference(x).square().sum(), x, create_graph=True)
    close(first, wanted, rtol=1e-4, atol=1e-4)
    (exact,) = torch.autograd.grad(wanted.square().sum(), x)
    try:
        (second,) = torch.autograd.grad(first.square().sum(), x)
    except RuntimeError as error:
        refusals = ("once_differentiable", "not have been used in the graph")
        assert any(words in str(error) for words in refusals)  # noqa: PT017
    else:
        close(second, exact, rtol=1e-3, atol=1e-3)


def test_complex_and_sparse_input_is_an_error_or_torchs_result(op: Op) -> None:
    for x in (images().to(torch.complex64), images().to_sparse(), images().to_mkldnn()):
        with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
            op(x).double()


def test_what_kernels_means_and_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, resolve = torch.device("cpu"), torch.device("cuda"), dispatch.resolve
    assert resolve("auto", cuda, torch.float32) == "triton"
    assert (
        resolve("auto", cuda, torch.float64) == resolve("auto", cpu, torch.float64) == "reference"
    )
    assert resolve("reference", cuda, torch.float32) == "reference"
    assert resolve("auto", cpu, torch.float32) == resolve("cpu", cpu, torch.float32) == "cpu"
    with pytest.raises(ValueError, match="kernels=cpu needs a CPU, the network is on cuda"):
        resolve("cpu", cuda, torch.float32)
    for kernels, device in (("cpu", cpu), ("triton", cuda)):
        with pytest.raises(ValueError, match=f"kernels={kernels} has no kernels for fp64"):
            resolve(kernels, device, torch.float64)
    monkeypatch.setattr("fastbyol_kernels.dispatch.TRITON_ON_CPU", False)
    with pytest.raises(ValueError, match="kernels=triton needs CUDA, x is on cpu"):
        resolve("triton", cpu, torch.float32, what="x")


def test_what_is_recorded_does_not_run_at_once() -> None:
    x = torch.ones(2)
    assert dispatch.at_once(x, None, torch.nn.Parameter(x))
    assert not dispatch.at_once(x, x.to("meta"))
    assert not dispatch.at_once(FakeTensorMode().from_tensor(x))
    assert not dispatch.at_once(x.to_sparse())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not dispatch.at_once(x)
    assert vmap(lambda row: row * dispatch.at_once(row))(x).sum() == 0
    assert (
        torch.compile(lambda x: x * dispatch.at_once(x), backend="eager", fullgraph=True)(x).sum()
        == 0
    )


@kernel
def _untouched(block: int, values: F32) -> None:
    """Write nowhere."""


@pytest.mark.parametrize(
    "tensor", [torch.empty(2, device="meta"), FakeTensorMode().from_tensor(torch.ones(2))]
)
def test_no_kernel_takes_the_address_of_what_has_none(tensor: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"values is a .*, compiled code takes plain tensors on a CPU"
    ):
        _untouched(1, tensor)


@pytest.mark.parametrize("how", ["meta", "fake", "vmap"])
def test_the_optimizer_takes_no_addresses_that_are_none(how: str) -> None:
    table = lars_ema.SegmentTable(
        (0, 8), (8, 8), torch.tensor([True, False]), torch.full((2,), 0.1), torch.ones(2)
    )
    online, gradient, momentum = torch.rand(3, 16).unbind()
    numbers = {"rule": "blog", "eta": 1e-3, "mu": 0.9, "ema_first": True}

    def step(buffers: tuple[Tensor, ...], table: Any, kernels: str = "auto") -> Tensor:
        lr, tau = buffers[0].new_full((), 0.1), buffers[0].new_full((), 0.9)
        return lars_ema.lars_ema(*buffers, table, lr, tau, kernels=kernels, **numbers)

    def buffers() -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in (online, gradient, momentum, online))

    wanted = step(buffers(), table, "reference")
    if how == "meta":
        there = lars_ema.SegmentTable(
            table.offsets,
            table.numels,
            *(t.to("meta") for t in (table.adapt, table.decay, table.lr_mult)),
        )
        assert step(tuple(t.to("meta") for t in buffers()), there).shape == wanted.shape
    elif how == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert step(buffers(), table).shape == wanted.shape
    else:
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            vmap(lambda w, g, m, t: step((w, g, m, t), table))(
                *(torch.stack((b, b)) for b in buffers())
            )


@pytest.mark.parametrize("word", ["", "Auto", "cuda", "numba", None])
def test_a_word_that_is_none_of_the_kernels_is_refused(op: Op, word: Any) -> None:
    op.kernels = word
    with pytest.raises(ValueError, match="kernels must be one of auto, triton, cpu, reference"):
        op(images())


def _tag(package: Path) -> str:
    """Return the tag of torch.compile's caches where ``package`` is imported, in a new process."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import fastbyol_kernels, torch; print(torch.compiler.config.cache_key_tag)",
        ],
        env={"PYTHONPATH": str(package), "TORCH_COMPILE_CACHE_KEY_TAG": "mine-", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_another_source_has_another_key(tmp_path: Path) -> None:
    """Inductor does not ask what shapes an operation returns: its sources must be in the key."""
    from torch._inductor.codecache import FxGraphHashDetails

    source = Path(fastbyol_kernels.__file__).parent
    other = tmp_path / source.name
    shutil.copytree(source, other)
    tag = torch.compiler.config.cache_key_tag
    assert tag.startswith("fastbyol-")
    assert FxGraphHashDetails(None, [], {}, []).cache_key_tag == tag  # type: ignore[arg-type]
    assert _tag(tmp_path) == f"mine-{tag}"
    with (other / "group_norm" / "triton.py").open("a") as file:
        file.write("\n")
    assert _tag(tmp_path) not in (tag, f"mine-{tag}")
