"""Which networks of timm and torchvision can be encoders: each is built and embeds four images.

    python -m fastbyol_bench.encoders torchvision                # all of its networks for images
    python -m fastbyol_bench.encoders timm --count 70 --seed 1   # so many of timm's small ones

Each takes the first of the sizes at which it works, trains on one batch, and gives embeddings.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator

import torch

from fastbyol.config import ModelConfig
from fastbyol.errors import UsageError
from fastbyol.model.adapter import LIBRARIES, adapted, network_names
from fastbyol.output import say

SIZES = (32, 64, 96, 224)
# Networks of gigabytes: their smaller relatives have the same layers.
_LARGE = re.compile(r"large|huge|giant|gopt|base|so\d|128gf|vit_h|_h_|12b|xl|moe|384|448|512")
# Of timm's 1,371 names those whose networks are small.
_SMALL = re.compile(r"tiny|nano|pico|femto|atto|mini|small|xxs|_xs|050|lite|18|26|b0|test_|_00|ti_")


def main() -> None:
    """Print a line for each network, and counts."""
    parser = argparse.ArgumentParser(prog="fastbyol_bench.encoders")
    parser.add_argument("library", choices=tuple(LIBRARIES))
    parser.add_argument("--count", type=int, help="so many, drawn; by default all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    names = chosen(asked.library, asked.count, asked.seed)
    worked = 0
    for _, size, line in tried(names):
        worked += size is not None
        say(line)
    say(f"{worked} of {len(names)} networks of {asked.library} train and embed")


def chosen(library: str, count: int | None, seed: int) -> list[str]:
    """Return the networks of ``library`` that are not too large to try, or ``count`` of them."""
    names = [name for name in network_names(library) if not _LARGE.search(name)]
    if library == "timm":
        names = [name for name in names if _SMALL.search(name)]
    drawn = names if count is None else random.Random(seed).sample(names, count)
    return [f"{library}:{name}" for name in drawn]


def tried(names: list[str]) -> Iterator[tuple[str, int | None, str]]:
    """Yield each name, the size at which it works or None, and a line about it."""
    for name in names:
        size, line = None, ""
        for size in SIZES:
            try:
                line = _trained(name, size)
                break
            except UsageError as error:
                size, line = None, str(error)
        yield name, size, line


def _trained(name: str, size: int) -> str:
    """Train on a batch and embed it; return a line. Raises UsageError if it is no encoder."""
    torch.manual_seed(0)
    encoder = adapted(ModelConfig(encoder=name), num_views=2, image_size=size)
    images = torch.randn(4, 3, size, size)
    trained = encoder(images)
    torch.autograd.backward(trained.square().mean())
    embedded = encoder.eval()(images)
    if not trained.shape == embedded.shape == (4, encoder.embedding_dim):
        raise AssertionError(f"{name}: {tuple(trained.shape)} and {tuple(embedded.shape)}")
    if not (trained.isfinite().all() and embedded.isfinite().all()):
        raise AssertionError(f"{name}: not finite")
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    norms = ", batch norm" if encoder.has_batch_norm else ""
    return f"{name}: {size} px, {encoder.embedding_dim} features, {millions:.1f} M{norms}"


if __name__ == "__main__":
    main()
