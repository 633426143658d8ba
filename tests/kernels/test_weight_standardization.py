"""Weight standardization against the formula written with sums, in fp64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbyol_kernels.weight_standardization import (
    EPS,
    RowTable,
    bytes_moved,
    reference,
    row_table,
    standardize_rows,
    standardize_rows_backward_into,
    weight_standardization,
)

SHAPES = ((4, 3, 7, 7), (5, 8, 3, 3), (7, 6, 1, 1), (9, 16), (1, 2))


def by_sums(w: torch.Tensor) -> torch.Tensor:
    rows = w.flatten(1)
    count = rows.shape[1]
    centred = rows - rows.sum(1, keepdim=True) / count
    std = (centred.square().sum(1, keepdim=True) / (count - 1)).sqrt()
    return (centred / (std + 1e-5)).view(w.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    # Rounding only: some ten operations at 1e-16.
    torch.testing.assert_close(weight_standardization(w), by_sums(w), rtol=1e-13, atol=1e-13)
    # fp32 rounds inputs of size 3 around a mean of 1, so 1e-6 is ten roundings.
    torch.testing.assert_close(weight_standardization(w.float()).double(), by_sums(w), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gradient(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(weight_standardization, (w,))


def test_keeps_channels_last_and_dtype() -> None:
    w = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    out = weight_standardization(w)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.float32


def test_a_channel_of_equal_weights_is_zero_with_a_finite_gradient() -> None:
    w = torch.full((2, 4, 3, 3), 0.25, dtype=torch.float64, requires_grad=True)
    out = weight_standardization(w)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert w.grad is not None
    assert w.grad.isfinite().all()


def test_scale_and_shift_of_a_channel_do_not_matter() -> None:
    w = torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # eps beside a std of at least .5 leaves a relative 2e-5.
    assert EPS == 1e-5
    torch.testing.assert_close(weight_standardization(w * 7 - 3), weight_standardization(w), rtol=4e-5, atol=0.0)


# The multi-tensor op.

# Rows of 27, 147 (stems), 1,152, 4,608 (3x3 over 128 and 512), 64 (1x1), 300 (aligned to 4 only), 2, 512, 4,609.
NETWORK = ((5, 3, 3, 3), (3, 3, 7, 7), (3, 128, 3, 3), (2, 512, 3, 3), (9, 64, 1, 1), (3, 300), (4, 2), (2, 512), (1, 4609))


def network(
    shapes: Sequence[Sequence[int]], device: torch.device, *, skip: int = 64, scale: float = 0.05
) -> tuple[Tensor, RowTable]:
    """A flat parameter of padded segments, ``skip`` elements of something else before each, and a denser flat copy."""
    offsets, copies, end, copy_end = [], [], 0, 0
    for shape in shapes:
        numel = -(-torch.Size(shape).numel() // 64) * 64
        offsets.append(end + skip)
        copies.append(copy_end)
        end, copy_end = end + skip + numel, copy_end + numel
    flat = torch.randn(end + 5, generator=torch.Generator().manual_seed(len(shapes))) * scale + 0.01
    return flat.to(device), row_table(offsets, shapes, copies, flat_numel=end + 5, copy_numel=copy_end, device=device)


def exact(flat: Tensor, table: RowTable, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Copy and gradient by the formula with sums, row by row, in fp64."""
    leaf = flat.detach().double().requires_grad_()
    copy = torch.zeros(table.copy_numel, dtype=torch.float64, device=flat.device)
    for offset, num_rows, length, target in table.weights:
        rows = by_sums(leaf[offset : offset + num_rows * length].view(num_rows, length)).flatten()
        copy = copy.index_put((torch.arange(target, target + len(rows), device=flat.device),), rows)
    (grad,) = torch.autograd.grad(copy, leaf, gradient.double())
    return copy.detach(), grad


def compare(copy: Tensor, grad: Tensor, expected: tuple[Tensor, Tensor], gradient: Tensor, std: float) -> None:
    """A bf16 copy is one rounding off (2^-8; the interpreter cuts, 2^-7); fp32 ten roundings of values of at most ten.

    The gradient's terms are of size |g| / std; what is left of them after two projections may be smaller by any factor.
    """
    half = copy.dtype == torch.bfloat16
    torch.testing.assert_close(copy.double(), expected[0], rtol=2**-7 if half else 2e-6, atol=4e-6)
    size = gradient.abs().max().item() / std
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-5, atol=4e-6 * size)


def both(flat: Tensor, table: RowTable, gradient: Tensor, kernels: str = "triton") -> tuple[Tensor, Tensor]:
    leaf = flat.clone().requires_grad_()
    copy, _, _ = standardize_rows(leaf, table, gradient.dtype, kernels=kernels)
    copy.backward(gradient)
    assert leaf.grad is not None
    return copy.detach(), leaf.grad


def upstream(table: RowTable, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(table.copy_numel, generator=torch.Generator().manual_seed(1)) * scale).to(device, dtype)


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element left unwritten shows."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


@pytest.fixture(params=["triton", "cpu"])
def kernels(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(kernels: str, device: torch.device) -> torch.device:
    """Where ``kernels`` run."""
    return torch.device("cpu") if kernels == "cpu" else device


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("kernels", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_equal_fp64(dtype: torch.dtype, kernels: str, place: torch.device) -> None:
    device = place
    flat, table = network(NETWORK, device)
    gradient = upstream(table, dtype, device)
    copy, grad = both(flat, table, gradient, kernels)
    # The smallest std is that of a row of two, whose weights may be near each other.
    smallest = standardize_rows(flat.double(), table, torch.float64)[2].min().item()
    compare(copy, grad, exact(flat, table, gradient), gradient, smallest)
    assert copy.dtype == dtype
    for offset, length in table.copy_gaps.tolist():
        assert torch.equal(copy[offset : offset + length].float(), torch.zeros(length, device=device))


@pytest.mark.gpu
@settings(max_examples=20, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(2, 40), st.sampled_from((1, 8, 9, 16))), min_size=1, max_size=5),
    st.integers(0, 70),
    st.booleans(),
    st.sampled_from(("triton", "cpu")),
)
def test_rows_equal_fp64_at_any_shape(shapes: list[tuple[int, ...]], skip: int, half: bool, kernels: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() and kernels == "triton" else "cpu")
    flat, table = network(shapes, device, skip=skip)
    gradient = upstream(table, torch.bfloat16 if half else torch.float32, device)
    copy, grad = both(flat, table, gradient, kernels)
    smallest = standardize_rows(flat.double(), table, torch.float64)[2].min().item()
    compare(copy, grad, exact(flat, table, gradient), gradient, smallest)


def test_statistics_are_those_of_the_rows(kernels: str, place: torch.device) -> None:
    flat, table = network(NETWORK, place)
    got = standardize_rows(flat, table, torch.float32, kernels=kernels)[1:]
    expected = standardize_rows(flat.double(), table, torch.float64)[1:]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)


def test_two_runs_are_equal_in_every_bit(kernels: str, place: torch.device) -> None:
    flat, table = network(NETWORK, place)
    gradient = upstream(table, torch.bfloat16, place)
    for a, b in zip(both(flat, table, gradient, kernels), both(flat, table, gradient, kernels), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kernels", ["triton", "cpu", "reference"])
def test_backward_into_a_buffer_leaves_the_rest_alone(kernels: str, place: torch.device) -> None:
    flat, table = network(NETWORK, place)
    gradient = upstream(table, torch.float32, place)
    _, means, stds = standardize_rows(flat, table, torch.float32, kernels=kernels)
    out = torch.full_like(flat, 7.0)
    standardize_rows_backward_into(out, gradient, flat, means, stds, table, kernels=kernels)
    expected = both(flat, table, gradient, kernels)[1]
    for offset, length in table.flat_gaps.tolist():
        expected[offset : offset + length] = 7.0
    assert torch.equal(out, expected)


def test_equal_weights_give_zeros_and_a_finite_gradient(kernels: str, place: torch.device) -> None:
    flat, table = network(((3, 512), (3, 30)), place)
    flat.fill_(0.25)
    copy, grad = both(flat, table, upstream(table, torch.float32, place), kernels)
    assert torch.equal(copy, torch.zeros_like(copy))
    assert grad.isfinite().all()


def test_collapsed_gradients_keep_their_digits(kernels: str, place: torch.device) -> None:
    """Near collapse the gradient is a millionth of the weights: bf16 has its range, and no sum may drown it."""
    flat, table = network(((3, 512), (3, 30)), place)
    for dtype in (torch.float32, torch.bfloat16):
        gradient = upstream(table, dtype, place, 1e-6)
        copy, grad = both(flat, table, gradient, kernels)
        compare(copy, grad, exact(flat, table, gradient), gradient, 0.03)


# The processor's machine code alone.


@pytest.fixture
def threads() -> Iterator[Sequence[int]]:
    before = torch.get_num_threads()
    yield (1, 2, 3, 7)
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, threads: Sequence[int]) -> None:
    cpu = torch.device("cpu")
    flat, table = network((*NETWORK, (200, 300)), cpu)
    gradient, found = upstream(table, dtype, cpu), []
    for number in threads:
        torch.set_num_threads(number)
        found.append(both(flat, table, gradient, "cpu"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [*SHAPES[:4], (300, 128, 3, 3), (2, 4, 1, 3), (1, 5)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_weight_alone_equals_fp64(shape: tuple[int, ...], channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=generator) * 0.05 + 0.01
    if channels_last and w.ndim == 4:
        w = w.contiguous(memory_format=torch.channels_last)
    leaf, exactly = w.clone().requires_grad_(), w.double().requires_grad_()
    gradient = torch.randn(shape, generator=generator)
    out, expected = weight_standardization(leaf, kernels="cpu"), by_sums(exactly)
    out.backward(gradient)
    expected.backward(gradient.double())
    assert leaf.grad is not None
    assert exactly.grad is not None
    assert out.stride() == leaf.grad.stride() == w.stride()
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=4e-6)
    size = gradient.abs().max().item() / w.double().flatten(1).std(1).min().item()
    torch.testing.assert_close(leaf.grad.double(), exactly.grad, rtol=1e-5, atol=4e-6 * size)


def test_a_huge_mean_costs_no_digits_of_the_deviation() -> None:
    w = torch.randn(4, 512, 3, 3, generator=torch.Generator().manual_seed(3)) + 1e4
    # The mean itself is rounded: 2^-24 of 1e4, and a few of that for its sum.
    torch.testing.assert_close(weight_standardization(w).double(), by_sums(w.double()), rtol=0, atol=8 * 2**-24 * 1e4)


def test_what_is_no_number_stays_in_its_row() -> None:
    w = torch.randn(5, 8, 3, 3, generator=torch.Generator().manual_seed(4))
    w[2, 3, 1, 1], w[4, 0, 0, 0] = float("nan"), float("inf")
    w.requires_grad_()
    out = weight_standardization(w)
    out.sum().backward()
    assert w.grad is not None
    for tensor in (out, w.grad):
        assert tensor[[0, 1, 3]].isfinite().all()
        assert tensor[[2, 4]].isnan().all()


def test_what_machine_code_does_not_know_is_plain_torch() -> None:
    w = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(weight_standardization(w), reference(w))
    for other in (w.double(), w.transpose(0, 1), w[:, ::2]):
        assert torch.equal(weight_standardization(other), reference(other))
    for kernels in ("reference", "triton"):
        assert torch.equal(weight_standardization(w, kernels=kernels), reference(w))
    with pytest.raises(ValueError, match=r"^kernels must be"):
        weight_standardization(w, kernels="cuda")
    flat, table = network(((2, 264), (3, 30)), torch.device("cpu"))
    got = standardize_rows(flat, table, torch.float16)[0]
    assert torch.equal(got, standardize_rows(flat, table, torch.float16, kernels="reference")[0])
    with pytest.raises(ValueError, match=r"^dtype"):
        standardize_rows(flat, table, torch.float16, kernels="cpu")


def test_no_rows_at_all() -> None:
    _, table = network((), torch.device("cpu"))
    copy, means, stds = standardize_rows(torch.randn(table.flat_numel), table, torch.float32, kernels="cpu")
    assert len(copy) == len(means) == len(stds) == 0


# opcheck itself looks at the .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(device: torch.device) -> None:
    flat, table = network(((2, 264), (3, 30)), device)
    arguments = (table.rows, table.copy_gaps, table.flat_gaps, table.num_long, table.copy_numel, torch.bfloat16, EPS)
    torch.library.opcheck(torch.ops.fastbyol.standardize_rows, (flat.requires_grad_(), *arguments))
    copy, means, stds = standardize_rows(flat.detach(), table, torch.float32, kernels="triton")
    into = (flat.detach().clone(), copy, flat.detach(), means, stds, table.rows, table.num_long, EPS)
    torch.library.opcheck(torch.ops.fastbyol.standardize_rows_backward_into, into)


def test_compiled_equals_eager(device: torch.device) -> None:
    flat, table = network(((2, 264), (3, 30)), device)
    flat.requires_grad_()
    gradient = upstream(table, torch.bfloat16, device)

    def loss() -> Tensor:
        return (standardize_rows(flat * 2, table, torch.bfloat16, kernels="triton")[0] * gradient).float().sum()

    eager, compiled = loss(), torch.compile(loss, fullgraph=True, backend="aot_eager")()
    assert torch.equal(eager, compiled)
    assert torch.equal(*(torch.autograd.grad(y, flat)[0] for y in (eager, compiled)))


def test_long_rows_come_first_and_all_rows_once(device: torch.device) -> None:
    _, table = network(NETWORK, device)
    rows = table.rows.tolist()
    lengths = [length for _, length, _ in rows]
    long = lengths[: table.num_long]
    assert sorted(long, reverse=True) == long
    assert sorted(set(long)) == [512, 1152, 4608]
    assert sorted(set(lengths[table.num_long :])) == [2, 27, 64, 147, 300, 4609]
    covered = torch.zeros(table.copy_numel, dtype=torch.int64)
    for start, length in [(row[2], row[1]) for row in rows] + table.copy_gaps.tolist():
        covered[start : start + length] += 1
    assert torch.equal(covered, torch.ones_like(covered))


def test_bytes_moved() -> None:
    _, table = network(((2, 264), (3, 30)), torch.device("cpu"))
    assert bytes_moved(table, 2) == 618 * 6
    assert bytes_moved(table, 2, backward=True) == 618 * 10


def test_bad_input_names_the_argument(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    flat, table = network(((2, 264), (3, 30)), device)

    def call(flat: Tensor = flat, dtype: torch.dtype = torch.float32, kernels: str = "triton") -> Any:
        return standardize_rows(flat, table, dtype, kernels=kernels)

    shifted = torch.zeros(len(flat) + 1, device=device)[1:]
    for message, wrong in (
        ("^flat must be", {"flat": flat[:-1]}),
        ("^flat must be float32", {"flat": flat.bfloat16()}),
        ("^table is on", {"flat": flat.to("meta")}),
        ("^flat must start", {"flat": shifted}),
        ("^dtype", {"dtype": torch.float16}),
        ("^kernels", {"kernels": "cuda"}),
    ):
        with pytest.raises(ValueError, match=message):
            call(**wrong)  # type: ignore[arg-type]
    copy, means, stds = call()
    for message, arguments in (
        ("^out must be", (flat[:-1], copy, flat, means, stds)),
        ("^gradient must be", (flat, copy[:-1], flat, means, stds)),
        ("^means must be", (flat, copy, flat, means[:-1], stds)),
        ("^stds must be", (flat, copy, flat, means, stds.double())),
    ):
        with pytest.raises(ValueError, match=message):
            standardize_rows_backward_into(*arguments, table, kernels="triton")
    if not flat.is_cuda:
        monkeypatch.setattr("fastbyol_kernels.dispatch.TRITON_ON_CPU", False)
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            call()


@pytest.mark.parametrize(
    ("message", "offsets", "shapes", "copies", "sizes"),
    [
        ("^1 offsets", (0,), ((2, 4), (2, 4)), (0, 8), (16, 16)),
        ("^shapes", (0,), ((4, 1),), (0,), (16, 16)),
        ("^offsets: two rows overlap", (0, 4), ((2, 4), (2, 4)), (0, 8), (16, 16)),
        ("^copy_offsets: two rows overlap", (0, 8), ((2, 4), (2, 4)), (0, 4), (16, 16)),
        ("^flat_numel", (0, 8), ((2, 4), (2, 4)), (0, 8), (15, 16)),
        ("^copy_numel", (0, 8), ((2, 4), (2, 4)), (0, 8), (16, 15)),
    ],
)
def test_bad_tables_name_the_argument(
    message: str, offsets: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], copies: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=message):
        row_table(offsets, shapes, copies, flat_numel=sizes[0], copy_numel=sizes[1])
