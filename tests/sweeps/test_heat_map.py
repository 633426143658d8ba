"""The heat map: which axes lie where, and what is in its cells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastbyol.errors import UsageError
from fastbyol.show import figures
from fastbyol.sweeps import heat_map, results
from fastbyol.sweeps.heat_map import layout
from made_sweep import SQUARE, ask, finish

AXES = {"optim.lr": (1, 2, 3), "model.norm": ("gn", "bn"), "model.width": (4, 8, 16, 32)}
SHORT = SQUARE.replace("[optim]", "[train]\nepochs = 1\n[optim]", 1)


def test_the_axes_of_most_values_lie_in_the_picture() -> None:
    made = layout(AXES)
    assert (made.x, made.y) == ("model.width", "optim.lr")
    assert made.panels == ({"model.norm": "gn"}, {"model.norm": "bn"})
    made = layout(AXES, y="norm", x="optim.lr")
    assert (made.x, made.y, len(made.panels)) == ("optim.lr", "model.norm", 4)
    assert layout(AXES, x="norm").y == "model.width"
    assert layout(AXES, y="width").x == "optim.lr"


def test_a_single_axis_is_a_row() -> None:
    for options in ({}, {"x": "lr"}, {"y": "lr"}):
        made = layout({"optim.lr": (1, 2)}, **options)
        assert (made.x, made.y, made.panels) == ("optim.lr", None, ({},))


def test_other_axes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--x: 'lrr' is none of .*; the nearest is lr"):
        layout(AXES, x="lrr")
    with pytest.raises(UsageError, match=r"are both optim\.lr"):
        layout(AXES, x="lr", y="optim.lr")


def svg(out: Path, measure: str, **options: str) -> str:
    sweep = results.read(out)
    with figures.settings():
        return figures.svg(heat_map.draw(sweep, measure, layout(sweep.axes, **options)))


def texts(picture: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def fills(picture: str) -> dict[str, str]:
    """The colour of each point's cell."""
    return dict(
        re.findall(r'<g id="cell:([^"]+)">\s*<path[^>]*style="fill: (#[0-9a-f]{6})', picture)
    )


def test_cells_bear_their_means_and_colours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask(SHORT, out, seeds=2)
    for seed, accuracy in enumerate((10.0, 20.0)):
        finish(out, f"lr=0.1,weight_decay=0.0/seed{seed}", ["healthy"], {"accuracy": accuracy})
        finish(out, f"lr=0.5,weight_decay=0.0/seed{seed}", ["healthy"], {"accuracy": 65.0})
    finish(out, "lr=0.5,weight_decay=1.5e-06/seed1", ["healthy"], {"accuracy": 40.0})
    picture = svg(out, "accuracy")
    # The least and the most of viridis, and its middle (matplotlib's table of the map).
    assert fills(picture) == {
        "lr=0.1,weight_decay=0.0": "#440154",
        "lr=0.5,weight_decay=0.0": "#fde725",
        "lr=0.5,weight_decay=1.5e-06": "#21918c",
    }
    shown = texts(picture)
    assert {"15.0", "65.0", "40.0", "1 of 2", "accuracy, %", "lr", "weight_decay"} <= set(shown)
    assert {"0.1", "0.5", "0", "1.5e-06"} <= set(shown)
    # The fourth has no finished run.
    assert picture.count("url(#h") == 1
    assert picture.startswith("<svg")


def test_shares_are_drawn_from_none_to_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask(SHORT, out)
    finish(out, "lr=0.1,weight_decay=0.0/seed0", ["collapsed"])
    assert fills(svg(out, "collapsed")) == {"lr=0.1,weight_decay=0.0": "#fde725"}
    assert fills(svg(out, "recovered")) == {"lr=0.1,weight_decay=0.0": "#440154"}


def test_every_value_of_a_third_axis_has_a_panel(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = ask(f'{SHORT}"model.norm" = ["gn", "bn", "ln"]\n', out)
    for number, task in enumerate(made.tasks):
        finish(out, task.key, ["healthy"], {"accuracy": 10.0 + number})
    picture = svg(out, "accuracy", x="lr", y="weight_decay")
    assert {"norm = gn", "norm = bn", "norm = ln"} <= set(texts(picture))
    assert fills(picture).keys() == {point.name for point in made.points}
    other = set(texts(svg(out, "accuracy", x="norm", y="lr")))
    assert {"weight_decay = 0", "weight_decay = 1.5e-06", "norm"} <= other


def test_many_values_still_make_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = ", ".join(str(number) for number in range(300))
    made = ask(f'[train]\nepochs = 1\n[grid]\n"schedule.warmup_epochs" = [{values}]\n', out)
    finish(out, made.tasks[7].key, ["healthy"], {"accuracy": 10.0})
    assert fills(svg(out, "accuracy")).keys() == {"warmup_epochs=7.0"}
