"""Two digests of a beton's content, which do not depend on its path or page layout."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

from fastbyol.data import manifest
from fastbyol.data.beton import BetonInfo, reopened

# At most so many bytes of images are read: 5 s at 0.45 GB/s, measured on one busy core.
READ_BYTES = 1 << 31


class Contents(NamedTuple):
    """The number of samples, and BLAKE2b digests of the images and of the labels ("" without any).

    ``images`` covers the kind, the size in pixels and bytes and the CRC-32 of every image, in
    order. A sealed file's checksums are read from its manifest, and decoding checks each sample
    against them. In other files at most ``READ_BYTES`` are read, of every n-th image: raw pixels of
    the others may change unnoticed (a JPEG hardly ever keeps its number of bytes).
    """

    samples: int
    images: str
    labels: str

    @staticmethod
    def of(info: BetonInfo) -> Contents:
        """Return the contents of an inspected file. Raises UsageError if it has changed."""
        every, checksums = 1, info.manifest.checksums if info.manifest is not None else None
        if checksums is None:
            every = math.ceil(int(info.sizes.sum()) / READ_BYTES)
            with reopened(info) as fd:
                checksums = manifest.region_checksums(fd, info.starts[::every], info.sizes[::every])
        head = json.dumps([1, info.num_samples, every]).encode()
        images = hashlib.blake2b(head, digest_size=16)
        for column, kind in (
            (info.raw, "u1"),
            (info.heights, "<u2"),
            (info.widths, "<u2"),
            (info.sizes, "<i8"),
        ):
            images.update(column.astype(kind).tobytes())
        images.update(checksums.astype("<u4").tobytes())
        labels = (
            ""
            if info.labels is None
            else hashlib.blake2b(info.labels.astype("<i8").tobytes(), digest_size=16).hexdigest()
        )
        return Contents(info.num_samples, images.hexdigest(), labels)

    @staticmethod
    def read(stored: object) -> Contents | None:
        """Return the contents that ``_asdict`` stored as JSON, or None for any other value."""
        if not isinstance(stored, Mapping) or stored.keys() != set(Contents._fields):
            return None
        contents = Contents(**stored)
        return (
            contents
            if isinstance(contents.samples, int)
            and all(isinstance(text, str) for text in contents[1:])
            else None
        )

    def change(self, now: Contents) -> str | None:
        """Describe how ``now`` differs, or return None if it is equal."""
        if self.samples != now.samples:
            return f"{self.samples} samples then, {now.samples} now"
        if self.images != now.images:
            return f"{self.samples} samples as then, but other images or in another order"
        if self.labels != now.labels:
            return "the images of then with other labels"
        return None
