"""Sources damaged in every way: data of the promised form with named skips, or one line.

Never a traceback, a signal, a hang, or memory beyond twice the largest declared size. Pixels are
not judged, since formats without checksums cannot tell.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import data_rig
import numpy as np
import run_rig as rig
import source_mutations as mutations
from test_data_mutations import show

from fastbyol.data import sources
from fastbyol.data.beton_write import UnreadableItemError
from fastbyol.data.scratch import Scratch
from fastbyol.errors import UsageError

# What reading takes beside the images: decoders, and copies of files, which are small here.
BESIDE_BYTES = 96 << 20
# Pillow holds four bytes a pixel where three are delivered.
PILLOW = 4 / 3
# A conversion starts two processes and takes seconds, so few are whole.
WHOLE_EVERY = 40
# Of which most is a conversion's start: the child sleeps then, and that counts, while others may
# hold the cores.
HANG_S = 120.0
# Kinds of which one picture is in memory at a time; an array may be there as a whole.
PICTURES = ("folder", "classes", "webdataset", "parquet", "datasets")


def work(
    _: str, stated: list[mutations.Base], numbers: Sequence[int], folder: Path, pipe: Connection
) -> None:
    """For each number write and read a damaged source; send (number, change, base, outcome)."""
    # As for a user: shown, never raised. Pillow says much of damaged pictures.
    warnings.simplefilter("ignore")
    _read(stated[0], _fresh(folder), 0)
    pipe.send("ready")
    for number in numbers:
        target = _fresh(folder)
        base, done = mutations.mutate(stated, number, target)
        answer = _read(base, target, number)
        if answer in ("refused", "read", "with skips") and number % WHOLE_EVERY == WHOLE_EVERY - 1:
            answer = _converted(base, target, answer)
        pipe.send((number, done or "nothing", base.name, answer))
    pipe.send("done")


def _fresh(folder: Path) -> Path:
    target = folder / "source"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    return target


def _read(base: mutations.Base, target: Path, number: int) -> str:
    """Return ``refused``, ``read``, ``with skips``, or what was wrong, capitalised."""
    before, declared, skipped = _reset_peak(), 0, 0
    try:
        scratch = Scratch(target.parent / "unpacked")
        shutil.rmtree(scratch.path, ignore_errors=True)
        source = sources.open_source(str(target / base.at), scratch=scratch, **base.options)
        sizes = source.image_bytes()
        declared = int(sizes.max() if source.kind in PICTURES else sizes.sum())
        skipped = len(source.skipped)
        json.dumps([source.name(k) for k in range(len(source))] + list(source.class_names))
        for k in range(len(source)):
            try:
                image = source.image(k)
            except UnreadableItemError as error:
                skipped += 1
                if "\n" in str(error) or not str(error):
                    return f"Poor reason: {error!r}"
                continue
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                return f"Image {k} is {image.dtype} of shape {image.shape}"
            if source.labels is not None and not -1 <= source.labels[k] < len(source.class_names):
                return f"Label {source.labels[k]} of {len(source.class_names)} classes"
        answer = "with skips" if skipped else "read"
    except UsageError as error:
        line = str(error)
        answer = (
            "refused"
            if "\n" not in line and ";" in line and len(line) < 1500
            else f"Poor message: {line!r}"
        )
    except Exception as error:
        return f"Raised {type(error).__name__}: {error}"
    peak = _peak() - before
    if peak > 2 * PILLOW * declared + BESIDE_BYTES:
        return f"Memory: {peak >> 20} MiB where {declared >> 20} MiB were declared"
    return answer


def _converted(base: mutations.Base, target: Path, read: str) -> str:
    """Run ``fastbyol convert`` of it: exit code 0 and a file, or 2 and one line."""
    file = target.parent / "out.beton"
    file.unlink(missing_ok=True)
    options = [part for key, value in base.options.items() for part in (f"--{key}", str(value))]
    ended = data_rig.command(
        "convert", str(target / base.at), str(file), "--size", "16", "--workers", "1", *options
    )
    if isinstance(ended, str):
        return ended
    code, lines = ended
    if code == 0:
        return (
            read
            if read != "refused" and file.is_file() and not lines
            else f"Converted, {read}, and said {lines}"
        )
    # Pictures that cannot be read are left out, but if all are, there is nothing to write.
    return (
        read
        if data_rig.is_refusal(code, lines) and read != "read"
        else f"Exit code {code}, {read}, {lines}"
    )


def _reset_peak() -> int:
    """Reset the peak of memory; return the bytes now in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def test_mutated_sources(tmp_path: Path) -> None:
    stated = mutations.bases(tmp_path)
    counts, faults = data_rig.run("sources", stated, range(rig.many(80, 2_000)), work, HANG_S)
    print(show(counts), *sorted(counts.items()), sep="\n")
    assert not faults, faults[:20]
    assert {answer for _, answer in counts} == {"refused", "read", "with skips"}
