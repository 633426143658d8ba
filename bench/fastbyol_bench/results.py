"""The schema of benchmark results: frozen, checked, stored as JSON, and versioned by its name.

Times are in seconds, rates in images per second. The first variant of a piece of work is ours.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from fastbyol.errors import UsageError
from fastbyol.files import open_regular
from fastbyol.runs.durable import write_text
from fastbyol.runs.environment import environment


class Frozen(BaseModel):
    """A frozen model that rejects unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Timing(Frozen):
    """The median over ``runs`` runs, their interquartile range, and the median cpu time."""

    median_s: PositiveFloat
    spread_s: NonNegativeFloat
    runs: PositiveInt
    cpu_s: NonNegativeFloat


class Ratio(Frozen):
    """Their time over ours: median and interquartile range over rounds; ``cpu`` of cpu times."""

    median: PositiveFloat
    spread: NonNegativeFloat
    cpu: NonNegativeFloat | None = None


class Floor(Frozen):
    """The least time possible at the device's measured ceilings, and the ceiling that binds."""

    seconds: PositiveFloat
    bound: Literal["bytes", "operations"]


class Row(Frozen):
    """One variant of one piece of work, or what it ``needs`` to be measured.

    ``derived`` rows are computed from measured parts, as ``note`` explains. ``images`` is the
    number of images per call, ``threads`` that of torch's threads in this process, None on a GPU.
    """

    suite: str = Field(min_length=1)
    name: str = Field(min_length=1)
    variant: str = Field(min_length=1)
    timing: Timing | None = None
    needs: str | None = None
    images: PositiveInt | None = None
    threads: PositiveInt | None = None
    floor: Floor | None = None
    ratio: Ratio | None = None
    derived: bool = False
    note: str = ""

    @model_validator(mode="after")
    def _measured_or_not(self) -> Row:
        if (self.timing is None) == (self.needs is None):
            raise ValueError("a row has either a timing or what it needs")
        return self

    @property
    def img_s(self) -> float | None:
        """Images per second."""
        return self.images / self.timing.median_s if self.images and self.timing else None

    @property
    def img_cpu_s(self) -> float | None:
        """Images per second of cpu time, all threads counted."""
        return (
            self.images / self.timing.cpu_s
            if self.images and self.timing and self.timing.cpu_s
            else None
        )

    @property
    def share(self) -> float | None:
        """The share of the floor that is reached: 1 is the device's limit."""
        return self.floor.seconds / self.timing.median_s if self.floor and self.timing else None


class Ceiling(Frozen):
    """The device's best rates with ``threads`` threads: bytes read plus written, and operations."""

    threads: PositiveInt
    copy_bytes_s: PositiveFloat
    fp32_flop_s: PositiveFloat
    bf16_flop_s: PositiveFloat


class Part(Frozen):
    """A part of a training step, with its median time over runs."""

    name: str
    seconds: NonNegativeFloat


class Machine(Frozen):
    """The hardware and the versions of the software."""

    device: Literal["cpu", "cuda"]
    device_name: str
    cpu: str
    cores: PositiveInt
    python: str
    torch: str
    torchvision: str | None
    triton: str | None
    cuda: str | None
    driver: str | None
    fastbyol: str | None
    platform: str


class Result(Frozen):
    """One run of ``fastbyol bench``. ``load`` is the load average at its start, near 0 if quiet.

    A run rewrites its file after every row, with ``finished`` false until the last. Older files
    have no such field and are complete.
    """

    schema_: Literal["fastbyol-bench/1"] = Field("fastbyol-bench/1", alias="schema")
    suites: tuple[str, ...]
    quick: bool
    machine: Machine
    commit: str | None
    date: str
    command: tuple[str, ...]
    finished: bool = True
    seconds: NonNegativeFloat
    load: NonNegativeFloat
    ceilings: tuple[Ceiling, ...]
    rows: tuple[Row, ...]
    waterfall: tuple[Part, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Result:
        keys = [(row.suite, row.name, row.variant) for row in self.rows]
        doubles = {key for key in keys if keys.count(key) > 1}
        if doubles:
            raise ValueError(f"rows occur twice: {sorted(doubles)}")
        return self

    def find(self, suite: str, name: str, variant: str) -> Row | None:
        """Return the row of that name, or None."""
        return next(
            (r for r in self.rows if (r.suite, r.name, r.variant) == (suite, name, variant)), None
        )


def machine(device: str) -> tuple[Machine, dict[str, Any]]:
    """Return this machine, and the whole record of the environment."""
    record = environment()
    name = record["gpus"][0] if device == "cuda" else record["cpu"]
    kept = {key: record[key] for key in Machine.model_fields if key in record}
    return Machine(
        device="cuda" if device == "cuda" else "cpu",
        device_name=name,
        driver=_driver(device),
        **kept,
    ), record


def commit() -> str | None:
    """Return the commit of the source tree, with ``+`` if files changed.

    Outside of a repository return $FASTBYOL_COMMIT, or None.
    """
    root = Path(__file__).resolve().parent
    words = [["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]]
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(root), *w], capture_output=True, text=True, check=True
            ).stdout
            for w in words
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTBYOL_COMMIT")
    return head.strip() + ("+" if changed.strip() else "")


def _driver(device: str) -> str | None:
    if device != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(query, capture_output=True, text=True, check=True)
            .stdout.splitlines()[0]
            .strip()
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def write(result: Result, path: Path) -> None:
    """Write ``result`` as JSON, a line per field. If killed, ``path`` keeps its old content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dumps(result))


def dumps(result: Result) -> str:
    """Return ``result`` as JSON text."""
    return (
        json.dumps(result.model_dump(mode="json", by_alias=True, exclude_defaults=False), indent=1)
        + "\n"
    )


def read(path: Path) -> Result:
    """Read a file that ``write`` made. Raises UsageError if it is missing or is anything else."""
    try:
        with open_regular(path) as file:
            return Result.model_validate_json(file.read().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise UsageError(
            f"{path}: {reason}: name a file that `fastbyol bench --out` wrote"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(
            f"{path}: {where}: {first['msg']}: no result of `fastbyol bench`, or one of another "
            "version"
        ) from None
