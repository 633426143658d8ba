"""Documents whose commands are typed anew: what they print replaces what stood there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from docs_rig import ROOT
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.files import cache_folder
from fastbyol_bench.site import transcript

DOCUMENT = """Text.

```
$ one
old
$ two \\
  more
older
```

```
not typed
```

![p](../bench/results/tutorial/a.png)
"""


def test_answers_replace_what_stood_below_a_line() -> None:
    typed: list[str] = []

    def answer(line: str) -> str:
        typed.append(line)
        return f"{len(typed)}\n"

    text = transcript.retyped(DOCUMENT, answer)
    assert typed == ["one", "two \\\n  more"]
    assert "$ one\n1\n$ two \\\n  more\n2\n```" in text
    assert "not typed" in text
    assert transcript.retyped(text, lambda line: "1\n" if line == "one" else "2\n") == text


def test_lines_that_were_not_asked_for_keep_their_answers() -> None:
    text = transcript.retyped(DOCUMENT, lambda line: "new\n", only="^one|three")
    assert text == DOCUMENT.replace("old\n$", "new\n$")


@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126)), max_size=40))
def test_long_answers_lose_their_middle(lines: list[str]) -> None:
    shown = transcript.shortened("".join(f"{line}\n" for line in lines)).splitlines()
    head, tail = transcript.HEAD, transcript.TAIL
    if len(lines) <= head + tail + 1:
        assert shown == lines
    else:
        assert shown == [*lines[:head], "...", *lines[-tail:]]


def test_lines_are_typed_in_the_folder(tmp_path: Path) -> None:
    answer = transcript.typed_in(tmp_path)
    assert answer("echo a > b; cat b; echo c >&2") == "a\nc\n"
    assert (tmp_path / "b").exists()
    with pytest.raises(subprocess.CalledProcessError):
        answer("false")


def test_what_only_this_machine_has_is_not_shown(tmp_path: Path) -> None:
    printed = (
        f"compiled 8 kernels in 19 s\n{tmp_path}/x {cache_folder()}/y {Path.home()}/z\n"
        "epoch 1/2 accuracy 3% 1584 img/s eta 0:49\n"
    )
    assert transcript.shown(printed, tmp_path) == (
        "./x ~/.cache/fastbyol/y ~/z\nepoch 1/2 accuracy 3%\n"
    )


def test_pictures_are_copied_to_where_the_document_shows_them(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"picture")
    document = tmp_path / "docs" / "tutorial.md"
    transcript.copy_pictures(DOCUMENT, document, tmp_path / "pictures")
    assert (tmp_path / "bench/results/tutorial/a.png").read_bytes() == b"picture"


def test_the_tutorial_was_typed() -> None:
    """Every line has an answer, except those that print nothing."""
    blank: list[str] = []

    def answer(line: str) -> str:
        blank.append(line)
        return ""

    text = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    emptied = transcript.retyped(text, answer)
    assert len(blank) >= 10
    assert len(text.splitlines()) > len(emptied.splitlines()) + 5 * len(blank) / 2
