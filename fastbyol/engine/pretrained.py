"""Weights by name, from torchvision and timm: the file that the library keeps in its own cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from torch import Tensor

from fastbyol.data.source_torchvision import patience
from fastbyol.errors import UsageError, check_choice, nearest, one_line
from fastbyol.runs import weights_file
from fastbyol.text import printable

TORCHVISION, TIMM = "torchvision:", "timm:"


class Pretrained(NamedTuple):
    """Weights that a library names: ``digest`` is their file's.

    ``mean`` and ``std`` normalised the images that they were trained on; None where unknown.
    """

    tensors: dict[str, Tensor]
    digest: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def is_name(source: str) -> bool:
    """Tell whether ``source`` names weights of a library, and is no path."""
    return source.startswith((TORCHVISION, TIMM))


def full_name(source: str) -> str:
    """Return a name that means the same weights in every version of the library.

    It has the weights' own name behind the model's. Fetches their file where it is not there.
    Raises UsageError where there are no such weights, or they cannot be had.
    """
    if source.startswith(TORCHVISION):
        weights = _torchvision_weights(source)
        _fetched(source, weights.url)
        return f"{TORCHVISION}{_parts(source)[0]}.{weights.name}"
    model = _timm_model(source)
    _timm_file(source, model.pretrained_cfg)
    tag = model.pretrained_cfg.get("tag")
    name = str(model.pretrained_cfg.get("architecture") or _parts(source)[0])
    return f"{TIMM}{name}.{tag}" if tag else f"{TIMM}{name}"


def load(source: str) -> Pretrained:
    """Return the weights of that name, as the library's own model has them.

    Raises UsageError as ``full_name`` does, and for a damaged file.
    """
    if source.startswith(TORCHVISION):
        weights = _torchvision_weights(source)
        file = weights_file.read(_fetched(source, weights.url))
        transform = weights.transforms()
        return Pretrained(
            file.tensors,
            file.digest,
            _three(getattr(transform, "mean", None)),
            _three(getattr(transform, "std", None)),
        )
    import timm

    model = _timm_model(source)
    path = _timm_file(source, model.pretrained_cfg)
    digest = weights_file.read(path).digest
    try:
        # The library's own reader converts files of other projects. It unpickles nothing either.
        overlay = {"file": str(path)}
        model = timm.create_model(
            _parts(source)[2], pretrained=True, pretrained_cfg_overlay=overlay
        )
    except Exception as error:  # timm raises anything
        raise UsageError(f"{source}: timm cannot load {path} ({one_line(error)})") from None
    config = model.pretrained_cfg
    return Pretrained(
        dict(model.state_dict()), digest, _three(config.get("mean")), _three(config.get("std"))
    )


def _parts(source: str) -> tuple[str, str, str]:
    """Return the model's name, that of its weights or "", and both as they are written."""
    whole = source.partition(":")[2]
    name, _, weights = whole.partition(".")
    return name, weights, whole


def _check_model(source: str, library: str, name: str, models: Sequence[str]) -> None:
    """Raise UsageError for a model that the library lacks, with those that are spelled like it."""
    if name not in models:
        near = ", ".join(nearest(name, models, most=3)) or "such as resnet18"
        raise UsageError(f"{printable(source)}: {library} has no such model; the nearest: {near}")


def _torchvision_weights(source: str) -> Any:
    from torchvision import models

    name, weights, _ = _parts(source)
    _check_model(source, "torchvision", name, models.list_models(models))
    choices = models.get_model_weights(name)
    names = [one.name for one in choices]
    if not names:
        raise UsageError(f"{source}: torchvision has no weights of this model")
    if weights in ("", "DEFAULT"):
        return choices.DEFAULT
    check_choice(f"{printable(source)}: weights", weights, names)
    return choices[weights]


def _timm_model(source: str) -> Any:
    try:
        import timm
    except ImportError:
        raise UsageError(f"{source}: timm is not installed: pip install 'fastbyol[timm]'") from None
    name, _, whole = _parts(source)
    _check_model(source, "timm", name, timm.list_models())
    tagged = [one.partition(".")[2] for one in timm.list_models(f"{name}.*", pretrained=True)]
    tagged = [tag for tag in tagged if tag]
    if whole != name:
        check_choice(f"{printable(source)}: weights", whole[len(name) + 1 :], tagged)
    with torch.device("meta"):
        model = timm.create_model(whole)
    if not any(model.pretrained_cfg.get(key) for key in ("hf_hub_id", "url", "file")):
        raise UsageError(f"{source}: timm has no weights of it")
    return model


def _timm_file(source: str, config: dict[str, Any]) -> Path:
    """Return the file in the hub's cache that timm would read, fetched if it is not there."""
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    if not config.get("hf_hub_id"):
        return _fetched(source, config["url"])
    repository, _, revision = config["hf_hub_id"].partition("@")
    own = config.get("hf_hub_filename")
    names: Sequence[str] = (own,) if own else ("model.safetensors", "pytorch_model.bin")
    options = {"repo_id": repository, "revision": revision or None}
    for name in names:
        cached = try_to_load_from_cache(filename=name, **options)
        if isinstance(cached, str):
            return Path(cached)
    reason = ""
    for name in names:
        try:
            with patience(), _silent("huggingface_hub"):
                return Path(hf_hub_download(filename=name, **options))
        except errors.LocalEntryNotFoundError as error:  # no network; advice follows the reason
            reason = one_line(error).partition(". ")[0]
            break
        except Exception as error:  # its downloads raise anything
            reason = one_line(error)
    raise UsageError(
        f"{source}: cannot be had ({reason}): download {names[0]} of {repository} elsewhere and "
        f"name that file, or copy the hub's cache to {constants.HF_HUB_CACHE}"
    )


def _fetched(source: str, url: str) -> Path:
    """Return the file of ``url`` in torch's cache, downloaded if it is not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(urlparse(url).path).name
    if file.exists():
        return file
    # Names such as resnet18-f37072fd.pth have the beginning of the content's checksum.
    checksum = file.stem.rpartition("-")[2]
    is_checksum = len(checksum) >= 8 and set(checksum) <= set("0123456789abcdef")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with patience():
            torch.hub.download_url_to_file(
                url, str(file), checksum if is_checksum else None, progress=False
            )
    except Exception as error:  # downloads raise anything
        raise UsageError(
            f"{source}: cannot be had ({one_line(error)}): download {url} elsewhere and put it at "
            f"{file}, or name it as a file"
        ) from None
    return file


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Keep a library from telling of every attempt while the body runs."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _three(numbers: Any) -> tuple[float, ...] | None:
    if not isinstance(numbers, list | tuple) or len(numbers) != 3:
        return None
    return tuple(map(float, numbers))
