"""figures.py: pages that any file holds and any browser reads, whatever the names on them are."""

from __future__ import annotations

import html
import os
import unicodedata
from html.parser import HTMLParser

import pytest

from fastbyol.show import figures


class Texts(HTMLParser):
    """What a browser shows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.seen.append(data)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
        ("\x1b[31mred\x00\x7f", r"\x1b[31mred\x00\x7f"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("<script>alert('b\u00e4d & \u65e5')</script>", "<script>alert('b\u00e4d & \u65e5')</script>"),
    ],
)
def test_a_page_is_utf8_and_says_so_and_shows_names_escaped(name: str, shown: str) -> None:
    page = figures.page(name, figures.STYLE, f"<pre>{html.escape(name)}\n\tx</pre>")
    assert '<meta charset="utf-8">' in page.encode().decode()
    seen = Texts(page).seen
    assert seen[0] == shown
    assert f"{shown}\n\tx" in "".join(seen)
    assert {char for char in page if unicodedata.category(char) in {"Cc", "Cf", "Cs"}} <= {"\n", "\t"}
