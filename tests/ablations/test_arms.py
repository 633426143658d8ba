"""Arms say what they are for at every scale, and their configurations differ in what they say alone."""

from __future__ import annotations

from typing import get_args

import pytest

from fastbyol import config_io
from fastbyol.ablations.arms import SCALES, Arm, ScaleName, arm, arms, load
from fastbyol.ablations.claims import CLAIMS
from fastbyol.errors import UsageError

EVERY = [pytest.param(found, scale, id=f"{found.name}-{scale}") for found in arms().values() for scale in found.scales]
# What resolving derives from the keys that an arm sets.
DERIVED = {"optim.lr_scaling", "schedule.horizon_epochs"}


def differing(left: Arm, right: Arm, scale: ScaleName) -> set[str]:
    a, b = (config_io.flatten(load(one, scale, seed=0).config) for one in (left, right))
    return {key for key in a if a[key] != b[key]}


def test_every_arm_of_a_claim_is_there_and_every_arm_belongs_to_one() -> None:
    wanted = {name for claim in CLAIMS for name in (*claim.arms, *claim.controls)}
    assert wanted == {name for name, found in arms().items() if found.base is None}
    assert all(found.claims for found in arms().values())
    assert set(SCALES) == set(get_args(ScaleName))


@pytest.mark.parametrize(("found", "scale"), EVERY)
def test_an_arm_is_the_scale_and_its_own_settings(found: Arm, scale: ScaleName) -> None:
    config = config_io.flatten(load(found, scale, seed=3).config)
    assert config["train.seed"] == 3
    for key, value in found.settings.items():
        if key != "optim.lr_scaling" and not (key == "optim.lr" and "optim.lr_scaling" in found.settings):
            assert config[key] == (tuple(map(tuple, value)) if key == "optim.lr_mult" else _frozen(value)), key
    plain = Arm("plain", "", None, {}, {}, None, SCALES, None)
    expected = set(found.settings) | ({"train.epochs"} if scale == "full" and found.epochs else set())
    assert differing(found, plain, scale) - DERIVED <= expected


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(("found", "scale"), [row for row in EVERY if row.values[0].base])
def test_an_open_setting_changes_what_it_says_and_nothing_else(found: Arm, scale: ScaleName) -> None:
    length = {"train.epochs"} if scale == "full" and found.epochs != arm(str(found.base)).epochs else set()
    changed = differing(found, arm(str(found.base)), scale)
    # Four groups are what 16 channels or fewer get anyway only where a group would hold under two: the key differs always.
    assert changed == set(found.changes) | length


def test_sgd_scales_with_the_batch_and_lars_does_not() -> None:
    assert load(arm("gn-sgd-mlp-none"), "full", seed=0).config.optim.lr == pytest.approx(0.8)
    assert load(arm("gn-sgd-mlp-none"), "mini", seed=0).config.optim.lr == pytest.approx(0.8 * 32 / 256)
    assert load(arm("gn-lars-0.2"), "mini", seed=0).config.optim.lr == 0.2


def test_full_scale_is_as_published() -> None:
    config = load(arm("gn-lars-0.2"), "full", seed=0).config
    assert (config.train.epochs, config.train.batch_size, config.views.size, config.train.precision) == (320, 256, 96, "fp32")
    assert (config.schedule.horizon_epochs, config.probe.protocol, config.model.width) == (320, "blog", 64)
    short = load(arm("bn-sgd-predictor-bn"), "full", seed=0).config
    assert (short.train.epochs, short.schedule.horizon_epochs) == (10, 320)


def test_set_reaches_what_the_arm_leaves_open_and_not_the_arm() -> None:
    config = load(arm("gn-lars-0.5"), "full", seed=0, sets=["train.epochs=1", "optim.lr=9"]).config
    assert (config.train.epochs, config.optim.lr) == (1, 0.5)


def test_an_unknown_arm_is_one_line_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"gn-lars-0\.3: no such arm; nearest: gn-lars-0\.\d"):
        arm("gn-lars-0.3")
