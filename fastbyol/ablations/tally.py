"""From a folder of ablations to verdicts: its runs read as evidence and accounted for, every claim judged that has any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastbyol.ablations.arms import ScaleName, arms
from fastbyol.ablations.claims import CLAIMS
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.plan import RUNS, found
from fastbyol.ablations.verdict import Verdict, judge
from fastbyol.errors import FastbyolError

T = TypeVar("T")


@dataclass(frozen=True)
class Account:
    """What became of every run ever asked for, by name (``ARM seed K``). ``asked`` ones are in one of the next four.

    ``failed`` gives reasons. ``left``: not begun, or begun and without an end in the ledger. ``odd`` are sentences on runs that
    failed before they were done, that the ledger and the folder do not agree about, or that no arm is known for.
    """

    asked: tuple[str, ...]
    done: tuple[str, ...]
    failed: Mapping[str, str]
    stopped: tuple[str, ...]
    left: tuple[str, ...]
    odd: tuple[str, ...]


def account(out: Path, ledger: Mapping[str, Any]) -> Account:
    """Count the runs of ``out`` by its ledger, and compare that with the folders that are there."""
    rows = {f"{row['arm']} seed {row['seed']}": row for row in ledger["runs"].values()}
    asked = tuple(dict.fromkeys((*(name for call in ledger["calls"] for name in call.get("runs", ())), *rows)))
    status = {name: rows.get(name, {}).get("status", "left") for name in asked}
    folders = sorted(path.parent for path in (out / RUNS).glob("*/seed*/config.toml"))
    there = {f"{path.parent.name} seed {path.name.removeprefix('seed')}": path.parent.name for path in folders}
    odd = [f"{name}: failed before ({why})" for name in asked for why in rows.get(name, {}).get("failed_before", ())]
    odd += [f"{name}: in the folder, not in the ledger" for name in there if name not in status]
    odd += [f"{name}: {status[name]} by the ledger, not in the folder" for name in asked if name not in there
            and status[name] in ("done", "stopped")]  # fmt: skip
    odd += [f"{name}: there is no arm of this name, so it is not judged" for name, arm in there.items() if arm not in arms()]
    return Account(
        asked=asked,
        done=tuple(name for name in asked if status[name] == "done"),
        failed={name: str(rows[name].get("error", "no reason kept")) for name in asked if status[name] == "failed"},
        stopped=tuple(name for name in asked if status[name] == "stopped"),
        left=tuple(name for name in asked if status[name] == "left"),
        odd=tuple(odd),
    )


def read_each(out: Path, read: Callable[[Path, str, int], T]) -> tuple[dict[str, tuple[T, ...]], tuple[str, ...]]:
    """Call ``read`` with folder, arm and seed of every run in ``out``; returns what that returned, by arm, in order of seeds.

    Also returns what ``read`` said of the runs that it could not read: one damaged run does not keep the others from judgement.
    """
    runs: dict[str, tuple[T, ...]] = {}
    left_out = []
    for arm, seed, path in found(out):
        try:
            runs[arm] = (*runs.get(arm, ()), read(path, arm, seed))
        except FastbyolError as error:
            left_out.append(str(error))
    return runs, tuple(left_out)


def evidence_in(out: Path, scale: ScaleName) -> tuple[dict[str, tuple[Evidence, ...]], tuple[str, ...]]:
    """Read the runs in ``out``, as ``read_each`` does; one without a finished epoch cannot be read."""
    return read_each(out, lambda path, arm, seed: Evidence.of_run(path, arm=arm, seed=seed, scale=scale))


def verdicts(evidence: Mapping[str, Sequence[Evidence]], scale: ScaleName) -> tuple[Verdict, ...]:
    """Return a verdict on each claim of which some arm was run to its end, from finished runs alone, in the claims' order."""
    done = {name: [run for run in rows if run.finished] for name, rows in evidence.items()}
    return tuple(judge(claim, done, scale) for claim in CLAIMS if any(done.get(name) for name in claim.arms))
