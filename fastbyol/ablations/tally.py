"""From a folder of ablations to verdicts: every run in it read as evidence, every claim judged that has any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastbyol.ablations.arms import ScaleName
from fastbyol.ablations.claims import CLAIMS
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.plan import epochs_done, found
from fastbyol.ablations.verdict import Verdict, judge


def evidence_in(out: Path, scale: ScaleName) -> dict[str, tuple[Evidence, ...]]:
    """The runs in ``out`` with an epoch or more, by arm, in the order of arms and seeds."""
    runs: dict[str, list[Evidence]] = {}
    for name, seed, path in found(out):
        if epochs_done(path):
            runs.setdefault(name, []).append(Evidence.of_run(path, arm=name, seed=seed, scale=scale))
    return {name: tuple(rows) for name, rows in runs.items()}


def verdicts(evidence: Mapping[str, Sequence[Evidence]], scale: ScaleName) -> tuple[Verdict, ...]:
    """A verdict on each claim of which some arm was run to its end, from finished runs alone, in the order of the claims."""
    done = {name: [run for run in rows if run.finished] for name, rows in evidence.items()}
    return tuple(judge(claim, done, scale) for claim in CLAIMS if any(done.get(name) for name in claim.arms))
