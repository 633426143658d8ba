"""The two networks: online (encoder, projector, predictor) and target (encoder, projector).

Source: Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733, section 3. Notation: embeddings y, projections z,
predictions q; primes for the target's.

Letters: V views, B images, N = V * B, S pixels, D features.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastbyol.config import ModelConfig
from fastbyol.errors import UsageError
from fastbyol.model.heads import build_head
from fastbyol.model.resnet import build_encoder

NUM_VIEWS = 2


class OnlineOutput(NamedTuple):
    """Embeddings y (N, 8 * width), projections z (N, D) and predictions q (N, D), fp32 or, in fp64 runs, fp64.

    Without a predictor q is z.
    """

    y: Tensor
    z: Tensor
    q: Tensor


class Online(nn.Module):
    """What is trained. Views (V * B, 3, S, S), the views one after the other, -> ``OnlineOutput``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config, num_views=NUM_VIEWS)
        self.projector = build_head(config.projector, self.encoder.embedding_dim, groups=config.groups, num_views=NUM_VIEWS)
        # byol: "the same architecture as the projector"; it maps projections onto the target's projections.
        self.predictor: nn.Module = nn.Identity()
        if config.predictor.layers:
            self.predictor = build_head(config.predictor, config.projector.out, groups=config.groups, num_views=NUM_VIEWS)

    def forward(self, views: Tensor) -> OnlineOutput:
        y = self.encoder(views)
        z = self.projector(y)
        return OnlineOutput(y, z, self.predictor(z))


class Target(nn.Module):
    """What is followed. Views (V * B, 3, S, S) -> projections z' (N, D).

    Its parameters take no gradient. Its batch norms keep their own buffers, moved by its own train-mode forwards.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(config, num_views=NUM_VIEWS)
        self.projector = build_head(config.projector, self.encoder.embedding_dim, groups=config.groups, num_views=NUM_VIEWS)
        self.requires_grad_(False)

    def forward(self, views: Tensor) -> Tensor:
        z: Tensor = self.projector(self.encoder(views))
        return z


def build_online(config: ModelConfig) -> Online:
    """The online network, initialised from torch's global generator.

    Raises ``UsageError`` where predictor and projector differ in output size, since q is compared with z'.
    """
    if config.predictor.layers and config.predictor.out != config.projector.out:
        raise UsageError(
            f"model.predictor.out: {config.predictor.out} differs from model.projector.out = {config.projector.out}; "
            "predictions are compared with projections: make them equal"
        )
    return Online(config)


def build_target(config: ModelConfig) -> Target:
    """The target network of ``config``; its caller gives it the online network's parameters."""
    return Target(config)
