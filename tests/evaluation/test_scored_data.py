"""The images that a run is measured on: its own as they were, named files whole, other sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbyol import config_io
from fastbyol.config import DataConfig, resolve
from fastbyol.data import loader
from fastbyol.data.convert import convert
from fastbyol.errors import UsageError
from fastbyol.evaluation.scored_data import ScoredData


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    for name, seed in (("train", 0), ("test", 1), ("other", 2)):
        convert("textures", folder / f"{name}.beton", count=24, size=16, seed=seed, workers=1)
    return folder


def scored(
    files: Path,
    other: str | None = None,
    train: str | None = None,
    test: str | None = None,
    *,
    image_field: str | None = None,
    label_field: str | None = None,
    has_test: bool = True,
) -> ScoredData:
    sets = [f"data.train={files / 'train.beton'}", "data.limit=10", "data.test_limit=8"]
    sets += [
        "data.textures_count=96",
        "data.textures_test_count=64",
        "views.size=16",
        "train.batch_size=8",
    ]
    sets += [f"data.test={files / 'test.beton'}"] if has_test else []
    own = resolve(config_io.load(preset="demo", sets=sets).config).data
    decoder = "torchvision"
    return ScoredData(files, own, other, train, test, image_field, label_field, decoder)


def pixels(path: Path) -> torch.Tensor:
    return loader.read_all(path, workers=1, size=16).images


def test_own_data_have_the_runs_limits_and_named_files_none(files: Path) -> None:
    own, named = scored(files), scored(files, test=str(files / "other.beton"))
    assert [len(own.read(part).images) for part in ("train", "test")] == [10, 8]
    assert [len(named.read(part).images) for part in ("train", "test")] == [10, 24]
    assert torch.equal(named.read("test").images, pixels(files / "other.beton"))
    assert own.name("test") == str(files / "test.beton")
    assert named.name("test") == str(files / "other.beton")
    assert named.name("train") == str(files / "train.beton")


def test_another_set_has_both_parts_whole(files: Path) -> None:
    other = scored(files, "textures")
    train, test = other.read("train"), other.read("test")
    assert (len(train.images), len(test.images)) == (96, 64)
    assert not torch.equal(train.images[:64], test.images)
    assert (other.name("train"), other.name("test")) == ("textures", "textures")


def test_fields_of_the_runs_own_data_are_not_those_of_another_set(files: Path) -> None:
    own = DataConfig(image_field="img", label_field="kind")
    data = ScoredData(files, own, "textures", None, None, None, "label", "torchvision")
    assert data._fields() == (None, "label")
    data = ScoredData(files, own, None, None, "x", None, "label", "torchvision")
    assert data._fields() == ("img", "label")


def test_what_cannot_be_is_refused(files: Path) -> None:
    for train, test, says in (("x", None, "--train-data x"), (None, "y", "--test-data y")):
        with pytest.raises(UsageError, match=f"has both parts: leave out {says}"):
            scored(files, "textures", train, test)
    with pytest.raises(UsageError, match="no test part that is labelled: name its parts"):
        scored(files, str(files / "other.beton")).read("test")
    with pytest.raises(UsageError, match="the run has no test data"):
        scored(files, has_test=False).read("test")
    own = scored(files).own.model_copy(update={"test": str(files / "gone.beton")})
    gone = ScoredData(files, own, None, None, None, None, None, "torchvision")
    with pytest.raises(UsageError, match="no such file, the test data of"):
        gone.read("test")
