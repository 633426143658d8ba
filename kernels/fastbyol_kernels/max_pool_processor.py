"""``max_pool`` on a processor: windows and their gradients sixteen channels at a time.

The forward pass keeps the place of each maximum, a byte, in place of its input and an index of eight bytes. The backward pass
gathers: a pixel looks at the one, two or four windows over it, so that nothing is written twice.

Channels are few beside the nine pixels of a window. A loop over them, which the compiler would first have to prove free of
overlaps, spent more on each window than on its numbers (64 channels of 48x48, bf16: 35 ms where a copy takes 8). So the vector
instructions are given here as they are, for 16 numbers; a last tile of fewer than 16 channels overlaps the one before.

Letters: N samples, C channels, H W pixels before, P Q after. Places in a window are numbered from 0 to 8, row by row.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import numba
import torch
from numba.core.cgutils import ir
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol_kernels.max_pool import TILE
from fastbyol_kernels.processor import argument, blocks, floats, halves, kernel, octets, shared, take

# Input elements that a thread takes at a time, in whole images: 10 us of work.
BLOCK = 262144

_FLOATS, _WORDS, _SHORTS, _BYTES, _BITS = (
    ir.VectorType(kind, TILE) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8), ir.IntType(1))
)


class _Tiles:
    """Writes vector code into a kernel: tiles of activations, bfloat16 as its bits or float32, as vectors of float32."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def same(self, kind: Any, number: float) -> Any:
        """A vector of one constant."""
        return ir.Constant(kind, [number] * TILE)

    def mask(self, flag: Any) -> Any:
        """A mask that lets all through or, if the bit ``flag`` is not set, nothing."""
        return self.builder.select(flag, self.same(_BITS, 1), self.same(_BITS, 0))

    def where(self, array_type: Any, array: Any, index: Any, kind: Any = None) -> Any:
        """Where a vector, of the array's own kind if no other is given, begins at ``index`` of an array."""
        kind = kind or (_FLOATS if array_type.dtype == numba.float32 else _SHORTS)
        data = self.context.make_array(array_type)(self.context, self.builder, array).data
        return self.builder.bitcast(self.builder.gep(data, [index]), kind.as_pointer())

    def load(self, array_type: Any, array: Any, index: Any) -> Any:
        return self.load_at(array_type, self.where(array_type, array, index))

    def load_at(self, array_type: Any, where: Any) -> Any:
        if array_type.dtype == numba.float32:
            return self.builder.load(where, align=4)
        wide = self.builder.zext(self.builder.load(where, align=2), _WORDS)
        return self.builder.bitcast(self.builder.shl(wide, self.same(_WORDS, 16)), _FLOATS)

    def load_bytes(self, array_type: Any, array: Any, index: Any) -> Any:
        return self.builder.load(self.where(array_type, array, index, _BYTES), align=1)

    def store_bytes(self, values: Any, array_type: Any, array: Any, index: Any) -> None:
        self.builder.store(values, self.where(array_type, array, index, _BYTES), align=1)

    def neighbour(self, middle: Any, row: Any, column: Any, place: int) -> Any:
        """The index of a place in the window around ``middle``."""
        steps = [
            self.builder.mul(distance, ir.Constant(ir.IntType(64), step - 1))
            for distance, step in ((row, place // 3), (column, place % 3))
        ]
        return self.builder.add(middle, self.builder.add(*steps))

    def first_maximum(self, pixels: list[Any], place: Any) -> tuple[Any, Any]:
        """The maximum and its place by torch's rule: the first of equal values, the last that is no number.

        ``place`` is that of values none of which is greater than -inf.
        """
        builder, best = self.builder, self.same(_FLOATS, float("-inf"))
        for i, new in enumerate(pixels):
            greater = builder.or_(builder.fcmp_ordered(">", new, best), builder.fcmp_unordered("uno", new, new))
            best = builder.select(greater, new, best)
            place = builder.select(greater, self.same(_BYTES, i), place)
        return best, place

    def store(self, values: Any, array_type: Any, array: Any, index: Any, *, exact: bool = False) -> None:
        """Rounded as ``processor.narrowed`` does, unless ``values`` are known to be ``exact`` bfloat16."""
        builder = self.builder
        if array_type.dtype == numba.float32:
            builder.store(values, self.where(array_type, array, index), align=4)
            return
        bits = builder.bitcast(values, _WORDS)
        if not exact:
            odd = builder.and_(builder.lshr(bits, self.same(_WORDS, 16)), self.same(_WORDS, 1))
            nearest = builder.add(builder.add(bits, self.same(_WORDS, 0x7FFF)), odd)
            is_nan = builder.fcmp_unordered("uno", values, values)
            bits = builder.select(is_nan, self.same(_WORDS, 0x7FC00000), nearest)
        high = builder.trunc(builder.lshr(bits, self.same(_WORDS, 16)), _SHORTS)
        builder.store(high, self.where(array_type, array, index), align=2)


@intrinsic
def _inner_window(typing, x, y, places, middle, at, row, column):
    """The maximum of the window around ``x[middle:]``, at ``y[at:]``, and its place. The window lies inside.

    ``row`` and ``column`` are the distances to the pixels below and to the right.
    """

    def generate(context, builder, signature, arguments):
        x, y, places, middle, at, row, column = arguments
        tiles = _Tiles(context, builder)
        pixels = [tiles.load(signature.args[0], x, tiles.neighbour(middle, row, column, place)) for place in range(9)]
        is_nan = [builder.fcmp_unordered("uno", a, b) for a, b in pairwise(pixels)][::2]
        is_nan.append(builder.fcmp_unordered("uno", pixels[8], pixels[8]))
        any_nan = builder.bitcast(reduce(builder.or_, is_nan), ir.IntType(TILE))
        with builder.if_else(builder.icmp_unsigned("!=", any_nan, any_nan.type(0)), likely=False) as (odd, usual):
            with odd:
                best, place = tiles.first_maximum(pixels, tiles.same(_BYTES, 0))
                tiles.store(best, signature.args[1], y, at, exact=True)
                tiles.store_bytes(place, signature.args[2], places, at)
            with usual:
                best = pixels
                while len(best) > 1:  # of equal values the first, as a zero may have another sign
                    pairs = zip(best[::2], best[1::2], strict=False)
                    greater = [builder.select(builder.fcmp_ordered(">", b, a), b, a) for a, b in pairs]
                    best = greater + best[len(best) // 2 * 2 :]
                place = tiles.same(_BYTES, 8)
                for i in range(7, -1, -1):
                    place = builder.select(builder.fcmp_ordered("==", pixels[i], best[0]), tiles.same(_BYTES, i), place)
                tiles.store(best[0], signature.args[1], y, at, exact=True)
                tiles.store_bytes(place, signature.args[2], places, at)
        return context.get_dummy_value()

    return numba.void(x, y, places, *[numba.int64] * 4), generate


@intrinsic
def _outer_window(typing, x, y, places, middle, at, row, column, lowest, above, below, left, right):
    """As ``_inner_window``; the flags say which neighbours there are, and the others are read from ``lowest``, all -inf."""

    def generate(context, builder, signature, arguments):
        x, y, places, middle, at, row, column, lowest, *flags = arguments
        tiles = _Tiles(context, builder)
        above, below, left, right = (builder.trunc(flag, ir.IntType(1)) for flag in flags)
        always = ir.Constant(ir.IntType(1), 1)
        rows, columns = (above, always, below), (left, always, right)
        pixels = []
        for place in range(9):
            inside = tiles.where(signature.args[0], x, tiles.neighbour(middle, row, column, place))
            outside = tiles.where(signature.args[7], lowest, ir.IntType(64)(0))
            there = builder.and_(rows[place // 3], columns[place % 3])
            pixels.append(tiles.load_at(signature.args[0], builder.select(there, inside, outside)))
        # Of nothing greater than minus infinity torch takes the first there is.
        first_of_row = [builder.select(left, tiles.same(_BYTES, i), tiles.same(_BYTES, i + 1)) for i in (0, 3)]
        best, place = tiles.first_maximum(pixels, builder.select(above, *first_of_row))
        tiles.store(best, signature.args[1], y, at, exact=True)
        tiles.store_bytes(place, signature.args[2], places, at)
        return context.get_dummy_value()

    return numba.void(x, y, places, *[numba.int64] * 4, lowest, *[numba.boolean] * 4), generate


@intrinsic
def _four_pixels(typing, dy, places, dx, at, to, row, row_below, column, window_right, window_below, right, below):
    """Gradients of pixels (2k, 2j), (2k, 2j+1), (2k+1, 2j) and (2k+1, 2j+1), the first at ``dx[to:]``, from windows (k, j),
    (k, j+1), (k+1, j) and (k+1, j+1), the first at ``dy[at:]``.

    ``row`` and ``row_below`` are the distances to the window and pixel below, ``column`` to the right; the flags say which
    windows and pixels there are. Windows are added in torch's order.
    """
    # Of each pixel, the windows over it and its place in them.
    over = (((0, 4),), ((0, 5), (1, 3)), ((0, 7), (2, 1)), ((0, 8), (1, 6), (2, 2), (3, 0)))

    def generate(context, builder, signature, arguments):
        dy, places, dx, at, to, row, row_below, column, *flags = arguments
        tiles = _Tiles(context, builder)
        window_right, window_below, right, below = (builder.trunc(flag, ir.IntType(1)) for flag in flags)
        always, zero = ir.Constant(ir.IntType(1), 1), ir.Constant(ir.IntType(64), 0)
        windows = []
        for flag, offset in (
            (always, zero),
            (window_right, column),
            (window_below, row),
            (builder.and_(window_right, window_below), builder.add(row, column)),
        ):
            index = builder.add(at, builder.select(flag, offset, zero))
            gradient = tiles.load(signature.args[0], dy, index)
            windows.append((gradient, tiles.load_bytes(signature.args[1], places, index), tiles.mask(flag)))
        for pixel, (flag, offset) in enumerate(
            (
                (always, zero),
                (right, column),
                (below, row_below),
                (builder.and_(right, below), builder.add(row_below, column)),
            )
        ):
            total = None
            for window, here in over[pixel]:
                gradient, place, there = windows[window]
                chosen = builder.and_(builder.icmp_unsigned("==", place, tiles.same(_BYTES, here)), there)
                part = builder.select(chosen, gradient, tiles.same(_FLOATS, 0.0))
                total = part if total is None else builder.fadd(total, part)
            with builder.if_then(flag):
                tiles.store(total, signature.args[2], dx, builder.add(to, offset))
        return context.get_dummy_value()

    return numba.void(dy, places, dx, *[numba.int64] * 5, *[numba.boolean] * 4), generate


@numba.njit(inline="always")
def _geometry(table):
    """N, images of a block, H, W, C."""
    return argument(table, 0), argument(table, 1), argument(table, 2), argument(table, 3), argument(table, 4)


@shared
def _forward(table, x, y, places, lowest):
    """y (N, P, Q, C) and the places of the maxima, from x (N, H, W, C)."""
    n, images, h, w, c = _geometry(table)
    p, q = (h + 1) // 2, (w + 1) // 2
    block = take(table)
    while block < blocks(table):
        for image in range(block * images, min(n, block * images + images)):
            for row in range(p):
                above, below = row > 0, 2 * row + 1 < h
                for column in range(q):
                    left, right = column > 0, 2 * column + 1 < w
                    at, middle = ((image * p + row) * q + column) * c, ((image * h + 2 * row) * w + 2 * column) * c
                    for i in range(0, c, TILE):
                        i = min(i, c - TILE)
                        if above and below and left and right:
                            _inner_window(x, y, places, middle + i, at + i, w * c, c)
                        else:
                            _outer_window(x, y, places, middle + i, at + i, w * c, c, lowest, above, below, left, right)
        block = take(table)


@kernel
def _forward_bf16(table):
    """``_forward``"""
    _forward(table, halves(table, 5), halves(table, 6), octets(table, 7), halves(table, 8))


@kernel
def _forward_fp32(table):
    """``_forward``"""
    _forward(table, floats(table, 5), floats(table, 6), octets(table, 7), floats(table, 8))


@shared
def _backward(table, dy, dx, places):
    """dx (N, H, W, C) from dy (N, P, Q, C) and the places."""
    n, images, h, w, c = _geometry(table)
    p, q = (h + 1) // 2, (w + 1) // 2
    block = take(table)
    while block < blocks(table):
        for image in range(block * images, min(n, block * images + images)):
            for row in range(p):
                window_below, below = row + 1 < p, 2 * row + 1 < h
                for column in range(q):
                    window_right, right = column + 1 < q, 2 * column + 1 < w
                    at, to = ((image * p + row) * q + column) * c, ((image * h + 2 * row) * w + 2 * column) * c
                    for i in range(0, c, TILE):
                        i = min(i, c - TILE)
                        _four_pixels(
                            dy, places, dx, at + i, to + i, q * c, w * c, c, window_right, window_below, right, below
                        )  # fmt: skip
        block = take(table)


@kernel
def _backward_bf16(table):
    """``_backward``"""
    _backward(table, halves(table, 5), halves(table, 6), octets(table, 7))


@kernel
def _backward_fp32(table):
    """``_backward``"""
    _backward(table, floats(table, 5), floats(table, 6), octets(table, 7))


class PlacedMaxPool(torch.autograd.Function):
    """For channels-last x on a CPU, bf16 or fp32, of ``TILE`` channels or more. Saves the places, (N, P, Q, C) uint8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        size = (n, c, (h + 1) // 2, (w + 1) // 2)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        places = x.new_empty(y.numel(), dtype=torch.uint8)
        images = max(1, BLOCK // (c * h * w))
        run = _forward_fp32 if x.dtype == torch.float32 else _forward_bf16
        run(-(-n // images), n, images, h, w, c, x, y, places, x.new_full((TILE,), -torch.inf))
        ctx.shape = x.shape
        ctx.save_for_backward(places)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        dy, (places,) = grads[0].contiguous(memory_format=torch.channels_last), ctx.saved_tensors
        n, c, h, w = ctx.shape
        dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        images = max(1, BLOCK // (c * h * w))
        run = _backward_fp32 if dy.dtype == torch.float32 else _backward_bf16
        run(-(-n // images), n, images, h, w, c, dy, dx, places)
        return dx
