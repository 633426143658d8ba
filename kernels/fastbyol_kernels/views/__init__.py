"""Two random views of every image: ``draw_views`` draws parameters, ``two_views`` applies them.

Shapes: V views, B images of a batch, N of a set, C channels, H W pixels of an image, S side of a
view. The table is float32 (V, B, len(Column)). All backends agree on it bit for bit and, when they
apply it, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch
from fastbyol_kernels.views import reference, triton
from fastbyol_kernels.views.blocks import IMAGE_BORDER, in_blocks
from fastbyol_kernels.views.draw import Distribution, draw_views
from fastbyol_kernels.views.table import JITTER_ORDERS, Column

__all__ = ["Distribution", "bytes_moved", "draw_views", "two_views"]


def two_views(
    images: Tensor,
    table: Tensor,
    *,
    rows: Tensor | None = None,
    size: int,
    blur: str = "gaussian",
    blur_kernel: int = 9,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
    kernels: str = "auto",
) -> Tensor:
    """Apply float32 ``table`` (V, B, len(Column)) to uint8 ``images`` (B, H, W, C).

    With int64 ``rows`` (B,) the images are those at these rows of a set, (N, H, W, C), which is
    read where it lies.

    Returns (V, B, C, S, S) of ``dtype``, whose ``flatten(0, 1)`` is contiguous in channels-last
    memory. With ``layout`` "blocks" instead of "plain" it is (V, B, 16, S/2 + 3, S/2 + 3), the same
    values in blocks of 2x2 pixels with zeros around (``blocks.in_blocks``), for an even S. ``blur``
    is "gaussian" (torchvision's gaussian_blur with ``blur_kernel`` taps, reflected edges) or "pil"
    (Pillow's GaussianBlur: three extended box blurs, repeated edges). ``mean`` and ``std`` are per
    channel, for values in [0, 1]. The arithmetic is float32. For ``dtype`` float64 it is float64,
    by the reference. Raises ValueError, naming the argument, for a wrong shape, dtype, device or
    value.

    ``kernels`` is one of ``dispatch.BACKENDS``. The Triton kernels need contiguous inputs. They do
    not check the entries of ``table`` and ``rows``, which would stall the GPU, but move a crop box
    into its image and a row into the set.
    """
    _check(images, table, rows, size, blur, blur_kernel, dtype, layout)
    backend = dispatch(kernels, "images", images, table, rows)
    if dtype == torch.float64:
        backend = "reference"
    if backend == "triton":
        for name, tensor in (("images", images), ("table", table), ("rows", rows)):
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous for Triton's kernels: strides {tensor.stride()}"
                )
    else:
        _check_entries(table, rows, *images.shape[:3])
    # Reflection provides at most size - 1 pixels beyond an edge.
    too_wide = blur == "gaussian" and blur_kernel // 2 >= size
    if too_wide and (backend == "triton" or bool((table[..., Column.BLUR_SIGMA] > 0).any())):
        raise ValueError(
            f"blur_kernel must be at most {2 * size - 1} for views of {size} pixels, got "
            f"{blur_kernel}"
        )
    if backend == "cpu":
        # Imported here because it loads numba, which a GPU run does not need.
        from fastbyol_kernels.views import cpu
    kernel = blur_kernel if blur == "gaussian" else 0
    how = size, kernel, [float(m) for m in mean], [float(s) for s in std], dtype
    if backend == "triton":
        return triton.apply(images, table, rows, *how, layout == "blocks").permute(0, 1, 4, 2, 3)
    views = (cpu.apply if backend == "cpu" else reference.apply)(images, table, rows, *how)
    views = views.permute(0, 1, 4, 2, 3)
    if layout == "blocks":
        views = in_blocks(views.flatten(0, 1), IMAGE_BORDER).unflatten(0, table.shape[:2])
    return views


def _check(
    images: Tensor,
    table: Tensor,
    rows: Tensor | None,
    size: int,
    blur: str,
    blur_kernel: int,
    dtype: torch.dtype,
    layout: str,
) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(
            f"images must be uint8 of shape (B, H, W, 3), got {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    if rows is not None and (rows.dtype != torch.int64 or rows.ndim != 1 or not len(rows)):
        raise ValueError(
            f"rows must be int64 of shape (B,), got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    count = len(images) if rows is None else len(rows)
    if (
        table.dtype != torch.float32
        or table.ndim != 3
        or table.shape[1:] != (count, len(Column))
        or not len(table)
    ):
        wanted = f"float32 of shape (V, {count}, {len(Column)})"
        raise ValueError(f"table must be {wanted}, got {table.dtype} of shape {tuple(table.shape)}")
    for name, tensor in (("table", table), ("rows", rows)):
        if tensor is not None and tensor.device != images.device:
            raise ValueError(
                f"{name} must be on the images' device {images.device}, got {tensor.device}"
            )
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if blur not in ("gaussian", "pil"):
        raise ValueError(f"blur must be 'gaussian' or 'pil', got {blur!r}")
    if blur_kernel < 1 or blur_kernel % 2 == 0:
        raise ValueError(f"blur_kernel must be odd and positive, got {blur_kernel}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype must be float32, bfloat16 or float64, got {dtype}")
    if layout not in ("plain", "blocks"):
        raise ValueError(f"layout must be 'plain' or 'blocks', got {layout!r}")
    if layout == "blocks" and size % 2:
        raise ValueError(f"size must be even for views in blocks, got {size}")


def _check_entries(table: Tensor, rows: Tensor | None, count: int, height: int, width: int) -> None:
    """Raise ValueError for a row, a crop box or a jitter order outside of what it is part of."""
    if rows is not None and not bool(((rows >= 0) & (rows < count)).all()):
        raise ValueError(f"rows holds a row outside the set of {count} images")
    top, left, box_height, box_width = table[..., : Column.WIDTH + 1].unbind(-1)
    inside = (top >= 0) & (left >= 0) & (box_height >= 1) & (box_width >= 1)
    inside &= (top + box_height <= height) & (left + box_width <= width)
    if not bool(inside.all()):
        raise ValueError(
            f"table holds a crop box that does not lie within images of {height} x {width} pixels"
        )
    orders = table[..., Column.ORDER]
    if not bool(((orders >= 0) & (orders < len(JITTER_ORDERS))).all()):
        raise ValueError(f"table holds a jitter order outside 0..{len(JITTER_ORDERS) - 1}")


def bytes_moved(
    num_views: int, num_images: int, height: int, width: int, size: int, element_bytes: int
) -> int:
    """Return the bytes moved if every image, the table and every view cross the memory bus once."""
    table, views = (
        num_views * num_images * number
        for number in (len(Column) * 4, size * size * 3 * element_bytes)
    )
    return num_images * height * width * 3 + table + views
