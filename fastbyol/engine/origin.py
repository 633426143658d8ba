"""A new run that starts from weights that exist: another run's, a library's, or a file's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol import config_io
from fastbyol.config import ViewsConfig
from fastbyol.engine import pretrained
from fastbyol.engine.pretrained import Pretrained
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from fastbyol.model import foreign_keys
from fastbyol.model.standardizing import Standardizing
from fastbyol.runs import checkpoint, weights_file
from fastbyol.text import printable
from fastbyol_kernels.weight_standardization import weight_standardization

# How the numbers of ImageNet's mean and deviation are written differs in the last digit.
_SAME_PIXELS = 0.005
# In folders of exports and of models from Hugging Face's hub.
_MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class FirstWeights:
    """The weights that a run starts from: their ``source``, and the ``digest`` of its content.

    ``matched`` tensors came over, which the source names as ``names`` says. Of anything but a
    checkpoint of ours they are the encoder's; ``missing`` are those that it lacks and nothing
    reads, ``unused`` counts its other tensors by group, ``others`` are other encoders in it.
    """

    source: str
    digest: str
    names: str
    matched: int
    missing: tuple[str, ...] = ()
    unused: Mapping[str, int] | None = None
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def lines(self) -> tuple[str, ...]:
        """Return the report for users."""
        if self.unused is None:
            return (f"starts from {self.source}: all {self.matched} tensors {self.names}",)
        total, counter = self.matched + len(self.missing), foreign_keys.COUNTER
        missing = f"{len(self.missing)} {counter}, which nothing reads" if self.missing else "none"
        unused = ", ".join(f"{printable(name)} ({n})" for name, n in self.unused.items()) or "none"
        others = " and ".join(printable(name.rstrip(".")) for name in self.others)
        before = f", not under {others}" if others else ""
        return (
            f"starts from {self.source}: {self.matched} of the encoder's {total} tensors matched, "
            f"{printable(self.names)}{before}; missing: {missing}; not used: {unused}; the heads "
            "are drawn from the seed",
            *self.notes,
        )


def source_of(source: str) -> tuple[str, tuple[str, ...]]:
    """Return what ``--init-from`` means, as a run's configuration keeps it, and warnings.

    A run folder means its newest sound checkpoint, a folder with ``model.safetensors`` that file.
    Files become absolute; a name in a library has the weights' own name added, and is fetched. The
    whole file is checked.
    """
    if pretrained.is_name(source):
        return pretrained.full_name(source), ()
    path = Path(source)
    if path.is_dir() and (path / _MODEL_FILE).exists():
        path = path / _MODEL_FILE
    if path.is_dir():
        loaded = checkpoint.load_latest(path / "checkpoints")
        return str(loaded.path.resolve()), loaded.warnings
    if weights_file.is_checkpoint(path):
        checkpoint.load(path)
    else:
        weights_file.read(path)
    return str(path.resolve()), ()


@torch.no_grad()
def copy_weights(
    state: TrainState, source: str | Path, views: ViewsConfig | None = None
) -> FirstWeights:
    """Copy weights, with norm statistics, from a ``source`` of ``source_of`` into ``state``.

    From a checkpoint of ours they are those of both networks with their heads; from anything else
    the encoder's, in both networks. Momentum and step stay a new run's. ``views`` are compared with
    what a library's weights were trained on. Raises UsageError naming the first tensor that is
    missing or has another shape, and leaves ``state`` alone then.
    """
    named = None
    if pretrained.is_name(str(source)):
        named = pretrained.load(str(source))
        tensors, digest = named.tensors, named.digest
    elif weights_file.is_checkpoint(Path(source)):
        return _copy_checkpoint(state, Path(source))
    else:
        tensors, digest = weights_file.read(Path(source))
    try:
        own = state.online.encoder.state_dict()
        match = foreign_keys.match(own, tensors)
        theirs = {name: _checked(name, tensors[key], own[name]) for name, key in match.keys.items()}
    except foreign_keys.MismatchError as error:
        raise UsageError(f"{source}: cannot start from it: {error} ({_about(state)})") from None
    for encoder in (state.online.encoder, state.target.encoder):
        mine = encoder.state_dict()
        for name, tensor in theirs.items():
            mine[name].copy_(tensor)
    state.renew()
    notes = [*_pixel_notes(named, views), *_standardizing_notes(state.online.encoder)]
    return FirstWeights(
        str(source),
        digest,
        match.in_words(),
        len(match.keys),
        match.missing,
        match.unused,
        match.others,
        tuple(notes),
    )


def _about(state: TrainState) -> str:
    """Return the settings that a network's tensors follow from."""
    model = state.online.config
    if model.foreign is not None:  # the others are the library's
        return f"model.encoder {model.encoder}"
    return (
        f"model.encoder {model.encoder}, norm {model.norm}, width {model.width}, stem "
        f"{model.stem}, norms of the heads {model.projector.norm} and {model.predictor.norm}"
    )


def _copy_checkpoint(state: TrainState, file: Path) -> FirstWeights:
    loaded = checkpoint.load(file)
    source = TrainState.create(config_io.parse(loaded.meta["config"], str(file)), steps_per_epoch=1)
    source.load_tensors(loaded.tensors)
    pairs = []
    for name, net, other in (
        ("online", state.online, source.online),
        ("target", state.target, source.target),
    ):
        mine, theirs = net.state_dict(), other.state_dict()
        for key in sorted(mine.keys() | theirs.keys()):
            if key not in mine or key not in theirs or mine[key].shape != theirs[key].shape:
                kinds = [
                    str(tuple(part[key].shape)) if key in part else "absent"
                    for part in (theirs, mine)
                ]
                raise UsageError(
                    f"{file}: cannot start from it: {name}.{key} is {kinds[0]} there and "
                    f"{kinds[1]} in this network ({_about(state)})"
                )
            pairs.append((mine[key], theirs[key]))
    for mine_, theirs_ in pairs:
        mine_.copy_(theirs_)
    state.renew()
    return FirstWeights(str(file), loaded.digest, "of both networks", len(pairs))


def _checked(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    """Return a tensor of a file. Raises MismatchError unless it can stand for the encoder's own."""
    is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    is_count = name.endswith(f".{foreign_keys.COUNTER}")
    is_whole = not own.is_floating_point() and not is_count
    if (
        not is_plain
        or tensor.is_quantized
        or not (tensor.is_floating_point() or is_count or (is_whole and tensor.dtype == own.dtype))
    ):
        raise foreign_keys.MismatchError(f"{name} is of {tensor.dtype}, packed or without numbers")
    # Such as a transformer's positions, which index other tensors.
    if is_whole and not torch.equal(tensor, own.cpu()):
        raise foreign_keys.MismatchError(f"{name} has other numbers than this network's")
    if not bool(tensor.isfinite().all()):
        raise foreign_keys.MismatchError(f"{name} holds NaN or infinity")
    if name.endswith(".running_var") and bool((tensor < 0).any()):
        raise foreign_keys.MismatchError(f"{name} holds variances below zero")
    return tensor


def _pixel_notes(named: Pretrained | None, views: ViewsConfig | None) -> Iterator[str]:
    """Yield a note where a library's weights are of images normalised otherwise."""
    if named is None or named.mean is None or named.std is None or views is None:
        return
    numbers = zip((*named.mean, *named.std), (*views.mean, *views.std), strict=True)
    if any(abs(theirs - ours) > _SAME_PIXELS for theirs, ours in numbers):
        yield (
            f"these weights were trained on images normalised with views.mean={list(named.mean)} "
            f"and views.std={list(named.std)}, this run's are normalised otherwise"
        )


def _standardizing_notes(encoder: nn.Module) -> Iterator[str]:
    """Yield a note where weight standardization makes another function of the weights.

    Weights that are standardized already, as exports have them, stay what they are.
    """
    for module in encoder.modules():
        if not isinstance(module, Standardizing) or not module.ws:
            continue
        standard = weight_standardization(module.weight, kernels="reference")
        if not torch.allclose(standard, module.weight, rtol=1e-2, atol=1e-3):
            yield (
                "model.ws: the encoder standardizes these weights and so computes something else "
                "than it did where they were trained: take --no-ws to start from the same function"
            )
            return
