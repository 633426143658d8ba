"""Embeddings of unaugmented images in eval mode, for probes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastbyol import views
from fastbyol.config import ViewsConfig
from fastbyol.errors import FastbyolError
from fastbyol.process import full_precision

# A probe sees how embeddings differ between images. On Fashion-MNIST at width 16 bf16 moved those
# of trained networks by .006 to .008 of their spread, and accuracies by .5 points of sampling's 3;
# those of collapsed networks by 1 to 3 times the spread, and of random ones by .03 to .09.
COMPARED = 64
# Images a pass. Another number rounds otherwise.
BATCH = 512
MOST_ROUNDING = 0.02


def agreeing_dtype(
    encoder: nn.Module,
    images: Tensor,
    config: ViewsConfig,
    wanted: torch.dtype,
    *,
    device: torch.device | str,
) -> torch.dtype:
    """Return ``wanted`` if the embeddings in it agree with those in the encoder's own precision.

    Else return that precision. They agree if they differ by at most ``MOST_ROUNDING`` of the
    embeddings' spread over the first ``COMPARED`` images.
    """
    own = _dtype_of(encoder)
    if wanted == own or own == torch.float64:
        return own
    exact, rounded = (
        embed(encoder, images[:COMPARED], config, device=device, dtype=dtype)
        for dtype in (own, wanted)
    )
    spread = torch.linalg.vector_norm(exact - exact.mean(0))
    return (
        wanted if bool(torch.linalg.vector_norm(rounded - exact) <= MOST_ROUNDING * spread) else own
    )


def embed(
    encoder: nn.Module,
    images: Tensor,
    config: ViewsConfig,
    *,
    device: torch.device | str,
    batch_size: int = BATCH,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Embed uint8 ``images`` (N, H, W, 3) with ``encoder`` on ``device``: float32 (N, D) there.

    ``dtype`` is that of the images, and so of the convolutions; by default the parameters'. In eval
    mode a row depends on its image alone: ``batch_size`` changes only rounding. Restores every
    submodule's mode. Raises ValueError for N = 0.
    """
    if not len(images):
        raise ValueError("no images to embed")
    device = torch.device(device)
    dtype = _dtype_of(encoder) if dtype is None else dtype
    with inference(encoder, device):
        batches = (
            images[start : start + batch_size].to(device)
            for start in range(0, len(images), batch_size)
        )
        parts = [encoder(views.plain(batch, config, dtype)).float() for batch in batches]
        features = torch.cat(parts)
    # Out of inference mode, so that autograd accepts the features.
    return features.clone()


def _dtype_of(encoder: nn.Module) -> torch.dtype:
    return next((p.dtype for p in encoder.parameters()), torch.float32)


def check_finite(features: Tensor, name: str = "features") -> None:
    """Raise FastbyolError if a value of ``features`` (N, D) is not finite."""
    bad = int((~torch.isfinite(features)).any(dim=1).sum())
    if bad:
        raise FastbyolError(
            f"{name}: {bad} of {len(features)} rows hold NaN or infinite values: the encoder has "
            "diverged; "
            "go back to an earlier checkpoint or lower the learning rate"
        )


@contextmanager
def inference(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put ``module`` in eval mode inside, and compute on ``device`` exactly and without gradients.

    TF32, a GPU's default, rounds convolutions to ten bits.
    """
    with (
        eval_mode(module),
        torch.inference_mode(),
        torch.autocast(device.type, enabled=False),
        full_precision(),
    ):
        yield


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in eval mode inside and restore every submodule's own mode on leaving."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        # Some of timm's networks drop what they computed for evaluation when told to train.
        module.train()
        for child, training in modes:
            child.training = training
