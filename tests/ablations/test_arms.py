"""Arms say what they are for at every scale, and their configurations differ in what they say
alone.
"""

from __future__ import annotations

from typing import get_args

import pytest

from fastbyol import config_io
from fastbyol.ablations.arms import SCALES, Arm, ScaleName, arm, arms, load
from fastbyol.ablations.claims import CLAIMS
from fastbyol.errors import UsageError

EVERY = [
    pytest.param(found, scale, id=f"{found.name}-{scale}")
    for found in arms().values()
    for scale in found.scales
]
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
    for key, value in {**found.settings, **found.at[scale]}.items():
        if key != "optim.lr_scaling" and not (
            key == "optim.lr" and "optim.lr_scaling" in found.settings
        ):
            assert config[key] == (
                tuple(map(tuple, value)) if key == "optim.lr_mult" else _frozen(value)
            ), key
    plain = Arm("plain", "", None, {}, {}, {}, SCALES, None)
    assert differing(found, plain, scale) - DERIVED <= {*found.settings, *found.at[scale]}


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(("found", "scale"), [row for row in EVERY if row.values[0].base])
def test_an_open_setting_changes_what_it_says_and_nothing_else(
    found: Arm, scale: ScaleName
) -> None:
    base = arm(str(found.base))
    here = {key for key, value in found.at[scale].items() if base.at[scale].get(key) != value}
    # Four groups are what 16 channels or fewer get anyway only where a group would hold under two:
    # the key differs always. A learning rate that is scaled by the batch is another one, and says
    # no more that it is to be scaled.
    scaled = {"optim.lr"} if "optim.lr_scaling" in found.changes else set()
    assert differing(found, base, scale) - scaled == (set(found.changes) | here) - {
        "optim.lr_scaling"
    }


def test_sgd_scales_with_the_batch_and_lars_does_not() -> None:
    assert load(arm("gn-sgd-mlp-none"), "full", seed=0).config.optim.lr == pytest.approx(0.8)
    assert load(arm("gn-sgd-mlp-none"), "mini", seed=0).config.optim.lr == pytest.approx(
        0.8 * 32 / 256
    )
    assert load(arm("gn-lars-0.2"), "mini", seed=0).config.optim.lr == 0.2


def test_full_scale_is_as_published() -> None:
    config = load(arm("gn-lars-0.2"), "full", seed=0).config
    assert (
        config.train.epochs,
        config.train.batch_size,
        config.views.size,
        config.train.precision,
    ) == (320, 256, 96, "fp32")
    assert (config.schedule.horizon_epochs, config.probe.protocol, config.model.width) == (
        320,
        "blog",
        64,
    )
    short = load(arm("bn-sgd-predictor-bn"), "full", seed=0).config
    assert (short.train.epochs, short.schedule.horizon_epochs) == (10, 320)


def test_set_reaches_what_the_arm_leaves_open_and_not_the_arm() -> None:
    config = load(arm("gn-lars-0.5"), "full", seed=0, sets=["train.epochs=1", "optim.lr=9"]).config
    assert (config.train.epochs, config.optim.lr) == (1, 0.5)


def test_an_unknown_arm_is_one_line_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"gn-lars-0\.3: no such arm; nearest: gn-lars-0\.\d"):
        arm("gn-lars-0.3")


def test_what_an_arm_says_for_one_scale_is_not_said_for_others_and_yields_to_the_user() -> None:
    decay = arm("gn-sgd-weight-decay@wd1e-4")
    long, short = (load(decay, scale, seed=0).config for scale in ("long", "short"))
    assert (long.train.epochs, long.optim.lr, long.optim.weight_decay) == (400, 0.2, 1e-4)
    assert short.train.epochs == 60
    assert load(decay, "long", seed=0, sets=["train.epochs=3"]).config.train.epochs == 3


@pytest.mark.parametrize(("scale", "steps"), [("mini", 128), ("short", 64), ("full", 410)])
def test_a_warm_up_of_ten_steps_is_one(scale: ScaleName, steps: int) -> None:
    """Ten steps below the learning rate, in epochs of as many steps as the scale's images make."""
    from fastbyol.optim.schedule import lr_table

    config = load(arm("gn-lars-0.2@warmup-steps"), scale, seed=0).config
    table = lr_table(config.schedule, 0.2, horizon_epochs=320, steps_per_epoch=steps)
    assert table[9] < 0.2 * 0.91
    assert table[10] == pytest.approx(0.2, rel=1e-4)


def test_the_posts_warm_up_is_as_many_steps_at_long() -> None:
    config = load(arm("gn-lars-layer1-layer2@warmup"), "long", seed=0).config
    assert config.schedule.warmup_epochs * 128 == pytest.approx(10 * 410, abs=2)
    assert config.schedule.horizon_epochs * 128 == pytest.approx(320 * 410, rel=1e-3)
    assert load(
        arm("gn-ws-sgd"), "long", seed=0
    ).config.schedule.horizon_epochs * 16 == pytest.approx(320 * 410, rel=1e-3)
