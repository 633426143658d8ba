"""Group norm, reference and kernels, against the formula written with sums in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbyol_kernels.group_norm import bytes_moved, group_norm, sum_samples, sum_table
from fastbyol_kernels.group_norm import triton as module
from fastbyol_kernels.group_norm.triton import launch

CASES = (((3, 8, 5, 3), 4), ((2, 6, 1, 1), 3), ((4, 12, 2, 7), 1), ((5, 16), 8), ((3, 10), 1))
# Kernels: odd sizes, 2 to 32 channels per group, channel counts that are no power of two, one
# pixel, one group, one sample.
SHAPES = (
    ((2, 64, 6, 5), 32),
    ((3, 128, 3, 3), 32),
    ((2, 64, 7, 3), 2),
    ((1, 12, 5, 5), 4),
    ((2, 96, 3, 2), 3),
    ((3, 16, 1, 1), 8),
    ((2, 6, 3, 5), 1),
    ((1, 256, 2, 2), 32),
)
FLAGS = ((False, False), (False, True), (True, False), (True, True))


def by_sums(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    rows = x.reshape(x.shape[0], groups, -1)
    centred = rows - rows.sum(2, keepdim=True) / rows.shape[2]
    var = centred.square().sum(2, keepdim=True) / rows.shape[2]
    shape = (1, -1) + (1,) * (x.ndim - 2)
    y = (centred / (var + 1e-5).sqrt()).view(x.shape) * weight.view(shape) + bias.view(shape)
    y = y if residual is None else y + residual
    return y.clamp_min(0) if relu else y


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 0.5
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1], generator=g, dtype=torch.float64).unbind()
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_equals_the_formula(shape: tuple[int, ...], groups: int) -> None:
    x, weight, bias = arguments(shape)
    torch.testing.assert_close(
        group_norm(x, groups, weight, bias),
        by_sums(x, groups, weight, bias),
        rtol=1e-12,
        atol=1e-12,
    )
    residual = x.flip(0)
    got = group_norm(x, groups, weight, bias, residual=residual, relu=True)
    torch.testing.assert_close(
        got, by_sums(x, groups, weight, bias, residual, True), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_gradient(shape: tuple[int, ...], groups: int) -> None:
    leaves = [t.requires_grad_() for t in arguments(shape)]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, groups, w, b), leaves)


def test_keeps_channels_last_forward_and_backward() -> None:
    x, weight, bias = arguments((4, 8, 6, 6), torch.float32)
    x.requires_grad_()
    y = group_norm(x, 4, weight, bias)
    y.backward(torch.randn_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_bf16_takes_fp32_statistics() -> None:
    x, weight, bias = arguments((4, 8, 6, 6), torch.float32)
    half = (x + 200).bfloat16()
    expected = by_sums(half.double(), 2, weight.double(), bias.double())
    got = group_norm(half, 2, weight, bias)
    assert got.dtype == torch.bfloat16
    # One rounding of the result to 8 bits; statistics in bf16 would be off by whole units at a mean
    # of 200.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-3)


# The kernels.

TERMS = 4e-6  # of the largest term: fp32's rounding of ten or so, see Case.compare


class Case:
    """The inputs of one call on ``device``, an upstream gradient, and the exact results."""

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        dtype: torch.dtype,
        flags: tuple[bool, bool],
        device: torch.device,
        *,
        mean: float = 0.5,
        gradient_scale: float = 1.0,
        kernels: str = "triton",
    ) -> None:
        g = torch.Generator().manual_seed(sum(shape) + groups)
        self.kernels = kernels
        self.groups, self.relu, self.dtype = groups, flags[1], dtype

        def activation(scale: float, shift: float) -> Tensor:
            values = torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift
            return values.to(device, dtype).contiguous(memory_format=torch.channels_last)

        weight, bias = torch.randn(2, shape[1], generator=g).to(device).unbind()
        residual = activation(1.0, 0.0) if flags[0] else None
        self.inputs = (activation(2.0, mean), weight, bias, residual)
        self.gradient = activation(gradient_scale, 0.0)

    def run(self, **options: Any) -> list[Tensor]:
        """Return y and the gradients of the inputs."""
        x, weight, bias, residual = (
            None if t is None else t.detach().clone().requires_grad_() for t in self.inputs
        )
        y = group_norm(
            x,
            self.groups,
            weight,
            bias,
            residual=residual,
            relu=self.relu,
            **({"kernels": self.kernels} | options),
        )
        y.backward(self.gradient.to(y.dtype))
        leaves = [t for t in (x, weight, bias, residual) if t is not None]
        grads = [t.grad for t in leaves if t.grad is not None]
        assert len(grads) == len(leaves)
        return [y.detach(), *grads]

    def exact(self) -> list[Tensor]:
        """Return the same by the formula in fp64."""
        x, weight, bias, residual = (
            None if t is None else t.detach().double().requires_grad_() for t in self.inputs
        )
        y = by_sums(x, self.groups, weight, bias, residual, self.relu)
        y.backward(self.gradient.double())
        leaves = [t for t in (x, weight, bias, residual) if t is not None]
        return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]

    def compare(self, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Compare within rounding errors.

        bf16 results have one rounding: 2^-8 of the value, or 2^-7 in the interpreter, which
        truncates. In fp32 a value is the sum of about ten terms, each rounded to 2^-24 of the
        largest: 4e-6 of y's largest value, for dx of the largest rstd * weight * dy (after the
        means are subtracted, dx can be far smaller). A sum over elements adds up their errors: 4e-6
        of the sum of the absolute terms. y is x * scale + shift, two numbers that may be far larger
        than their sum, and each is rounded to 2^-24 of itself.
        """
        y_size, dx_size, sum_size = self.sizes(expected[0])
        assert len(got) == len(expected)
        for a, b, size in zip(
            got, expected, (y_size, dx_size, sum_size, sum_size, 0.0), strict=False
        ):
            assert a.shape == b.shape
            half = self.dtype == torch.bfloat16 and a.ndim == 4
            torch.testing.assert_close(
                a.double(), b, rtol=2**-7 if half else 2e-6, atol=TERMS * size
            )

    def sizes(self, y: Tensor) -> tuple[float, float, float]:
        """Return the largest terms of y and dx and the largest absolute sum of affine gradients."""
        x, weight = self.inputs[0].double(), self.inputs[1].double()
        rows = x.reshape(x.shape[0], self.groups, -1)
        std = (rows.var(2, correction=0) + 1e-5).sqrt()
        x_hat = ((rows - rows.mean(2, keepdim=True)) / std[:, :, None]).view(x.shape)
        gradient = self.gradient.double().abs()
        summed = (gradient * x_hat.abs().clamp_min(1)).sum((0, 2, 3)).max().item()
        scaled = (weight.abs().max() * (rows.abs() / std[:, :, None]).max()).item()
        return (
            y.abs().max().item() + scaled * 2**-24 / TERMS,
            (weight.abs().max() * gradient.max() / std.min()).item(),
            summed,
        )


@pytest.fixture(params=[False, True], ids=["whole", "cut"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Cut samples into runs or not, so that small shapes use both kinds of launches."""
    if request.param:
        for name in ("MAX_BYTES_FORWARD", "MAX_BYTES_BACKWARD"):
            monkeypatch.setattr(module, name, 0)
        # Some 10 to 30 pixels of 64 bytes: a few runs, the last one short.
        monkeypatch.setattr(module, "RUN_BYTES", 2000)
    return bool(request.param)


@pytest.mark.usefixtures("nan_filled", "cut")
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_equal_fp64(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    kernels: str,
    kernel_device: torch.device,
) -> None:
    for flags in FLAGS:
        case = Case(shape, groups, dtype, flags, kernel_device, kernels=kernels)
        case.compare(case.run(), case.exact())


@pytest.mark.gpu
@settings(max_examples=30, derandomize=True)
@given(
    st.integers(1, 3), st.sampled_from((1, 2, 3, 8)), st.integers(1, 9), st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(FLAGS), st.booleans(), st.sampled_from(("triton", "cpu")),
)  # fmt: skip
def test_kernels_equal_fp64_at_any_shape(
    n: int,
    groups: int,
    per_group: int,
    h: int,
    w: int,
    flags: tuple[bool, bool],
    half: bool,
    kernels: str,
) -> None:
    # One value per group has no variance: its gradient is rounding noise times 1 / sqrt(eps).
    per_group = max(per_group, 2)
    device = torch.device("cuda" if torch.cuda.is_available() and kernels == "triton" else "cpu")
    dtype = torch.bfloat16 if half else torch.float32
    case = Case((n, groups * per_group, h, w), groups, dtype, flags, device, kernels=kernels)
    case.compare(case.run(), case.exact())


@pytest.mark.usefixtures("nan_filled", "cut")
def test_affine_gradients_by_sample_are_summed_of_all_layers_at_once(device: torch.device) -> None:
    """Two layers, of a channel more than the columns of a program and of fewer, out of order."""
    cases = [
        Case(shape, 2, torch.float32, (False, True), device)
        for shape in ((3, 34, 5, 3), (3, 4, 5, 5))
    ]
    out, by_sample, offsets = torch.full((90,), 7.0, device=device), list[Tensor](), (50, 8, 4, 0)
    for case in cases:
        x, *affine, _ = case.inputs
        assert x is not None
        leaves = [t.expand(3, -1).requires_grad_() for t in affine if t is not None]
        y = group_norm(x, 2, *leaves, relu=True, kernels="triton")
        by_sample += torch.autograd.grad(y, leaves, case.gradient)
        for sample in range(3):
            part = [t if t is None else t[sample : sample + 1] for t in (x, case.gradient)]
            alone = Case(tuple(part[0].shape), 2, torch.float32, (False, True), device)
            alone.inputs, alone.gradient = (part[0], *affine, None), part[1]
            of_weight, of_bias = (t[sample] for t in by_sample[-2:])
            y, _, *exact = alone.exact()
            size = TERMS * alone.sizes(y)[2]
            for got, expected in zip((of_weight, of_bias), exact, strict=True):
                torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=size)
    numels = [part.shape[1] for part in by_sample]
    sum_samples(by_sample, out, sum_table(offsets, numels, device))
    expected = torch.full_like(out, 7.0)
    for part, offset in zip(by_sample, offsets, strict=True):
        expected[offset : offset + part.shape[1]] = part.double().sum(0)
    torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("cut")
def test_two_runs_are_equal_in_every_bit(kernels: str, kernel_device: torch.device) -> None:
    case = Case((3, 64, 5, 5), 32, torch.bfloat16, (True, True), kernel_device, kernels=kernels)
    for a, b in zip(case.run(), case.run(), strict=True):
        assert torch.equal(a, b)


def test_samples_do_not_touch_each_other(kernels: str, kernel_device: torch.device) -> None:
    case = Case((3, 64, 3, 5), 32, torch.float32, (True, True), kernel_device, kernels=kernels)
    before = case.run()
    for tensor in (case.inputs[0], case.gradient):
        tensor[1] = float("nan")
    after = case.run()
    for a, b in zip((before[0], before[1], before[4]), (after[0], after[1], after[4]), strict=True):
        assert torch.equal(a[::2], b[::2])
        assert a.isfinite().all()
    assert after[0][1].isnan().all()


@pytest.mark.usefixtures("cut")
def test_large_mean_costs_no_digits_of_the_variance(
    kernels: str, kernel_device: torch.device
) -> None:
    """Use a mean of 1,000 stds, at which E[x^2] - E[x]^2 keeps one digit in fp32."""
    case = Case(
        (2, 64, 5, 5),
        32,
        torch.float32,
        (False, False),
        kernel_device,
        mean=2000.0,
        kernels=kernels,
    )
    got, expected = case.run(), case.exact()
    # x * scale + shift is the difference of two numbers near 1,000 * weight: 2^-24 of 3,000.
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_collapsed_gradients_keep_their_digits(
    dtype: torch.dtype, kernels: str, kernel_device: torch.device
) -> None:
    """Use a gradient as near collapse: it must neither flush to zero nor drown in a sum."""
    case = Case(
        (2, 64, 5, 4), 32, dtype, (True, True), kernel_device, gradient_scale=1e-6, kernels=kernels
    )
    case.compare(case.run(), case.exact())


def test_gradient_in_another_memory_format(kernels: str, kernel_device: torch.device) -> None:
    """Use an expanded gradient, with strides of zero, as pooling returns it."""
    case = Case((2, 64, 3, 3), 32, torch.float32, (False, True), kernel_device, kernels=kernels)
    case.gradient = case.gradient[:, :, :1, :1].expand(2, 64, 3, 3)
    case.compare(case.run(), case.exact())


# opcheck itself looks at the .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(device: torch.device) -> None:
    for flags in FLAGS:
        x, weight, bias, residual = (
            None if t is None else t.requires_grad_()
            for t in Case((2, 16, 3, 2), 4, torch.float32, flags, device).inputs
        )
        torch.library.opcheck(
            torch.ops.fastbyol.group_norm, (x, weight, bias, residual, 4, 1e-5, flags[1])
        )


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_compiled_equals_eager(flags: tuple[bool, bool], device: torch.device) -> None:
    case = Case((2, 16, 3, 3), 4, torch.bfloat16, flags, device)
    x, weight, bias, residual = (None if t is None else t.requires_grad_() for t in case.inputs)

    def layer() -> Tensor:
        return (
            group_norm(x * 2, 4, weight, bias, residual=residual, relu=flags[1], kernels="triton")
            + 1
        )

    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    eager, compiled = layer(), torch.compile(layer, fullgraph=True, backend="aot_eager")()
    assert torch.equal(eager, compiled)
    for a, b in zip(
        *(torch.autograd.grad(y, leaves, case.gradient) for y in (eager, compiled)), strict=True
    ):
        assert torch.equal(a, b)


# Inductor of torch 2.11 uses a part of torch that torch has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.slow
def test_inductor_keeps_channels_last(device: torch.device) -> None:
    """Check that the kernel gets channels-last tensors although Inductor chooses layouts itself."""
    x, weight, bias, _ = (
        None if t is None else t.requires_grad_()
        for t in Case((2, 16, 5, 4), 4, torch.float32, (False, True), device).inputs
    )
    kernel = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)).to(
        device, memory_format=torch.channels_last
    )

    def network(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = torch.nn.functional.conv2d(x, kernel, padding=1) * 0.1
        return (
            group_norm(h, 4, weight, bias, residual=x + 1, relu=True, kernels="triton")
            .mean((2, 3))
            .square()
            .sum()
        )

    leaves = [t for t in (x, weight, bias) if t is not None]
    eager, compiled = network(*leaves), torch.compile(network, fullgraph=True)(*leaves)
    # Convolution and means may be summed in another order: some hundred terms of 2^-24.
    torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=0.0)
    for a, b in zip(*(torch.autograd.grad(y, leaves) for y in (eager, compiled)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_auto_takes_the_kernels_for_a_cpu_where_it_can() -> None:
    x, weight, bias = arguments((2, 8, 3, 3), torch.float32)
    auto = group_norm(x, 4, weight, bias)
    assert torch.equal(auto, group_norm(x, 4, weight, bias, kernels="cpu"))
    for other in (x.contiguous(), x.half(), x[:, :, 0, 0], x.double()):
        wide = (weight.double(), bias.double()) if other.dtype == torch.float64 else (weight, bias)
        got = group_norm(other, 4, *wide)
        assert torch.equal(got, group_norm(other, 4, *wide, kernels="reference"))


# The kernels for a CPU alone.


# Samples in one block and several, rows of several pixels with a short last one, one pixel, a
# sample of many rows.
@pytest.mark.parametrize(
    "shape", [(5, 64, 7, 9), (300, 32, 1, 1), (3, 96, 40, 41), (9, 520, 5, 5)], ids=str
)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    shape: tuple[int, ...], flags: tuple[bool, bool]
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        case, results = Case(shape, 4, dtype, flags, torch.device("cpu"), kernels="cpu"), []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(case.run())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        if shape[2] > 1:
            case.compare(results[0], case.exact())


@pytest.mark.parametrize(
    ("dtype", "mean", "rtol"), [(torch.bfloat16, 200.0, 2**-8), (torch.float32, 1e4, 2e-6)], ids=str
)
def test_statistics_keep_their_digits_at_a_huge_mean(
    dtype: torch.dtype, mean: float, rtol: float
) -> None:
    """Use first pixels, a possible shift, that are far from all others."""
    case = Case(
        (2, 64, 24, 24), 32, dtype, (False, False), torch.device("cpu"), mean=mean, kernels="cpu"
    )
    case.inputs[0][1, :, 0] = 0
    got, expected = case.run()[0].double(), case.exact()[0]
    # x * scale + shift are the difference of two numbers near mean / std: some roundings of 2^-24
    # of it.
    for sample in range(2):
        size = 8 * 2**-24 * mean * case.inputs[1].abs().max().item()
        torch.testing.assert_close(got[sample], expected[sample], rtol=rtol, atol=size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_backward_pass_masks_what_the_forward_pass_cut(dtype: torch.dtype) -> None:
    """Compare the bias's gradient with the count of positive outputs, bit for bit."""
    for shape in ((2, 64, 9, 7), (3, 6, 5, 5), (2, 12, 1, 3)):
        case = Case(shape, 2, dtype, (False, True), torch.device("cpu"), kernels="cpu")
        # Biases that put an element of each channel at zero, or within a rounding of it.
        x, weight, _, _ = case.inputs
        plain = group_norm(x, 2, weight, torch.zeros(shape[1]), kernels="cpu")
        case.inputs = (x, weight, -plain[0, :, 0, -1].float(), None)
        case.gradient = torch.ones_like(x)
        y, _, _, dbias = case.run()
        assert torch.equal(dbias, (y > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_no_number_comes_through(dtype: torch.dtype, added: bool, relu: bool) -> None:
    for channels in (6, 64, 512):
        for wrong in (float("nan"), float("inf")):
            x, weight, bias = arguments((3, channels, 5, 3), torch.float32)
            x = x.to(dtype)
            residual = x.flip(0) if added else None
            x[1, 0, 0, 0], bias[1] = wrong, float("nan")
            results = [
                group_norm(
                    x, 2, weight, bias, residual=residual, relu=relu, kernels=kernels
                ).isnan()
                for kernels in ("cpu", "reference")
            ]
            assert torch.equal(*results)


def test_is_differentiable_once() -> None:
    x, weight, bias = arguments((2, 8, 3, 3), torch.float32)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(
        group_norm(x, 4, weight, bias).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, bias = arguments((2, 8, 3, 3), torch.float32)
    bias.requires_grad_()
    group_norm(x, 4, weight, bias, residual=x, relu=True).sum().backward()
    assert bias.grad is not None
    assert x.grad is weight.grad is None


def test_empty_batch(kernels: str, kernel_device: torch.device) -> None:
    x, weight, bias = (t.to(kernel_device) for t in arguments((0, 8, 3, 3), torch.float32))
    assert group_norm(x, 4, weight, bias, kernels=kernels).shape == (0, 8, 3, 3)


def test_bad_input_names_the_argument(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = (t.to(device) for t in arguments((2, 8, 4, 3), torch.float32))
    half = x.bfloat16()

    def call(
        x: Tensor = x, groups: int = 4, weight: Tensor = weight, bias: Tensor = bias, **options: Any
    ) -> None:
        group_norm(x, groups, weight, bias, **({"kernels": "triton"} | options))

    for names, wrong in (
        ("^num_groups", {"groups": 3}),
        ("^num_groups", {"groups": 0}),
        ("^x must be", {"x": x[0]}),
        ("^x must be", {"x": x.half()}),
        ("^x must be channels-last", {"x": x.contiguous()}),
        ("^weight must be", {"weight": weight[:4]}),
        ("^weight must be", {"weight": weight.repeat(2, 1)}),
        ("^bias must be", {"bias": bias.expand(3, -1)}),
        ("^weight must be", {"weight": weight.expand(2, -1), "kernels": "reference"}),
        ("^weight must be float32", {"weight": weight.bfloat16()}),
        ("^weight must be contiguous", {"weight": weight.repeat(2)[::2]}),
        ("^bias is on meta", {"bias": bias.to("meta")}),
        ("^residual must be", {"residual": half}),
        ("^residual must be channels-last", {"residual": x.contiguous()}),
        ("^kernels must be", {"kernels": "cuda"}),
    ):
        with pytest.raises(ValueError, match=names):
            call(**wrong)  # type: ignore[arg-type]
    if not x.is_cuda:
        monkeypatch.setattr("fastbyol_kernels.dispatch.TRITON_ON_CPU", False)
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            call()


@pytest.mark.parametrize(
    ("side", "channels"),
    [(112, 64), (96, 64), (56, 64), (48, 64), (24, 64), (48, 128), (12, 128), (3, 512)],
)
@pytest.mark.parametrize("groups", [1, 8, 32])
@pytest.mark.parametrize("num_read", [1, 2, 3])
def test_launches_cover_samples_in_whole_groups(
    side: int, channels: int, groups: int, num_read: int
) -> None:
    for element_bytes, max_bytes in ((2, module.MAX_BYTES_FORWARD), (4, module.MAX_BYTES_BACKWARD)):
        plan = launch(side * side, channels, groups, element_bytes, num_read, max_bytes)
        assert plan.num_runs == -(-side * side // plan.run)
        assert plan.num_runs <= module.MAX_RUNS
        assert channels % plan.slab == 0
        assert plan.slab % (channels // groups) == 0
        assert plan.slab * element_bytes >= module.MIN_SLAB_BYTES
        assert plan.run * plan.slab * element_bytes * num_read <= max_bytes or plan.num_runs > 1
        assert plan.block_c >= plan.slab
        assert 1 <= plan.num_warps <= 32


def test_bytes_moved() -> None:
    tensor = 512 * 24 * 24 * 64 * 2
    assert bytes_moved((512, 64, 24, 24), 2, relu=True) == 2 * tensor
    assert bytes_moved((512, 64, 24, 24), 2, residual=True, relu=True) == 3 * tensor
    assert bytes_moved((512, 64, 24, 24), 2, relu=True, backward=True) == 3 * tensor
    assert bytes_moved((512, 64, 24, 24), 2, residual=True, backward=True) == 3 * tensor
    assert bytes_moved((512, 64, 24, 24), 2, residual=True, relu=True, backward=True) == 5 * tensor
