"""Single operations of fastbyol_kernels and of the model, against plain PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol.model.convolution import convolve_by_pixel
from fastbyol.model.norm import BatchNorm, norm_relu
from fastbyol_bench.ceilings import floor
from fastbyol_bench.eager_peer import encoder
from fastbyol_bench.harness import Variant
from fastbyol_bench.results import Row
from fastbyol_bench.suite import NEEDS_GPU, Setting, missing
from fastbyol_kernels import group_norm, max_pool, weight_standardization

SUITE = "kernels"
GROUPS = 32
# ResNet-18's activations at 96 px, from the stem's to the last: side and channels.
STAGES = ((48, 64), (24, 64), (12, 128), (6, 256), (3, 512))


def rows(setting: Setting) -> Iterator[Row]:
    """Measure norms, the stem's pooling, weight standardization and few-pixel convolutions.

    On a GPU the norms run at every size of ResNet-18 at 96 px, on a CPU at one.
    """
    num_views = 4 if setting.quick else (512 if setting.on_gpu else 64)
    for side, channels in STAGES if setting.on_gpu else STAGES[1:2]:
        yield from group_norms(setting, (num_views, channels, side, side))
        yield from batch_norms(setting, (num_views, channels, side, side))
    yield from max_pools(setting, num_views)
    yield from standardization(setting)
    yield from few_pixels(setting, num_views)


def group_norms(setting: Setting, shape: tuple[int, int, int, int]) -> Iterator[Row]:
    """Measure group norm with residual and ReLU, bf16, forward alone and with backward."""
    n, channels, side, _ = shape
    weight, bias = (
        torch.ones(channels, device=setting.device, requires_grad=True) for _ in range(2)
    )
    x, residual, dy = (_activation(setting, shape) for _ in range(3))

    def ours() -> Tensor:
        return group_norm.group_norm(x, GROUPS, weight, bias, residual=residual, relu=True)

    def torchs() -> Tensor:
        y = F.group_norm(x, GROUPS, weight.to(x.dtype), bias.to(x.dtype))
        return F.relu(y + residual)

    for title, backward in (("forward", False), ("forward and backward", True)):
        name = f"group norm + residual + ReLU {side}x{side}x{channels}, {n} views, {title}"
        calls = [_pass(call, (x, residual, weight, bias), dy, backward) for call in (ours, torchs)]
        moved = group_norm.bytes_moved(shape, 2, residual=True, relu=True)
        moved += (
            group_norm.bytes_moved(shape, 2, residual=True, relu=True, backward=True)
            if backward
            else 0
        )
        yield from _pair(setting, name, calls, ("F.group_norm, + and F.relu", moved))
        if not setting.on_gpu:
            yield missing(SUITE, name, "fused, Triton", NEEDS_GPU)


def batch_norms(setting: Setting, shape: tuple[int, int, int, int]) -> list[Row]:
    """Measure BatchNorm per view, residual and ReLU, bf16, with backward, against two calls."""
    n, channels, side, _ = shape
    norm = BatchNorm(channels, 2).to(setting.device)
    x, residual, dy = (_activation(setting, shape) for _ in range(3))

    def ours() -> Tensor:
        return norm_relu(norm, x, residual)

    def torchs() -> Tensor:
        args = (norm.running_mean, norm.running_var, norm.weight, norm.bias, True)
        return F.relu(torch.cat([F.batch_norm(chunk, *args) for chunk in x.chunk(2)]) + residual)

    calls = [
        _pass(call, (x, residual, norm.weight, norm.bias), dy, True) for call in (ours, torchs)
    ]
    name = (
        f"batch norm per view + residual + ReLU {side}x{side}x{channels}, {n} views, forward "
        "and backward"
    )
    # The bytes of group norm, which moves the same tensors.
    flags = {"residual": True, "relu": True}
    moved = group_norm.bytes_moved(shape, 2, **flags) + group_norm.bytes_moved(
        shape, 2, **flags, backward=True
    )
    return _pair(setting, name, calls, ("F.batch_norm per view, torch.cat, + and F.relu", moved))


def max_pools(setting: Setting, num_views: int) -> list[Row]:
    """Measure the stem's max pooling, bf16, forward with backward. On a GPU ours is torch's."""
    x, dy = (_activation(setting, (num_views, 64, side, side)) for side in (48, 24))
    calls = [
        _pass(call, (x,), dy, True)
        for call in (lambda: max_pool.max_pool(x), lambda: F.max_pool2d(x, 3, 2, 1))
    ]
    # x read and dx written, y written and dy read, and a byte per element of y written and read.
    moved = 2 * 2 * (x.numel() + dy.numel()) + 2 * dy.numel()
    name = f"max pooling 3x3 of 48x48x64, {num_views} views, forward and backward"
    return _pair(setting, name, calls, ("F.max_pool2d", moved))


def standardization(setting: Setting) -> Iterator[Row]:
    """Measure standardizing all ResNet-18 weights to a bf16 copy against a loop over weights."""
    net = encoder("gn", ws=True)
    weights = [p.detach().to(setting.device).flatten(1) for p in net.parameters() if p.ndim == 4]
    sizes = [w.numel() for w in weights]
    offsets = [sum(sizes[:index]) for index in range(len(sizes))]
    flat = torch.cat([w.flatten() for w in weights])
    table = weight_standardization.row_table(
        offsets,
        [w.shape for w in weights],
        offsets,
        flat_numel=sum(sizes),
        copy_numel=sum(sizes),
        device=setting.device,
    )

    leaves = [weight.requires_grad_() for weight in weights]
    gradient = torch.randn(sum(sizes), device=setting.device).bfloat16()
    copy, out = torch.empty_like(gradient), torch.empty_like(flat)
    means, stds = flat.new_empty(2, len(table.rows)).unbind()

    def ours() -> None:
        weight_standardization.standardize_rows(copy, means, stds, flat, table)

    def ours_and_back() -> None:
        ours()
        weight_standardization.standardize_rows_backward(out, gradient, flat, means, stds, table)

    def loop() -> list[Tensor]:
        pieces = []
        for weight in leaves:
            std, mean = torch.std_mean(weight, 1, keepdim=True)
            pieces.append(((weight - mean) / (std + weight_standardization.EPS)).bfloat16())
        return pieces

    parts = [
        part.view_as(weight)
        for part, weight in zip(torch.split(gradient, sizes), leaves, strict=True)
    ]
    forward: list[Callable[[], object]] = [ours, torch.no_grad()(loop)]
    both: list[Callable[[], object]] = [
        ours_and_back,
        lambda: torch.autograd.grad(loop(), leaves, parts),
    ]
    for title, calls, passes in (
        ("forward", forward, (False,)),
        ("forward and backward", both, (False, True)),
    ):
        name = f"weight standardization of ResNet-18, {title}"
        moved = sum(
            weight_standardization.bytes_moved(table, 2, backward=backward) for backward in passes
        )
        yield from _pair(setting, name, calls, ("loop over torch.std_mean", moved))
        if not setting.on_gpu:
            yield missing(SUITE, name, "one kernel, Triton", NEEDS_GPU)


def few_pixels(setting: Setting, num_views: int) -> list[Row]:
    """Measure ResNet-18's last convolution, on 3x3 pixels, as products against the library's."""
    name = f"3x3 convolution of 3x3x512, {num_views} views, forward and backward"
    if setting.on_gpu:
        return [missing(SUITE, name, "by pixel", "a CPU: on a GPU cuDNN's is taken")]
    x, dy = (_activation(setting, (num_views, 512, 3, 3)) for _ in range(2))
    weight = (
        (torch.randn(512, 512, 3, 3) * 0.01)
        .bfloat16()
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    calls = [
        _pass(call, (x, weight), dy, True)
        for call in (
            lambda: convolve_by_pixel(x, weight, 1),
            lambda: F.conv2d(x, weight, None, 1, 1),
        )
    ]
    # 49 of 81 taps are on pixels; forward, input's gradient, weight's gradient.
    flop = 3 * 2 * num_views * 49 * 512 * 512
    return _pair(setting, name, calls, ("F.conv2d", 0), flop=flop)


def _activation(setting: Setting, shape: tuple[int, int, int, int]) -> Tensor:
    x = torch.randn(shape, device=setting.device).bfloat16()
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def _pass(
    call: Callable[[], Tensor], inputs: Sequence[Tensor], dy: Tensor, backward: bool
) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(call)
    return lambda: torch.autograd.grad(call(), inputs, dy.detach())


def _pair(
    setting: Setting,
    name: str,
    calls: Sequence[Callable[[], object]],
    peer: tuple[str, float],
    flop: float = 0.0,
) -> list[Row]:
    variants = [Variant("ours", calls[0]), Variant(peer[0], calls[1])]
    least = floor(setting.ceiling(), num_bytes=peer[1], flop=flop)
    floors = {variant.name: least for variant in variants}
    return setting.kernel_rows(
        SUITE, name, variants, setting.plan(20, 5.0, warmup=3), floors=floors, cold=setting.on_gpu
    )
