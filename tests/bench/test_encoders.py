"""The list of networks that were tried: drawn by a seed, each with a line of its own."""

from __future__ import annotations

import pytest

from fastbyol_bench import encoders


def test_the_same_seed_draws_the_same_networks() -> None:
    every = encoders.chosen("torchvision", None, 0)
    assert "torchvision:resnet18" in every
    assert len(every) > 50
    drawn = encoders.chosen("timm", 5, 1)
    assert drawn == encoders.chosen("timm", 5, 1) != encoders.chosen("timm", 5, 2)


def test_each_has_a_line_with_its_size_or_the_reason() -> None:
    names = ["timm:test_resnet", "torchvision:alexnet", "timm:nosuchthing"]
    (_, first, normed), (_, second, plain), (_, none, reason) = encoders.tried(names)
    assert (first, second, none) == (32, 64, None)
    assert normed == "timm:test_resnet: 32 px, 96 features, 0.4 M, batch norm"
    assert plain == "torchvision:alexnet: 64 px, 4096 features, 57.0 M"
    assert "no such network" in reason


def test_the_command_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoders, "chosen", lambda *_: ["timm:test_vit"])
    monkeypatch.setattr("sys.argv", ["encoders", "timm"])
    encoders.main()
    assert capsys.readouterr().out.endswith("1 of 1 networks of timm train and embed\n")
