"""The markers of a diagram's columns: measured once each, and whatever lies in their file."""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path

import pytest

from fastbyol import config_io
from fastbyol.config import Resolved
from fastbyol.evaluation import marker
from fastbyol.fleet.ledger import RUNS
from fastbyol.sweeps import markers, results
from made_sweep import ask, finish, small

AXES = '"views.scale" = [[0.2, 1.0], [0.9, 1.0]]\n"optim.lr" = [0.1, 0.5]'


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two columns, of which the second has one finished run."""
    out = tmp_path / "out"
    ask(small(AXES), out)
    for key in ("lr=0.1,scale=0.2+1.0", "lr=0.5,scale=0.2+1.0", "lr=0.1,scale=0.9+1.0"):
        finish(out, f"{key}/seed0", ["healthy"])
    return out


def test_a_column_has_the_marker_of_its_views_measured_once(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = markers.of(results.read(out))
    assert list(columns) == [(0.2, 1.0), (0.9, 1.0)]
    config = config_io.read_run(out / RUNS / "lr=0.1,scale=0.9+1.0/seed0/config.toml")
    read, ids, _ = marker.images_of(config, markers.IMAGES)
    expected = marker.measure(read.images, config, markers.SEEDS, ids=ids).y
    (rs,) = columns[0.9, 1.0].values()
    assert rs == pytest.approx(expected.r, rel=1e-5)
    words = f"r {statistics.fmean(rs):.3f}\n± {statistics.stdev(rs):.3f}"
    assert markers.under(columns)[0.9, 1.0] == words
    # Milder crops leave more of the image.
    assert statistics.fmean(rs) > statistics.fmean(*columns[0.2, 1.0].values())

    def refuse(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(marker, "measure", refuse)
    assert markers.of(results.read(out)) == columns


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The crops that were measured, without the seconds that it takes."""
    asked: list[tuple[float, float]] = []

    def measure(config: Resolved) -> list[float]:
        marker.images_of(config, 2)
        asked.append(config.views.scale)
        return [0.1] * len(markers.SEEDS)

    monkeypatch.setattr(markers, "_measure", measure)
    return asked


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "{" * 5000, "\0"])
def test_a_damaged_file_is_measured_anew(
    out: Path, measured: list[tuple[float, float]], content: str
) -> None:
    columns = markers.of(results.read(out))
    (out / markers.FILE).write_text(content)
    assert markers.of(results.read(out)) == columns
    assert len(json.loads((out / markers.FILE).read_text())) == 2
    assert measured == [(0.2, 1.0), (0.9, 1.0)] * 2


def test_images_that_are_gone_are_told_and_left_out(
    out: Path, measured: list[tuple[float, float]], caplog: pytest.LogCaptureFixture
) -> None:
    file = out / RUNS / "lr=0.1,scale=0.9+1.0/seed0/config.toml"
    text = file.read_text()
    file.write_text(text.replace('train = "textures"', 'train = "/nowhere.beton"'))
    with caplog.at_level(logging.WARNING):
        columns = markers.of(results.read(out))
    assert list(columns) == [(0.2, 1.0)]
    assert "no marker: /nowhere.beton" in caplog.text


def test_networks_that_differ_within_a_column_have_a_range() -> None:
    columns = {8: {"a": (0.1, 0.3), "b": (0.05, 0.05)}, 16: {"a": (0.25, 0.27, 0.29)}}
    assert markers.under(columns) == {8: "r 0.050\nto 0.200", 16: "r 0.270\n± 0.020"}
    rows = markers.as_rows(columns)
    means = [(row["value"], row["mean"]) for row in rows]
    assert means == [(8, 0.2), (8, 0.05), (16, pytest.approx(0.27))]
    assert rows[-1]["spread"] == pytest.approx(0.02)
