"""Pictures of every mode, depth and format against their formats, and PICTURES.md's table.

After a change: ``FASTBYOL_WRITE_TABLE=1 pytest tests/data/test_rgb.py``, and review the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st

import picture_files
from fastbyol.data import rgb
from fastbyol.data.beton_write import UnreadableItemError
from picture_files import Picture

PICTURES = picture_files.all_pictures()
TABLE = Path(__file__).with_name("PICTURES.md")
HEAD = """# What comes out of a picture

Every row is a file that `tests/data/picture_files.py` writes and `tests/data/test_rgb.py` compares
with the format's definition. That test writes this table. "Within" is the largest difference of any
pixel, of 255.

| mode | bits | format | what comes out | within |
|---|---|---|---|---|
"""


def row(picture: Picture) -> str:
    within = "" if isinstance(picture.expected, str) else str(picture.tolerance)
    return f"| {picture.mode} | {picture.depth} | {picture.format} | {picture.what} | {within} |\n"


def test_the_table_is_of_these_pictures() -> None:
    text = HEAD + "".join(map(row, PICTURES))
    if "FASTBYOL_WRITE_TABLE" in os.environ:
        TABLE.write_text(text)
    assert TABLE.read_text() == text


@pytest.mark.parametrize(
    "picture", PICTURES, ids=lambda picture: f"{picture.mode}-{picture.depth}-{picture.format}"
)
def test_what_comes_out(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / f"x.{picture.suffix}"
    picture.write(path)
    old = picture.before_13 if int(PIL.__version__.split(".")[0]) < 13 else ""
    if old or isinstance(picture.expected, str):
        with pytest.raises(UnreadableItemError, match=old or picture.expected):
            rgb.read(path)
        return
    assert rgb.probe(path) in (picture.expected.shape[:2], picture.expected.shape[1::-1])
    image = rgb.read(path)
    assert image.dtype == np.uint8
    assert image.shape == picture.expected.shape
    assert np.abs(image.astype(int) - picture.expected).max() <= picture.tolerance


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 64))
def test_no_shape_takes_more_memory_than_its_limit(width: int, height: int, size: int) -> None:
    """Resize arrays without memory: the intermediate size must be refused first."""
    short = min(width, height)
    passes = (size * width // short) * (size * height // short) <= rgb.MAX_PIXELS
    flat = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (height, width, 3))
    if passes and width * height <= 1 << 16:
        assert rgb.resized(np.ascontiguousarray(flat), "centre", size).shape == (size, size, 3)
    elif not passes:
        with pytest.raises(UnreadableItemError, match="too thin"):
            rgb.resized(flat, "centre", size)
