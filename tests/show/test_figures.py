"""Pages can be stored and read whatever the names on them are."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from fastbyol.show import figures


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
        ("\x1b[31mred\x00\x7f", r"\x1b[31mred\x00\x7f"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        (
            "<script>alert('b\u00e4d & \u65e5')</script>",
            "<script>alert('b\u00e4d & \u65e5')</script>",
        ),
    ],
)
def test_a_page_is_utf8_and_says_so_and_shows_names_escaped(name: str, shown: str) -> None:
    values = {
        "title": name,
        "facts": [(name, name)],
        "states": [],
        "pictures": [],
        "env": "",
        "config": f"{name}\n\tx",
    }
    page = figures.page("run.html.j2", **values)
    assert '<meta charset="utf-8">' in page.encode().decode()
    texts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = texts.append  # type: ignore[method-assign]
    parser.feed(page)
    assert texts.count(shown) == 4  # the page's title, its heading, name and value of a fact
    assert f"{shown}\n\tx" in texts
    assert {char for char in page if unicodedata.category(char) in {"Cc", "Cf", "Cs"}} <= {
        "\n",
        "\t",
    }


def test_a_value_that_a_template_needs_must_be_passed() -> None:
    with pytest.raises(UndefinedError, match="facts"):
        figures.page("run.html.j2", title="")


def test_a_home_that_cannot_be_written_is_not_told_of() -> None:
    code = "import fastbyol.show.figures, matplotlib; matplotlib.get_configdir()"
    environment = {name: word for name, word in os.environ.items() if name != "MPLCONFIGDIR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HOME": "/proc", "XDG_CONFIG_HOME": "/proc"},
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
