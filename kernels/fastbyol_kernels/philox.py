"""Philox 4x32-10, the counter-based generator behind every random draw.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The counter of a draw, four 32-bit words; ``split_id`` returns the two that depend on the sample
# id:
#   views  c0, c1 = id low word, epoch, c2 = view*256 + block, c3 = DOMAIN_VIEWS | id high word << 8
#   order  c0, c1 = id low word, epoch, c2 = 0,                c3 = DOMAIN_ORDER | id high word << 8
DOMAIN_VIEWS = 1
DOMAIN_ORDER = 2

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int, key: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply ten rounds of Philox 4x32 to the counters (c0, c1, c2, c3) under ``key``.

    Counters are int64 tensors (or Python integers) that broadcast together; only their low 32 bits
    are used. ``key`` is an integer or a 0-d int64 tensor; its low 64 bits are used. Returns four
    int64 tensors of the broadcast shape whose elements are words in [0, 2**32).

    The words are a pure function of counter and key: the same on any device, for any batch, order
    or number of workers, and a resumed run needs no generator state.
    """
    # No expansion is needed: within three rounds every word depends on all four counters and has
    # their broadcast shape. No intermediate value exceeds 63 bits, so int64 never overflows.
    x0, x1, x2, x3 = (
        torch.as_tensor(c, dtype=torch.int64, device=c0.device) & _MASK for c in (c0, c1, c2, c3)
    )
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def uniform(words: Tensor) -> Tensor:
    """Turn int64 words in [0, 2**32) into float32 in [0, 1), exactly, by their top 24 bits."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def split_id(ids: Tensor, domain: int) -> tuple[Tensor, Tensor]:
    """Return the counter words (c0, c3) of int64 sample ids in [0, 2**56) in a domain."""
    return ids & _MASK, ((ids >> 32) << 8) | domain


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Return the high and low words of the 64-bit products ``x * constant``."""
    # The constant is split in two 16-bit parts so that int64 does not overflow.
    upper, lower = x * (constant >> 16), x * (constant & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & _MASK
    return high, low
