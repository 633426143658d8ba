"""Checkpoints: exact, atomic, checksummed, never unpickled.

One safetensors file per step, ``ckpt-<step, nine digits or more>.safetensors``. Its metadata is
a JSON text with the format's name, ``meta`` with the step, and a digest of ``meta`` and all
tensors, since safetensors itself does not notice flipped bits.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastbyol.errors import UsageError
from fastbyol.files import open_regular
from fastbyol.runs.durable import new_digest, remove_temporaries, write_atomically, writing

FORMAT = "fastbyol-checkpoint-1"
METADATA_KEY = "fastbyol"  # one key, since safetensors writes several in any order
_GOING_BACK = ": going back to the checkpoint before"
# Bytes written at once: a writer that is told to end does so within a fraction of a second.
_PIECE = 1 << 24


class Checkpoint(NamedTuple):
    """The content of the file ``path``: tensors on the CPU, ``meta`` with its step, their digest.

    ``warnings`` names newer checkpoints that were passed over, and why.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path
    digest: str
    warnings: tuple[str, ...] = ()


class _UnusableError(Exception):
    """A reason why one file cannot be used."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int = 3,
    proceed: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``.

    Copies nothing that lies contiguous on the CPU.

    Args:
        tensors: any shapes, dtypes, devices and strides, which may share storage; read back
            contiguous and bit for bit.
        meta: JSON values; floats come back exactly.
        keep: how many files stay. Those of later steps, which a run that went back left, go too.
        proceed: is called before each piece is written; what it raises leaves nothing behind.

    Raises:
        FastbyolError: the file cannot be written. Earlier checkpoints are intact.
    """
    path = file_of(folder, step)
    content = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    meta = {**meta, "step": step}
    metadata = json.dumps({"format": FORMAT, "digest": _digest(meta, content), "meta": meta})

    def write(file: BinaryIO) -> None:
        for piece in _pieces(content, metadata):
            proceed()
            file.write(piece)

    with writing(path, "; earlier checkpoints are intact"):
        remove_temporaries(folder)
        write_atomically(path, write)
    for stale in _stale(saved_steps(folder), step, keep):
        file_of(folder, stale).unlink(missing_ok=True)
    return path


def newest(folder: Path) -> Path | None:
    """Return the file of the latest step in ``folder``, damaged or not; None without one."""
    step = newest_step(folder)
    return None if step is None else file_of(folder, step)


def newest_step(folder: Path) -> int | None:
    """Return the step of ``newest``."""
    return next(reversed(saved_steps(folder)), None)


def total_bytes(folder: Path) -> int:
    """Return the size of the checkpoints in ``folder``."""
    return sum(file_of(folder, step).stat().st_size for step in saved_steps(folder))


def load_latest(
    folder: Path, *, objection: Callable[[Checkpoint], str | None] = lambda _: None
) -> Checkpoint:
    """Return the newest whole checkpoint; its ``warnings`` name newer ones that are damaged.

    ``objection`` may return a reason to prefer an older one. If it objects to all, the newest
    whole one is returned, that reason as its last warning. Raises UsageError if none is whole.
    """
    warnings: list[str] = []
    second_best: Checkpoint | None = None
    for step in reversed(saved_steps(folder)):
        try:
            loaded = _read(file_of(folder, step))
        except _UnusableError as error:
            warnings.append(f"{file_of(folder, step)}: {error}{_GOING_BACK}")
            continue
        reason = objection(loaded)
        if not reason:
            return loaded._replace(warnings=tuple(warnings))
        if second_best is None:
            second_best = loaded._replace(warnings=(*warnings, reason))
        warnings.append(f"{reason}{_GOING_BACK}")
    if second_best is not None:
        return second_best
    if warnings:
        raise UsageError(
            f"{folder}: no usable checkpoint among {len(warnings)}: "
            f"{warnings[0].removesuffix(_GOING_BACK)}"
        )
    raise UsageError(f"{folder}: no checkpoint: the run ended before its first one")


def load(path: Path) -> Checkpoint:
    """Return the checkpoint in one file. Raises UsageError where there is no whole one."""
    try:
        return _read(path)
    except _UnusableError as error:
        raise UsageError(f"{path}: {error}") from None


def file_of(folder: Path, step: int) -> Path:
    """Return the name of the checkpoint of ``step``, whether it exists or not."""
    return folder / f"ckpt-{step:09d}.safetensors"


def saved_steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint in ``folder``, damaged or not, in order."""
    return sorted(
        step for path in folder.glob("ckpt-*.safetensors") if (step := _step_of(path)) is not None
    )


def _step_of(path: Path) -> int | None:
    """Return the step in a checkpoint's name; None for other files."""
    name = re.fullmatch(r"ckpt-([0-9]{9,18})\.safetensors", path.name)
    return int(name[1]) if name and file_of(path.parent, int(name[1])) == path else None


def _stale(saved: list[int], newest: int, keep: int) -> Iterator[int]:
    yield from (step for step in saved if step > newest)
    yield from [step for step in saved if step <= newest][:-keep]


def _pieces(tensors: Mapping[str, Tensor], metadata: str) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file in pieces, the bytes that safetensors 0.5 to 0.8 write.

    The library itself holds all of Python up or copies everything in some versions, and in others
    renames a file that it did not force to disk.
    """
    # Long elements first, so that all are aligned in the file.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name.encode()))
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: metadata}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _name_of(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        data = _bytes_of(tensors[name])
        yield from (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))


@cache
def _name_of(dtype: torch.dtype) -> str:
    """Return the name that safetensors has for ``dtype``."""
    file = safetensors.torch.save({"empty": torch.empty(0, dtype=dtype)})
    return str(json.loads(file[8:])["empty"]["dtype"])


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = new_digest()
    digest.update(json.dumps([FORMAT, meta]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _read(path: Path) -> Checkpoint:
    try:
        # open_regular refuses a pipe, which the library would wait for.
        with (
            open_regular(path) as opened,
            safetensors.safe_open(utf8_name(path, opened), framework="pt") as file,
        ):
            text = (file.metadata() or {}).get(METADATA_KEY, "{}")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise _UnusableError(f"cannot read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise _UnusableError(f"damaged or no checkpoint ({error})") from None
    record = _parsed(text)
    if record.get("format") != FORMAT:
        raise _UnusableError(
            f"not a checkpoint of this version of fastbyol (format {record.get('format')!r}, not "
            f"{FORMAT!r})"
        )
    meta = record.get("meta")
    if not isinstance(meta, dict) or record.get("digest") != _digest(meta, tensors):
        raise _UnusableError("damaged (its checksum differs)")
    if _step_of(path) not in (None, meta["step"]):
        raise _UnusableError(f"holds step {meta['step']}, not what its name says")
    return Checkpoint(tensors, meta, path, record["digest"])


def utf8_name(path: Path, opened: BinaryIO) -> str:
    """Return a name in UTF-8, as safetensors requires, of the file ``opened`` at ``path``."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return f"/dev/fd/{opened.fileno()}"
    return str(path)


def _parsed(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise _UnusableError("damaged (its metadata is no JSON object)")
    return record
