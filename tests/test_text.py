"""text.py: what may be shown of a name that somebody else chose."""

from __future__ import annotations

import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.text import printable, printable_lines

# Categories of Unicode that move, colour, hide or turn what stands beside them, and halves of
# surrogate pairs.
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name (1).png", "plain name (1).png"),
        ("b\u00e4d \u65e5\u672c \U0001f431", "b\u00e4d \u65e5\u672c \U0001f431"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\nlines\r\x85\u2028", r"two\nlines\r\x85\u2028"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
    ],
)
def test_what_is_no_visible_letter_is_escaped(name: str, shown: str) -> None:
    assert printable(name) == shown


@given(ANY_TEXT)
def test_any_text_becomes_one_line_that_utf8_holds(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert len(shown.splitlines()) <= 1
    assert not {unicodedata.category(char) for char in shown} & UNSEEN


@given(ANY_TEXT)
def test_lines_and_tabs_stay_and_nothing_else_that_is_unseen(text: str) -> None:
    shown = printable_lines(text)
    assert [shown.count(char) for char in "\n\t"] == [text.count(char) for char in "\n\t"]
    assert {char for char in shown if unicodedata.category(char) in UNSEEN} <= {"\n", "\t"}
