"""The files beside the runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbyol.errors import UsageError
from fastbyol.show import figures
from fastbyol.sweeps import report, results
from fastbyol.sweeps.heat_map import layout
from made_sweep import SQUARE, ask, finish


@pytest.fixture
def sweep(tmp_path: Path) -> results.Sweep:
    out = tmp_path / "out"
    ask(SQUARE.replace("[optim]", "[train]\nepochs = 1\n[optim]", 1), out)
    finish(out, "lr=0.1,weight_decay=0.0/seed0", ["healthy"], {"accuracy": 40.0})
    return results.read(out)


def test_the_page_has_the_picture_and_the_table(sweep: results.Sweep, tmp_path: Path) -> None:
    where = layout(sweep.axes)
    paths = report.write(sweep, "accuracy", where, tmp_path / "pictures")
    names = ["out/sweep.csv", "out/sweep.html", "pictures/out-accuracy.png"]
    assert paths == [tmp_path / name for name in names]
    page = paths[1].read_text("utf-8")
    assert page.count("<svg") == 1
    assert "<td>40.0</td>" in page
    assert "1 of 4 runs done" in page
    assert "<script" not in page
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    # Equal sweeps are equal pages.
    assert report.page(sweep, "accuracy", where) == page


def test_without_matplotlib_the_csv_is_written(
    sweep: results.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    where = layout(sweep.axes)
    assert report.write(sweep, "accuracy", where) == [tmp_path / "out/sweep.csv"]
    with pytest.raises(UsageError, match="matplotlib is not installed"):
        report.write(sweep, "accuracy", where, tmp_path / "pictures")
