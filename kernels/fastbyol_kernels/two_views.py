"""Two random views of every image: apply a table of drawn parameters to uint8 images.

The table is float32 (V, B, len(Column)): one row per view and image, written by ``draw_views``. Every implementation of the
op consumes that same table, so they agree to rounding and the random distributions are tested on the table alone.

The operations in their order, each as torchvision's v2 functional does it on floats in [0, 1]: crop and resize (bilinear,
antialiased), colour jitter (brightness, contrast, saturation, hue in one of 24 orders), grayscale, flip, blur, solarize,
normalise. The flip is folded into the crop, since it commutes with all that stands between.

Shapes: V views, B images, N of the V * B views in one pass of the reference, C channels, H W pixels of an image, S side of a
view, K taps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch
from fastbyol_kernels.two_views_config import JITTER_IDENTITY, JITTER_ORDERS, LUMA, Column

_NO_JITTER = len(JITTER_ORDERS)
# Bytes of one (C, N, S, S) set of planes. On a CPU a pass touches three of them at a time, which should fit the L2 cache.
_PASS_BYTES_CPU, _PASS_BYTES_GPU = 1 << 20, 1 << 28
_PIL_PASSES = 3  # Pillow's ImageFilter.GaussianBlur
SPACE_TO_DEPTH = 12  # channels of 2x2 pixels


def reference(
    images: Tensor,
    table: Tensor,
    *,
    size: int,
    blur: str,
    blur_kernel: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The op in plain torch. Reads the table on the host to sort views by what is done to them, so nothing is masked away."""
    rows = table.flatten(0, 1)
    host = rows.cpu()
    _check_entries(host, images.shape[1], images.shape[2])
    _check_reach(host, size, blur, blur_kernel)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(len(rows), size, size, 3, dtype=dtype, device=images.device)
    for picked, orders in _passes(host, size, images.is_cuda):
        index = picked.to(images.device)
        parameters = rows.index_select(0, index).to(work).T
        x = _crop(images.index_select(0, index % images.shape[0]), parameters, host[picked].T, size)
        x = _jitter(x, parameters, orders)
        x = _grayscale(x, host[picked, Column.GRAYSCALE])
        x = _blur(x, parameters[Column.BLUR_SIGMA], host[picked, Column.BLUR_SIGMA], blur, blur_kernel)
        x = _solarize(x, host[picked, Column.SOLARIZE])
        out.index_copy_(0, index, _normalize(x, mean, std).to(dtype))
    return out.view(*table.shape[:2], size, size, 3).permute(0, 1, 4, 2, 3)


def _passes(host: Tensor, size: int, on_gpu: bool) -> Iterator[tuple[Tensor, list[int]]]:
    """Row indices of each pass, (N,), with their jitter orders: blurred views apart from others, equal orders side by side."""
    factors = host[:, Column.BRIGHTNESS : Column.HUE + 1]
    jittered = (factors != factors.new_tensor(JITTER_IDENTITY)).any(1)
    orders = torch.where(jittered, host[:, Column.ORDER], float(_NO_JITTER)).long()
    limit = max(1, (_PASS_BYTES_GPU if on_gpu else _PASS_BYTES_CPU) // (3 * 4 * size * size))
    blurred = host[:, Column.BLUR_SIGMA] > 0
    for part in (blurred.nonzero()[:, 0], blurred.logical_not().nonzero()[:, 0]):
        for picked in part[orders[part].argsort(stable=True)].tensor_split(math.ceil(len(part) / limit) or 1):
            if len(picked):
                yield picked, orders[picked].tolist()


def _crop(images: Tensor, parameters: Tensor, host: Tensor, size: int) -> Tensor:
    """uint8 (N, H, W, C) -> planes (C, N, X, Y) in [0, 1] of the cropped, resized and flipped views, columns outermost."""
    num, _, width = images.shape[:3]
    most = host[Column.HEIGHT : Column.WIDTH + 1].amax(1).tolist()
    top, left, box_height, box_width, flip = parameters[: Column.FLIP + 1]
    index, weight = _bilinear(top, box_height, torch.zeros_like(flip), size, most[0])
    x = images.flatten(2).to(parameters.dtype)  # (N, H, W * C)
    x = _combine_rows(x, index, weight / 255.0).view(num, size, width, 3)
    x = x.permute(0, 2, 3, 1).reshape(num, width, 3 * size)  # (N, W, C * Y)
    index, weight = _bilinear(left, box_width, flip, size, most[1])
    return _combine_rows(x, index, weight).view(num, size, 3, size).permute(2, 0, 1, 3).contiguous()


def _bilinear(start: Tensor, length: Tensor, flip: Tensor, size: int, longest: float) -> tuple[Tensor, Tensor]:
    """Taps that resize ``length`` pixels from ``start`` to ``size``: row numbers and weights, both (N, S, K).

    A triangle filter, as wide as the scale where it shrinks: torch's interpolate(antialias=True, align_corners=False).
    """
    num_taps = math.ceil(2.0 * max(1.0, longest / size))
    place = torch.arange(size, dtype=start.dtype, device=start.device)
    place = torch.where(flip[:, None] > 0, size - 1 - place, place)
    scale = (length / size)[:, None]
    support = scale.clamp_min(1.0)
    centre = (place + 0.5) * scale
    first = (centre - support + 0.5).floor().clamp_min(0.0)
    taps = first[:, :, None] + torch.arange(num_taps, dtype=start.dtype, device=start.device)
    weight = 1.0 - ((taps + 0.5 - centre[:, :, None]) / support[:, :, None]).abs()
    weight = weight.clamp_min(0.0) * (taps < length[:, None, None])
    index = torch.minimum(taps, length[:, None, None] - 1.0) + start[:, None, None]
    return index.long(), weight / weight.sum(2, keepdim=True)


def _combine_rows(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """out[n, s] = sum over k of weight[n, s, k] * x[n, index[n, s, k]]: (N, R, D) and twice (N, S, K) -> (N, S, D)."""
    num, num_rows, depth = x.shape
    offset = torch.arange(0, num * num_rows, num_rows, device=x.device)[:, None, None]
    bags, weights = (index + offset).flatten(0, 1), weight.to(x.dtype).flatten(0, 1).contiguous()
    return F.embedding_bag(bags, x.flatten(0, 1), mode="sum", per_sample_weights=weights).view(num, -1, depth)


def _jitter(x: Tensor, parameters: Tensor, orders: list[int]) -> Tensor:
    """Jitter planes (C, N, X, Y) in place; views of the same order are neighbours and go together."""
    start = 0
    for order, group in itertools.groupby(orders):
        stop = start + len(list(group))
        if order != _NO_JITTER:
            for column in JITTER_ORDERS[order]:
                _ADJUST[column](x[:, start:stop], parameters[column, start:stop, None, None])
        start = stop
    return x


def _adjust_brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0.0, 1.0)


def _adjust_contrast(x: Tensor, factor: Tensor) -> None:
    mean = _luma(x.mean((2, 3), keepdim=True))
    x.mul_(factor).add_(mean * (1.0 - factor)).clamp_(0.0, 1.0)


def _adjust_saturation(x: Tensor, factor: Tensor) -> None:
    gray = _luma(x)
    x.mul_(factor).add_(gray.mul_(1.0 - factor)).clamp_(0.0, 1.0)


def _adjust_hue(x: Tensor, shift: Tensor) -> None:
    """Turn the hue by ``shift`` turns at constant HSV saturation and value, in closed form.

    With low and range of the three channels and u = (x - low) / range, the hue h in sixths of a turn satisfies
    |h - 3| = 2 + u_r - u_g - u_b, and h < 3 just where g > b. Back: u_c = clamp(|d_c| - 1, 0, 1), d_c being the hue's
    distance from channel c's opposite (3, 5, 1 for r, g, b) wrapped to [-3, 3]; |||y| - 3| - 3| wraps any |y| <= 9.
    """
    low = torch.minimum(torch.minimum(x[0], x[1]), x[2])
    span = torch.maximum(torch.maximum(x[0], x[1]), x[2]).sub_(low)
    green_over_blue = x[1] - x[2]
    total = x[0] - x[1]
    distance = total.sub_(x[2]).add_(low).div_(span.clamp_min(torch.finfo(x.dtype).tiny)).add_(2.0)
    hue = torch.copysign(distance, green_over_blue).neg_().add_(6.0 * shift)
    torch.sub(hue, hue.new_tensor((0.0, 2.0, -2.0)).view(3, 1, 1, 1), out=x)
    x.abs_().sub_(3.0).abs_().sub_(3.0).abs_().sub_(1.0).clamp_(0.0, 1.0).mul_(span).add_(low)


_ADJUST = {
    Column.BRIGHTNESS: _adjust_brightness,
    Column.CONTRAST: _adjust_contrast,
    Column.SATURATION: _adjust_saturation,
    Column.HUE: _adjust_hue,
}


def _luma(x: Tensor) -> Tensor:
    return torch.mul(x[0], LUMA[0]).add_(x[1], alpha=LUMA[1]).add_(x[2], alpha=LUMA[2])


def _grayscale(x: Tensor, flags: Tensor) -> Tensor:
    index = flags.nonzero()[:, 0].to(x.device)
    if len(index):
        gray = _luma(x.index_select(1, index))
        x.index_copy_(1, index, gray.expand(3, -1, -1, -1))
    return x


def _blur(x: Tensor, sigma: Tensor, host: Tensor, kind: str, kernel: int) -> Tensor:
    """Planes (C, N, X, Y) -> (N, Y, X, C), blurred where this pass is one of blurred views."""
    if host[0] == 0:
        return x.permute(1, 3, 2, 0).contiguous()
    num, size = x.shape[1], x.shape[3]
    taps = _gaussian_taps(sigma, kernel, size) if kind == "gaussian" else _box_taps(sigma, host, size)
    passes = range(1 if kind == "gaussian" else _PIL_PASSES)
    x = x.permute(1, 2, 0, 3).reshape(num, size, 3 * size)  # (N, X, C * Y)
    for _ in passes:
        x = _combine_rows(x, *taps)
    x = x.view(num, size, 3, size).transpose(1, 3).reshape(num, size, 3 * size)  # (N, Y, C * X)
    for _ in passes:
        x = _combine_rows(x, *taps)
    return x.view(num, size, 3, size).transpose(2, 3).contiguous()


def _gaussian_taps(sigma: Tensor, kernel: int, size: int) -> tuple[Tensor, Tensor]:
    """``kernel`` samples of a Gaussian, normalised, edges reflected: torchvision's gaussian_blur. (S, K) as (N, S, K) twice."""
    offset = torch.arange(kernel, device=sigma.device) - kernel // 2
    index = (torch.arange(size, device=sigma.device)[:, None] + offset).abs()
    index = (size - 1) - (size - 1 - index).abs()
    weight = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)
    shape = (len(sigma), size, kernel)
    return index.expand(shape), weight[:, None].expand(shape)


def _box_taps(sigma: Tensor, host: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """One of three box blurs of fractional radius r that make a Gaussian, edges repeated: Pillow's GaussianBlur.

    The whole part l and fraction a of r match the variance: Gwosdek, Grewenig, Bruhn, Weickert, "Theoretical Foundations of
    Gaussian Convolution by Extended Box Filtering", SSVM 2011.
    """
    reach = int(_box_radius(host.amax()).floor()) + 1
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    index = (torch.arange(size, device=sigma.device)[:, None] + offset).clamp(0, size - 1)
    radius = _box_radius(sigma)[:, None]
    weight = (radius + 1.0 - offset.abs()).clamp(0.0, 1.0) / (2.0 * radius + 1.0)
    shape = (len(sigma), size, len(offset))
    return index.expand(shape), weight[:, None].expand(shape)


def _box_radius(sigma: Tensor) -> Tensor:
    variance = sigma**2 / _PIL_PASSES
    whole = ((torch.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance) / (6.0 * (variance - (whole + 1) ** 2))
    return whole + fraction


def _solarize(x: Tensor, flags: Tensor) -> Tensor:
    """(N, Y, X, C): v -> 1 - v where v >= 1/2, which is min(v, 1 - v)."""
    index = flags.nonzero()[:, 0].to(x.device)
    if len(index):
        picked = x.index_select(0, index)
        x.index_copy_(0, index, torch.minimum(picked, 1.0 - picked))
    return x


def _normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, Y, X, C) in place. Constants are tiled along a row so that the inner loop is long."""
    size = x.shape[1]
    rows = x.flatten(2)
    rows.sub_(rows.new_tensor(mean).repeat(size)).div_(rows.new_tensor(std).repeat(size))
    return x


# Kernels. A view's pixels are numbered p = y * S + x and cut into flat tiles, so that no lane idles at odd sizes. Three colour
# planes of a tile live in registers. The first two kernels run a program per tile, the third a program per band of rows.
#   _crop_kernel     crops, resizes, jitters as far as contrast; adds up what contrast needs the mean of
#   _contrast_kernel contrast with its mean, the rest of the jitter; ends at once for views without contrast
#   _blur_kernel     both blur passes; ends at once for views without blur
# Each writes a view's result as soon as nothing is left to do for it, else stages it in scratch planes (V * B, C, S * S). For
# bfloat16 results these are uint16 levels of 1/65535: an error of 8e-6, a hundredth of the result's own rounding near 1, and
# half the traffic: 28 MB for 512 views of 96x96, which stay in a 50 MB L2. Conditions are on one view's parameters, so that
# whole programs take or skip a branch.

# A kernel reads module constants only as constexpr.
(
    _TOP, _LEFT, _HEIGHT, _WIDTH, _FLIP, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAYSCALE, _BLUR_SIGMA, _SOLARIZE
) = (tl.constexpr(int(column)) for column in Column)  # fmt: skip
_NUM_COLUMNS = tl.constexpr(len(Column))
_LUMA_R, _LUMA_G, _LUMA_B = (tl.constexpr(weight) for weight in LUMA)
_LEVELS = tl.constexpr(65535.0)
_ALL_JITTER = tl.constexpr(4)
_SPACE_TO_DEPTH = tl.constexpr(SPACE_TO_DEPTH)
_BOXES = tl.constexpr(_PIL_PASSES)


@triton.jit
def _crop_kernel(
    images, indices, table, scratch, sums, out, num_resident, num_images, mean_r, mean_g, mean_b, scale_r, scale_g, scale_b,
    H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """``sums`` (V * B, tiles): luma of each tile before contrast."""
    tiles: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * BLOCK
    pixel = start + tl.arange(0, BLOCK)
    parameters = table + row * _NUM_COLUMNS
    number = (row % num_images).to(tl.int64)
    if INDEXED:
        # The clamp guards memory against indices that were not checked.
        number = tl.minimum(tl.maximum(tl.load(indices + number), 0), num_resident - 1)
    r, g, b = _crop_tile(images + number * (H * W * 3), parameters, pixel, H, W, SIZE, TAPS_Y, TAPS_X)
    contrast = tl.load(parameters + _CONTRAST)
    order, place = _decode(tl.load(parameters + _ORDER).to(tl.int32))
    if contrast != 1.0:
        r, g, b = _jitter_tile(r, g, b, order, 0, place, parameters)
        _stage(scratch, row, pixel, pixel < SIZE * SIZE, r, g, b, SIZE)
        luma = _luma_tile(r, g, b)
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(pixel < SIZE * SIZE, luma, 0.0)))
    else:
        r, g, b = _jitter_tile(r, g, b, order, 0, _ALL_JITTER, parameters)
        _leave(
            scratch, out, row, start, r, g, b, parameters,
            mean_r, mean_g, mean_b, scale_r, scale_g, scale_b, SIZE, CHANNELS, BLOCK,
        )  # fmt: skip


@triton.jit
def _contrast_kernel(
    table, scratch, sums, out, mean_r, mean_g, mean_b, scale_r, scale_g, scale_b,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SUM_TILES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Views whose contrast changes. SUM_TILES are the tiles of the first kernel, BLOCK_T as many up to a power of two."""
    tiles: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // tiles
    parameters = table + row * _NUM_COLUMNS
    contrast = tl.load(parameters + _CONTRAST)
    if contrast != 1.0:
        start = (tl.program_id(0) % tiles) * BLOCK
        pixel = start + tl.arange(0, BLOCK)
        tile = tl.arange(0, BLOCK_T)
        mean = tl.sum(tl.load(sums + row * SUM_TILES + tile, mask=tile < SUM_TILES, other=0.0)) * (1.0 / (SIZE * SIZE))
        gray = mean * (1.0 - contrast)
        r, g, b = _staged(scratch, row, pixel, pixel < SIZE * SIZE, SIZE)
        factor = contrast * _level(scratch)
        r, g, b = _unit(r * factor + gray), _unit(g * factor + gray), _unit(b * factor + gray)
        order, place = _decode(tl.load(parameters + _ORDER).to(tl.int32))
        r, g, b = _jitter_tile(r, g, b, order, place + 1, _ALL_JITTER, parameters)
        _leave(
            scratch, out, row, start, r, g, b, parameters,
            mean_r, mean_g, mean_b, scale_r, scale_g, scale_b, SIZE, CHANNELS, BLOCK,
        )  # fmt: skip


@triton.jit
def _blur_kernel(
    table, scratch, other, out, mean_r, mean_g, mean_b, scale_r, scale_g, scale_b,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    """Views with blur, ROWS rows a program: down the columns to ``other``, then along the rows, which are its own.

    KERNEL is the taps of the sampled Gaussian, or 0 for Pillow's boxes: three passes each way, in one program per view. A
    barrier makes what the program's threads wrote visible to each other.
    """
    bands: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    row = tl.program_id(0) // bands
    first = (tl.program_id(0) % bands) * (ROWS * SIZE)
    parameters = table + row * _NUM_COLUMNS
    sigma = tl.load(parameters + _BLUR_SIGMA)
    if sigma > 0.0:
        if KERNEL > 0:
            _pass(scratch, other, row, first, sigma, True, SIZE, BLOCK, ROWS, KERNEL)
        else:
            tl.static_assert(bands == 1)
            _pass(scratch, other, row, first, sigma, True, SIZE, BLOCK, ROWS, KERNEL)
            _pass(other, scratch, row, first, sigma, True, SIZE, BLOCK, ROWS, KERNEL)
            _pass(scratch, other, row, first, sigma, True, SIZE, BLOCK, ROWS, KERNEL)
            _pass(other, scratch, row, first, sigma, False, SIZE, BLOCK, ROWS, KERNEL)
            _pass(scratch, other, row, first, sigma, False, SIZE, BLOCK, ROWS, KERNEL)
        limit = _limit(first, SIZE, ROWS)
        for start in range(0, ROWS * SIZE, BLOCK):
            pixel = first + start + tl.arange(0, BLOCK)
            r, g, b = _blur_tile(other, row, pixel, pixel < limit, sigma, False, SIZE, KERNEL)
            _finish(
                out, row, first + start, limit, r, g, b, parameters,
                mean_r, mean_g, mean_b, scale_r, scale_g, scale_b, SIZE, CHANNELS, BLOCK,
            )  # fmt: skip


@triton.jit
def _crop_tile(
    image, parameters, pixel, H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr
):
    """Pixels of the cropped, resized and flipped view, in [0, 1]. Pixels beyond the view repeat its last."""
    pixel = tl.minimum(pixel, SIZE * SIZE - 1)
    y, x = pixel // SIZE, pixel % SIZE
    x = tl.where(tl.load(parameters + _FLIP) > 0.0, SIZE - 1 - x, x)
    top, height = _box_side(tl.load(parameters + _TOP), tl.load(parameters + _HEIGHT), H)
    left, width = _box_side(tl.load(parameters + _LEFT), tl.load(parameters + _WIDTH), W)
    corner = image + (top * W + left) * 3
    if (TAPS_Y == 2) & (TAPS_X == 2):
        r, g, b = _enlarge(corner, y, x, height, width, W, SIZE)
    else:
        r, g, b = _resize(corner, y, x, height, width, W, SIZE, TAPS_Y, TAPS_X)
    return r, g, b


@triton.jit
def _box_side(start, length, LIMIT: tl.constexpr):
    """A box's first pixel and its length on one axis. The clamps guard memory against a table that was not checked."""
    start = tl.minimum(tl.maximum(start.to(tl.int32), 0), LIMIT - 1)
    return start, tl.minimum(tl.maximum(length.to(tl.int32), 1), LIMIT - start)


@triton.jit
def _enlarge(corner, y, x, height, width, W: tl.constexpr, SIZE: tl.constexpr):
    """Where no box is larger than the view: plain bilinear interpolation, which the triangle filter then is."""
    y, below, weight_y = _pair(y, height, SIZE)
    x, right, weight_x = _pair(x, width, SIZE)
    weight_y *= 1.0 / 255.0
    w11 = weight_y * weight_x
    w10 = weight_y - w11
    w01 = weight_x * (1.0 / 255.0) - w11
    w00 = (1.0 / 255.0 - weight_y) - w01
    p00 = corner + (y * W + x) * 3
    p01, p10, p11 = corner + (y * W + right) * 3, corner + (below * W + x) * 3, corner + (below * W + right) * 3
    r, g, b = _weighed(p00, w00)
    r1, g1, b1 = _weighed(p01, w01)
    r2, g2, b2 = _weighed(p10, w10)
    r3, g3, b3 = _weighed(p11, w11)
    return r + r1 + r2 + r3, g + g1 + g2 + g3, b + b1 + b2 + b3


@triton.jit
def _weighed(at, weight):
    r, g, b = tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32), tl.load(at + 2).to(tl.float32)
    return r * weight, g * weight, b * weight


@triton.jit
def _pair(place, length, SIZE: tl.constexpr):
    """The two pixels around (place + 1/2) * length / SIZE - 1/2, and the weight of the second.

    Split in whole and fraction by integers, so that no digits are lost at large places.
    """
    position = tl.maximum((2 * place + 1) * length - SIZE, 0)
    first = position // (2 * SIZE)
    fraction = (position - first * (2 * SIZE)).to(tl.float32) * (1.0 / (2 * SIZE))
    return first, tl.minimum(first + 1, length - 1), fraction


@triton.jit
def _resize(
    corner, y, x, height, width, W: tl.constexpr, SIZE: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr
):  # fmt: skip
    """``_bilinear`` above, with the number of taps that the largest box needs."""
    first_y, offset_y, slope_y = _taps_of(y, height, SIZE)
    first_x, offset_x, slope_x = _taps_of(x, width, SIZE)
    r, g, b = offset_y * 0.0, offset_y * 0.0, offset_y * 0.0
    total_y, total_x = offset_y * 0.0, offset_y * 0.0
    for j in range(TAPS_Y):
        weight_y = tl.where(first_y + j < height, tl.maximum(1.0 - tl.abs(offset_y + j) * slope_y, 0.0), 0.0)
        line = corner + tl.minimum(first_y + j, height - 1) * (W * 3)
        total_y += weight_y
        total_x = offset_y * 0.0
        for i in range(TAPS_X):
            weight_x = tl.where(first_x + i < width, tl.maximum(1.0 - tl.abs(offset_x + i) * slope_x, 0.0), 0.0)
            tap_r, tap_g, tap_b = _weighed(line + tl.minimum(first_x + i, width - 1) * 3, weight_y * weight_x)
            r, g, b = r + tap_r, g + tap_g, b + tap_b
            total_x += weight_x
    scale = 1.0 / (255.0 * total_y * total_x)
    return r * scale, g * scale, b * scale


@triton.jit
def _taps_of(place, length, SIZE: tl.constexpr):
    """First tap of a resize of ``length`` pixels to SIZE, its distance from the centre, and the triangle's slope."""
    centre = (2 * place + 1) * length
    whole = centre // (2 * SIZE)
    fraction = (centre - whole * (2 * SIZE)).to(tl.float32) * (1.0 / (2 * SIZE))
    support = tl.maximum(length.to(tl.float32) * (1.0 / SIZE), 1.0)
    first = tl.maximum(tl.floor(fraction - support + 0.5), -whole.to(tl.float32))
    return whole + first.to(tl.int32), first + 0.5 - fraction, 1.0 / support


@triton.jit
def _decode(order):
    """Index into JITTER_ORDERS -> its operations, two bits each (0 brightness .. 3 hue), and the place of contrast.

    Permutations in lexicographic order: the digits of the index in factorial base choose among what is left.
    """
    a = order // 6
    b = (order % 6) // 2
    b += (b >= a).to(tl.int32)
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    c = tl.where(low > 0, 0, tl.where(high > 1, 1, 2))
    d = 6 - a - b - c
    c, d = tl.where(order % 2 == 0, c, d), tl.where(order % 2 == 0, d, c)
    place = tl.where(a == 1, 0, tl.where(b == 1, 1, tl.where(c == 1, 2, 3)))
    return a | (b << 2) | (c << 4) | (d << 6), place


@triton.jit
def _jitter_tile(r, g, b, order, first, stop, parameters):
    """The operations at places [first, stop) of an order, but for contrast."""
    brightness, saturation = tl.load(parameters + _BRIGHTNESS), tl.load(parameters + _SATURATION)
    hue = tl.load(parameters + _HUE)
    # Constant bounds: the interpreter of triton 3.6 takes no tensors there.
    for place in range(4):
        operation = (order >> (2 * place)) & 3
        operation = tl.where(place < first, 1, tl.where(place < stop, operation, 1))
        if (operation == 0) & (brightness != 1.0):
            r, g, b = _unit(r * brightness), _unit(g * brightness), _unit(b * brightness)
        if (operation == 2) & (saturation != 1.0):
            gray = _luma_tile(r, g, b) * (1.0 - saturation)
            r, g, b = _unit(r * saturation + gray), _unit(g * saturation + gray), _unit(b * saturation + gray)
        if (operation == 3) & (hue != 0.0):
            r, g, b = _turn(r, g, b, 6.0 * hue)
    return r, g, b


@triton.jit
def _turn(r, g, b, shift):
    """``_adjust_hue`` above; shift in sixths of a turn."""
    low = tl.minimum(tl.minimum(r, g), b)
    span = tl.maximum(tl.maximum(r, g), b) - low
    distance = (r - g - b + low) / tl.maximum(span, 1e-30) + 2.0
    hue = tl.where(g >= b, -distance, distance) + shift
    return _turned(hue, low, span), _turned(hue - 2.0, low, span), _turned(hue + 2.0, low, span)


@triton.jit
def _turned(hue, low, span):
    return _unit(tl.abs(tl.abs(tl.abs(hue) - 3.0) - 3.0) - 1.0) * span + low


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _luma_tile(r, g, b):
    return r * _LUMA_R + g * _LUMA_G + b * _LUMA_B


@triton.jit
def _leave(
    scratch, out, row, start, r, g, b, parameters, mean_r, mean_g, mean_b, scale_r, scale_g, scale_b,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What follows the jitter: grayscale, then the way to the blur or to the result."""
    if tl.load(parameters + _GRAYSCALE) > 0.0:
        gray = _luma_tile(r, g, b)
        r, g, b = gray, gray, gray
    if tl.load(parameters + _BLUR_SIGMA) > 0.0:
        pixel = start + tl.arange(0, BLOCK)
        _stage(scratch, row, pixel, pixel < SIZE * SIZE, r, g, b, SIZE)
    else:
        _finish(
            out, row, start, SIZE * SIZE, r, g, b, parameters,
            mean_r, mean_g, mean_b, scale_r, scale_g, scale_b, SIZE, CHANNELS, BLOCK,
        )  # fmt: skip


@triton.jit
def _stage(scratch, row, pixel, mask, r, g, b, SIZE: tl.constexpr):
    plane = scratch + row.to(tl.int64) * (3 * SIZE * SIZE)
    if scratch.dtype.element_ty == tl.uint16:
        r, g, b = r * _LEVELS + 0.5, g * _LEVELS + 0.5, b * _LEVELS + 0.5
    kind: tl.constexpr = scratch.dtype.element_ty
    tl.store(plane + pixel, r.to(kind), mask=mask)
    tl.store(plane + SIZE * SIZE + pixel, g.to(kind), mask=mask)
    tl.store(plane + 2 * SIZE * SIZE + pixel, b.to(kind), mask=mask)


@triton.jit
def _staged(scratch, row, pixel, mask, SIZE: tl.constexpr):
    """Staged planes as stored: to be multiplied by ``_level``."""
    plane = scratch + row.to(tl.int64) * (3 * SIZE * SIZE)
    r = tl.load(plane + pixel, mask=mask, other=0).to(tl.float32)
    g = tl.load(plane + SIZE * SIZE + pixel, mask=mask, other=0).to(tl.float32)
    b = tl.load(plane + 2 * SIZE * SIZE + pixel, mask=mask, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _level(scratch):
    if scratch.dtype.element_ty == tl.uint16:
        return 1.0 / _LEVELS
    else:  # noqa: RET505  (a branch at compile time)
        return 1.0


@triton.jit
def _limit(first, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """End of a band's pixels. The last band can reach beyond the view."""
    if SIZE % ROWS == 0:
        return first + ROWS * SIZE
    else:  # noqa: RET505
        return tl.minimum(first + ROWS * SIZE, SIZE * SIZE)


@triton.jit
def _pass(
    source, target, row, first, sigma, DOWN: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    """One blur of a band, down the columns or along the rows, from planes to planes."""
    for start in range(0, ROWS * SIZE, BLOCK):
        pixel = first + start + tl.arange(0, BLOCK)
        mask = pixel < _limit(first, SIZE, ROWS)
        r, g, b = _blur_tile(source, row, pixel, mask, sigma, DOWN, SIZE, KERNEL)
        _stage(target, row, pixel, mask, r, g, b, SIZE)
    tl.debug_barrier()


@triton.jit
def _blur_tile(source, row, pixel, mask, sigma, DOWN: tl.constexpr, SIZE: tl.constexpr, KERNEL: tl.constexpr):
    """Weighted sums of a tile's neighbours on one axis: ``_gaussian_taps`` or ``_box_taps`` above."""
    y, x = pixel // SIZE, pixel % SIZE
    r, g, b = tl.zeros(pixel.shape, tl.float32), tl.zeros(pixel.shape, tl.float32), tl.zeros(pixel.shape, tl.float32)
    total = sigma * 0.0
    if KERNEL > 0:
        for tap in range(-(KERNEL // 2), KERNEL // 2 + 1):
            weight = tl.exp(-0.5 * (tap / sigma) * (tap / sigma))
            r, g, b = _add_tap(r, g, b, source, row, y, x, mask, tap, weight, DOWN, SIZE, KERNEL)
            total += weight
    else:
        radius = _radius(sigma)
        reach = tl.floor(radius) + 1.0
        place = -reach
        while place <= reach:
            weight = _unit(radius + 1.0 - tl.abs(place))
            r, g, b = _add_tap(r, g, b, source, row, y, x, mask, place.to(tl.int32), weight, DOWN, SIZE, KERNEL)
            total += weight
            place += 1.0
    scale = _level(source) / total
    return r * scale, g * scale, b * scale


@triton.jit
def _add_tap(
    r, g, b, source, row, y, x, mask, tap, weight, DOWN: tl.constexpr, SIZE: tl.constexpr, KERNEL: tl.constexpr
):  # fmt: skip
    # Along the rows taps are shifted against what an access is aligned to, so that single values are loaded.
    at = _edge(y + tap, SIZE, KERNEL) * SIZE + x if DOWN else y * SIZE + _edge(x + tap, SIZE, KERNEL)
    tap_r, tap_g, tap_b = _staged(source, row, at, mask, SIZE)
    return r + weight * tap_r, g + weight * tap_g, b + weight * tap_b


@triton.jit
def _edge(place, SIZE: tl.constexpr, KERNEL: tl.constexpr):
    """Reflect about the outermost pixels for the Gaussian, repeat them for the boxes."""
    if KERNEL > 0:
        place = tl.where(place < 0, -place, place)
        place = tl.where(place > SIZE - 1, 2 * (SIZE - 1) - place, place)
    return tl.minimum(tl.maximum(place, 0), SIZE - 1)


@triton.jit
def _radius(sigma):
    """``_box_radius`` above."""
    variance = sigma * sigma / _BOXES
    whole = tl.floor((tl.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance) / (6.0 * (variance - (whole + 1) * (whole + 1)))
    return whole + fraction


@triton.jit
def _finish(
    out, row, start, limit, r, g, b, parameters, mean_r, mean_g, mean_b, scale_r, scale_g, scale_b,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Solarize, normalise and write the pixels from ``start`` on that lie below ``limit``."""
    if tl.load(parameters + _SOLARIZE) > 0.0:
        r, g, b = tl.minimum(r, 1.0 - r), tl.minimum(g, 1.0 - g), tl.minimum(b, 1.0 - b)
    kind: tl.constexpr = out.dtype.element_ty
    r, g, b = ((r - mean_r) * scale_r).to(kind), ((g - mean_g) * scale_g).to(kind), ((b - mean_b) * scale_b).to(kind)
    view = out + row.to(tl.int64) * (SIZE * SIZE * (3 if CHANNELS == _SPACE_TO_DEPTH else CHANNELS))
    if CHANNELS == 4:
        padded = tl.join(tl.join(r, b), tl.join(g, tl.zeros_like(b)))
        _store_wide(view, start, limit, padded, CHANNELS, BLOCK)
    elif CHANNELS == 8:
        zero = tl.zeros_like(b)
        padded = tl.join(tl.join(tl.join(r, zero), tl.join(b, zero)), tl.join(tl.join(g, zero), tl.join(zero, zero)))
        _store_wide(view, start, limit, padded, CHANNELS, BLOCK)
    else:
        pixel = start + tl.arange(0, BLOCK)
        mask = pixel < limit
        at = pixel * 3
        if CHANNELS == _SPACE_TO_DEPTH:
            y, x = pixel // SIZE, pixel % SIZE
            at = ((y // 2) * (SIZE // 2) + x // 2) * 12 + ((y % 2) * 2 + x % 2) * 3
        # One value at a time: the 6 bytes of a pixel in bf16 are no power of two. Those of 4 channels go out 16 at once.
        tl.store(view + at, r, mask=mask)
        tl.store(view + at + 1, g, mask=mask)
        tl.store(view + at + 2, b, mask=mask)


@triton.jit
def _store_wide(view, start, limit, padded, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Whole pixels of CHANNELS values, 16 bytes a store; the joined axes are in the order of the channels."""
    at = start * CHANNELS + tl.arange(0, BLOCK * CHANNELS)
    tl.store(view + at, tl.reshape(padded, (BLOCK * CHANNELS,)), mask=at < limit * CHANNELS)


# Why a kernel may move narrow words; ``fastbyol_bench.launches`` asks where one does.
NARROW = {"_crop_kernel": "gathers bytes: bilinear taps of 3-byte pixels"}


@dataclass(frozen=True)
class Launch:
    """How the three kernels are launched for views of one size: pixels of a tile, rows of a band, taps of the resize."""

    crop_block: int
    block: int
    rows: int
    taps_y: int
    taps_x: int


# 4 pixels a thread in the gathering kernel: its loads are bytes whatever the tile, and small programs hide their latency.
# 8 a thread in the others: 16 bytes of a staged plane.
NUM_WARPS, CROP_BLOCK, BLOCK = 4, 512, 1024
# Rows of a band, of which each is read once more for every band edge; at 96 pixels 32 rows are three full tiles.
MIN_ROWS, MAX_ROWS = 16, 48


def launch(height: int, width: int, size: int, pil: bool) -> Launch:
    """For images of ``height`` x ``width``. Taps follow from the shapes, since a crop is never larger than its image."""
    pixels = triton.next_power_of_2(size * size)
    block = min(BLOCK, pixels)
    choices = [size] if pil else range(min(MIN_ROWS, size), min(MAX_ROWS, size) + 1)
    rows = min(choices, key=lambda rows: -(-size // rows) * -(-rows * size // block))
    taps_y, taps_x = (math.ceil(2.0 * max(1.0, side / size)) for side in (height, width))
    return Launch(min(CROP_BLOCK, pixels), block, rows, taps_y, taps_x)


def _constants(plan: Launch, height: int, width: int, size: int, channels: int, indexed: bool, kernel: int) -> dict[str, Any]:
    """All constexprs of the three kernels; each takes those that it knows."""
    tiles = triton.cdiv(size * size, plan.crop_block)
    return {
        "H": height, "W": width, "SIZE": size, "TAPS_Y": plan.taps_y, "TAPS_X": plan.taps_x, "CHANNELS": channels,
        "INDEXED": indexed, "SUM_TILES": tiles, "BLOCK_T": triton.next_power_of_2(tiles), "ROWS": plan.rows, "KERNEL": kernel,
    }  # fmt: skip


def _known(kernel: Any, constants: Mapping[str, Any], block: int) -> dict[str, Any]:
    return {name: value for name, value in {**constants, "BLOCK": block}.items() if name in kernel.arg_names}


@torch.library.custom_op("fastbyol::two_views", mutates_args=())
def _two_views(
    images: Tensor, indices: Tensor | None, table: Tensor, size: int, blur_kernel: int, mean: list[float], std: list[float],
    dtype: torch.dtype, channels: int,
) -> Tensor:  # fmt: skip
    """(V * B, S, S, C), or with 12 channels (V * B, S / 2, S / 2, 12). ``blur_kernel`` 0 is Pillow's blur."""
    num_rows, (height, width) = table.shape[0] * table.shape[1], images.shape[1:3]
    out = torch.empty(_stored_shape(num_rows, size, channels), dtype=dtype, device=images.device)
    kind = torch.uint16 if dtype == torch.bfloat16 else torch.float32
    scratch, other = (torch.empty((num_rows, 3, size * size), dtype=kind, device=images.device) for _ in range(2))
    plan = launch(height, width, size, blur_kernel == 0)
    crop_tiles, tiles = (triton.cdiv(size * size, block) for block in (plan.crop_block, plan.block))
    sums = torch.empty((num_rows, crop_tiles), dtype=torch.float32, device=images.device)
    constants = _constants(plan, height, width, size, channels, indices is not None, blur_kernel)
    colours = (*mean, *(1.0 / value for value in std))
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    _crop_kernel[(num_rows * crop_tiles,)](
        images, table if indices is None else indices, table, scratch, sums, out, len(images), table.shape[1], *colours,
        **_known(_crop_kernel, constants, plan.crop_block), **options,
    )  # fmt: skip
    _contrast_kernel[(num_rows * tiles,)](
        table, scratch, sums, out, *colours, **_known(_contrast_kernel, constants, plan.block), **options
    )
    _blur_kernel[(num_rows * triton.cdiv(size, plan.rows),)](
        table, scratch, other, out, *colours, **_known(_blur_kernel, constants, plan.block), **options
    )
    return out


@_two_views.register_fake
def _(
    images: Tensor, indices: Tensor | None, table: Tensor, size: int, blur_kernel: int, mean: list[float], std: list[float],
    dtype: torch.dtype, channels: int,
) -> Tensor:  # fmt: skip
    return images.new_empty(_stored_shape(table.shape[0] * table.shape[1], size, channels), dtype=dtype)


def _stored_shape(num_rows: int, size: int, channels: int) -> tuple[int, int, int, int]:
    side = size // 2 if channels == SPACE_TO_DEPTH else size
    return num_rows, side, side, channels


def two_views(
    images: Tensor,
    table: Tensor,
    *,
    size: int,
    blur: str = "gaussian",
    blur_kernel: int = 9,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    indices: Tensor | None = None,
    channels: int = 3,
    kernels: str = "auto",
) -> Tensor:
    """uint8 images (B, H, W, 3) and float32 table (V, B, len(Column)) -> (V, B, channels, size, size) of ``dtype``.

    With ``indices``, int64 (B,), ``images`` is a resident set (N, H, W, 3) of which these are the batch. ``channels`` is 3, or
    4 or 8 (zeros after the third), or 12, space to depth: (V, B, 12, size / 2, size / 2), colour c of pixel (y, x) in channel
    3 * (2 * (y % 2) + x % 2) + c. The result's ``flatten(0, 1)`` is contiguous in channels_last. ``blur`` is "gaussian"
    (torchvision's gaussian_blur with ``blur_kernel`` taps, edges reflected) or "pil" (Pillow's GaussianBlur: three extended box
    blurs, edges repeated). ``mean`` and ``std`` are per channel, for values in [0, 1]. The arithmetic is float32, or float64
    when ``dtype`` is.

    ``kernels``: "reference" (plain torch), "triton" (contiguous inputs; on a CPU only in Triton's interpreter), or "auto",
    which is "triton" for CUDA tensors. float64 always takes the reference. Raises ValueError, naming the argument, for a wrong
    shape, dtype, device or value. The kernels do not look at the entries of ``table`` and ``indices`` first, since that would
    stall the GPU: a box or an index that does not lie within is moved to where it does.
    """
    _check_images(images)
    _check_indices(images, indices)
    _check_table(images, table, len(images) if indices is None else len(indices))
    _check_settings(size, blur, blur_kernel, dtype)
    _check_layout(size, channels)
    chosen = dispatch(kernels, "images", images, table, indices)
    if chosen == "cpu" and dtype != torch.float64:
        views = _on_processor(images, indices, table, size, blur, blur_kernel, mean, std, dtype)
        return views if channels == 3 else _lay_out(views, channels)
    if chosen != "triton" or dtype == torch.float64:
        batch = images if indices is None else images.index_select(0, indices)
        views = reference(
            batch, table, size=size, blur=blur, blur_kernel=blur_kernel, mean=tuple(mean), std=tuple(std), dtype=dtype
        )
        return views if channels == 3 else _lay_out(views, channels)
    _check_kernel(images, indices, table, size, blur, blur_kernel)
    taps = blur_kernel if blur == "gaussian" else 0
    stored: Tensor = _two_views(
        images, indices, table, size, taps, [float(m) for m in mean], [float(s) for s in std], dtype, channels
    )  # fmt: skip
    return stored.view(*table.shape[:2], *stored.shape[1:]).permute(0, 1, 4, 2, 3)


def _on_processor(
    images: Tensor,
    indices: Tensor | None,
    table: Tensor,
    size: int,
    blur: str,
    blur_kernel: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    from fastbyol_kernels import two_views_processor  # numba: who has a GPU need not wait for it

    rows = table.flatten(0, 1)
    _check_entries(rows, images.shape[1], images.shape[2])
    _check_reach(rows, size, blur, blur_kernel)
    if indices is None:
        indices = torch.arange(len(images), device=images.device)
    elif int(indices.min()) < 0 or int(indices.max()) >= len(images):
        raise IndexError(f"indices must lie in [0, {len(images)}), got {int(indices.min())} to {int(indices.max())}")
    taps = blur_kernel if blur == "gaussian" else 0
    reach = taps // 2 if taps else int(_box_radius(rows[:, Column.BLUR_SIGMA].amax()).floor()) + 1
    views = two_views_processor.views(
        images.contiguous(), indices, table, size=size, taps=taps, reach=reach, mean=mean, std=std, dtype=dtype
    )
    return views.permute(0, 1, 4, 2, 3)


def _lay_out(views: Tensor, channels: int) -> Tensor:
    """(V, B, 3, S, S) padded with zeros to 4 or 8 channels, or as space to depth."""
    pixels = views.permute(0, 1, 3, 4, 2)
    if channels == SPACE_TO_DEPTH:
        blocks = pixels.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (V, B, Y, 2, X, 2, C)
        return blocks.transpose(3, 4).flatten(4).permute(0, 1, 4, 2, 3)
    return F.pad(pixels, (0, channels - 3)).permute(0, 1, 4, 2, 3)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images must be uint8 of shape (B, H, W, 3), got {images.dtype} of shape {tuple(images.shape)}")


def _check_indices(images: Tensor, indices: Tensor | None) -> None:
    if indices is None:
        return
    if indices.dtype != torch.int64 or indices.ndim != 1 or not len(indices):
        raise ValueError(f"indices must be int64 of shape (B,), got {indices.dtype} of shape {tuple(indices.shape)}")
    if indices.device != images.device:
        raise ValueError(f"indices must be on the images' device {images.device}, got {indices.device}")


def _check_table(images: Tensor, table: Tensor, num_images: int) -> None:
    if table.dtype != torch.float32 or table.ndim != 3 or table.shape[1:] != (num_images, len(Column)) or not len(table):
        wanted = f"float32 of shape (V, {num_images}, {len(Column)})"
        raise ValueError(f"table must be {wanted}, got {table.dtype} of shape {tuple(table.shape)}")
    if table.device != images.device:
        raise ValueError(f"table must be on the images' device {images.device}, got {table.device}")


def _check_layout(size: int, channels: int) -> None:
    if channels not in (3, 4, 8, SPACE_TO_DEPTH):
        raise ValueError(f"channels must be 3, 4, 8 or {SPACE_TO_DEPTH}, got {channels}")
    if channels == SPACE_TO_DEPTH and size % 2:
        raise ValueError(f"channels of {SPACE_TO_DEPTH}, space to depth, need an even size, got {size}")


def _check_kernel(images: Tensor, indices: Tensor | None, table: Tensor, size: int, blur: str, blur_kernel: int) -> None:
    for name, tensor in (("images", images), ("indices", indices), ("table", table)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous for the kernels: strides {tensor.stride()}")
    if blur == "gaussian" and blur_kernel // 2 >= size:
        raise ValueError(f"blur_kernel must be at most {2 * size - 1} for views of {size} pixels, got {blur_kernel}")


def _check_settings(size: int, blur: str, blur_kernel: int, dtype: torch.dtype) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if blur not in ("gaussian", "pil"):
        raise ValueError(f"blur must be 'gaussian' or 'pil', got {blur!r}")
    if blur_kernel < 1 or blur_kernel % 2 == 0:
        raise ValueError(f"blur_kernel must be odd and positive, got {blur_kernel}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype must be float32, bfloat16 or float64, got {dtype}")


def _check_entries(host: Tensor, height: int, width: int) -> None:
    """What would read outside the image or outside JITTER_ORDERS. ``host`` is (V * B, len(Column)) on the host."""
    top, left, box_height, box_width = host[:, : Column.WIDTH + 1].unbind(1)
    inside = (top >= 0) & (left >= 0) & (box_height >= 1) & (box_width >= 1)
    inside &= (top + box_height <= height) & (left + box_width <= width)
    if not bool(inside.all()):
        raise ValueError(f"table holds a crop box that does not lie within images of {height} x {width} pixels")
    orders = host[:, Column.ORDER]
    if not bool(((orders >= 0) & (orders < len(JITTER_ORDERS))).all()):
        raise ValueError(f"table holds a jitter order outside 0..{len(JITTER_ORDERS) - 1}")


def _check_reach(host: Tensor, size: int, blur: str, blur_kernel: int) -> None:
    """A reflected edge is at most size - 1 pixels deep."""
    if blur == "gaussian" and blur_kernel // 2 >= size and bool((host[:, Column.BLUR_SIGMA] > 0).any()):
        raise ValueError(f"blur_kernel must be at most {2 * size - 1} for views of {size} pixels, got {blur_kernel}")


def bytes_moved(
    num_views: int, num_images: int, height: int, width: int, size: int, element_bytes: int, channels: int = 3
) -> int:
    """Bytes that must be read and written: every image once, the table once, every view once with all that is stored."""
    stored = math.prod(_stored_shape(num_views * num_images, size, channels))
    return num_images * height * width * 3 + num_views * num_images * len(Column) * 4 + stored * element_bytes
