"""The parts of the online and target networks."""

from __future__ import annotations

import pytest
import torch

from fastbyol.config import HeadConfig, ModelConfig, PredictorConfig
from fastbyol.errors import UsageError
from fastbyol.model.byol import Online, Target

TINY = ModelConfig(
    width=4, projector=HeadConfig(hidden=16, out=8), predictor=PredictorConfig(hidden=12, out=8)
)


def test_parameter_names() -> None:
    names = [n for n, _ in Online(TINY).named_parameters()]
    assert names[:3] == ["encoder.conv1.weight", "encoder.bn1.weight", "encoder.bn1.bias"]
    assert names[-12::6] == ["projector.linear1.weight", "predictor.linear1.weight"]
    target = Target(TINY)
    assert [n for n, _ in target.named_parameters()] == [
        n for n in names if not n.startswith("predictor.")
    ]
    assert not any(p.requires_grad for p in target.parameters())


def test_outputs_are_the_chain_of_parts() -> None:
    torch.manual_seed(0)
    online, target = Online(TINY), Target(TINY)
    target.load_state_dict(online.state_dict(), strict=False)
    x = torch.randn(8, 3, 16, 16)
    y, z, q = online(x)
    assert y.shape == (8, 32)
    assert z.shape == q.shape == (8, 8)
    # The same parameters and per-view statistics: the target's projections are the online ones.
    assert torch.equal(target(x), z)
    assert torch.equal(online.eval().predictor(z), online(x).q) is False


def test_each_view_has_its_own_statistics_in_every_norm() -> None:
    torch.manual_seed(0)
    online = Online(TINY)
    x = torch.randn(8, 3, 16, 16)
    moved = x.clone()
    moved[4:] = moved[4:] * 5 + 2
    for a, b in zip(online(x), online(moved), strict=True):
        torch.testing.assert_close(a[:4], b[:4], rtol=1e-6, atol=1e-6)


def test_predictor_must_map_onto_projections() -> None:
    config = TINY.model_copy(update={"predictor": PredictorConfig(hidden=12, out=9)})
    with pytest.raises(
        UsageError, match=r"model.predictor.out: 9 differs from model.projector.out = 8"
    ):
        Online(config)


def test_without_a_predictor_predictions_are_the_projections() -> None:
    """It has no parameters, its output size is ignored, and the other draws stay the same."""
    config = TINY.model_copy(update={"predictor": PredictorConfig(layers=0, out=9)})
    torch.manual_seed(0)
    with_one = dict(Online(TINY).named_parameters())
    torch.manual_seed(0)
    online = Online(config)
    output = online(torch.randn(8, 3, 16, 16))
    assert output.q is output.z
    own = dict(online.named_parameters())
    assert own.keys() == {name for name in with_one if not name.startswith("predictor.")}
    assert all(torch.equal(p, with_one[name]) for name, p in own.items())
