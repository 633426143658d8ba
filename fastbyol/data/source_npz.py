"""npz files with an array of images and maybe one of labels, of one split or of several."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from numpy.lib.format import MAGIC_PREFIX

from fastbyol.data.source_arrays import MOST_PER_BYTE, Source, untrusted
from fastbyol.data.source_npy import NpyFile, open_named
from fastbyol.errors import UsageError
from fastbyol.files import open_regular


def open_npz(path: Path, *, split: str | None, **others: object) -> Source:
    """Open uint8 images (N, H, W, 3), (N, 3, H, W) or grey, with labels (N,) if there are any.

    Keys are ``images`` or ``x`` (``labels`` or ``y``), or with a split ``train_images``,
    ``x_train`` and so on. ``split`` defaults to train where every key has a split.
    """
    with _archive(path) as archive:
        members = archive.namelist()
    arrays = {name[:-4]: NpzMember(path, name[:-4]) for name in members if name.endswith(".npy")}
    return open_named(
        "npz", str(path), arrays, [name for name in members if not name.endswith(".npy")], split
    )


@dataclass(frozen=True)
class NpzMember(NpyFile):
    """An array inside an npz file."""

    name: str
    alone: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"{self.path}: {self.name!r}"

    @contextmanager
    def open(self) -> Iterator[tuple[Any, int]]:
        """Open the array's bytes; yield them and their number, which the archive can hold."""
        with _archive(self.path) as archive:
            member = archive.getinfo(f"{self.name}.npy")
            packed = member.compress_type == zipfile.ZIP_DEFLATED
            if not packed and member.compress_type != zipfile.ZIP_STORED:  # unpacks without a bound
                how = "compressed in a way that numpy does not write"
                raise UsageError(f"{self}: {how}; save it with numpy.savez_compressed")
            if member.file_size > member.compress_size * (MOST_PER_BYTE if packed else 1):
                what = (
                    f"{member.compress_size} bytes cannot hold the {member.file_size} that are said"
                )
                raise UsageError(f"{self}: {what}; save it again")
            with archive.open(member) as file:
                yield file, member.file_size


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with untrusted(path, "not a whole npz file", "save it again"), open_regular(path) as file:
        if file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
            raise UsageError(f"{path}: is a single array, as .npy files are; give it that suffix")
        with zipfile.ZipFile(file) as archive:
            yield archive
