"""The measured ceilings of a device: the rates of a large copy and of large matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastbyol_bench.harness import Plan, Variant, clock_of, measure
from fastbyol_bench.results import Ceiling, Floor


def ceiling(device: torch.device, *, quick: bool) -> Ceiling:
    """Measure the ceilings, each the best of several runs, with torch's current number of threads.

    The fp32 products run without TF32, whatever the process has set.
    """
    with _without_tf32():
        return _measured(device, quick)


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _measured(device: torch.device, quick: bool) -> Ceiling:
    on_gpu = device.type == "cuda"
    # Larger than the caches: 4 GB on a GPU, 512 MB on a CPU. Products so large that a GPU reaches
    # its peak.
    num_bytes = (1 << 31 if on_gpu else 1 << 28) >> (4 if quick else 0)
    side = (8192 if on_gpu else 2048) >> (2 if quick else 0)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceiling(
        threads=torch.get_num_threads(),
        copy_bytes_s=2 * num_bytes / _best(lambda: target.copy_(source), device, quick),
        fp32_flop_s=_product_s(side, torch.float32, device, quick),
        bf16_flop_s=_product_s(side, torch.bfloat16, device, quick),
    )


def _product_s(side: int, dtype: torch.dtype, device: torch.device, quick: bool) -> float:
    """Return the operations per second of matrix products, as products or as convolutions.

    The faster counts: on some CPUs torch's BLAS is slower than its convolution.
    """
    return (
        2
        * side**3
        / min(_best(make(side, dtype, device), device, quick) for make in (_product, _convolution))
    )


def _convolution(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    pixels = (side // 16, side, 4, 4)
    x, weight = (
        torch.randn(shape, device=device).to(dtype) for shape in (pixels, (side, side, 1, 1))
    )
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    return lambda: torch.nn.functional.conv2d(x, weight)


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    # Random numbers: zeros need less power, and a GPU would run faster than it does in training.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _best(call: Callable[[], object], device: torch.device, quick: bool) -> float:
    plan = Plan(rounds=3 if quick else 10, warmup=2, budget_s=3.0)
    return min(
        reading.wall_s for reading in measure([Variant("it", call)], plan, clock_of(device))["it"]
    )


def floor(
    ceiling: Ceiling, *, num_bytes: float = 0.0, flop: float = 0.0, bf16: bool = True
) -> Floor:
    """Return the larger of the times that the bytes and the operations take at their ceilings."""
    by_bytes = num_bytes / ceiling.copy_bytes_s
    by_flop = flop / (ceiling.bf16_flop_s if bf16 else ceiling.fp32_flop_s)
    return Floor(
        seconds=max(by_bytes, by_flop), bound="bytes" if by_bytes >= by_flop else "operations"
    )
