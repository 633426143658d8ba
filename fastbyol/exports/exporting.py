"""A run's encoder, written in a format, loaded again as users load it, and compared."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbyol.config import ModelConfig, Resolved
from fastbyol.data.beton_write import check_output, followed, publish
from fastbyol.errors import UsageError, one_line
from fastbyol.exports import constructors, foreign, model_card, parity
from fastbyol.exports.folding import add_classifier, folded
from fastbyol.exports.formats import FORMATS, Format, demand_libraries
from fastbyol.model.adapter import Adapter
from fastbyol.model.convolution import SAFE_CHANNELS
from fastbyol.model.resnet import Architecture, ResNet
from fastbyol.runs.durable import writing
from fastbyol.runs.folder import CHECKPOINTS, CONFIG

# What Hugging Face calls them.
WEIGHTS_FILE, README = "model.safetensors", "README.md"
# Weights of 0.2 GB at width 64: more than that is a mistake.
MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Wishes:
    """What a caller wants: a format, weights by their word, classes of a new classifier or None."""

    name: str
    weights: str
    num_classes: int | None
    licence: str | None
    overwrite: bool

    def check(self) -> None:
        """Raise UsageError for what does not go together, or lacks a library."""
        if self.num_classes is not None:
            if self.num_classes < 1:
                raise UsageError(f"--num-classes {self.num_classes}: must be at least 1")
            if self.num_classes > MOST_CLASSES:
                raise UsageError(f"--num-classes {self.num_classes}: at most {MOST_CLASSES}")
            if not FORMATS[self.name].is_state:
                raise UsageError(
                    f"--num-classes: not with --format {self.name}, which has no classifier: take "
                    "torchvision, timm or safetensors, or put one behind the embeddings"
                )
        if self.licence is not None and not self.licence.strip():
            raise UsageError("--license: is empty: name one, or leave it out")
        demand_libraries(self.name)


def export(
    run: Path,
    config: Resolved,
    encoder: ResNet | Adapter,
    step: int,
    out: Path | None,
    wishes: Wishes,
) -> dict[str, Any]:
    """Write ``encoder``, the one of ``run`` after ``step`` steps, and a model card.

    Returns what the command prints as JSON. Raises UsageError for input that cannot work, and
    FastbyolError if the disk fails or the file, loaded as users load it, computes something else;
    then nothing is left behind.
    """
    _demand_utf8(run if out is None else out)
    if out is not None and out.name in ("", ".."):
        raise UsageError(
            f"{out}: has no name of its own: take such as {out / FORMATS[wishes.name].file}"
        )
    kind, shown = FORMATS[wishes.name], _default_out(run, wishes) if out is None else out

    recipe = encoder.recipe if isinstance(encoder, Adapter) else None

    def code(file: str) -> str:
        return constructors.code(wishes.name, config.model, file, wishes.num_classes, recipe)

    result = {"load": code(str(_weights_in(shown, kind)))}  # refuses what fits no constructor
    with ExitStack() as stack:
        if out is None:
            stack.enter_context(_folder(shown.parent))
        path = followed(shown)
        _check_output(path, kind, overwrite=wishes.overwrite)
        content = _content(kind, config, encoder, wishes)
        scratch = stack.enter_context(_scratch(path))
        weights = _weights_in(scratch / path.name, kind)
        with writing(path):
            weights.parent.mkdir(exist_ok=True)
            _write(weights, content)
        images = parity.images_of(run, config)
        model = _loaded(code(str(weights)), wishes)
        same = parity.compare(model, encoder, images, of_arrays=wishes.name == "onnx")
        notes = _narrow_note(config.model) if kind.is_state and recipe is None else []
        facts = model_card.Facts(
            path=run, run=_run_of(run), config=config, step=step, kind=kind,
            format=wishes.name, weights=wishes.weights, licence=wishes.licence,
            num_classes=wishes.num_classes, embedding_dim=encoder.embedding_dim, parity=same,
            notes=notes,
            code=code(_weights_in(shown, kind).name),
        )  # fmt: skip
        card = scratch / README
        with writing(path):
            _write(card, model_card.text(facts).encode("utf-8"))
        targets = {weights: _weights_in(path, kind), card: _card_of(path, kind)}
        _publish(targets, overwrite=wishes.overwrite)
    return {
        "run": str(run), "step": step, "weights": wishes.weights, "format": wishes.name,
        "out": str(shown), "card": str(_card_of(shown, kind)), "num_bytes": len(content),
        "num_classes": wishes.num_classes, "parity": same.as_json(), **result,
        "notes": [images.note] * bool(images.note) + notes,
    }  # fmt: skip


def _demand_utf8(path: Path) -> None:
    """Raise UsageError for a path that libraries written in C++ and Rust cannot open."""
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"{path}: its name is not UTF-8, which the library cannot open: name another with --out"
        ) from None


def _narrow_note(model: ModelConfig) -> list[str]:
    """Say that oneDNN cannot train ``model`` if a strided 1x1 convolution has too few channels."""
    safe = SAFE_CHANNELS // Architecture.of(model).block.EXPANSION  # the second stage's is first
    if model.width >= safe:
        return []
    return [
        f"below width {safe} do not train the network in channels_last on a CPU: "
        "github.com/uxlfoundation/oneDNN/issues/6035"
    ]


def _content(kind: Format, config: Resolved, encoder: ResNet | Adapter, wishes: Wishes) -> bytes:
    if isinstance(encoder, Adapter):
        return foreign.content(kind, wishes.name, encoder, config.views.size)
    net = folded(encoder, config.model)
    if wishes.num_classes is not None:
        add_classifier(net, wishes.num_classes, config.train.seed)
    return kind.content(net, config.views.size)


def _weights_in(out: Path, kind: Format) -> Path:
    return out / WEIGHTS_FILE if kind.is_folder else out


def _card_of(out: Path, kind: Format) -> Path:
    return out / README if kind.is_folder else out.with_name(f"{out.name}.md")


def _default_out(run: Path, wishes: Wishes) -> Path:
    """Return ``RUN/exports/FILE``; for a checkpoint file it is ``STEM.exports/FILE`` beside it."""
    file = Path(FORMATS[wishes.name].file)
    if wishes.weights != "trained":
        file = file.with_name(f"{file.stem}-{wishes.weights}{file.suffix}")
    folder = run / "exports" if run.is_dir() else run.with_name(f"{run.stem}.exports")
    return folder / file


def _run_of(run_or_file: Path) -> Path | None:
    """Return the run folder that a checkpoint lies in, None where it lies elsewhere."""
    if run_or_file.is_dir():
        return run_or_file
    folder = run_or_file.absolute().parent
    is_run = folder.name == CHECKPOINTS and (folder.parent / CONFIG).is_file()
    return folder.parent if is_run else None


def _check_output(path: Path, kind: Format, *, overwrite: bool) -> None:
    """Raise UsageError if weights and card cannot be written, as a cheap check before any work."""
    if kind.suffix and path.suffix != kind.suffix:
        raise UsageError(f"{path}: torch.export loads files that end in {kind.suffix} alone")
    files = _weights_in(path, kind), _card_of(path, kind)
    if not kind.is_folder:
        for file in files:
            check_output(file, overwrite=overwrite)
        return
    if not path.is_dir():
        check_output(path, overwrite=False)
        return
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if others := sorted(names - {file.name for file in files}):
        raise UsageError(f"{path}: holds {others[0]}, which is no export: choose another name")
    for file in files:
        check_output(file, overwrite=overwrite)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make the folder ``path`` if there is none, and remove it again if the body raises."""
    try:
        is_new = not path.is_dir()
        if is_new:
            path.mkdir()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be made ({error.strerror}); name another place with --out"
        ) from None
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # somebody else uses it
                path.rmdir()
        raise


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, which is removed with all that is in it."""
    with writing(path):
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."[:64]))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _loaded(code: str, wishes: Wishes) -> Any:
    """Run the lines that users are shown, and return the encoder that they make of the file."""
    names: dict[str, Any] = {}
    # Constructors draw weights, and torch 2.11 warns of a buffer of its own.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile(code, "export", "exec"), names)
        except ValueError as error:  # of networks that ask a state dict for more than its tensors
            raise UsageError(
                f"--format {wishes.name}: the network cannot be loaded from such a file "
                f"({one_line(error)}): take torchvision or timm, whose network it is"
            ) from None
    if wishes.num_classes is not None:
        names["model"].fc = nn.Identity()
    return names["model"]


def _publish(files: Mapping[Path, Path], *, overwrite: bool) -> None:
    """Give each file its name, and take the names back if one of them fails and all are new."""
    with ExitStack() as undo:
        for source, target in files.items():
            if not target.parent.is_dir():
                with writing(target.parent):
                    target.parent.mkdir()
                undo.callback(target.parent.rmdir)
            publish(source, target, overwrite=overwrite)
            if not overwrite:
                undo.callback(target.unlink)
        undo.pop_all()
