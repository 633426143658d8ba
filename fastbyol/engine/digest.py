"""Digests of a state, by which the ranks of a run find out that one of them went astray."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbyol.engine.step import TrainState

# An odd multiplier for each element makes every single flipped bit change the sum, modulo 2 ** 64.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def differing(state: TrainState) -> str | None:
    """Return the name of a tensor or segment in which the ranks differ, and which, or None.

    All ranks must call it, and all get the same answer. One message; waits for the device.
    """
    if state.ranks.count == 1:
        return None
    named = dict(_parts(state))
    own = torch.stack([_digest(part) for part in named.values()])
    every = state.ranks.gather(own).cpu()
    odd = (every != every.mode(0).values).nonzero()
    if not len(odd):
        return None
    rank, part = odd[odd[:, 1].argmin()].tolist()
    others = "the other rank's" if state.ranks.count == 2 else "most ranks'"
    who = "one rank's" if state.ranks.count == 2 else f"rank {rank}'s"
    return f"{who} {list(named)[part]} is not {others}"


def _parts(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Yield the state's tensors, flat buffers as a part for each segment, by name."""
    for name, tensor in state.tensors().items():
        if not name.startswith("arena."):
            yield name, tensor
            continue
        for segment, part in state.arena.named(tensor).items():
            yield f"{name.removeprefix('arena.')} {segment}", part


def _digest(part: Tensor) -> Tensor:
    """Return a sum over the bits of ``part``, 0-d int64."""
    flat = part.detach().flatten().contiguous()
    words = flat.view(_WORDS[flat.element_size()]).to(torch.int64)
    factors = torch.arange(len(words), device=words.device) * 2 + 1
    return (words * factors).sum()
