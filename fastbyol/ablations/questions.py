"""The questions about collapse that rules are made of: each looks at one seed's runs and answers held, not held or cannot tell.

How long a time is relative. The post's runs have 320 epochs of 410 steps; a run at ``short`` or ``mini`` scale is as long as
the events take, so there a limit is a share of the run:

            published, full       short, mini
AT_ONCE     by epoch 10           first quarter      C7's accuracy is below 10 % at epoch 10; the other collapses end by epoch 3
QUICKLY     by epoch 40           first half         C10 has separated by epoch 20, C6 learns from epoch 2 to 10 on
IN_TIME     by epoch 100          first three        C9: "within 100 epochs"
                                  quarters
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fastbyol.ablations.course import Course, course
from fastbyol.ablations.evidence import Evidence

Runs = Mapping[str, Evidence]

# A collapse is disturbed where the loss climbs back to this many times its lowest so far: published 45 (epoch 46 to 67, cosines
# unmoved) and 160 (to epoch 92).
DISTURBED = 10.0


class Finding(NamedTuple):
    """The answer for one seed. ``asked`` is False where the question makes no sense of these runs."""

    held: bool | None
    text: str
    asked: bool = True


class Span(NamedTuple):
    """A stretch from the start: up to an epoch of the post's runs, or a share of a shorter run."""

    words: str
    epoch: int
    share: float

    def last_epoch(self, run: Evidence) -> float:
        """The last epoch, counted from 0, that lies in it."""
        return self.epoch if run.scale in ("published", "full") else max(self.share * run.epochs - 1, 0.0)


AT_ONCE = Span("by epoch 10 (short and mini: in the first quarter of the run)", 10, 0.25)
QUICKLY = Span("by epoch 40 (short and mini: in the first half of the run)", 40, 0.5)
IN_TIME = Span("by epoch 100 (short and mini: in the first three quarters of the run)", 100, 0.75)

Question = Callable[[Runs], Finding]


def never_collapses(arm: str) -> Question:
    """No epoch is in the collapsed phase."""

    def ask(runs: Runs) -> Finding:
        seen = course(runs[arm])
        if seen.collapse is not None:
            return Finding(False, f"collapsed in {seen.onset(seen.collapse)}")
        return Finding(True if seen.finished else None, f"never collapsed, {now(runs[arm], seen)}")

    return ask


def collapses(arm: str, span: Span) -> Question:
    """Some epoch in ``span`` is in the collapsed phase."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        if seen.collapse is not None:
            return Finding(seen.collapse <= span.last_epoch(run), f"collapsed in {seen.onset(seen.collapse)}")
        over = seen.finished or seen.epoch[-1] >= span.last_epoch(run)
        return Finding(False if over else None, f"not collapsed, {now(run, seen)}")

    return ask


def was_collapsed(arm: str) -> Question:
    """Some epoch is in the collapsed phase. Accuracy alone does not show a short collapse, and is not asked."""

    def ask(runs: Runs) -> Finding:
        seen = course(runs[arm])
        if seen.signal == "accuracy":
            return Finding(None, "accuracy alone does not show it", asked=False)
        return collapses(arm, Span("", 10**9, 1.0))(runs)

    return ask


def ends_collapsed(arm: str) -> Question:
    """The last epoch is in the collapsed phase."""
    return _at_end(arm, lambda seen: seen.end == "collapsed")


def ends_out(arm: str) -> Question:
    """The last epoch is not in the collapsed phase, and where accuracy alone is known, has a useful one."""
    return _at_end(arm, lambda seen: seen.end != "collapsed")


def ends_separated(arm: str) -> Question:
    """The last epoch is in the separated phase."""
    return _at_end(arm, lambda seen: seen.end == "separated")


def _at_end(arm: str, held: Callable[[Course], bool]) -> Question:
    def ask(runs: Runs) -> Finding:
        seen = course(runs[arm])
        return Finding(held(seen) if seen.finished else None, now(runs[arm], seen))

    return ask


def never_leaves(arm: str) -> Question:
    """Once collapsed it stays so in every epoch."""

    def ask(runs: Runs) -> Finding:
        seen = course(runs[arm])
        if seen.collapse is None:
            return Finding(False if seen.finished else None, "never collapsed")
        if seen.leaving is not None:
            return Finding(False, f"left the collapsed state in {seen.onset(seen.leaving)}")
        return Finding(True if seen.finished else None, f"collapsed from {seen.onset(seen.collapse)} on")

    return ask


def leaves(arm: str, span: Span) -> Question:
    """It leaves the collapsed phase within ``span``. Accuracy alone: it is useful by then.

    A run that never collapsed has nothing to leave, so this does not hold.
    """

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        left = seen.first("separated") if seen.signal == "accuracy" else seen.leaving
        if left is None:
            return Finding(False if seen.finished else None, "never collapsed" if seen.collapse is None else now(run, seen))
        return Finding(left <= span.last_epoch(run), f"left the collapsed state in {seen.onset(left)}")

    return ask


def stays_beyond(arm: str, span: Span) -> Question:
    """It collapses, and does not leave the collapsed phase within ``span``."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        if seen.collapse is None:
            return Finding(False if seen.finished else None, "never collapsed")
        if seen.leaving is not None:
            return Finding(seen.leaving > span.last_epoch(run), f"left the collapsed state in {seen.onset(seen.leaving)}")
        return Finding(True if seen.epoch[-1] >= span.last_epoch(run) else None, now(run, seen))

    return ask


def separates(arm: str, span: Span) -> Question:
    """It is in the separated phase in some epoch of ``span`` that comes after a collapse."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        if seen.collapse is None:
            return Finding(False if seen.finished else None, "never collapsed")
        at = seen.first("separated", after=seen.collapse)
        if at is not None:
            return Finding(at <= span.last_epoch(run), f"separated in {seen.onset(at)}")
        return Finding(False if seen.finished else None, f"not separated, {now(run, seen)}")

    return ask


def comes_and_goes(arm: str) -> Question:
    """It separates at least twice, with a relapse in between."""

    def ask(runs: Runs) -> Finding:
        seen = course(runs[arm])
        text = f"separated in epochs {_listed(seen.separations)}, relapsed in epochs {_listed(seen.relapses)}"
        held = len(seen.separations) >= 2
        return Finding(held if held or seen.finished else None, text)

    return ask


def disturbed(arm: str) -> Question:
    """After the collapse the loss climbs to DISTURBED times its lowest so far, or the collapsed phase is left."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        if seen.collapse is None:
            return Finding(False if seen.finished else None, "never collapsed")
        loss = run.loss[(run.epoch >= seen.collapse) & np.isfinite(run.loss)]
        rise = float(np.max(loss / np.minimum.accumulate(loss))) if len(loss) else 1.0
        left = "" if seen.leaving is None else f", left the collapsed state in {seen.onset(seen.leaving)}"
        held = rise >= DISTURBED or seen.leaving is not None
        return Finding(held if held or seen.finished else None, f"loss climbed to {rise:.3g} times its lowest{left}")

    return ask


def loss_rises_after_collapse(arm: str) -> Question:
    """The last loss is higher than DISTURBED times the lowest of the collapsed epochs."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        if seen.collapse is None or not np.isfinite(run.loss).any():
            return Finding(None, "no loss of a collapsed epoch", asked=bool(np.isfinite(run.loss).any()))
        lowest, last = float(np.nanmin(run.loss[run.epoch >= seen.collapse])), float(run.loss[-1])
        return Finding(
            last > DISTURBED * lowest if run.finished else None, f"loss {lowest:.3g} at its lowest, {last:.3g} at last"
        )

    return ask


def every(*questions: Question) -> Question:
    """All of them hold; one that does not decides, whatever the others say."""

    def ask(runs: Runs) -> Finding:
        found = [question(runs) for question in questions]
        held = [finding.held for finding in found]
        verdict = False if False in held else None if None in held else True
        return Finding(verdict, "; ".join(finding.text for finding in found), all(finding.asked for finding in found))

    return ask


def now(run: Evidence, seen: Course) -> str:
    """Where a run stands at its newest epoch, in words."""
    name, values = {
        "cosines": ("negative cosine", run.neg_cos),
        "loss": ("loss", run.loss),
        "accuracy": ("accuracy", run.accuracy),
    }[seen.signal]
    value = values[np.isfinite(values)][-1]
    return f"{'' if seen.finished else 'not finished, '}{seen.end} in {seen.onset(seen.epoch[-1])}, {name} {value:.4g}"


def _listed(epochs: tuple[int, ...]) -> str:
    return ", ".join(str(epoch) for epoch in epochs) or "none"
