"""Words of messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.errors import size_text

UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@pytest.mark.parametrize(
    ("num_bytes", "says"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (28_100_000, "28.1 MB"),
        (999_900_000, "1.0 GB"),
        (3 * 10**15, "3000 TB"),
    ],
)
def test_a_size_has_the_unit_that_fits(num_bytes: int, says: str) -> None:
    assert size_text(num_bytes) == says


@given(st.integers(1, 10**14))
def test_no_size_is_shown_as_nothing_or_far_off(num_bytes: int) -> None:
    number, unit = size_text(num_bytes).split()
    assert float(number) * UNITS[unit] == pytest.approx(num_bytes, rel=0.05)
