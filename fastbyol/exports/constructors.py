"""Python that loads an export, shown to users and run to check what was written.

It defines ``model``, which maps normalised images (N, 3, S, S) to embeddings (N, D) or, with a
classifier, to one output a class.
"""

from __future__ import annotations

from fastbyol.config import ModelConfig
from fastbyol.errors import UsageError
from fastbyol.exports import foreign
from fastbyol.model.adapter import Recipe
from fastbyol.model.norm import num_groups
from fastbyol.model.resnet import Architecture
from fastbyol_kernels.group_norm import EPS

# Of the ResNets that torchvision and timm have by name.
WIDTH = 64

_STATE_DICT = {
    "torchvision": ("", "torch.load({file}, weights_only=True)"),
    "timm": ("", "torch.load({file}, weights_only=True)"),
    "safetensors": ("from safetensors.torch import load_file\n", "load_file({file})"),
}
_ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession({file}, providers=["CPUExecutionProvider"])


def model(images):  # float32 arrays of numpy
    return session.run(None, {{"images": images}})[0]
"""
_TORCH_EXPORT = """\
import torch

model = torch.export.load({file}).module()
"""


def code(
    name: str,
    config: ModelConfig,
    file: str,
    num_classes: int | None = None,
    recipe: Recipe | None = None,
) -> str:
    """Return the lines that load ``file``, an export in the format ``name``.

    ``recipe`` is that of an encoder of another library, None of fastbyol's own.

    Raises UsageError where no constructor of the library fits the network.
    """
    # Whatever the name is made of, it ends neither the literal nor a page that shows it.
    literal = ascii(file).replace("<", "\\x3c")
    lines = None if recipe is None else foreign.construction(name, recipe, num_classes)
    if name == "onnx":
        return _ONNX.format(file=literal)
    if name == "torch-export":
        return _TORCH_EXPORT.format(file=literal)
    imports, state = _STATE_DICT[name]
    make = _timm if name == "timm" else _torchvision
    imported, construction = lines or make(config, num_classes)
    return (
        f"import torch\n{imports}from torch import nn\n{imported}\n{construction}"
        f"model.load_state_dict({state.format(file=literal)})\nmodel.eval()\n"
    )


def _torchvision(config: ModelConfig, num_classes: int | None) -> tuple[str, str]:
    """Return the imports and the construction of torchvision's network."""
    width, norm, name = config.width, _norm(config), config.encoder
    if width == WIDTH:
        arguments = [] if num_classes is None else [f"num_classes={num_classes}"]
        arguments += ["norm_layer=norm"] if norm else []
        lines = [f"model = {name}({', '.join(arguments)})", *_small_stem(config)]
        lines += ["model.fc = nn.Identity()"] if num_classes is None else []
        return f"from torchvision.models import {name}\n", _joined(norm, lines)
    architecture = Architecture.of(config)
    block, depths = architecture.block.__name__, list(architecture.blocks_per_stage)
    stages = list(zip(_channels(config), depths, strict=True))
    layer = f"model._make_layer({block}, channels, depth, stride=1 if stage == 1 else 2)"
    dim = architecture.embedding_dim(width)
    classes = "nn.Identity()" if num_classes is None else f"nn.Linear({dim}, {num_classes})"
    lines = [
        # Made for width 64 first, whose channels some numbers of groups do not divide.
        f"model = ResNet({block}, {depths})",
        f"model.inplanes, model._norm_layer = {width}, norm",
        *(
            _small_stem(config)
            or [f"model.conv1 = nn.Conv2d(3, {width}, 7, stride=2, padding=3, bias=False)"]
        ),
        f"model.bn1 = norm({width})",
        f"for stage, (channels, depth) in enumerate({stages}, 1):",
        f'    setattr(model, f"layer{{stage}}", {layer})',
        f"model.fc = {classes}",
    ]
    imports = f"from torchvision.models.resnet import {block}, ResNet\n"
    return imports, _joined(norm or "norm = nn.BatchNorm2d\n", lines)


def _timm(config: ModelConfig, num_classes: int | None) -> tuple[str, str]:
    """Return the imports and the construction of timm's network."""
    if config.width != WIDTH:
        raise UsageError(
            f"--format timm: timm's {config.encoder} has width {WIDTH}, this encoder "
            f"{config.width}: take --format torchvision, safetensors, onnx or torch-export"
        )
    norm = _norm(config)
    choice = ", norm_layer=norm" if norm else ""
    classes = f"num_classes={num_classes or 0}"
    lines = [f'model = timm.create_model("{config.encoder}", {classes}{choice})']
    return "import timm\n", _joined(norm, [*lines, *_small_stem(config)])


def _joined(norm: str, lines: list[str]) -> str:
    return norm + "\n".join(lines) + "\n"


def _norm(config: ModelConfig) -> str:
    """Return the definition of ``norm``; empty for batch norm, which is the libraries' own.

    timm passes ``device`` and ``dtype``, older versions of it and torchvision nothing.
    """
    if config.norm == "bn":
        return ""
    if config.norm == "none":
        return "\ndef norm(channels, **options):\n    return nn.Identity()\n\n\n"
    expansion = Architecture.of(config).block.EXPANSION
    sizes = sorted({factor * size for size in _channels(config) for factor in (1, expansion)})
    groups = {size: num_groups(size, config.groups) if config.norm == "gn" else 1 for size in sizes}
    first = groups[config.width]
    number = str(first) if set(groups.values()) == {first} else f"{groups}[channels]"
    made = f"nn.GroupNorm({number}, channels, eps={EPS}, **options)"
    return f"\ndef norm(channels, **options):\n    return {made}\n\n\n"


def _channels(config: ModelConfig) -> list[int]:
    """Return the channels inside the blocks of each stage."""
    num_stages = len(Architecture.of(config).blocks_per_stage)
    return [config.width << stage for stage in range(num_stages)]


def _small_stem(config: ModelConfig) -> list[str]:
    if config.stem != "small":
        return []
    return [
        f"model.conv1 = nn.Conv2d(3, {config.width}, 3, padding=1, bias=False)",
        "model.maxpool = nn.Identity()",
    ]
