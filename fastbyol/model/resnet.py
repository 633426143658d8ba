"""The encoder that trains: a ResNet with a choice of norm, weight standardization, width and stem.

Source: He et al., "Deep Residual Learning", arXiv:1512.03385. State-dict keys and shapes are
torchvision's; ``bn1`` is a norm of any kind. ``model.ordinary`` is the same network for export.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbyol.config import ModelConfig
from fastbyol.errors import check_choice
from fastbyol.model.adapter import Adapter, adapted
from fastbyol.model.convolution import convolve
from fastbyol.model.norm import make_norm, norm_relu, norm_relu_pool
from fastbyol.model.standardizing import Standardizing
from fastbyol_kernels.views.blocks import CHANNELS, IMAGE_BORDER, KERNEL_BORDER, in_blocks

STEMS = ("torchvision", "small")  # small is the CIFAR form: 3x3, stride 1, no pooling


class Conv2d(Standardizing, nn.Conv2d):
    """A convolution without bias, padded by half the kernel; weights standardized if ``ws`` is set.

    The product is in the input's dtype, the weights keep their own. Initialised kaiming normal, fan
    out, like torchvision's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        ws: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.ws = ws

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.used_weight().to(x.dtype), self.stride[0], self.kernel_size[0] // 2)


class StemConv2d(Conv2d):
    """The first convolution, 7x7 with stride 2, of images (N, 3, S, S) or the same in blocks.

    Views in blocks of 2x2 pixels (``fastbyol_kernels.views.blocks``) have 16 channels, by which
    they are recognised. The weight is rearranged for them at every forward pass, unless that which
    is ``precomputed`` already is.
    """

    def __init__(self, out_channels: int, *, ws: bool) -> None:
        super().__init__(3, out_channels, 7, stride=2, ws=ws)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.used_weight().to(x.dtype)
        if CHANNELS not in (x.shape[1], weight.shape[1]):
            return super().forward(x)
        if x.shape[1] != CHANNELS:
            x = in_blocks(x, IMAGE_BORDER)
        if weight.shape[1] != CHANNELS:
            weight = in_blocks(weight, KERNEL_BORDER)
        return convolve(x, weight, 1, 0)


class BasicBlock(nn.Module):
    """A residual block: conv, norm, relu, conv, norm, plus the input, relu.

    A strided 1x1 convolution and a norm fit the input to the output where the shape changes.
    """

    EXPANSION = 1

    def __init__(
        self, config: ModelConfig, in_channels: int, channels: int, stride: int, num_views: int
    ) -> None:
        super().__init__()
        norm = partial(make_norm, config.norm, groups=config.groups, num_views=num_views)
        self.conv1 = Conv2d(in_channels, channels, 3, stride=stride, ws=config.ws)
        self.bn1 = norm(channels)
        self.conv2 = Conv2d(channels, channels, 3, ws=config.ws)
        self.bn2 = norm(channels)
        self.downsample = _downsample(config, norm, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(
            self.bn2, self.conv2(out), x if self.downsample is None else self.downsample(x)
        )


class Bottleneck(nn.Module):
    """A residual block of a 1x1, a 3x3 and a 1x1 convolution, the last with 4 times the channels.

    The 3x3 convolution strides, as in torchvision and timm. In the paper it is the first one.
    """

    EXPANSION = 4

    def __init__(
        self, config: ModelConfig, in_channels: int, channels: int, stride: int, num_views: int
    ) -> None:
        super().__init__()
        norm = partial(make_norm, config.norm, groups=config.groups, num_views=num_views)
        out_channels = self.EXPANSION * channels
        self.conv1 = Conv2d(in_channels, channels, 1, ws=config.ws)
        self.bn1 = norm(channels)
        self.conv2 = Conv2d(channels, channels, 3, stride=stride, ws=config.ws)
        self.bn2 = norm(channels)
        self.conv3 = Conv2d(channels, out_channels, 1, ws=config.ws)
        self.bn3 = norm(out_channels)
        self.downsample = _downsample(config, norm, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        out = norm_relu(self.bn2, self.conv2(out))
        return norm_relu(
            self.bn3, self.conv3(out), x if self.downsample is None else self.downsample(x)
        )


class Architecture(NamedTuple):
    """An architecture of He et al., table 1. Its blocks are named as torchvision's and timm's."""

    block: type[BasicBlock | Bottleneck]
    blocks_per_stage: tuple[int, int, int, int]

    @staticmethod
    def of(config: ModelConfig) -> Architecture:
        """Return the architecture that ``config`` names. Raises UsageError for another word."""
        check_choice("encoder", config.encoder, ARCHITECTURES)
        return ARCHITECTURES[config.encoder]

    def embedding_dim(self, width: int) -> int:
        """Return the channels of the last stage, of a network whose first stage has ``width``."""
        return self.block.EXPANSION * width << len(self.blocks_per_stage) - 1


ARCHITECTURES = {
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """The encoder: images (N, 3, S, S) -> embeddings y (N, ``embedding_dim``).

    Channels-last throughout; embeddings are fp32, for fp64 images fp64. ``use_kernels`` sets
    ``kernels``. The torchvision stem takes images in blocks, too (``StemConv2d``).
    """

    def __init__(self, config: ModelConfig, num_views: int) -> None:
        super().__init__()
        width = config.width
        check_choice("stem", config.stem, STEMS)
        block_type, blocks_per_stage = architecture = Architecture.of(config)
        self.embedding_dim = architecture.embedding_dim(width)
        self.pools, self.kernels = config.stem == "torchvision", "auto"
        self.conv1 = (
            StemConv2d(width, ws=config.ws) if self.pools else Conv2d(3, width, 3, ws=config.ws)
        )
        self.bn1 = make_norm(config.norm, width, groups=config.groups, num_views=num_views)
        channels = width
        for stage, num_blocks in enumerate(blocks_per_stage):
            blocks = nn.Sequential()
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(block_type(config, channels, width << stage, stride, num_views))
                channels = block_type.EXPANSION * width << stage
            self.add_module(f"layer{stage + 1}", blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(x)
        x = norm_relu_pool(self.bn1, x, self.kernels) if self.pools else norm_relu(self.bn1, x)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean(
            dim=(2, 3), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
        )


def _downsample(
    config: ModelConfig,
    norm: Callable[[int], nn.Module],
    in_channels: int,
    out_channels: int,
    stride: int,
) -> nn.Module | None:
    """Make what fits a block's input to its output; None where they have one shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = Conv2d(in_channels, out_channels, 1, stride=stride, ws=config.ws)
    return nn.Sequential(conv, norm(out_channels))


def build_encoder(
    config: ModelConfig, *, num_views: int = 2, image_size: int | None = None
) -> ResNet | Adapter:
    """Make an encoder with channels-last weights from torch's global generator.

    In train mode batch norm takes its statistics from each of ``num_views`` equal consecutive parts
    of the batch; 1 is plain supervised training. ``image_size`` matters to networks of other
    libraries alone (``model.adapter``).
    """
    if config.foreign is not None:
        return adapted(config, num_views=num_views, image_size=image_size)
    return ResNet(config, num_views).to(memory_format=torch.channels_last)
