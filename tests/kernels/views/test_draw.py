"""The draw's kernel has the bits of the reference, which is tested with fastbyol.views."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_process import printed
from fastbyol_kernels.views import Distribution, draw, draw_views
from fastbyol_kernels.views.table import Column

# Nothing here is a short binary number.
UNEVEN = Distribution(
    scale=(0.2, 0.97), ratio=(3 / 4, 4 / 3), brightness=(0.6, 1.4), contrast=(0.3, 1.7),
    saturation=(0.7, 1.3),
    hue=(-0.1, 0.1), jitter_p=0.8, grayscale_p=0.2, flip_p=0.45, blur_sigma=(0.1, 2.0),
    blur_p=(0.9, 0.1),
    solarize_p=(0.1, 0.3),
)  # fmt: skip
# Square, flat, so long that no attempt fits, so long that some fit, a single pixel.
SIZES = [(96, 96), (64, 97), (20, 120), (32, 58), (1, 1)]


def assert_same_bits(distribution: Distribution, ids: torch.Tensor, **options: Any) -> None:
    kernel = draw_views(distribution, ids, kernels="triton", **options)
    assert torch.equal(kernel, draw_views(distribution, ids, kernels="reference", **options))
    assert torch.equal(
        kernel.cpu(), draw_views(distribution, ids.cpu(), kernels="reference", **options)
    )


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_kernel_draws_the_references_bits(
    height: int, width: int, device: torch.device
) -> None:
    # A GPU draws enough to meet rare roundings.
    ids = torch.arange(3000 if device.type == "cpu" else 300_000, device=device) * 5_000_011
    assert_same_bits(UNEVEN, ids, seed=2**64 - 3, epoch=2**32 - 1, height=height, width=width)


@pytest.mark.gpu
@settings(max_examples=15, derandomize=True)
@given(
    st.lists(st.integers(0, 2**56 - 1), min_size=1, max_size=9), st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 0.99), st.floats(0.1, 1.0),
)  # fmt: skip
def test_the_kernel_draws_the_references_bits_anywhere(
    ids: list[int], seed: int, epoch: int, height: int, width: int, scale: float, ratio: float
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distribution = replace(UNEVEN, scale=(scale, 1.0), ratio=(ratio, 1.1))
    assert_same_bits(
        distribution,
        torch.tensor(ids, device=device),
        seed=seed,
        epoch=epoch,
        height=height,
        width=width,
    )


def test_any_number_of_views(device: torch.device) -> None:
    three = replace(UNEVEN, blur_p=(0.1, 0.5, 0.9), solarize_p=(0.0, 1.0, 0.5))
    assert_same_bits(three, torch.arange(50, device=device), seed=1, epoch=2, height=30, width=40)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_seed_and_epoch_from_tensors(kernels: str, device: torch.device) -> None:
    """Check that tensors draw as integers do, and anew when they change, as graphs replay."""
    ids, size = torch.arange(20, device=device), {"height": 20, "width": 30}
    seed, epoch = (torch.tensor(value, device=device) for value in (-3, 4))
    for number in (4, 2**32 - 1):
        epoch.fill_(number)
        drawn = draw_views(UNEVEN, ids, seed=seed, epoch=epoch, kernels=kernels, **size)
        assert torch.equal(
            drawn,
            draw_views(UNEVEN, ids, seed=2**64 - 3, epoch=number, kernels="reference", **size),
        )


def test_every_entry_is_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))
    )
    drawn = draw_views(
        UNEVEN,
        torch.arange(131, device=device),
        seed=1,
        epoch=2,
        height=9,
        width=9,
        kernels="triton",
    )
    assert drawn.isfinite().all()
    assert drawn.shape == (2, 131, len(Column))


def test_empty_batch(device: torch.device) -> None:
    ids = torch.arange(0, device=device)
    assert draw_views(UNEVEN, ids, seed=1, epoch=2, height=9, width=9, kernels="triton").shape == (
        2,
        0,
        len(Column),
    )


def test_no_float64_operation_is_contracted() -> None:
    """Check that the PTX rounds each product and sum, which ptxas has to respect."""
    code = (
        "import torch\nfrom fastbyol_kernels import ahead_of_time\n"
        "from fastbyol_kernels.views import Distribution, draw_views\n"
        "with ahead_of_time.recording(90) as launches:\n"
        f"    draw_views({UNEVEN!r}, torch.arange(8), seed=1, epoch=2, height=96, width=96, "
        "kernels='triton')\n"
        "print(launches[0].compiled.asm['ptx'])"
    )
    used = set(re.findall(r"\b((?:add|sub|mul|fma|div|sqrt)\.[a-z0-9.]*f64)\b", printed(code)))
    assert {"add.rn.f64", "mul.rn.f64", "div.rn.f64", "sqrt.rn.f64"} <= used
    assert used <= {"add.rn.f64", "sub.rn.f64", "mul.rn.f64", "div.rn.f64", "sqrt.rn.f64"}


def test_opcheck_and_compile(device: torch.device) -> None:
    ids, seed, epoch = (
        torch.arange(5, device=device),
        torch.tensor(1, device=device),
        torch.tensor(2, device=device),
    )
    numbers = draw._numbers(UNEVEN, 9, 9)
    torch.library.opcheck(torch.ops.fastbyol.draw_views, (ids, seed, epoch, 2, 9, 9, *numbers))

    def more() -> torch.Tensor:
        return (
            draw_views(UNEVEN, ids, seed=seed, epoch=epoch, height=9, width=9, kernels="triton") + 1
        )

    assert torch.equal(torch.compile(more, fullgraph=True, backend="aot_eager")(), more())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("ids", torch.arange(3, dtype=torch.int32)),
        ("ids", torch.arange(4).view(2, 2)),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", torch.tensor(1.0)),
        ("epoch", 2**32),
        ("epoch", torch.tensor([1])),
        ("epoch", torch.tensor(1, device="meta")),
        ("height", 0),
        ("kernels", "cuda"),
    ],
)
def test_wrong_arguments_are_named(argument: str, value: object) -> None:
    good: dict[str, Any] = {"ids": torch.arange(3), "seed": 0, "epoch": 0, "height": 8, "width": 8}
    with pytest.raises(ValueError, match=rf"^{argument} "):
        draw_views(UNEVEN, **{**good, argument: value})


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbyol_kernels.dispatch.TRITON_ON_CPU", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        draw_views(UNEVEN, torch.arange(3), seed=0, epoch=0, height=8, width=8, kernels="triton")
