"""Projector and predictor: linear, norm, relu, linear.

Source: the post's code (utils.MLP); byol's appendix J has the same shape with batch norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastbyol.config import HeadConfig
from fastbyol.errors import UsageError
from fastbyol.model.norm import make_norm, norm_relu
from fastbyol.model.standardizing import Linear


class Head(nn.Module):
    """An MLP (N, in_features) -> (N, ``config.out``); the result has the parameters' dtype.

    Linear layers have biases and torch's default initialisation. ``ws`` standardizes the first.
    """

    def __init__(
        self, config: HeadConfig, in_features: int, *, groups: int, num_views: int = 2
    ) -> None:
        super().__init__()
        if config.ws and in_features < 2:
            raise UsageError(
                "model: weight standardization of an MLP needs two input features or more, got 1: "
                "widen it"
            )
        self.linear1 = Linear(in_features, config.hidden, ws=config.ws)
        self.norm = make_norm(config.norm, config.hidden, groups=groups, num_views=num_views)
        self.linear2 = Linear(config.hidden, config.out)

    def forward(self, x: Tensor) -> Tensor:
        # fp32 under the bf16 policy, too: the products are a thousandth of the encoder's, and bf16
        # drowns the small differences between q and z' that carry the whole gradient after a
        # collapse. At a loss of 6e-8 gradients came out 2.6 times too long (median over layers)
        # and pointed elsewhere; with fp32 heads they were 3 % off. TF32 products alone are no way
        # out, split ones are: ``engine.heads`` (bench/LOG.md, "Heads by tf32x3").
        hidden = self.linear1(x.to(self.linear1.weight.dtype))
        result: Tensor = self.linear2(norm_relu(self.norm, hidden))
        return result
