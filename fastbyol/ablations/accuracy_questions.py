"""Questions about accuracy: whether a run learns, to what level, and which of several runs is better."""

from __future__ import annotations

import numpy as np

from fastbyol.ablations.curves import appendix
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.questions import Finding, Question, Runs

# Two accuracies differ where sampling does not explain it: 95 % of the difference of two shares near one half. The post scored
# 3,968 images (1.35 pp each by its own account); at the smaller scales 1,024 or more are scored (3.06 pp each).
MARGIN_PP = {"published": 1.9, "full": 1.9, "short": 4.3, "mini": 4.3}
# Levels are of STL-10 at full scale. 5 pp: reading .3, sampling 1.35, and seeds, of which nobody published more than one.
LEVEL_PP = 5.0


def learns(arm: str, *, held_if: bool = True) -> Question:
    """The last accuracy exceeds the first by more than MARGIN_PP; with ``held_if`` False: it does not."""

    def ask(runs: Runs) -> Finding:
        run = runs[arm]
        known = run.accuracy[np.isfinite(run.accuracy)]
        if len(known) < 2:
            return Finding(None, "accuracy was not measured twice", asked=False)
        rose = bool(known[-1] - known[0] > MARGIN_PP[run.scale])
        return Finding(
            (rose == held_if) if run.finished else None, f"accuracy {known[0]:.1f} % at first, {known[-1]:.1f} % at last"
        )

    return ask


def level(arm: str, accuracy: float) -> Question:
    """The last accuracy is within LEVEL_PP of the published one. Asked of STL-10 at full length alone."""

    def ask(runs: Runs) -> Finding:
        run = runs[arm]
        known = run.accuracy[np.isfinite(run.accuracy)]
        if run.scale not in ("published", "full") or not len(known):
            return Finding(None, f"published {accuracy:g} %: a level of STL-10 at full scale", asked=False)
        close = bool(abs(known[-1] - accuracy) <= LEVEL_PP)
        return Finding(close if run.finished else None, f"accuracy {known[-1]:.1f} % at last, published {accuracy:g} %")

    return ask


def beats(better: tuple[str, ...], worse: str) -> Question:
    """Every arm of ``better`` has an accuracy above that of ``worse`` by more than MARGIN_PP, by the table's epoch."""

    def ask(runs: Runs) -> Finding:
        found = {arm: table_accuracy(runs[arm]) for arm in (*better, worse)}
        text = ", ".join(f"{arm} {value:.1f} %" for arm, value in found.items())
        if not all(np.isfinite(list(found.values()))):
            return Finding(None, f"accuracy was not measured: {text}")
        margin = MARGIN_PP[runs[worse].scale]
        return Finding(all(found[arm] - found[worse] > margin for arm in better), text)

    return ask


def no_better(arms: tuple[str, ...], than: str) -> Question:
    """No arm of ``arms`` has an accuracy above that of ``than`` by more than MARGIN_PP."""

    def ask(runs: Runs) -> Finding:
        found = [beats((arm,), than)(runs) for arm in arms]
        text = "; ".join(finding.text for finding in found)
        if any(finding.held is None for finding in found):
            return Finding(None, text)
        return Finding(not any(finding.held for finding in found), text)

    return ask


def in_order(arms: tuple[str, ...]) -> Question:
    """Accuracies fall from each arm to the next, a rise within MARGIN_PP excepted."""

    def ask(runs: Runs) -> Finding:
        values = [table_accuracy(runs[arm]) for arm in arms]
        text = ", ".join(f"{arm} {value:.1f} %" for arm, value in zip(arms, values, strict=True))
        if not np.isfinite(values).all():
            return Finding(None, f"accuracy was not measured: {text}")
        return Finding(bool(np.all(np.diff(values) <= MARGIN_PP[runs[arms[0]].scale])), text)

    return ask


def table_accuracy(run: Evidence) -> float:
    """Accuracy in percent after the tenth epoch at full length, as in the post's table; at the end of shorter runs."""
    last = 9 if run.scale in ("published", "full") else run.epochs
    known = run.accuracy[np.isfinite(run.accuracy) & (run.epoch <= last)]
    ready = run.finished or len(run.epoch) > last
    return float(known[-1]) if len(known) and ready else float("nan")


def published_accuracy(claim: str) -> float:
    """The accuracy in percent at the end of a published curve."""
    numbers = next(row["numbers"] for row in appendix()["claims"] if row["id"] == claim)
    return float(next(value for name, value in numbers.items() if name in ("accuracy@319", "accuracy@320")))
