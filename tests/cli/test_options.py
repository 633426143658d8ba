"""options.py: each option of `train` sets the fields at which it is declared."""

from __future__ import annotations

import pytest
import typer

from fastbyol import config_io
from fastbyol.cli.options import Json, config_flags, with_config_options
from fastbyol.config_io import Flag
from fastbyol.errors import UsageError


def flags(text: str) -> dict[str, Flag]:
    """Return the flags in the words of ``text`` by the key they set."""
    result: dict[str, Flag] = {}
    app = typer.Typer()

    @app.command()
    @with_config_options
    def command(as_json: Json = False, **values: object) -> None:
        result.update(config_flags(values))

    app(text.split(), standalone_mode=False)
    return result


BOTH = ("model.projector", "model.predictor")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("--norm ln --ws", {"model.norm": Flag("--norm", "ln"), "model.ws": Flag("--ws", True)}),
        ("--no-ws", {"model.ws": Flag("--ws", False)}),
        ("--mlp-norm gn", {f"{head}.norm": Flag("--mlp-norm", "gn") for head in BOTH}),
        ("--no-mlp-ws", {f"{head}.ws": Flag("--mlp-ws", False) for head in BOTH}),
        (
            "--predictor-norm none --mlp-norm brn",
            {
                "model.projector.norm": Flag("--mlp-norm", "brn"),
                "model.predictor.norm": Flag("--predictor-norm", "none"),
            },
        ),
        ("--projector-norm ln", {"model.projector.norm": Flag("--projector-norm", "ln")}),
        ("--predictor-layers 0", {"model.predictor.layers": Flag("--predictor-layers", 0)}),
        ("--res 32", {"views.size": Flag("--res", 32)}),
        (
            "--opt lars --lr 0.3",
            {"optim.name": Flag("--opt", "lars"), "optim.lr": Flag("--lr", 0.3)},
        ),
        ("--wd 0", {"optim.weight_decay": Flag("--wd", 0.0)}),
        ("--lars-on a,b --lars-on c", {"optim.lars_on": Flag("--lars-on", ["a", "b", "c"])}),
        (
            "--lr-mult a=b=4 --lr-mult c=0",
            {"optim.lr_mult": Flag("--lr-mult", [("a=b", 4.0), ("c", 0.0)])},
        ),
        ("--replay-rates r", {"optim.replay_rates": Flag("--replay-rates", "r")}),
        ("--data d --seed 7", {"data.train": Flag("--data", "d"), "train.seed": Flag("--seed", 7)}),
        ("--engine eager", {"engine.mode": Flag("--engine", "eager")}),
        ("--stop-on-collapse", {"train.stop_on_collapse": Flag("--stop-on-collapse", True)}),
        (
            "--method simsiam --queue 0",
            {"method.name": Flag("--method", "simsiam"), "method.queue": Flag("--queue", 0)},
        ),
    ],
)
def test_options_set_their_fields(text: str, expected: dict[str, Flag]) -> None:
    assert flags(text) == expected
    config_io.load(preset="demo", flags=expected)


@pytest.mark.parametrize("value", ["encoder", "=4", "encoder=", "encoder=many"])
def test_a_factor_without_a_pattern_or_a_number_is_refused(value: str) -> None:
    with pytest.raises(
        UsageError, match=r"--lr-mult .*: write PATTERN=FACTOR, for example encoder\.layer1=4"
    ):
        flags(f"--lr-mult {value}")
