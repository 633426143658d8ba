"""The demonstration goes on with a run of its own that was left behind."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import no_graph
from fastbyol import config_io, demo
from fastbyol.errors import NoGraphError
from tiny import TINY

SMALL = ("train.epochs=1", "data.textures_test_count=64", "data.textures_size=16", "probe.every_epochs=0")


def test_the_second_call_goes_on_with_the_run_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fresh process does after a recording that failed."""
    load = config_io.load

    def small(*, preset: str, sets: list[str]) -> Any:
        return load(preset=preset, sets=[*sets, *TINY, *SMALL])

    monkeypatch.setattr(config_io, "load", small)
    monkeypatch.setattr(demo, "_supervised", lambda *_: 50.0)
    monkeypatch.setattr(demo.report, "write", lambda *_, **__: [])
    no_graph.install(patch=monkeypatch.setattr)

    def run(seed: int) -> dict[str, Any]:
        return demo.run(tmp_path, seed=seed, console=Console(file=io.StringIO()))

    with pytest.raises(NoGraphError):
        run(0)
    assert run(0)["run"] == str(tmp_path / "run")
    for seed, path in ((0, "run-2"), (1, "run-3")):  # the first one is done, and another seed is another demonstration
        with pytest.raises(NoGraphError) as raised:
            run(seed)
        assert raised.value.run == tmp_path / path
