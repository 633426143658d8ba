"""Tuned eager PyTorch: the best that it does without fused operations or graphs, as a peer.

It uses torchvision's ResNets, bf16 by autocast, channels-last memory, and torch's multi-tensor
operations for SGD and the moving average.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbyol_bench.blog_path import distance, mlp

GROUPS = 32
WS_EPS = 1e-5


class StandardizedConv2d(nn.Conv2d):
    """A convolution that standardizes its weights per output channel at every call."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        std, mean = torch.std_mean(rows, 1, keepdim=True)
        weight = ((rows - mean) / (std + WS_EPS)).view_as(self.weight)
        return F.conv2d(x, weight, None, self.stride, self.padding)


def encoder(norm: str, ws: bool, name: str = "resnet18") -> Any:
    """Return torchvision's ``name`` with ``norm`` bn or gn, and standardized weights if ``ws``."""
    from torchvision import models

    layer = nn.BatchNorm2d if norm == "bn" else lambda channels: nn.GroupNorm(GROUPS, channels)
    net: Any = getattr(models, name)(norm_layer=layer)
    if ws:
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.__class__ = StandardizedConv2d
    return net


class ForeachLars:
    """LARS on torch's multi-tensor operations.

    The rate is lr eta |w| / (|g| + wd |w|), or 0 if |w| is 0.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        eta: float,
    ) -> None:
        self.parameters = parameters
        self.buffers = [torch.zeros_like(p) for p in parameters]
        self.lr, self.momentum, self.weight_decay, self.eta = lr, momentum, weight_decay, eta

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters in place, without reading from the device."""
        gradients: list[Tensor] = [p.grad for p in self.parameters]  # type: ignore[misc]
        weight, grad = (
            torch.stack(torch._foreach_norm(tensors)) for tensors in (self.parameters, gradients)
        )
        scale = grad + self.weight_decay * weight
        rates = torch.where(scale > 0, self.lr * self.eta * weight / scale, 0.0).unbind()
        update = torch._foreach_add(gradients, self.parameters, alpha=self.weight_decay)
        torch._foreach_mul_(update, rates)
        torch._foreach_mul_(self.buffers, self.momentum)
        torch._foreach_add_(self.buffers, update)
        torch._foreach_sub_(self.parameters, self.buffers)


@dataclass
class EagerPeer:
    """The networks, the optimizer and the step of the peer."""

    online: nn.Module
    predictor: nn.Module
    target: nn.Module
    optimizer: Any
    autocast: bool
    forward: Callable[[Tensor, Tensor], Tensor]
    tau: float = 0.996

    @staticmethod
    def create(
        *,
        optimizer: str = "sgd",
        norm: str = "bn",
        ws: bool = False,
        bf16: bool = True,
        compiled: bool = False,
        device: torch.device | str = "cpu",
        network: str = "resnet18",
    ) -> EagerPeer:
        """Build the peer with ``optimizer`` sgd (lr 0.8, wd 1e-4) or lars (lr 0.2, wd 1.5e-6).

        With ``compiled``, torch.compile runs the forward passes.
        """
        online, predictor = encoder(norm, ws, network), mlp(128, 512, 128, norm=True)
        online.fc = mlp(online.fc.in_features, 512, 128, norm=True)
        for module in (online, predictor):
            module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        target = copy.deepcopy(online).requires_grad_(False)
        parameters: list[Any] = [*online.parameters(), *predictor.parameters()]
        made: Any
        if optimizer == "lars":
            made = ForeachLars(parameters, lr=0.2, momentum=0.9, weight_decay=1.5e-6, eta=1e-3)
        else:
            # Fused on a GPU, which is the faster of the two there.
            on_gpu = torch.device(device).type == "cuda"
            made = torch.optim.SGD(
                parameters,
                lr=0.8,
                momentum=0.9,
                weight_decay=1e-4,
                foreach=not on_gpu,
                fused=on_gpu,
            )
        peer = EagerPeer(online, predictor, target, made, bf16, lambda view, other: view)
        peer.forward = torch.compile(peer.loss) if compiled else peer.loss
        return peer

    def loss(self, view: Tensor, other: Tensor) -> Tensor:
        """Return the loss, 0-d, from a forward pass of all networks on each view."""
        # A pass per view: two views in one BatchNorm would be another method.
        q, q_other = self.predictor(self.online(view)), self.predictor(self.online(other))
        with torch.no_grad():
            z, z_other = self.target(view), self.target(other)
        return distance(_wide(q), _wide(z_other)) + distance(_wide(q_other), _wide(z))

    def step(self, views: Tensor) -> Tensor:
        """Train on views (2, B, 3, S, S) and return the loss, which stays on the device."""
        view, other = (v.contiguous(memory_format=torch.channels_last) for v in views)
        with torch.autocast(view.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.forward(view, other)
        self.follow()
        for p in (*self.online.parameters(), *self.predictor.parameters()):
            p.grad = None
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the target towards the online network, all parameters at once."""
        torch._foreach_lerp_(
            list(self.target.parameters()), list(self.online.parameters()), 1.0 - self.tau
        )


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def step_flop(size: int, network: str = "resnet18") -> int:
    """Return the floating-point operations of one image's step of ``network`` at ``size`` pixels.

    They cover both views, the forward and backward passes, and the target's forward pass. torch
    counts convolutions and matrix products, here on two images.
    """
    from torch.utils.flop_counter import FlopCounterMode

    peer = EagerPeer.create(bf16=False, network=network)
    counter = FlopCounterMode(display=False)
    with counter:
        peer.step(torch.randn(2, 2, 3, size, size))
    return int(counter.get_total_flops()) // 2
