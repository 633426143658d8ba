"""The parameters that a configuration makes adapt, decay and move faster."""

from __future__ import annotations

import pytest

from fastbyol.config import HeadConfig, ModelConfig, OptimConfig, PredictorConfig
from fastbyol.errors import UsageError
from fastbyol.model.byol import Online
from fastbyol.optim.lars import Treatment, matches, rate_ceiling, rule_of, treatments

NORMED = ModelConfig(
    width=4,
    norm="bn",
    projector=HeadConfig(hidden=8, out=4),
    predictor=PredictorConfig(hidden=8, out=4),
)
SHAPES = {name: tuple(p.shape) for name, p in Online(NORMED).named_parameters()}


def treated(**optim: object) -> dict[str, Treatment]:
    config = OptimConfig.model_validate({"name": "lars", **optim})
    return dict(zip(SHAPES, treatments(SHAPES, config), strict=True))


def adapting(**optim: object) -> set[str]:
    return {name for name, t in treated(**optim).items() if t.adapt}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "encoder.conv1.weight", True),
        ("encoder.layer1", "encoder.layer1.0.conv1.weight", True),
        ("encoder.layer1", "encoder.layer10.0.conv1.weight", False),
        ("encoder.layer1", "target.encoder.layer1.0.conv1.weight", False),
        ("encoder.layer1.0.conv1.weight", "encoder.layer1.0.conv1.weight", True),
        ("encoder.layer1.0.conv", "encoder.layer1.0.conv1.weight", False),
        ("*.conv?.weight", "encoder.layer1.0.conv1.weight", True),
        ("*.conv?.weight", "encoder.layer1.0.conv1.weight.more", False),
        ("encoder.layer[12].*", "encoder.layer3.0.conv1.weight", False),
        ("ENCODER", "encoder.conv1.weight", False),
        ("", "encoder.conv1.weight", False),
    ],
)
def test_patterns_are_names_parents_or_globs(pattern: str, name: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_everything_adapts_and_decays_by_default() -> None:
    assert set(treated().values()) == {Treatment(adapt=True, decay=True, lr_mult=1.0)}
    assert adapting(lars_on=["encoder.layer1", "projector"]) == {
        n for n in SHAPES if n.startswith(("encoder.layer1.", "projector."))
    }
    assert adapting(lars_on=[]) == set()


def test_nothing_adapts_under_sgd() -> None:
    assert adapting(name="sgd") == set()
    assert rule_of(OptimConfig(name="sgd", dialect="deepmind")) == "sgd"
    assert rule_of(OptimConfig(name="lars", dialect="deepmind")) == "deepmind"


def test_biases_and_norms_are_what_has_one_dimension() -> None:
    kept = adapting(lars_exclude="bias_and_norm")
    assert {
        n for n in SHAPES if "norm" in n or "bn" in n or n.endswith("bias") or "downsample.1" in n
    } == SHAPES.keys() - kept


def test_the_posts_filter_misses_some_norms() -> None:
    decaying = {name for name, t in treated(decay_exclude="substring").items() if t.decay}
    assert adapting(lars_exclude="substring") == decaying
    odd = {name for name in decaying if len(SHAPES[name]) == 1}
    assert odd == {f"encoder.layer{i}.0.downsample.1.weight" for i in (2, 3, 4)} | {
        "projector.norm.weight",
        "predictor.norm.weight",
    }


def test_the_two_exclusions_are_independent() -> None:
    rows = treated(lars_exclude="bias_and_norm", decay_exclude="none")
    assert rows["encoder.bn1.weight"] == Treatment(adapt=False, decay=True, lr_mult=1.0)
    rows = treated(lars_exclude="none", decay_exclude="bias_and_norm")
    assert rows["encoder.bn1.weight"] == Treatment(adapt=True, decay=False, lr_mult=1.0)


def test_factors_of_all_matches_multiply() -> None:
    rows = treated(
        lr_mult=[("encoder.layer1", 3.0), ("*.bn1.*", 0.5), ("encoder.conv1.weight", 0.0)]
    )
    assert rows["encoder.layer1.0.bn1.bias"].lr_mult == 1.5
    assert rows["encoder.bn1.bias"].lr_mult == 0.5
    assert rows["encoder.conv1.weight"].lr_mult == 0.0
    assert rows["projector.linear1.weight"].lr_mult == 1.0


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"lars_on": ["encoder.layr1"]},
            r"optim.lars_on: 'encoder.layr1' matches no parameter; nearest: encoder.layer\d",
        ),
        (
            {"lars_on": ["*", "projektor"]},
            "optim.lars_on: 'projektor' matches no parameter; nearest: projector",
        ),
        ({"lars_on": ["%%%%%%%%"]}, "optim.lars_on: '%%%%%%%%' matches no parameter$"),
        (
            {"lr_mult": [("encoder.layer5", 2.0)]},
            r"optim.lr_mult: 'encoder.layer5' matches no parameter; nearest: encoder",
        ),
        ({"name": "sgd", "lars_on": ["head"]}, "optim.lars_on: 'head' matches no parameter"),
    ],
)
def test_patterns_that_match_nothing_are_refused(optim: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        treated(**optim)


class TestRateCeiling:
    LARS = OptimConfig(name="lars", lr=0.1, weight_decay=2.37e-6)

    def test_is_the_appendixs_own(self) -> None:
        """The published peak of 42.2 at lr .1, eta 1e-3 needs a weight decay of 2.4e-6 or less."""
        assert rate_ceiling(self.LARS) == pytest.approx(42.2, abs=0.05)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"name": "sgd"}, None),
            ({"dialect": "deepmind"}, None),
            ({"dialect": "bolts"}, 0.1 * 1e-3 / 2.37e-6),
            ({"weight_decay": 0.0}, None),
            ({"rate_cap": 5.0}, 5.0),
            ({"rate_cap": 500.0}, 0.1 * 1e-3 / 2.37e-6),
            ({"dialect": "deepmind", "rate_cap": 5.0}, 5.0),
        ],
    )
    def test_where_there_is_none_and_where_a_cap_is_lower(
        self, change: dict[str, object], expected: float | None
    ) -> None:
        assert rate_ceiling(self.LARS.model_copy(update=change)) == (
            expected and pytest.approx(expected)
        )
