"""``lars_ema`` on a CPU: one pass over weights and gradient for the norms, one for everything else.

Letters: S segments, K chunks, as in ``reference``; a block is CHUNKS neighbouring chunks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastbyol_kernels.lars_ema.reference import Rule, SegmentTable, factors, trust_ratio
from fastbyol_kernels.native import F32, I32, fma, kernel

# Chunks of a block: 2 us of work for the 100 ns that it takes to get the next one. Memory bounds
# both passes: copying as many bytes as ResNet-18's step moves takes as long as the step
# (bench/LOG.md).
CHUNKS = 8


@kernel
def _norms(
    block: int,
    online: F32,
    gradient: F32,
    decay: F32,
    sums: F32,
    chunks: I32,
    num_chunks: int,
    all_three: int,
) -> None:
    """Write the sums of squares of w, g and u = g + d w, a row (3,) per chunk.

    Unless ``all_three``, only g is read, and the other sums are 0.
    """
    for chunk in range(block * CHUNKS, min(block * CHUNKS + CHUNKS, num_chunks)):
        start, stop, d = chunks[3 * chunk + 1], chunks[3 * chunk + 2], decay[chunks[3 * chunk]]
        w, g = online[start:stop], gradient[start:stop]
        of_w = of_g = of_u = np.float32(0)
        if all_three:
            for i in range(len(w)):
                u = g[i] + d * w[i]
                of_w += w[i] * w[i]
                of_g += g[i] * g[i]
                of_u += u * u
        else:
            for i in range(len(g)):
                of_g += g[i] * g[i]
        sums[3 * chunk], sums[3 * chunk + 1], sums[3 * chunk + 2] = of_w, of_g, of_u


# Backwards, since the caches still hold the weights and gradients that ``_norms`` has read last.
@kernel(backwards=True)
def _sweep(
    block: int, online: F32, gradient: F32, momentum: F32, target: F32, before: F32, after: F32,
    decay: F32,
    mu: float, tau: float, sums: F32, chunks: I32, num_chunks: int, num_target: int, ema_first: int,
) -> None:  # fmt: skip
    """Update all buffers; write the sums of squares of m and of the old w, a row (2,) per chunk.

    ``before`` and ``after`` are the factors a and b of the formulas.
    """
    keep_m, keep_t = np.float32(mu), np.float32(tau)
    share_w = np.float32(1) - keep_t
    for chunk in range(block * CHUNKS, min(block * CHUNKS + CHUNKS, num_chunks)):
        segment, start, stop = chunks[3 * chunk], chunks[3 * chunk + 1], chunks[3 * chunk + 2]
        a, b, ad = before[segment], after[segment], before[segment] * decay[segment]
        w, g, m, t = (
            online[start:stop],
            gradient[start:stop],
            momentum[start:stop],
            target[start:stop],
        )
        followed, of_m, of_w = start < num_target, np.float32(0), np.float32(0)
        for i in range(len(w)):
            old = w[i]
            moved = fma(keep_m, m[i], fma(a, g[i], ad * old))
            new = fma(-b, moved, old)
            m[i], w[i] = moved, new
            if followed:
                t[i] = fma(share_w, old if ema_first else new, keep_t * t[i])
            of_m += moved * moved
            of_w += old * old
        sums[2 * chunk], sums[2 * chunk + 1] = of_m, of_w


def step(
    online: Tensor, gradient: Tensor, momentum: Tensor, target: Tensor, table: SegmentTable,
    lr: Tensor, tau: Tensor,
    *, rule: Rule, eta: float, mu: float, ema_first: bool,
) -> Tensor:  # fmt: skip
    """Compute ``lars_ema`` on fp32 buffers on a CPU."""
    weight_norm, grad_norm, decayed_norm = norms(online, gradient, table, all_three=rule != "sgd")
    if not grad_norm.isfinite().all():
        weight_norm, still = norms(online, gradient, table)[0], torch.zeros_like(grad_norm)
        return torch.stack((weight_norm, grad_norm, still, still, still), dim=1)
    trust = torch.where(
        table.adapt, trust_ratio(rule, weight_norm, grad_norm, decayed_norm, table.decay, eta), 1.0
    )
    rate, before, after, decay = factors(rule, table, trust, grad_norm, lr)
    sums, chunks = online.new_empty(len(table.chunks), 2), table.chunks
    _sweep(
        _blocks(table), online, gradient, momentum, target, before, after, decay, mu, float(tau),
        sums,
        chunks, len(chunks), len(target), ema_first,
    )  # fmt: skip
    momentum_norm, weight_norm = _roots(sums, table)
    return torch.stack((weight_norm, grad_norm, trust, rate, after * momentum_norm), dim=1)


def norms(
    online: Tensor, gradient: Tensor, table: SegmentTable, *, all_three: bool = True
) -> Tensor:
    """Return |w|, |g| and |g + d w| of each segment, (3, S); unless ``all_three`` |g| and zeros."""
    sums, chunks = online.new_empty(len(table.chunks), 3), table.chunks
    _norms(_blocks(table), online, gradient, table.decay, sums, chunks, len(chunks), all_three)
    return _roots(sums, table)


def _blocks(table: SegmentTable) -> int:
    return -(-len(table.chunks) // CHUNKS)


def _roots(sums: Tensor, table: SegmentTable) -> Tensor:
    """Return norms (n, S) of segments from the sums of squares (K, n) of chunks, added in fp64."""
    whole = torch.segment_reduce(
        sums.double(), "sum", lengths=table.spans.diff().flatten().long(), axis=0
    )
    return whole.sqrt().to(sums.dtype).t()


# What a step calls, for ``native.compile_ahead``.
TRAINED_WITH = (_norms, _sweep)
