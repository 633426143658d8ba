"""Images whose classes crops and flips keep: plain grey, horizontal and vertical stripes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Images(NamedTuple):
    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] = ()


def stripes(num: int, seed: int, names: tuple[int, ...] = (0, 1, 2)) -> Images:
    """Draw noise on plain grey, horizontal and vertical stripes, with labels ``names``."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(names), (num,), generator=g)
    wave = 60.0 * torch.sin(torch.arange(16) * 1.5 + 6.0 * torch.rand(num, 1, generator=g))
    patterns = torch.stack(
        (
            torch.zeros(num, 16, 16),
            wave[:, :, None].expand(-1, -1, 16),
            wave[:, None].expand(-1, 16, -1),
        )
    )
    pixels = (
        128.0
        + patterns[labels, torch.arange(num)][..., None]
        + 25.0 * torch.randn(num, 16, 16, 3, generator=g)
    )
    return Images(pixels.clamp(0, 255).to(torch.uint8), torch.tensor(names)[labels])
