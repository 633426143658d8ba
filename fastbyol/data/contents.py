"""What a beton holds, in two digests: equal where the same images and labels lie in another file, page layout or folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

from fastbyol.data import manifest
from fastbyol.data.beton import BetonInfo
from fastbyol.data.beton_layout import reopened

# Of a file without checksums so many bytes of images are read: 5 s at the 0.45 GB/s measured on a core of a busy machine.
READ_BYTES = 1 << 31


class Contents(NamedTuple):
    """How many samples a file holds, and BLAKE2b digests of its images and of its labels ("" where it has none), in order.

    ``images`` is of every image's kind, size in pixels and in bytes, and of the CRC-32 of its bytes. A sealed file's
    checksums are those of its manifest, so nothing of the images is read, and whoever decodes a sample proves it against the
    same checksum. Of any other file at most ``READ_BYTES`` are read, in a file that has more those of every n-th image: there,
    raw pixels of the others that change in place go unseen (a JPEG hardly ever keeps its number of bytes).
    """

    samples: int
    images: str
    labels: str

    @staticmethod
    def of(info: BetonInfo) -> Contents:
        """Return the contents of the file that ``info`` describes. Raises UsageError where it is no longer that file."""
        every, checksums = 1, info.manifest.checksums if info.manifest is not None else None
        if checksums is None:
            every = math.ceil(int(info.sizes.sum()) / READ_BYTES)
            with reopened(info) as fd:
                checksums = manifest.region_checksums(fd, info.starts[::every], info.sizes[::every])
        head = json.dumps([1, info.num_samples, every]).encode()
        images = hashlib.blake2b(head, digest_size=16)
        for column, kind in ((info.raw, "u1"), (info.heights, "<u2"), (info.widths, "<u2"), (info.sizes, "<i8")):
            images.update(column.astype(kind).tobytes())
        images.update(checksums.astype("<u4").tobytes())
        labels = "" if info.labels is None else hashlib.blake2b(info.labels.astype("<i8").tobytes(), digest_size=16).hexdigest()
        return Contents(info.num_samples, images.hexdigest(), labels)

    @staticmethod
    def read(said: object) -> Contents | None:
        """Return what ``_asdict`` gave, read back from JSON; None where it is something else."""
        if not isinstance(said, Mapping) or said.keys() != set(Contents._fields):
            return None
        kept = Contents(**said)
        return kept if isinstance(kept.samples, int) and all(isinstance(text, str) for text in kept[1:]) else None

    def change(self, now: Contents) -> str | None:
        """Say in words what ``now`` has otherwise, None where nothing."""
        if self.samples != now.samples:
            return f"{self.samples} samples then, {now.samples} now"
        if self.images != now.images:
            return f"{self.samples} samples as then, but other images or in another order"
        if self.labels != now.labels:
            return "the images of then with other labels"
        return None
