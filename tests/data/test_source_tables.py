"""Parquet and arrow files, as the Hub and the library ``datasets`` lay them out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import source_files
from fastbyol.data import beton_write, convert, sources
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import Source
from fastbyol.errors import FastbyolError, UsageError
from test_sources import demand_equal

PNG = source_files.encoded(source_files.random_images(1, 9, 11, 4)[0])
Open = Callable[..., Source]


@pytest.fixture
def open_at(tmp_path: Path) -> Open:
    """Open ``tmp_path / name`` with a scratch folder beside it."""

    def opened(name: str = "set", **options: object) -> Source:
        scratch = Scratch(tmp_path / "scratch")
        return sources.open_source(str(tmp_path / name), scratch=scratch, **options)  # type: ignore[arg-type]

    return opened


def refusal(open_at: Open, name: str = "set", **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        open_at(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message
    return message


def save(path: Path, **columns: object) -> None:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("write", "kind"), [(source_files.parquet, "parquet"), (source_files.saved_set, "datasets")]
)
def test_splits(
    tmp_path: Path,
    open_at: Open,
    write: Callable[[Path], dict[str, tuple[np.ndarray, list[int]]]],
    kind: str,
) -> None:
    written = write(tmp_path / "set")
    for split in (None, "test"):
        source = open_at(split=split)
        assert (source.kind, source.split) == (kind, split or "train")
        assert source.class_names == ("ant", "bee", "cow")
        assert source.splits == ("train", "test")
        demand_equal(source, *written[split or "train"])
    both = [np.concatenate([written[part][0] for part in ("train", "test")])]
    demand_equal(open_at(split="train+test"), *both, written["train"][1] + written["test"][1])
    assert "no split 'val'" in refusal(open_at, split="val")


def test_one_file(tmp_path: Path, open_at: Open) -> None:
    images, labels = source_files.parquet(tmp_path / "set")["train"]
    source = open_at("set/data/train-00001-of-00002.parquet")
    demand_equal(source, images[5:], labels[5:])
    assert source.split == "train"
    assert source.name(0) == "train-00001-of-00002.parquet row 0 (5.png)"
    images, labels = source_files.saved_set(tmp_path / "saved")["train"]
    demand_equal(open_at("saved/train/data-00001-of-00002.arrow"), images[5:], labels[5:])
    demand_equal(open_at("saved/train"), images, labels)


def test_columns(tmp_path: Path, open_at: Open) -> None:
    """Bytes without a struct, labels as texts, whose classes are those of all splits."""
    save(tmp_path / "set/train.parquet", img=[PNG] * 3, target=["dog", "ant", None], age=[1, 2, 3])
    save(tmp_path / "set/valid.parquet", img=[PNG], target=["cat"])
    source = open_at()
    assert source.class_names == ("ant", "cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, -1]
    assert "left out the columns age" in source.notes
    assert open_at(split="val").labels == [1]
    save(tmp_path / "set/train.parquet", img=[PNG] * 3, fine_label=[0, 1, 1], label=[2, 3, 4])
    source = open_at("set/train.parquet")
    assert source.labels is not None
    assert source.labels.tolist() == [2, 3, 4]
    assert "took the labels of label, not of fine_label" in source.notes
    save(tmp_path / "set/train.parquet", img=[PNG], age=[4])
    assert open_at("set/train.parquet").labels is None


def test_columns_that_are_refused(tmp_path: Path, open_at: Open) -> None:
    def refused(**columns: object) -> str:
        save(tmp_path / "set/a.parquet", **columns)
        return refusal(open_at, "set/a.parquet")

    assert "columns left, right may all hold the pictures" in refused(left=[PNG], right=[PNG])
    assert "columns y, category may all hold the labels" in refused(
        image=[PNG], y=[1], category=[2]
    )
    assert "no column of encoded pictures" in refused(image=[[1, 2], [3, 4]], label=[0, 1])
    of = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    link = pyarrow.array([{"bytes": None, "path": "https://x.org/a.png"}], of)
    assert "row 0 is a link, https://x.org/a.png" in refused(image=link)


def test_nulls_and_files_beside(tmp_path: Path, open_at: Open) -> None:
    of = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    rows = [
        None,
        {"bytes": PNG, "path": None},
        {"bytes": None, "path": "cats/a.png"},
        {"bytes": None, "path": "../outside.png"},
        {"bytes": None, "path": "missing.png"},
        {"bytes": b"no picture", "path": "b.png"},
    ]
    save(tmp_path / "set/a.parquet", image=pyarrow.array(rows, of), label=range(6))
    (tmp_path / "set/cats").mkdir()
    for name in ("set/cats/a.png", "outside.png"):
        (tmp_path / name).write_bytes(PNG)
    source = open_at(kind="parquet")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 2]
    assert (source.image(0) == source.image(1)).all()
    assert dict(source.skipped) == {
        "a.parquet row 0": "no picture",
        "a.parquet row 3 (../outside.png)": "a file outside of the folder",
        "a.parquet row 4 (missing.png)": "No such file or directory",
        "a.parquet row 5 (b.png)": "not a picture that Pillow knows",
    }


def test_folders_that_are_refused(tmp_path: Path, open_at: Open) -> None:
    for name in ("one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        save(tmp_path / "set" / name / "train.parquet", image=[PNG])
    assert "has tables in one, two; give one of these folders" in refusal(open_at)
    assert len(open_at("set/one")) == 1
    save(tmp_path / "set/one/train-2.parquet", img=[PNG])
    assert "has other columns than" in refusal(open_at, "set/one")

    source_files.saved_set(tmp_path / "saved")
    state = json.loads((tmp_path / "saved/test/state.json").read_text())
    for name in ("../train/data-00000-of-00002.arrow", "", None):
        state["_data_files"] = [{"filename": name}]
        (tmp_path / "saved/test/state.json").write_text(json.dumps(state))
        assert "names no arrow files" in refusal(open_at, "saved/test")


def test_labels_beyond_the_classes(tmp_path: Path, open_at: Open) -> None:
    images = source_files.random_images(2, 8, 8)
    table = source_files.table_of(images, [0, 3])
    (tmp_path / "set").mkdir()
    parquet.write_table(table, tmp_path / "set/a.parquet")
    assert "the labels go beyond the 3 classes" in refusal(open_at)


def test_pyarrow_is_missing(tmp_path: Path, open_at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    source_files.parquet(tmp_path / "set")
    (tmp_path / "no/pyarrow").mkdir(parents=True)
    (tmp_path / "no/pyarrow/__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path / "no")
    assert "pip install 'fastbyol[hf]'" in refusal(open_at)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_native_code_that_fails(
    tmp_path: Path, open_at: Open, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A process that dies of a file, or hangs on it, is a line."""
    save(tmp_path / "set/a.parquet", image=[PNG])
    (tmp_path / "no/pyarrow").mkdir(parents=True)
    code = "os.kill(os.getpid(), 11)" if how == "dies" else "time.sleep(600)"
    (tmp_path / "no/pyarrow/__init__.py").write_text(f"import os, time; {code}")
    monkeypatch.syspath_prepend(tmp_path / "no")
    monkeypatch.setattr(beton_write, "STALL_S", 1.0 if how == "hangs" else 60.0)
    wanted = "ended by SIGSEGV" if how == "dies" else "no picture was read for 1 s"
    assert wanted in refusal(open_at)


def test_full_disk(tmp_path: Path) -> None:
    save(tmp_path / "set/a.parquet", image=[PNG] * 3)
    with pytest.raises(FastbyolError, match="No space left on device; make room") as caught:
        sources.open_source(str(tmp_path / "set"), scratch=_Full(tmp_path / "scratch"))
    assert not isinstance(caught.value, UsageError)


class _Full(Scratch):
    """A folder on a full disk."""

    def file(self, name: str) -> Path:
        return Path("/dev/full") if name == "pictures" else super().file(name)


def test_converted(tmp_path: Path) -> None:
    """The file has the images, and nothing is left of what was unpacked."""
    source_files.saved_set(tmp_path / "set")
    out = tmp_path / "out"
    out.mkdir()
    report = convert.convert(str(tmp_path / "set"), out / "a.beton", split="test")
    assert (report.num_written, report.class_names) == (7, ("ant", "bee", "cow"))
    assert [path.name for path in out.iterdir()] == ["a.beton"]
