"""Files of weights that other programs wrote: torch.save's and safetensors. Never unpickled.

torch.load reads them with ``weights_only``, which makes tensors and plain values alone.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
import torch
from numpy.dtypes import Float32DType, Float64DType, Int64DType
from torch import Tensor

from fastbyol.errors import UsageError, one_line, size_text
from fastbyol.files import open_regular
from fastbyol.runs.checkpoint import METADATA_KEY, utf8_name
from fastbyol.runs.durable import new_digest

# Above every checkpoint of an encoder with its optimizer that is public; below what a machine's
# memory may not hold.
_MOST_BYTES = 16 << 30
# How deep a state dict lies in what a program saved: {"state_dict": {...}} is 1.
_DEEPEST = 4
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_PIECE = 1 << 20
# Plain values that training scripts put beside weights: their arguments and their best accuracy.
# torch knows the functions by these names, whatever module has them today.
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    Float32DType,
    Float64DType,
    Int64DType,
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
]


class WeightsFile(NamedTuple):
    """The tensors of a file by name, and the digest of its bytes.

    Names of nested dictionaries are joined by dots. Tensors are on the cpu, of any dtype.
    """

    tensors: dict[str, Tensor]
    digest: str


def is_checkpoint(path: Path) -> bool:
    """Tell whether a file is one of ``runs.checkpoint``, damaged or not. Raises no error."""
    try:
        with (
            open_regular(path) as opened,
            safetensors.safe_open(utf8_name(path, opened), framework="pt") as file,
        ):
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def read(path: Path) -> WeightsFile:
    """Return the tensors in ``path``. Raises UsageError where it has none, or is damaged."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, io.SEEK_END)
            if size > _MOST_BYTES:
                raise UsageError(
                    f"{path}: has {size_text(size)}, which no file of an encoder has: save its "
                    "state dict alone"
                )
            file.seek(0)
            head = file.read(8)
            file.seek(0)
            if head.startswith((_ZIP, _PICKLE)):
                content = _of_torch(path, file, size, is_zip=head.startswith(_ZIP))
            else:
                content = _of_safetensors(path, file)
            tensors = dict(_flattened(content))
            if not tensors:
                raise UsageError(f"{path}: holds no tensors by name: save a state dict")
            return WeightsFile(tensors, _digest(file))
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror or one_line(error)}") from None


def _of_torch(path: Path, file: BinaryIO, size: int, *, is_zip: bool) -> object:
    """Return what torch.save wrote."""
    try:
        if is_zip:
            _refuse_packed(path, file, size)
            file.seek(0)
        # Of a file on disk torch would try to unpack a tar first; in memory it does not.
        source: BinaryIO = file if is_zip else io.BytesIO(file.read())
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")  # of formats that it then refuses
            return torch.load(source, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        if kind is None:
            raise _damaged(path, error) from None
        raise UsageError(
            f"{path}: holds an object of {kind[1]} beside tensors, and loading it would run that "
            "program's code: where it is trusted, load it with weights_only=False and save the "
            "tensors alone: torch.save(loaded['state_dict'], NEW_FILE), of a module "
            "torch.save(loaded.state_dict(), NEW_FILE)"
        ) from None
    # Whatever a damaged file makes torch's reader do; memory that it declares is not there.
    except Exception as error:
        raise _damaged(path, error) from None


def _refuse_packed(path: Path, file: BinaryIO, size: int) -> None:
    """Raise UsageError for an archive that would be larger than its file: torch packs nothing."""
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > size:
            raise UsageError(f"{path}: damaged, or not of torch.save: holds more than its size")


def _of_safetensors(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(utf8_name(path, file), framework="pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UsageError(
            f"{path}: damaged or no checkpoint, neither safetensors ({one_line(error)}) nor of "
            "torch.save"
        ) from None


def _damaged(path: Path, error: Exception) -> UsageError:
    # The reason stands between paragraphs of advice.
    reason = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))
    return UsageError(
        f"{path}: damaged, or not of torch.save ({reason[1][:200] if reason else one_line(error)})"
    )


def _flattened(content: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dictionaries, each dictionary once."""
    seen: set[int] = set()

    def walk(value: object, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            if prefix:
                yield prefix, value
        elif isinstance(value, Mapping) and depth <= _DEEPEST and id(value) not in seen:
            seen.add(id(value))
            for key, inner in value.items():
                if isinstance(key, str | int):
                    yield from walk(inner, f"{prefix}.{key}" if prefix else str(key), depth + 1)

    return walk(content, "", 0)


def _digest(file: BinaryIO) -> str:
    digest = new_digest()
    file.seek(0)
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()
