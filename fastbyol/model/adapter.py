"""Any feature extractor of timm or torchvision as the encoder, as the library builds it.

Its operations are the library's own: none is fused, and each view is a pass of its own, as in the
post's code. So batch norm's statistics are those of a view, whatever the library calls its norms.
Its rates of dropout and stochastic depth are 0: a step's bits would depend on what was drawn
before it, and with them those of a resumed run.
Letters: V views, N images, S pixels, D features.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbyol.config import ModelConfig
from fastbyol.errors import UsageError, nearest, one_line
from fastbyol.model.convolution import SAFE_CHANNELS

# The extra of pyproject.toml that brings a library; None where fastbyol itself needs it.
LIBRARIES: Mapping[str, str | None] = {"timm": "timm", "torchvision": None}
# torchvision's classifiers have so many classes.
NUM_CLASSES = 1000
# Pixels of a side where neither a run nor a network names a size.
DEFAULT_SIZE = 224
# torchvision's networks that are built for one size of images; timm's all call it img_size.
_SIZED: tuple[tuple[str, Callable[[int], dict[str, Any]]], ...] = (
    ("vit_", lambda size: {"image_size": size}),
    ("maxvit", lambda size: {"input_size": (size, size)}),
)
# Those with classifiers beside the last one, and a warning about how they draw weights.
_AUXILIARY = ("googlenet", "inception_v3")
# What modules of dropout and stochastic depth call their rates.
_RATES = ("p", "prob")


class Recipe(NamedTuple):
    """What makes a library's network: keyword arguments of its constructor, and its classifier.

    ``classifier`` is the path of the module that an identity replaces, empty where there is none.
    """

    library: str
    name: str
    options: Mapping[str, Any]
    classifier: str = ""

    def build(self) -> nn.Module:
        """Build the network, on the cpu, with weights drawn from torch's global generator."""
        # On the cpu also where shapes alone are asked for: constructors compute with tensors.
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.library == "timm":
                import timm

                return timm.create_model(self.name, **self.options)  # type: ignore[no-any-return]
            from torchvision import models

            net: nn.Module = models.get_model(self.name, **self.options)
            if self.classifier:
                net.set_submodule(self.classifier, nn.Identity())
            return net


class Adapter(nn.Module):
    """A library's network: images (N, 3, S, S) -> its features y (N, ``embedding_dim``).

    Channels-last; embeddings are fp32, for fp64 images fp64. bf16 images make it run under torch's
    autocast. In train mode the batch is ``num_views`` equal consecutive parts, each a pass.
    ``net`` is the library's network, made by ``recipe``; what it does not train is a buffer there.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, num_views: int, embedding_dim: int) -> None:
        super().__init__()
        self.net, self.recipe = net, recipe
        self.num_views, self.embedding_dim = num_views, embedding_dim

    @property
    def has_batch_norm(self) -> bool:
        """Whether it takes statistics over the batch, which running averages show."""
        return any(name.endswith("running_var") for name, _ in self.net.named_buffers())

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        parts = torch.unflatten(x, 0, (self.num_views, -1)).unbind() if self.training else (x,)
        is_rounded = x.dtype == torch.bfloat16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=is_rounded):
            y = [self.net(part.float() if is_rounded else part) for part in parts]
        embeddings = torch.cat(y) if len(y) > 1 else y[0]
        return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


def check_name(config: ModelConfig) -> None:
    """Raise UsageError if the encoder of ``config`` is no network of its library.

    Its network is not built. fastbyol's own encoders pass.
    """
    if config.foreign is None:
        return
    library, name = config.foreign
    names = network_names(library)
    if name not in names:
        if library == "timm" and name.partition(".")[0] in names:
            raise UsageError(
                f"model.encoder: {config.encoder}: its tag names weights, which --init-from "
                f"begins with: take timm:{name.partition('.')[0]}"
            )
        near = [f"{library}:{each}" for each in nearest(name, names, most=3, least=0.5)]
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UsageError(
            f"model.encoder: {config.encoder}: {library} {_version(library)} has no such network "
            f"for images{hint}"
        )


def adapted(config: ModelConfig, *, num_views: int, image_size: int | None) -> Adapter:
    """Build the library's network of ``config`` for training on images of ``image_size`` pixels.

    Its weights are drawn from torch's global generator, on the cpu. A network of one size of images
    is built for ``image_size``, by default its library's own. It is tried on two images. Raises
    UsageError as ``check_name``, and for a network that does not take that size, gives no features
    (N, D), draws random numbers in a pass, or changes buffers that are no running averages.
    """
    check_name(config)
    assert config.foreign is not None
    library, name = config.foreign
    try:
        net, recipe = (_of_timm if library == "timm" else _of_torchvision)(name, image_size)
    except Exception as error:
        raise _unfit(config, image_size, one_line(error)) from error
    _stop_draws(net)
    _freeze(net)
    _subsample(net)
    net.to(memory_format=torch.channels_last)
    size = image_size or _own_size(net) or DEFAULT_SIZE
    return Adapter(net, recipe, num_views, _try(net, config, size))


def library_network(encoder: Adapter) -> nn.Module:
    """Copy ``encoder`` into its library's own network, in eval mode, all trainable."""
    with torch.random.fork_rng(devices=[]):
        net = encoder.recipe.build()
    # Its dict has the versions of modules beside the tensors, which some of them ask for.
    state = encoder.net.state_dict()
    for name, t in state.items():  # views of a run's flat buffers, hence the copies
        state[name] = t.clone(memory_format=torch.contiguous_format)
    net.load_state_dict(state)
    return net.eval()


def refuse_global(config: ModelConfig, encoder: nn.Module) -> None:
    """Raise UsageError if ``encoder`` has batch norms of a library, which know one rank's share."""
    if isinstance(encoder, Adapter) and encoder.has_batch_norm:
        raise UsageError(
            f"model.norm_scope: the batch norms of {config.encoder} cannot take their statistics "
            "over several ranks: set it to rank, or train on one rank"
        )


def network_names(library: str) -> list[str]:
    """Return the names of a library's networks for images.

    Raises UsageError where it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(library)
    except ImportError:
        extra = LIBRARIES[library]
        what = library if extra is None else f"'fastbyol[{extra}]'"
        raise UsageError(f"model.encoder: {library} is not installed: pip install {what}") from None
    if library == "timm":
        return list(module.list_models())
    return list(module.models.list_models(module=module.models))


def _version(library: str) -> str:
    return str(importlib.import_module(library).__version__)


def _of_timm(name: str, image_size: int | None) -> tuple[nn.Module, Recipe]:
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0}
    if image_size is not None:
        sized = Recipe("timm", name, options | {"img_size": image_size})
        try:
            return sized.build(), sized
        except TypeError as error:  # of a constructor without the word, before it draws anything
            if "img_size" not in str(error):
                raise
    recipe = Recipe("timm", name, options)
    return recipe.build(), recipe


def _of_torchvision(name: str, image_size: int | None) -> tuple[nn.Module, Recipe]:
    """Build a network without its classifier, the last layer that gives as many as the classes."""
    options: dict[str, Any] = {"weights": None}
    if name in _AUXILIARY:
        options |= {"aux_logits": False, "init_weights": True}
    if image_size is not None:
        for start, sized in _SIZED:
            options |= sized(image_size) if name.startswith(start) else {}
    recipe = Recipe("torchvision", name, options)
    net = recipe.build()
    *_, classifier = (
        path
        for path, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == NUM_CLASSES
    )
    net.set_submodule(classifier, nn.Identity())
    return net, recipe._replace(classifier=classifier)


def _stop_draws(net: nn.Module) -> None:
    """Set the rates of dropout, stochastic depth and the like to 0, wherever a module keeps one."""
    for module in net.modules():
        kind = type(module).__name__
        is_drop = "Drop" in kind or kind == "StochasticDepth"
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (is_drop and name in _RATES)):
                setattr(module, name, 0.0)


def _freeze(net: nn.Module) -> None:
    """Turn parameters that take no gradient into buffers: weight decay would change them."""
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def _subsample(net: nn.Module) -> None:
    """Make strided 1x1 convolutions of few channels take pixels from their input instead.

    ``model.convolution.SAFE_CHANNELS`` says why. Names and weights stay.
    """
    for module in net.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and module.padding == (0, 0)
            and module.stride != (1, 1)
            and module.in_channels < SAFE_CHANNELS
        ):
            module.register_forward_pre_hook(_picks(*module.stride))
            module.stride = (1, 1)


def _picks(rows: int, columns: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    return lambda _, inputs: inputs[0][:, :, ::rows, ::columns]


@torch.no_grad()
def _try(net: nn.Module, config: ModelConfig, size: int) -> int:
    """Return the length of an embedding, of a pass over two images in train and in eval mode.

    Restores what they changed.
    """
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    draws = torch.default_generator.get_state()
    shapes = set[tuple[int, ...]]()
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = torch.linspace(-1.0, 1.0, 6 * size * size).view(2, 3, size, size)
        for is_training in (True, False):
            try:
                y = net.train(is_training)(images.contiguous(memory_format=torch.channels_last))
            except Exception as error:
                raise _unfit(config, size, one_line(error)) from error
            if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != 2:
                what = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
                raise UsageError(
                    f"model.encoder: {config.encoder} gives {what} for two images, and no "
                    "features (2, D): take another"
                )
            if not bool(y.isfinite().all()):
                raise _unfit(config, size, "its features are not finite")
            shapes.add(tuple(y.shape))
    net.train()
    if len(shapes) > 1:
        raise UsageError(
            f"model.encoder: {config.encoder} gives features of {' and '.join(map(str, shapes))} "
            "in training and in evaluation: take another"
        )
    if not torch.equal(draws, torch.default_generator.get_state()):
        raise UsageError(
            f"model.encoder: {config.encoder} draws random numbers in a pass, so that no run of "
            "it could be resumed bit for bit: take another"
        )
    for name, buffer in net.named_buffers():
        is_average = name.rpartition(".")[2].startswith("running_")
        if buffer.is_floating_point() and not is_average and not torch.equal(buffer, before[name]):
            raise UsageError(
                f"model.encoder: {config.encoder} changes {name} in a pass, which is no running "
                "average: take another"
            )
        buffer.copy_(before[name])
    return shapes.pop()[1]


def _own_size(net: nn.Module) -> int | None:
    """Return the size of images that timm names for a network, None where it names none."""
    described = getattr(net, "pretrained_cfg", None) or {}
    size = described.get("input_size") if isinstance(described, Mapping) else None
    return int(size[-1]) if size else None


def _unfit(config: ModelConfig, size: int | None, reason: str) -> UsageError:
    return UsageError(
        f"model.encoder: {config.encoder} does not work on views of {size or 'its own'} px "
        f"({reason}): set another views.size, or take another encoder"
    )
