"""Layers whose weights may be standardized: by themselves, or by someone who does it for the whole network at once.

Letters: O output channels, I input channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastbyol_kernels.weight_standardization import weight_standardization


class Standardizing(nn.Module):
    """What convolutions and linear layers with a flag ``ws`` share.

    ``given`` is the standardized weight in the dtype of the product, where someone made it for all layers of a network in one
    launch (``engine.standardized``); None lets the layer standardize its own at every forward, on ``kernels``, which is what
    ``weight_standardization`` takes.
    """

    weight: Tensor
    ws: bool = False
    given: Tensor | None = None
    kernels: str = "auto"

    def used_weight(self) -> Tensor:
        """The weight (O, I, ...) that the product takes: as it is, or standardized where ``ws`` says so."""
        if not self.ws:
            return self.weight
        return weight_standardization(self.weight, kernels=self.kernels) if self.given is None else self.given


class Linear(Standardizing, nn.Linear):
    """``nn.Linear`` whose weights are standardized first where ``ws`` says so."""

    def __init__(self, in_features: int, out_features: int, *, ws: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.ws = ws

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.used_weight(), self.bias)
