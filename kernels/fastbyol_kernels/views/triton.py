"""``two_views`` on a GPU: three kernels over tiles of views.

A tile is a range of a view's pixels p = y * S + x, so that no lane idles at odd sizes. Each kernel
writes the views that it completes and stages the others in scratch planes (V * B, C, S * S).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol_kernels.views.blocks import CHANNELS, IMAGE_BORDER, blocks_shape
from fastbyol_kernels.views.reference import BOXES
from fastbyol_kernels.views.table import LUMA, Column

# A kernel reads module constants only as constexpr.
(
    _TOP, _LEFT, _HEIGHT, _WIDTH, _FLIP, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE,
    _GRAYSCALE, _BLUR_SIGMA, _SOLARIZE
) = (tl.constexpr(int(column)) for column in Column)  # fmt: skip
_NUM_COLUMNS = tl.constexpr(len(Column))
_LUMA_R, _LUMA_G, _LUMA_B = (tl.constexpr(weight) for weight in LUMA)
_LEVELS = tl.constexpr(65535.0)
_ALL_JITTER = tl.constexpr(4)
_BOXES = tl.constexpr(BOXES)
_CHANNELS = tl.constexpr(CHANNELS)
_LINES_BEFORE, _LINES_AFTER = (tl.constexpr(pixels // 2) for pixels in IMAGE_BORDER)
_BORDER_BLOCKS = tl.constexpr(64)  # zeroed by a program at once: 16 bytes of bf16 a thread


@triton.jit
def _crop_kernel(
    images, table, rows, scratch, sums, out, num_images, batch, mean_r, mean_g, mean_b, scale_r,
    scale_g, scale_b,
    H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr, BLOCK: tl.constexpr, IN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Crop, resize and jitter a tile up to contrast. Write its luma to ``sums`` (V * B, tiles).

    The ``batch`` images are those at ``rows`` of the ``num_images`` in ``images``, or the first.
    Here and below, conditions depend on a view's parameters alone, so whole programs branch alike.
    """
    tiles: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    if IN_BLOCKS:
        _clear_border(out, row, tl.program_id(0) % tiles, tiles, SIZE)
    parameters = table + row * _NUM_COLUMNS
    which = row % batch
    if rows is not None:
        # Clamped like a crop box: unchecked rows must not cause a read outside the set.
        which = tl.minimum(tl.maximum(tl.load(rows + which), 0), num_images - 1)
    image = images + which.to(tl.int64) * (H * W * 3)
    r, g, b = _crop_tile(image, parameters, pixel, H, W, SIZE, TAPS_Y, TAPS_X)
    contrast = tl.load(parameters + _CONTRAST)
    order, index = _decode(tl.load(parameters + _ORDER).to(tl.int32))
    if contrast != 1.0:
        r, g, b = _jitter_tile(r, g, b, order, 0, index, parameters)
        _stage(scratch, row, pixel, pixel < SIZE * SIZE, r, g, b, SIZE)
        luma = _luma_tile(r, g, b)
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(pixel < SIZE * SIZE, luma, 0.0)))
    else:
        r, g, b = _jitter_tile(r, g, b, order, 0, _ALL_JITTER, parameters)
        colours = mean_r, mean_g, mean_b, scale_r, scale_g, scale_b
        _leave(scratch, out, row, pixel, r, g, b, parameters, colours, SIZE, IN_BLOCKS)


@triton.jit
def _contrast_kernel(
    table, scratch, sums, boxes, out, mean_r, mean_g, mean_b, scale_r, scale_g, scale_b,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, SUM_TILES: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr, IN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Change a tile's contrast by the view's mean luma, then apply the rest of the jitter.

    SUM_TILES is the number of tiles of ``_crop_kernel``, BLOCK_T that number up to a power of two.
    For Pillow's blur the first program of a view also writes its weights to ``boxes``, BLOCK_W at a
    time.
    """
    tiles: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // tiles
    parameters = table + row * _NUM_COLUMNS
    if boxes is not None:
        sigma = tl.load(parameters + _BLUR_SIGMA)
        if (tl.program_id(0) % tiles == 0) & (sigma > 0.0):
            _write_boxes(boxes + row.to(tl.int64) * (SIZE * SIZE + 1), sigma, SIZE, BLOCK_W)
    contrast = tl.load(parameters + _CONTRAST)
    if contrast != 1.0:
        pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
        tile = tl.arange(0, BLOCK_T)
        mean = tl.sum(tl.load(sums + row * SUM_TILES + tile, mask=tile < SUM_TILES, other=0.0)) * (
            1.0 / (SIZE * SIZE)
        )
        gray = mean * (1.0 - contrast)
        r, g, b = _staged(scratch, row, pixel, pixel < SIZE * SIZE, SIZE)
        factor = contrast * _level(scratch)
        r, g, b = _unit(r * factor + gray), _unit(g * factor + gray), _unit(b * factor + gray)
        order, index = _decode(tl.load(parameters + _ORDER).to(tl.int32))
        r, g, b = _jitter_tile(r, g, b, order, index + 1, _ALL_JITTER, parameters)
        colours = mean_r, mean_g, mean_b, scale_r, scale_g, scale_b
        _leave(scratch, out, row, pixel, r, g, b, parameters, colours, SIZE, IN_BLOCKS)


@triton.jit
def _blur_kernel(
    table, boxes, scratch, other, out, mean_r, mean_g, mean_b, scale_r, scale_g, scale_b,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KERNEL: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Blur a band of ROWS rows per program, down the columns to ``other``, then along the rows.

    KERNEL is the number of taps of the sampled Gaussian, or 0 for Pillow's boxes, whose weights
    ``_contrast_kernel`` wrote.
    """
    bands: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    row = tl.program_id(0) // bands
    first = (tl.program_id(0) % bands) * (ROWS * SIZE)
    parameters = table + row * _NUM_COLUMNS
    sigma = tl.load(parameters + _BLUR_SIGMA)
    if sigma > 0.0:
        # The last band can extend beyond the view.
        limit = (
            first + ROWS * SIZE
            if SIZE % ROWS == 0
            else tl.minimum(first + ROWS * SIZE, SIZE * SIZE)
        )
        weights = boxes
        if KERNEL == 0:
            weights = boxes + row.to(tl.int64) * (SIZE * SIZE + 1)
        for start in range(0, ROWS * SIZE, BLOCK):
            pixel = first + start + tl.arange(0, BLOCK)
            r, g, b = _blur_tile(
                scratch, weights, row, pixel, pixel < limit, sigma, True, SIZE, KERNEL
            )
            _stage(other, row, pixel, pixel < limit, r, g, b, SIZE)
        # Makes the writes of the program's threads visible to each other.
        tl.debug_barrier()
        for start in range(0, ROWS * SIZE, BLOCK):
            pixel = first + start + tl.arange(0, BLOCK)
            r, g, b = _blur_tile(
                other, weights, row, pixel, pixel < limit, sigma, False, SIZE, KERNEL
            )
            colours = mean_r, mean_g, mean_b, scale_r, scale_g, scale_b
            _finish(out, row, pixel, pixel < limit, r, g, b, parameters, colours, SIZE, IN_BLOCKS)


@triton.jit
def _crop_tile(
    image,
    parameters,
    pixel,
    H: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
):
    """Return pixels of the cropped, resized and flipped view, in [0, 1].

    Pixels beyond the view repeat its last one.
    """
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
    """Return a box's first pixel and its length on one axis."""
    # Clamped, since an unchecked table must not cause a read outside the image.
    start = tl.minimum(tl.maximum(start.to(tl.int32), 0), LIMIT - 1)
    return start, tl.minimum(tl.maximum(length.to(tl.int32), 1), LIMIT - start)


@triton.jit
def _enlarge(corner, y, x, height, width, W: tl.constexpr, SIZE: tl.constexpr):
    """Interpolate bilinearly: the triangle filter, if no box is larger than the view."""
    y, below, weight_y = _pair(y, height, SIZE)
    x, right, weight_x = _pair(x, width, SIZE)
    weight_y *= 1.0 / 255.0
    w11 = weight_y * weight_x
    w10 = weight_y - w11
    w01 = weight_x * (1.0 / 255.0) - w11
    w00 = (1.0 / 255.0 - weight_y) - w01
    p00 = corner + (y * W + x) * 3
    p01, p10, p11 = (
        corner + (y * W + right) * 3,
        corner + (below * W + x) * 3,
        corner + (below * W + right) * 3,
    )
    r, g, b = _weighed(p00, w00)
    r1, g1, b1 = _weighed(p01, w01)
    r2, g2, b2 = _weighed(p10, w10)
    r3, g3, b3 = _weighed(p11, w11)
    return r + r1 + r2 + r3, g + g1 + g2 + g3, b + b1 + b2 + b3


@triton.jit
def _weighed(at, weight):
    r, g, b = (
        tl.load(at).to(tl.float32),
        tl.load(at + 1).to(tl.float32),
        tl.load(at + 2).to(tl.float32),
    )
    return r * weight, g * weight, b * weight


@triton.jit
def _pair(index, length, SIZE: tl.constexpr):
    """Return the pixels around (index + 1/2) length / SIZE - 1/2, and the weight of the second."""
    # Integers split the position in whole and fraction, so that large positions lose no digits.
    position = tl.maximum((2 * index + 1) * length - SIZE, 0)
    first = position // (2 * SIZE)
    fraction = (position - first * (2 * SIZE)).to(tl.float32) * (1.0 / (2 * SIZE))
    return first, tl.minimum(first + 1, length - 1), fraction


@triton.jit
def _resize(
    corner, y, x, height, width, W: tl.constexpr, SIZE: tl.constexpr, TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr
):  # fmt: skip
    """Resize by ``reference._bilinear``'s filter, with the number of taps of the largest box."""
    first_y, offset_y, slope_y = _taps_of(y, height, SIZE)
    first_x, offset_x, slope_x = _taps_of(x, width, SIZE)
    r, g, b = offset_y * 0.0, offset_y * 0.0, offset_y * 0.0
    total_y, total_x = offset_y * 0.0, offset_y * 0.0
    for j in range(TAPS_Y):
        weight_y = tl.where(
            first_y + j < height, tl.maximum(1.0 - tl.abs(offset_y + j) * slope_y, 0.0), 0.0
        )
        line = corner + tl.minimum(first_y + j, height - 1) * (W * 3)
        total_y += weight_y
        total_x = offset_y * 0.0
        for i in range(TAPS_X):
            weight_x = tl.where(
                first_x + i < width, tl.maximum(1.0 - tl.abs(offset_x + i) * slope_x, 0.0), 0.0
            )
            tap_r, tap_g, tap_b = _weighed(
                line + tl.minimum(first_x + i, width - 1) * 3, weight_y * weight_x
            )
            r, g, b = r + tap_r, g + tap_g, b + tap_b
            total_x += weight_x
    scale = 1.0 / (255.0 * total_y * total_x)
    return r * scale, g * scale, b * scale


@triton.jit
def _taps_of(index, length, SIZE: tl.constexpr):
    """Return pixel ``index``'s first tap, its distance from the centre, the triangle's slope."""
    centre = (2 * index + 1) * length
    whole = centre // (2 * SIZE)
    fraction = (centre - whole * (2 * SIZE)).to(tl.float32) * (1.0 / (2 * SIZE))
    support = tl.maximum(length.to(tl.float32) * (1.0 / SIZE), 1.0)
    first = tl.maximum(tl.floor(fraction - support + 0.5), -whole.to(tl.float32))
    return whole + first.to(tl.int32), first + 0.5 - fraction, 1.0 / support


@triton.jit
def _decode(order):
    """Return the operations of an index into JITTER_ORDERS and the position of contrast among them.

    An operation has two bits: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """
    # Permutations in lexicographic order: the index's digits in factorial base choose among the
    # operations that are left.
    a = order // 6
    b = (order % 6) // 2
    b += (b >= a).to(tl.int32)
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    c = tl.where(low > 0, 0, tl.where(high > 1, 1, 2))
    d = 6 - a - b - c
    c, d = tl.where(order % 2 == 0, c, d), tl.where(order % 2 == 0, d, c)
    contrast_at = tl.where(a == 1, 0, tl.where(b == 1, 1, tl.where(c == 1, 2, 3)))
    return a | (b << 2) | (c << 4) | (d << 6), contrast_at


@triton.jit
def _jitter_tile(r, g, b, order, first, stop, parameters):
    """Apply the operations at positions [first, stop) of an order, except contrast."""
    brightness, saturation = tl.load(parameters + _BRIGHTNESS), tl.load(parameters + _SATURATION)
    hue = tl.load(parameters + _HUE)
    # Constant bounds: the interpreter of triton 3.6 does not accept tensors there.
    for index in range(4):
        operation = (order >> (2 * index)) & 3
        operation = tl.where(index < first, 1, tl.where(index < stop, operation, 1))
        if (operation == 0) & (brightness != 1.0):
            r, g, b = _unit(r * brightness), _unit(g * brightness), _unit(b * brightness)
        if (operation == 2) & (saturation != 1.0):
            gray = _luma_tile(r, g, b) * (1.0 - saturation)
            r, g, b = (
                _unit(r * saturation + gray),
                _unit(g * saturation + gray),
                _unit(b * saturation + gray),
            )
        if (operation == 3) & (hue != 0.0):
            r, g, b = _turn(r, g, b, 6.0 * hue)
    return r, g, b


@triton.jit
def _turn(r, g, b, shift):
    """Turn the hue by ``shift`` sixths of a turn, by the formula of ``reference._adjust_hue``."""
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
    scratch, out, row, pixel, r, g, b, parameters, colours, SIZE: tl.constexpr,
    IN_BLOCKS: tl.constexpr
):  # fmt: skip
    """Apply grayscale, then stage the tile for the blur or finish it."""
    if tl.load(parameters + _GRAYSCALE) > 0.0:
        gray = _luma_tile(r, g, b)
        r, g, b = gray, gray, gray
    if tl.load(parameters + _BLUR_SIGMA) > 0.0:
        _stage(scratch, row, pixel, pixel < SIZE * SIZE, r, g, b, SIZE)
    else:
        mask = pixel < SIZE * SIZE
        _finish(out, row, pixel, mask, r, g, b, parameters, colours, SIZE, IN_BLOCKS)


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
    """Return a tile of staged planes as stored, to be multiplied by ``_level``."""
    plane = scratch + row.to(tl.int64) * (3 * SIZE * SIZE)
    r = tl.load(plane + pixel, mask=mask, other=0).to(tl.float32)
    g = tl.load(plane + SIZE * SIZE + pixel, mask=mask, other=0).to(tl.float32)
    b = tl.load(plane + 2 * SIZE * SIZE + pixel, mask=mask, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _level(scratch):
    return 1.0 / _LEVELS if scratch.dtype.element_ty == tl.uint16 else 1.0


# Pillow's three boxes each way are one linear filter each way. Away from the edges, which each box
# repeats, all pixels have the same weights. So the filter of a line of SIZE pixels is that of a
# line of 2 reach + 1, reach being what three boxes read on either side, with its middle repeated:
# 7 x 7 or 13 x 13 weights for sigmas up to 2. For a blurred view of 96 px in bf16 two passes move
# 4 x 55 KB, six moved 12 x 55 KB; a pass has 7 or 13 taps, three had 9 or 15. Bands then need of
# their neighbours what is staged already, 2 reach rows, and no launch between the two passes.
@triton.jit
def _write_boxes(boxes, sigma, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write the reach, then the weights (span, span): row y has those of pixel y's taps."""
    tl.static_assert(_BOXES == 3)
    radius = _radius(sigma)
    # How far one box reads on either side. Beyond SIZE there is only the repeated edge.
    one = tl.minimum(tl.floor(radius) + 1.0, SIZE).to(tl.int32)
    # Written for ``_blur_kernel``, which may round a radius differently.
    tl.store(boxes, (one * _BOXES).to(tl.float32))
    span = tl.minimum(one * (2 * _BOXES) + 1, SIZE)
    scale = 1.0 / (2.0 * radius + 1.0)
    start = span * 0
    while start < span * span:
        entry = start + tl.arange(0, BLOCK)
        y, tap = entry // span, entry % span
        edges = (tap == 0).to(tl.float32) + (tap == span - 1).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        first = -one
        while first <= one:
            inner = tl.zeros([BLOCK], tl.float32)
            y1 = tl.minimum(tl.maximum(y + first, 0), span - 1)
            second = -one
            while second <= one:
                y2 = tl.minimum(tl.maximum(y1 + second, 0), span - 1)
                inner += _box(radius, second, tl.abs(second) == one) * _box(radius, tap - y2, edges)
                second += 1
            total += _box(radius, first, tl.abs(first) == one) * inner
            first += 1
        weight = total * (scale * scale * scale)
        tl.store(boxes + 1 + entry, weight, mask=entry < span * span)
        start += BLOCK


@triton.jit
def _box(radius, offset, ends):
    """Return an extended box's weight at ``offset``, 1 inside and a fraction at its ends.

    Where ``ends`` is 1 the weights beyond ``offset`` are added, where it is 2 on both sides.
    """
    distance = tl.abs(offset.to(tl.float32))
    weight, beyond = _unit(radius + 1.0 - distance), tl.maximum(radius - distance, 0.0)
    return weight + ends.to(tl.float32) * beyond


@triton.jit
def _blur_tile(
    source, weights, row, pixel, mask, sigma, DOWN: tl.constexpr, SIZE: tl.constexpr,
    KERNEL: tl.constexpr
):  # fmt: skip
    """Return a tile blurred on one axis by the reference's ``_gaussian_taps`` or ``weights``."""
    y, x = pixel // SIZE, pixel % SIZE
    line = y if DOWN else x
    r, g, b = (
        tl.zeros(pixel.shape, tl.float32),
        tl.zeros(pixel.shape, tl.float32),
        tl.zeros(pixel.shape, tl.float32),
    )
    scale = _level(source)
    if KERNEL > 0:
        total = sigma * 0.0
        for tap in range(-(KERNEL // 2), KERNEL // 2 + 1):
            weight = tl.exp(-0.5 * (tap / sigma) * (tap / sigma))
            at = _edge(line + tap, SIZE)
            r, g, b = _add_tap(r, g, b, source, row, y, x, at, mask, weight, DOWN, SIZE)
            total += weight
        scale = scale / total
    else:
        reach = tl.load(weights).to(tl.int32)
        span = tl.minimum(2 * reach + 1, SIZE)
        # The pixel of the span that has the same weights.
        alike = tl.maximum(tl.minimum(line, reach), line - (SIZE - span))
        tap = reach * 0
        while tap < span:
            weight = tl.load(weights + 1 + alike * span + tap, mask=mask, other=0.0)
            at = line - alike + tap
            r, g, b = _add_tap(r, g, b, source, row, y, x, at, mask, weight, DOWN, SIZE)
            tap += 1
    return r * scale, g * scale, b * scale


@triton.jit
def _add_tap(
    r, g, b, source, row, y, x, at, mask, weight, DOWN: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    # Along the rows a tap's shift breaks the alignment of wide accesses, so single values are
    # loaded.
    pixel = at * SIZE + x if DOWN else y * SIZE + at
    tap_r, tap_g, tap_b = _staged(source, row, pixel, mask, SIZE)
    return r + weight * tap_r, g + weight * tap_g, b + weight * tap_b


@triton.jit
def _edge(index, SIZE: tl.constexpr):
    """Reflect ``index`` about the outermost pixels, and move what lies beyond a view into it."""
    index = tl.where(index < 0, -index, index)
    index = tl.where(index > SIZE - 1, 2 * (SIZE - 1) - index, index)
    return tl.minimum(tl.maximum(index, 0), SIZE - 1)


@triton.jit
def _radius(sigma):
    """Return the boxes' radius for ``sigma``, as ``reference.box_radius``."""
    variance = sigma * sigma / _BOXES
    whole = tl.floor((tl.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    fraction = (
        (2 * whole + 1)
        * (whole * (whole + 1) - 3.0 * variance)
        / (6.0 * (variance - (whole + 1) * (whole + 1)))
    )
    return whole + fraction


@triton.jit
def _finish(
    out, row, pixel, mask, r, g, b, parameters, colours, SIZE: tl.constexpr,
    IN_BLOCKS: tl.constexpr
):  # fmt: skip
    """Solarize, normalise and write a tile."""
    if tl.load(parameters + _SOLARIZE) > 0.0:
        r, g, b = tl.minimum(r, 1.0 - r), tl.minimum(g, 1.0 - g), tl.minimum(b, 1.0 - b)
    mean_r, mean_g, mean_b, scale_r, scale_g, scale_b = colours
    kind: tl.constexpr = out.dtype.element_ty
    r, g, b = (
        ((r - mean_r) * scale_r).to(kind),
        ((g - mean_g) * scale_g).to(kind),
        ((b - mean_b) * scale_b).to(kind),
    )
    if IN_BLOCKS:
        _put_blocks(out, row, pixel, mask, r, g, b, SIZE)
    else:
        view, at = out + row.to(tl.int64) * (SIZE * SIZE * 3), pixel * 3
        # One value at a time: the 6 bytes of a bf16 pixel are not a power of two.
        tl.store(view + at, r, mask=mask)
        tl.store(view + at + 1, g, mask=mask)
        tl.store(view + at + 2, b, mask=mask)


@triton.jit
def _put_blocks(out, row, pixel, mask, r, g, b, SIZE: tl.constexpr):
    """Write a tile as halves of blocks: two pixels beside each other are 16 bytes of bf16.

    ``pixel`` must be consecutive from an even one, SIZE even, and ``mask`` the same for a pair.
    """
    side: tl.constexpr = SIZE // 2 + _LINES_BEFORE + _LINES_AFTER
    pairs: tl.constexpr = pixel.shape[0] // 2
    left, _ = tl.split(tl.reshape(pixel, (pairs, 2)))
    inside, _ = tl.split(tl.reshape(mask, (pairs, 2)))
    y, x = left // SIZE, left % SIZE
    block = (y // 2 + _LINES_BEFORE) * side + x // 2 + _LINES_BEFORE
    at = block * _CHANNELS + (y % 2) * (_CHANNELS // 2)
    values = tl.reshape(
        tl.join(tl.join(r, b), tl.join(g, tl.zeros_like(r))), (pairs, _CHANNELS // 2)
    )
    view = out + row.to(tl.int64) * (side * side * _CHANNELS)
    channel = tl.arange(0, _CHANNELS // 2)
    tl.store(view + at[:, None] + channel[None, :], values, mask=inside[:, None])


@triton.jit
def _clear_border(out, row, tile, TILES: tl.constexpr, SIZE: tl.constexpr):
    """Zero a tile's share of the blocks around a view: rows from edge to edge, then columns."""
    side: tl.constexpr = SIZE // 2 + _LINES_BEFORE + _LINES_AFTER
    lines: tl.constexpr = _LINES_BEFORE + _LINES_AFTER
    num_blocks: tl.constexpr = lines * (2 * side - lines)
    view = out + row.to(tl.int64) * (side * side * _CHANNELS)
    for start in range(0, num_blocks, TILES * _BORDER_BLOCKS):
        index = start + tile * _BORDER_BLOCKS + tl.arange(0, _BORDER_BLOCKS)
        along = index < lines * side
        rest = index - lines * side
        line = tl.where(along, index // side, rest % lines)
        line = tl.where(line < _LINES_BEFORE, line, line + SIZE // 2)
        other = tl.where(along, index % side, rest // lines + _LINES_BEFORE)
        block = tl.where(along, line * side + other, other * side + line)
        channel = tl.arange(0, _CHANNELS)
        zeros = tl.zeros((_BORDER_BLOCKS, _CHANNELS), out.dtype.element_ty)
        inside = (index < num_blocks)[:, None]
        tl.store(view + (block * _CHANNELS)[:, None] + channel[None, :], zeros, mask=inside)


# The reasons of kernels that move narrow words, which ``fastbyol_bench.launches`` demands.
NARROW = {"_crop_kernel": "gathers bytes: bilinear taps of 3-byte pixels"}


@dataclass(frozen=True)
class Launch:
    """The launches for views of one size: pixels of a tile, rows of a band, taps of the resize."""

    crop_block: int
    block: int
    rows: int
    taps_y: int
    taps_x: int


# 4 pixels per thread in the crop kernel: it loads single bytes with any tile, and small programs
# hide the latency. 8 per thread in the others: 16 bytes of a staged plane.
NUM_WARPS, CROP_BLOCK, BLOCK = 4, 512, 1024
BLOCK_W = 256  # Pillow's weights: 49 or 169 for the presets' sigmas
# Rows of a band, whose edges are read again by its neighbours; at 96 pixels 32 rows are three full
# tiles.
MIN_ROWS, MAX_ROWS = 16, 48


def launch(height: int, width: int, size: int) -> Launch:
    """Choose the launches for ``height`` x ``width`` images, whose size bounds crops and taps."""
    pixels = triton.next_power_of_2(size * size)
    block = min(BLOCK, pixels)
    choices = range(min(MIN_ROWS, size), min(MAX_ROWS, size) + 1)
    rows = min(choices, key=lambda rows: -(-size // rows) * -(-rows * size // block))
    taps_y, taps_x = (math.ceil(2.0 * max(1.0, side / size)) for side in (height, width))
    return Launch(min(CROP_BLOCK, pixels), block, rows, taps_y, taps_x)


@torch.library.custom_op("fastbyol::two_views", mutates_args=())
def apply(
    images: Tensor,
    table: Tensor,
    rows: Tensor | None,
    size: int,
    blur_kernel: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    in_blocks: bool,
) -> Tensor:
    """Return the views (V, B, S, S, C) of contiguous inputs; ``blur_kernel`` 0 is Pillow's blur.

    ``in_blocks`` they are (V, B, T, T, 16), as ``blocks.in_blocks`` makes them of an even size.
    """
    num_rows, (height, width) = table.shape[0] * table.shape[1], images.shape[1:3]
    out = torch.empty(_shape(table, size, in_blocks), dtype=dtype, device=images.device)
    # For bf16 the planes are uint16 levels of 1/65535: the error of 8e-6 is a hundredth of the
    # result's own rounding near 1, and the traffic is halved: 28 MB for 512 views of 96x96, which
    # stay in a 50 MB L2.
    kind = torch.uint16 if dtype == torch.bfloat16 else torch.float32
    scratch, other = (
        torch.empty((num_rows, 3, size * size), dtype=kind, device=images.device) for _ in range(2)
    )
    boxes = None
    if blur_kernel == 0:
        # Room for any sigma; one of at most 2 uses 680 bytes.
        shape = (num_rows, size * size + 1)
        boxes = torch.empty(shape, dtype=torch.float32, device=images.device)
    plan = launch(height, width, size)
    crop_tiles, tiles = (triton.cdiv(size * size, block) for block in (plan.crop_block, plan.block))
    sums = torch.empty((num_rows, crop_tiles), dtype=torch.float32, device=images.device)
    colours = (*mean, *(1.0 / value for value in std))
    options = {
        "SIZE": size, "IN_BLOCKS": in_blocks, "num_warps": NUM_WARPS, "enable_fp_fusion": True
    }  # fmt: skip
    _crop_kernel[(num_rows * crop_tiles,)](
        images, table, rows, scratch, sums, out, len(images), table.shape[1], *colours,
        H=height, W=width, TAPS_Y=plan.taps_y, TAPS_X=plan.taps_x, BLOCK=plan.crop_block, **options,
    )  # fmt: skip
    _contrast_kernel[(num_rows * tiles,)](
        table, scratch, sums, boxes, out, *colours,
        BLOCK=plan.block, SUM_TILES=crop_tiles, BLOCK_T=triton.next_power_of_2(crop_tiles),
        BLOCK_W=BLOCK_W, **options,
    )  # fmt: skip
    _blur_kernel[(num_rows * triton.cdiv(size, plan.rows),)](
        table,
        boxes,
        scratch,
        other,
        out,
        *colours,
        BLOCK=plan.block,
        ROWS=plan.rows,
        KERNEL=blur_kernel,
        **options,
    )
    return out


def _shape(table: Tensor, size: int, in_blocks: bool) -> tuple[int, ...]:
    channels, height, width = blocks_shape(size) if in_blocks else (3, size, size)
    return *table.shape[:2], height, width, channels


apply.register_fake(
    lambda images, table, rows, size, blur_kernel, mean, std, dtype, in_blocks: images.new_empty(
        _shape(table, size, in_blocks), dtype=dtype
    )
)
