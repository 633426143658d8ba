"""``two_views`` on a CPU: all steps of a view while its planes, 110 KB at 96 px, are in the L2.

Steps and formulas are the reference's, to rounding. Letters: S side of a view, C channels, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastbyol_kernels.native import F32, I64, U8, Activation, Worker, inlined, kernel, narrowed
from fastbyol_kernels.views.reference import BOXES, box_radius
from fastbyol_kernels.views.table import JITTER_ORDERS, LUMA, Column

_R, _G, _B = (np.float32(weight) for weight in LUMA)
_ZERO, _HALF, _ONE, _THREE, _TINY = (np.float32(x) for x in (0.0, 0.5, 1.0, 3.0, 1e-30))
_COLUMNS = len(Column)
# numba cannot index an array by members of an IntEnum.
(
    _TOP, _LEFT, _HEIGHT, _WIDTH, _FLIP, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _,
    _GRAYSCALE, _SIGMA, _SOLARIZE
) = map(int, Column)  # fmt: skip
_OPERATIONS = len(JITTER_ORDERS[0])


@inlined
def _taps(first, weights, num_taps, length, flip, size):
    """Write the first taps (S,) and weights (K, S) that resize ``length`` pixels to ``size``.

    The filter is a triangle as wide as the scale.
    """
    support = max(np.float32(length) / np.float32(size), _ONE)
    for s in range(size):
        # Integers split the centre in whole and fraction, so that large positions lose no digits.
        centre = (2 * (size - 1 - s if flip else s) + 1) * length
        whole = centre // (2 * size)
        fraction = np.float32(centre - whole * (2 * size)) / np.float32(2 * size)
        start = max(np.float32(math.floor(fraction - support + _HALF)), -np.float32(whole))
        first[s] = whole + np.int64(start)
        total = _ZERO
        for k in range(num_taps):
            weight = max(_ONE - abs(start + _HALF - fraction + np.float32(k)) / support, _ZERO)
            weights[k * size + s] = weight if first[s] + k < length else _ZERO
            total += weights[k * size + s]
        for k in range(num_taps):
            weights[k * size + s] /= total


@inlined
def _crop(image, width, box, flip, planes, line, first, weights, size):
    """Crop, resize and flip a u8 image (H, W, 3) to ``planes`` (3, S, S) in [0, 1].

    ``box`` is (top, left, height, width).
    """
    top, left, box_height, box_width = box
    taps_y, taps_x = _num_taps(box_height, size), _num_taps(box_width, size)
    first_y, first_x = first[:size], first[size : 2 * size]
    weights_y, weights_x = (
        weights[: taps_y * size],
        weights[taps_y * size : (taps_y + taps_x) * size],
    )
    _taps(first_y, weights_y, taps_y, box_height, False, size)
    _taps(first_x, weights_x, taps_x, box_width, flip, size)
    flat = line[: 3 * box_width]
    for y in range(size):
        for k in range(taps_y):
            at = ((top + min(first_y[y] + k, box_height - 1)) * width + left) * 3
            pixels, weight = (
                image[at : at + 3 * box_width],
                weights_y[k * size + y] / np.float32(255),
            )
            if k == 0 or weight != 0:
                _add(flat, weight, pixels, k == 0)
        for c in range(3):
            out = planes[(c * size + y) * size : (c * size + y + 1) * size]
            for k in range(taps_x):
                weight_x = weights_x[k * size : (k + 1) * size]
                for x in range(len(out)):
                    value = (
                        weight_x[x] * flat[np.uint64(3 * min(first_x[x] + k, box_width - 1) + c)]
                    )
                    out[x] = value if k == 0 else out[x] + value


@inlined
def _add(out, weight, source, begins):
    """Add ``weight`` * ``source`` to ``out``, or assign it if the sum ``begins``."""
    for i in range(len(out)):
        value = weight * np.float32(source[i])
        out[i] = value if begins else out[i] + value


@inlined
def _num_taps(length, size):
    return max(2, -(-2 * length // size))


@inlined
def _unit(value):
    return min(max(value, _ZERO), _ONE)


@inlined
def _luma(r, g, b):
    return _R * r + _G * g + _B * b


@inlined
def _blend(r, g, b, factor, gray):
    for i in range(len(r)):
        r[i], g[i], b[i] = (
            _unit(r[i] * factor + gray),
            _unit(g[i] * factor + gray),
            _unit(b[i] * factor + gray),
        )


@inlined
def _turned(hue, low, span):
    return _unit(abs(abs(abs(hue) - _THREE) - _THREE) - _ONE) * span + low


@inlined
def _jitter(r, g, b, operation, factor):
    """Apply a jitter operation to the planes in place; ``reference._adjust_hue`` has its hue."""
    if operation == _BRIGHTNESS:
        if factor != _ONE:
            _blend(r, g, b, factor, _ZERO)
    elif operation == _CONTRAST:
        if factor != _ONE:
            total = _ZERO
            for i in range(len(r)):
                total += _luma(r[i], g[i], b[i])
            _blend(r, g, b, factor, total / np.float32(len(r)) * (_ONE - factor))
    elif operation == _SATURATION:
        if factor != _ONE:
            rest = _ONE - factor
            for i in range(len(r)):
                gray = _luma(r[i], g[i], b[i]) * rest
                r[i], g[i], b[i] = (
                    _unit(r[i] * factor + gray),
                    _unit(g[i] * factor + gray),
                    _unit(b[i] * factor + gray),
                )
    elif factor != 0:
        shift = np.float32(6) * factor
        for i in range(len(r)):
            low, high = min(min(r[i], g[i]), b[i]), max(max(r[i], g[i]), b[i])
            span = high - low
            distance = (r[i] - g[i] - b[i] + low) / max(span, _TINY) + np.float32(2)
            hue = (-distance if g[i] >= b[i] else distance) + shift
            r[i] = _turned(hue, low, span)
            g[i] = _turned(hue - np.float32(2), low, span)
            b[i] = _turned(hue + np.float32(2), low, span)


@inlined
def _inside(position, size, reflects):
    """Return the pixel that replaces one beyond the edge: its mirror image, or the edge pixel."""
    if reflects:
        return (size - 1) - abs(size - 1 - abs(position))
    return min(max(position, 0), size - 1)


@inlined
def _blur_taps(weights, sigma, blur_kernel):
    """Write the weights of the offsets -reach to reach, and return reach.

    ``blur_kernel`` 0 is Pillow's blur: ``reference._box_taps`` has its source.
    """
    total = _ZERO
    if blur_kernel > 0:
        reach = blur_kernel // 2
        for k in range(2 * reach + 1):
            away = np.float32(k - reach) / sigma
            weights[k] = math.exp(-_HALF * away * away)
            total += weights[k]
    else:
        variance = sigma * sigma / np.float32(BOXES)
        whole = np.float32(
            math.floor((math.sqrt(np.float32(12) * variance + _ONE) - _ONE) / np.float32(2))
        )
        fraction = (np.float32(2) * whole + _ONE) * (whole * (whole + _ONE) - _THREE * variance)
        radius = whole + fraction / (np.float32(6) * (variance - (whole + _ONE) * (whole + _ONE)))
        reach = np.int64(math.floor(radius)) + 1
        for k in range(2 * reach + 1):
            weights[k] = min(max(radius + _ONE - abs(np.float32(k - reach)), _ZERO), _ONE)
            total += weights[k]
    for k in range(2 * reach + 1):
        weights[k] /= total
    return reach


@inlined
def _blur_down(source, out, weights, reach, reflects, size):
    """Blur along the columns of one plane."""
    for y in range(size):
        row = out[y * size : (y + 1) * size]
        for k in range(2 * reach + 1):
            at = _inside(y + k - reach, size, reflects) * size
            _add(row, weights[k], source[at : at + size], k == 0)


@inlined
def _blur_along(source, out, weights, reach, reflects, size, line):
    """Blur along the rows of one plane, each of which is first extended at both edges."""
    wide = line[: size + 2 * reach]
    for y in range(size):
        row, old = out[y * size : (y + 1) * size], source[y * size : (y + 1) * size]
        for x in range(reach):
            wide[x] = old[_inside(x - reach, size, reflects)]
            wide[reach + size + x] = old[_inside(size + x, size, reflects)]
        # A loop: to assign a slice numba compiles the words of an error, too, which takes 2 s.
        for x in range(size):
            wide[reach + x] = old[x]
        for k in range(2 * reach + 1):
            _add(row, weights[k], wide[k : k + size], k == 0)


@inlined
def _blur(planes, other, weights, line, sigma, blur_kernel, size):
    reach = _blur_taps(weights, sigma, blur_kernel)
    reflects, area = blur_kernel > 0, size * size
    for c in range(3):
        plane, spare = planes[c * area : (c + 1) * area], other[:area]
        for _ in range(1 if blur_kernel > 0 else BOXES):
            _blur_down(plane, spare, weights, reach, reflects, size)
            _blur_along(spare, plane, weights, reach, reflects, size, line)


@kernel
def _views(
    view: int, images: U8, table: F32, image_of: I64, orders: I64, colours: F32, scratch: F32,
    taps: I64, out: Activation, worker: Worker,
    height: int, width: int, num_images: int, size: int, blur_kernel: int, scratch_size: int,
    line_size: int,
) -> None:  # fmt: skip
    """Write a view. A worker's row of ``scratch`` is four planes, a line and the tap weights."""
    area = size * size
    row = table[view * _COLUMNS : (view + 1) * _COLUMNS]
    own = scratch[worker * scratch_size : (worker + 1) * scratch_size]
    first = taps[worker * 2 * size : (worker + 1) * 2 * size]
    planes, other, line = (
        own[: 3 * area],
        own[3 * area : 4 * area],
        own[4 * area : 4 * area + line_size],
    )
    weights = own[4 * area + line_size :]
    r, g, b = planes[:area], planes[area : 2 * area], planes[2 * area : 3 * area]
    start = image_of[view % num_images] * height * width * 3
    box = (np.int64(row[_TOP]), np.int64(row[_LEFT]), np.int64(row[_HEIGHT]), np.int64(row[_WIDTH]))
    image = images[start : start + height * width * 3]
    _crop(image, width, box, row[_FLIP] > 0, planes, line, first, weights, size)
    order = np.int64(row[_ORDER]) * _OPERATIONS
    for position in range(_OPERATIONS):
        operation = orders[order + position]
        _jitter(r, g, b, operation, row[operation])
    if row[_GRAYSCALE] > 0:
        for i in range(len(r)):
            gray = _luma(r[i], g[i], b[i])
            r[i], g[i], b[i] = gray, gray, gray
    if row[_SIGMA] > 0:
        _blur(planes, other, weights, line, row[_SIGMA], blur_kernel, size)
    if row[_SOLARIZE] > 0:
        for i in range(len(planes)):
            planes[i] = min(planes[i], _ONE - planes[i])
    for c in range(3):
        plane, mean, scale = planes[c * area : (c + 1) * area], colours[c], colours[3 + c]
        for i in range(len(plane)):
            plane[i] = (plane[i] - mean) * scale
    pixels = out[view * area * 3 : (view + 1) * area * 3]
    # A loop of its own: three strided passes over the result, in the loop above, cost a tenth of
    # the total.
    for i in range(len(r)):
        pixels[3 * i], pixels[3 * i + 1], pixels[3 * i + 2] = (
            narrowed(r[i], out),
            narrowed(g[i], out),
            narrowed(b[i], out),
        )


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
    """Return the views (V, B, S, S, C), fp32 or bf16. ``blur_kernel`` is 0 for Pillow's blur."""
    height, width = images.shape[1:3]
    out = table.new_empty((*table.shape[:2], size, size, 3), dtype=dtype)
    # The most pixels that a blur reads to either side, plus one, since the kernel may round a
    # radius differently.
    reach = (
        blur_kernel // 2
        if blur_kernel
        else int(box_radius(table[..., Column.BLUR_SIGMA].amax()).floor()) + 2
    )
    line_size = max(3 * width, size + 2 * reach)
    weights_size = max(size * (_num_taps(height, size) + _num_taps(width, size)), 2 * reach + 1)
    scratch_size, workers = 4 * size * size + line_size + weights_size, torch.get_num_threads()
    _views(
        table.shape[0] * table.shape[1], images.contiguous(), table.contiguous(),
        torch.arange(len(images), device="cpu") if rows is None else rows.contiguous(),
        torch.tensor(JITTER_ORDERS, device="cpu"),
        table.new_tensor([*mean, *(1.0 / s for s in std)]), table.new_empty(workers, scratch_size),
        table.new_empty(workers, 2 * size, dtype=torch.int64), out,
        height, width, table.shape[1], size, blur_kernel, scratch_size, line_size,
    )  # fmt: skip
    return out


# What a step calls, for ``native.compile_ahead``.
TRAINED_WITH = (_views,)
