"""Built-in sets: each is made once, however many processes ask for it at once."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from fastbyol.config import DataConfig
from fastbyol.data import beton, convert, embedded

CONFIG = DataConfig(textures_count=64, textures_size=16)
PROCESSES = multiprocessing.get_context("forkserver")


def ask(start: Any, answers: Any, cache: str) -> None:
    """Answer with the inode of the set's file, and whether this process wrote it."""
    wrote = []
    convert_ = convert.convert

    def counting(*arguments: Any, **options: Any) -> Any:
        wrote.append(1)
        return convert_(*arguments, **options)

    convert.convert = counting
    os.environ["FASTBYOL_CACHE"] = cache  # a server of forks has the environment of its own start
    start.wait()
    path = embedded.training_file(CONFIG)
    answers.put((path.stat().st_ino, len(wrote)))


def test_of_three_that_ask_at_once_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "cache"))
    start, answers = PROCESSES.Event(), PROCESSES.Queue()
    children = [
        PROCESSES.Process(target=ask, args=(start, answers, str(tmp_path / "cache")))
        for _ in range(3)
    ]
    for child in children:
        child.start()
    start.set()
    pairs = [answers.get(timeout=300) for _ in children]
    for child in children:
        child.join(60)
    assert len({inode for inode, _ in pairs}) == 1
    assert sum(wrote for _, wrote in pairs) == 1
    assert beton.inspect(embedded.training_file(CONFIG)).num_samples == 64


def test_the_file_is_found_again_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path))
    path = embedded.training_file(CONFIG)
    monkeypatch.setattr(convert, "convert", lambda *_, **__: pytest.fail("made again"))
    assert embedded.training_file(CONFIG) == path
