"""The verification of every sample: its checksum and, on demand, its decoding and its label."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import beton, beton_write, manifest
from fastbyol.data.beton import BetonInfo, reopened
from fastbyol.data.decoder import Decoder
from fastbyol.errors import UsageError

# Samples between two reports of progress.
CHUNK = 256
# Decoded images of mixed sizes are scaled to this side; only the decoder's errors count.
SIZE = 32
Progress = beton_write.Progress


@dataclass(frozen=True)
class Verdict:
    """The result of ``verify``: ``damaged`` holds (sample, what is wrong)."""

    info: BetonInfo
    deep: bool
    damaged: tuple[tuple[int, str], ...]

    @property
    def sealed(self) -> bool:
        return self.info.manifest is not None

    def demand_whole(self) -> None:
        """Raise UsageError that counts the damaged samples and names the first."""
        if not self.damaged:
            return
        sample, what = self.damaged[0]
        number = f"{len(self.damaged)} of {self.info.num_samples} samples are"
        if self.sealed and len(self.damaged) == self.info.num_samples > 1:
            number = f"its manifest belongs to other data: all {self.info.num_samples} samples are"
        raise UsageError(
            f"{self.info.path}: {number} damaged, first sample {sample}: {what}; make the file "
            "again"
        )


def verify(
    path: str | Path,
    *,
    deep: bool = False,
    image_field: str | None = None,
    label_field: str | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Verify the structure of a file, and the checksums of its samples if it has a manifest.

    ``deep`` also decodes every sample and checks its label. ``image_field`` and ``label_field`` are
    those of ``beton.inspect``. ``progress(samples done, samples)`` is called now and then. Raises
    UsageError for a damaged structure; damaged samples are in the result.
    """
    info = beton.inspect(path, image_field=image_field, label_field=label_field)
    damaged = _wrong_labels(info) if deep else {}
    with Decoder(info, size=SIZE, workers=0, in_memory=False) if deep else nullcontext() as decoder:
        for first in range(0, info.num_samples, CHUNK):
            ids = np.arange(first, min(first + CHUNK, info.num_samples))
            damaged |= _wrong_bytes(info, ids)
            if decoder is not None:
                damaged |= _undecodable(decoder, np.setdiff1d(ids, list(damaged)))
            if progress is not None:
                progress(int(ids[-1]) + 1, info.num_samples)
    return Verdict(info, deep, tuple(sorted(damaged.items())))


def _wrong_bytes(info: BetonInfo, ids: NDArray[np.int64]) -> dict[int, str]:
    if info.manifest is None:
        return {}
    with reopened(info) as fd:
        checksums = manifest.region_checksums(fd, info.starts[ids], info.sizes[ids])
    wrong = ids[checksums != info.manifest.checksums[ids]].tolist()
    return {
        i: f"bytes {info.starts[i]} to {info.starts[i] + info.sizes[i]} are not those that were "
        "written"
        for i in wrong
    }


def _wrong_labels(info: BetonInfo) -> dict[int, str]:
    """Find labels outside the manifest's classes; a foreign file names no classes."""
    names = info.class_names
    if info.labels is None or not names:
        return {}
    wrong = np.flatnonzero((info.labels < -1) | (info.labels >= len(names))).tolist()
    return {i: f"label {info.labels[i]}, of {len(names)} classes" for i in wrong}


def _undecodable(decoder: Decoder, ids: NDArray[np.int64]) -> dict[int, str]:
    """Decode a whole chunk at once, or one by one where that fails."""
    try:
        decoder.decode(ids, np.empty((len(ids), *decoder.shape), np.uint8))
    except UsageError as error:
        decoder.check_unchanged()
        if len(ids) == 1:
            return {
                int(ids[0]): str(error).removeprefix(f"{decoder.info.path}: ").partition(";")[0]
            }
        return {
            sample: what for one in ids for sample, what in _undecodable(decoder, one[None]).items()
        }
    return {}
