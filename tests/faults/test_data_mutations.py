"""Betons damaged in every way: an error of one line or the right data, no signal, no hang.

A sealed file must deliver what was written, a foreign one what its damaged bytes say
(``mutations.read_by_hand``, libturbojpeg). All of it with and without FFCV.
"""

from __future__ import annotations

from collections import Counter
from ctypes.util import find_library
from functools import partial
from pathlib import Path

import data_rig
import numpy as np
import pytest
import run_rig as rig
from mutations import Base

import foreign_betons as foreign
from fastbyol.data import beton_write
from fastbyol.data.beton_write import write

COUNT = 24


class Pictures:
    """Smooth pictures; every third of another size if ``mixed``."""

    def __init__(self, mixed: bool) -> None:
        self.mixed = mixed

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[object, ...]:
        height, width = (26 + index % 4, 30) if self.mixed and index % 3 == 0 else (20, 24)
        y, x = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
        slope = np.random.default_rng(index).uniform(-4, 4, (3, 3))
        return np.clip(128 + slope[0] * y + slope[1] * x + 20 * slope[2], 0, 255).astype(
            np.uint8
        ), index % 5


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """Return our files and FFCV's: raw, JPEG, one size, several, fields of every type."""
    folder = tmp_path_factory.mktemp("bases")
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beton_write, "STALL_S", data_rig.START_S)
        for name, mode, mixed in (
            ("raw", "raw", False),
            ("jpg", "jpg", False),
            ("mixed raw", "raw", True),
        ):
            write(
                folder / name,
                Pictures(mixed),
                labelled=True,
                mode=mode,
                workers=1,
                page_bytes=1 << 21,
            )  # type: ignore[arg-type]
            made.append(Base(f"sealed {name}", (folder / name).read_bytes(), True))
    names = (
        ("raw", "jpg", "foreign", "mixed_jpg") if foreign.HAS_FFCV else ("raw", "jpg", "mixed_jpg")
    )
    return made + [Base(f"foreign {name}", _foreign(name), False) for name in names]


def _foreign(name: str) -> bytes:
    return Path(foreign.made() / f"{name}.beton").read_bytes()


def show(counts: Counter[tuple[str, str]]) -> str:
    outcomes = Counter[str]()
    for (_, answer), number in counts.items():
        outcomes[answer] += number
    return f"{sum(counts.values())} mutations: {dict(outcomes)}"


@pytest.mark.skipif(
    find_library("turbojpeg") is None,
    reason="JPEG is judged by libturbojpeg, which is not installed",
)
@pytest.mark.parametrize("decoder", foreign.DECODERS)
def test_mutated_betons(bases: list[Base], decoder: str) -> None:
    work = partial(data_rig.work, decoder=decoder)
    counts, faults = data_rig.run("files", bases, range(rig.many(504, 20_000)), work)
    print(show(counts), *sorted(counts.items()), sep="\n")
    assert not faults, faults[:20]
    assert {answer for _, answer in counts} == {"refused", "the same", "as it says"}


@pytest.mark.parametrize("decoder", foreign.DECODERS)
def test_mutated_manifests(bases: list[Base], decoder: str) -> None:
    sealed, work = [base for base in bases if base.sealed], partial(data_rig.work, decoder=decoder)
    counts, faults = data_rig.run("manifests", sealed, range(rig.many(60, 2_000)), work)
    print(show(counts), *sorted(counts.items()), sep="\n")
    assert not faults, faults[:20]
    assert {answer for _, answer in counts} == {"refused", "the same"}
