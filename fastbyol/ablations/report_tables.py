"""The tables of the ablations' report, as HTML: verdicts with their evidence, runs, states, configurations, environment."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from fastbyol.ablations.claims import CLAIMS, TABLE_COSINES, TABLE_ROWS, Claim
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.phases import phases_of, rate_peak
from fastbyol.ablations.questions import table_accuracy, untrained_accuracy
from fastbyol.ablations.suite import Record, Suite
from fastbyol.ablations.verdict import Statement, Verdict
from fastbyol.config import Config
from fastbyol.evaluation.intervals import accuracy_interval
from fastbyol.runs import differences

NOTHING = "-"
MARKS = {"held": "✓", "not held": "✗", "mixed": "±", "undecided": "?"}
ROLES = {"main": "decides", "other": "refines", "told": "told only"}
# What differs between the seeds of an arm, or says how and where a run was made and not what it is.
NOT_COMPARED = ("train.seed", "train.device", "data.workers", "data.cache", "data.train", "data.test")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls sideways by itself; cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def badge(outcome: str) -> str:
    """An outcome as a coloured word."""
    return f'<span class="badge {outcome.replace(" ", "-")}">{outcome}</span>'


def verdict_table(suite: Suite) -> str:
    """One row per claim: what it says, its outcome, how its deciding statements came out, and the seeds."""
    rows = []
    for claim in CLAIMS:
        verdict = suite.verdicts[claim.id]
        decided = "<br>".join(
            f"{_mark(s)} {html.escape(s.text)} <small>{html.escape(summary(s))}</small>"
            for s in verdict.statements
            if s.role == "main"
        )
        link = f'<a href="#{claim.id}">{claim.id}</a>'
        rows.append((link, html.escape(claim.says), badge(verdict.outcome), decided, suite.seeds(claim)))
    return table(("claim", "what the post says", "outcome", "statements that decide", "seeds"), rows, "verdicts")


def summary(statement: Statement) -> str:
    """The count of a statement's evidence, without the seeds' own findings: ``held for 3 of 3 seeds``."""
    return statement.evidence.partition(". seed ")[0]


def claim_section(claim: Claim, suite: Suite) -> str:
    """Everything about one claim: its statements with rules and evidence, and what the unsettled settings make of it."""
    verdict = suite.verdicts[claim.id]
    numbers = ", ".join(f"{html.escape(name)} {html.escape(json.dumps(value))}" for name, value in claim.numbers.items())
    told = f'<p class="small">Published: {numbers}.</p>' if numbers else ""
    arms = ", ".join(f"<code>{html.escape(arm)}</code>" for arm in claim.arms)
    return (
        f'<h3 id="{claim.id}">{claim.id} {badge(verdict.outcome)}</h3><p>{html.escape(claim.says)} '
        f'<span class="small">Arms: {arms}.</span></p>{told}{statement_table(verdict)}'
        f"{number_table(claim, suite) if claim.id == 'M1' else ''}{_variants(claim, suite)}"
    )


def number_table(claim: Claim, suite: Suite) -> str:
    """Set the post's table beside ours, controls too: accuracies and cosines, ours as median and range over seeds."""
    numbers, rows = claim.numbers, []
    for arm in (*claim.arms, *claim.controls):
        ours = [run for run in suite.evidence(arm) if run.finished]
        cosines = numbers[TABLE_COSINES[arm]] if arm in TABLE_COSINES else (math.nan, math.nan)
        theirs = (numbers[TABLE_ROWS[arm]] if arm in TABLE_ROWS else math.nan, *cosines)
        cells = []
        measures = ((table_accuracy, 1), (_last("pos_cos"), 4), (_last("neg_cos"), 4))
        for (read, digits), published in zip(measures, theirs, strict=True):
            cells += [_over_seeds([published], digits), _over_seeds([read(run) for run in ours], digits)]
        rows.append((f"<code>{html.escape(arm)}</code>", str(len(ours)), *cells))
    head = ("arm", "seeds", "accuracy, post", "ours", "pos. cosine, post", "ours", "neg. cosine, post", "ours")
    return f"<p>The post's table and ours, median and range over seeds:</p>{table(head, rows, 'numbers')}"


def _last(measure: str) -> Callable[[Evidence], float]:
    return lambda run: float(getattr(run, measure)[-1])


def _over_seeds(values: Sequence[float], digits: int) -> str:
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return NOTHING
    middle = f"{np.median(known):.{digits}f}"
    return middle if len(known) == 1 else f"{middle} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def statement_table(verdict: Verdict) -> str:
    """Every statement of a verdict: held or not, its role, its rule, and its evidence seed by seed."""
    rows = (
        (
            f"{_mark(statement)}&nbsp;{statement.answer}",
            f"{html.escape(statement.text)}<br><small>{html.escape(statement.rule)}</small>",
            ROLES[statement.role],
            html.escape(statement.evidence).replace("; seed ", "<br>seed ").replace(". seed ", ".<br>seed "),
        )
        for statement in verdict.statements
    )
    return table(("", "statement and rule", "role", "evidence"), rows, "statements")


def _variants(claim: Claim, suite: Suite) -> str:
    variants = suite.variants[claim.id]
    if not variants:
        return ""
    rows = []
    for what, found in {"as above": suite.verdicts[claim.id], **variants}.items():
        statements = "<br>".join(_told(s) for s in found.statements if s.role != "told")
        rows.append((f"<code>{html.escape(what)}</code>", badge(found.outcome), statements))
    return f"<p>Settings that the post leaves open, one arm each:</p>{table(('setting', 'outcome', 'statements'), rows)}"


def _told(statement: Statement) -> str:
    return f"{_mark(statement)} {html.escape(statement.text)} <small>{html.escape(summary(statement))}</small>"


def _mark(statement: Statement) -> str:
    name = statement.answer
    return f'<span class="mark {name.replace(" ", "-")}" title="{name}">{MARKS[name]}</span>'


def run_table(suite: Suite) -> str:
    """Every run in numbers: its course, its lowest and last loss, the rate's peak and the early gradient's low."""
    head = (
        "arm", "seed", "epochs", "end", "collapsed in", "left in", "separated in", "loss, lowest", "loss, last",
        "neg. cosine, last", "accuracy, untrained", "best", "at last", "layer1 rate, peak", "of ceiling",
        "early gradient, lowest",
    )  # fmt: skip
    rows = []
    for arm, runs in suite.runs.items():
        rows += [(f"<code>{html.escape(arm)}</code>", *_run_cells(run.evidence)) for run in runs]
    return table(head, rows, "numbers")


def _run_cells(run: Evidence) -> tuple[str, ...]:
    seen = phases_of(run)
    peak, norms = rate_peak(run, "encoder.layer1"), run.early_gradient_by_epoch()
    share = run.ceiling_share("encoder.layer1")[run.epoch == peak.epoch] if peak else np.empty(0)
    low = int(np.nanargmin(norms)) if np.isfinite(norms).any() else None
    scored = accuracies(run)
    return (
        str(run.seed),
        f"{len(run.epoch)}" if run.finished else f"{len(run.epoch)} of {run.epochs}",
        seen.end,
        _epoch(seen.collapse),
        _epoch(seen.leaving),
        ", ".join(map(str, seen.separations)) or NOTHING,
        _number(np.nanmin(run.loss)),
        _number(run.loss[-1]),
        f"{run.neg_cos[-1]:.4f}",
        *(_accuracy(scored[name]) for name in ("untrained", "best", "last")),
        f"{peak.rate:.3g} ({peak.rise:.3g} times the first) in {peak.epoch}" if peak else NOTHING,
        _number(100 * share[0], " %") if len(share) else NOTHING,
        f"{norms[low]:.2g} in {int(run.epoch[low])}" if low is not None else NOTHING,
    )


def accuracies(run: Evidence) -> dict[str, dict[str, float] | None]:
    """Return a run's accuracies, of the untrained weights, the best and the last: percent, interval, epoch; None if unknown."""
    best = None
    if np.isfinite(run.accuracy).any():
        top = int(np.nanargmax(run.accuracy))
        best = (_with_interval(run.accuracy[top], run) or {}) | {"epoch": int(run.epoch[top])}
    return {
        "untrained": _with_interval(untrained_accuracy(run), run),
        "best": best,
        "last": _with_interval(run.last_accuracy, run),
    }


def _with_interval(accuracy: float, run: Evidence) -> dict[str, float] | None:
    if not np.isfinite(accuracy):
        return None
    low, high = accuracy_interval(float(accuracy), run.scored)
    return {"accuracy": round(float(accuracy), 3), "low": round(low, 2), "high": round(high, 2)}


def _accuracy(found: Mapping[str, float] | None) -> str:
    if found is None:
        return NOTHING
    at = f" in {found['epoch']}" if "epoch" in found else ""
    return f"{found['accuracy']:.1f} ({found['low']:.1f} to {found['high']:.1f}){at}"


def _epoch(epoch: int | None) -> str:
    return NOTHING if epoch is None else str(epoch)


def _number(value: float, unit: str = "") -> str:
    return f"{value:.3g}{unit}" if np.isfinite(value) else NOTHING


def timeline(suite: Suite) -> str:
    """The state at every epoch's end as a bar per run, over the run's own length."""
    bars = []
    for arm, runs in suite.runs.items():
        for run in runs:
            states = [event["state"] for event in run.events if event["event"] == "epoch"]
            boxes = "".join(_box(*stretch) for stretch in _stretches(states))
            label = f"<code>{html.escape(arm)}</code> seed {run.evidence.seed}"
            bars.append(
                f'<div class="run"><span>{label}</span><svg class="bar" preserveAspectRatio="none" '
                f'viewBox="0 0 {run.evidence.epochs} 1" role="img" aria-label="{_in_words(states)}">{boxes}</svg>'
                f"<span>{states[-1]}</span></div>"
            )
    return f'<div class="timeline">{"".join(bars)}</div>'


def _box(first: int, count: int, state: str) -> str:
    title = f"<title>{state} from epoch {first} to {first + count - 1}</title>"
    return f'<rect x="{first}" width="{count}" height="1" class="{state}">{title}</rect>'


def _stretches(states: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first epoch, number of epochs, state) of stretches in one state."""
    found: list[tuple[int, int, str]] = []
    for epoch, state in enumerate(states):
        if found and found[-1][2] == state:
            found[-1] = (found[-1][0], found[-1][1] + 1, state)
        else:
            found.append((epoch, 1, state))
    return found


def _in_words(states: Sequence[str]) -> str:
    return ", ".join(f"{state} from epoch {first}" for first, _, state in _stretches(states))


def event_table(suite: Suite) -> str:
    """Every change of state that a run recorded, with the signals that brought it."""
    signals = ("neg_cos", "pos_cos", "std_z", "rank_y", "dead_y", "grad_norm")
    rows = []
    for arm, runs in suite.runs.items():
        for run in runs:
            for event in (row for row in run.events if row["event"] == "state"):
                told = [event.get(name) for name in signals]
                change = f"{event['before']} → {event['after']}"
                cells = (NOTHING if value is None else f"{value:.4g}" for value in told)
                rows.append((f"<code>{html.escape(arm)}</code>", str(run.evidence.seed), str(event["step"]), change, *cells))
    return table(("arm", "seed", "step", "change", *signals), rows, "numbers")


def configuration_table(suite: Suite) -> str:
    """Each arm against the preset it was made from: first what all arms share, then what each has of its own."""
    found = {arm: _against_preset(runs[0].config) for arm, runs in suite.runs.items()}
    shared = set.intersection(*(set(rows) for rows in found.values()))
    presets = sorted({runs[0].config.preset for runs in suite.runs.values()})
    rows = [("all arms", *_cells(row)) for row in sorted(shared)]
    for arm, differs in found.items():
        own = [row for row in differs if row not in shared] or [("as all arms", "", "")]
        rows += [(f"<code>{html.escape(arm)}</code>" if index == 0 else "", *_cells(row)) for index, row in enumerate(own)]
    return table(("arm", "key", f"preset {', '.join(presets)}", "the arm"), rows, "numbers")


def _cells(row: Sequence[str]) -> tuple[str, ...]:
    return (f"<code>{html.escape(row[0])}</code>", html.escape(row[1]), html.escape(row[2]))


@cache
def _against_preset(config: Config) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (row.key, differences.text(row.a), _within(row.b) if row.key == "optim.replay_rates" else differences.text(row.b))
        for row in differences.against_preset(config)
        if row.key not in NOT_COMPARED
    )


def _within(run: object) -> str:
    """The arm and seed of a run, wherever the folder of runs lies."""
    return "/".join(Path(str(run)).parts[-2:])


def environment_table(runs: Iterable[Record]) -> str:
    """Versions and machine of all runs, a line for each value that occurs."""
    found: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, value in run.env.items():
            if name not in ("config", "command", "started"):
                told = found.setdefault(name, {})
                text = _plain(value)
                told[text] = told.get(text, 0) + 1
    rows = [
        (html.escape(name), "<br>".join(html.escape(t) + (f" ({n} runs)" if len(told) > 1 else "") for t, n in told.items()))
        for name, told in found.items()
    ]
    return table(("", "value"), rows)


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
