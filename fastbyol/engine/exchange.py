"""The one message of a step: the gradient, and behind it what else the ranks have to know."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastbyol.engine.ranks import Ranks
from fastbyol.model.objective import Share, merge

# Steps after which a GPU's host reads whether to stop: by then the step is done and costs no wait.
LAG = 8


@dataclass(frozen=True)
class Layout:
    """The lengths of the parts behind the gradient.

    A rank writes its own place of ``moments`` and ``keys`` and leaves the others' zero, so that the
    sum is all of them. ``statistics`` are those of norms whose scope is a rank: all keep the mean.
    """

    moments: int
    statistics: int = 0
    keys: tuple[int, int] = (0, 0)

    def sizes(self, count: int) -> list[int]:
        """Return the lengths for ``count`` ranks: loss, stop, moments, statistics, keys."""
        return [1, 1, count * self.moments, self.statistics, self.keys[0] * self.keys[1]]


@dataclass(frozen=True)
class Exchange:
    """The exchange of ``ranks`` at the end of a step.

    ``message`` is the gradient and its tail; ``tail`` are views of the latter, ``dim_z`` is the
    length of projections. ``wish`` is what this rank wishes after the step: ``wishes``.
    """

    ranks: Ranks
    share: Share
    layout: Layout
    message: Tensor
    tail: tuple[Tensor, ...]
    counts: Tensor
    dim_z: int
    wish: Tensor
    _unread: deque[tuple[Tensor, torch.cuda.Event]] = field(default_factory=deque)

    @staticmethod
    def of(ranks: Ranks, share: Share, layout: Layout, gradient: Tensor, dim_z: int) -> Exchange:
        """Make the exchange whose message begins with ``gradient``, a view of a longer buffer."""
        sizes = layout.sizes(ranks.count)
        end = gradient.numel() + sum(sizes)
        message = gradient.as_strided((end,), (1,), gradient.storage_offset())
        tail = torch.split(message[gradient.numel() :], sizes)
        counts = torch.tensor(share.counts, device=gradient.device)
        return Exchange(
            ranks, share, layout, message, tail, counts, dim_z, wish=gradient.new_zeros(1)
        )

    @torch.no_grad()
    def sum_(
        self, loss: Tensor, moments: Tensor, statistics: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Sum the gradient in place over the ranks, and return the rest of all ranks.

        Takes this rank's loss, ``objective.moments``, running statistics (read only where norms are
        a rank's own) and keys for the queue; returns loss, ``objective.observe``, the mean of such
        statistics, else None, and all keys.
        """
        of_loss, of_stop, of_moments, of_statistics, of_keys = self.tail
        for part in self.tail:
            part.zero_()
        rank, share = self.ranks.rank, self.share
        of_loss.copy_(loss.detach())
        of_stop.copy_(self.wish)
        of_moments.view(self.ranks.count, -1)[rank].copy_(moments)
        if statistics is not None and of_statistics.numel():
            of_statistics.copy_(statistics).div_(self.ranks.count)
        if keys is not None:
            of_keys.view(share.total, -1)[share.first : share.first + share.count].copy_(keys)
        self.ranks.sum_(self.message)
        observed = merge(of_moments.view(self.ranks.count, -1), self.counts, self.dim_z)
        return (
            of_loss[0],
            observed.to(loss.dtype),
            of_statistics if of_statistics.numel() else None,
            None if keys is None else of_keys.view(share.total, -1),
        )

    def wishes(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Tell, after a step and on all ranks alike, whether to stop and whether to save.

        ``stop``: whether this one was asked to stop, ``save``, of one rank only: whether a
        checkpoint is due; the others hear of it in the next step's message. On a GPU the answer
        comes ``LAG`` steps late, when reading it does not wait.
        """
        # The number of ranks that stop, and a half more to save.
        answer, total = self.tail[1], 0.0
        if not answer.is_cuda:
            total = float(answer)
        else:
            read = torch.empty(1, dtype=answer.dtype, pin_memory=True)
            read.copy_(answer, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self._unread.append((read, arrived))
            if len(self._unread) > LAG:
                read, arrived = self._unread.popleft()
                arrived.synchronize()
                total = float(read)
        self.wish.fill_(stop + 0.5 * save)
        return total >= 1.0, total % 1.0 > 0.0
