"""ledger.json: every call on a folder of ablations, its environment, and how every run ended."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastbyol.ablations.arms import SCALES, ScaleName
from fastbyol.ablations.plan import Run
from fastbyol.errors import UsageError
from fastbyol.runs.durable import write_text, writing
from fastbyol.runs.environment import environment

NAME = "ledger.json"


class Ledger:
    """The file, rewritten whole at every change. Later calls add to it; the scale stays."""

    def __init__(self, out: Path, scale: ScaleName, asked: Mapping[str, Any]) -> None:
        self._path = out / NAME
        self._content = (
            read(out) if self._path.exists() else {"scale": scale, "calls": [], "runs": {}}
        )
        if self._content["scale"] != scale:
            raise UsageError(
                f"{out}: holds runs at scale {self._content['scale']}, not {scale}: name another "
                "folder with --out"
            )
        self._call = {
            **asked,
            "command": sys.argv,
            "environment": environment(),
            "began": _now(),
            "ended": None,
        }
        self._content["calls"].append(self._call)
        self._write()

    def record(self, run: Run, row: Mapping[str, Any]) -> None:
        """Write down the status of ``run``, its seconds, and its summary.

        Seconds of several calls add up. A failure stays, as ``failed_before``, when the run is made
        again.
        """
        runs = self._content["runs"]
        key = f"{run.arm.name}/seed{run.seed}"
        before = runs.get(key, {})
        failures = [
            *before.get("failed_before", ()),
            *([before["error"]] if before.get("status") == "failed" else []),
        ]
        runs[key] = {
            "arm": run.arm.name, "seed": run.seed, "claims": list(run.arm.claims), **row,
            "seconds": round(before.get("seconds", 0.0) + row.get("seconds", 0.0), 1),
            **({"failed_before": failures} if failures else {}),
        }  # fmt: skip
        self._write()

    def end(self, **fields: Any) -> None:
        """Write down the end of this call."""
        self._call |= {"ended": _now(), **fields}
        self._write()

    def _write(self) -> None:
        with writing(self._path):
            write_text(self._path, json.dumps(self._content, indent=1) + "\n")


def read(out: Path) -> dict[str, Any]:
    """Return the ledger in the folder ``out``.

    Raises UsageError: none is there, or it is damaged.
    """
    path = out / NAME
    try:
        content = json.loads(path.read_text("utf-8"))
        runs, calls = dict(content["runs"]), list(content["calls"])
        sound = all({"arm", "seed"} <= set(row) for row in runs.values()) and all(
            isinstance(call, dict) for call in calls
        )
        if content["scale"] not in SCALES or not sound:
            raise KeyError("scale")
    except OSError:
        raise UsageError(
            f"{out}: no ablations here (no {NAME}); make some with `fastbyol ablate run --out "
            f"{out}`"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path}: damaged: move it away; `fastbyol ablate run` writes a new one"
        ) from None
    return dict(content)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
