"""``two_views`` in plain torch, by the formulas of torchvision's v2 functional on floats in [0, 1].

Shapes: V views, B images, N of the V * B views in one pass, C channels, H W pixels of an image, S
side of a view, K taps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol_kernels.views.table import JITTER_IDENTITY, JITTER_ORDERS, LUMA, Column

_NO_JITTER = len(JITTER_ORDERS)
# Bytes of one (C, N, S, S) set of planes. A pass uses three of them at a time, which should fit a
# CPU's L2.
_PASS_BYTES_CPU, _PASS_BYTES_GPU = 1 << 20, 1 << 28
BOXES = 3  # passes of Pillow's ImageFilter.GaussianBlur


def apply(
    images: Tensor,
    table: Tensor,
    rows: Tensor | None,
    size: int,
    blur_kernel: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Return the views (V, B, S, S, C). ``blur_kernel`` is 0 for Pillow's blur.

    The operations are crop and resize (bilinear, antialiased), colour jitter (brightness, contrast,
    saturation, hue in one of 24 orders), grayscale, flip, blur, solarize and normalise. The flip is
    part of the crop, since it commutes with the operations between them.
    """
    flat = table.flatten(0, 1)
    # Views are grouped by their operations, on the host, so that no work is masked away.
    host = flat.cpu()
    work = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(len(flat), size, size, 3, dtype=dtype, device=images.device)
    for picked, orders in _passes(host, size, images.is_cuda):
        index = picked.to(images.device)
        parameters = flat.index_select(0, index).to(work).T
        image = index % table.shape[1]
        image = image if rows is None else rows.index_select(0, image)
        x = _crop(images.index_select(0, image), parameters, host[picked].T, size)
        x = _jitter(x, parameters, orders)
        x = _grayscale(x, host[picked, Column.GRAYSCALE])
        x = _blur(x, parameters[Column.BLUR_SIGMA], host[picked, Column.BLUR_SIGMA], blur_kernel)
        x = _solarize(x, host[picked, Column.SOLARIZE])
        out.index_copy_(0, index, _normalize(x, mean, std).to(dtype))
    return out.view(*table.shape[:2], size, size, 3)


def _passes(host: Tensor, size: int, on_gpu: bool) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield row indices (N,) and jitter orders of each pass.

    Blurred and other views are in different passes, and equal orders are adjacent.
    """
    factors = host[:, Column.BRIGHTNESS : Column.HUE + 1]
    jittered = (factors != factors.new_tensor(JITTER_IDENTITY)).any(1)
    orders = torch.where(jittered, host[:, Column.ORDER], float(_NO_JITTER)).long()
    limit = max(1, (_PASS_BYTES_GPU if on_gpu else _PASS_BYTES_CPU) // (3 * 4 * size * size))
    blurred = host[:, Column.BLUR_SIGMA] > 0
    for part in (blurred.nonzero()[:, 0], blurred.logical_not().nonzero()[:, 0]):
        for picked in part[orders[part].argsort(stable=True)].tensor_split(
            math.ceil(len(part) / limit) or 1
        ):
            if len(picked):
                yield picked, orders[picked].tolist()


def _crop(images: Tensor, parameters: Tensor, host: Tensor, size: int) -> Tensor:
    """Crop, resize and flip uint8 (N, H, W, C) to planes (C, N, X, Y) in [0, 1], columns first."""
    num, _, width = images.shape[:3]
    most = host[Column.HEIGHT : Column.WIDTH + 1].amax(1).tolist()
    top, left, box_height, box_width, flip = parameters[: Column.FLIP + 1]
    index, weight = _bilinear(top, box_height, torch.zeros_like(flip), size, most[0])
    x = images.flatten(2).to(parameters.dtype)  # (N, H, W * C)
    x = _combine_rows(x, index, weight / 255.0).view(num, size, width, 3)
    x = x.permute(0, 2, 3, 1).reshape(num, width, 3 * size)  # (N, W, C * Y)
    index, weight = _bilinear(left, box_width, flip, size, most[1])
    return _combine_rows(x, index, weight).view(num, size, 3, size).permute(2, 0, 1, 3).contiguous()


def _bilinear(
    start: Tensor, length: Tensor, flip: Tensor, size: int, longest: float
) -> tuple[Tensor, Tensor]:
    """Return row numbers and weights, (N, S, K) each, that resize ``length`` pixels to ``size``.

    The filter is the triangle of torch's interpolate(antialias=True, align_corners=False): as wide
    as the scale where it shrinks.
    """
    num_taps = math.ceil(2.0 * max(1.0, longest / size))
    position = torch.arange(size, dtype=start.dtype, device=start.device)
    position = torch.where(flip[:, None] > 0, size - 1 - position, position)
    scale = (length / size)[:, None]
    support = scale.clamp_min(1.0)
    centre = (position + 0.5) * scale
    first = (centre - support + 0.5).floor().clamp_min(0.0)
    taps = first[:, :, None] + torch.arange(num_taps, dtype=start.dtype, device=start.device)
    weight = 1.0 - ((taps + 0.5 - centre[:, :, None]) / support[:, :, None]).abs()
    weight = weight.clamp_min(0.0) * (taps < length[:, None, None])
    index = torch.minimum(taps, length[:, None, None] - 1.0) + start[:, None, None]
    return index.long(), weight / weight.sum(2, keepdim=True)


def _combine_rows(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Return the sums over k of weight[n, s, k] * x[n, index[n, s, k]].

    ``x`` is (N, R, D), ``index`` and ``weight`` are (N, S, K), the result is (N, S, D).
    """
    num, num_rows, depth = x.shape
    offset = torch.arange(0, num * num_rows, num_rows, device=x.device)[:, None, None]
    bags, weights = (index + offset).flatten(0, 1), weight.to(x.dtype).flatten(0, 1).contiguous()
    return F.embedding_bag(bags, x.flatten(0, 1), mode="sum", per_sample_weights=weights).view(
        num, -1, depth
    )


def _jitter(x: Tensor, parameters: Tensor, orders: list[int]) -> Tensor:
    """Jitter planes (C, N, X, Y) in place, all adjacent views of the same order at once."""
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

    With low and range of the three channels and u = (x - low) / range, the hue h in sixths of a
    turn satisfies |h - 3| = 2 + u_r - u_g - u_b, and h < 3 just where g > b. Back: u_c =
    clamp(|d_c| - 1, 0, 1), d_c being the hue's distance from channel c's opposite (3, 5, 1 for r,
    g, b) wrapped to [-3, 3]; |||y| - 3| - 3| wraps any |y| <= 9.
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


def _blur(x: Tensor, sigma: Tensor, host: Tensor, blur_kernel: int) -> Tensor:
    """Transpose planes (C, N, X, Y) to (N, Y, X, C); blur them if this pass has blurred views."""
    if host[0] == 0:
        return x.permute(1, 3, 2, 0).contiguous()
    num, size = x.shape[1], x.shape[3]
    taps = _gaussian_taps(sigma, blur_kernel, size) if blur_kernel else _box_taps(sigma, host, size)
    passes = range(1 if blur_kernel else BOXES)
    x = x.permute(1, 2, 0, 3).reshape(num, size, 3 * size)  # (N, X, C * Y)
    for _ in passes:
        x = _combine_rows(x, *taps)
    x = x.view(num, size, 3, size).transpose(1, 3).reshape(num, size, 3 * size)  # (N, Y, C * X)
    for _ in passes:
        x = _combine_rows(x, *taps)
    return x.view(num, size, 3, size).transpose(2, 3).contiguous()


def _gaussian_taps(sigma: Tensor, num: int, size: int) -> tuple[Tensor, Tensor]:
    """Return indices and weights, (N, S, K) each, of a Gaussian blur with reflected edges."""
    offset = torch.arange(num, device=sigma.device) - num // 2
    index = (torch.arange(size, device=sigma.device)[:, None] + offset).abs()
    index = (size - 1) - (size - 1 - index).abs()
    weight = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)
    shape = (len(sigma), size, num)
    return index.expand(shape), weight[:, None].expand(shape)


def _box_taps(sigma: Tensor, host: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return indices and weights, (N, S, K) each, of a box blur of Pillow's GaussianBlur.

    Edges are repeated. The radius has a fraction so that the variance matches: Gwosdek, Grewenig,
    Bruhn, Weickert, "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering",
    SSVM 2011.
    """
    reach = int(box_radius(host.amax()).floor()) + 1
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    index = (torch.arange(size, device=sigma.device)[:, None] + offset).clamp(0, size - 1)
    radius = box_radius(sigma)[:, None]
    weight = (radius + 1.0 - offset.abs()).clamp(0.0, 1.0) / (2.0 * radius + 1.0)
    shape = (len(sigma), size, len(offset))
    return index.expand(shape), weight[:, None].expand(shape)


def box_radius(sigma: Tensor) -> Tensor:
    """Return the boxes' radius for ``sigma``, a whole part plus a fraction."""
    variance = sigma**2 / BOXES
    whole = ((torch.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0).floor()
    fraction = (
        (2 * whole + 1)
        * (whole * (whole + 1) - 3.0 * variance)
        / (6.0 * (variance - (whole + 1) ** 2))
    )
    return whole + fraction


def _solarize(x: Tensor, flags: Tensor) -> Tensor:
    """Invert the values v >= 1/2 of (N, Y, X, C) in flagged views, in place: min(v, 1 - v)."""
    index = flags.nonzero()[:, 0].to(x.device)
    if len(index):
        picked = x.index_select(0, index)
        x.index_copy_(0, index, torch.minimum(picked, 1.0 - picked))
    return x


def _normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise (N, Y, X, C) in place."""
    # Constants are tiled along a row so that the inner loop is long.
    size = x.shape[1]
    rows = x.flatten(2)
    rows.sub_(rows.new_tensor(mean).repeat(size)).div_(rows.new_tensor(std).repeat(size))
    return x
