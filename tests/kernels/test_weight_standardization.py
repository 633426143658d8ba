"""Weight standardization against the formula written with sums, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbyol_kernels.views import blocks
from fastbyol_kernels.weight_standardization import (
    EPS,
    Moved,
    RowTable,
    bytes_moved,
    reference,
    row_table,
    standardize_rows,
    standardize_rows_backward,
    triton,
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
    torch.testing.assert_close(
        weight_standardization(w.float()).double(), by_sums(w), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gradient(shape: tuple[int, ...]) -> None:
    w = torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
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
    assert w.grad.isfinite().all()


def test_scale_and_shift_of_a_channel_do_not_matter() -> None:
    w = torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # eps beside a std of at least .5 leaves a relative 2e-5.
    assert EPS == 1e-5
    torch.testing.assert_close(
        weight_standardization(w * 7 - 3), weight_standardization(w), rtol=4e-5, atol=0.0
    )


# The multi-tensor op.

# Rows of 27, 147 (stems), 1,152, 4,608 (3x3 over 128 and 512), 64 (1x1), 300 (aligned to 4 only),
# 2, 512, 4,609.
NETWORK = (
    (5, 3, 3, 3),
    (3, 3, 7, 7),
    (3, 128, 3, 3),
    (2, 512, 3, 3),
    (9, 64, 1, 1),
    (3, 300),
    (4, 2),
    (2, 512),
    (1, 4609),
)


def network(
    shapes: Sequence[Sequence[int]],
    device: torch.device,
    *,
    skip: int = 64,
    scale: float = 0.05,
    moved: Moved | None = None,
) -> tuple[Tensor, RowTable]:
    """Return a flat parameter of padded segments with gaps of ``skip`` elements, and its table."""
    offsets, copies, end, copy_end = [], [], 0, 0
    for index, shape in enumerate(shapes):
        numel = -(-torch.Size(shape).numel() // 64) * 64
        offsets.append(end + skip)
        copies.append(copy_end)
        end += skip + numel
        is_moved = moved is not None and index == moved.weight
        copy_end += shape[0] * moved.pitch if moved is not None and is_moved else numel
    flat = torch.randn(end + 5, generator=torch.Generator().manual_seed(len(shapes))) * scale + 0.01
    return flat.to(device), row_table(
        offsets, shapes, copies, flat_numel=end + 5, copy_numel=copy_end, moved=moved, device=device
    )


class Rows(NamedTuple):
    """The results of both passes, NaN outside of the rows."""

    copy: Tensor
    out: Tensor
    means: Tensor
    stds: Tensor


def nans(like: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Return a buffer that shows elements left unwritten or written by mistake."""
    return like.new_full((numel,), float("nan"), dtype=dtype)


def both(flat: Tensor, table: RowTable, gradient: Tensor, kernels: str = "triton") -> Rows:
    """Run forward and backward in buffers filled with NaN."""
    copy, out = nans(flat, table.copy_numel, gradient.dtype), torch.full_like(flat, float("nan"))
    means, stds = (nans(flat, len(table.rows), flat.dtype) for _ in range(2))
    standardize_rows(copy, means, stds, flat, table, kernels=kernels)
    standardize_rows_backward(out, gradient, flat, means, stds, table, kernels=kernels)
    return Rows(copy, out, means, stds)


def exact(flat: Tensor, table: RowTable, gradient: Tensor) -> Rows:
    """Compute the same by the formula with sums, row by row, in fp64."""
    flat, gradient = flat.double(), gradient.double()
    copy, out = nans(flat, table.copy_numel, flat.dtype), torch.full_like(flat, float("nan"))
    means, stds = [], []
    for offset, length, target in table.rows.tolist():
        row = flat[offset : offset + length].view(1, length).clone().requires_grad_()
        standardized = by_sums(row)
        (out[offset : offset + length],) = torch.autograd.grad(
            standardized, row, gradient[None, target : target + length]
        )
        copy[target : target + length] = standardized.detach()
        means.append(row.detach().mean())
        stds.append(row.detach().std())
    return Rows(copy, out, torch.stack(means), torch.stack(stds))


def compare(got: Rows, expected: Rows, gradient: Tensor) -> None:
    """Compare within rounding: one of a bf16 copy (2^-8, in the interpreter 2^-7), ten of fp32.

    The gradient's terms are of size |g| / std; after two projections they may be smaller by any
    factor. The smallest std is that of a row of two, whose weights may be near each other.
    """
    half = got.copy.dtype == torch.bfloat16
    torch.testing.assert_close(
        got.copy.double(), expected.copy, rtol=2**-7 if half else 2e-6, atol=4e-6, equal_nan=True
    )
    size = gradient.abs().max().item() / expected.stds.min().item()
    torch.testing.assert_close(
        got.out.double(), expected.out, rtol=1e-5, atol=4e-6 * size, equal_nan=True
    )
    for a, b in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)


def assert_same_bits(a: Rows, b: Rows) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def upstream(
    table: RowTable, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> Tensor:
    return (torch.randn(table.copy_numel, generator=torch.Generator().manual_seed(1)) * scale).to(
        device, dtype
    )


@pytest.mark.parametrize("kernels", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_equal_fp64_and_the_rest_is_left_alone(
    dtype: torch.dtype, kernels: str, kernel_device: torch.device
) -> None:
    flat, table = network(NETWORK, kernel_device)
    gradient = upstream(table, dtype, kernel_device)
    compare(both(flat, table, gradient, kernels), exact(flat, table, gradient), gradient)


@pytest.mark.gpu
@settings(max_examples=20, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(2, 40), st.sampled_from((1, 8, 9, 16))),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 70),
    st.booleans(),
    st.sampled_from(("triton", "cpu")),
)
def test_rows_equal_fp64_at_any_shape(
    shapes: list[tuple[int, ...]], skip: int, half: bool, kernels: str
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() and kernels == "triton" else "cpu")
    flat, table = network(shapes, device, skip=skip)
    gradient = upstream(table, torch.bfloat16 if half else torch.float32, device)
    compare(both(flat, table, gradient, kernels), exact(flat, table, gradient), gradient)


def test_two_runs_are_equal_in_every_bit(kernels: str, kernel_device: torch.device) -> None:
    flat, table = network(NETWORK, kernel_device)
    gradient = upstream(table, torch.bfloat16, kernel_device)
    assert_same_bits(both(flat, table, gradient, kernels), both(flat, table, gradient, kernels))


def test_equal_weights_give_zeros_and_a_finite_gradient(
    kernels: str, kernel_device: torch.device
) -> None:
    flat, table = network(((3, 512), (3, 30)), kernel_device)
    flat.fill_(0.25)
    copy, out, _, _ = both(flat, table, upstream(table, torch.float32, kernel_device), kernels)
    for offset, length, target in table.rows.tolist():
        assert (copy[target : target + length] == 0).all()
        assert out[offset : offset + length].isfinite().all()


def test_collapsed_gradients_keep_their_digits(kernels: str, kernel_device: torch.device) -> None:
    """Use a gradient of a millionth of the weights, as near collapse: no sum may drown it."""
    flat, table = network(((3, 512), (3, 30)), kernel_device)
    for dtype in (torch.float32, torch.bfloat16):
        gradient = upstream(table, dtype, kernel_device, 1e-6)
        compare(both(flat, table, gradient, kernels), exact(flat, table, gradient), gradient)


# The CPU's kernels alone.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    flat, table = network((*NETWORK, (200, 300)), cpu)
    gradient, results = upstream(table, dtype, cpu), []
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        results.append(both(flat, table, gradient, "cpu"))
    for other in results[1:]:
        assert_same_bits(results[0], other)


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
    assert out.stride() == leaf.grad.stride() == w.stride()
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=4e-6)
    size = gradient.abs().max().item() / w.double().flatten(1).std(1).min().item()
    torch.testing.assert_close(leaf.grad.double(), exactly.grad, rtol=1e-5, atol=4e-6 * size)


def test_a_huge_mean_costs_no_digits_of_the_deviation() -> None:
    w = torch.randn(4, 512, 3, 3, generator=torch.Generator().manual_seed(3)) + 1e4
    # The mean itself is rounded: 2^-24 of 1e4, and a few of that for its sum.
    torch.testing.assert_close(
        weight_standardization(w).double(), by_sums(w.double()), rtol=0, atol=8 * 2**-24 * 1e4
    )


def test_what_is_no_number_stays_in_its_row() -> None:
    w = torch.randn(5, 8, 3, 3, generator=torch.Generator().manual_seed(4))
    w[2, 3, 1, 1], w[4, 0, 0, 0] = float("nan"), float("inf")
    w.requires_grad_()
    out = weight_standardization(w)
    out.sum().backward()
    for tensor in (out, w.grad):
        assert tensor[[0, 1, 3]].isfinite().all()
        assert tensor[[2, 4]].isnan().all()


def test_what_compiled_code_does_not_know_is_plain_torch() -> None:
    w = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(weight_standardization(w), reference(w))
    for other in (w.double(), w.transpose(0, 1), w[:, ::2]):
        assert torch.equal(weight_standardization(other), reference(other))
    for kernels in ("reference", "triton"):
        assert torch.equal(weight_standardization(w, kernels=kernels), reference(w))
    with pytest.raises(ValueError, match=r"^kernels must be"):
        weight_standardization(w, kernels="cuda")


def test_no_rows_at_all() -> None:
    flat, table = network((), torch.device("cpu"))
    for tensor in both(flat, table, upstream(table, torch.float32, flat.device), "cpu"):
        assert tensor.isnan().all()


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moved_rows_have_the_values_of_rows_that_are_not(
    dtype: torch.dtype, kernels: str, kernel_device: torch.device
) -> None:
    """Bit for bit, in the places of the stem's blocks, beside rows as long and others as short."""
    shapes = ((2, 264), (2, 3, 7, 7), (3, 3, 7, 7), (9, 30))
    moved = Moved(2, blocks.kernel_places(), math.prod(blocks.KERNEL_SHAPE))
    flat, plain = network(shapes, kernel_device)
    _, table = network(shapes, kernel_device, moved=moved)
    gradient = upstream(plain, dtype, kernel_device)
    spread = nans(gradient, table.copy_numel, dtype)
    pairs = []  # of a row's elements in the copy with gaps, and in the one without
    for row, ((_, length, to), (*_, at)) in enumerate(
        zip(table.rows.tolist(), plain.rows.tolist(), strict=True)
    ):
        columns = torch.arange(length, device=kernel_device)
        places = moved.places.to(columns) if row in table.moved else columns
        pairs.append((to + places, at + columns))
    for there, here in pairs:
        spread[there] = gradient[here]
    got, expected = both(flat, table, spread, kernels), both(flat, plain, gradient, kernels)
    torch.testing.assert_close(got[1:], expected[1:], rtol=0, atol=0, equal_nan=True)
    for there, here in pairs:
        assert torch.equal(got.copy[there], expected.copy[here])
    written = sum(math.prod(shape) for shape in shapes)
    assert int(got.copy.isfinite().sum()) == written  # and nothing between


def test_places_are_those_of_the_rearranged_kernel() -> None:
    kernel = torch.randn(2, 3, 7, 7).to(memory_format=torch.channels_last)
    moved = blocks.in_blocks(kernel, blocks.KERNEL_BORDER)
    assert moved.shape[1:] == blocks.KERNEL_SHAPE
    rows = moved.permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(rows[:, blocks.kernel_places()], kernel.permute(0, 2, 3, 1).flatten(1))
    assert int((rows != 0).sum()) == kernel.numel()


def test_what_cannot_be_moved_is_refused() -> None:
    long = Moved(0, torch.arange(264, dtype=torch.int32), 300)
    with pytest.raises(ValueError, match="moved"):
        network(((2, 264),), torch.device("cpu"), moved=long)
    flat, table = network(((2, 30),), torch.device("cpu"), moved=Moved(0, torch.arange(30), 32))
    with pytest.raises(ValueError, match="moved rows"):
        both(flat, table, upstream(table, torch.float32, flat.device), "cpu")


def test_opcheck(device: torch.device) -> None:
    flat, table = network(((2, 264), (3, 30)), device, moved=Moved(1, torch.arange(30) + 2, 40))
    gradient = upstream(table, torch.bfloat16, device)
    copy, out, means, stds = both(flat, table, gradient)
    ops, rows = torch.ops.fastbyol, triton.arguments(table)
    torch.library.opcheck(ops.standardize_rows, (copy.zero_(), means, stds, flat, *rows))
    torch.library.opcheck(
        ops.standardize_rows_backward, (out.zero_(), gradient, flat, means, stds, *rows)
    )


def test_compiled_equals_eager(device: torch.device) -> None:
    flat, table = network(((2, 264), (3, 30)), device)
    gradient = upstream(table, torch.bfloat16, device)

    def work() -> Rows:
        return both(flat * 2, table, gradient)

    assert_same_bits(work(), torch.compile(work, fullgraph=True, backend="aot_eager")())


def test_long_rows_come_first_and_all_rows_once(device: torch.device) -> None:
    _, table = network(NETWORK, device)
    rows = table.rows.tolist()
    lengths = [length for _, length, _ in rows]
    long = lengths[: table.num_long]
    assert sorted(long, reverse=True) == long
    assert sorted(set(long)) == [512, 1152, 4608]
    assert sorted(set(lengths[table.num_long :])) == [2, 27, 64, 147, 300, 4609]
    covered = torch.zeros(table.copy_numel, dtype=torch.int64)
    for _, length, start in rows:
        covered[start : start + length] += 1
    assert covered.max() == 1
    assert covered.sum() == sum(torch.Size(shape).numel() for shape in NETWORK)


def test_bytes_moved() -> None:
    _, table = network(((2, 264), (3, 30)), torch.device("cpu"))
    assert bytes_moved(table, 2) == 618 * 6
    assert bytes_moved(table, 2, backward=True) == 618 * 10


@pytest.mark.parametrize("kernels", ["triton", "cpu"])
def test_bad_input_names_the_argument(kernels: str, kernel_device: torch.device) -> None:
    flat, table = network(((2, 264), (3, 30)), kernel_device)
    copy, out, means, stds = both(
        flat, table, upstream(table, torch.float32, kernel_device), kernels
    )
    forward = {"copy": copy, "means": means, "stds": stds, "flat": flat}
    backward = {"out": out, "gradient": copy, "flat": flat, "means": means, "stds": stds}
    for call, arguments in ((standardize_rows, forward), (standardize_rows_backward, backward)):
        for name, tensor in arguments.items():
            of_copy = name in ("copy", "gradient")
            wrong = [
                tensor[:-1],
                torch.stack((tensor, tensor), 1)[:, 0],
                tensor.half(),
                *([] if of_copy else [tensor.bfloat16()]),
            ]
            for other in wrong:
                with pytest.raises(ValueError, match=f"^{name} must be"):
                    call(**{**arguments, name: other}, table=table, kernels=kernels)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"^kernels must be"):
        standardize_rows(**forward, table=table, kernels="cuda")


def test_triton_needs_aligned_buffers_and_a_gpu(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat, table = network(((2, 264), (3, 30)), device)
    copy, _, means, stds = both(flat, table, upstream(table, torch.float32, device))
    shifted = torch.zeros(len(flat) + 1, device=device)[1:]
    with pytest.raises(ValueError, match=r"^flat must start"):
        standardize_rows(copy, means, stds, shifted, table, kernels="triton")
    with pytest.raises(ValueError, match=r"^flat must be .* as table is"):
        standardize_rows(copy, means, stds, flat.to("meta"), table, kernels="triton")
    if not flat.is_cuda:
        monkeypatch.setattr("fastbyol_kernels.dispatch.TRITON_ON_CPU", False)
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            standardize_rows(copy, means, stds, flat, table, kernels="triton")


@pytest.mark.parametrize(
    ("message", "offsets", "shapes", "copies", "sizes"),
    [
        ("^1 offsets", (0,), ((2, 4), (2, 4)), (0, 8), (16, 16)),
        ("^shapes", (0,), ((4, 1),), (0,), (16, 16)),
        ("^offsets: two weights overlap", (0, 4), ((2, 4), (2, 4)), (0, 8), (16, 16)),
        ("^copy_offsets: two weights overlap", (0, 8), ((2, 4), (2, 4)), (0, 4), (16, 16)),
        ("^flat_numel", (0, 8), ((2, 4), (2, 4)), (0, 8), (15, 16)),
        ("^copy_numel", (0, 8), ((2, 4), (2, 4)), (0, 8), (16, 15)),
    ],
)
def test_bad_tables_name_the_argument(
    message: str,
    offsets: tuple[int, ...],
    shapes: tuple[tuple[int, ...], ...],
    copies: tuple[int, ...],
    sizes: tuple[int, int],
) -> None:
    with pytest.raises(ValueError, match=message):
        row_table(offsets, shapes, copies, flat_numel=sizes[0], copy_numel=sizes[1])
