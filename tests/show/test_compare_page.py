"""The page of runs side by side."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_run

from fastbyol.registry import comparison
from fastbyol.show import compare_page, run_report

OLD = Path(__file__).parents[1] / "runs" / "old"
MARKUP = "<img src=x onerror=alert(1)> $\\frac$ &"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three runs, of which one has no step."""
    for name, old in ((MARKUP, "finished"), ("_hidden", "killed")):
        shutil.copytree(OLD / old, tmp_path / name)
    make_run(tmp_path / "new", "optim.lr=0.7")
    return [tmp_path / MARKUP, tmp_path / "_hidden", tmp_path / "new"]


def test_curves_and_settings_stand_side_by_side(
    runs: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    compared = comparison.of(runs)
    out = compare_page.write(compared)
    assert out == runs[0].parent / "compare.html"
    text = out.read_text()
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; $\\frac$ &amp;" in text
    assert "_hidden" in text
    assert text.count("<h2>") == len(compare_page.PICTURES)
    assert "<script" not in text
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{runs[2]}: no step was recorded yet: nothing to draw"
    ]
    cells = re.findall(r"<th scope=\"row\">optim.lr</th><td>([^<]*)</td><td>([^<]*)</td>", text)
    assert cells == [("0.2", "0.2")]


def test_each_run_has_a_line_of_its_own() -> None:
    styles = [compare_page.style(index) for index in range(comparison.MOST)]
    assert len(set(styles)) == comparison.MOST


def test_a_long_curve_is_drawn_by_means() -> None:
    curves = run_report.read(OLD / "finished")
    epochs, values = compare_page._metric(curves, "loss")
    assert np.array_equal(values, curves.metrics["loss"])
    assert np.array_equal(epochs, curves.epochs)
    many = np.arange(2001.0)
    long = run_report.RunCurves(
        **{**vars(curves), "epochs": many / 10, "metrics": {"loss": many * 2}}
    )
    epochs, values = compare_page._metric(long, "loss")
    assert len(values) <= compare_page._POINTS
    assert np.allclose(values, 20 * epochs)
    assert values[0] == np.mean([0, 2, 4])
    assert np.isnan(compare_page._metric(long, "neg_cos")[1]).all()
