"""The runs of an ablation's folder and what they come to: what its report tells."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol.ablations import ledger
from fastbyol.ablations.arms import ScaleName
from fastbyol.ablations.claims import CLAIMS, Claim
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.tally import Account, account, read_each
from fastbyol.ablations.verdict import Verdict, judge, judge_variants
from fastbyol.config import Resolved
from fastbyol.errors import UsageError
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.metrics import read_events


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its folder, what it measured, its configuration, the events that it recorded, and where it was made."""

    path: Path
    evidence: Evidence
    config: Resolved
    events: tuple[dict[str, Any], ...]
    env: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Suite:
    """All runs by arm and seed, and the verdicts by claim, from finished runs alone.

    ``left_out`` says which runs could not be read, and why; ``commands`` are the calls that made them, ``account`` is what
    became of every run asked for, ``data`` the names of the sets that the runs were trained on.
    """

    scale: ScaleName
    commands: tuple[str, ...]
    runs: Mapping[str, tuple[Run, ...]]
    left_out: tuple[str, ...]
    verdicts: Mapping[str, Verdict]
    variants: Mapping[str, Mapping[str, Verdict]]
    account: Account
    data: tuple[str, ...]

    def evidence(self, arm: str) -> tuple[Evidence, ...]:
        """Return the evidence of an arm's runs, by seed; empty where it was not run."""
        return tuple(run.evidence for run in self.runs.get(arm, ()))


def read(out: Path) -> Suite:
    """Read the runs and the ledger in ``out`` and judge all claims from the finished runs.

    Raises UsageError: no ledger, or no run with a finished epoch.
    """
    asked = ledger.read(out)
    scale: ScaleName = asked["scale"]
    runs, left_out = read_each(out, lambda folder, arm, seed: _read_run(folder, arm, seed, scale))
    if not runs:
        why = f": {left_out[0]}" if left_out else ""
        raise UsageError(f"{out}: no run with a finished epoch{why}")
    done = {arm: [run.evidence for run in found if run.evidence.finished] for arm, found in runs.items()}
    return Suite(
        scale=scale,
        commands=_commands(asked),
        runs=runs,
        left_out=left_out,
        verdicts={claim.id: judge(claim, done, scale) for claim in CLAIMS},
        variants={claim.id: judge_variants(claim, done, scale) for claim in CLAIMS},
        account=account(out, asked),
        data=tuple(sorted({Path(run.config.data.train).name for found in runs.values() for run in found})),
    )


def seeds_of(suite: Suite, claim: Claim) -> str:
    """Say how many finished seeds the arms of a claim have: one number, or the least and the most."""
    counts = sorted({sum(run.finished for run in suite.evidence(arm)) for arm in claim.arms})
    return "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def _read_run(folder: Path, arm: str, seed: int, scale: ScaleName) -> Run:
    evidence = Evidence.of_run(folder, arm=arm, seed=seed, scale=scale)
    with RunFolder.open(folder, lock=False) as opened:
        return Run(folder, evidence, opened.config, tuple(read_events(folder)), opened.env)


def _commands(asked: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the calls that made the runs, without repetitions of one that was interrupted."""
    calls = (call.get("command") or [] for call in asked["calls"])
    return tuple(dict.fromkeys(shlex.join(["fastbyol", *map(str, command[1:])]) for command in calls if command))
