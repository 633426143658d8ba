"""The two random views of an image: draw a table of parameters, apply it.

Every entry of the table is a function of (seed, epoch, sample id, view) alone, through Philox, and is computed with operations
that IEEE 754 rounds one way only. So the draw is the same bit for bit on any device and for any batch, order or worker count.

Sources: byol, appendix B (two views, blur and solarize per view); torchvision's RandomResizedCrop and ColorJitter, whose
``get_params`` this file follows. Shapes: V views, B images, A crop attempts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.config import Range, ViewsConfig
from fastbyol_kernels.philox import DOMAIN_VIEWS, philox4x32, split_id, uniform
from fastbyol_kernels.two_views import JITTER_ORDERS, Column
from fastbyol_kernels.two_views import two_views as apply_table

# Philox blocks of four words per view: one for each crop attempt (area, ratio, top, left) and three for the rest.
CROP_ATTEMPTS = 10  # torchvision's
_FLAGS, _FACTORS, _BLUR, _NUM_BLOCKS = range(CROP_ATTEMPTS, CROP_ATTEMPTS + 4)


def draw(config: ViewsConfig, ids: Tensor, *, seed: int, epoch: int, height: int, width: int) -> Tensor:
    """Parameters of every view of the samples ``ids``, int64 (B,): float32 (V, B, len(Column)) on the device of ``ids``.

    ``seed`` in [0, 2**64), ``epoch`` in [0, 2**32), ids in [0, 2**56); ``height`` and ``width`` of the images in pixels.
    Raises ValueError naming a wrong argument.
    """
    _check_draw(ids, seed, epoch, height, width)
    num_views = len(config.blur_p)
    u = _uniforms(ids, num_views, seed, epoch)
    table = torch.zeros(num_views, len(ids), len(Column), dtype=torch.float64, device=ids.device)
    table[..., Column.TOP : Column.WIDTH + 1] = _crop_boxes(u[:, :, :CROP_ATTEMPTS], config, height, width)
    flip, jitter, order, gray = u[:, :, _FLAGS].unbind(-1)
    table[..., Column.FLIP] = (flip < config.flip_p).double()
    table[..., Column.ORDER] = (order * len(JITTER_ORDERS)).floor()
    table[..., Column.BRIGHTNESS : Column.HUE + 1] = _jitter_factors(u[:, :, _FACTORS], jitter < config.jitter_p, config)
    table[..., Column.GRAYSCALE] = (gray < config.grayscale_p).double()
    blur, sigma, solarize, _ = u[:, :, _BLUR].unbind(-1)
    blur_p, solarize_p = u.new_tensor((config.blur_p, config.solarize_p))[:, :, None]
    table[..., Column.BLUR_SIGMA] = torch.where(blur < blur_p, _between(sigma, config.blur_sigma), 0.0)
    table[..., Column.SOLARIZE] = (solarize < solarize_p).double()
    return table.float()


def apply(images: Tensor, table: Tensor, config: ViewsConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """The views that a drawn table describes: uint8 (B, H, W, 3) -> (V, B, 3, S, S), normalised.

    ``dtype`` is float32, bfloat16 or float64. ``flatten(0, 1)`` of the result is contiguous in channels_last. Raises
    ValueError naming a wrong argument.
    """
    return apply_table(
        images,
        table,
        size=config.size,
        blur=config.blur,
        blur_kernel=config.blur_kernel,
        mean=config.mean,
        std=config.std,
        dtype=dtype,
    )


def two_views(
    config: ViewsConfig, images: Tensor, ids: Tensor, *, seed: int, epoch: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw and apply: uint8 images (B, H, W, 3) and their int64 sample ids (B,) -> (V, B, 3, S, S)."""
    height, width = images.shape[1:3]
    return apply(images, draw(config, ids, seed=seed, epoch=epoch, height=height, width=width), config, dtype)


def plain(images: Tensor, config: ViewsConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images as they are, for evaluation: uint8 (N, H, W, 3) -> normalised (N, 3, S, S), channels_last.

    Where the size differs, the short side is resized to S (bilinear, antialiased) and the centre is kept.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 of shape (N, H, W, 3), got {images.dtype} of shape {tuple(images.shape)}")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    x = images.to(work).div_(255.0)
    if x.shape[1:3] != (config.size, config.size):
        x = _resize_and_centre(x.permute(0, 3, 1, 2), config.size).permute(0, 2, 3, 1).contiguous()
    x.sub_(x.new_tensor(config.mean)).div_(x.new_tensor(config.std))
    return x.to(dtype).permute(0, 3, 1, 2)


def _check_draw(ids: Tensor, seed: int, epoch: int, height: int, width: int) -> None:
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"ids must be int64 of shape (B,), got {ids.dtype} of shape {tuple(ids.shape)}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch must lie in [0, 2**32), got {epoch}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")


def _uniforms(ids: Tensor, num_views: int, seed: int, epoch: int) -> Tensor:
    """float64 (V, B, blocks, 4) in [0, 1), multiples of 2**-24."""
    low, high = split_id(ids, DOMAIN_VIEWS)
    view = torch.arange(num_views, device=ids.device)[:, None, None]
    block = view * 256 + torch.arange(_NUM_BLOCKS, device=ids.device)
    words = philox4x32(low[:, None], epoch, block, high[:, None], seed)
    return uniform(torch.stack(words, dim=-1)).double()


def _between(u: Tensor, bounds: Range) -> Tensor:
    return bounds[0] + u * (bounds[1] - bounds[0])


def _crop_boxes(u: Tensor, config: ViewsConfig, height: int, width: int) -> Tensor:
    """RandomResizedCrop.get_params: (V, B, A, 4) -> (V, B, 4), top, left, height, width of the first attempt that fits."""
    area = height * width * _between(u[..., 0], config.scale)
    ratio = _exp(_between(u[..., 1], (math.log(config.ratio[0]), math.log(config.ratio[1]))))
    box_width, box_height = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    top = (u[..., 2] * (height - box_height + 1)).floor()
    left = (u[..., 3] * (width - box_width + 1)).floor()
    first = fits.long().argmax(dim=2)[:, :, None, None].expand(-1, -1, 1, 4)
    chosen = torch.stack((top, left, box_height, box_width), dim=-1).gather(2, first)[:, :, 0]
    return torch.where(fits.any(dim=2)[:, :, None], chosen, u.new_tensor(_central_box(config.ratio, height, width)))


def _central_box(ratio: Range, height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's fallback: the largest central box whose aspect ratio is allowed."""
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _exp(x: Tensor) -> Tensor:
    """exp of float64 |x| < 20 to 1e-12. Sums and products only: library exponentials differ between devices in the last bit."""
    small, result = x / 1024.0, torch.ones_like(x)
    for divisor in range(8, 0, -1):
        result = 1.0 + result * (small / divisor)
    for _ in range(10):
        result = result * result
    return result


def _jitter_factors(u: Tensor, applied: Tensor, config: ViewsConfig) -> Tensor:
    """ColorJitter.get_params: (V, B, 4) -> brightness, contrast, saturation factors and hue shift, identity if not applied."""
    amplitudes = [config.strength * a for a in (config.brightness, config.contrast, config.saturation)]
    ranges = [(max(0.0, 1.0 - a), 1.0 + a) for a in amplitudes] + [
        (-config.strength * config.hue, config.strength * config.hue)
    ]
    low, high = u.new_tensor(ranges).T
    return torch.where(applied[:, :, None], low + u * (high - low), u.new_tensor((1.0, 1.0, 1.0, 0.0)))


def _resize_and_centre(x: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) -> (N, 3, size, size): torchvision's Resize(size), then CenterCrop(size)."""
    height, width = x.shape[2:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    if shape != (height, width):
        x = F.interpolate(x, size=shape, mode="bilinear", align_corners=False, antialias=True)
    top, left = round((shape[0] - size) / 2.0), round((shape[1] - size) / 2.0)
    return x[:, :, top : top + size, left : left + size]
