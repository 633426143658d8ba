"""Which runs ``--where`` lets through, against plain Python; and their order."""

from __future__ import annotations

import operator
import random
from typing import Any

import pytest

from fastbyol import config_io
from fastbyol.engine.step import METRICS
from fastbyol.errors import UsageError
from fastbyol.registry.row import FIELDS, MEASURES, Row, differing
from fastbyol.registry.selection import Condition, chosen, ordered

DEFAULTS: dict[str, Any] = dict.fromkeys(FIELDS)


def row(name: str, *, settings: dict[str, Any] | None = None, **values: Any) -> Row:
    fields = {key: value for key, value in values.items() if key in FIELDS}
    measures = {key: value for key, value in values.items() if key not in FIELDS}
    return Row(**(DEFAULTS | fields | {"name": name}), measures=measures, settings=settings or {})


def names(rows: list[Row], *typed: str) -> str:
    return "".join(each.name for each in chosen(rows, [Condition.parse(text) for text in typed]))


def test_conditions_agree_with_plain_python() -> None:
    rng = random.Random(0)
    values: dict[str, list[Any]] = {
        "optim.name": ["lars", "sgd"],
        "optim.lr": [0.1, 0.2, 1.0],
        "train.seed": [0, 1, 2],
        "accuracy": [None, 10.0, 50.0, 62.5],
        "state": [None, "healthy", "collapsed"],
    }
    own = ("accuracy", "state")
    rows = []
    for n in range(300):
        drawn = {key: rng.choice(choices) for key, choices in values.items()}
        settings = {key: value for key, value in drawn.items() if key not in own}
        rows.append(row(str(n), settings=settings, **{key: drawn[key] for key in own}))
    signs = {
        "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
        ">": operator.gt, ">=": operator.ge,
    }  # fmt: skip
    for _ in range(200):
        asked = [
            (key, rng.choice(list(signs)), rng.choice([v for v in values[key] if v is not None]))
            for key in rng.sample(list(values), 2)
        ]
        typed = [Condition.parse(f"{key}{sign}{value}") for key, sign, value in asked]
        expected = [
            each
            for each in rows
            if all(
                signs[sign](each.value(key), value) if each.value(key) is not None else sign == "!="
                for key, sign, value in asked
            )
        ]
        assert chosen(rows, typed) == expected


def test_values_are_read_as_set_reads_them() -> None:
    settings = {
        "views.scale": [0.2, 1.0], "optim.lars_on": ["*", "encoder.fc"], "data.test": None,
        "model.ws": True, "model.groups": 1, "data.train": "a=b c", "train.init_from": "2020",
        "model.projector.norm": "none",
    }  # fmt: skip
    rows = [row("a", settings=settings, started="2026-11-05T08:20:00+00:00", accuracy=50.0)]
    assert names(rows, "views.scale=0.2,1.0", "views.scale=[0.2, 1]", "views.scale != 0.2") == "a"
    assert names(rows, "optim.lars_on=*, encoder.fc", 'optim.lars_on=["*", "encoder.fc"]') == "a"
    assert names(rows, "data.test=none", "data.train!=none", "accuracy!=none") == "a"
    assert names(rows, "model.ws=true", "model.ws!=1", "model.groups!=true") == "a"
    assert names(rows, "data.train=a=b c", 'data.train="a=b c"', "train.init_from=2020") == "a"
    assert (
        names(rows, "started>=2026-11-01", "started < 2027", "accuracy>=5e1", "accuracy==50") == "a"
    )
    assert names(rows, "model.projector.norm=none", "model.projector.norm!=bn") == "a"
    assert names(rows, "data.test!=none") == names(rows, "accuracy=fifty") == ""
    assert names(rows, "data.train=") == ""


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("optim.nmae=lars", "optim.nmae (--where): no such key; the nearest is optim.name"),
        ("acuracy>1", "the nearest is accuracy"),
        ("optim=lars", "optim (--where): no such key; the nearest is optim.name"),
        ("optim.name", "expected KEY OP VALUE"),
        ("", "expected KEY OP VALUE"),
        ("=5", "expected KEY OP VALUE"),
        ("accuracy=>5", "expected KEY OP VALUE"),
        ("accuracy<>5", "expected KEY OP VALUE"),
        ("accuracy<high", "no order: accuracy of a is 50.0"),
        ("model.ws<true", "no order"),
        ("views.scale<0.5", "no order"),
        ("accuracy<none", "no order"),
        ("optim\n\u202e=1", "expected KEY OP VALUE"),
        ("\u202eoptim=1", "\\u202eoptim (--where): no such key"),
    ],
)
def test_what_cannot_be_asked_is_one_line(typed: str, says: str) -> None:
    rows = [row("a", settings={"model.ws": False, "views.scale": [0.1, 1.0]}, accuracy=50.0)]
    with pytest.raises(UsageError) as caught:
        names(rows, typed)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_best_come_first_and_those_without_a_value_last() -> None:
    rows = [
        row("a", settings={"optim.lr": 0.2, "train.init_from": None}, accuracy=10.0, loss=3.0),
        row("b", settings={"optim.lr": 0.1, "train.init_from": "y"}, accuracy=None, loss=None),
        row("c", settings={"optim.lr": 0.1, "train.init_from": "x"}, accuracy=30.0, loss=1.0),
        row("d", settings={"optim.lr": 1, "train.init_from": "x"}, accuracy=30.0, loss=2.0),
    ]

    def order(key: str, **how: bool) -> str:
        return "".join(each.name for each in ordered(rows, key, "--sort", **how))

    assert (order("accuracy"), order("accuracy", reverse=True)) == ("cdab", "acdb")
    assert (order("loss"), order("loss", reverse=True)) == ("cdab", "adcb")
    assert (order("optim.lr"), order("train.init_from")) == ("bcad", "cdba")
    assert order("rank_y") == "abcd"
    with pytest.raises(UsageError, match=r"acc \(--sort\): no such key; the nearest is accuracy"):
        order("acc")


def test_keys_are_known_before_any_run_has_them() -> None:
    assert (*METRICS, "rank_y") == MEASURES
    assert not {*FIELDS, *MEASURES} & config_io.keys().keys()
    for key in (*MEASURES, *FIELDS, *config_io.keys()):
        assert chosen([], [Condition.parse(f"{key}=1")]) == []


def test_settings_that_differ_are_named_in_order() -> None:
    one = {"preset": "blog", "optim.lr": 0.1, "model.norm": "bn", "data.test": None}
    two = one | {"preset": "demo", "data.test": "x", "optim.lr": 0.2}
    assert differing([row("a", settings=one), row("b", settings=two)]) == ["optim.lr", "data.test"]
    assert differing([row("a", settings=one)]) == differing([]) == []
