"""The two random views of an image: a config's arguments for fastbyol_kernels.views.

Letters: V views, B images of a batch, N of a set, S side of a view, C channels.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.config import ViewsConfig
from fastbyol_kernels.views import Distribution, draw_views
from fastbyol_kernels.views import two_views as apply_table


def draw(
    config: ViewsConfig,
    ids: Tensor,
    *,
    seed: int | Tensor,
    epoch: int | Tensor,
    height: int,
    width: int,
    kernels: str = "auto",
) -> Tensor:
    """Draw the parameters of all views of the samples ``ids``: float32 (V, B, len(Column)).

    Each is a function of (seed, epoch, sample id, view) alone: the same bits on any device, for any
    ``kernels``, batch, order or worker count. ``ids`` are int64 (B,) in [0, 2**56), ``seed`` is in
    [0, 2**64) and ``epoch`` in [0, 2**32), or both are 0-d int64 tensors, read by the kernel.
    ``height`` and ``width`` are the images' in pixels. Raises ValueError naming a wrong argument.
    """
    return draw_views(
        distribution(config),
        ids,
        seed=seed,
        epoch=epoch,
        height=height,
        width=width,
        kernels=kernels,
    )


@cache
def distribution(config: ViewsConfig) -> Distribution:
    """Return the ranges and probabilities of ``config``; ``strength`` scales the jitter."""
    amplitudes = [
        config.strength * a for a in (config.brightness, config.contrast, config.saturation)
    ]
    brightness, contrast, saturation = ((max(0.0, 1.0 - a), 1.0 + a) for a in amplitudes)
    return Distribution(
        scale=config.scale,
        ratio=config.ratio,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=(-config.strength * config.hue, config.strength * config.hue),
        jitter_p=config.jitter_p,
        grayscale_p=config.grayscale_p,
        flip_p=config.flip_p,
        blur_sigma=config.blur_sigma,
        blur_p=config.blur_p,
        solarize_p=config.solarize_p,
    )


def apply(
    images: Tensor,
    table: Tensor,
    config: ViewsConfig,
    dtype: torch.dtype = torch.float32,
    *,
    rows: Tensor | None = None,
    layout: str = "plain",
    kernels: str = "auto",
) -> Tensor:
    """Make the views of a drawn table: uint8 (B, H, W, 3) -> (V, B, C, S, S), normalised.

    With int64 ``rows`` (B,) ``images`` is a set (N, H, W, 3), and the views are of these rows of
    it. ``dtype`` is float32, bfloat16 or float64. With ``layout`` "blocks" the result is (V, B, 16,
    S/2 + 3, S/2 + 3), for a stem that reads 2x2 pixels at once; its ``flatten(0, 1)`` is contiguous
    in channels_last. Raises ValueError naming a wrong argument.
    """
    return apply_table(
        images,
        table,
        rows=rows,
        size=config.size,
        blur=config.blur,
        blur_kernel=config.blur_kernel,
        mean=config.mean,
        std=config.std,
        dtype=dtype,
        layout=layout,
        kernels=kernels,
    )


def two_views(
    config: ViewsConfig,
    images: Tensor,
    ids: Tensor,
    *,
    rows: Tensor | None = None,
    seed: int | Tensor,
    epoch: int | Tensor,
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
    kernels: str = "auto",
) -> Tensor:
    """Draw and apply: uint8 images (B, H, W, 3) of int64 sample ``ids`` (B,) -> (V, B, C, S, S).

    ``rows`` and ``layout`` are those of ``apply``.
    """
    height, width = images.shape[1:3]
    table = draw(config, ids, seed=seed, epoch=epoch, height=height, width=width, kernels=kernels)
    return apply(images, table, config, dtype, rows=rows, layout=layout, kernels=kernels)


def plain(images: Tensor, config: ViewsConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalise images for evaluation: uint8 (N, H, W, 3) -> (N, 3, S, S), channels_last.

    If the size differs, the short side is resized to S (bilinear, antialiased) and the centre kept.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images must be uint8 of shape (N, H, W, 3), got {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    work = torch.float64 if dtype == torch.float64 else torch.float32
    x = images.to(work).div_(255.0)
    if x.shape[1:3] != (config.size, config.size):
        x = _resize_and_centre(x.permute(0, 3, 1, 2), config.size).permute(0, 2, 3, 1).contiguous()
    x.sub_(x.new_tensor(config.mean)).div_(x.new_tensor(config.std))
    return x.to(dtype).permute(0, 3, 1, 2)


def _resize_and_centre(x: Tensor, size: int) -> Tensor:
    """Resize and crop (N, 3, H, W) to ``size`` like torchvision's Resize, then CenterCrop."""
    height, width = x.shape[2:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    if shape != (height, width):
        x = F.interpolate(x, size=shape, mode="bilinear", align_corners=False, antialias=True)
    top, left = round((shape[0] - size) / 2.0), round((shape[1] - size) / 2.0)
    return x[:, :, top : top + size, left : left + size]
