"""From a file to points and runs, and what a grid is refused for."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol import config_io
from fastbyol.config_io import Flag
from fastbyol.errors import UsageError
from fastbyol.fleet.ledger import Ledger
from fastbyol.sweeps import grid
from made_sweep import SQUARE, ask, finish, written


def test_every_combination_is_a_point_with_its_settings(tmp_path: Path) -> None:
    made = grid.read(written(tmp_path, f"seeds = 2\nfirst_seed = 3\n{SQUARE}"))
    assert made.axes == {"optim.lr": (0.1, 0.5), "optim.weight_decay": (0.0, 1.5e-6)}
    assert [point.name for point in made.points] == [
        "lr=0.1,weight_decay=0.0",
        "lr=0.1,weight_decay=1.5e-06",
        "lr=0.5,weight_decay=0.0",
        "lr=0.5,weight_decay=1.5e-06",
    ]
    assert [task.key for task in made.tasks[:5:4]] == [
        "lr=0.1,weight_decay=0.0/seed3",
        "lr=0.1,weight_decay=0.0/seed4",
    ]
    for task in made.tasks:
        optim = task.config.optim
        assert task.group == f"lr={optim.lr},weight_decay={optim.weight_decay}"
        assert (optim.name, task.config.preset, task.config.train.seed) == (
            "lars",
            "demo",
            task.seed,
        )
        assert task.origin["optim.lr"] == f"{tmp_path}/grid.toml:8"


AXES = {
    "optim.lr": st.floats(0.0, 1000.0),
    "optim.momentum": st.floats(0.0, 0.99),
    "model.groups": st.integers(1, 64),
    "model.norm": st.sampled_from(["bn", "gn", "ln", "none"]),
    "model.ws": st.booleans(),
    "optim.rate_cap": st.one_of(st.just("none"), st.floats(1e-3, 10.0)),
    "optim.lars_on": st.lists(st.sampled_from(["*", "encoder", "predictor"]), unique=True),
}


def test_the_crossing_is_complete_and_values_survive(tmp_path: Path) -> None:
    columns = st.fixed_dictionaries(
        {},
        optional={
            key: st.lists(values, min_size=1, max_size=3, unique_by=str)
            for key, values in AXES.items()
        },
    )

    @given(columns.filter(lambda columns: 1 <= len(columns) <= 3))
    def check(columns: dict[str, list[object]]) -> None:
        lines = [f'"{key}" = {config_io.toml_value(values)}' for key, values in columns.items()]
        made = grid.read(written(tmp_path, "\n".join(["[grid]", *lines])))
        wanted = [
            {key: _as_configured(key, value) for key, value in zip(columns, values, strict=True)}
            for values in product(*columns.values())
        ]
        assert [dict(point.values) for point in made.points] == wanted
        assert len({point.name for point in made.points}) == len(wanted)
        for point in made.points:
            again = config_io.flatten(config_io.parse(config_io.dump(point.tasks[0].config), "run"))
            assert {key: again[key] for key in columns} == dict(point.values)

    check()


def _as_configured(key: str, value: object) -> object:
    if key == "optim.rate_cap" and value == "none":
        return None
    return tuple(value) if isinstance(value, list) else value


def test_nested_tables_are_dotted_keys(tmp_path: Path) -> None:
    nested = """
[grid]
train.batch_size = [16, 32]
model = { projector = { norm = ["bn", "none"] } }
[grid.optim]
weight_decay = [0.0, 1]
"""
    assert grid.read(written(tmp_path, nested)).axes == {
        "train.batch_size": (16, 32),
        "model.projector.norm": ("bn", "none"),
        "optim.weight_decay": (0.0, 1.0),
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "add a section [grid]"),
        ("[grid]", "add a section [grid]"),
        ("grid = 3", "add a section [grid]"),
        ('[grid]\n"optim.lrr" = [1.0]', "optim.lrr (FILE:2): no such key; the nearest is optim.lr"),
        ("[grid]\noptim = [1.0]", "optim (FILE:2): this is a section"),
        ("[grid.optim]", "optim (FILE:1): this is a section"),
        ('[grid]\n"optim.lr" = 0.1', "optim.lr = 0.1 (FILE:2): should be a list"),
        ('[grid]\n"optim.lr" = []', "optim.lr = [] (FILE:2): should be a list"),
        ('[grid]\n"optim.lr" = [0.1, 1, 1.0]', "optim.lr (FILE:2): 1.0 is there twice"),
        ('[grid]\n"views.blur_p" = [0.5, 0.0]', "write a list of lists"),
        ('[grid]\n"optim.lr" = [0.1, -1.0]', "optim.lr = -1.0 (FILE:2): should be greater"),
        ('[grid]\n"optim.lr" = [0.1, "fast"]', 'optim.lr = "fast" (FILE:2)'),
        ('[grid]\n"optim.lr" = [nan]', "optim.lr = nan (FILE:2)"),
        ('[grid]\n"optim.lr" = [0.1, "0.1"]', "are the same configuration"),
        ('[optim]\nname = "lars"\nlars_lr = 0.5\n[grid]\noptim.lr = ["none", 0.5]', "are the same"),
        ('[grid]\n"optim.lr" = [0.1]\n[grid.optim]\nlr = [0.2]', "is crossed twice"),
        ('[grid]\n"preset" = ["blog"]', "preset (FILE:2): cannot be crossed"),
        ('[train]\nstop_on_collapse = true\n[grid]\n"optim.lr" = [0.1]', "train.stop_on_collapse"),
        ("[optim]\nlr = 0.1\n[grid]\noptim.lr = [0.1]", "optim.lr (FILE:2): is crossed (FILE:4)"),
        ('seeds = 2\n[grid]\n"train.seed" = [1, 2]', "train.seed (FILE:3): is crossed, and so are"),
        ('[train]\nseed = 2\n[grid]\n"optim.lr" = [0.1]', "train.seed (FILE:2): seeds and first"),
        ('seeds = 0\n[grid]\n"optim.lr" = [0.1]', "seeds = 0 (FILE:1): should be a whole number"),
        ('seeds = true\n[grid]\n"optim.lr" = [0.1]', "seeds = true (FILE:1)"),
        ('first_seed = -1\n[grid]\n"optim.lr" = [0.1]', "first_seed = -1 (FILE:1)"),
        ('sedes = 2\n[grid]\n"optim.lr" = [0.1]', "sedes (FILE:1): no such key"),
        ('preset = "blgo"\n[grid]\n"optim.lr" = [0.1]', "no such preset"),
        ('seeds = 10001\n[grid]\n"optim.lr" = [0.1]', "10,001 runs, more than 10,000"),
        ("[grid]\n\"views.size\" = [8, 16]", "views.blur_kernel must not reach past the image"),
        ("[grid", "not valid TOML"),
    ],
)  # fmt: skip
def test_what_cannot_be_crossed_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    if "views.size" in text:
        text = f"[views]\nblur_kernel = 17\n{text}"
    file = written(tmp_path, text)
    with pytest.raises(UsageError) as refused:
        grid.read(file)
    assert says in str(refused.value).replace(str(file), "FILE")
    assert "\n" not in str(refused.value)


def test_what_is_typed_counts_before_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, f"seeds = 2\n{SQUARE}")
    flags = {"train.device": Flag("--device", "cpu")}
    made = grid.read(file, seeds=1, sets=["optim.momentum=0.8", "optim.name=sgd"], flags=flags)
    assert len(made.tasks) == 4
    optim = made.tasks[0].config.optim
    assert (optim.momentum, optim.name) == (0.8, "sgd")
    with pytest.raises(UsageError, match=r"optim\.lr \(--set\): is crossed"):
        grid.read(file, sets=["optim.lr=0.8"])


def test_a_crossed_seed_is_the_runs_seed(tmp_path: Path) -> None:
    made = grid.read(written(tmp_path, '[grid]\n"train.seed" = [4, 7]'))
    assert [task.key for task in made.tasks] == ["seed=4/seed4", "seed=7/seed7"]


def test_a_larger_grid_has_the_runs_of_the_smaller(tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ask(SQUARE, out)
    finish(out, small.tasks[0].key, ["healthy"] * 20)
    larger = SQUARE.replace("[0.1, 0.5]", "[0.05, 0.5, 0.1]")
    made = ask(larger, out, seeds=2)
    assert {task.key for task in small.tasks} < {task.key for task in made.tasks}
    assert len(Ledger(out).entries()) == 12


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"optim.lr"', '"optim.momentum"', "holds a sweep over optim.lr and optim.weight_decay"),
        ("[optim]", "[train]\nepochs = 3\n[optim]", "with train.epochs = 20, asked for is 3"),
        ('"lars"', '"sgd"', 'with optim.name = "lars", asked for is "sgd"'),
        ("[optim]", '[data]\ntrain = "fashion-mnist"\n[optim]', 'data.train = "textures"'),
        ("[optim]", "[optim]\nrate_cap = 2.0", "optim.rate_cap = none, asked for is 2.0"),
    ],
)
def test_another_sweep_is_refused_in_one_folder(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    out = tmp_path / "out"
    ask(SQUARE, out)
    other = SQUARE.replace(old, new).replace("[0.1, 0.5]", "[0.1, 0.6]")
    with pytest.raises(UsageError) as refused:
        ask(other, out)
    assert says in str(refused.value)
    assert str(refused.value).endswith("name another folder with --out")


def test_what_depends_on_an_axis_is_no_setting_of_all_points(tmp_path: Path) -> None:
    """The schedules' horizon follows the epochs, and the lr the optimizer."""
    axes = '[grid]\n"train.epochs" = [1, 2]\n"optim.name" = ["sgd"]\n'
    ask(axes, tmp_path / "out")
    ask(axes.replace("[1, 2]", "[3]").replace('["sgd"]', '["lars"]'), tmp_path / "out")
    # Neither do where files lie and how fast they are read.
    ask(f"[data]\nworkers = 2\n{axes}", tmp_path / "out")
