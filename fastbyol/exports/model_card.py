"""The model card of an export: README.md in the form of Hugging Face's hub.

Names and settings come from outside. Here they end no line, and are no markup.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.config import Resolved
from fastbyol.errors import UsageError
from fastbyol.evaluation.progress import Accuracies
from fastbyol.exports.constructors import WIDTH
from fastbyol.exports.formats import Format
from fastbyol.exports.parity import Parity, data_name
from fastbyol.runs import differences, inputs
from fastbyol.runs.environment import env_of, package_version
from fastbyol.runs.folder import FIRST_WEIGHTS
from fastbyol.runs.metrics import METRICS_FILE, read_events
from fastbyol.text import printable

_MARKUP = re.compile(r"[\\`*_\[\]|~#@$:]")
# An identifier of SPDX; the hub knows them in small letters.
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
# Settings that may name a file.
_PATHS = ("data.train", "data.test", "train.init_from", "optim.replay_rates")
_WEIGHTS = {
    "trained": "the online network's",
    "target": "the target network's",
    "random": "random, as the run's seed drew them before the first step",
}


@dataclass(frozen=True)
class Facts:
    """What a card says.

    ``path`` is a run folder or a checkpoint; ``run`` is its run folder, None if it lies alone.
    """

    path: Path
    run: Path | None
    config: Resolved
    step: int
    kind: Format
    format: str
    weights: str
    licence: str | None
    num_classes: int | None
    embedding_dim: int
    parity: Parity
    code: str
    notes: Sequence[str]


def text(facts: Facts) -> str:
    """Return the card, in Markdown behind a head in YAML."""
    sections = {
        "Load it": [*_fenced("python", facts.code), "", *_interface(facts)],
        "Data": _data(facts),
        "Result": _result(facts),
        "Settings": _settings(facts),
        "Origin": _origin(facts),
    }
    lines = [
        *_head(facts),
        "",
        f"# {_network(facts)} encoder of {escaped((facts.run or facts.path).resolve().name)}",
        "",
        _about(facts),
    ]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def escaped(value: object) -> str:
    """Return a value as one line of Markdown that shows it as it is."""
    safe = html.escape(printable(str(value)), quote=False)
    return _MARKUP.sub(lambda match: f"\\{match[0]}", safe)


def _head(facts: Facts) -> list[str]:
    tags = ["byol", "self-supervised-learning", _architecture(facts), "fastbyol"]
    return [
        "---",
        *_licence(facts.licence),
        f"library_name: {_library(facts)}",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]


def _licence(licence: str | None) -> list[str]:
    if licence is not None and _IDENTIFIER.fullmatch(licence.strip()):
        # Quoted, as YAML reads some identifiers otherwise: 0BSD is none, but 1.0 is a number.
        return [f"license: {json.dumps(licence.strip().lower())}"]
    name = "unknown" if licence is None else printable(licence.strip())
    return ["license: other", f"license_name: {json.dumps(name, ensure_ascii=False)}"]


def _architecture(facts: Facts) -> str:
    """Return the name that libraries have for the network."""
    foreign = facts.config.model.foreign
    return facts.config.model.encoder if foreign is None else foreign[1]


def _network(facts: Facts) -> str:
    foreign = facts.config.model.foreign
    if foreign is None:
        return facts.config.model.encoder.replace("resnet", "ResNet-")
    return f"{escaped(foreign[1])} ({foreign[0]})"


def _library(facts: Facts) -> str:
    """Return Hugging Face's name for the library that loads the file."""
    foreign = facts.config.model.foreign
    return foreign[0] if foreign and facts.kind.is_state else facts.kind.library


def _an_encoder(facts: Facts) -> str:
    """Return the network as the begin of a sentence, with what was chosen of fastbyol's own."""
    model = facts.config.model
    if model.foreign is not None:
        return f"An encoder, {_network(facts)},"
    norms = {"bn": "batch norm", "gn": "group norm", "ln": "layer norm", "none": "no norm"}
    parts = [f"width {model.width}", norms[model.norm], f"the {model.stem} stem"]
    return f"A {_network(facts)} ({', '.join(parts)})"


def _about(facts: Facts) -> str:
    model, method = facts.config.model, facts.config.method.name
    folded = ""
    if model.ws:
        folded = " The run standardizes them before it uses them, and they are stored standardized."
    is_trained = facts.weights != "random"
    training = f"trained by {method} with fastbyol" if is_trained else "not trained"
    weights = _WEIGHTS[facts.weights] + (f", after step {facts.step}" if is_trained else "")
    licence = "" if facts.licence else " Its licence is not stated."
    return (
        f"{_an_encoder(facts)} for features of images, {training}. "
        f"The weights are {weights}.{folded}{licence}"
    )


def _interface(facts: Facts) -> list[str]:
    views, dim = facts.config.views, facts.embedding_dim
    size = views.size
    output = f"embeddings (N, {dim})"
    if facts.num_classes is not None:
        output = (
            f"(N, {facts.num_classes}), of an untrained classifier `fc` on embeddings of "
            f"{dim} numbers"
        )
    exactly = f"of {size} px exactly; N is free."
    sizes = {
        "torch-export": f"{exactly} It computes as in evaluation only.",
        "onnx": f"of {size} px in training; N, height and width are free.",
    }.get(facts.format, f"of {size} px in training; N and the size are free.")
    if facts.config.model.foreign is not None:  # which may have one size
        if facts.kind.is_state:
            sizes = (
                f"of {size} px in training; N is free, and the size if the network takes others."
            )
        elif facts.format == "onnx":
            sizes = exactly
    return [
        f"- Input: RGB images (N, 3, {size}, {size}), float32 in [0, 1], normalised with mean "
        f"{list(views.mean)} and standard deviation {list(views.std)}.",
        f"- Images are {sizes}",
        f"- Output: {output}, float32.",
        f"- Checked when it was written: {escaped(facts.parity.in_words())}.",
        *(f"- {escaped(note)}" for note in facts.notes),
    ]


def _data(facts: Facts) -> list[str]:
    data = facts.config.data
    pinned = inputs.of_run(facts.path)

    def line(what: str, name: str, limit: int, samples: int | None) -> str:
        count = "an unknown number of" if samples is None else str(min(limit or samples, samples))
        return f"- {what}: {escaped(data_name(name))}, {count} images"

    lines = [
        line("Training", data.train, data.limit, None if pinned is None else pinned.train.samples)
    ]
    test = None if pinned is None else pinned.test
    if test is not None or data.test is not None:
        name = data.test or data.train
        lines.append(line("Test", name, data.test_limit, None if test is None else test.samples))
    return lines


def _events(facts: Facts) -> list[dict[str, Any]]:
    """Return the run's events up to the exported step."""
    if facts.run is None or not (facts.run / METRICS_FILE).is_file():
        return []
    return [event for event in read_events(facts.run) if event["step"] <= facts.step]


def _result(facts: Facts) -> list[str]:
    events, train = _events(facts), facts.config.train
    epochs = [event for event in events if event["event"] == "epoch"]
    accuracies, done = Accuracies.of(events), epochs[-1]["epoch"] + 1 if epochs else 0
    protocol = f"{facts.config.probe.protocol} protocol of the run's probe, interval of 95 %"
    before = accuracies.untrained
    lines = [f"- Trained: {facts.step} steps, {done} of {train.epochs} epochs done"]
    if facts.weights == "random":
        lines = ["- Trained: not at all"]
    elif epochs:
        lines.append(f"- State: {escaped(epochs[-1]['state'])}, at the end of epoch {done}")
    else:
        lines.append("- State: not recorded")
    if facts.weights == "random":
        # A run that began with others' weights measured these.
        rows = [("Accuracy", before if accuracies.weights == Accuracies.weights else None)]
    else:
        of_online = " of the online network" if facts.weights == "target" else ""
        rows = [(f"Accuracy{of_online}", accuracies.last), (f"With {accuracies.weights}", before)]
    for name, value in rows:
        shown = "not measured" if value is None else f"{accuracies.shown(value)}; {protocol}"
        lines.append(f"- {name}: {shown}")
    if accuracies.num_scored:
        lines.append(f"- Scored on {accuracies.num_scored} images")
    return lines


def _settings(facts: Facts) -> list[str]:
    public = _public(facts.config)
    # No tag begins in it, whatever reads the page.
    every = config_io.dump(public).replace("<", "\\u003c")
    return [
        *_differences(public),
        "<details><summary>All settings</summary>",
        "",
        *_fenced("toml", every),
        "",
        "</details>",
    ]


def _differences(config: Resolved) -> Iterator[str]:
    try:
        rows = differences.against_preset(config)
    except UsageError:  # a preset of another version
        return
    preset = escaped(config.preset)
    if not rows:
        yield from (f"Those of the preset {preset}.", "")
        return
    yield from (f"What differs from the preset {preset}:", "", "| key | here | preset |")
    yield "|---|---|---|"
    for row in rows:
        here, there = (escaped(differences.text(value)) for value in (row.b, row.a))
        yield f"| `{row.key}` | {here} | {there} |"
    yield ""


def _public(config: Resolved) -> Resolved:
    """Return ``config`` without the folders in which files lie on the machine that trained."""
    names = {
        key: data_name(str(value))
        for key in _PATHS
        if (value := config_io.flatten(config)[key]) is not None
    }
    for key, name in names.items():
        section, _, leaf = key.partition(".")
        part = getattr(config, section).model_copy(update={leaf: name})
        config = config.model_copy(update={section: part})
    return config


def _origin(facts: Facts) -> list[str]:
    env = {} if facts.run is None else env_of(facts.run)
    named = ("fastbyol", "torch", "torchvision", "python")
    made = ", ".join(f"{name} {escaped(env[name])}" for name in named if env.get(name))
    libraries = ("fastbyol", "torch", "torchvision", "timm", "safetensors", "onnx", "onnxruntime")
    by = [facts.format, "fastbyol", "torch", "torchvision"]
    by += ["onnxruntime"] if facts.format == "onnx" else []
    by += [facts.config.model.foreign[0]] if facts.config.model.foreign else []
    versions = ((name, package_version(name)) for name in libraries if name in by)
    now = ", ".join(f"{name} {version}" for name, version in versions if version)
    model = facts.config.model
    keys = f"{_library(facts)}'s {_architecture(facts)}"
    if model.foreign is None:
        other = "" if model.width == WIDTH else ", whose width is another"
        keys = f"torchvision's {model.encoder}{other}"
    first = env.get(FIRST_WEIGHTS)
    began = []
    if isinstance(first, dict) and facts.weights != "random":
        source, names, digest = (first.get(key) for key in ("source", "names", "digest"))
        began = [
            f"- Began with: {escaped(data_name(str(source)))}, {escaped(first.get('matched'))} "
            f"tensors {escaped(names)}, digest {escaped(digest)}"
        ]
    return [
        *began,
        f"- Trained with: {made or 'not recorded'}",
        f"- Exported with: {now}",
        *([f"- Names of the weights: those of {keys}"] if facts.kind.is_state else []),
        "- Method: Grill et al., Bootstrap Your Own Latent, arXiv 2006.07733",
    ]


def _fenced(language: str, code: str) -> list[str]:
    return [f"```{language}", *code.rstrip("\n").split("\n"), "```"]
