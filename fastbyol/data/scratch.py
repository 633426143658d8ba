"""A folder for what a conversion unpacks, which ends with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastbyol.data import beton_write


class Scratch:
    """A folder that is made when the first file in it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        """Return the path of a file to write. Raises FastbyolError if the folder cannot be made."""
        with beton_write.disk_errors():
            self.path.mkdir(exist_ok=True)
        return self.path / name


@contextmanager
def beside(out: Path) -> Iterator[Scratch]:
    """Yield a scratch folder next to the file ``out``, on its disk, and delete it afterwards.

    What killed processes left there is deleted before.
    """
    beton_write.remove_leftovers(out)
    scratch = Scratch(beton_write.temporary(out))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch.path, ignore_errors=True)
