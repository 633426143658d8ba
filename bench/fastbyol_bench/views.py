"""The suite of the views: two views of each image, ours against Pillow's through torchvision."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastbyol import load_config
from fastbyol.views import two_views
from fastbyol_bench import blog_path
from fastbyol_bench.ceilings import floor
from fastbyol_bench.harness import Variant
from fastbyol_bench.pictures import pictures
from fastbyol_bench.results import Row
from fastbyol_bench.suite import NEEDS_GPU, Setting, missing, threads
from fastbyol_kernels.views import bytes_moved

SUITE = "views"
PIL = "Pillow and torchvision, one process"
TRITON = "fused, Triton"


def rows(setting: Setting) -> Iterator[Row]:
    """Measure our views on one core, or on the GPU, against Pillow's on one core."""
    size, count = (32, 8) if setting.quick else (96, 256 if setting.on_gpu else 64)
    name = f"two views of {size} px" + ("" if setting.on_gpu else ", one core")
    images, _ = pictures(count, size)
    with threads(1 if not setting.on_gpu else torch.get_num_threads()):
        yield from _measured(setting, name, images, size)
    if not setting.on_gpu:
        yield missing(SUITE, name, TRITON, NEEDS_GPU)


def _measured(setting: Setting, name: str, images: np.ndarray, size: int) -> list[Row]:
    resident, ids = (
        torch.from_numpy(images).to(setting.device),
        torch.arange(len(images), device=setting.device),
    )
    config = load_config("blog", [f"views.size={size}"]).views
    epochs = iter(range(2**32))

    def ours(dtype: torch.dtype) -> Tensor:
        return two_views(config, resident, ids, seed=0, epoch=next(epochs), dtype=dtype)

    pil = blog_path.PairedViews(images[: 4 if setting.quick else 32], size)
    first = TRITON if setting.on_gpu else "ours"
    variants = [
        Variant(f"{first}, bf16", lambda: ours(torch.bfloat16), len(images)),
        Variant(f"{first}, fp32", lambda: ours(torch.float32), len(images)),
    ]
    if not setting.on_gpu:  # the clock of a GPU does not measure Pillow
        variants.append(Variant(PIL, lambda: [pil[index] for index in range(len(pil))], len(pil)))
    floors = {
        variant.name: floor(
            setting.ceiling(),
            num_bytes=bytes_moved(2, len(images), size, size, size, element_bytes),
        )
        for variant, element_bytes in zip(variants[:2], (2, 4), strict=True)
    }
    return setting.kernel_rows(
        SUITE, name, variants, setting.plan(15, 20.0), floors=floors, cold=setting.on_gpu
    )
