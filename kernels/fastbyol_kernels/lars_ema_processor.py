"""``lars_ema`` on a processor: the norms in one pass over weights and gradient, everything else in a second one.

Bytes bound both: a copy of as many as ResNet-18's step must move takes as long as the step (bench/LOG.md). So no pass reads
what it can do without, and the second begins where the first ended, with what the caches still hold.

Letters: S segments, K chunks, as in ``lars_ema``; a block is a few neighbouring chunks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastbyol_kernels.processor import argument, blocks, floats, integers, kernel, take

# Chunks that a thread takes at a time: 2 us of work for 100 ns of counting.
CHUNKS = 8


@kernel
def _norms(table):
    """Sums of the squares of w, g and u = g + d w: a row (3,) per chunk; of g alone where the others are not asked for."""
    decay, scale, sums = floats(table, 2), floats(table, 3), floats(table, 4)
    chunks, num_chunks, all_three = integers(table, 5), argument(table, 6), argument(table, 7)
    inverse = np.float32(1) / scale[0]
    block = take(table)
    while block < blocks(table):
        for chunk in range(block * CHUNKS, min(block * CHUNKS + CHUNKS, num_chunks)):
            start, stop, d = chunks[3 * chunk + 1], chunks[3 * chunk + 2], decay[chunks[3 * chunk]]
            w, g = floats(table, 0)[start:stop], floats(table, 1)[start:stop]
            of_w = of_g = of_u = np.float32(0)
            if all_three:
                for i in range(len(w)):
                    one_g = g[i] * inverse
                    one_u = one_g + d * w[i]
                    of_w += w[i] * w[i]
                    of_g += one_g * one_g
                    of_u += one_u * one_u
            else:
                for i in range(len(g)):
                    one_g = g[i] * inverse
                    of_g += one_g * one_g
            sums[3 * chunk], sums[3 * chunk + 1], sums[3 * chunk + 2] = of_w, of_g, of_u
        block = take(table)


@kernel
def _sweep(table):
    """m <- mu m + a (g + d w), w <- w - b m, the target towards w; sums of the squares of m and the old w, (2,) per chunk."""
    factors, numbers, sums = floats(table, 4), floats(table, 5), floats(table, 6)
    chunks, num_chunks, num_target, ema_first = integers(table, 7), argument(table, 8), argument(table, 9), argument(table, 10)
    # 1 - tau is passed: the compiler, free to reorder sums, would make one of tau t + (1 - tau) w that is not exact at 1.
    mu, tau, rest, inverse = numbers[0], numbers[1], numbers[2], np.float32(1) / numbers[3]
    block = blocks(table) - 1 - take(table)
    while block >= 0:
        for chunk in range(block * CHUNKS, min(block * CHUNKS + CHUNKS, num_chunks)):
            segment, start, stop = chunks[3 * chunk], chunks[3 * chunk + 1], chunks[3 * chunk + 2]
            a, b, d = factors[3 * segment], factors[3 * segment + 1], factors[3 * segment + 2]
            w, g, m = floats(table, 0)[start:stop], floats(table, 1)[start:stop], floats(table, 2)[start:stop]
            of_m = of_w = np.float32(0)
            if start >= num_target:
                for i in range(len(w)):
                    old = w[i]
                    moved = mu * m[i] + a * (g[i] * inverse + d * old)
                    m[i] = moved
                    w[i] = old - b * moved
                    of_m += moved * moved
                    of_w += old * old
            else:
                target = floats(table, 3)[start:stop]
                for i in range(len(w)):
                    old = w[i]
                    moved = mu * m[i] + a * (g[i] * inverse + d * old)
                    new = old - b * moved
                    m[i] = moved
                    w[i] = new
                    target[i] = tau * target[i] + rest * (old if ema_first else new)
                    of_m += moved * moved
                    of_w += old * old
            sums[2 * chunk], sums[2 * chunk + 1] = of_m, of_w
        block = blocks(table) - 1 - take(table)


def norms(
    online: Tensor,
    gradient: Tensor,
    decay: Tensor,
    loss_scale: Tensor,
    chunks: Tensor,
    spans: Tensor,
    *,
    all_three: bool = True,
) -> Tensor:
    """|w|, |g| and |g + d w| of each segment: (3, S), fp32; without ``all_three`` only |g|, and 0 for the others.

    ``chunks`` (K, 3) and ``spans`` (S, 2) are those of ``SegmentTable``.
    """
    sums = online.new_empty(len(chunks), 3)
    _norms(_blocks(chunks), online, gradient, decay, loss_scale, sums, chunks.long(), len(chunks), int(all_three))
    return _roots(sums, spans)


def sweep(
    online: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    target: Tensor,
    factors: Tensor,
    numbers: Tensor,
    chunks: Tensor,
    spans: Tensor,
    *,
    ema_first: bool,
) -> Tensor:
    """Move ``momentum``, ``online`` and ``target``; |m| and |w| as it was, of each segment: (2, S) fp32.

    ``factors`` (S, 3) are a, b and d, ``numbers`` (4,) mu, tau, 1 - tau and the loss scale, fp32, by ``lars_ema``'s letters.
    """
    sums = online.new_empty(len(chunks), 2)
    _sweep(
        _blocks(chunks), online, gradient, momentum, target, factors.contiguous(), numbers, sums,
        chunks.long(), len(chunks), len(target), int(ema_first),
    )  # fmt: skip
    return _roots(sums, spans)


def _blocks(chunks: Tensor) -> int:
    return -(-len(chunks) // CHUNKS)


def _roots(sums: Tensor, spans: Tensor) -> Tensor:
    """Sums (K, n) of chunks -> roots (n, S) of the segments' sums, which fp64 adds up."""
    whole = torch.segment_reduce(sums.double(), "sum", lengths=(spans[:, 1] - spans[:, 0]).long(), axis=0)
    return whole.sqrt().to(sums.dtype).t()
