"""Questions about the rates of LARS: whether they explode, and when they peak."""

from __future__ import annotations

import numpy as np

from fastbyol.ablations.course import Course, Peak, course, rate_peak
from fastbyol.ablations.evidence import EARLY, Evidence
from fastbyol.ablations.questions import Finding, Question, Runs

# A rate explodes where its highest epoch mean is this many times the first rate recorded. The published ones rose 4.9 times
# (lr .5) to 134 times.
EXPLODES = 4.0


def rates_explode(arm: str, groups: tuple[str, ...], *, while_collapsed: bool) -> Question:
    """Ask whether the rate of every group peaks at EXPLODES times its first one, and if asked next to a collapsed epoch."""

    def ask(runs: Runs) -> Finding:
        run, seen = runs[arm], course(runs[arm])
        peaks = {group: rate_peak(run, group) for group in groups}
        if any(peak is None for peak in peaks.values()):
            return Finding(None, "no rates were recorded")
        told = "; ".join(f"{_described(run, seen, group, peak)}" for group, peak in peaks.items() if peak)
        text = f"highest rates: {told}; {_early_gradient(run, seen)}"
        held = all(peak is not None and peak.rise >= EXPLODES for peak in peaks.values())
        if held and while_collapsed:
            held = all(peak is not None and _near_collapse(seen, peak.epoch) for peak in peaks.values())
        return Finding(held if held or seen.finished else None, text)

    return ask


def _near_collapse(seen: Course, epoch: int) -> bool:
    return any(p == "collapsed" and abs(e - epoch) <= 1 for e, p in zip(seen.epoch, seen.phase, strict=True))


def peaks_before(first: str, second: str, group: str) -> Question:
    """Ask whether the rate of ``group`` is highest in an earlier step in arm ``first`` than in arm ``second``."""

    def ask(runs: Runs) -> Finding:
        places, texts = [], []
        for arm in (first, second):
            run, seen = runs[arm], course(runs[arm])
            peak = rate_peak(run, group)
            if peak is None:
                return Finding(None, f"{arm}: no rates were recorded")
            if not run.finished:
                return Finding(None, f"{arm}: not finished")
            places.append((peak.epoch + 1) * run.steps_per_epoch)
            texts.append(f"{arm}: {_described(run, seen, group, peak)}, {_early_gradient(run, seen)}")
        return Finding(places[0] < places[1], "; ".join(texts))

    return ask


def _described(run: Evidence, seen: Course, group: str, peak: Peak) -> str:
    share = run.ceiling_share(group)[run.epoch == peak.epoch]
    of_ceiling = f" ({100 * share[0]:.3g} % of the ceiling)" if np.isfinite(share).any() else ""
    return f"{group} {peak.rate:.3g}{of_ceiling} in {seen.onset(peak.epoch)}"


def _early_gradient(run: Evidence, seen: Course) -> str:
    norms = run.early_gradient_by_epoch()
    if not np.isfinite(norms).any():
        return "gradients not published" if run.scale == "published" else "gradients not recorded"
    low = int(np.nanargmin(norms))
    first = norms[np.isfinite(norms)][0]
    layers = " and ".join(name.removeprefix("encoder.") for name in EARLY)
    return f"gradient of {layers} {first:.2g} at first, lowest {norms[low]:.2g} in {seen.onset(int(run.epoch[low]))}"
