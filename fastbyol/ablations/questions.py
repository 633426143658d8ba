"""The questions about collapse that rules are made of: each looks at one seed's runs and answers held, not held or cannot tell.

How long a time is relative. The post's runs have 320 epochs of 410 steps. At ``long`` a step goes as far as one of the post's,
so limits there are the post's in steps. A run at ``short`` or ``mini`` scale is as long as the events take: a limit is a share
of it.

            published, full   long            short, mini
AT_ONCE     by epoch 10       4,100 steps     first quarter    C7 is below 10 % at epoch 10; other collapses end by epoch 3
QUICKLY     by epoch 40       16,400 steps    first half       C10 has separated by epoch 20, C6 learns from epoch 2 to 10 on
IN_TIME     by epoch 100      41,000 steps    first three      C9: "within 100 epochs"
                                              quarters
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fastbyol.ablations.course import Course, course
from fastbyol.ablations.evidence import PUBLISHED_STEPS_PER_EPOCH, Evidence

Runs = Mapping[str, Evidence]

# A collapse is disturbed where the loss climbs back to this many times its lowest so far: published 45 (epoch 46 to 67, cosines
# unmoved) and 160 (to epoch 92).
DISTURBED = 10.0
TINY = float(np.finfo(np.float32).tiny)


class Finding(NamedTuple):
    """The answer for one seed. ``asked`` is False where the question makes no sense of these runs."""

    held: bool | None
    text: str
    asked: bool = True


class Span(NamedTuple):
    """A stretch from the start: up to an epoch of the post's runs, or a share of a shorter run, which ``part`` says in words.

    ``followed``: how many epochs the post shows of the run in question, where that is less.
    """

    epoch: int
    share: float
    part: str
    followed: int | None = None

    @property
    def words(self) -> str:
        """Say where it ends, at every scale."""
        steps = self.epoch * PUBLISHED_STEPS_PER_EPOCH
        return f"by epoch {self.epoch} (long: within {steps:,} steps; short and mini: in the first {self.part} of the run)"

    def last_epoch(self, run: Evidence) -> float:
        """Return the last epoch of ``run``, counted from 0, that lies in it."""
        if run.scale in ("published", "full"):
            return self.epoch
        if run.scale == "long":
            return self.epoch * PUBLISHED_STEPS_PER_EPOCH / run.steps_per_epoch - 1
        return max(self.share * run.epochs - 1, 0.0)

    def is_over(self, run: Evidence) -> bool:
        """Return whether what ``run`` has not shown so far did not happen in this span.

        A run of its scale's own length has had its time. At ``long`` lengths differ: the post's steps must have been taken.
        """
        if run.scale == "long":
            return run.steps >= (self.followed or self.epoch) * PUBLISHED_STEPS_PER_EPOCH - run.steps_per_epoch
        return run.finished or bool(run.epoch[-1] >= self.last_epoch(run))


AT_ONCE = Span(10, 0.25, "quarter")
QUICKLY = Span(40, 0.5, "half")
IN_TIME = Span(100, 0.75, "three quarters")

Question = Callable[[Runs], Finding]


def never_collapses(arm: str) -> Question:
    """Ask whether no epoch is in the collapsed phase."""

    def ask(runs: Runs) -> Finding:
        seen = course(runs[arm])
        if seen.collapse is not None:
            return Finding(False, f"collapsed in {seen.onset(seen.collapse)}")
        return Finding(True if seen.finished else None, f"not collapsed {within(runs[arm])}, {now(runs[arm], seen)}")

    return ask


def collapses(arm: str, span: Span | None = None) -> Question:
    """Ask whether some epoch in ``span``, or any, is in the collapsed phase."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        if seen.collapse is not None:
            return Finding(span is None or seen.collapse <= span.last_epoch(run), f"collapsed in {seen.onset(seen.collapse)}")
        over = span.is_over(run) if span else run.finished
        return Finding(False if over else None, f"not collapsed {within(run)}, {now(run, seen)}")

    return ask


def was_collapsed(arm: str) -> Question:
    """Ask whether some epoch is in the collapsed phase. Accuracy alone does not show a short collapse, and is not asked."""

    def ask(runs: Runs) -> Finding:
        seen = course(runs[arm])
        if seen.signal == "accuracy":
            return Finding(None, "accuracy alone does not show it", asked=False)
        return collapses(arm)(runs)

    return ask


def ends_collapsed(arm: str) -> Question:
    """Ask whether the last epoch is in the collapsed phase."""
    return _at_end(arm, lambda seen: seen.end == "collapsed")


def ends_out(arm: str, span: Span | None = None) -> Question:
    """Ask whether the last epoch is not in the collapsed phase; by accuracy alone: whether it is useful.

    A run that ended before ``span`` did, and is collapsed, leaves it open.
    """
    return _at_end(arm, lambda seen: seen.end != "collapsed", span)


def ends_separated(arm: str) -> Question:
    """Ask whether the last epoch is in the separated phase."""
    return _at_end(arm, lambda seen: seen.end == "separated")


def _at_end(arm: str, held: Callable[[Course], bool], span: Span | None = None) -> Question:
    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        decided = seen.finished and (held(seen) or span is None or span.is_over(run))
        return Finding(held(seen) if decided else None, now(run, seen))

    return ask


def never_leaves(arm: str) -> Question:
    """Ask whether it stays collapsed in every epoch after the first collapse."""

    def ask(runs: Runs) -> Finding:
        seen = course(runs[arm])
        if seen.collapse is None:
            return Finding(False if seen.finished else None, "never collapsed")
        if seen.leaving is not None:
            return Finding(False, f"left the collapsed state in {seen.onset(seen.leaving)}")
        text = f"collapsed from {seen.onset(seen.collapse)} on, not left {within(runs[arm])}"
        return Finding(True if seen.finished else None, text)

    return ask


def leaves(arm: str, span: Span) -> Question:
    """Ask whether it leaves the collapsed phase within ``span``. Accuracy alone: it is useful by then.

    A run that never collapsed has nothing to leave, so this does not hold.
    """

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        left = seen.first("separated") if seen.signal == "accuracy" else seen.leaving
        if left is None:
            text = f"never collapsed {within(run)}" if seen.collapse is None else now(run, seen)
            return Finding(False if span.is_over(run) else None, text)
        return Finding(left <= span.last_epoch(run), f"left the collapsed state in {seen.onset(left)}")

    return ask


def stays_beyond(arm: str, span: Span) -> Question:
    """Ask whether it collapses and does not leave the collapsed phase within ``span``."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        if seen.collapse is None:
            return Finding(False if seen.finished else None, "never collapsed")
        if seen.leaving is not None:
            return Finding(seen.leaving > span.last_epoch(run), f"left the collapsed state in {seen.onset(seen.leaving)}")
        return Finding(True if seen.epoch[-1] >= span.last_epoch(run) else None, now(run, seen))

    return ask


def separates(arm: str, span: Span) -> Question:
    """Ask whether it is in the separated phase in some epoch of ``span`` that comes after a collapse."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        if seen.collapse is None:
            return Finding(False if span.is_over(run) else None, f"never collapsed {within(run)}")
        at = seen.first("separated", after=seen.collapse)
        if at is not None:
            return Finding(at <= span.last_epoch(run), f"separated in {seen.onset(at)}")
        return Finding(False if span.is_over(run) else None, f"not separated {within(run)}, {now(run, seen)}")

    return ask


def comes_and_goes(arm: str, span: Span) -> Question:
    """Ask whether after a collapse it separates at least twice, with a relapse in between.

    A run that is over before ``span`` leaves it open.
    """

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        text = f"separated in epochs {_listed(seen.separations)}, relapsed in epochs {_listed(seen.relapses)} {within(run)}"
        held = seen.collapse is not None and sum(epoch > seen.collapse for epoch in seen.separations) >= 2
        return Finding(held if held or (seen.finished and span.is_over(run)) else None, text)

    return ask


def disturbed(arm: str) -> Question:
    """Ask whether after the collapse the loss climbs to DISTURBED times its lowest so far, or the collapsed phase is left."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        if seen.collapse is None:
            return Finding(False if seen.finished else None, "never collapsed")
        loss = run.loss[(run.epoch >= seen.collapse) & np.isfinite(run.loss)]
        # A loss can round to nothing: what climbs from there has climbed.
        rise = float(np.max(loss / np.maximum(np.minimum.accumulate(loss), TINY))) if len(loss) else 1.0
        left = "" if seen.leaving is None else f", left the collapsed state in {seen.onset(seen.leaving)}"
        held = rise >= DISTURBED or seen.leaving is not None
        return Finding(held if held or seen.finished else None, f"loss climbed to {rise:.3g} times its lowest{left}")

    return ask


def loss_rises_after_collapse(arm: str) -> Question:
    """Ask whether the last loss is higher than DISTURBED times the lowest of the collapsed epochs."""

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
    """Ask whether all of them hold; one that does not decides, whatever the others say."""

    def ask(runs: Runs) -> Finding:
        found = [question(runs) for question in questions]
        held = [finding.held for finding in found]
        verdict = False if False in held else None if None in held else True
        return Finding(verdict, "; ".join(finding.text for finding in found), all(finding.asked for finding in found))

    return ask


def within(run: Evidence) -> str:
    """Say how far a run has gone, for what it has not shown: ``within 51,200 steps``."""
    return f"within {run.steps:,} steps"


def now(run: Evidence, seen: Course) -> str:
    """Say where a run stands at its newest epoch, and how long it has not left a collapse."""
    name, values = {
        "cosines": ("negative cosine", run.neg_cos),
        "loss": ("loss", run.loss),
        "accuracy": ("accuracy", run.accuracy),
    }[seen.signal]
    value = values[np.isfinite(values)][-1]
    stays = f", not left {within(run)}" if seen.end == "collapsed" and seen.leaving is None else ""
    return f"{'' if seen.finished else 'not finished, '}{seen.end} in {seen.onset(seen.epoch[-1])}, {name} {value:.4g}{stays}"


def _listed(epochs: tuple[int, ...]) -> str:
    return ", ".join(str(epoch) for epoch in epochs) or "none"
