"""config_io.py: precedence, origins, messages of one line, and TOML that reads back."""

from __future__ import annotations

import os
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from fastbyol import config_io
from fastbyol.config import ENCODERS, Config, resolve
from fastbyol.config_io import Flag
from fastbyol.errors import UsageError

SPACE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def kinds(annotation: Any, bounds: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of an annotation of config.py, within the field's bounds."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([kinds(arg, bounds) for arg in args])
    if origin is typing.Annotated:
        return kinds(args[0], bounds | limits(args[1].metadata))
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(kinds(args[0], bounds), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(kinds(arg, bounds) for arg in args))
    if annotation is int:
        return st.integers(bounds.get("min_value"), bounds.get("max_value"))
    if annotation is float:
        return st.floats(**bounds, allow_nan=False, allow_infinity=False)
    plain = {
        type(None): st.none(),
        bool: st.booleans(),
        str: st.text(min_size=1).filter(lambda text: text != "none"),
    }
    return plain[annotation]


def limits(metadata: list[Any]) -> dict[str, Any]:
    bounds: dict[str, Any] = {}
    for limit in metadata:
        match limit:
            case Ge(ge=low):
                bounds["min_value"] = low
            case Gt(gt=low):
                bounds |= {"min_value": low, "exclude_min": True}
            case Le(le=high):
                bounds["max_value"] = high
            case Lt(lt=high):
                bounds |= {"max_value": high, "exclude_max": True}
    return bounds


def values(key: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    pair = st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)).map(lambda p: (min(p), max(p)))
    special = {
        "preset": st.sampled_from(config_io.presets()),
        "train.device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
        "train.seed": st.integers(0, 2**63 - 1),
        "model.encoder": st.sampled_from(ENCODERS),
        "log.project": st.sampled_from(["fastbyol", "7", "a b_c.d-e"]),
        "data.textures_seed": st.integers(0, 2**31 - 1),
        "views.blur_kernel": st.sampled_from([1, 3, 9, 15]),
        "views.std": st.tuples(*[st.floats(1e-3, 9.0)] * 3),
        "optim.lr_mult": st.lists(
            st.tuples(st.text(min_size=1), st.floats(0.0, 99.0)), max_size=3
        ).map(tuple),
        "optim.lars_on": st.lists(st.text(min_size=1), max_size=3).map(tuple),
    } | dict.fromkeys(("views.scale", "views.ratio", "views.blur_sigma"), pair)
    return special[key] if key in special else kinds(field.annotation, limits(field.metadata))


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        table = tree
        *sections, leaf = key.split(".")
        for section in sections:
            table = table.setdefault(section, {})
        table[leaf] = value
    return tree


KEYS = dict(config_io.keys())
CONFIGS = st.fixed_dictionaries(
    {}, optional={key: values(key, field) for key, field in KEYS.items()}
).map(lambda flat: Config.model_validate(nested(flat)))


@SPACE
@given(config=CONFIGS, origin=st.text())
def test_a_dumped_run_loads_over_any_preset_and_as_a_run(
    tmp_path: Path, config: Config, origin: str
) -> None:
    """Nothing that a preset says may show through a resolved configuration, and comments are only
    comments.
    """
    small = config.train.model_copy(update={"batch_size": min(config.train.batch_size, 64)})
    optim = config.optim.model_copy(update={"lr_scaling": "none"})
    method = config.method.model_copy(update={"queue": max(config.method.queue, 64)})
    data = config.data.model_copy(
        update={"limit": config.data.limit and max(config.data.limit, 64)}
    )
    resolved = resolve(
        config.model_copy(update={"train": small, "optim": optim, "method": method, "data": data})
    )
    path = tmp_path / "config.toml"
    path.write_text(
        config_io.dump(resolved, dict.fromkeys(KEYS, origin)), encoding="utf-8", newline=""
    )
    assert config_io.parse(config_io.dump(resolved), where="dump") == resolved
    assert config_io.load(file=path).config == resolved
    assert config_io.read_run(path) == resolved


def test_a_run_of_before_there_were_methods_is_byol(tmp_path: Path) -> None:
    """Its config.toml lacks their keys, and those of the predictor's layers."""
    new = ("[method]", 'name = "byol"', "temperature", "queue", "layers")
    config = config_io.load(preset="blog").config
    lines = [line for line in config_io.dump(config).splitlines() if not line.startswith(new)]
    (tmp_path / "config.toml").write_text("\n".join(lines))
    assert config_io.read_run(tmp_path / "config.toml") == config


def test_what_resolving_leaves_open_is_in_no_preset() -> None:
    """None is a key left out, so a preset that sets a key which may stay None would show through a
    run's file.
    """
    open_keys = {
        key for key, value in config_io.flatten(resolve(Config())).items() if value is None
    }
    fields = {"data.image_field", "data.label_field"}
    assert open_keys == fields | {
        "data.test",
        "data.split",
        "data.test_split",
        "train.init_from",
        "optim.rate_cap",
        "optim.replay_rates",
        "train.ranks",
        "run.checkpoint_every_s",
    }
    for name in config_io.presets():
        assert not open_keys & set(
            config_io.flatten_table(tomllib.loads(config_io.preset_text(name)))
        )


# Precedence.

LAYERED: dict[str, tuple[Any, ...]] = {
    "optim.momentum": (0.1, 0.2, 0.3),
    "model.norm": ("gn", "ln", "none"),
    "train.epochs": (3, 4, 5),
    "model.projector.norm": ("brn", "gn", "ln"),
    "data.train": ("a.beton", "b c.beton", "7"),
    "optim.lars_on": (("a",), ("b", "c.*"), ("d",)),
    "views.scale": ((0.1, 0.2), (0.3, 0.4), (0.5, 0.6)),
    "train.stop_on_collapse": (True, False, True),
}


@SPACE
@given(
    preset=st.sampled_from(config_io.presets()),
    layers=st.fixed_dictionaries({key: st.tuples(*[st.booleans()] * 3) for key in LAYERED}),
)
def test_the_strongest_layer_wins_and_is_named(
    tmp_path: Path, preset: str, layers: dict[str, tuple[bool, ...]]
) -> None:
    spoken = {key: [level for level in range(3) if layers[key][level]] for key in LAYERED}
    lines = [
        f"{key} = {config_io.toml_value(LAYERED[key][0])}" for key in LAYERED if 0 in spoken[key]
    ]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines))
    sets = [f"{key}={config_io.toml_value(LAYERED[key][1])}" for key in LAYERED if 1 in spoken[key]]
    flags = {
        key: Flag(f"--{key}", LAYERED[key][2] if 2 in spoken[key] else None) for key in LAYERED
    }
    loaded = config_io.load(preset=preset, file=path, sets=sets, flags=flags)
    below = config_io.load(preset=preset)
    for key, options in LAYERED.items():
        strongest = max(spoken[key], default=None)
        got, origin = config_io.flatten(loaded.config)[key], loaded.origin[key]
        assert got == (
            config_io.flatten(below.config)[key] if strongest is None else options[strongest]
        )
        named = {
            None: below.origin[key],
            0: f"{path}:{line_of(lines, key)}",
            1: "--set",
            2: f"--{key}",
        }
        assert origin == named[strongest]


def line_of(lines: list[str], key: str) -> int | None:
    return next(
        (number for number, line in enumerate(lines, 1) if line.startswith(f"{key} =")), None
    )


def test_the_preset_is_chosen_by_flag_then_set_then_file_then_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('# mine\npreset = "paper"\n')
    assert config_io.load().config.preset == "blog"
    assert config_io.load(default="paper").origin["preset"] == "default"
    from_file = config_io.load(file=path)
    assert (from_file.config.preset, from_file.origin["preset"]) == ("paper", f"{path}:2")
    assert from_file.config.optim.name == "lars"
    assert config_io.load(file=path, sets=["preset=demo"]).config.preset == "demo"
    assert (
        config_io.load(preset="blog", file=path, sets=["preset=demo"]).origin["preset"]
        == "--preset"
    )
    assert "preset" not in config_io.requested(sets=["train.epochs=1"])


def test_origins_of_derived_numbers() -> None:
    paper = config_io.load(preset="paper", flags={"train.batch_size": Flag("--batch-size", 512)})
    assert paper.config.optim.lr == 0.2 * 512 / 256
    assert paper.origin["optim.lr"] == "optim.lars_lr, times train.batch_size / 256"
    assert paper.origin["schedule.horizon_epochs"] == "train.epochs"
    assert config_io.load(flags={"optim.lr": Flag("--lr", 0.1)}).origin["optim.lr"] == "--lr"
    assert config_io.load().origin["optim.lr"] == "optim.sgd_lr"
    assert paper.origin.keys() == KEYS.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=0.1", 0.1),
        ("optim.lr=1", 1.0),
        ("optim.lr = 1e-3", 1e-3),
        ("model.norm=gn", "gn"),
        ('model.norm="gn"', "gn"),
        ("model.ws=true", True),
        ("model.ws=yes", True),
        ('optim.lars_on=["encoder.layer1"]', ("encoder.layer1",)),
        ("optim.lars_on=encoder.layer1, encoder.layer2", ("encoder.layer1", "encoder.layer2")),
        ("optim.lars_on=encoder.layer[12].*", ("encoder.layer[12].*",)),
        ("optim.lars_on=[]", ()),
        ("views.scale=0.1,0.9", (0.1, 0.9)),
        ('optim.lr_mult=[["encoder", 2]]', (("encoder", 2.0),)),
        ("data.train=2024-01-01", "2024-01-01"),
        ("data.train=a=b.beton", "a=b.beton"),
        ("data.test=none", None),
        ("schedule.horizon_epochs=none", 320),  # cleared, so resolved to the run's 320 epochs
        ("train.seed=1_000", 1000),
        ("model.predictor.layers=0", 0),
        ("method.queue=0", 0),
    ],
)
def test_set_reads_toml_and_bare_words(text: str, expected: object) -> None:
    config = config_io.load(preset="blog", sets=[text]).config
    assert config_io.flatten(config)[text.partition("=")[0].strip()] == expected


def test_flags_take_paths_and_comma_lists() -> None:
    flags = {
        "data.train": Flag("--data", Path("x/y.beton")),
        "optim.lars_on": ("--lars-on", "a,b"),
        "optim.lr": ("--lr", None),
    }
    config = config_io.load(flags=flags).config
    assert (config.data.train, config.optim.lars_on, config.optim.lr) == (
        "x/y.beton",
        ("a", "b"),
        0.8,
    )


# Messages.


def message(tmp_path: Path, text: str | bytes | None = None, **arguments: Any) -> str:
    if text is not None:
        arguments["file"] = tmp_path / "mine.toml"
        arguments["file"].write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        config_io.load(**arguments)
    line = str(caught.value)
    assert "\n" not in line
    assert "http" not in line
    return line.replace(str(tmp_path / "mine.toml"), "FILE")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[optim]\nlr = 1\nlarson = 2\n", ("optim.larson (FILE:3)", "optim.lars_on")),
        ("[optimiser]\nlr = 1\n", ("optimiser.lr (FILE:2)", "optim.lr")),
        ("lr = 1\n", ("lr (FILE:1)", "optim.lr")),
        (
            "[modle.projector]\nnorm = 'bn'\n",
            ("modle.projector.norm (FILE:2)", "model.projector.norm"),
        ),
        ("epochs = 3\n", ("epochs (FILE:1)", "train.epochs")),
        ("[train]\nbatchsize = 3\n", ("train.batchsize (FILE:2)", "train.batch_size")),
        ("[schedule]\nwarmup = 3\n", ("schedule.warmup (FILE:2)", "schedule.warmup_epochs")),
        ("[optim.lr]\nx = 3\n", ("optim.lr.x (FILE:2)", "optim.lr")),
        ("[nothing]\n", ("nothing (FILE:1)", "nearest")),
        ("optim = 3\n", ("optim (FILE:1)", "section", "optim.name")),
        ("[[optim]]\nlr = 1\n", ("optim (FILE:1)", "section")),
        ("[optim]\nlr = -1\n", ("optim.lr = -1 (FILE:2)", "greater than or equal to 0")),
        ("optim = {lr = -1}\n", ("optim.lr = -1 (FILE:1)",)),
        ("[optim]\nlr = 2024-01-01\n", ("optim.lr", "FILE:2", "valid number")),
        ("[optim]\nlr = 'a\\nb'\n", ("optim.lr", "FILE:2", "valid number")),
        ("[optim]\nlr = true\n", ("optim.lr = true (FILE:2)", "true or false")),
        ("[optim]\nlr = nan\n", ("optim.lr = nan (FILE:2)", "finite")),
        ("[optim]\nlars_on = 'encoder'\n", ("optim.lars_on", "FILE:2", "valid tuple")),
        ("[model]\nnorm = 'gm'\n", ('model.norm = "gm" (FILE:2)', "'bn', 'gn', 'ln' or 'none'")),
        ("[views]\nscale = [0.5, 0.1]\n", ("views.scale", "FILE:2", "smaller first")),
        ("[views]\nscale = [0.5]\n", ("views.scale = [0.5] (FILE:2)", "more values")),
        ("[views]\nscale = [0.5, 0.6, 0.7]\n", ("views.scale", "FILE:2", "at most 2")),
        (
            "[views]\nsize = 8\nblur = 'gaussian'\nblur_kernel = 63\n",
            ("FILE:4", "FILE:2", "63 taps"),
        ),
        (
            "[optim]\nlars_excludm = 'none'\n",
            ("optim.lars_excludm (FILE:2)", "nearest is optim.lars_exclude"),
        ),
        ("[optim]\nlr = = 1\n", ("FILE:2:6: not valid TOML",)),
        ("[optim\n", ("FILE:1:7: not valid TOML",)),
        # More digits than Python reads (sys.get_int_max_str_digits).
        pytest.param(
            f"[train]\nepochs = {'9' * 5000}\n", ("FILE: not valid TOML", "digits"), id="digits"
        ),
        ("optim.lr = 1\n[optim]\nlr = 2\n", ("FILE", "not valid TOML")),
        ("preset = 'blgo'\n", ('FILE:1 "blgo"', "no such preset", "blog")),
        ("preset = 3\n", ('FILE:1 "3"', "no such preset")),
        (b"\xff\xfe", ("FILE: not a TOML file",)),
    ],
)
def test_messages_about_a_file(tmp_path: Path, text: str | bytes, parts: tuple[str, ...]) -> None:
    line = message(tmp_path, text)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"sets": ["optim.lr"]}, ("--set", "key=value")),
        ({"sets": ["learning_rate=1"]}, ("learning_rate (--set)", "nearest")),
        ({"sets": ["model.mlp_norm=bn"]}, ("model.mlp_norm (--set)", "model.norm")),
        ({"sets": ["optim.lr=abc"]}, ('optim.lr = "abc" (--set)', "valid number")),
        ({"sets": ["train.epochs=1.5"]}, ("train.epochs = 1.5 (--set)", "integer")),
        pytest.param(
            {"sets": ["train.epochs=" + "9" * 5000]},
            ("train.epochs", "(--set)", "integer"),
            id="digits",
        ),
        ({"sets": ["train.epochs=0"]}, ("train.epochs = 0 (--set)", "greater than or equal to 1")),
        ({"sets": ["train.device=gpu"]}, ('train.device = "gpu" (--set)', "auto|cpu|cuda")),
        ({"sets": ["optim.lr_mult=a,b"]}, ("optim.lr_mult", "--set")),
        ({"flags": {"model.norm": Flag("--norm", "gm")}}, ('model.norm = "gm" (--norm)',)),
        (
            {"flags": {"optim.lr_mult": Flag("--lr-mult", [("a", -1.0)])}},
            ("optim.lr_mult", "--lr-mult", "0 or more"),
        ),
        ({"preset": "none such"}, ('--preset "none such"', "blog, demo, paper")),
        ({"file": Path("/nowhere/x.toml")}, ("/nowhere/x.toml", "No such file")),
        ({"file": Path("/")}, ("/: cannot read", "is a folder")),
        (
            {"sets": ["train.batch_size=5000", "data.textures_count=4096"]},
            ("5000 (--set)", "4096", "no step"),
        ),
        (
            {"sets": ["method.name=contrastive"], "flags": {"method.queue": Flag("--queue", 255)}},
            (
                "method.queue = 255 (--queue)",
                "fewer keys than the 256",
                "train.batch_size: preset blog",
                "take 256 or more, or 0",
            ),
        ),
        (
            {"sets": ["model.predictor.layers=1"]},
            ("model.predictor.layers = ", "(--set)", "should be 0 or 2"),
        ),
        (
            {"sets": ["model.projector.layers=0"]},
            ("model.projector.layers (--set)", "model.predictor.layers"),
        ),
        (
            {"sets": ["method.name=moco"]},
            ('method.name = "moco" (--set)', "'byol', 'contrastive' or 'simsiam'"),
        ),
        ({"sets": ["method.temperature=0"]}, ("method.temperature = 0 (--set)", "greater than 0")),
        (
            {
                "preset": "paper",
                "sets": ["train.batch_size=60000", "data.textures_count=60000", "optim.lr=30"],
            },
            (
                "optim.lr = 7031.25 (--set, times train.batch_size / 256)",
                "less than or equal to 1000",
            ),
        ),
    ],
    ids=str,
)
def test_messages_about_arguments(
    tmp_path: Path, arguments: dict[str, Any], parts: tuple[str, ...]
) -> None:
    line = message(tmp_path, **arguments)
    assert all(part in line for part in parts), line


def complaint(build: Callable[[], object]) -> str:
    try:
        build()
    except UsageError as error:
        return str(error)
    return ""


@SPACE
@given(st.text())
def test_any_text_as_a_file_gives_a_configuration_or_one_line(text: str) -> None:
    assert len(complaint(lambda: config_io.parse(text, where="x")).splitlines()) <= 1


@SPACE
@given(st.sampled_from(sorted(KEYS)) | st.text(), st.text())
def test_any_text_as_a_value_gives_a_configuration_or_one_line(key: str, value: str) -> None:
    assert len(complaint(lambda: config_io.load(sets=[f"{key}={value}"])).splitlines()) <= 1


def test_a_bad_run_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[train]\nepochs = 0\n")
    with pytest.raises(UsageError, match=r"config.toml:2\): should be greater"):
        config_io.read_run(path)


@SPACE
@given(
    st.sampled_from(sorted(KEYS)), st.integers(0, 40), st.sampled_from(["drop", "double", "swap"])
)
def test_the_nearest_key_of_a_typing_error_is_the_right_one(
    key: str, position: int, slip: str
) -> None:
    leaf_start = key.rfind(".") + 1
    position = leaf_start + position % max(len(key) - leaf_start - 1, 1)
    typed = {
        "drop": key[:position] + key[position + 1 :],
        "double": key[:position] + key[position] + key[position:],
        "swap": key[:position]
        + key[position + 1 : position + 2]
        + key[position]
        + key[position + 2 :],
    }[slip]
    near = config_io.nearest_key(typed)
    # With one of its few letters gone, a short name may be as near to another.
    assert near == key or typed in KEYS or len(key) - leaf_start <= 4


# Presets.


def test_each_preset_names_itself_and_says_what_it_is() -> None:
    assert config_io.presets() == ("blog", "demo", "paper")
    for name in config_io.presets():
        assert config_io.load(preset=name).config.preset == name
        assert config_io.preset_text(name).startswith("# ")
        assert len(config_io.preset_summary(name)) > 20
        assert tomllib.loads(config_io.preset_text(name))["preset"] == name


def test_a_copied_preset_loads_to_the_same(tmp_path: Path) -> None:
    for name in config_io.presets():
        path = tmp_path / f"my-{name}.toml"
        path.write_text(config_io.preset_text(name), encoding="utf-8")
        assert config_io.load(file=path).config == config_io.load(preset=name).config


@pytest.mark.parametrize("name", ["blog", "paper"])
def test_every_number_of_the_method_is_written_out_in_the_preset(name: str) -> None:
    """So that a change of a default in config.py cannot change a preset unnoticed."""
    settings_there = config_io.flatten_table(tomllib.loads(config_io.preset_text(name)))
    method = {
        key
        for key in KEYS
        if key.split(".")[0] in ("views", "model", "method", "optim", "schedule")
    }
    left_to_others = {"optim.lr", "optim.weight_decay", "schedule.horizon_epochs", "model.groups"}
    off = {"optim.rate_cap", "optim.replay_rates"}
    assert method - set(settings_there) <= left_to_others | off


def test_blog_is_the_original_code() -> None:
    config = config_io.load(preset="blog").config
    optim, schedule, views = config.optim, config.schedule, config.views
    assert (optim.name, optim.lr, optim.weight_decay, optim.momentum) == ("sgd", 0.8, 1e-4, 0.9)
    lars = config_io.load(preset="blog", flags={"optim.name": Flag("--opt", "lars")}).config.optim
    assert (lars.lr, lars.weight_decay, lars.dialect, lars.eta) == (0.2, 1.5e-6, "blog", 1e-3)
    assert (schedule.lr_unit, schedule.tau_unit, schedule.ema_order) == ("epoch", "epoch", "before")
    assert (schedule.horizon_epochs, schedule.warmup_epochs, schedule.tau) == (320, 0.0, 0.996)
    assert (
        config_io.load(preset="blog", sets=["train.epochs=10"]).config.schedule.horizon_epochs
        == 320
    )
    jitter = [
        views.strength * value
        for value in (views.brightness, views.contrast, views.saturation, views.hue)
    ]
    assert jitter == [0.4, 0.4, 0.4, 0.1]
    assert (views.blur, views.size, config.train.batch_size, config.train.loss_scale) == (
        "pil",
        96,
        256,
        1.0,
    )
    assert (config.model.projector.hidden, config.model.projector.out) == (512, 128)
    assert config.train.precision == "auto"  # which a run's own file names


def test_paper_is_byol_as_published() -> None:
    config = config_io.load(preset="paper").config
    optim, schedule, views = config.optim, config.schedule, config.views
    assert (optim.name, optim.lr, optim.weight_decay, optim.dialect) == (
        "lars",
        0.2 * 4096 / 256,
        1.5e-6,
        "deepmind",
    )
    assert (optim.lars_exclude, optim.decay_exclude) == ("bias_and_norm", "bias_and_norm")
    assert (schedule.lr_unit, schedule.tau_unit, schedule.ema_order, schedule.warmup_epochs) == (
        "step",
        "step",
        "after",
        10.0,
    )
    assert (
        config_io.load(preset="paper", sets=["train.epochs=100"]).config.schedule.horizon_epochs
        == 100
    )
    jitter = [
        views.strength * value
        for value in (views.brightness, views.contrast, views.saturation, views.hue)
    ]
    assert jitter == [0.4, 0.4, 0.2, 0.1]
    assert (views.scale, views.blur_p, views.solarize_p) == ((0.08, 1.0), (1.0, 0.1), (0.0, 0.2))
    assert (config.model.predictor.hidden, config.model.predictor.out) == (4096, 256)
    assert config.train.loss_scale == 2.0  # 2 - 2 cos per direction, against our 1 - cos


# Encoders of other libraries.


def test_a_presets_width_is_of_the_encoder_that_it_names() -> None:
    """The demo preset has width 16. A run of it that is dumped reads back over any preset."""
    flags = {"model.encoder": Flag("--encoder", "timm:test_vit")}
    loaded = config_io.load(preset="demo", flags=flags)
    assert (loaded.config.model.width, loaded.origin["model.width"]) == (64, "default")
    assert loaded.config.model.foreign == ("timm", "test_vit")
    assert config_io.parse(config_io.dump(loaded.config, loaded.origin), "text") == loaded.config
    again = {"model.encoder": Flag("--encoder", "resnet18")}
    assert config_io.load(preset="demo", flags=again).config.model.width == 16


@pytest.mark.parametrize("setting", ["norm=gn", "ws=true", "width=8", "stem=small"])
def test_what_is_of_fastbyols_own_encoders_is_refused_beside_another(setting: str) -> None:
    with pytest.raises(UsageError) as refused:
        config_io.load(sets=["model.encoder=timm:test_vit", f"model.{setting}"])
    line = str(refused.value)
    assert line.startswith(f"model.{setting.partition('=')[0]} is of fastbyol's own encoders")
    assert "leave it out" in line


@pytest.mark.parametrize(
    "name", ["resnet19", "timm:", "timm:../x", "timm:hf-hub:me/net", "torch:x", "TIMM:vit", ""]
)
def test_an_encoder_of_no_library_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"should be resnet18, resnet34, resnet50, timm:NAME or"):
        config_io.load(flags={"model.encoder": Flag("--encoder", name)})


# Remarks.


def test_notes_tell_what_surprises(tmp_path: Path) -> None:
    assert config_io.load(preset="paper").notes == ()
    assert "warm-up" in config_io.load(preset="paper", sets=["train.epochs=3"]).notes[0]
    assert "horizon of 320" in config_io.load(preset="blog", sets=["train.epochs=400"]).notes[0]
    path = tmp_path / "config.toml"
    path.write_text(config_io.dump(config_io.load(preset="blog").config))
    (note,) = config_io.load(file=path, flags={"optim.name": Flag("--opt", "lars")}).notes
    assert "optim.lr = 0.8" in note
    assert "--opt" in note


@pytest.mark.parametrize(
    "key", ["data.train", "data.test", "train.init_from", "optim.replay_rates"]
)
def test_a_name_that_toml_cannot_hold_is_refused_in_a_line(key: str) -> None:
    name = os.fsdecode(b"caf\xe9\x1b[31m.beton")
    with pytest.raises(UsageError) as refused:
        config_io.load(flags={key: Flag("--flag", name)})
    line = str(refused.value)
    assert line.isprintable()
    assert line.startswith(key)
    assert "caf\\udce9" in line
    assert "link" in line


def test_an_origin_with_any_letters_is_a_comment_of_one_line() -> None:
    config = resolve(Config())
    text = config_io.dump(
        config, dict.fromkeys(config_io.keys(), os.fsdecode(b"caf\xe9\n\r\x1b.toml:3"))
    )
    assert r"# caf\udce9\n\r\x1b.toml:3" in text
    assert config_io.parse(text.encode().decode(), "text") == config
