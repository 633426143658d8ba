"""Ten patterns that fill the plane, as formulas of lattice coordinates.

A ``Pattern`` maps u, v (B, S, S), a pixel's side in their unit (B, 1, 1) and a salt (B, 1, 1) for
its random parts to coverage in [0, 1] (B, S, S), half the plane in all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]
Pattern = Callable[[Floats, Floats, Floats, Words], Floats]

# float32 and IEEE's exactly rounded operations only, so that every machine draws the same.
_F = np.float32
_HALF = _F(0.5)


def _stripes(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    return _edge(_wave(u * _F(1.4)) - _HALF, pixel * _F(2.8))


def _chevrons(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    return _edge(_wave(v * _F(1.4) + _wave(u) * _F(0.9)) - _HALF, pixel * _F(3.2))


def _checks(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    a, b = _wave(u) - _HALF, _wave(v) - _HALF
    return _edge(np.copysign(np.minimum(np.abs(a), np.abs(b)), a * b), pixel * 2)


def _bricks(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    v = v * _F(1.4)
    u = u * _F(0.7) + _HALF * _odd(np.floor(v))
    seam = np.minimum(
        _HALF - np.abs(_fraction(v) - _HALF), 2 * (_HALF - np.abs(_fraction(u) - _HALF))
    )
    return _edge(seam - _F(0.19), pixel * _F(1.4))


def _scales(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    """Draw overlapping discs in rows shifted by half, shaded from each disc's rim."""
    v = v * _F(1.6)
    row = np.floor(v)
    y, x = v - row, _fraction(u + _HALF * _odd(row)) - _HALF
    front = np.sqrt(x * x + _F(0.45) * y * y)
    back = np.sqrt((_HALF - np.abs(x)) ** 2 + _F(0.45) * (y + 1) ** 2)
    inside = front < _HALF
    shade: Floats = np.clip(
        _F(1.13) - _F(2.6) * np.abs(np.where(inside, front - _F(0.3), back - _F(0.62))), 0, 1
    )
    return shade


def _dots(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    x, y, scale, _ = _scatter(u, v, salt, 0.12, 0.2)
    return _edge(_F(0.44) * scale - np.sqrt(x * x + y * y), pixel)


def _rings(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    x, y, scale, _ = _scatter(u, v, salt, 0.1, 0.2)
    return _edge(_F(0.13) - np.abs(np.sqrt(x * x + y * y) - _F(0.34) * scale), pixel)


def _crosses(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    x, y, scale, turn = _scatter(u, v, salt, 0.1, 0.2)
    slope = _F(0.6) * (turn - _HALF)
    x, y = np.abs(x - slope * y), np.abs(y + slope * x)
    return _edge(
        np.minimum(_F(0.195) - np.minimum(x, y), _F(0.48) * scale - np.maximum(x, y)), pixel
    )


def _triangles(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    v = v * _F(2 / 3**0.5)
    a, b = _fraction(u - _HALF * v), _fraction(v)
    up = np.minimum(np.minimum(a, b), 1 - a - b)
    down = np.minimum(np.minimum(1 - a, 1 - b), a + b - 1)
    return _edge(np.where(a + b < 1, up, -down), pixel)


def _cells(u: Floats, v: Floats, pixel: Floats, salt: Words) -> Floats:
    """Draw Worley's cellular texture (SIGGRAPH 1996): second nearest less nearest distance."""
    u, v = u * _F(1.1), v * _F(1.1)
    column, row = np.floor(u), np.floor(v)
    nearest, second = np.full_like(u, 9), np.full_like(u, 9)
    for i, j in product((-1, 0, 1), repeat=2):
        words = lattice_hash(column + i, row + j, salt)
        x, y = column + i - u + _F(0.9) * _byte(words, 0), row + j - v + _F(0.9) * _byte(words, 8)
        distance = x * x + y * y
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    return _edge(np.sqrt(second) - np.sqrt(nearest) - _F(0.24), pixel)


PATTERNS: dict[str, Pattern] = {
    draw.__name__.lstrip("_"): draw
    for draw in (
        _stripes,
        _chevrons,
        _checks,
        _bricks,
        _scales,
        _dots,
        _rings,
        _crosses,
        _triangles,
        _cells,
    )
}


def _scatter(
    u: Floats, v: Floats, salt: Words, jitter: float, shrink: float
) -> tuple[Floats, Floats, Floats, Floats]:
    """Return each cell's object: position about its centre, scale [1 - shrink, 1], a draw."""
    column, row = np.floor(u), np.floor(v)
    words = lattice_hash(column, row, salt)
    x = u - column - _HALF - _F(jitter) * (_byte(words, 0) - _HALF)
    y = v - row - _HALF - _F(jitter) * (_byte(words, 8) - _HALF)
    return x, y, _F(1 - shrink) + _F(shrink) * _byte(words, 16), _byte(words, 24)


def _edge(distance: Floats, pixel: Floats) -> Floats:
    """Return coverage by signed distance to an outline, smoothed over one and a half pixels."""
    return smoothstep(np.clip(distance / (pixel * _F(1.5)) + _HALF, 0, 1))


def smoothstep(x: Floats) -> Floats:
    """Map x in [0, 1] to 3x^2 - 2x^3, flat at both ends."""
    return x * x * (3 - 2 * x)


def _fraction(x: Floats) -> Floats:
    return x - np.floor(x)


def _wave(x: Floats) -> Floats:
    """Return a triangle wave of period 1 in [0, 1]."""
    wave: Floats = np.abs(_fraction(x) - _HALF) * 2
    return wave


def _odd(x: Floats) -> Floats:
    """Return 1 where a whole number is odd, else 0."""
    odd: Floats = x - 2 * np.floor(x * _HALF)
    return odd


def _byte(words: Words, shift: int) -> Floats:
    share: Floats = ((words >> np.uint32(shift)) & np.uint32(255)).astype(_F) * _F(1 / 255)
    return share


def lattice_hash(x: Floats, y: Floats, salt: Words) -> Words:
    """Hash whole numbers x, y by a multiply-xorshift finalizer, many times cheaper than Philox."""
    a, b = (z.astype(np.int32).view(np.uint32) for z in (x, y))
    word = (a * np.uint32(0x9E3779B1)) ^ (b * np.uint32(0x85EBCA77)) ^ salt
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        word = (word ^ (word >> np.uint32(shift))) * np.uint32(factor)
    return word ^ (word >> np.uint32(15))
