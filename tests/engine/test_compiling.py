"""Kernels that a run needs are compiled before it: all of them, with a line, and once."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastbyol import load_config, output
from fastbyol.config import Resolved, resolve
from fastbyol.engine import compiling
from fastbyol.engine.step import TrainState, train_step
from fastbyol.views import two_views
from fastbyol_kernels import native

SMALL = ("train.device=cpu", "train.batch_size=4", "views.size=16", "model.width=4")


def _config(*settings: str) -> Resolved:
    return resolve(load_config("demo", [*SMALL, *settings]))


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("model.stem=small", "train.precision=bf16"),
        ("model.norm=gn", "model.ws=true", "optim.name=lars"),
        ("model.norm=ln", "model.stem=small"),
        ("model.norm=none",),
    ],
)
def test_what_a_step_calls_is_what_is_compiled_before_it(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled: a kernel notes its call and leaves zeros, so that all stays finite."""
    called: set[tuple[native.Kernel, torch.dtype]] = set()

    def note(self: native.Kernel, num_blocks: int, *arguments: object) -> None:
        named = dict(zip((name for name, _ in self._passed), arguments, strict=True))
        for value in arguments:
            if isinstance(value, torch.Tensor):
                value.data.zero_()
        activations = [
            value.dtype
            for name, value in named.items()
            if self._kinds[name] == native._ACTIVATION and isinstance(value, torch.Tensor)
        ]
        called.add((self, activations[0] if activations else torch.float32))

    monkeypatch.setattr(native.Kernel, "__call__", note)
    asked: list[tuple[list[native.Kernel], torch.dtype]] = []
    monkeypatch.setattr(native, "missing", lambda *a: asked.append(a) or [])
    config = _config(*settings)
    compiling.compile_kernels(config)
    state = TrainState.create(config, steps_per_epoch=10, device=torch.device("cpu"))
    images = torch.zeros(4, 20, 20, 3, dtype=torch.uint8)
    views = two_views(
        config.views, images, torch.arange(4), seed=0, epoch=0, dtype=state.recipe.views_dtype
    )
    train_step(state, views)
    ((kernels, dtype),) = asked
    assert {(each, each._fitting(dtype)) for each in kernels} == called


@pytest.mark.parametrize(
    "settings", ["engine.kernels=reference", "engine.mode=compile", "train.precision=fp64"]
)
def test_a_run_without_kernels_of_the_cpu_compiles_none(
    settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "missing", lambda *_: pytest.fail("asked for kernels"))
    compiling.compile_kernels(_config(settings))


def test_a_command_says_once_what_it_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a log, a line at the beginning and one at the end; nothing once the cache has them."""

    def fresh() -> tuple[native.Kernel, ...]:
        @native.kernel
        def counted(block: int, counts: native.I64) -> None:
            counts[block] += 1

        return (counted,)

    monkeypatch.setattr(native, "_parents", lambda: iter([tmp_path]))
    monkeypatch.setattr(compiling, "_operations", lambda _: ["views"])
    for lines in (["compiling kernels for this cpu, once", "compiled 1 kernels in "], []):
        monkeypatch.setattr(import_module("fastbyol_kernels.views.cpu"), "TRAINED_WITH", fresh())
        with output.guarded():
            compiling.compile_kernels(_config())
        printed = capfd.readouterr()
        assert printed.out == ""
        assert [a.startswith(b) for a, b in zip(printed.err.splitlines(), lines, strict=True)] == [
            True for _ in lines
        ]
    assert (tmp_path / f"kernels-{os.geteuid()}").is_dir()
