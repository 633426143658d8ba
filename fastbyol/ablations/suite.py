"""A folder of ablations, read once: its runs, and the verdicts on all claims.

It also tells what became of the runs that were asked for.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol.ablations.arms import SCALES, ScaleName, arms
from fastbyol.ablations.claims import CLAIMS, Claim
from fastbyol.ablations.evidence import Evidence, Scale
from fastbyol.ablations.plan import run_folders
from fastbyol.ablations.verdict import Verdict, judge, judge_variants
from fastbyol.config import Resolved
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.fleet import ledger
from fastbyol.fleet.ledger import RUNS
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.metrics import read_events


@dataclass(frozen=True)
class Account:
    """The fate of every run ever asked for, by name (``ARM seed K``).

    Each name is in one of the next four fields. ``failed`` gives reasons. ``left`` are those that
    have not begun, or have begun and have no end in the ledger. ``odd`` are sentences on runs that
    failed before they were done, about which the ledger and the folder disagree, or whose arm does
    not exist.
    """

    asked: tuple[str, ...]
    done: tuple[str, ...]
    failed: Mapping[str, str]
    stopped: tuple[str, ...]
    left: tuple[str, ...]
    odd: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Record:
    """A run as its folder has it: measurements, configuration, events and environment.

    The environment is the one that the run was made in.
    """

    path: Path
    evidence: Evidence
    config: Resolved
    events: tuple[dict[str, Any], ...]
    env: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path, *, arm: str, seed: int, scale: Scale) -> Record:
        """Read the run folder ``path``, finished or not, each of its files once.

        Raises UsageError: no run is there, or no epoch of it has ended.
        """
        with RunFolder.open(path, lock=False) as folder:
            config, env = folder.config, folder.env
        events = tuple(read_events(path))
        evidence = Evidence.of_run(path, config, events, arm=arm, seed=seed, scale=scale)
        return cls(path, evidence, config, events, env)


@dataclass(frozen=True, eq=False)
class Suite:
    """All runs of the folder ``out`` by arm and seed, and the verdicts by claim.

    The verdicts come from finished runs alone. ``left_out`` names the runs that could not be read,
    and why. ``commands`` are the calls that made the runs, ``data`` the names of the sets that they
    were trained on.
    """

    out: Path
    scale: ScaleName
    commands: tuple[str, ...]
    runs: Mapping[str, tuple[Record, ...]]
    left_out: tuple[str, ...]
    verdicts: Mapping[str, Verdict]
    variants: Mapping[str, Mapping[str, Verdict]]
    account: Account
    data: tuple[str, ...]

    @classmethod
    def read(cls, out: Path) -> Suite:
        """Read the ledger and every run in ``out``.

        One damaged run does not keep the others from judgement. Raises UsageError: there is no
        ledger.
        """
        content = ledger.read(out)
        scale: ScaleName = content["scale"]
        if scale not in SCALES:
            raise UsageError(f"{out}: holds no ablations, but a {scale}")
        runs: dict[str, tuple[Record, ...]] = {}
        left_out = []
        for arm, seed, path in run_folders(out):
            try:
                runs[arm] = (*runs.get(arm, ()), Record.read(path, arm=arm, seed=seed, scale=scale))
            except FastbyolError as error:
                left_out.append(str(error))
        done = {
            arm: [run.evidence for run in records if run.evidence.finished]
            for arm, records in runs.items()
        }
        return cls(
            out=out,
            scale=scale,
            commands=_commands(content),
            runs=runs,
            left_out=tuple(left_out),
            verdicts={claim.id: judge(claim, done, scale) for claim in CLAIMS},
            variants={claim.id: judge_variants(claim, done, scale) for claim in CLAIMS},
            account=account(out, content),
            data=tuple(
                sorted(
                    {
                        Path(run.config.data.train).name
                        for records in runs.values()
                        for run in records
                    }
                )
            ),
        )

    @property
    def judged(self) -> tuple[Verdict, ...]:
        """Verdicts on the claims of which an arm has a finished run, in the claims' order."""
        return tuple(
            self.verdicts[claim.id] for claim in CLAIMS if any(map(self._num_finished, claim.arms))
        )

    @property
    def records(self) -> tuple[Record, ...]:
        """All runs, by arm and seed."""
        return tuple(run for records in self.runs.values() for run in records)

    def evidence(self, arm: str) -> tuple[Evidence, ...]:
        """Return the evidence of an arm's runs, by seed; empty if the arm was not run."""
        return tuple(run.evidence for run in self.runs.get(arm, ()))

    def seeds(self, claim: Claim) -> str:
        """Return how many finished seeds the arms of a claim have.

        It is one number, or the least and the most.
        """
        counts = sorted(set(map(self._num_finished, claim.arms)))
        return "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))

    def _num_finished(self, arm: str) -> int:
        return sum(run.finished for run in self.evidence(arm))


def account(out: Path, content: Mapping[str, Any]) -> Account:
    """Count the runs of ``out`` by its ledger's ``content``.

    The count is compared with the folders there.
    """
    rows = {f"{row['arm']} seed {row['seed']}": row for row in content["runs"].values()}
    asked = tuple(
        dict.fromkeys(
            (*(name for call in content["calls"] for name in call.get("runs", ())), *rows)
        )
    )
    status = {name: rows.get(name, {}).get("status", "new") for name in asked}
    folders = sorted(path.parent for path in (out / RUNS).glob("*/seed*/config.toml"))
    there = {
        f"{path.parent.name} seed {path.name.removeprefix('seed')}": path.parent.name
        for path in folders
    }
    odd = [
        f"{name}: failed before ({why})"
        for name in asked
        for why in rows.get(name, {}).get("failed_before", ())
    ]
    odd += [f"{name}: in the folder, not in the ledger" for name in there if name not in status]
    odd += [
        f"{name}: {status[name]} by the ledger, not in the folder"
        for name in asked
        if name not in there and status[name] in ("done", "stopped")
    ]
    odd += [
        f"{name}: there is no arm of this name, so it is not judged"
        for name, arm in there.items()
        if arm not in arms()
    ]
    return Account(
        asked=asked,
        done=tuple(name for name in asked if status[name] == "done"),
        failed={
            name: str(rows[name].get("error", "no reason kept"))
            for name in asked
            if status[name] == "failed"
        },
        stopped=tuple(name for name in asked if status[name] == "stopped"),
        left=tuple(name for name in asked if status[name] == "new"),
        odd=tuple(odd),
    )


def _commands(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the calls that made the runs, without repetitions of one that was interrupted."""
    calls = (call.get("command") or [] for call in content["calls"])
    return tuple(
        dict.fromkeys(
            shlex.join(["fastbyol", *map(str, command[1:])]) for command in calls if command
        )
    )
