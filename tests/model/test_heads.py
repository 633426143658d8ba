"""The MLP heads against the same layers from torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastbyol.config import HeadConfig
from fastbyol.errors import UsageError
from fastbyol.model.heads import Head

THEIRS = {
    "bn": lambda: nn.BatchNorm1d(24),
    "ln": lambda: nn.LayerNorm(24),
    "gn": lambda: nn.GroupNorm(12, 24),
    "none": nn.Identity,
}


@pytest.mark.parametrize("norm", THEIRS)
@pytest.mark.parametrize("ws", [False, True])
def test_equals_torchs_layers(norm: str, ws: bool) -> None:
    torch.manual_seed(0)
    head = Head(
        HeadConfig.model_validate({"norm": norm, "hidden": 24, "out": 6, "ws": ws}),
        10,
        groups=32,
        num_views=1,
    )
    first, last = nn.Linear(10, 24), nn.Linear(24, 6)
    first.load_state_dict(head.linear1.state_dict())
    last.load_state_dict(head.linear2.state_dict())
    if ws:
        with torch.no_grad():
            w = first.weight - first.weight.mean(1, keepdim=True)
            first.weight.copy_(w / (w.std(1, keepdim=True) + 1e-5))
    x = torch.randn(8, 10)
    expected = last(nn.functional.relu(THEIRS[norm]()(first(x))))
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-6)


def test_names_and_initialisation_are_torchs() -> None:
    head = Head(HeadConfig(hidden=512, out=128), 512, groups=32)
    assert [n for n, _ in head.named_parameters()] == [
        "linear1.weight", "linear1.bias", "norm.weight", "norm.bias", "linear2.weight",
        "linear2.bias",
    ]  # fmt: skip
    for linear in (head.linear1, head.linear2):
        bound = linear.in_features**-0.5
        for p in linear.parameters():
            assert p.abs().max() <= bound
            # A uniform variable's std; four standard errors for 128 draws.
            assert abs(p.std().item() / (bound / 3**0.5) - 1) < 0.2


def test_bf16_input_is_multiplied_in_fp32() -> None:
    head = Head(HeadConfig(hidden=16, out=4, norm="gn"), 8, groups=32)
    x = torch.randn(4, 8).bfloat16()
    assert torch.equal(head(x), head(x.float()))


def test_weight_standardization_of_one_input_feature_is_refused() -> None:
    with pytest.raises(UsageError, match="two input features"):
        Head(HeadConfig(ws=True), 1, groups=32)
