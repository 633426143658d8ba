"""The picture of the display: what a terminal shows, in a file that needs no network."""

from __future__ import annotations

import re
from pathlib import Path

from fastbyol.fleet.survey import Surveyor
from fastbyol_bench import watch_picture
from folders import ask, rows


def test_the_runs_at_work_are_drawn_when_half_of_it_is_done(tmp_path: Path) -> None:
    out, picture = tmp_path / "out", tmp_path / "pictures" / "watch.svg"
    ask(out, "gn-lars-0.1", seeds=3, sets=("train.epochs=2",))
    watch_picture.record(out, picture)
    assert {row["status"] for row in rows(out).values()} == {"done"}
    text = picture.read_text()
    words = re.sub(r"<[^>]*>|&#160;", " ", text)
    assert "fastbyol ablate status out --watch" in words
    assert re.search(r"3 runs: +\d done", words) or "3 runs:" in words
    assert not re.search(r"url\(.?http|href|src:", text)
    assert watch_picture.svg(Surveyor(out).look(), "t") == watch_picture.svg(
        Surveyor(out).look(), "t"
    )
