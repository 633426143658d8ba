"""The stored tables match the launches and costs of steps, within the limits of a GPU."""

from __future__ import annotations

import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from compiled_process import printed
from fastbyol.config import ModelConfig
from fastbyol.model.byol import Online, Target
from fastbyol.model.norm import BatchNorm, GroupNorm
from fastbyol_bench import launches

OPS = Path(launches.ahead_of_time.__file__).parent
RENEW = "renew both with: python -m fastbyol_bench.launches --write, and say why"
# Compute capability 8.0 and 9.0 in "Compute Capabilities" of the CUDA C++ Programming Guide: shared
# memory of a block, in bytes, and the blocks of a grid.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)


def kept(table: str) -> str:
    """Return the stored table of the installed Triton."""
    path = launches.kept(table)
    text = path.read_text()
    if text.splitlines()[0] != f"triton {launches.MINOR}":
        pytest.skip(
            f"{path.name} is of {text.splitlines()[0]}, installed is triton {launches.MINOR}"
        )
    return text


def tables(table: str) -> list[str]:
    """Return the stored tables of all versions of Triton."""
    texts = [path.read_text() for path in sorted(launches.KERNELS.glob(f"{table}*.txt"))]
    assert len(texts) == 2
    return texts


def launched(text: str) -> list[tuple[str, str, list[int], int]]:
    """Return op, kernel, grid and times of each line of a table of launches."""
    lines = re.findall(
        r"^(\w+) +(\w+) +(\d+(?: x \d+)*) +(\d+) +\d+ +\d+ +\d+  \w", text, re.MULTILINE
    )
    return [
        (op, kernel, [int(side) for side in grid.split(" x ")], int(times))
        for op, kernel, grid, times in lines
    ]


def costs(text: str) -> list[tuple[str, str, int, list[int], str]]:
    """Return op, kernel, architecture, seven figures and the rest of each line of resources."""
    lines = re.findall(r"^(\w+) +(\w+) +sm_(\d+)((?: +\d+){7})  (.+)$", text, re.MULTILINE)
    assert len(lines) == len(text.splitlines()) - 2
    return [
        (op, kernel, int(arch), [int(n) for n in figures.split()], rest)
        for op, kernel, arch, figures, rest in lines
    ]


@pytest.mark.slow
def test_steps_launch_what_the_table_says() -> None:
    expected = kept("LAUNCHES")
    assert (
        printed("from fastbyol_bench.launches import *\nprint(launch_table(), end='')") == expected
    ), RENEW


@pytest.mark.slow
def test_kernels_cost_what_the_table_says() -> None:
    expected = kept("RESOURCES")
    assert (
        printed("from fastbyol_bench.launches import *\nprint(resource_table(), end='')")
        == expected
    ), RENEW


@pytest.mark.parametrize(("encoder", "first"), [("resnet18", 0), ("resnet50", 2)])
@pytest.mark.parametrize("text", tables("LAUNCHES"), ids=lambda text: text.split("\n")[0])
def test_a_step_launches_what_its_network_asks_for(text: str, encoder: str, first: int) -> None:
    """Count four launches for views, one per group norm and network, one per norm's gradient.

    One more sums the affine gradients of all group norms. A batch norm takes two each way, of which
    the stem's second one pools. The weights take one launch per network and one for the gradient.
    """
    config = ModelConfig(encoder=encoder, norm="gn", ws=True)
    with torch.device("meta"):
        networks = Online(config), Target(config)
    norms, heads = (
        [sum(isinstance(module, kind) for module in net.modules()) for net in networks]
        for kind in (GroupNorm, BatchNorm)
    )
    bn, gn = (part.split(": ", 1)[1] for part in text.split("\n\n")[1:][first : first + 2])
    counts = []
    for part in (bn, gn):
        counted: Counter[tuple[str, str]] = Counter()
        for op, kernel, _, times in launched(part):
            counted[op, kernel] += times
        assert f"{counted.total()} launches" == part.split("\n")[0]
        counts.append(counted)
    views = {("views", kernel): 1 for kernel in ("draw", "crop", "contrast", "blur")}
    always = views | {("lars_ema", kernel): 1 for kernel in ("norms", "sweep", "telemetry")}

    def of_batch_norms(online: int, target: int, pools: int) -> dict[tuple[str, str], int]:
        return {
            ("batch_norm", "moments"): online + target,
            ("batch_norm", "normalise"): online + target - pools,
            ("batch_norm", "gradient_sums"): online,
            ("batch_norm", "gradient"): online,
        }

    all_norms = [n + h for n, h in zip(norms, heads, strict=True)]
    assert counts[0] == always | of_batch_norms(*all_norms, 2) | {("batch_norm", "pool"): 2}
    assert counts[1] == always | of_batch_norms(*heads, 0) | {
        ("max_pool", "forward"): 2,
        ("max_pool", "backward"): 1,
        ("group_norm", "forward"): sum(norms),
        ("group_norm", "backward"): norms[0],
        ("group_norm", "sum_samples"): 1,
        ("weight_standardization", "forward"): 2,
        ("weight_standardization", "backward"): 1,
    }


def test_every_kernel_that_an_operation_launches_is_in_the_tables() -> None:
    launching = {
        (
            path.relative_to(OPS).with_suffix("").parts[0],
            name.removeprefix("_").removesuffix("_kernel"),
        )
        for path in OPS.rglob("*.py")
        for name in re.findall(r"(\w+_kernel)\[", path.read_text())
    }
    assert len(launching) >= 16
    for text in tables("LAUNCHES"):
        assert {(op, kernel) for op, kernel, _, _ in launched(text)} == launching


def test_grids_and_shared_memory_are_within_what_cuda_admits() -> None:
    for text in tables("LAUNCHES"):
        for op, kernel, grid, _ in launched(text):
            assert all(1 <= side <= most for side, most in zip(grid, GRID, strict=False)), (
                op,
                kernel,
                grid,
            )
    for text in tables("RESOURCES"):
        for op, kernel, architecture, figures, _ in costs(text):
            assert figures[4] <= SHARED_BYTES[architecture], (op, kernel, architecture, figures)


def test_no_kernel_spills_or_moves_narrow_words_unexcused_and_no_excuse_is_left_over() -> None:
    """Check that kernels move 16 bytes per access, or have a reason in the last column."""
    used: set[str] = set()
    for text in tables("RESOURCES"):
        for op, kernel, architecture, (*_, spill, _, load, store), rest in costs(text):
            why = re.search(r" \((.+)\)$", rest)
            flawed = spill > 0 or min(load, store) < launches.WIDE_BITS
            assert flawed == bool(why), (op, kernel, architecture, rest)
            used |= set(why[1].split("; ")) if why else set()
    names = [
        path.relative_to(OPS).with_suffix("")
        for path in OPS.rglob("*.py")
        if "_kernel[" in path.read_text()
    ]
    modules = [import_module(".".join(("fastbyol_kernels", *name.parts))) for name in names]
    excuses = [getattr(module, name, {}) for module in modules for name in ("SPILLS", "NARROW")]
    assert used == {why for reasons in excuses for why in reasons.values()}


def test_unfilled_operations_return_what_the_operations_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare shapes, strides and dtypes of a small network's forward and backward passes."""
    monkeypatch.setattr(launches.Unfilled, "LARGE", 1)
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    weights = [
        torch.randn(shape).requires_grad_()
        for shape in ((8, 3, 7, 7), (8, 8, 3, 3), (8, 8, 1, 1), (5, 8))
    ]
    affine = [torch.randn(8).requires_grad_() for _ in range(2)]

    def work() -> list[torch.Tensor]:
        first, second, skip, linear = weights
        y = F.conv2d(x, first, None, 2, 3)
        y = F.batch_norm(y, None, None, *affine, training=True).relu_()
        pooled = F.max_pool2d(y, 3, 2, 1)
        y = torch.cat([pooled.bfloat16(), pooled.bfloat16()], 1)[:, :8]
        out = F.conv2d(y, second.bfloat16(), None, 1, 1) + F.conv2d(y, skip.bfloat16())
        out = (out.float() * 2).mean((2, 3)) @ linear.t()
        gradients = torch.autograd.grad(out.square().sum(), [*weights, *affine])
        return [pooled, y, out, *gradients]

    def shapes(tensors: list[torch.Tensor]) -> list[Any]:
        return [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]

    with launches.Unfilled():
        unfilled = work()
    assert shapes(unfilled) == shapes(work())


def test_unfilled_operations_compute_nothing() -> None:
    large = torch.ones(launches.Unfilled.LARGE)
    small = torch.ones(4)
    with launches.Unfilled():
        assert large.zero_() is large
        assert large.view(2, -1).data_ptr() == large.data_ptr()
        assert torch.equal(small + small, torch.full((4,), 2.0))
    assert large.min() == 1
