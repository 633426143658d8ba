"""The command ``data marker``: the image share of a data set, and two simpler markers beside it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastbyol import config_io
from fastbyol.cli.options import Device, ImageField, Json, LabelField, Sets
from fastbyol.config import Resolved, ViewsConfig
from fastbyol.config_io import Setting
from fastbyol.output import print_json, say

if TYPE_CHECKING:
    from fastbyol.evaluation.marker import Cosines, Marker

# The network of the claims about recovery, on which the marker was seen.
NETWORK = {
    "model.norm": "gn",
    "model.projector.norm": "none",
    "model.predictor.norm": "none",
}


def marker(
    file: Annotated[str, typer.Argument(metavar="FILE", help="As `train --data` takes it.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Whose network and views: demo, blog or paper. Default: demo's, with group norm "
            "and without norm in the MLPs."
        ),
    ] = None,
    sets: Sets = None,
    seeds: Annotated[int, typer.Option(min=1, help="Networks and views: seeds 0, 1, ...")] = 5,
    images: Annotated[int, typer.Option(min=2, help="Images to measure on, at most.")] = 1024,
    image_field: ImageField = None,
    label_field: LabelField = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure how much of the difference of two views is the image, before any training."""
    flags = {
        "data.train": ("FILE", file),
        "data.image_field": ("--image-field", image_field),
        "data.label_field": ("--label-field", label_field),
        "train.device": ("--device", device),
    }
    base = {} if preset else {key: Setting(norm, "data marker") for key, norm in NETWORK.items()}
    loaded = config_io.load(preset=preset, sets=sets or (), flags=flags, base=base, default="demo")
    result = measured(loaded.config, range(seeds), images)
    if as_json:
        print_json(result)
    else:
        say(*in_words(result))


def measured(config: Resolved, seeds: Sequence[int], most: int) -> dict[str, Any]:
    """Return every number of the markers of the training file, on ``most`` images at most.

    They are those that a run with a ``data.limit`` of ``most`` sees, with its sample ids. Raises
    UsageError for a file that is missing or damaged and for fewer than two images.
    """
    import torch

    from fastbyol import views
    from fastbyol.engine.device import pick_device
    from fastbyol.evaluation import marker

    device = pick_device(config.train.device)
    read, ids, num_samples = marker.images_of(config, most)
    share = marker.measure(read.images, config, seeds, ids=ids, device=device)

    def ratio(seed: int) -> float | None:
        batches = marker.view_batches(read.images, config, seed, ids=ids, device=device)
        return marker.variance_ratio(batches)

    ratios, ratios_s = _timed(lambda: list(map(ratio, seeds)))
    entropy, entropy_s = _timed(
        lambda: marker.knn_entropy(views.plain(read.images, config.views), read.labels)
    )
    return _about(config, share, device.type) | {
        "images_in_file": num_samples,
        "classes": 0 if read.labels is None else len(torch.unique(read.labels)),
        "y": _numbers(share.y), "z": _numbers(share.z),
        "variance_ratio": ratios, "knn_entropy": entropy,
        "seconds": {"r": share.seconds, "variance_ratio": ratios_s, "knn_entropy": entropy_s},
    }  # fmt: skip


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    return work(), time.perf_counter() - begun


def _about(config: Resolved, share: Marker, device: str) -> dict[str, Any]:
    return {
        "file": config.data.train, "preset": config.preset, "device": device,
        "model": config.model.model_dump(), "views": config.views.model_dump(),
        "seeds": share.seeds, "images": share.num_images,
    }  # fmt: skip


def _numbers(cosines: Cosines) -> dict[str, Any]:
    """Return a quantity's numbers of each seed, and r's mean and standard deviation."""
    return {
        "r": cosines.r, "pos": cosines.pos, "neg": cosines.neg,
        "r_mean": cosines.mean, "r_sd": cosines.spread,
    }  # fmt: skip


def in_words(result: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each quantity of ``measured``."""
    model = result["model"]
    yield f"file: {result['file']}, {result['images']} of its {result['images_in_file']} images"
    yield (
        f"network: preset {result['preset']}, width {model['width']}, norm {model['norm']}, "
        f"norm of the MLP {model['projector']['norm']}, untrained, on {result['device']}"
    )
    yield f"views: {views_in_words(ViewsConfig.model_validate(result['views']))}"
    for name, what in (("y", "embeddings y"), ("z", "projections z")):
        yield f"r of {what}: {_over_seeds(result[name]['r'])}"
        yield f"  pos, two views of an image: {_over_seeds(result[name]['pos'])}"
        yield f"  neg, views of two images: {_over_seeds(result[name]['neg'])}"
    ratios = [ratio for ratio in result["variance_ratio"] if ratio is not None]
    ratio = _over_seeds(ratios) if ratios else "not measured: two views of an image never differ"
    yield f"variance of pixels, between images over within: {ratio}"
    classes, entropy = result["classes"], result["knn_entropy"]
    why = "no labels" if not classes else "one class"
    mixed = f"not measured: {why}" if entropy is None else f"{entropy:.3f} ({classes} classes)"
    yield f"entropy of neighbours' labels, in pixels: {mixed}"
    parts = (f"{name} {spent:.1f}" for name, spent in result["seconds"].items())
    yield f"seconds: {', '.join(parts)}"


def _over_seeds(values: Sequence[float]) -> str:
    """Return mean, standard deviation and range, to digits that show differences near 1."""
    mean, low, high = statistics.fmean(values), min(values), max(values)
    smallest = min(abs(mean), abs(1.0 - mean)) or 1.0
    digits = min(9, max(2, 2 - math.floor(math.log10(smallest))))
    if len(values) < 2:
        return f"{mean:.{digits}f} (one seed)"
    spread = statistics.stdev(values)
    return (
        f"{mean:.{digits}f} +- {spread:.{digits}f} "
        f"({low:.{digits}f} to {high:.{digits}f}, {len(values)} seeds)"
    )


def views_in_words(views: ViewsConfig) -> str:
    """Describe ``views`` in one line: what each augmentation does, and how often."""
    parts = [f"{views.size} px", f"crops of {_range(views.scale)} of the area"]
    if views.ratio != (1.0, 1.0):
        parts.append(f"aspect {_range(views.ratio)}")
    jitter = views.strength * max(views.brightness, views.contrast, views.saturation, views.hue)
    for name, shares in (
        ("flip", (views.flip_p,)),
        (f"jitter of strength {views.strength:g}", (views.jitter_p if jitter else 0.0,)),
        ("grey", (views.grayscale_p,)),
        (f"{views.blur} blur of {_range(views.blur_sigma)} px", views.blur_p),
        ("solarize", views.solarize_p),
    ):
        chances = " and ".join(f"{share:.0%}" for share in dict.fromkeys(shares))
        parts.append(f"{name} {chances}" if any(shares) else f"no {name.split(' of ')[0]}")
    return ", ".join(parts)


def _range(ends: tuple[float, float]) -> str:
    low, high = ends
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
