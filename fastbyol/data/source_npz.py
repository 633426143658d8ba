"""npz files with an array of images and, if there is one, an array of labels, of one split or of several."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray

from fastbyol.data.source_arrays import MOST_PER_BYTE, Source
from fastbyol.data.source_npy import NO_ARRAYS, Head, Named, demand_held, opened, read_head, read_values
from fastbyol.errors import UsageError, one_line
from fastbyol.files import open_regular


def open_npz(path: Path, split: str | None) -> Source:
    """Open an npz file: uint8 images (N, H, W, 3), (N, 3, H, W), or grey with one channel or none; labels (N,) if any.

    Keys: ``images`` or ``x`` (``labels`` or ``y``), or of a split ``train_images``, ``x_train`` and so on; without ``split``
    train is taken where all are of splits.
    """
    with _archive(path) as archive:
        members = archive.namelist()
    named = Named(str(path), tuple(name.removesuffix(".npy") for name in members if name.endswith(".npy")))
    wanted, split = split, named.split(split)
    image, label, others = named.pair(split)
    source = opened("npz", Members(path), image, label, others, split)
    return replace(
        source,
        ignored=(*named.ignored(split), *((name, NO_ARRAYS) for name in members if not name.endswith(".npy"))),
        notes=named.notes(wanted, split) + source.notes,
    )


@dataclass(frozen=True)
class Members:
    """The arrays of an npz file."""

    path: Path

    def where(self, name: str) -> str:
        return f"{self.path}: {name!r}"

    def head(self, name: str) -> Head:
        """Read the head of an array, which its part of the archive can hold."""
        where = self.where(name)
        with _archive(self.path) as archive:
            member = archive.getinfo(f"{name}.npy")
            packed = member.compress_type == zipfile.ZIP_DEFLATED
            if not packed and member.compress_type != zipfile.ZIP_STORED:  # zipfile unpacks such without a bound
                raise UsageError(f"{where}: compressed in a way that numpy does not write; save it with numpy.savez_compressed")
            if member.file_size > member.compress_size * (MOST_PER_BYTE if packed else 1):
                what = f"{member.compress_size} bytes cannot hold the {member.file_size} that are said"
                raise UsageError(f"{where}: {what}; save it again")
            with archive.open(member) as file:
                head = read_head(file, where)  # type: ignore[arg-type]
        demand_held(where, head, member.file_size)
        return head

    def values(self, name: str) -> NDArray[Any]:
        """Read an array whole."""
        head = self.head(name)
        with _archive(self.path) as archive, archive.open(f"{name}.npy") as file:
            values = read_values(file, self.where(name), head)  # type: ignore[arg-type]
            file.read(1)  # at the end the archive's checksum is looked at
        return values


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive; whatever reading it meets is a UsageError."""
    try:
        with open_regular(path) as file:
            if file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
                raise UsageError(f"{path}: is a single array, as .npy files are; give it that suffix")
            with zipfile.ZipFile(file) as archive:
                yield archive
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or one_line(error)}); save it again") from None
    except Exception as error:  # zip's heads are parsed from untrusted bytes
        raise UsageError(f"{path}: not a whole npz file ({one_line(error)}); save it again") from None
