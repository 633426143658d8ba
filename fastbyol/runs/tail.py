"""A run's metrics.jsonl read as it grows, by pages that watch a run and by loggers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastbyol.files import open_regular
from fastbyol.runs.metrics import METRICS_FILE, Parser

# Bytes before the point that was read to, which must be the same at the next look.
_OVERLAP = 4096
# A line of more bytes is damaged: none of a run has a thousandth of it.
_LONGEST = 1 << 24


class News(NamedTuple):
    """What a look brought: ``rows`` are steps and events in order.

    With ``is_fresh`` they begin at the start of the file: the rows of earlier looks are void,
    since a run that is resumed first cuts its file back, and a new run may have the old one's name.
    ``is_damaged``: a damaged line follows, behind which nothing is read.
    """

    rows: list[dict[str, Any]]
    is_fresh: bool
    is_damaged: bool = False


class Tail:
    """A reader of the file in ``folder`` that continues where its last look ended.

    It keeps no file open, so the folder may be removed and made again in between. Without
    ``follow_links`` a link in the file's stead is refused.
    """

    def __init__(self, folder: Path, *, follow_links: bool = True) -> None:
        self._path, self._follow_links = folder / METRICS_FILE, follow_links
        self._num_bytes, self._end, self._parser = 0, b"", Parser()

    def read(self, most: int = 1 << 22) -> News:
        """Return the whole lines of the next ``most`` bytes: no rows mean that none are left.

        Lines behind a damaged one are never returned. Raises OSError where the file is missing or
        cannot be read; the next look then goes on where this one did.
        """
        with open_regular(self._path, follow_links=self._follow_links) as file:
            if not self._continues(file):
                self._num_bytes, self._end, self._parser = 0, b"", Parser()
            is_fresh = self._num_bytes == 0
            file.seek(self._num_bytes)
            content = file.read(most)
            if b"\n" not in content and len(content) == most:  # one line longer than that
                content += file.readline(_LONGEST)
        rows, is_damaged = list[dict[str, Any]](), False
        for line in content.splitlines(keepends=True):
            if (row := self._parser.row(line)) is None:
                is_damaged = line.endswith(b"\n")  # or it is being written
                break
            rows.append(row)
            self._num_bytes += len(line)
            self._end = (self._end + line)[-_OVERLAP:]
        return News(rows, is_fresh, is_damaged)

    def _continues(self, file: BinaryIO) -> bool:
        """Return whether the file still has what was read, as far as its last bytes tell."""
        if os.fstat(file.fileno()).st_size < self._num_bytes:
            return False
        file.seek(self._num_bytes - len(self._end))
        return file.read(len(self._end)) == self._end
