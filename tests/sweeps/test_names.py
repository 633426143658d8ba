"""Names of points: distinct, safe as folders, and the same whatever else the grid holds."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.sweeps.names import labels, point_name

SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=,~-]*")
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
)
LISTS = st.lists(st.text(max_size=12), max_size=4).map(tuple)
PAIRS = st.lists(st.tuples(st.text(max_size=8), st.floats(0.0, 1e3)), max_size=3).map(tuple)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"optim.lr": 0.1, "optim.weight_decay": 1.5e-6}, "lr=0.1,weight_decay=1.5e-06"),
        ({"optim.weight_decay": 1.5e-6, "optim.lr": 0.1}, "lr=0.1,weight_decay=1.5e-06"),
        ({"optim.rate_cap": None, "model.ws": True}, "ws=true,rate_cap=none"),
        (
            {"model.projector.norm": "bn", "model.norm": "gn"},
            "model.norm=gn,model.projector.norm=bn",
        ),
        ({"optim.lars_on": ("encoder.layer1", "heads")}, "lars_on=encoder.layer1+heads"),
        ({"views.blur_p": (0.5, 0.0)}, "blur_p=0.5+0.0"),
    ],
)
def test_names_are_readable(values: dict[str, object], name: str) -> None:
    assert point_name(values) == name


def test_a_key_is_short_where_no_other_ends_so() -> None:
    assert labels(["optim.lr", "schedule.lr", "train.epochs"]) == {
        "optim.lr": "optim.lr",
        "schedule.lr": "schedule.lr",
        "train.epochs": "epochs",
    }


@pytest.mark.parametrize("values", [SCALARS, LISTS, PAIRS], ids=["scalars", "lists", "pairs"])
def test_distinct_values_have_distinct_safe_names(values: st.SearchStrategy[object]) -> None:
    """Also where a file system does not tell upper case from lower case.

    A key has values of one type, and None.
    """

    @given(st.lists(st.one_of(st.none(), values), min_size=2, max_size=6))
    def check(column: list[object]) -> None:
        column = [value for value in column if type(value) in (type(column[0]), type(None))]
        column = [value for value in column if not (value == "none" and None in column)]
        names = {repr(value): point_name({"a.key": value, "b.other": 1}) for value in column}
        assert len({name.lower() for name in names.values()}) == len(names)
        for name in names.values():
            assert SAFE.fullmatch(name)
            assert len(name.encode()) <= 200
            assert not name.endswith((".", " "))

    check()


def test_long_names_differ_by_their_digest() -> None:
    many = {f"section.key{number}": "a" * 30 for number in range(20)}
    one, other = point_name(many), point_name({**many, "section.key19": "b" * 30})
    assert one != other
    assert max(len(one), len(other)) <= 180
