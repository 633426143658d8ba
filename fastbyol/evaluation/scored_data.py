"""The images that a run is measured on: its own, files that are named, or another data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from fastbyol.config import DataConfig
from fastbyol.data import embedded, loader
from fastbyol.data.beton import BetonInfo
from fastbyol.errors import UsageError
from fastbyol.runs import inputs

Part = Literal["train", "test"]


class _Fields(NamedTuple):
    image_field: str | None
    label_field: str | None


@dataclass(frozen=True)
class ScoredData:
    """The parts of the data to fit and to score for ``run``, a folder or a file.

    ``own`` is the run's configuration, resolved. ``other`` names another data set with both parts,
    ``train`` and ``test`` name files for either; those are used whole. ``image_field`` and
    ``label_field`` are those that were asked for, by default the run's in all but ``other``.
    """

    run: Path
    own: DataConfig
    other: str | None
    train: str | None
    test: str | None
    image_field: str | None
    label_field: str | None
    decoder: str

    def __post_init__(self) -> None:
        for option, name in (("--train-data", self.train), ("--test-data", self.test)):
            if self.other is not None and name is not None:
                raise UsageError(f"--data {self.other}: has both parts: leave out {option} {name}")

    def read(self, part: Part) -> loader.Images:
        """Return the images of ``part``; those to score need labels. Raises UsageError."""
        named, file, fields = self._named(part) is not None, self._file(part), self._fields()
        limit = 0 if named else self.own.limit if part == "train" else self.own.test_limit
        return loader.read_all(
            file if named else self._checked(part, file),
            workers=self.own.workers,
            size=self.own.size or 32,
            limit=limit,
            decoder=self.decoder,
            labels="needed" if part == "test" else "optional",
            image_field=fields.image_field,
            label_field=fields.label_field,
        )

    def name(self, part: Part) -> str:
        """Return what the user calls the data of ``part``."""
        own = self.own.train if part == "train" else self.own.test or self.own.train
        return self._named(part) or own

    def _named(self, part: Part) -> str | None:
        return self.other or (self.train if part == "train" else self.test)

    def _file(self, part: Part) -> Path:
        # Splits are of the run's own data.
        named = self.own.model_copy(update={"split": None, "test_split": None})
        if self.other is not None:
            whole = named.model_copy(update={"train": self.other, "test": None})
            file = _part_of(whole, part)
            remedy = f"name its parts with --train-data {self.other} --test-data FILE"
            missing = f"--data {self.other}: no test part that is labelled: {remedy}"
        elif name := self._named(part):
            return embedded.file_of(name, part, named)
        else:
            file = _part_of(self.own, part)
            missing = (
                f"{self.run}: the run has no test data: name a labelled beton with --test-data"
            )
        if file is None:
            raise UsageError(missing)
        return file

    def _checked(self, part: Part, file: Path) -> BetonInfo:
        """Inspect the run's own file, which has to be the one that the run was made with."""
        fields, pinned = self._fields(), inputs.of_run(self.run)
        if fields != _Fields(self.own.image_field, self.own.label_field):
            pinned = None  # it pins the content of the run's own fields
        return inputs.own_data(self.run, pinned, part, file, **fields._asdict())

    def _fields(self) -> _Fields:
        if self.other is not None:
            return _Fields(self.image_field, self.label_field)
        image, label = self.own.image_field, self.own.label_field
        return _Fields(self.image_field or image, self.label_field or label)


def _part_of(data: DataConfig, part: Part) -> Path | None:
    return embedded.training_file(data) if part == "train" else embedded.held_out_file(data)
