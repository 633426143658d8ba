"""The embedded data set: ten classes of warped patterns, made from a formula, in any number.

The class is the form of a pattern that fills the picture, so that every crop keeps it. Shapes: B
images of one class, S pixels a side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.texture_patterns import PATTERNS, Floats, Pattern, smoothstep

Counters = NDArray[np.uint64]
CLASSES = tuple(PATTERNS)

# Image i depends on (seed, i, size) alone. Its draws are Philox 4x32-10 words (Salmon et al. 2011):
#   images  c0 = i low word, c1 = block, c2 = 0, c3 = DOMAIN_IMAGES | i high word << 8
#   labels  c0 = i // 10 low word, c1 = block, c2 = 0, c3 = DOMAIN_LABELS | high word << 8
DOMAIN_IMAGES = 3
DOMAIN_LABELS = 4

INK = (-0.02, 0.0, 0.05)  # cool and warm, the same for every image, so that colour is no cue
PAPER = (0.04, 0.01, -0.06)

# NumPy alone, in float32, with cosines and powers rounded from float64: every machine makes the
# same bytes.
_MASK = np.uint64(0xFFFFFFFF)
_F = np.float32
_HALF = _F(0.5)
_WARP_CELLS = 3
_NUM_SCALARS = 16
_BLOCK_PIXELS = 1 << 16  # a float32 plane of 256 KiB: several stay in a core's cache

# What an image draws besides its class: rotation, period, warp, contrast, brightness, light, tints.
# Two views of a picture share all of these, and BYOL first learns whatever views share: with free
# colours only the palette, with wide contrasts and light mostly those. So nuisances are limited to
# what crops, flips and jitter can hide, and every pattern covers half of the picture. Widening two
# of them cost more than random weights: one seed, 24 epochs of the demo's configuration, blog
# protocol, before coverage was evened out and with tint .02, brightness .05: contrast .7 to .9 with
# light .1 went from 33.8 to 80.4 %, contrast .55 to .9 with light .2 from 31.5 to 68.4 %. PERIODS
# are periods a picture, WARP is in periods, light in shares of white.
PERIODS = (2.8, 4.2)
WARP = 0.5
CONTRAST = (0.6, 0.9)
BRIGHTNESS = 0.08
LIGHT = 0.15
TINT = 0.03


def make(
    count: int, size: int, seed: int, *, start: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images ``start`` to ``start + count`` of the set ``seed``, and their labels.

    The images are uint8 (count, size, size, 3) RGB, the labels int64 (count,). Every ten images,
    counted from a multiple of ten, hold each class once, in random order.
    """
    ids = np.arange(start, start + count, dtype=np.uint64)
    classes = labels(ids, seed)
    images = np.empty((count, size, size, 3), np.uint8)
    step = max(1, _BLOCK_PIXELS // size**2)
    for label, pattern in enumerate(PATTERNS.values()):
        members = np.flatnonzero(classes == label)
        for first in range(0, len(members), step):
            block = members[first : first + step]
            images[block] = _render(ids[block], size, seed, pattern)
    return images, classes


def labels(ids: Counters, seed: int) -> NDArray[np.int64]:
    """Return the classes of the images ``ids``, (N,)."""
    tens, offset = np.divmod(ids, np.uint64(10))
    groups, where = np.unique(tens, return_inverse=True)
    order = np.argsort(_uniform(seed, groups, 10, DOMAIN_LABELS), axis=1, kind="stable")
    return order[where, offset.astype(np.int64)].astype(np.int64)


def _render(ids: Counters, size: int, seed: int, pattern: Pattern) -> NDArray[np.uint8]:
    """Return images (B,) of one class, uint8 (B, S, S, 3)."""
    side = _WARP_CELLS + 1
    draws = _uniform(seed, ids, _NUM_SCALARS + 3 * side * side, DOMAIN_IMAGES)
    scalar = draws[:, :_NUM_SCALARS, None, None]
    lattices = draws[:, _NUM_SCALARS:].reshape(len(ids), 3, side, side) - _HALF
    warp_u, warp_v, light = (_smooth(lattices[:, k], size) for k in range(3))
    salt = (scalar[:, 4] * _F(1 << 24)).astype(np.uint32)
    u, v, pixel = _coordinates(scalar, size)
    form = pattern(u + _F(WARP) * warp_u, v + _F(WARP) * warp_v, pixel, salt)
    low, high = CONTRAST
    contrast = _F(low) + _F(high - low) * scalar[:, 6]
    tone = _HALF + _F(BRIGHTNESS) * (scalar[:, 7] - _HALF) + contrast * (form - _HALF)
    return _colour(tone * (1 + _F(LIGHT) * light), form, scalar[:, 8:14, 0, 0].reshape(-1, 2, 3))


def _coordinates(scalar: Floats, size: int) -> tuple[Floats, Floats, Floats]:
    """Return turned, shifted coordinates u, v (B, S, S), a pixel's side (B, 1, 1), in periods."""
    shortest, longest = PERIODS
    periods = (shortest * (longest / shortest) ** scalar[:, 1].astype(np.float64)).astype(_F)
    angle = 2 * np.pi * scalar[:, 0].astype(np.float64)
    cosine, sine = np.cos(angle).astype(_F), np.sin(angle).astype(_F)
    x = ((np.arange(size, dtype=_F) + _HALF) / _F(size) - _HALF)[None, None, :]
    y = x.transpose(0, 2, 1)
    u = periods * (cosine * x - sine * y) + 64 * scalar[:, 2]
    v = periods * (sine * x + cosine * y) + 64 * scalar[:, 3]
    return u, v, periods / _F(size)


def _colour(tone: Floats, form: Floats, draws: Floats) -> NDArray[np.uint8]:
    """Return uint8 (B, S, S, 3) of tone and form (B, S, S): ink where form is 0, paper where 1.

    The draws (B, 2, 3) in [0, 1) vary the tints.
    """
    tints = np.array((INK, PAPER), _F) + _F(2 * TINT) * (draws - _HALF)
    images = np.empty((*tone.shape, 3), np.uint8)
    for channel in range(3):
        ink, paper = tints[:, 0, channel, None, None], tints[:, 1, channel, None, None]
        plane = tone + ink + (paper - ink) * form
        images[..., channel] = np.clip(plane * 255 + _HALF, 0, 255)
    return images


def _smooth(lattice: Floats, size: int) -> Floats:
    """Interpolate a lattice (B, n + 1, n + 1) to (B, S, S) by smoothstep."""
    cells = lattice.shape[1] - 1
    position = (np.arange(size, dtype=_F) + _HALF) * _F(cells / size)
    whole = np.floor(position)
    index, share = whole.astype(np.int64), smoothstep(position - whole)
    rows: Floats = lattice[:, index] * (1 - share)[:, None] + lattice[:, index + 1] * share[:, None]
    smooth: Floats = rows[:, :, index] * (1 - share) + rows[:, :, index + 1] * share
    return smooth


def _uniform(seed: int, ids: Counters, num: int, domain: int) -> Floats:
    """Draw float32 (B, num) in [0, 1): word k of image i is word k % 4 of its Philox block k // 4.

    This is fastbyol_kernels.philox in NumPy, since workers are forked and torch's thread pool does
    not survive that. Words of 32 bits are held in uint64, so that products cannot overflow.
    """
    high = np.uint64(domain) | (ids[:, None] >> np.uint64(32)) << np.uint64(8)
    blocks = np.arange(-(-num // 4), dtype=np.uint64)[None]
    c0, c1, c2, c3 = np.broadcast_arrays(ids[:, None] & _MASK, blocks, np.uint64(0), high)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = b >> np.uint64(32) ^ c1 ^ np.uint64(k0), b & _MASK
        c2, c3 = a >> np.uint64(32) ^ c3 ^ np.uint64(k1), a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack((c0, c1, c2, c3), axis=-1).reshape(len(ids), 4 * blocks.size)[:, :num]
    return (words >> np.uint64(8)).astype(_F) * _F(2.0**-24)
