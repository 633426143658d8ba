"""The choice of precision ``auto``: the gate must find networks whose gradients bf16 spoils."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbyol import api, load_config
from fastbyol.config import Config
from fastbyol.engine import precision
from fastbyol.engine.observer import Silent
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from fastbyol.runs.folder import RunFolder
from tiny import beton_files, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide an empty cache folder."""
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the states that the gate measures, all sound, on a cpu with units for bf16."""
    states: list[str] = []

    def gap(config: Config, device: torch.device, state: str) -> precision.Gap:
        states.append(state)
        return precision.Gap(0.0, 0.0)

    monkeypatch.setattr(precision, "gradient_gap", gap)
    with_units(monkeypatch, avx512_bf16=True)
    return states


def network(norm: str, heads: str, ws: bool) -> Config:
    sets = {"norm": norm, "projector.norm": heads, "predictor.norm": heads, "ws": str(ws).lower()}
    return load_config("blog", [f"model.{key}={value}" for key, value in sets.items()])


def with_units(monkeypatch: pytest.MonkeyPatch, **units: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)


@pytest.mark.parametrize("unit", [*precision.CPU_UNITS, "avx512_f"])
def test_a_cpu_with_bf16_units_takes_bf16(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    with_units(monkeypatch, **{unit: True})
    chosen = precision.decide(network("bn", "bn", False), CPU)
    assert chosen.value == ("bf16" if unit in precision.CPU_UNITS else "fp32")
    assert (unit in chosen.why) == (chosen.value == "bf16")


def test_a_network_that_loses_its_gradients_takes_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group norm in the heads over standardized weights: the gradient's direction is gone, by
    bf16's rounding of y alone.
    """
    with_units(monkeypatch, avx512_bf16=True)
    chosen = precision.decide(network("gn", "gn", True), CPU)
    assert chosen.value == "fp32"
    assert "gradients are off" in chosen.why


def test_the_gap_is_none_between_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_narrow", lambda config, _: config)
    config = load_config(
        "blog",
        [
            "train.precision=fp64",
            "model.width=4",
            "model.projector.out=32",
            "model.predictor.out=32",
        ],
    )
    assert precision.gradient_gap(config, CPU, "collapsed") == (0.0, 0.0)


def test_the_exact_step_has_no_use_for_tritons_kernels() -> None:
    config = load_config("blog", ["engine.kernels=triton"])
    assert [precision._narrow(config, unit).engine.kernels for unit in ("fp64", "bf16")] == [
        "auto",
        "triton",
    ]


def test_a_run_names_what_auto_became(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_units(monkeypatch, avx512_bf16=True)
    config = tiny_config(beton_files(tmp_path), "train.precision=auto", "train.epochs=1")
    notes: list[str] = []
    observer = Silent()
    monkeypatch.setattr(observer, "note", notes.append)
    api.train(config, tmp_path / "run", observer=observer)
    assert notes[0].startswith("precision auto is bf16: ")
    with_units(monkeypatch)  # another machine: a resume does not choose again
    with RunFolder.open(tmp_path / "run", lock=False) as folder:
        assert folder.config.train.precision == "bf16"
        assert precision.choose_precision(folder.config) == folder.config


def test_a_state_needs_a_chosen_precision() -> None:
    with pytest.raises(UsageError, match="has to be chosen"):
        TrainState.create(load_config("blog", ["model.width=4"]), steps_per_epoch=1)


def test_the_gates_answer_is_kept(measured: list[str], cache: Path) -> None:
    first = precision.decide(network("bn", "bn", False), CPU)
    assert measured == list(precision.STATES)
    assert precision.decide(network("bn", "bn", False), CPU) == first
    assert measured == list(precision.STATES)
    assert len(list(cache.rglob("*.*"))) == 1


def test_what_the_narrow_copy_leaves_out_asks_no_other_question(measured: list[str]) -> None:
    for sets in (
        ["train.seed=5"],
        ["model.width=32"],
        ["optim.name=lars"],
        ["train.batch_size=64"],
    ):
        precision.decide(load_config("blog", sets), CPU)
    assert measured == list(precision.STATES)


@pytest.mark.parametrize(
    "changed",
    [
        (torch, "__version__", "2.99.0"),
        (torch.version, "cuda", "99.0"),
        (torch.backends.cudnn, "version", lambda: 99),
        (precision, "cpu_name", lambda: "another"),
        (precision, "package_version", lambda _: "99"),
        (precision, "_sources", lambda: "another"),
        (precision, "WIDTH", 8),
        (torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}),
    ],
    ids=lambda changed: changed[1],
)
def test_whatever_may_change_the_answer_asks_again(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, changed: tuple[Any, str, Any]
) -> None:
    config = network("bn", "bn", False)
    precision.decide(config, CPU)
    monkeypatch.setattr(*changed)
    precision.decide(config, CPU)
    assert measured == [*precision.STATES, *precision.STATES]


def test_another_network_asks_again(measured: list[str]) -> None:
    configs = [network("bn", "bn", False), network("gn", "bn", False), network("bn", "bn", True)]
    configs.append(load_config("blog", ["model.groups=8"]))
    for config in configs * 2:
        precision.decide(config, CPU)
    assert len(measured) == len(configs) * len(precision.STATES)


def test_a_gpus_answer_depends_on_its_name_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor = "NVIDIA H100", 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    asked = precision.question(network("bn", "bn", False), torch.device("cuda", 0))
    assert (asked["device"], asked["capability"]) == ("NVIDIA H100", "9.0")


def test_code_that_changed_asks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    monkeypatch.setattr(precision.fastbyol_kernels, "__file__", str(kernels / "__init__.py"))
    digests = set()
    for text in ("a = 1", "a = 2"):
        (kernels / "norm.py").write_text(text)
        digests |= {precision._sources(), precision._sources()}
    assert len(digests) == 2


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "7", "null", "\xff",
        '{"value": "bf16"}', '{"value": "fp8", "why": "x"}', '{"value": "bf16", "why": 1}',
        '{"value": "bf16", "why": "x", "asked": {"torch": "2.99.0"}}',  # to another question
    ],
)  # fmt: skip
def test_a_damaged_file_is_no_answer(measured: list[str], cache: Path, text: str) -> None:
    config = network("bn", "bn", False)
    kept = precision.decide(config, CPU)
    (file,) = cache.rglob("*.json")
    asked = json.loads(file.read_text())["asked"]
    damaged = {"asked": asked, **json.loads(text)} if text.startswith('{"') else text
    file.write_bytes((json.dumps(damaged) if isinstance(damaged, dict) else text).encode("latin-1"))
    assert precision.decide(config, CPU) == kept
    assert measured == [*precision.STATES, *precision.STATES]
    assert precision.kept_answer(precision.question(config, CPU)) == kept, "and written again"


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "file"))
    config = network("bn", "bn", False)
    assert precision.decide(config, CPU) == precision.decide(config, CPU)
    assert len(measured) == 2 * len(precision.STATES)


def test_two_that_ask_at_once_leave_a_whole_answer(
    measured: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes a file of its own; here threads stand for the processes, and numbers of theirs
    for process numbers.
    """
    monkeypatch.setattr(precision.os, "getpid", threading.get_ident)
    asked, answer = (
        precision.question(network("bn", "bn", False), CPU),
        precision.Choice("bf16", "x" * 100_000),
    )
    seen: list[precision.Choice | None] = []

    def write() -> None:
        for _ in range(20):
            precision._keep(asked, answer)
            seen.append(precision.kept_answer(asked))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [answer] * 80
    assert len(list(cache.rglob("*.*"))) == 1
