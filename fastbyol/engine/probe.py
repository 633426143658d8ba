"""The probe of a run: each rank embeds its share of the images, the first fits and scores."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.config import ViewsConfig
from fastbyol.engine.ranks import Ranks, from_first, shares
from fastbyol.evaluation import protocol
from fastbyol.evaluation.features import embed
from fastbyol.evaluation.protocol import LabelledImages


def evaluate_together(
    ranks: Ranks,
    name: str,
    encoder: nn.Module,
    *,
    test: LabelledImages,
    views: ViewsConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return ``protocol.evaluate``'s result under the protocol ``name``, on all ranks the same."""
    embedded = protocol.embed_rows(
        name,
        encoder,
        test=test,
        train=None,
        views=views,
        device=device,
        dtype=dtype,
        embed=partial(_embed_share, ranks),
    )
    # The others wait for host messages, not for a device's, which give up sooner.
    return from_first(ranks, protocol.score(embedded) if ranks.rank == 0 else None)


def _embed_share(ranks: Ranks, encoder: nn.Module, images: Tensor, *args: Any, **kw: Any) -> Tensor:
    """Embed this rank's share of ``images`` and return the embeddings (N, D) of all."""
    counts = shares(len(images), ranks.count)
    start, count = sum(counts[: ranks.rank]), counts[ranks.rank]
    # A rank without an image takes its neighbour's, to know the length of an embedding.
    own = embed(encoder, images[start : start + max(count, 1)], *args, **kw)
    padded = torch.zeros(max(counts), own.shape[1])
    padded[:count] = own[:count].cpu()
    every = ranks.gather(padded)
    return torch.cat([rows[:n] for rows, n in zip(every, counts, strict=True)]).to(own.device)
