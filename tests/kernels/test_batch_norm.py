"""Batch norm's kernels against torch's in fp64, and properties that hold at any shape."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbyol_kernels import batch_norm as ops
from fastbyol_kernels.batch_norm import triton as module
from fastbyol_kernels.batch_norm.cpu import FusedBatchNorm
from fastbyol_kernels.max_pool import max_pool
from together import in_threads

EPS, MOMENTUM = 1e-5, 0.1
DTYPES = (torch.float32, torch.bfloat16)
# Of the norm of a result: a few roundings to fp32 and at last one to the dtype, which bf16 has all
# of its error from; Triton's interpreter truncates there.
ERROR = {torch.float32: 4 * 2.0**-24, torch.bfloat16: 2.0**-9}
TRUNCATED = 2.0**-8
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
    pool: bool = False,
) -> dict[str, Tensor]:
    """Return y, the updated running buffers and all gradients, on the device of ``kernels``."""
    on_gpu = kernels == "triton" and torch.cuda.is_available()
    named = {
        name: (t.double() if wide else t.clone(memory_format=torch.preserve_format)).to(
            "cuda" if on_gpu else "cpu"
        )
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
        gather=gather, pool=pool, **named,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    outputs = {"y": y.detach()} | {name: named[name] for name in ("running_mean", "running_var")}
    outputs |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: tensor.cpu() for name, tensor in outputs.items()}


def relative(outputs: Tensor, expected: Tensor) -> float:
    """Return the error's norm relative to ``expected``, or to 1 per element if that is larger."""
    return float(
        (outputs.double() - expected).norm() / expected.norm().clamp(min=expected.numel() ** 0.5)
    )


@pytest.fixture(autouse=True)
def _few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small shapes have several runs of a view, and the interpreter not hundreds of them."""
    if "launches" not in request.node.name:
        monkeypatch.setattr(module, "PROGRAMS", 8)
        monkeypatch.setattr(module, "PROGRAMS_LAST", 10)
        monkeypatch.setattr(module, "MIN_RUN", 40)


def error(dtype: torch.dtype, kernels: str) -> float:
    """Return the error that a result of ``kernels`` may have, relative to its norm."""
    truncates = kernels == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available()
    return TRUNCATED if truncates else ERROR[dtype]


def is_compiled(inputs: dict[str, Tensor]) -> bool:
    affine = (inputs["weight"], inputs["bias"], inputs["running_mean"], inputs["running_var"])
    return ops._has_kernels(inputs["x"], affine)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "num_views"),
    [
        ((12, 5, 7, 3), 3),
        ((16, 64, 9, 9), 2),  # several blocks of a view, the last one short
        ((6, 1, 3, 3), 2),
        ((6, 130, 5, 1), 2),
        ((4, 16, 1, 1), 2),
        ((3, 513, 1, 1), 1),
        ((2, 3, 50, 51), 1),
    ],
    ids=str,
)
def test_against_fp64(
    shape: tuple[int, ...],
    num_views: int,
    dtype: torch.dtype,
    residual: bool,
    relu: bool,
    kernels: str,
) -> None:
    inputs = tensors(shape, dtype, residual=residual)
    assert is_compiled(inputs)
    outputs = run(inputs, num_views, relu=relu, kernels=kernels)
    expected = run(inputs, num_views, relu=relu, kernels="reference", wide=True)
    few = len(inputs["x"]) // num_views * shape[2] * shape[3]
    for name, value in expected.items():
        by_channel = value.shape == (shape[1],)
        bound = ERROR_OF_SUMS if by_channel else error(dtype, kernels)
        # Of two values x_hat is +-1 and dx next to nothing, a difference of large numbers; of three
        # it is not much better.
        assert relative(outputs[name], value) < bound * (1 if few > 3 else 20), name
        assert outputs[name].dtype == (torch.float32 if by_channel else dtype)
    assert outputs["y"].stride() == outputs["dx"].stride() == inputs["x"].stride()
    if relu:
        assert bool((outputs["y"] >= 0).all())


ANY = {
    "shape": st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    "num_views": st.integers(1, 3),
    "residual": st.booleans(),
    "relu": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 1000),
}


@given(**ANY)
def test_any_shape(**any_case: Any) -> None:
    check_any_shape("cpu", **any_case)


@pytest.mark.gpu
@settings(max_examples=15)
@given(**ANY)
def test_any_shape_in_triton(**any_case: Any) -> None:
    check_any_shape("triton", **any_case)


def check_any_shape(
    kernels: str,
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
    outputs = run(inputs, num_views, relu=relu, kernels=kernels)
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
def test_large_means_cost_nothing(
    dtype: torch.dtype, mean: float, relu: bool, kernels: str
) -> None:
    """Use means at which torch's fp32 kernel loses three digits."""
    inputs = tensors((16, 16, 16, 16), dtype, mean=mean, std=1.0)
    outputs = run(inputs, 2, relu=relu, kernels=kernels)
    expected = run(inputs, 2, relu=relu, kernels="reference", wide=True)
    for name, value in expected.items():
        assert relative(outputs[name], value) < (
            ERROR_OF_SUMS if value.ndim == 1 else error(dtype, kernels)
        ), name


@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
@pytest.mark.parametrize(
    ("dtype", "std"), [(torch.bfloat16, 2.0**-5), (torch.float32, 1e-3)], ids=str
)
def test_collapsed_channels_keep_their_digits(
    dtype: torch.dtype, std: float, pool: bool, kernels: str
) -> None:
    """Use a variance far below the squared mean and a gradient that all but cancels."""
    inputs = tensors((12, 24, 12, 12), dtype, mean=4.0, std=std, residual=False)
    inputs["dy"] = inputs["dy"][..., :6, :6] if pool else inputs["dy"]
    inputs["dy"] = (inputs["dy"] * 1e-6).contiguous(memory_format=torch.channels_last)
    outputs = run(inputs, 2, relu=True, pool=pool, kernels=kernels)
    expected = run(inputs, 2, relu=True, pool=pool, kernels="reference", wide=True)
    # The rounding of x - mean, whose digits x has lost already, and of bf16's pooled gradient.
    bound = 2e-6 if dtype == torch.float32 else 2.0**-7
    for name in ("y", "dx", "dweight", "dbias", "running_mean", "running_var"):
        difference = (outputs[name].double() - expected[name]).norm()
        assert difference < bound * expected[name].norm(), name


def test_an_odd_first_pixel_spoils_little(kernels: str) -> None:
    """Use the worst shift: a single pixel that causes all variance of its view."""
    inputs = tensors((8, 4, 40, 40), torch.float32, residual=False)
    inputs["x"][0, :, 0, 0] = 1e6
    inputs["x"][4, :, 0, 0] = 1e6
    outputs, expected = (
        run(inputs, 2, relu=False, kernels=kernels),
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
@pytest.mark.parametrize("kernels", ["cpu", "reference", "triton"])
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [(torch.float32, 1.0, 2.0), (torch.bfloat16, 1.0, 2.0), (torch.float32, 1e3, 1e-1)],
    ids=["fp32", "bf16", "collapsed"],
)
def test_ranks_have_the_statistics_of_the_whole_batch(
    dtype: torch.dtype, mean: float, std: float, kernels: str, relu: bool
) -> None:
    """Of one image, of two and of five, all bits of the running buffers equal."""
    counts, views, total, interpreting = (1, 2, 5), 2, 8, threading.Lock()
    inputs = tensors((views * total, 12, 7, 5), dtype, mean=mean, std=std)
    # Plain torch rounds to bf16 before it adds the residual, which turns the ReLU's mask where
    # their sum is near 0: it is compared with itself.
    wide = kernels != "reference" or dtype == torch.float32
    whole = run(inputs, views, relu=relu, kernels="reference", wide=wide)

    def share(ranks: Any) -> dict[str, Tensor]:
        start, count = sum(counts[: ranks.rank]), counts[ranks.rank]
        rows = [view * total + start + k for view in range(views) for k in range(count)]
        channels_last = {
            name: t[rows].contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
            for name, t in inputs.items()
        }
        # Triton's interpreter is for one thread at a time.
        interpreting.acquire()

        def gather(tensor: Tensor) -> Tensor:
            interpreting.release()
            try:
                return ranks.gather(tensor)
            finally:
                interpreting.acquire()

        try:
            own = run(channels_last, views, relu=relu, kernels=kernels, gather=gather)
        finally:
            interpreting.release()
        return own | {"rows": torch.tensor(rows)}

    results = in_threads(len(counts), share)
    order = torch.cat([own["rows"] for own in results])
    for name in ("y", "dx", "dresidual"):
        joined = torch.empty(whole[name].shape, dtype=torch.float64)
        joined[order] = torch.cat([own[name] for own in results]).double()
        # The mean may be 1e4 standard deviations away.
        scale = 4e3 if std < mean * 1e-3 else 4
        assert relative(joined, whole[name].double()) < scale * error(dtype, kernels), name
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


def test_gradients_of_any_strides(kernels: str) -> None:
    inputs = tensors((8, 12, 6, 6), torch.float32)
    expected = run(inputs, 2, relu=True, kernels=kernels)
    for dy in (
        inputs["dy"].contiguous(),
        inputs["dy"].permute(0, 1, 3, 2).clone().permute(0, 1, 3, 2),
    ):
        outputs = run(inputs | {"dy": dy}, 2, relu=True, kernels=kernels)
        assert all(torch.equal(outputs[name], value) for name, value in expected.items())
    inputs["dy"] = torch.ones(()).expand(8, 12, 6, 6)
    assert relative(
        run(inputs, 2, relu=True, kernels=kernels)["dx"], run(inputs, 2, relu=True,
        kernels="reference", wide=True)["dx"]
    ) < 1e-6  # fmt: skip


# Triton's interpreter computes by NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_in_its_view_and_channel(
    value: float, dtype: torch.dtype, kernels: str
) -> None:
    inputs = tensors((8, 4, 20, 20), dtype)
    clean = run(inputs, 2, relu=True, kernels=kernels)
    inputs["x"][1, 2, 3, 4] = value
    outputs = run(inputs, 2, relu=True, kernels=kernels)
    for name in ("y", "dx"):
        assert bool(outputs[name][:4, 2].isnan().all())
        assert torch.equal(outputs[name][4:], clean[name][4:])
        assert torch.equal(outputs[name][:, :2], clean[name][:, :2])
    assert not bool(outputs["running_mean"][2].isfinite())
    assert not bool(outputs["running_var"][2].isfinite())
    assert not bool(outputs["dweight"][2].isfinite())


def test_a_masked_gradient_that_is_infinite_is_zero(kernels: str) -> None:
    inputs = tensors((8, 4, 5, 5), torch.float32)
    for residual in (True, False):
        named = (
            inputs if residual else {name: t for name, t in inputs.items() if name != "residual"}
        )
        y = run(named, 2, relu=True, kernels=kernels)["y"]
        spoilt = named["dy"].clone()
        spoilt[y == 0] = torch.inf
        expected = torch.where(y == 0, 0.0, named["dy"])
        outputs = run(named | {"dy": spoilt}, 2, relu=True, kernels=kernels)
        assert torch.equal(
            outputs["dx"], run(named | {"dy": expected}, 2, relu=True, kernels=kernels)["dx"]
        )


def test_constant_channels_have_no_variance(kernels: str) -> None:
    inputs = tensors((8, 4, 30, 30), torch.float32, residual=False)
    inputs["x"][:, 1] = 0.1
    outputs = run(inputs, 2, relu=False, kernels=kernels)
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


# Triton's kernels alone.


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 20, 9, 8), (2, 70, 3, 5)], ids=str)
def test_pooling_is_that_of_the_norm_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compare outputs bit for bit, gradients with those of the two operations in fp64."""
    inputs = tensors(shape, dtype, residual=False)
    alone = run(inputs, 2, relu=True, kernels="triton")
    expected = max_pool(alone["y"], kernels="reference")
    dy = tensors((*shape[:2], *expected.shape[2:]), dtype, seed=1)["dy"]
    for relu in (True, False):
        outputs = run(inputs | {"dy": dy}, 2, relu=relu, kernels="triton", pool=True)
        wide = run(inputs | {"dy": dy}, 2, relu=relu, kernels="reference", pool=True, wide=True)
        if relu:
            assert torch.equal(outputs["y"], expected)
        for name, value in wide.items():
            bound = 1e-4 if value.ndim == 1 or dtype == torch.float32 else 1e-2
            # In bf16 neighbours may round to the same value, whose gradient the first one gets.
            if dtype == torch.float32 or name not in ("dx", "dweight"):
                assert relative(outputs[name], value) < bound, name
        assert torch.equal(outputs["running_var"], alone["running_var"])
        assert outputs["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_a_pooled_gradient_reaches_the_maxima_alone() -> None:
    """Compare in bf16 with torch's own pooling of the same rounded outputs."""
    inputs = tensors((6, 20, 9, 8), torch.bfloat16, residual=False)
    y = run(inputs, 2, relu=True, kernels="triton")["y"].requires_grad_()
    pooled = max_pool(y, kernels="reference")
    dy = tensors((6, 20, *pooled.shape[2:]), torch.bfloat16, seed=1)["dy"]
    (through,) = torch.autograd.grad(pooled, y, dy)
    outputs = run(inputs | {"dy": dy}, 2, relu=True, kernels="triton", pool=True)
    expected = run(inputs | {"dy": through}, 2, relu=True, kernels="triton")
    # torch rounds the sum of up to four windows' gradients to bf16 in between.
    assert relative(outputs["dx"], expected["dx"].double()) < TRUNCATED
    for name in ("dweight", "dbias"):
        assert relative(outputs[name], expected[name].double()) < 2.0**-8


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
def test_two_runs_are_equal_in_every_bit(pool: bool) -> None:
    inputs = tensors((4, 64, 8, 8), torch.bfloat16, residual=not pool)
    inputs["dy"] = inputs["dy"][..., :4, :4] if pool else inputs["dy"]
    results = [run(inputs, 2, relu=True, pool=pool, kernels="triton") for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 24), (6, 70), (2, 5), (33, 4)], ids=str)
def test_rows_are_pixels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compare x (N, C), as in the heads, with the same values as (N, C, 1, 1), bit for bit."""
    num_views = 2 if shape[0] % 2 == 0 else 1
    if shape[0] == num_views:
        num_views = 1
    inputs = tensors((*shape, 1, 1), dtype)
    flat = {name: t.flatten(1) if t.ndim == 4 else t for name, t in inputs.items()}
    outputs = run(inputs, num_views, relu=True, kernels="triton")
    for name, value in run(flat, num_views, relu=True, kernels="triton").items():
        assert torch.equal(value, outputs[name].view(value.shape)), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_masks_what_it_cut(dtype: torch.dtype, device: torch.device) -> None:
    """Count positive outputs by the bias's gradient, near the smallest numbers, too."""
    for scale in (1.0, 1e-30):
        inputs = tensors((8, 32, 9, 9), dtype, residual=False)
        inputs |= {name: inputs[name] * scale for name in ("weight", "bias")}
        inputs["dy"] = torch.ones_like(inputs["x"])
        outputs = run(inputs, 2, relu=True, kernels="triton")
        assert torch.equal(outputs["dbias"], (outputs["y"] > 0).sum((0, 2, 3)).float())


@pytest.mark.gpu
def test_every_pass_counts_its_views(kernels: str, kernel_device: torch.device) -> None:
    inputs = {name: t.to(kernel_device) for name, t in tensors((6, 4, 3, 3), torch.float32).items()}
    del inputs["dy"]
    count = torch.full((), 2**40, dtype=torch.int64, device=kernel_device)
    for _ in range(2):
        ops.batch_norm(
            num_views=3, momentum=MOMENTUM, eps=EPS, kernels=kernels, num_batches_tracked=count,
            **inputs,
        )  # fmt: skip
    assert int(count) == 2**40 + 6


@pytest.mark.gpu
# opcheck itself looks at the .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_opcheck(residual: bool, relu: bool, pool: bool, device: torch.device) -> None:
    if pool and residual:
        return
    inputs = {name: t.to(device) for name, t in tensors((4, 16, 4, 4), torch.float32).items()}
    x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
    running, added = (inputs["running_mean"], inputs["running_var"]), inputs["residual"]
    tracked = torch.zeros((), dtype=torch.int64, device=device)
    library = torch.ops.fastbyol
    partial = module._batch_norm_moments(x, 2)
    torch.library.opcheck(library.batch_norm_moments, (x, 2))
    for count in (None, torch.full((1,), 32.0, device=device)):
        of_runs = partial if count is None else torch.ones(2, 1, 3, 16, device=device)
        forward = (
            x, weight, bias, *running, tracked, added if residual else None, of_runs, count,
            2, MOMENTUM, EPS, relu, pool,
        )  # fmt: skip
        torch.library.opcheck(library.batch_norm, forward)
        y, statistics, taps = module._batch_norm(*forward)
        dy = torch.ones_like(y)
        kept = (y if residual and relu else None, taps if pool else None)
        torch.library.opcheck(library.batch_norm_sums, (dy, x, *kept, statistics, 2, relu))
        sums = module._batch_norm_sums(dy, x, *kept, statistics, 2, relu)[0]
        sums = sums if count is None else sums[:, :1].contiguous()
        backward = (dy, x, kept[1], statistics, sums, count, 2, relu and not residual)
        torch.library.opcheck(library.batch_norm_backward, backward)


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
def test_compiled_equals_eager(pool: bool, device: torch.device) -> None:
    """Compare one graph, in which the running buffers are updated, with single operations."""
    results = []
    for compiles in (False, True):
        inputs = {name: t.to(device) for name, t in tensors((4, 16, 6, 6), torch.bfloat16).items()}
        count = torch.zeros((), dtype=torch.int64, device=device)
        leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
        running = (inputs["running_mean"], inputs["running_var"])

        def layer(leaves: Any = leaves, running: Any = running, count: Any = count) -> Tensor:
            x, weight, bias = leaves
            for _ in range(2):
                x = ops.batch_norm(
                    x * 2, weight, bias, *running, 2, momentum=MOMENTUM, eps=EPS, relu=True,
                    num_batches_tracked=count, kernels="triton",
                )  # fmt: skip
            return ops.batch_norm(
                x, weight, bias, *running, 2, momentum=MOMENTUM, eps=EPS, relu=True, pool=pool,
                kernels="triton",
            )  # fmt: skip

        y = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiles else layer)()
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        results.append((y.detach(), *running, count, *gradients))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.gpu
@pytest.mark.slow
def test_inductor_updates_the_buffers_of_every_layer(device: torch.device) -> None:
    """Use four layers: of two, torch 2.11 gave right ones even where it lost those of four."""
    results = []
    for compiles in (False, True):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(4, 8, 4, 4, generator=g).to(device, memory_format=torch.channels_last)
        kernel = torch.randn(4, 8, 8, 3, 3, generator=g).to(device)
        weight = torch.ones(4, 8, device=device, requires_grad=True)
        buffers = [
            (torch.zeros(8, device=device), torch.ones(8, device=device),
             torch.zeros((), dtype=torch.int64, device=device))
            for _ in range(4)
        ]  # fmt: skip

        def network(
            x: Tensor, kernel: Any = kernel, weight: Tensor = weight, buffers: Any = buffers
        ) -> Tensor:
            for layer, (mean, var, tracked) in enumerate(buffers):
                h = torch.nn.functional.conv2d(x, kernel[layer], padding=1)
                x = ops.batch_norm(
                    h, weight[layer], torch.zeros_like(weight[layer]), mean, var, 2,
                    momentum=MOMENTUM, eps=EPS, residual=x, relu=True, num_batches_tracked=tracked,
                    kernels="triton",
                )  # fmt: skip
            return x.square().mean()

        step = torch.compile(network, fullgraph=True, dynamic=False) if compiles else network
        for _ in range(2):
            gradient = torch.autograd.grad(step(x), weight)[0]
        results.append((gradient, *(tensor for layer in buffers for tensor in layer)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 256 * 9, 256 * 576, 256 * 2304])
@pytest.mark.parametrize("channels", [1, 5, 16, 64, 65, 100, 512, 4096])
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_launches_cover_all_rows_and_channels(rows: int, channels: int, num_views: int) -> None:
    for most, last in ((264, False), (396, True)):
        plan = module.launch(rows, channels, num_views, last=last)
        assert (plan.num_runs - 1) * plan.run < rows <= plan.num_runs * plan.run
        assert (plan.num_slabs - 1) * plan.block_c < channels <= plan.num_slabs * plan.block_c
        tile = plan.tile(module.PER_THREAD)
        assert tile["BLOCK_R"] * tile["BLOCK_C"] <= 32 * plan.num_warps * module.PER_THREAD
        # All programs run at once.
        programs = plan.num_slabs * num_views * plan.num_runs
        assert programs <= max(most, plan.num_slabs * num_views)
