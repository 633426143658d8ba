"""A picture has a point for each row, and names of classes as they are."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors
from PIL import Image

from fastbyol.errors import UsageError
from fastbyol.evaluation.plane import Plane
from fastbyol.show import embedding_picture, figures
from fastbyol.show.embedding_picture import MOST_CLASSES, check_name, content, figure

NASTY = ("<script>alert(1)</script>", "$x_{", "_hidden", "a&amp;b", "line\nbreak", "\udce9\x00", "")


def plane(num: int = 200, *, shares: tuple[float, float] | None = (0.5, 0.25)) -> Plane:
    points = np.random.default_rng(0).standard_normal((num, 2))
    return Plane(points, ("PC 1", "PC 2"), shares)


def drawn(num_classes: int) -> tuple[list[tuple[object, ...]], list[str]]:
    """Return colour and shape of each group of points, and the legend's lines."""
    labels = np.arange(200) % num_classes
    with figures.settings():
        axes = figure(plane(), labels, [f"class {k}" for k in range(num_classes)]).axes[0]
    looks = [
        (colors.to_hex(each.get_facecolor()[0]), each.get_paths()[0].vertices.tobytes())
        for each in axes.collections
    ]
    assert sum(len(each.get_offsets()) for each in axes.collections) == 200
    return looks, [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("num_classes", [1, 10, 13, MOST_CLASSES])
def test_no_two_classes_look_alike(num_classes: int) -> None:
    looks, names = drawn(num_classes)
    assert len(looks) == len(set(looks)) == num_classes
    assert names == [f"class {k}" for k in range(num_classes)]


def test_more_classes_than_looks_are_grey() -> None:
    looks, names = drawn(MOST_CLASSES + 3)
    assert len(set(looks)) == MOST_CLASSES + 1
    assert names[0] == "other images"


@pytest.mark.parametrize("suffix", embedding_picture.SUFFIXES)
def test_without_labels(suffix: str) -> None:
    made = content(suffix, plane(), None, (), ["facts"], "title")
    assert made == content(suffix, plane(), None, (), ["facts"], "title")
    if suffix == ".png":
        with Image.open(io.BytesIO(made)) as picture:
            assert picture.size == (988, 702)


def test_names_are_shown_as_they_are() -> None:
    labels = np.arange(200) % (len(NASTY) + 1) - 1  # some without, and a class without a name
    text = content(".html", plane(), labels, NASTY, ["<b>facts</b>"], "<i>run</i>").decode()
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    # Each in the legend and at its points.
    for shown in ("&lt;script&gt;alert(1)", "$x_{", "_hidden", "a&amp;amp;b", r"line\nbreak",
                  r"\udce9\x00"):  # fmt: skip
        assert len(re.findall(f"<text[^>]*>{re.escape(shown)}", text)) == 2, shown
    assert "default-src 'none'" in text
    assert not re.search(r"(href|src)=['\"]?http", text)
    # Colours are those of the page, so that it can be read on a dark one, too.
    for name in ("blue", "purple", "paper"):
        assert f"var(--{name})" in text
    assert not set(re.findall(r"#[0-9a-f]{6}", text.split("</style>")[1])) - {"#999999"}
    assert content(".png", plane(), labels, NASTY, ["$facts$"], "run").startswith(b"\x89PNG")


def test_axes_say_what_they_show() -> None:
    with figures.settings():
        axes = figure(plane(), None, ()).axes[0]
        assert axes.get_xlabel() == "PC 1, 50.0 % of the variance"
        assert axes.get_ylabel() == "PC 2, 25.0 % of the variance"
        axes = figure(plane(shares=None), None, ()).axes[0]
        assert (axes.get_xlabel(), list(axes.get_xticks())) == ("PC 1", [])


def test_classes_at_one_place_have_names_that_can_be_read() -> None:
    same = Plane(np.zeros((20, 2)), ("PC 1", "PC 2"), (0.0, 0.0))
    with figures.settings():
        axes = figure(same, np.arange(20) % 10, [f"class {k}" for k in range(10)]).axes[0]
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert len(heights) == 10
    assert np.diff(heights).min() > 0.03 * np.diff(axes.get_xlim())[0]


def test_a_name_in_any_script_is_drawn() -> None:
    assert content(".png", plane(), np.zeros(200, int), ["学习 עברית"], ["学习"], "run")


def test_names_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    check_name(Path("y.png"))
    with pytest.raises(UsageError, match=r"ends in .png or .html"):
        check_name(Path("y.svg"))
    monkeypatch.setattr(figures, "available", lambda: False)
    with pytest.raises(UsageError, match=r"--picture: matplotlib is not installed"):
        check_name(Path("y.png"))
