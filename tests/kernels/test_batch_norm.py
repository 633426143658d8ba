"""Batch norm on a CPU against torch's in fp64, and properties that hold at any shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fastbyol_kernels import batch_norm as ops
from fastbyol_kernels.batch_norm.cpu import FusedBatchNorm
from together import in_threads

EPS, MOMENTUM = 1e-5, 0.1
DTYPES = (torch.float32, torch.bfloat16)
# Of the norm of a result: a few roundings to fp32 and at last one to the dtype, which bf16 has all
# of its error from.
ERROR = {torch.float32: 4 * 2.0**-24, torch.bfloat16: 2.0**-9}
# Sums over a view, of which fp32 adds up to 128 terms in a row, and which cancel.
ERROR_OF_SUMS = 2.0**-18


def tensors(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    mean: float = 1.0,
    std: float = 2.0,
    residual: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return x, dy and residual, channels-last, and weight, bias and the running buffers."""
    g = torch.Generator().manual_seed(seed)

    def activation(mean: float, std: float) -> Tensor:
        return (
            (torch.randn(shape, generator=g) * std + mean)
            .to(dtype)
            .contiguous(memory_format=torch.channels_last)
        )

    named = {"x": activation(mean, std), "dy": activation(0.1, 1.0)} | (
        {"residual": activation(0, 1)} if residual else {}
    )
    channels = {
        name: torch.randn(shape[1], generator=g) for name in ("weight", "bias", "running_mean")
    }
    return named | channels | {"running_var": torch.rand(shape[1], generator=g)}


def run(
    inputs: dict[str, Tensor],
    num_views: int,
    *,
    relu: bool,
    kernels: str,
    wide: bool = False,
    gather: Any = None,
) -> dict[str, Tensor]:
    """Return y, the updated running buffers and all gradients."""
    named = {
        name: (t.double() if wide else t.clone(memory_format=torch.preserve_format))
        for name, t in inputs.items()
    }
    leaves = {
        name: named[name].requires_grad_()
        for name in ("x", "weight", "bias", "residual")
        if name in named
    }
    dy = named.pop("dy")
    y = ops.batch_norm(
        num_views=num_views, momentum=MOMENTUM, eps=EPS, relu=relu, kernels=kernels,
        gather=gather, **named,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    outputs = {"y": y.detach()} | {name: named[name] for name in ("running_mean", "running_var")}
    return outputs | {
        f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def relative(outputs: Tensor, expected: Tensor) -> float:
    """Return the error's norm relative to ``expected``, or to 1 per element if that is larger."""
    return float(
        (outputs.double() - expected).norm() / expected.norm().clamp(min=expected.numel() ** 0.5)
    )


def is_compiled(inputs: dict[str, Tensor]) -> bool:
    affine = (inputs["weight"], inputs["bias"], inputs["running_mean"], inputs["running_var"])
    return ops._is_compiled_for(inputs["x"], affine)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "num_views"),
    [
        ((12, 5, 7, 3), 3),
        ((64, 64, 24, 24), 2),  # several blocks of a view, the last one short
        ((6, 1, 3, 3), 2),
        ((6, 700, 5, 1), 2),
        ((4, 16, 1, 1), 2),
        ((3, 513, 1, 1), 1),
        ((2, 3, 150, 151), 1),
    ],
    ids=str,
)
def test_against_fp64(
    shape: tuple[int, ...], num_views: int, dtype: torch.dtype, residual: bool, relu: bool
) -> None:
    inputs = tensors(shape, dtype, residual=residual)
    assert is_compiled(inputs)
    outputs = run(inputs, num_views, relu=relu, kernels="auto")
    expected = run(inputs, num_views, relu=relu, kernels="reference", wide=True)
    few = len(inputs["x"]) // num_views * shape[2] * shape[3]
    for name, value in expected.items():
        by_channel = value.shape == (shape[1],)
        bound = ERROR_OF_SUMS if by_channel else ERROR[dtype]
        # Of two values x_hat is +-1 and dx next to nothing, a difference of large numbers.
        assert relative(outputs[name], value) < bound * (1 if few > 2 else 10), name
        assert outputs[name].dtype == (torch.float32 if by_channel else dtype)
    assert outputs["y"].stride() == outputs["dx"].stride() == inputs["x"].stride()
    if relu:
        assert bool((outputs["y"] >= 0).all())


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    num_views=st.integers(1, 3),
    residual=st.booleans(),
    relu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    shape: tuple[int, int, int, int],
    num_views: int,
    residual: bool,
    relu: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    images, *rest = shape
    assume(images * rest[1] * rest[2] > 1)
    inputs = tensors((images * num_views, *rest), dtype, residual=residual, seed=seed)
    outputs = run(inputs, num_views, relu=relu, kernels="cpu")
    expected = run(inputs, num_views, relu=relu, kernels="reference", wide=True)
    # Channels with next to no variance magnify rounding by weight / sqrt(eps): x's own steps are
    # 2**-8 or 2**-24 of it.
    for name in outputs:
        fp32 = name not in ("y", "dx", "dresidual")
        assert relative(outputs[name], expected[name]) < (
            1e-4 if fp32 or dtype == torch.float32 else 1e-2
        ), name


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize(
    ("dtype", "mean"),
    [(torch.bfloat16, 200.0), (torch.float32, 1e4), (torch.float32, -1e4)],
    ids=str,
)
def test_large_means_cost_nothing(dtype: torch.dtype, mean: float, relu: bool) -> None:
    """Use means at which torch's fp32 kernel loses three digits."""
    inputs = tensors((32, 16, 24, 24), dtype, mean=mean, std=1.0)
    outputs = run(inputs, 2, relu=relu, kernels="auto")
    expected = run(inputs, 2, relu=relu, kernels="reference", wide=True)
    for name, value in expected.items():
        assert relative(outputs[name], value) < (
            ERROR_OF_SUMS if value.ndim == 1 else ERROR[dtype]
        ), name


def test_an_odd_first_pixel_spoils_little() -> None:
    """Use the worst shift: a single pixel that causes all variance of its view."""
    inputs = tensors((8, 4, 40, 40), torch.float32, residual=False)
    inputs["x"][0, :, 0, 0] = 1e6
    inputs["x"][4, :, 0, 0] = 1e6
    outputs, expected = (
        run(inputs, 2, relu=False, kernels="auto"),
        run(inputs, 2, relu=False, kernels="reference", wide=True),
    )
    # Of 6400 pixels: 6400 / 16 ** 2 times the rounding of fp32, of sums of 50 terms in a row.
    for name in ("y", "running_mean", "running_var"):
        assert relative(outputs[name], expected[name]) < 1e-4, name


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    dtype: torch.dtype, residual: bool, relu: bool
) -> None:
    inputs = tensors((32, 48, 17, 17), dtype, residual=residual)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(inputs, 2, relu=relu, kernels="auto"))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [(torch.float32, 1.0, 2.0), (torch.bfloat16, 1.0, 2.0), (torch.float32, 1e3, 1e-1)],
    ids=["fp32", "bf16", "collapsed"],
)
def test_ranks_have_the_statistics_of_the_whole_batch(
    dtype: torch.dtype, mean: float, std: float, kernels: str, relu: bool
) -> None:
    """Of one image, of two and of five, all bits of the running buffers equal."""
    counts, views, total = (1, 2, 5), 2, 8
    inputs = tensors((views * total, 12, 7, 5), dtype, mean=mean, std=std)
    # Plain torch rounds to bf16 before it adds the residual, which turns the ReLU's mask where
    # their sum is near 0: it is compared with itself.
    wide = kernels == "cpu" or dtype == torch.float32
    whole = run(inputs, views, relu=relu, kernels="reference", wide=wide)

    def share(ranks: Any) -> dict[str, Tensor]:
        start, count = sum(counts[: ranks.rank]), counts[ranks.rank]
        rows = [view * total + start + k for view in range(views) for k in range(count)]
        channels_last = {
            name: t[rows].contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
            for name, t in inputs.items()
        }
        own = run(channels_last, views, relu=relu, kernels=kernels, gather=ranks.gather)
        return own | {"rows": torch.tensor(rows)}

    results = in_threads(len(counts), share)
    order = torch.cat([own["rows"] for own in results])
    for name in ("y", "dx", "dresidual"):
        joined = torch.empty(whole[name].shape, dtype=torch.float64)
        joined[order] = torch.cat([own[name] for own in results]).double()
        # The mean may be 1e4 standard deviations away.
        scale = 4e3 if std < mean * 1e-3 else 4
        assert relative(joined, whole[name].double()) < scale * ERROR[dtype], name
    for name in ("dweight", "dbias"):
        total_of_ranks = sum(own[name].double() for own in results)
        assert relative(total_of_ranks, whole[name].double()) < 1e-2, name
    for name in ("running_mean", "running_var"):
        assert all(torch.equal(own[name], results[0][name]) for own in results)
        assert relative(results[0][name], whole[name].double()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_made_again_is_that_of_the_output(dtype: torch.dtype) -> None:
    """Check also outputs near 0: bias and weight shrink them to the smallest numbers."""
    shape = (64, 32, 9, 9)
    for scale in (1.0, 1e-30, 1e-40, 1e-44):
        inputs = tensors(shape, dtype, residual=False)
        inputs["weight"] *= scale
        inputs["bias"] *= scale
        x = inputs["x"].requires_grad_()
        affine = [inputs[name] for name in ("weight", "bias", "running_mean", "running_var")]
        y = FusedBatchNorm.apply(
            x,
            *affine[:1],
            affine[1].requires_grad_(),
            *affine[2:],
            2,
            MOMENTUM,
            EPS,
            None,
            True,
            None,
        )
        (counted,) = torch.autograd.grad(y, affine[1], torch.ones_like(y))
        assert torch.equal(counted, (y > 0).sum((0, 2, 3)).float())


def test_without_a_residual_the_output_is_not_saved() -> None:
    inputs = tensors((8, 16, 8, 8), torch.bfloat16, residual=True)
    residual = inputs.pop("residual")
    x = inputs.pop("x").requires_grad_()
    del inputs["dy"]
    for added, relu, tensors_saved in ((None, True, 1), (residual, False, 1), (residual, True, 2)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            ops.batch_norm(
                x, num_views=2, momentum=MOMENTUM, eps=EPS, residual=added, relu=relu, **inputs
            )
        assert sum(t.shape == x.shape for t in saved) == tensors_saved
        # Tables of a few numbers per channel, repeated over the lanes.
        assert sum(t.numel() for t in saved if t.shape != x.shape) <= 2 * 5 * 512


def test_gradients_of_any_strides() -> None:
    inputs = tensors((8, 12, 6, 6), torch.float32)
    expected = run(inputs, 2, relu=True, kernels="auto")
    for dy in (
        inputs["dy"].contiguous(),
        inputs["dy"].permute(0, 1, 3, 2).clone().permute(0, 1, 3, 2),
    ):
        outputs = run(inputs | {"dy": dy}, 2, relu=True, kernels="auto")
        assert all(torch.equal(outputs[name], value) for name, value in expected.items())
    inputs["dy"] = torch.ones(()).expand(8, 12, 6, 6)
    assert relative(
        run(inputs, 2, relu=True, kernels="auto")["dx"], run(inputs, 2, relu=True,
        kernels="reference", wide=True)["dx"]
    ) < 1e-6  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_in_its_view_and_channel(value: float, dtype: torch.dtype) -> None:
    inputs = tensors((8, 4, 20, 20), dtype)
    clean = run(inputs, 2, relu=True, kernels="auto")
    inputs["x"][1, 2, 3, 4] = value
    outputs = run(inputs, 2, relu=True, kernels="auto")
    for name in ("y", "dx"):
        assert bool(outputs[name][:4, 2].isnan().all())
        assert torch.equal(outputs[name][4:], clean[name][4:])
        assert torch.equal(outputs[name][:, :2], clean[name][:, :2])
    assert not bool(outputs["running_mean"][2].isfinite())
    assert not bool(outputs["running_var"][2].isfinite())
    assert not bool(outputs["dweight"][2].isfinite())


def test_a_masked_gradient_that_is_infinite_is_zero() -> None:
    inputs = tensors((8, 4, 5, 5), torch.float32)
    for residual in (True, False):
        named = (
            inputs if residual else {name: t for name, t in inputs.items() if name != "residual"}
        )
        y = run(named, 2, relu=True, kernels="auto")["y"]
        spoilt = named["dy"].clone()
        spoilt[y == 0] = torch.inf
        expected = torch.where(y == 0, 0.0, named["dy"])
        outputs = run(named | {"dy": spoilt}, 2, relu=True, kernels="auto")
        assert torch.equal(
            outputs["dx"], run(named | {"dy": expected}, 2, relu=True, kernels="auto")["dx"]
        )


def test_constant_channels_have_no_variance() -> None:
    inputs = tensors((8, 4, 30, 30), torch.float32, residual=False)
    inputs["x"][:, 1] = 0.1
    outputs = run(inputs, 2, relu=False, kernels="auto")
    assert torch.equal(outputs["y"][:, 1], inputs["bias"][1].expand(8, 30, 30))
    torch.testing.assert_close(
        outputs["running_var"][1], inputs["running_var"][1] * 0.81, rtol=2e-7, atol=0
    )


def test_everything_else_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("compiled code")

    monkeypatch.setattr(FusedBatchNorm, "apply", refuse)
    inputs = tensors((8, 4, 6, 6), torch.float32)
    cases = {
        "(N, C, H, W)": inputs | {"x": inputs["x"].contiguous()},
        "fp64": {name: t.double() for name, t in inputs.items()},
        "(N, C)": {
            name: t.contiguous()[:, :, 0, 0].clone() if t.ndim == 4 else t
            for name, t in inputs.items()
        },
    }
    for case in cases.values():
        assert not is_compiled(case) or case["x"].dtype == torch.float64
        run(case, 2, relu=True, kernels="cpu")
    run(inputs, 2, relu=True, kernels="reference")
    with pytest.raises(AssertionError, match="compiled code"):
        run(inputs, 2, relu=True, kernels="auto")


def test_an_empty_batch_is_torchs() -> None:
    inputs = tensors((0, 4, 6, 6), torch.float32, residual=False)
    assert not is_compiled(inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, r"x must be \(N, C, H, W\) or \(N, C\), not of 3 dimensions"),
        ({"x": torch.zeros(7, 4, 2, 2)}, "a batch of 7 cannot be split into 2 views"),
        ({"weight": torch.zeros(3)}, r"weight must be \(4,\), not \(3,\)"),
        ({"running_var": torch.zeros(5)}, r"running_var must be \(4,\), not \(5,\)"),
        ({"residual": torch.zeros(8, 4, 1, 6)}, r"residual must be as x, \(8, 4, 6, 6\)"),
        ({"residual": torch.zeros(8, 4, 6, 6).bfloat16()}, "torch.bfloat16"),
        ({"kernels": "fast"}, "kernels must be one of"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    named: dict[str, Any] = tensors((8, 4, 6, 6), torch.float32)
    del named["dy"]
    with pytest.raises(ValueError, match=message):
        ops.batch_norm(**(named | {"num_views": 2, "momentum": MOMENTUM, "eps": EPS} | change))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (2, 4)])
def test_one_value_per_channel_and_view_has_no_variance(
    shape: tuple[int, ...], kernels: str
) -> None:
    buffers = torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match="one value per channel and view"):
        ops.batch_norm(torch.ones(shape), *buffers, 2, momentum=0.1, eps=1e-5, kernels=kernels)
    assert [buffer.tolist() for buffer in buffers[2:]] == [[0] * 4, [1] * 4]
