"""The random parameters of every view: crop box, jitter factors and their order, flags, blur.

Sources: byol, appendix B (two views, blur and solarize per view); ``get_params`` of torchvision's
RandomResizedCrop and ColorJitter. Shapes: V views, B images, A crop attempts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch
from fastbyol_kernels.philox import DOMAIN_VIEWS, philox4x32, split_id, uniform
from fastbyol_kernels.views.table import JITTER_IDENTITY, JITTER_ORDERS, Column

Range = tuple[float, float]

CROP_ATTEMPTS = 10  # torchvision's
# A view's Philox blocks of four words: one per crop attempt (area, ratio, top, left), then one each
# for flip, jitter, order, grayscale / the four factors / blur, its sigma, solarize.
_FLAGS, _FACTORS, _BLUR, _NUM_BLOCKS = range(CROP_ATTEMPTS, CROP_ATTEMPTS + 4)


@dataclass(frozen=True)
class Distribution:
    """The distributions of the parameters.

    Ranges are (low, high), probabilities in [0, 1]; ``blur_p`` and ``solarize_p`` have one per
    view.
    """

    scale: Range  # share of the image's area
    ratio: Range  # width by height
    brightness: Range
    contrast: Range
    saturation: Range
    hue: Range  # turns
    jitter_p: float
    grayscale_p: float
    flip_p: float
    blur_sigma: Range  # pixels of the view
    blur_p: tuple[float, ...]
    solarize_p: tuple[float, ...]

    @property
    def num_views(self) -> int:
        return len(self.blur_p)

    @property
    def factors(self) -> tuple[Range, Range, Range, Range]:
        return self.brightness, self.contrast, self.saturation, self.hue


def reference(
    distribution: Distribution,
    ids: Tensor,
    seed: int | Tensor,
    epoch: int | Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Draw the table in plain torch.

    All operations are float64 ones that IEEE 754 rounds in one way only: sums, products, one
    quotient, square roots. So the bits are the same on any device and in the kernel.
    """
    d, num_views = distribution, distribution.num_views
    u = _uniforms(ids, num_views, seed, epoch)
    table = torch.zeros(num_views, len(ids), len(Column), dtype=torch.float64, device=ids.device)
    table[..., Column.TOP : Column.WIDTH + 1] = _crop_boxes(
        u[:, :, :CROP_ATTEMPTS], d, height, width
    )
    flip, jitter, order, gray = u[:, :, _FLAGS].unbind(-1)
    table[..., Column.FLIP] = (flip < d.flip_p).double()
    table[..., Column.ORDER] = (order * len(JITTER_ORDERS)).floor()
    for i, bounds in enumerate(d.factors):
        factor = _between(u[:, :, _FACTORS, i], bounds)
        table[..., Column.BRIGHTNESS + i] = torch.where(
            jitter < d.jitter_p, factor, JITTER_IDENTITY[i]
        )
    table[..., Column.GRAYSCALE] = (gray < d.grayscale_p).double()
    blur, sigma, solarize, _ = u[:, :, _BLUR].unbind(-1)
    for view in range(num_views):
        blurred = blur[view] < d.blur_p[view]
        table[view, :, Column.BLUR_SIGMA] = torch.where(
            blurred, _between(sigma[view], d.blur_sigma), 0.0
        )
        table[view, :, Column.SOLARIZE] = (solarize[view] < d.solarize_p[view]).double()
    return table.float()


def _uniforms(ids: Tensor, num_views: int, seed: int | Tensor, epoch: int | Tensor) -> Tensor:
    """Draw float64 (V, B, blocks, 4) in [0, 1), multiples of 2**-24."""
    low, high = split_id(ids, DOMAIN_VIEWS)
    view = torch.arange(num_views, device=ids.device)[:, None, None]
    block = view * 256 + torch.arange(_NUM_BLOCKS, device=ids.device)
    words = philox4x32(low[:, None], epoch, block, high[:, None], seed)
    return uniform(torch.stack(words, dim=-1)).double()


def _between(u: Tensor, bounds: Range) -> Tensor:
    return bounds[0] + u * (bounds[1] - bounds[0])


def _crop_boxes(u: Tensor, distribution: Distribution, height: int, width: int) -> Tensor:
    """Return top, left, height and width, (V, B, 4), of the first of A attempts that fits."""
    area = height * width * _between(u[..., 0], distribution.scale)
    ratio = _exp(_between(u[..., 1], _logs(distribution.ratio)))
    box_width, box_height = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    top = (u[..., 2] * (height - box_height + 1)).floor()
    left = (u[..., 3] * (width - box_width + 1)).floor()
    first = fits.long().argmax(dim=2)[:, :, None, None].expand(-1, -1, 1, 4)
    chosen = torch.stack((top, left, box_height, box_width), dim=-1).gather(2, first)[:, :, 0]
    # Entry by entry: torch.tensor(central) would copy from the host, which a CUDA graph cannot
    # capture.
    central = central_box(distribution.ratio, height, width)
    fallback = torch.stack(
        [torch.full_like(chosen[..., 0], float(value)) for value in central], dim=-1
    )
    return torch.where(fits.any(dim=2)[:, :, None], chosen, fallback)


def _logs(ratio: Range) -> Range:
    return math.log(ratio[0]), math.log(ratio[1])


def central_box(ratio: Range, height: int, width: int) -> tuple[int, int, int, int]:
    """Return torchvision's fallback, the largest central box with an allowed aspect ratio.

    The box is (top, left, height, width).
    """
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _exp(x: Tensor) -> Tensor:
    """Return exp(x) of float64 |x| < 20, to a relative error of 1e-12."""
    # By sums and products only: the last bit of library exponentials differs between devices.
    small, result = x * 2.0**-10, torch.ones_like(x)
    for divisor in range(8, 0, -1):
        # Times the reciprocal: torch divides by a number like this on a GPU, but not on a CPU.
        result = 1.0 + result * (small * (1.0 / divisor))
    for _ in range(10):
        result = result * result
    return result


# A kernel reads module constants only as constexpr.
_DOMAIN = tl.constexpr(DOMAIN_VIEWS)
_ATTEMPTS = tl.constexpr(CROP_ATTEMPTS)
_FLAGS_BLOCK, _FACTORS_BLOCK, _BLUR_BLOCK = (
    tl.constexpr(_FLAGS),
    tl.constexpr(_FACTORS),
    tl.constexpr(_BLUR),
)
_BLOCKS = tl.constexpr(16)  # _NUM_BLOCKS up to a power of two
_NUM_ORDERS = tl.constexpr(len(JITTER_ORDERS))
_NUM_COLUMNS = tl.constexpr(len(Column))
# Adding and subtracting it rounds |x| < 2**51 to the nearest integer, ties to even: torch's round.
_ROUNDER = tl.constexpr(6755399441055744.0)


@triton.jit
def _draw_kernel(
    ids, seed, epoch, table, num_images,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, NUM_VIEWS: tl.constexpr,
    RANGES: tl.constexpr,  # low and high - low of scale, log ratio, the four factors, sigma
    PROBABILITIES: tl.constexpr,  # flip, jitter, grayscale, blur per view, solarize per view
    CENTRAL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Draw ROWS rows of the table. The tile's second axis is Philox blocks, crop attempts first."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < NUM_VIEWS * num_images
    view = row // num_images
    sample = tl.load(ids + row % num_images, mask=mask, other=0)
    block = tl.arange(0, _BLOCKS)[None, :]

    c2 = (view * 256)[:, None] + block
    c0 = (sample & 0xFFFFFFFF)[:, None] + c2 * 0
    c3 = (((sample >> 32) << 8) | _DOMAIN)[:, None] + c2 * 0
    c1 = (tl.load(epoch) & 0xFFFFFFFF) + c2.to(tl.int64) * 0
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed), c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    )  # fmt: skip
    u0, u1, u2, u3 = _unit(w0), _unit(w1), _unit(w2), _unit(w3)

    area = _span(u0, RANGES, 0) * (HEIGHT * WIDTH * 1.0)
    ratio = _exp_kernel(_span(u1, RANGES, 1))
    box_width = (tl.sqrt(area * ratio) + _ROUNDER) - _ROUNDER
    box_height = (tl.sqrt(area / ratio) + _ROUNDER) - _ROUNDER
    fits = (
        (box_width > 0)
        & (box_width <= WIDTH)
        & (box_height > 0)
        & (box_height <= HEIGHT)
        & (block < _ATTEMPTS)
    )
    top = tl.floor(u2 * (HEIGHT + 1 - box_height))
    left = tl.floor(u3 * (WIDTH + 1 - box_width))
    first = tl.min(tl.where(fits, block, _BLOCKS), 1)
    out = table + row.to(tl.int64) * _NUM_COLUMNS
    _put_box(out, mask, 0, first, top, block, CENTRAL)
    _put_box(out, mask, 1, first, left, block, CENTRAL)
    _put_box(out, mask, 2, first, box_height, block, CENTRAL)
    _put_box(out, mask, 3, first, box_width, block, CENTRAL)

    flip_p: tl.constexpr = PROBABILITIES[0]
    jitter_p: tl.constexpr = PROBABILITIES[1]
    grayscale_p: tl.constexpr = PROBABILITIES[2]
    tl.store(out + 4, (_pick(u0, block, _FLAGS_BLOCK) < flip_p).to(tl.float32), mask=mask)
    jittered = _pick(u1, block, _FLAGS_BLOCK) < jitter_p
    tl.store(
        out + 5, tl.floor(_pick(u2, block, _FLAGS_BLOCK) * _NUM_ORDERS).to(tl.float32), mask=mask
    )
    _put_factor(out + 6, mask, _pick(u0, block, _FACTORS_BLOCK), jittered, RANGES, 2, 1.0)
    _put_factor(out + 7, mask, _pick(u1, block, _FACTORS_BLOCK), jittered, RANGES, 3, 1.0)
    _put_factor(out + 8, mask, _pick(u2, block, _FACTORS_BLOCK), jittered, RANGES, 4, 1.0)
    _put_factor(out + 9, mask, _pick(u3, block, _FACTORS_BLOCK), jittered, RANGES, 5, 0.0)
    tl.store(out + 10, (_pick(u3, block, _FLAGS_BLOCK) < grayscale_p).to(tl.float32), mask=mask)

    blur_p = tl.zeros((ROWS,), tl.float64)
    solarize_p = tl.zeros((ROWS,), tl.float64)
    for v in tl.static_range(NUM_VIEWS):
        blur_p = _of_view(blur_p, view, v, PROBABILITIES, 3)
        solarize_p = _of_view(solarize_p, view, v, PROBABILITIES, 3 + NUM_VIEWS)
    _put_factor(
        out + 11, mask, _pick(u1, block, _BLUR_BLOCK), _pick(u0, block, _BLUR_BLOCK) < blur_p,
        RANGES, 6, 0.0
    )  # fmt: skip
    tl.store(out + 12, (_pick(u2, block, _BLUR_BLOCK) < solarize_p).to(tl.float32), mask=mask)


@triton.jit
def _unit(words):
    """Turn uint32 words into float64 in [0, 1), multiples of 2**-24."""
    return (words >> 8).to(tl.float64) * 5.9604644775390625e-08


@triton.jit
def _span(u, RANGES: tl.constexpr, WHICH: tl.constexpr):
    low: tl.constexpr = RANGES[2 * WHICH]
    span: tl.constexpr = RANGES[2 * WHICH + 1]
    return u * span + low


@triton.jit
def _exp_kernel(x):
    small = x * 0.0009765625
    result = small * 0.0 + 1.0
    for i in tl.static_range(8):
        result = result * (small * (1.0 / (8 - i))) + 1.0
    for _ in tl.static_range(10):
        result = result * result
    return result


@triton.jit
def _of_view(p, view, V: tl.constexpr, PROBABILITIES: tl.constexpr, FIRST: tl.constexpr):
    """Replace ``p`` in the rows of view V."""
    own: tl.constexpr = PROBABILITIES[FIRST + V]
    # tl.full, since tl.where would convert the number to float32.
    return tl.where(view == V, tl.full(p.shape, own, tl.float64), p)


@triton.jit
def _pick(values, block, which):
    """Return column ``which`` of (ROWS, blocks): the other columns add exact zeros."""
    return tl.sum(tl.where(block == which, values, 0.0), 1)


@triton.jit
def _put_box(out, mask, COLUMN: tl.constexpr, first, values, block, CENTRAL: tl.constexpr):
    chosen = _pick(values, block, first[:, None])
    fallback: tl.constexpr = CENTRAL[COLUMN]
    tl.store(out + COLUMN, tl.where(first < _BLOCKS, chosen, fallback).to(tl.float32), mask=mask)


@triton.jit
def _put_factor(
    out, mask, u, applied, RANGES: tl.constexpr, WHICH: tl.constexpr, IDENTITY: tl.constexpr
):
    tl.store(out, tl.where(applied, _span(u, RANGES, WHICH), IDENTITY).to(tl.float32), mask=mask)


# The reasons of kernels that move narrow words, which ``fastbyol_bench.launches`` demands.
NARROW = {"_draw_kernel": "reads ids, writes rows of 13 numbers: 28 KB"}
# Triton decides at a kernel's definition whether calls compile or interpret it.
INTERPRETED = not isinstance(_draw_kernel, triton.runtime.JITFunction)
# One element per thread: 512 rows are 64 programs, which pay for the chain of float64 operations, a
# microsecond of latency, once and in parallel. A warp has two rows, and sums over blocks stay
# within it.
ROWS, NUM_WARPS = 8, 4
ROWS_INTERPRETED = 128  # the interpreter runs programs one by one


@torch.library.custom_op("fastbyol::draw_views", mutates_args=())
def _draw(
    ids: Tensor, seed: Tensor, epoch: Tensor, num_views: int, height: int, width: int,
    ranges: list[float], probabilities: list[float], central: list[float],
) -> Tensor:  # fmt: skip
    table = torch.empty((num_views, len(ids), len(Column)), dtype=torch.float32, device=ids.device)
    rows = ROWS_INTERPRETED if INTERPRETED else ROWS
    if len(ids):
        # Ranges and probabilities are constants, since Triton passes a Python float as float32.
        # Without fusion LLVM writes mul.rn and add.rn, which ptxas must not contract to a fused
        # multiply-add, so that no result depends on the compiler's choice.
        _draw_kernel[(triton.cdiv(num_views * len(ids), rows),)](
            ids, seed, epoch, table, len(ids), HEIGHT=height, WIDTH=width, NUM_VIEWS=num_views,
            RANGES=tuple(ranges),
            PROBABILITIES=tuple(probabilities), CENTRAL=tuple(central), ROWS=rows,
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return table


_draw.register_fake(
    lambda ids, seed, epoch, num_views, *rest: ids.new_empty(
        (num_views, ids.shape[0], len(Column)), dtype=torch.float32
    )
)


def _numbers(
    distribution: Distribution, height: int, width: int
) -> tuple[list[float], list[float], list[float]]:
    """Return the custom op's ``ranges``, ``probabilities`` and ``central`` as flat lists."""
    d = distribution
    bounds = (d.scale, _logs(d.ratio), *d.factors, d.blur_sigma)
    ranges = [float(number) for low, high in bounds for number in (low, high - low)]
    probabilities = [
        float(p) for p in (d.flip_p, d.jitter_p, d.grayscale_p, *d.blur_p, *d.solarize_p)
    ]
    return ranges, probabilities, [float(edge) for edge in central_box(d.ratio, height, width)]


def draw_views(
    distribution: Distribution,
    ids: Tensor,
    *,
    seed: int | Tensor,
    epoch: int | Tensor,
    height: int,
    width: int,
    kernels: str = "auto",
) -> Tensor:
    """Draw the parameters of every view of the samples ``ids``, int64 (B,) in [0, 2**56).

    Returns float32 (V, B, len(Column)) on the device of ``ids``. ``height`` and ``width`` are the
    images', in pixels. ``seed`` is in [0, 2**64), ``epoch`` in [0, 2**32). Both may be 0-d int64
    tensors on that device (seeds from 2**63 on are then negative), which the kernel reads when it
    runs: each replay of a captured CUDA graph draws with their current values.

    Every entry is a function of (seed, epoch, sample id, view) alone, through Philox. So the table
    has the same bits for any device, backend, batch, order or number of workers.

    ``kernels``: "reference" (plain torch), "triton" (on a CPU only in Triton's interpreter), or
    "auto", which is "triton" for CUDA tensors. Raises ValueError, naming the argument, for a wrong
    value.
    """
    _check(ids, seed, epoch, height, width)
    if dispatch(kernels, "ids", ids, has=("triton",)) == "reference":
        return reference(distribution, ids, seed, epoch, height, width)
    numbers = _numbers(distribution, height, width)
    seed, epoch = _on_device(seed, ids), _on_device(epoch, ids)
    table: Tensor = _draw(
        ids.contiguous(), seed, epoch, distribution.num_views, height, width, *numbers
    )
    return table


def _on_device(value: int | Tensor, ids: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full(
        (), value - 2**64 if value >= 2**63 else value, dtype=torch.int64, device=ids.device
    )


def _check(ids: Tensor, seed: int | Tensor, epoch: int | Tensor, height: int, width: int) -> None:
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(
            f"ids must be int64 of shape (B,), got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    for name, value, bits in (("seed", seed, 64), ("epoch", epoch, 32)):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.ndim or value.device != ids.device:
                got = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
                raise ValueError(
                    f"{name} must be an integer or int64 of no dimension on {ids.device}, got {got}"
                )
        elif not 0 <= value < 2**bits:
            raise ValueError(f"{name} must lie in [0, 2**{bits}), got {value}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
