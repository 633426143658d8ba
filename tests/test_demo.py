"""The demonstration goes on with runs of its own that were left behind, and shows what it found."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import no_graph
from fastbyol import config_io, demo
from fastbyol.ablations import plan
from fastbyol.data import embedded
from fastbyol.errors import NoGraphError, UsageError
from fastbyol.evaluation.intervals import Accuracy
from small import SETS
from tiny import TINY

SMALL = (
    "train.epochs=1",
    "data.textures_test_count=64",
    "data.textures_size=16",
    "probe.every_epochs=0",
)


def test_the_second_call_goes_on_with_the_run_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fresh process does after a recording that failed."""
    load = config_io.load

    def small(*, preset: str, sets: list[str]) -> Any:
        return load(preset=preset, sets=[*sets, *TINY, *SMALL])

    monkeypatch.setattr(config_io, "load", small)
    monkeypatch.setattr(demo, "_images", lambda _: "textures")
    monkeypatch.setattr(demo, "_pair", lambda *_: {})
    monkeypatch.setattr(demo, "_draw_pair", lambda _, out: out)
    monkeypatch.setattr(demo, "supervised", lambda *_: Accuracy(50.0, 64))
    monkeypatch.setattr(demo.run_report, "write", lambda *_, **__: [])
    no_graph.install(patch=monkeypatch.setattr)

    def run(seed: int) -> dict[str, Any]:
        return demo.run(tmp_path, seed=seed, console=Console(file=io.StringIO()))

    with pytest.raises(NoGraphError):
        run(0)
    assert run(0)["run"] == str(tmp_path / "run")
    for seed, path in (
        (0, "run-2"),
        (1, "run-3"),
    ):  # the first one is done, and another seed is another demonstration
        with pytest.raises(NoGraphError) as raised:
            run(seed)
        assert raised.value.run == tmp_path / path


def test_without_real_images_it_takes_textures_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Path:
        raise UsageError("fashion-mnist: not on this machine")

    monkeypatch.setattr(embedded, "training_file", refuse)
    printed = io.StringIO()
    assert demo._images(Console(file=printed)) == "textures"
    assert (
        "fashion-mnist: not on this machine; so this is on textures, where no recovery shows"
        in " ".join(printed.getvalue().split())
    )


def test_the_pair_are_the_arms_of_the_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are trained with the seed asked for, found again by a second call, and drawn."""
    make = plan.make
    monkeypatch.setattr(
        plan,
        "make",
        lambda *which, **options: make(
            *which, sets=[*SETS, "train.epochs=2", "data.limit=64"], **options
        ),
    )
    config = config_io.load(preset="demo", sets=["train.seed=3", "data.train=textures"]).config
    results = [demo._pair(tmp_path / "lars", config, Console(file=io.StringIO())) for _ in range(2)]
    assert results[0] == results[1]
    assert list(results[0]) == list(demo.PAIR)
    runs = {name: Path(row["run"]) for name, row in results[0].items()}
    for name, path in runs.items():
        there = config_io.read_run(path / "config.toml")
        assert (there.train.seed, there.optim.lr) == (3, float(name.rpartition("-")[2]))
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"train": "fashion-mnist"})}
    )
    assert [demo._pair_runs(tmp_path / "lars", each)[0].name for each in (config, other)] == [
        "lars",
        "lars-2",
    ]
    (tmp_path / "pictures").mkdir()
    assert demo._draw_pair(runs, tmp_path).stat().st_size > 10_000
