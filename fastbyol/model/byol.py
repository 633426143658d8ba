"""The two networks: online (encoder, projector, predictor) and target (encoder, projector).

Source: Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733, section 3.
Letters: V views, B images, N = V * B, S pixels, D features.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbyol.config import ModelConfig
from fastbyol.errors import UsageError
from fastbyol.model.heads import Head
from fastbyol.model.resnet import build_encoder
from fastbyol.process import left_as_found

NUM_VIEWS = 2


class OnlineOutput(NamedTuple):
    """Embeddings y (N, E), projections z and predictions q (N, D); fp32, in fp64 runs fp64.

    E is the encoder's ``embedding_dim``. Without a predictor q is z.
    """

    y: Tensor
    z: Tensor
    q: Tensor


class Online(nn.Module):
    """The network that is trained: views (V * B, 3, S, S), view after view, -> ``OnlineOutput``.

    Both networks are initialised from torch's global generator. Raises UsageError if predictor and
    projector differ in output size: q is compared with z'.
    """

    def __init__(self, config: ModelConfig, image_size: int | None = None) -> None:
        super().__init__()
        if config.predictor.layers and config.predictor.out != config.projector.out:
            raise UsageError(
                f"model.predictor.out: {config.predictor.out} differs from model.projector.out = "
                f"{config.projector.out}; "
                "predictions are compared with projections: make them equal"
            )
        self.config = config
        self.encoder = build_encoder(config, num_views=NUM_VIEWS, image_size=image_size)
        self.projector = Head(
            config.projector, self.encoder.embedding_dim, groups=config.groups, num_views=NUM_VIEWS
        )
        # "The same architecture as the projector" (section 3.3).
        self.predictor: nn.Module = nn.Identity()
        if config.predictor.layers:
            self.predictor = Head(
                config.predictor, config.projector.out, groups=config.groups, num_views=NUM_VIEWS
            )

    def forward(self, views: Tensor) -> OnlineOutput:
        y = self.encoder(views)
        z = self.projector(y)
        return OnlineOutput(y, z, self.predictor(z))


class Target(nn.Module):
    """The moving average of the online network: views (V * B, 3, S, S) -> projections z' (N, D).

    Its parameters take no gradient. Its own forward passes update its batch norms' statistics.
    """

    def __init__(self, config: ModelConfig, image_size: int | None = None) -> None:
        super().__init__()
        self.encoder = build_encoder(config, num_views=NUM_VIEWS, image_size=image_size)
        self.projector = Head(
            config.projector, self.encoder.embedding_dim, groups=config.groups, num_views=NUM_VIEWS
        )
        self.requires_grad_(False)

    def forward(self, views: Tensor) -> Tensor:
        z: Tensor = self.projector(self.encoder(views))
        return z


# torch's one generator draws for one thread at a time.
_drawing = threading.Lock()


def draw_networks(
    config: ModelConfig, seed: int, num_keys: int = 0, *, image_size: int | None = None
) -> tuple[Online, Target, Tensor]:
    """Draw both networks and then ``num_keys`` normal keys (K, D) from ``seed``, on the cpu.

    They are those of every run of this seed before its first step, whatever was drawn before.
    ``image_size`` is the side of the views (``build_encoder``).
    """
    with _drawing, torch.random.fork_rng(devices=[]), left_as_found():
        torch.default_generator.manual_seed(seed)
        nets = Online(config, image_size), Target(config, image_size)
        return *nets, torch.randn(num_keys, config.projector.out)
