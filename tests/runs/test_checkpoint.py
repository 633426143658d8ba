"""checkpoint.py: exact, atomic, and damage found whatever bit it is in."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from fastbyol.errors import FastbyolError, UsageError
from fastbyol.runs import checkpoint, durable

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
)
SPACE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Everything that must survive: NaN payloads and signed zeros too, so bytes and not values."""
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def raws(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: raw(tensor) for name, tensor in tensors.items()}


@st.composite
def random_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bytes at all read as any dtype, in shapes with 0-d and empty ones."""
    dtype, shape = (
        draw(st.sampled_from(DTYPES)),
        draw(st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    )
    count = int(torch.Size(shape).numel())
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    data = bytes(byte & 1 for byte in data) if dtype == torch.bool else data
    flat = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8)
    )
    return flat.view(dtype).reshape(shape)


def small(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "step": torch.tensor(seed),
    }


@SPACE
@given(
    tensors=st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        random_tensors(),
        max_size=4,
    )
)
def test_every_bit_of_every_dtype_comes_back(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = checkpoint.save(tmp_path, 7, tensors, {})
    assert raws(checkpoint.load(path).tensors) == raws(tensors)


def test_the_bytes_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    """Of a state's dtypes; the library orders others of one size in a way of its own."""
    tensors = {
        "b.\u00e9\t\"": torch.arange(6.0).view(2, 3), "a": torch.zeros(0, 4),
        "step": torch.tensor(3), "c": torch.ones(7),
    }  # fmt: skip
    path = checkpoint.save(tmp_path, 3, tensors, {"name": "\u00e9\n"})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert path.read_bytes() == safetensors.torch.save(tensors, metadata)


def test_a_writer_that_may_not_proceed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE", 16)
    calls = iter(range(100))

    def proceed() -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 1, small(), {}, proceed=proceed)
    assert list(tmp_path.iterdir()) == []
    path = checkpoint.save(tmp_path, 1, small(), {})
    assert raws(checkpoint.load(path).tensors) == raws(small())


def test_views_of_one_arena_and_odd_strides_come_back(tmp_path: Path) -> None:
    arena = torch.arange(64, dtype=torch.float32, requires_grad=True)
    tensors = {
        "all": arena,
        "part": arena[8:24].view(4, 4),
        "transposed": arena.view(8, 8).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
    }
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, tensors, {})).tensors
    assert raws(loaded) == raws({name: tensor.detach() for name, tensor in tensors.items()})
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == len(tensors)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@SPACE
@given(
    meta=st.dictionaries(st.text().filter(lambda key: key != "nan"), JSON, max_size=4),
    step=st.integers(0, 2**40),
)
def test_meta_come_back_with_the_step(tmp_path: Path, meta: dict[str, Any], step: int) -> None:
    loaded = checkpoint.load(
        checkpoint.save(tmp_path, step, small(), {**meta, "nan": math.nan})
    ).meta
    assert math.isnan(loaded.pop("nan"))
    assert loaded == {**meta, "step": step}


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100, 11, 12):
        checkpoint.save(tmp_path, step, small(step), {}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"ckpt-{step:09d}.safetensors" for step in (10, 11, 12)
    ]
    assert checkpoint.load_latest(tmp_path).meta["step"] == 12
    assert checkpoint.newest_step(tmp_path) == 12


def test_a_run_that_went_back_does_not_lose_what_it_saves_next(tmp_path: Path) -> None:
    """The damaged file of a later step is left behind: by number alone it would push out the good
    one.
    """
    checkpoint.save(tmp_path, 4, small(4), {}, keep=2)
    checkpoint.save(tmp_path, 8, small(8), {}, keep=2).write_bytes(b"rubbish")
    assert checkpoint.load_latest(tmp_path).meta["step"] == 4
    checkpoint.save(tmp_path, 6, small(6), {}, keep=1)
    loaded = checkpoint.load_latest(tmp_path)
    assert (loaded.meta["step"], loaded.warnings) == (6, ())


def test_no_flipped_bit_and_no_lost_tail_goes_unnoticed(tmp_path: Path) -> None:
    """Each byte of a small file in turn: what loads is exact, or the file is refused.

    Nothing else is raised.
    """
    older = raws(small(1))
    checkpoint.save(tmp_path, 1, small(1), {"accuracy": 0.25})
    newest = checkpoint.save(tmp_path, 2, small(2), {"accuracy": 0.5})
    whole = newest.read_bytes()
    harmless = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        newest.write_bytes(damaged)
        loaded = checkpoint.load_latest(tmp_path)
        if loaded.warnings:
            assert (loaded.meta, raws(loaded.tensors)) == ({"accuracy": 0.25, "step": 1}, older)
            assert str(newest) in loaded.warnings[0]
        else:
            harmless += 1
            assert (loaded.meta, raws(loaded.tensors)) == (
                {"accuracy": 0.5, "step": 2},
                raws(small(2)),
            )
    assert harmless <= 8  # padding of the header
    for length in range(0, len(whole), 7):
        newest.write_bytes(whole[:length])
        assert checkpoint.load_latest(tmp_path).meta["step"] == 1


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [(b"0.25", b"0.75", "checksum"), (b"checkpoint-1", b"checkpoint-9", "version")],
)
def test_changed_metadata_are_refused(tmp_path: Path, old: bytes, new: bytes, says: str) -> None:
    path = checkpoint.save(tmp_path, 1, small(), {"accuracy": 0.25})
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(UsageError, match=says):
        checkpoint.load(path)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    foreign, tool, absent = (
        tmp_path / "foreign.safetensors",
        tmp_path / "tool.pt",
        tmp_path / "absent",
    )
    safetensors.torch.save_file(small(), foreign)
    torch.save(small(), tool)
    for path, part in (
        (foreign, "not a checkpoint"),
        (tool, "no checkpoint"),
        (absent, "cannot read"),
        (tmp_path, "cannot"),
    ):
        with pytest.raises(UsageError, match=part) as caught:
            checkpoint.load(path)
        assert len(str(caught.value).splitlines()) == 1
        assert str(path) in str(caught.value)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt-000000001.safetensors").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(UsageError, match="no usable checkpoint among 1"):
        checkpoint.load_latest(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_an_empty_or_absent_folder_is_a_usage_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert checkpoint.newest(folder) is None
        with pytest.raises(UsageError, match="no checkpoint"):
            checkpoint.load_latest(folder)


def test_the_order_on_disk_is_file_then_name_then_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a rename may be there without the content, unless the content was forced
    out first.
    """
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    kinds = {0o100000: "file", 0o040000: "folder"}

    def spy_fsync(descriptor: int) -> None:
        calls.append(kinds[os.fstat(descriptor).st_mode & 0o170000])
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(durable.os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    checkpoint.save(tmp_path, 1, small(), {})
    assert calls == ["file", "rename", "folder"]


def test_a_full_disk_is_one_line_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, small(1), {}, keep=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(FastbyolError, match="No space left") as caught:
        checkpoint.save(tmp_path, 2, small(2), {}, keep=1)
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-000000001.safetensors"]


# Runs in a process of its own and forks one child per point of death; torch is imported once.
KILLER = """
import json, os, sys
from pathlib import Path
import torch
from fastbyol.runs import checkpoint, durable

def die(*args, **kwargs):
    os._exit(9)

def die_at(owner, name, count):
    real = getattr(owner, name)
    calls = [0]
    def counted(*args, **kwargs):
        calls[0] += 1
        return die() if calls[0] == count else real(*args, **kwargs)
    setattr(owner, name, counted)

def half_written():
    real = checkpoint.write_atomically
    def half(path, write):
        class Half:
            def __init__(self, file): self.file = file
            def write(self, data):
                self.file.write(data[: len(data) // 2]); self.file.flush(); die()
        real(path, lambda file: write(Half(file)))
    checkpoint.write_atomically = half

points = {
    "serialised": lambda: die_at(checkpoint, "write_atomically", 1),
    "half written": half_written,
    "before the file is synced": lambda: die_at(os, "fsync", 1),
    "before the rename": lambda: die_at(Path, "replace", 1),
    "before the folder is synced": lambda: die_at(os, "fsync", 2),
    "before the first removal": lambda: die_at(Path, "unlink", 1),
    "before the second removal": lambda: die_at(Path, "unlink", 2),
}
root = Path(sys.argv[1])
for name, arrange in points.items():
    folder = root / name
    folder.mkdir()
    for step in (1, 2, 3):
        checkpoint.save(folder, step, {"x": torch.full((1000,), float(step))}, {}, keep=3)
    pid = os.fork()
    if pid == 0:
        arrange()
        checkpoint.save(folder, 4, {"x": torch.full((1000,), 4.0)}, {}, keep=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, name
print(json.dumps(list(points)))
"""


def test_a_save_killed_at_any_point_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path)]
    points = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert len(points) == 7
    for name in points:
        loaded = checkpoint.load_latest(tmp_path / name)
        is_new = name not in (
            "serialised",
            "half written",
            "before the file is synced",
            "before the rename",
        )
        assert loaded.meta["step"] == (4 if is_new else 3), name
        assert loaded.warnings == ()
        assert torch.equal(loaded.tensors["x"], torch.full((1000,), float(loaded.meta["step"])))
        checkpoint.save(tmp_path / name, 5, {}, {}, keep=2)
        survivors = {path.name for path in (tmp_path / name).iterdir()}
        assert survivors == {
            "ckpt-000000005.safetensors",
            f"ckpt-{loaded.meta['step']:09d}.safetensors",
        }, name


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\x1b[31m\n", "b\u00e4d \u65e5".encode()])
def test_a_folder_of_any_name(name: bytes, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    path = checkpoint.save(folder, 3, small(), {"name": os.fsdecode(name)})
    loaded = checkpoint.load(path)
    assert raws(loaded.tensors) == raws(small())
    assert loaded.meta == {"name": os.fsdecode(name), "step": 3}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(path)
