"""What is written is read back by numpy and pyarrow, whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from fastbyol.errors import FastbyolError, UsageError
from fastbyol.exports import embedding_files
from fastbyol.exports.embedding_files import Floats, Table, check_name, write

N, D = 1000, 5
ROWS = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
LABELS = np.arange(N) % 4 - 1
NAMES = ("a", "<b>", "c\udce9")
FORMATS = sorted(embedding_files.FORMATS)


def table(labels: np.ndarray | None = LABELS, names: tuple[str, ...] = NAMES) -> Table:
    return Table("y", D, np.arange(N) * 3, labels, names, {"run": "mine", "step": 7})


def batches(size: int = 300) -> Iterator[Floats]:
    for first in range(0, N, size):
        yield ROWS[first : first + size]


def test_npz(tmp_path: Path) -> None:
    write(tmp_path / "y.npz", table(), batches(), overwrite=False)
    with np.load(tmp_path / "y.npz", allow_pickle=False) as file:
        assert list(file) == ["y", "ids", "labels", "class_names", "about"]
        assert file["y"].dtype == np.float32
        assert np.array_equal(file["y"], ROWS)
        assert np.array_equal(file["ids"], np.arange(N) * 3)
        assert np.array_equal(file["labels"], LABELS)
        assert file["class_names"].tolist() == ["a", "<b>", "c\\udce9"]
        assert json.loads(str(file["about"])) == {"run": "mine", "step": 7}


def test_parquet(tmp_path: Path) -> None:
    write(tmp_path / "y.parquet", table(), batches(), overwrite=False)
    read = parquet.read_table(tmp_path / "y.parquet")
    assert read.column_names == ["id", "label", "class_name", "y"]
    assert str(read.schema.field("y").type) == "fixed_size_list<element: float>[5]"
    y = read["y"].combine_chunks().flatten().to_numpy().reshape(N, D)
    assert np.array_equal(y, ROWS)
    assert np.array_equal(read["id"], np.arange(N) * 3)
    assert read["label"].to_pylist()[:5] == [None, 0, 1, 2, None]
    assert read["class_name"].to_pylist()[:5] == [None, "a", "<b>", "c\\udce9", None]
    assert json.loads(read.schema.metadata[b"fastbyol"]) == {"run": "mine", "step": 7}
    assert parquet.ParquetFile(tmp_path / "y.parquet").num_row_groups == 4


@pytest.mark.parametrize("suffix", FORMATS)
def test_without_labels_or_names(tmp_path: Path, suffix: str) -> None:
    for labels, names, columns in (
        (None, (), {"y", "ids", "about"}),
        (LABELS, (), {"y", "ids", "labels", "about"}),
    ):
        path = tmp_path / f"{len(columns)}{suffix}"
        write(path, table(labels, names), batches(), overwrite=False)
        if suffix == ".npz":
            with np.load(path) as file:
                assert set(file) == columns
        else:
            kept = {"id", "y"} | ({"label"} if labels is not None else set())
            assert set(parquet.read_table(path).column_names) == kept


@pytest.mark.parametrize("suffix", FORMATS)
def test_equal_content_is_equal_bytes(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in ("a", "b")]
    for path in paths:
        write(path, table(), batches(), overwrite=False)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("suffix", FORMATS)
def test_memory_is_that_of_some_batches(tmp_path: Path, suffix: str) -> None:
    rows, dim, each = 40_000, 256, 512  # 41 MB

    def made() -> Iterator[Floats]:
        for first in range(0, rows, each):
            yield np.full((min(each, rows - first), dim), first, np.float32)

    large = Table("y", dim, np.arange(rows), None, (), {})
    tracemalloc.start()
    write(tmp_path / f"y{suffix}", large, made(), overwrite=False)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 6e6


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_error_on_the_way_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    def failing() -> Iterator[Floats]:
        yield ROWS[:300]
        raise FastbyolError("the encoder has diverged")

    path = tmp_path / f"y{suffix}"
    path.write_bytes(b"before")
    with pytest.raises(FastbyolError, match="the encoder has diverged"):
        write(path, table(), failing(), overwrite=True)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"y{suffix}"

    def slow() -> Iterator[Floats]:
        path.write_bytes(b"another's")
        yield from batches()

    with pytest.raises(UsageError, match="by somebody else meanwhile"):
        write(path, table(), slow(), overwrite=False)
    assert path.read_bytes() == b"another's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link.npz").symlink_to(tmp_path / "y.npz")
    write(tmp_path / "link.npz", table(), batches(), overwrite=False)
    assert (tmp_path / "link.npz").is_symlink()
    assert (tmp_path / "y.npz").is_file()


def test_names_say_a_format_that_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("y", "y.npy", ".npz", "y.NPZ"):
        with pytest.raises(UsageError, match=r"ends in .npz or .parquet"):
            check_name(Path(name))
    check_name(Path("y.parquet"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_name(Path("y.npz"))
    with pytest.raises(UsageError, match=r"y.parquet: pyarrow.*pip install 'fastbyol\[hf\]'"):
        check_name(Path("y.parquet"))
