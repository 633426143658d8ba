"""The encoder for export: torchvision's ResNet of torch's own modules and operations alone.

It has the function and the state dict of ``model.resnet``, which trains, and can be traced,
scripted, exported, pickled and fine-tuned. Users' pickles name these classes: do not rename them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet as torchvisions

from fastbyol.config import ModelConfig, NormName
from fastbyol.errors import check_choice
from fastbyol.model.convolution import SAFE_CHANNELS
from fastbyol.model.norm import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM, num_groups
from fastbyol.model.resnet import STEMS, Architecture, ResNet
from fastbyol_kernels import group_norm, weight_standardization


class Conv2d(nn.Conv2d):
    """A convolution that standardizes its weights first (``ws``) or subsamples (``picks``).

    It subsamples its input instead of striding: see ``model.convolution.SAFE_CHANNELS``.
    """

    def __init__(self, like: nn.Conv2d, *, ws: bool) -> None:
        size, stride = like.kernel_size[0], like.stride[0]
        super().__init__(like.in_channels, like.out_channels, size, stride, size // 2, bias=False)
        self.ws, self.picks = ws, _picks(like)
        self.scale = float(max(like.in_channels * size * size - 1, 1)) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.ws:  # the formula of fastbyol_kernels.weight_standardization
            weight = weight - weight.mean([1, 2, 3], keepdim=True)
            std = torch.linalg.vector_norm(weight, dim=[1, 2, 3], keepdim=True) * self.scale
            weight = weight / (std + weight_standardization.EPS)
        if self.picks:
            return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], weight)
        return F.conv2d(x, weight, None, self.stride, self.padding)


class Encoder(torchvisions.ResNet):  # type: ignore[misc]
    """A ResNet (N, 3, S, S) -> embeddings y (N, ``embedding_dim``), in the parameters' dtype.

    Batch norm is over the whole batch. ``fc`` is an identity that a classifier may replace.
    """

    def __init__(self, config: ModelConfig) -> None:
        check_choice("stem", config.stem, STEMS)
        norm, width = partial(_norm, config.norm, config.groups), config.width
        architecture = Architecture.of(config)
        block_type = getattr(torchvisions, architecture.block.__name__)
        super().__init__(block_type, list(architecture.blocks_per_stage), norm_layer=norm)
        self.embedding_dim = architecture.embedding_dim(width)
        self.inplanes = width
        if config.stem == "torchvision":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1, self.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
        self.bn1, self.fc = norm(width), nn.Identity()
        for stage, num_blocks in enumerate(architecture.blocks_per_stage):
            blocks = self._make_layer(
                block_type, width << stage, num_blocks, stride=2 if stage else 1
            )
            self.add_module(f"layer{stage + 1}", blocks)
        del self._norm_layer  # else pickling and scripting meet our function
        for parent in list(self.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Conv2d) and (config.ws or _picks(layer)):
                    setattr(parent, name, Conv2d(layer, ws=config.ws))


def ordinary(encoder: ResNet, config: ModelConfig) -> Encoder:
    """Copy ``encoder``, made with ``config``, into an ``Encoder`` in eval mode, all trainable."""
    with torch.device("meta"):  # draws nothing and allocates no weights twice
        twin = Encoder(config)
    # The encoder's weights are views of a run's flat buffers, hence the copies.
    state = {
        name: t.clone(memory_format=torch.contiguous_format)
        for name, t in encoder.state_dict().items()
    }
    twin.load_state_dict(state, assign=True)
    twin.requires_grad_().eval()
    return twin


def _norm(name: NormName, groups: int, channels: int) -> nn.Module:
    """Make torch's own module for the norm that ``model.norm.make_norm`` makes."""
    if name == "bn":
        return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)
    if name == "none":
        return nn.Identity()
    check_choice("norm", name, ("bn", "gn", "ln", "none"))
    return nn.GroupNorm(
        num_groups(channels, groups) if name == "gn" else 1, channels, eps=group_norm.EPS
    )


def _picks(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels < SAFE_CHANNELS
    )
