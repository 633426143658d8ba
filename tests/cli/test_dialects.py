"""The numbers and words of `explain lars`, against formulas written out by hand in float64 and a
run's own records.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbyol import api, config_io
from fastbyol.cli import dialects, explain
from fastbyol.errors import UsageError
from fastbyol.runs.layers import read_layers

TIGHT = 1e-12  # float64 throughout; sums of two squares

NUMBERS = {
    "lr": st.floats(1e-3, 10.0),
    "weight_decay": st.sampled_from([0.0, 1.5e-6, 1e-4, 0.1]),
    "eta": st.floats(1e-4, 0.1),
}


def by_hand(
    rule: str, w: np.ndarray, g: np.ndarray, lr: float, wd: float, eta: float
) -> tuple[float, float]:
    """(trust ratio, norm of the first update) from You et al. and the three codes, one vector at a
    time.
    """
    weight, grad, decayed = (math.hypot(*v) for v in (w, g, g + wd * w))
    if rule == "sgd":
        return 1.0, lr * decayed
    if rule == "blog":
        trust = eta * weight / (grad + wd * weight) if grad + wd * weight > 0 else 0.0
        return trust, lr * trust * decayed
    if rule == "deepmind":
        trust = eta * weight / decayed if weight > 0 and decayed > 0 else 1.0
        return trust, lr * trust * decayed
    if weight > 0 and grad > 0:
        trust = eta * weight / (grad + wd * weight + 1e-8)
        return trust, lr * trust * decayed
    return 1.0, lr * math.hypot(*(g if grad == 0 else g + wd * w))


@pytest.mark.parametrize("rule", ["sgd", "blog", "deepmind", "bolts"])
@given(numbers=st.fixed_dictionaries(NUMBERS))
@settings(max_examples=25)
def test_steps_are_the_formulas(rule: str, numbers: dict[str, float]) -> None:
    lr, wd, eta = numbers["lr"], numbers["weight_decay"], numbers["eta"]
    result = dialects.step(rule, lr=lr, weight_decay=wd, eta=eta)  # type: ignore[arg-type]
    assert list(result) == [example.name for example in dialects.EXAMPLES]
    for example in dialects.EXAMPLES:
        w = np.array(example.weight)
        g = np.array(example.gradient) if example.gradient else -wd * w
        trust, update = by_hand(rule, w, g, lr, wd, eta)
        row = result[example.name]
        assert row["weight_norm"] == pytest.approx(math.hypot(*w), rel=TIGHT)
        assert row["grad_norm"] == pytest.approx(math.hypot(*g), rel=TIGHT)
        assert row["trust_ratio"] == pytest.approx(trust, rel=TIGHT)
        assert row["rate"] == pytest.approx(lr * trust, rel=TIGHT)
        # Cancelled vectors leave rounding of the size of each part.
        assert row["update_norm"] == pytest.approx(
            update, rel=1e-9, abs=1e-15 * max(1.0, lr * trust)
        )


@given(numbers=st.fixed_dictionaries(NUMBERS))
@settings(max_examples=25)
def test_no_rate_exceeds_the_ceiling(numbers: dict[str, float]) -> None:
    result = dialects.lars(("blog", "bolts", "deepmind"), **numbers)
    for rule in ("blog", "bolts"):
        facts = result["dialects"][rule]
        if numbers["weight_decay"] == 0.0:
            assert facts["ceiling"] is None
            continue
        assert facts["ceiling"] == pytest.approx(
            numbers["lr"] * numbers["eta"] / numbers["weight_decay"], rel=TIGHT
        )
        rows = facts["examples"].values()
        # With a norm of 0 bolts takes a trust ratio of 1, which no ceiling bounds.
        rates = [
            row["rate"]
            for row in rows
            if rule == "blog" or (row["weight_norm"] > 0 and row["grad_norm"] > 0)
        ]
        assert max(rates) <= facts["ceiling"] * (1 + TIGHT)
    assert result["dialects"]["deepmind"]["ceiling"] is None


def test_the_published_peak_leaves_room_for_one_weight_decay_alone() -> None:
    peak = dialects.published_peak()
    assert peak["rate"] == pytest.approx(42.2, abs=0.05)  # claims.json reads 42.2
    assert peak["most_weight_decay"] == pytest.approx(2.4e-6, rel=0.02)  # and concludes 2.4e-6
    assert {row["weight_decay"]: row["possible"] for row in peak["ceilings"]} == {
        1.5e-6: True,
        1e-5: False,
        1e-4: False,
    }
    assert {row["weight_decay"]: row["ceiling"] for row in peak["ceilings"]} == pytest.approx(
        {1.5e-6: 200 / 3, 1e-5: 10.0, 1e-4: 1.0}
    )


def test_words_hold_the_numbers() -> None:
    result = dialects.lars(("blog", "deepmind"))
    text = explain.in_words(result)
    rows = [
        line for line in text.splitlines() if line.lstrip().startswith("gradient 5e-5, collapsing")
    ]
    assert [float(row.split()[-2]) for row in rows] == pytest.approx(
        [8e-4 / 5.6e-5, 8e-4 / math.hypot(5e-5, 6e-6)], rel=1e-4
    )
    assert "42.2" in text
    assert json.loads(json.dumps(result)) == result
    assert "no ceiling" in explain.in_words(dialects.lars(("blog",), weight_decay=0.0))


@pytest.mark.parametrize(
    ("text", "says"),
    [("blog,deepmin", "nearest is deepmind"), ("blg", "nearest is blog"), (",", "name dialects")],
)
def test_dialects_that_are_none(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        dialects.parse_rules(text)
    assert dialects.parse_rules("bolts, blog,bolts") == ("bolts", "blog")


@pytest.mark.parametrize(
    "numbers", [{"lr": -1.0}, {"weight_decay": math.nan}, {"eta": 0.0}, {"lr": math.inf}]
)
def test_numbers_out_of_range(numbers: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="should be"):
        dialects.lars(("blog",), **numbers)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of a network of 4 channels by the blog's LARS, one stage at twice the rate, norms
    excluded.
    """
    path = tmp_path_factory.mktemp("explain") / "run"
    sets = [
        "model.width=4",
        "model.norm=gn",
        "model.projector.hidden=16",
        "model.predictor.hidden=16",
        "views.size=16",
    ]
    sets += [
        "data.textures_count=64",
        "data.textures_test_count=64",
        "train.batch_size=16",
        "train.epochs=2",
        "data.workers=1",
    ]
    sets += [
        "optim.name=lars",
        "optim.lr=0.2",
        "optim.lars_exclude=bias_and_norm",
        "optim.lr_mult=[['encoder.layer1', 2.0]]",
    ]
    sets += ["train.device=cpu", "probe.every_epochs=0"]
    api.train(config_io.load(preset="demo", sets=sets).config, path)
    return path


def test_a_runs_own_dialect_gives_what_it_recorded(run: Path) -> None:
    layers = read_layers(run)
    for step in (None, int(layers.steps[-1])):
        result = dialects.of_run(run, ("blog", "deepmind", "bolts"), step)
        record = int(np.flatnonzero(layers.steps == result["step"])[0])
        assert [row["name"] for row in result["layers"]] == list(layers.names)
        for index, row in enumerate(result["layers"]):
            recorded = float(layers.values[record, index, layers.metrics.index("rate")])
            assert row["recorded"]["rate"] == recorded
            if row["adapts"]:
                # The run computed in fp32 and wrote its lr as a decimal of fp32.
                assert row["blog"]["rate"] == pytest.approx(recorded, rel=1e-5)
            module, kind = row["name"].split(".")[-2:]
            matrix = kind == "weight" and (
                module.startswith(("conv", "linear")) or "downsample.0" in row["name"]
            )
            assert row["adapts"] == matrix
            low_high = row["deepmind"]["rate"]
            low = low_high if isinstance(low_high, float) else low_high[0]
            # The triangle inequality: |g + wd w| <= |g| + wd |w|, blog's divisor.
            assert low >= row["blog"]["rate"] * (1 - 2e-3) or row["weight_norm"] == 0
    text = explain.run_in_words(result)
    assert (
        text.count("\n") == len(layers.names) + 6
    )  # what run, three ceilings, a remark, a blank line, a header
    assert result["rule"] == "blog"


def test_the_default_step_is_that_of_the_highest_rate(run: Path) -> None:
    layers = read_layers(run)
    rates = layers.values[:, :, layers.metrics.index("rate")]
    result = dialects.of_run(run, ("blog",))
    assert result["step"] == int(layers.steps[np.unravel_index(rates.argmax(), rates.shape)[0]])


def test_a_step_that_was_not_recorded(run: Path) -> None:
    with pytest.raises(UsageError, match="step 99 was not recorded"):
        dialects.of_run(run, ("blog",), 99)
