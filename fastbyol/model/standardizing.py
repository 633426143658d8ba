"""Layers that can standardize their weights: the base class and ``Linear``.

``engine.working_weights`` computes the weights of a whole network at once and lends them.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastbyol_kernels import tf32x3
from fastbyol_kernels.weight_standardization import weight_standardization


class Standardizing(nn.Module):
    """Base of convolutions and linear layers with a flag ``ws``: standardize the weights first.

    ``precomputed`` is the weight (O, I, ...) of the product, in its dtype and standardized if
    ``ws``. Where it is None the layer standardizes its own weight at every forward pass, on
    ``kernels``: auto, triton, cpu or reference.
    """

    weight: Tensor
    ws: bool = False
    precomputed: Tensor | None = None
    kernels: str = "auto"

    def used_weight(self) -> Tensor:
        """Return the weight (O, I, ...) that enters the product, standardized if ``ws`` is set."""
        if self.precomputed is not None:
            return self.precomputed
        if not self.ws:
            return self.weight
        return weight_standardization(self.weight, kernels=self.kernels)


class Linear(Standardizing, nn.Linear):
    """An ``nn.Linear`` whose weights are standardized first if ``ws`` is set.

    ``products`` are fp32 (the operands' dtype) or tf32x3 (``use_products``).
    """

    products: str = "fp32"

    def __init__(self, in_features: int, out_features: int, *, ws: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.ws = ws

    def forward(self, x: Tensor) -> Tensor:
        if self.products == "tf32x3":
            return tf32x3.linear(x, self.used_weight(), self.bias, kernels=self.kernels)
        return nn.functional.linear(x, self.used_weight(), self.bias)


def use_products(net: nn.Module, products: str) -> None:
    """Make the linear layers of ``net`` multiply by ``products``, fp32 or tf32x3."""
    for module in net.modules():
        if isinstance(module, Linear):
            module.products = products
