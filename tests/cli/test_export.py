"""``fastbyol export`` as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Command

from fastbyol import api
from tiny import beton_files, tiny_config

COMMAND = ["export"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    config = tiny_config(beton_files(folder), "train.epochs=1", "probe.every_epochs=0")
    api.train(config, folder / "run")
    return folder / "run"


def test_what_it_prints_can_be_pasted(run: Command, trained: Path) -> None:
    out = run.output(trained, "--out", "it's.pth", "--license", "MIT")
    head, _, code = out.partition("load it with\n\n")
    assert head.startswith("it's.pth: ")
    assert "\nit's.pth.md: the model card\nparity: at most " in head
    assert "on 50 images (test.beton, test); refused above " in head
    names: dict[str, torch.nn.Module] = {}
    exec("\n".join(line[4:] for line in code.splitlines()), names)
    assert names["model"](torch.zeros(2, 3, 16, 16)).shape == (2, 32)
    result = run.json(trained, "--format", "safetensors", "--weights", "target")
    assert result["out"] == str(trained / "exports" / "safetensors-target")
    assert result["parity"]["max_difference"] <= result["parity"]["tolerance"]
    assert 'license: "mit"\n' in Path("it's.pth.md").read_text()


def test_bad_input_is_one_line(run: Command, trained: Path) -> None:
    assert "no such file" in run.refusal("nowhere").lower()
    assert "torch-export" in run.refusal(trained, "--format", "keras")
    assert "has width 64, this encoder 4" in run.refusal(trained, "--format", "timm")
    assert "--num-classes 0" in run.refusal(trained, "--num-classes", 0)
    assert "at most 100000" in run.refusal(trained, "--num-classes", 10**15)
    assert "--license: is empty" in run.refusal(trained, "--license", " ")
    assert "no such folder" in run.refusal(trained, "--out", "a/b.pth")
    assert "not UTF-8" in run.refusal(trained, "--out", "\udce9.pth")
    assert "cannot be written" in run.refusal(trained, "--out", "a" * 254)
    Path("empty").mkdir()
    assert "no run here" in run.refusal("empty")
    assert [path.name for path in Path().iterdir()] == ["empty"]
