"""A claim's verdict: every rule asked of every seed, the answers counted, and one outcome drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastbyol.ablations.claims import Claim
from fastbyol.ablations.evidence import Evidence, Scale
from fastbyol.ablations.rules import RULES, Role, Rule
from fastbyol.evaluation.intervals import wilson

Outcome = Literal["reproduced", "partly", "mixed", "not reproduced", "undetermined"]


class Statement(NamedTuple):
    """One sentence of a claim: whether it held, and the measurements.

    ``held`` is None if the statement is ``mixed`` or undecided. A ``main`` statement decides, an
    ``other`` one refines, and a ``told`` one counts for nothing: it cannot be asked of these runs,
    or is a control. ``rule`` says in words when the statement holds for a seed. It held for ``yes``
    of the ``asked`` seeds, a share that lies in ``interval``; ``open`` of them have no answer.
    """

    text: str
    held: bool | None
    evidence: str
    role: Role = "main"
    rule: str = ""
    yes: int = 0
    asked: int = 0
    open: int = 0
    interval: tuple[float, float] = (0.0, 1.0)
    mixed: bool = False

    @property
    def answer(self) -> str:
        """The answer in a word or two."""
        return (
            "mixed"
            if self.mixed
            else {True: "held", False: "not held", None: "undecided"}[self.held]
        )


@dataclass(frozen=True)
class Verdict:
    """The outcome for one claim and the statements that it was drawn from."""

    claim: str
    outcome: Outcome
    statements: tuple[Statement, ...]


def judge(
    claim: Claim,
    evidence: Mapping[str, Sequence[Evidence]],
    scale: Scale,
    *,
    needs: int | None = None,
) -> Verdict:
    """Ask the rules of ``claim`` of the runs in ``evidence``, by arm name, with one run per seed.

    Arms that the claim does not name are ignored, and the order of runs does not matter. ``scale``
    is that of the runs; ``needs`` answers are needed, by default as many as the claim needs. The
    post's own figures are single runs: one is enough. Raises ValueError for two runs of an arm with
    one seed.
    """
    by_seed = {arm: _by_seed(arm, runs) for arm, runs in evidence.items()}
    needs = needs or (1 if scale == "published" else claim.needs)
    statements = tuple(_state(rule, claim, by_seed, needs) for rule in RULES[claim.id])
    return Verdict(claim.id, outcome_of(statements), statements)


def judge_variants(
    claim: Claim, evidence: Mapping[str, Sequence[Evidence]], scale: Scale
) -> dict[str, Verdict]:
    """Judge the settings that the post leaves open, and return the verdicts by WHAT.

    The runs of ARM@WHAT are judged instead of ARM's. One seed is enough: these verdicts show
    alternatives, and count for nothing.
    """
    whats = {
        what
        for arm in evidence
        for base, _, what in [arm.partition("@")]
        if what and base in claim.arms
    }
    runs_of = {
        what: {arm: evidence.get(f"{arm}@{what}", evidence.get(arm, ())) for arm in claim.arms}
        for what in sorted(whats)
    }
    return {
        what: judge(claim, {**evidence, **runs}, scale, needs=1) for what, runs in runs_of.items()
    }


def outcome_of(statements: Sequence[Statement]) -> Outcome:
    """Draw the outcome of statements.

    *not reproduced* if a main statement did not hold; else *undetermined* if one is undecided, or
    there is none; else *mixed* if one is mixed; else *reproduced* if all others held too, and
    *partly* if not.
    """
    main = {statement.answer for statement in statements if statement.role == "main"}
    if "not held" in main:
        return "not reproduced"
    if "undecided" in main or not main:
        return "undetermined"
    if "mixed" in main:
        return "mixed"
    return "reproduced" if all(s.held for s in statements if s.role == "other") else "partly"


def _by_seed(arm: str, runs: Sequence[Evidence]) -> dict[int, Evidence]:
    by_seed = {run.seed: run for run in runs}
    if len(by_seed) != len(runs):
        raise ValueError(f"{arm}: two runs with one seed among {sorted(run.seed for run in runs)}")
    return by_seed


def _state(
    rule: Rule, claim: Claim, by_seed: Mapping[str, Mapping[int, Evidence]], needs: int
) -> Statement:
    arms, words = rule.arms or claim.arms, rule.test.words
    missing = [arm for arm in arms if not by_seed.get(arm)]
    if missing:
        # A control belongs to a claim only if somebody ran it.
        role: Role = rule.role if set(missing) <= set(claim.arms) else "told"
        return Statement(rule.text, None, f"no run of {', '.join(missing)}", role, words)
    seeds = sorted(set.intersection(*(set(by_seed[arm]) for arm in arms)))
    findings = {seed: rule.test.question(*(by_seed[arm][seed] for arm in arms)) for seed in seeds}
    asked = {seed: finding for seed, finding in findings.items() if finding.asked}
    if findings and not asked:
        return Statement(rule.text, None, next(iter(findings.values())).text, "told", words)
    yes, no = (
        sum(finding.answer is wanted for finding in asked.values()) for wanted in (True, False)
    )
    answer, summary = decide(yes, no, total := len(asked), needs)
    details = "; ".join(f"seed {seed}: {finding.text}" for seed, finding in asked.items())
    evidence = f"{summary}. {details}" if details else summary
    mixed = answer is None and 0 not in (yes, no) and yes + no >= needs
    return Statement(
        rule.text,
        answer,
        evidence,
        rule.role,
        words,
        yes,
        total,
        total - yes - no,
        wilson(yes, total),
        mixed,
    )


def decide(yes: int, no: int, asked: int, needs: int) -> tuple[bool | None, str]:
    """Return whether a statement held, from ``yes`` and ``no`` of ``asked`` seeds.

    The count is returned too, in words.

    It held if at least two thirds of the seeds hold and Wilson's 95 % interval of their share lies
    above one third, which excludes that it holds in a third of the runs or fewer. It did not if at
    most a third hold and the interval lies below two thirds: 3 of 3, 4 of 5 and 5 of 5 hold, 0 of 3
    and 1 of 5 do not. Otherwise it is mixed. It is undecided with fewer answers than ``needs``. If
    one answer is needed, the share alone decides, without an interval.
    """
    summary = f"held for {yes} of {asked} seed{'s' * (asked != 1)}"
    if yes + no < asked:
        summary += f", open for {asked - yes - no}"
    elif needs > 1 and asked:
        low, high = wilson(yes, asked)
        summary += f" (share {share(yes / asked)}, 95 % interval {share(low)} to {share(high)})"
    if yes + no < needs:
        return None, f"{summary}; too few to decide: {yes + no} of {needs} needed"
    for answer, count in ((True, yes), (False, no)):
        if 3 * count >= 2 * asked and (needs == 1 or 3 * wilson(count, asked)[0] > 1):
            return answer, summary
    return None, f"{summary}{': mixed' if yes and no else '; too many are open'}"


def share(value: float) -> str:
    """Return a share with two digits: .80, 1.00."""
    return f"{value:.2f}".removeprefix("0")
