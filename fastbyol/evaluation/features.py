"""Embeddings y of images as they are, for probes: no augmentation, eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastbyol import views
from fastbyol.config import ViewsConfig
from fastbyol.errors import FastbyolError
from fastbyol.process import full_precision

# What a probe sees is how embeddings differ from image to image. On Fashion-MNIST at width 16 bf16 moved those of trained
# networks by .006 to .008 of their spread, and accuracies by .5 points of sampling's 3; those of collapsed ones by 1 to 3 times
# the spread, and of random ones by .03 to .09.
COMPARED = 64
MOST_ROUNDING = 0.02


def agreeing_dtype(
    encoder: nn.Module, images: Tensor, config: ViewsConfig, wanted: torch.dtype, *, device: torch.device | str
) -> torch.dtype:
    """Return ``wanted`` where embeddings in it agree with those in the encoder's own precision, else that precision.

    They agree where they differ by ``MOST_ROUNDING`` of the embeddings' own spread over the first ``COMPARED`` images, or less.
    """
    own = _dtype_of(encoder)
    if wanted == own or own == torch.float64:
        return own
    exact, rounded = (embed(encoder, images[:COMPARED], config, device=device, dtype=dtype) for dtype in (own, wanted))
    spread = torch.linalg.vector_norm(exact - exact.mean(0))
    return wanted if bool(torch.linalg.vector_norm(rounded - exact) <= MOST_ROUNDING * spread) else own


def embed(
    encoder: nn.Module,
    images: Tensor,
    config: ViewsConfig,
    *,
    device: torch.device | str,
    batch_size: int = 512,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Embed uint8 ``images`` (N, H, W, 3) with ``encoder``, which is on ``device``: float32 (N, D) on that device.

    ``dtype`` is what the views are handed over in, and so the convolutions' precision; default: the parameters'.

    Every submodule is back in its own train or eval mode afterwards. A row depends on its image alone: running statistics
    stand in for a batch's, and ``batch_size`` moves nothing but rounding. N = 0 is an error (ValueError).
    """
    if not len(images):
        raise ValueError("no images to embed")
    device = torch.device(device)
    dtype = _dtype_of(encoder) if dtype is None else dtype
    with eval_mode(encoder), torch.inference_mode(), torch.autocast(device.type, enabled=False), full_precision():
        # TF32 would round the convolutions of a GPU to ten bits, which is its default.
        batches = (images[start : start + batch_size].to(device) for start in range(0, len(images), batch_size))
        parts = [encoder(views.plain(batch, config, dtype)).float() for batch in batches]
        features = torch.cat(parts)
    # Out of inference mode, so that what is computed from it may be differentiated.
    return features.clone()


def _dtype_of(encoder: nn.Module) -> torch.dtype:
    return next((p.dtype for p in encoder.parameters()), torch.float32)


def check_finite(features: Tensor, name: str = "features") -> None:
    """Raise FastbyolError where ``features`` (N, D) holds a value that is not a finite number."""
    bad = int((~torch.isfinite(features)).any(dim=1).sum())
    if bad:
        raise FastbyolError(
            f"{name}: {bad} of {len(features)} rows hold NaN or infinite values: the encoder has diverged; "
            "go back to an earlier checkpoint or lower the learning rate"
        )


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in eval mode and give every submodule its own mode back on leaving."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
