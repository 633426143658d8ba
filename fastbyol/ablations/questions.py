"""The questions that rules ask of one run, or of one run of each of several arms.

A question is a function of the evidence of these runs. It returns a ``Finding`` for one seed. Runs
are compared with themselves where that is possible: to learn is to do better than one's own
untrained weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastbyol.ablations.evidence import EARLY, PUBLISHED_STEPS_PER_EPOCH, Evidence
from fastbyol.ablations.phases import Peak, Phases, phases_of, rate_peak
from fastbyol.evaluation.intervals import difference_margin

# A collapse is disturbed where the loss climbs back to this many times its lowest so far: published
# 45 (epoch 46 to 67, cosines unmoved) and 160 (to epoch 92).
DISTURBED = 10.0
TINY = float(np.finfo(np.float32).tiny)
# A rate explodes where its highest epoch mean is this many times the first rate recorded. The
# published ones rose 4.9 times (lr .5) to 134 times.
EXPLODES = 4.0
# Levels are of STL-10 at full scale. 5 pp: reading .3, sampling 1.35, and seeds, of which only one
# was published.
LEVEL_PP = 5.0


class Finding(NamedTuple):
    """The answer for one seed, True, False or None (open).

    ``asked`` is False if the runs cannot be asked.
    """

    answer: bool | None
    text: str
    asked: bool = True


class Span(NamedTuple):
    """A stretch from the start of a run.

    It goes up to an epoch of the post's runs, or over a share of a shorter run. ``part`` is that
    share in words. ``followed`` is how many epochs the post shows of the run in question, where
    that is fewer.
    """

    epoch: int
    share: float
    part: str
    followed: int | None = None

    @property
    def words(self) -> str:
        """The end of the span at every scale."""
        steps = self.epoch * PUBLISHED_STEPS_PER_EPOCH
        return (
            f"by epoch {self.epoch} (long: within {steps:,} steps; short and mini: in the "
            f"first {self.part} of the run)"
        )

    def last_epoch(self, run: Evidence) -> float:
        """Return the last epoch of ``run``, counted from 0, that lies in the span.

        The post's runs have 320 epochs of 410 steps. At ``long`` a step goes as far as one of the
        post's. A run at ``short`` or ``mini`` is as long as the events take, so a limit is a share
        of it.
        """
        if run.scale in ("published", "full"):
            return self.epoch
        if run.scale == "long":
            return self.epoch * PUBLISHED_STEPS_PER_EPOCH / run.steps_per_epoch - 1
        return max(self.share * run.epochs - 1, 0.0)

    def is_over(self, run: Evidence) -> bool:
        """Return whether an event that ``run`` has not shown so far did not happen in this span.

        A run of its scale's own length has had its time. At ``long`` lengths differ: the run must
        have taken the post's steps.
        """
        if run.scale == "long":
            return (
                run.steps
                >= (self.followed or self.epoch) * PUBLISHED_STEPS_PER_EPOCH - run.steps_per_epoch
            )
        return run.finished or bool(run.epoch[-1] >= self.last_epoch(run))

    def holds(self, run: Evidence, epoch: int | None, then: str, otherwise: str) -> Finding:
        """Return whether ``epoch``, in which an event happened, lies in the span.

        ``epoch`` is None if the event never happened.
        """
        if epoch is None:
            return Finding(False if self.is_over(run) else None, otherwise)
        return Finding(epoch <= self.last_epoch(run), then)


AT_ONCE = Span(10, 0.25, "quarter")  # C7 is below 10 % at epoch 10; other collapses end by epoch 3
QUICKLY = Span(40, 0.5, "half")  # C10 has separated by epoch 20, C6 learns from epoch 2 to 10 on
IN_TIME = Span(100, 0.75, "three quarters")  # C9: "within 100 epochs"


def collapses_at_once(run: Evidence) -> Finding:
    """Ask whether the run is in the collapsed phase in some epoch of the span AT_ONCE."""
    phases = phases_of(run)
    return AT_ONCE.holds(
        run,
        phases.collapse,
        _collapsed(phases),
        f"not collapsed {within(run)}, {_now(run, phases)}",
    )


def never_collapses(run: Evidence) -> Finding:
    """Ask whether no epoch is in the collapsed phase."""
    phases = phases_of(run)
    if phases.collapse is not None:
        return Finding(False, _collapsed(phases))
    return Finding(
        True if run.finished else None, f"not collapsed {within(run)}, {_now(run, phases)}"
    )


def was_collapsed(run: Evidence) -> Finding:
    """Ask whether some epoch is in the collapsed phase."""
    if phases_of(run).signal == "accuracy":  # a short collapse does not show in it
        return Finding(None, "accuracy alone does not show it", asked=False)
    never = never_collapses(run)
    return Finding(None if never.answer is None else not never.answer, never.text)


def ends_collapsed(run: Evidence) -> Finding:
    """Ask whether the last epoch is in the collapsed phase."""
    phases = phases_of(run)
    return Finding(phases.end == "collapsed" if run.finished else None, _now(run, phases))


def ends_out(run: Evidence, span: Span | None = None) -> Finding:
    """Ask whether the last epoch is not in the collapsed phase.

    Where accuracy alone decides, ask whether it is useful. A collapsed run that is over before
    ``span`` leaves it open.
    """
    phases = phases_of(run)
    out = phases.end != "collapsed"
    decided = run.finished and (out or span is None or span.is_over(run))
    return Finding(out if decided else None, _now(run, phases))


def ends_separated(run: Evidence) -> Finding:
    """Ask whether the last epoch is in the separated phase."""
    phases = phases_of(run)
    return Finding(phases.end == "separated" if run.finished else None, _now(run, phases))


def never_leaves(run: Evidence) -> Finding:
    """Ask whether the run stays collapsed in every epoch after the first collapse."""
    phases = phases_of(run)
    if phases.collapse is None:
        return Finding(False if run.finished else None, "never collapsed")
    if phases.leaving is not None:
        return Finding(False, _left(phases))
    text = f"collapsed from {phases.onset(phases.collapse)} on, not left {within(run)}"
    return Finding(True if run.finished else None, text)


def leaves(run: Evidence, span: Span) -> Finding:
    """Ask whether the run leaves the collapsed phase within ``span``.

    Where accuracy alone decides, ask whether it is useful by then. A run that never collapsed has
    nothing to leave, so this does not hold.
    """
    phases = phases_of(run)
    epoch = phases.first("separated") if phases.signal == "accuracy" else phases.leaving
    never = f"never collapsed {within(run)}" if phases.collapse is None else _now(run, phases)
    return span.holds(run, epoch, _left(phases, epoch), never)


def stays_beyond(run: Evidence, span: Span) -> Finding:
    """Ask whether the run collapses and does not leave the collapsed phase within ``span``."""
    phases = phases_of(run)
    if phases.collapse is None:
        return Finding(False if run.finished else None, "never collapsed")
    if phases.leaving is not None:
        return Finding(phases.leaving > span.last_epoch(run), _left(phases))
    return Finding(True if phases.epoch[-1] >= span.last_epoch(run) else None, _now(run, phases))


def separates(run: Evidence, span: Span) -> Finding:
    """Ask whether some epoch of ``span`` that comes after a collapse is in the separated phase."""
    phases = phases_of(run)
    if phases.collapse is None:
        return span.holds(run, None, "", f"never collapsed {within(run)}")
    epoch = phases.first("separated", after=phases.collapse)
    then = "" if epoch is None else f"separated in {phases.onset(epoch)}"
    return span.holds(run, epoch, then, f"not separated {within(run)}, {_now(run, phases)}")


def comes_and_goes(run: Evidence, span: Span) -> Finding:
    """Ask whether the run separates at least twice after a collapse, with a relapse in between.

    A run that is over before ``span`` leaves it open.
    """
    phases = phases_of(run)
    separated, relapsed = (
        ", ".join(map(str, epochs)) or "none" for epochs in (phases.separations, phases.relapses)
    )
    text = f"separated in epochs {separated}, relapsed in epochs {relapsed} {within(run)}"
    start = phases.collapse
    answer = start is not None and sum(epoch > start for epoch in phases.separations) >= 2
    return Finding(answer if answer or (run.finished and span.is_over(run)) else None, text)


def disturbed(run: Evidence) -> Finding:
    """Ask whether the loss climbs after the collapse, or the phase is left.

    The loss has climbed when it is DISTURBED times its lowest.
    """
    phases = phases_of(run)
    if phases.collapse is None:
        return Finding(False if run.finished else None, "never collapsed")
    loss = run.loss[(run.epoch >= phases.collapse) & np.isfinite(run.loss)]
    # A loss can round to nothing: any climb from there counts.
    rise = float(np.max(loss / np.maximum(np.minimum.accumulate(loss), TINY))) if len(loss) else 1.0
    left = "" if phases.leaving is None else f", {_left(phases)}"
    answer = rise >= DISTURBED or phases.leaving is not None
    return Finding(
        answer if answer or run.finished else None,
        f"loss climbed to {rise:.3g} times its lowest{left}",
    )


def loss_rises_after_collapse(run: Evidence) -> Finding:
    """Ask whether the last loss is over DISTURBED times the lowest of the collapsed epochs."""
    collapse, measured = phases_of(run).collapse, bool(np.isfinite(run.loss).any())
    if collapse is None or not measured:
        return Finding(None, "no loss of a collapsed epoch", asked=measured)
    lowest, last = float(np.nanmin(run.loss[run.epoch >= collapse])), float(run.loss[-1])
    text = f"loss {lowest:.3g} at its lowest, {last:.3g} at last"
    return Finding(last > DISTURBED * lowest if run.finished else None, text)


def rates_explode(run: Evidence, groups: tuple[str, ...], *, while_collapsed: bool) -> Finding:
    """Ask whether the rate of every group peaks at EXPLODES times its first one.

    With ``while_collapsed`` every peak must lie within an epoch of a collapsed one.
    """
    phases, peaks, texts = phases_of(run), [], []
    for group in groups:
        if (peak := rate_peak(run, group)) is None:
            return Finding(None, "no rates were recorded")
        peaks.append(peak)
        texts.append(_rate(run, phases, group, peak))
    collapsed = [
        epoch
        for epoch, phase in zip(phases.epoch, phases.phase, strict=True)
        if phase == "collapsed"
    ]
    answer = all(peak.rise >= EXPLODES for peak in peaks)
    if answer and while_collapsed:
        answer = all(any(abs(epoch - peak.epoch) <= 1 for epoch in collapsed) for peak in peaks)
    text = f"highest rates: {'; '.join(texts)}; {_early_gradient(run, phases)}"
    return Finding(answer if answer or run.finished else None, text)


def peaks_before(first: Evidence, second: Evidence, group: str) -> Finding:
    """Ask whether the rate of ``group`` is highest in an earlier step in the run ``first``."""
    steps, texts = [], []
    for run in (first, second):
        phases, peak = phases_of(run), rate_peak(run, group)
        if peak is None:
            return Finding(None, f"{run.arm}: no rates were recorded")
        if not run.finished:
            return Finding(None, f"{run.arm}: not finished")
        steps.append((peak.epoch + 1) * run.steps_per_epoch)
        texts.append(
            f"{run.arm}: {_rate(run, phases, group, peak)}, {_early_gradient(run, phases)}"
        )
    return Finding(steps[0] < steps[1], "; ".join(texts))


def learns(run: Evidence) -> Finding:
    """Ask whether the last accuracy is above that of the untrained weights.

    It has to be above by more than sampling explains.
    """
    first, last = untrained_accuracy(run), run.last_accuracy
    if not math.isfinite(first + last):
        return _not_measured(run)
    answer = last - first > margin(last, run, first, run)
    return Finding(answer if run.finished else None, f"{_first(run)}, {last:.1f} % at last")


def learns_nothing(run: Evidence) -> Finding:
    """Ask whether the last accuracy is not above that of the untrained weights."""
    finding = learns(run)
    return finding if finding.answer is None else finding._replace(answer=not finding.answer)


def learns_by(run: Evidence, span: Span) -> Finding:
    """Ask whether the accuracy is above that of the untrained weights in some epoch of ``span``."""
    first = untrained_accuracy(run)
    if not math.isfinite(first + run.last_accuracy):
        return _not_measured(run)
    for epoch, value in zip(run.epoch, run.accuracy, strict=True):
        if value - first > margin(value, run, first, run):
            then = f"{_first(run)}, {value:.1f} % in {phases_of(run).onset(int(epoch))}"
            return span.holds(run, int(epoch), then, "")
    return span.holds(run, None, "", f"{_first(run)}, not above that {within(run)}")


def level(run: Evidence, published: float) -> Finding:
    """Ask whether the last accuracy is within LEVEL_PP of the published one, both in percent."""
    last = run.last_accuracy
    if run.scale not in ("published", "full") or not math.isfinite(last):
        return Finding(
            None, f"published {published:g} %: a level of STL-10 at full scale", asked=False
        )
    answer = abs(last - published) <= LEVEL_PP
    return Finding(
        answer if run.finished else None,
        f"accuracy {last:.1f} % at last, published {published:g} %",
    )


def beat_the_last(*runs: Evidence) -> Finding:
    """Ask whether every run beats the accuracy of the last of ``runs`` by the table's epoch."""
    *better, worse = runs
    accuracies = [table_accuracy(run) for run in runs]
    if (missing := _unmeasured(runs, accuracies)) is not None:
        return missing
    low = accuracies[-1]
    answer = all(
        value - low > margin(value, run, low, worse)
        for run, value in zip(better, accuracies, strict=False)
    )
    return Finding(answer, _listed(runs, accuracies))


def no_better_than_the_last(*runs: Evidence) -> Finding:
    """Ask whether no run has an accuracy above that of the last of ``runs``."""
    findings = [beat_the_last(run, runs[-1]) for run in runs[:-1]]
    text = "; ".join(finding.text for finding in findings)
    if any(finding.answer is None for finding in findings):
        return Finding(None, text)
    return Finding(not any(finding.answer for finding in findings), text)


def in_order(*runs: Evidence) -> Finding:
    """Ask whether accuracies fall from each run to the next.

    A rise that sampling explains is excepted.
    """
    accuracies = [table_accuracy(run) for run in runs]
    if (missing := _unmeasured(runs, accuracies)) is not None:
        return missing
    pairs = zip(runs, accuracies, runs[1:], accuracies[1:], strict=False)
    answer = all(
        after - before <= margin(after, later, before, run) for run, before, later, after in pairs
    )
    return Finding(answer, _listed(runs, accuracies))


def only_the_first_never_collapses(first: Evidence, *others: Evidence) -> Finding:
    """Ask whether ``first`` never collapses and all ``others`` end collapsed.

    A single answer of no decides.
    """
    findings = [never_collapses(first), *map(ends_collapsed, others)]
    answers = [finding.answer for finding in findings]
    answer = False if False in answers else None if None in answers else True
    return Finding(
        answer,
        "; ".join(finding.text for finding in findings),
        all(finding.asked for finding in findings),
    )


def untrained_accuracy(run: Evidence) -> float:
    """Return the accuracy of the untrained weights in percent, NaN if unknown.

    Of a published run it is the first of several accuracies instead.
    """
    if run.scale != "published":
        return run.untrained_accuracy
    measured = run.accuracy[np.isfinite(run.accuracy)]
    return float(measured[0]) if len(measured) > 1 else math.nan


def table_accuracy(run: Evidence) -> float:
    """Return the accuracy in percent after the tenth epoch, as the post's table has it.

    It is NaN if it is unknown. Of runs that are shorter than full length it is the accuracy at the
    end.
    """
    last = 9 if run.scale in ("published", "full") else run.epochs
    measured = run.accuracy[np.isfinite(run.accuracy) & (run.epoch <= last)]
    ready = run.finished or len(run.epoch) > last
    return float(measured[-1]) if len(measured) and ready else math.nan


def margin(a: float, run_a: Evidence, b: float, run_b: Evidence) -> float:
    """Return by how many points accuracy ``a`` may be above ``b`` by sampling alone, at 95 %."""
    return 100 * difference_margin(a / 100, run_a.scored, b / 100, run_b.scored)


def within(run: Evidence) -> str:
    """Return how far a run has gone: ``within 51,200 steps``."""
    return f"within {run.steps:,} steps"


def _now(run: Evidence, phases: Phases) -> str:
    """Describe the newest epoch of a run, and how long it has not left a collapse."""
    name, values = {
        "cosines": ("negative cosine", run.neg_cos),
        "loss": ("loss", run.loss),
        "accuracy": ("accuracy", run.accuracy),
    }[phases.signal]
    value = values[np.isfinite(values)][-1]
    stays = (
        f", not left {within(run)}" if phases.end == "collapsed" and phases.leaving is None else ""
    )
    unfinished = "" if run.finished else "not finished, "
    return (
        f"{unfinished}{phases.end} in {phases.onset(phases.epoch[-1])}, {name} {value:.4g}{stays}"
    )


def _collapsed(phases: Phases) -> str:
    return "" if phases.collapse is None else f"collapsed in {phases.onset(phases.collapse)}"


def _left(phases: Phases, epoch: int | None = None) -> str:
    epoch = phases.leaving if epoch is None else epoch
    return "" if epoch is None else f"left the collapsed state in {phases.onset(epoch)}"


def _rate(run: Evidence, phases: Phases, group: str, peak: Peak) -> str:
    share = run.ceiling_share(group)[run.epoch == peak.epoch]
    of_ceiling = f" ({100 * share[0]:.3g} % of the ceiling)" if np.isfinite(share).any() else ""
    return f"{group} {peak.rate:.3g}{of_ceiling} in {phases.onset(peak.epoch)}"


def _early_gradient(run: Evidence, phases: Phases) -> str:
    norms = run.early_gradient_by_epoch()
    if not np.isfinite(norms).any():
        return "gradients not published" if run.scale == "published" else "gradients not recorded"
    low = int(np.nanargmin(norms))
    first = norms[np.isfinite(norms)][0]
    layers = " and ".join(name.removeprefix("encoder.") for name in EARLY)
    return (
        f"gradient of {layers} {first:.2g} at first, lowest {norms[low]:.2g} in "
        f"{phases.onset(int(run.epoch[low]))}"
    )


def _first(run: Evidence) -> str:
    return (
        f"accuracy {untrained_accuracy(run):.1f} % "
        f"{'at first' if run.scale == 'published' else 'untrained'}"
    )


def _not_measured(run: Evidence) -> Finding:
    # Some of the post's figures show no accuracy and cannot be asked; a run of our own should have
    # one.
    return Finding(
        None,
        "accuracy was not measured both before training and after",
        asked=run.scale != "published",
    )


def _listed(runs: tuple[Evidence, ...], accuracies: list[float]) -> str:
    return ", ".join(
        f"{run.arm} {value:.1f} %" for run, value in zip(runs, accuracies, strict=True)
    )


def _unmeasured(runs: tuple[Evidence, ...], accuracies: list[float]) -> Finding | None:
    if np.isfinite(accuracies).all():
        return None
    return Finding(None, f"accuracy was not measured: {_listed(runs, accuracies)}")
