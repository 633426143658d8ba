"""The report of the ablations: one HTML file, pictures for the README, and the verdicts as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastbyol.ablations import report_figures, report_tables
from fastbyol.ablations.arms import arms
from fastbyol.ablations.claims import CLAIMS, CONTROLS, Claim
from fastbyol.ablations.curves import appendix
from fastbyol.ablations.report_figures import Panel
from fastbyol.ablations.suite import Suite
from fastbyol.errors import UsageError
from fastbyol.runs.durable import write_text, writing
from fastbyol.show import figures

TITLES = {
    "accuracy_bn_encoder": "Accuracy, BatchNorm encoder",
    "accuracy_gn_encoder": "Accuracy, group norm encoder",
    "weight_decay_cosine": "Weight decay: representation distance",
    "weight_decay_loss": "Weight decay: loss",
    "weight_std_cosine": "Weight standardization: representation distance",
    "weight_std_loss": "Weight standardization: loss",
    "lars_layer12_rate": "LARS on layer1 and layer2: rates",
    "lars_layer12_loss": "LARS on layer1 and layer2: loss",
    "lars_layer12_cosine": "LARS on layer1 and layer2: representation distance",
    "lars_mlp_rate": "LARS on the MLPs: rates",
    "lars_mlp_loss": "LARS on the MLPs: loss",
    "lars_mlp_cosine": "LARS on the MLPs: representation distance",
    "lars_timing_rate": "LARS timing: rate of layer1",
    "lars_timing_loss": "LARS timing: loss",
}
NAMES = ("blue", "red", "green", "purple")  # of report_figures.COLOURS
# The README's picture shows arms that collapse, that leave a collapse, and that never do.
README_ARMS = (
    "bn-sgd-mlp-bn",
    "gn-sgd-mlp-bn",
    "gn-sgd-mlp-none",
    "gn-lars-0.1",
    "gn-lars-0.2",
    "gn-lars-0.5",
)
VERDICTS = "verdicts.json"


def write_report(suite: Suite, html: Path) -> None:
    """Write the report of ``suite`` into the file ``html``.

    Raises UsageError: matplotlib is missing, no run has finished an epoch, or the file cannot be
    written.
    """
    _demand(suite)
    text = page(suite)
    with writing(html):
        write_text(html, text)


def write_pictures(suite: Suite, folder: Path) -> list[Path]:
    """Write the README's pictures and the verdicts as JSON into ``folder``. Return the paths.

    The picture of long runs shows their recoveries over steps.
    Raises UsageError as ``write_report`` does.
    """
    _demand(suite)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if suite.scale == "long":
            pictures = {"recoveries.png": report_figures.draw_recoveries(suite)}
        else:
            pictures = {
                "timing.png": report_figures.draw_readme_timing(suite),
                "cosines.png": report_figures.draw_readme_cosines(suite, README_ARMS),
            }
        for name, picture in pictures.items():
            picture.savefig(folder / name, dpi=110)
        text = json.dumps(verdicts(suite), indent=1, ensure_ascii=False)
        write_text(folder / VERDICTS, f"{text}\n")
    return [folder / name for name in (*pictures, VERDICTS)]


def _demand(suite: Suite) -> None:
    figures.demand()
    if not suite.runs:
        why = f": {suite.left_out[0]}" if suite.left_out else ""
        raise UsageError(f"{suite.out}: no run with a finished epoch{why}")


def verdicts(suite: Suite) -> dict[str, Any]:
    """Return the suite, its verdicts with their statements, and accuracies, as plain values."""

    def row(claim: Claim) -> dict[str, Any]:
        verdict, variants = suite.verdicts[claim.id], suite.variants[claim.id]
        return {
            "id": claim.id,
            "says": claim.says,
            "seeds": suite.seeds(claim),
            "outcome": verdict.outcome,
            "statements": [statement._asdict() for statement in verdict.statements],
            "unsettled": {what: other.outcome for what, other in variants.items()},
        }

    return {
        "scale": suite.scale,
        "data": list(suite.data),
        "commands": list(suite.commands),
        "runs": len(suite.records),
        "account": asdict(suite.account),
        "claims": list(map(row, CLAIMS)),
        "accuracies": [
            {"arm": run.arm, "seed": run.seed, "num_scored": run.scored}
            | report_tables.accuracies(run)
            for run in (record.evidence for record in suite.records)
        ],
    }


def page(suite: Suite) -> str:
    """Return the report as HTML."""
    with figures.settings():
        return figures.page(
            "report.html.j2",
            "fastbyol.ablations",
            title=f"The appendix, {suite.scale} scale",
            scale=suite.scale,
            data=suite.data,
            commands=suite.commands,
            source=appendix()["source"],
            num_runs=len(suite.records),
            num_arms=len(suite.runs),
            num_seeds=len({run.evidence.seed for run in suite.records}),
            unfinished=sum(not run.evidence.finished for run in suite.records),
            outcomes=sorted(suite.verdicts[claim.id].outcome for claim in CLAIMS),
            account=suite.account,
            lost=_lost(suite),
            claims=[_claim(claim, suite) for claim in CLAIMS],
            panels=[_panel(panel, suite) for panel in report_figures.panels()],
            runs=report_tables.run_rows(suite),
            timeline=report_tables.timeline(suite),
            signals=report_tables.SIGNALS,
            events=report_tables.event_rows(suite),
            rates=_rates(suite),
            cards=_cards(suite),
            configurations=report_tables.configurations(suite),
            environment=report_tables.environment(suite),
        )


def _lost(suite: Suite) -> list[str]:
    """Return a line for each run that was asked for and did not end well, or cannot be read."""
    account = suite.account
    return [
        *(f"{name} failed: {why}" for name, why in account.failed.items()),
        *(f"{name} was stopped" for name in account.stopped),
        *(f"{name} is left: not begun, or not ended" for name in account.left),
        *account.odd,
        *(f"left out: {line}" for line in suite.left_out),
    ]


def _claim(claim: Claim, suite: Suite) -> dict[str, Any]:
    verdict, variants = suite.verdicts[claim.id], suite.variants[claim.id]
    return {
        "id": claim.id,
        "says": claim.says,
        "arms": claim.arms,
        "seeds": suite.seeds(claim),
        "verdict": verdict,
        "variants": {"as above": verdict, **variants} if variants else {},
        "published": [f"{name} {json.dumps(value)}" for name, value in claim.numbers.items()],
        "numbers": report_tables.number_rows(claim, suite) if claim.id == "M1" else [],
    }


def _panel(panel: Panel, suite: Suite) -> dict[str, Any]:
    return {
        "figure": panel.figure,
        "title": TITLES[panel.figure],
        "claims": panel.claim.split(", "),
        "svg": figures.svg(report_figures.draw_panel(panel, suite)),
        "legend": [
            (colour, source.series, source.arm, len(suite.evidence(source.arm)))
            for source, colour in zip(panel.sources, NAMES, strict=False)
        ],
        "ceilings": [f"{value:.4g}" for value in report_figures.ceilings(panel, suite)],
    }


def _rates(suite: Suite) -> Iterator[tuple[Any, ...]]:
    """Yield arm, seed, upper bound and picture of the rates of each LARS arm's first run."""
    for arm, (run, *_) in suite.runs.items():
        if run.config.optim.name == "lars":
            picture = figures.svg(report_figures.draw_rates(run))
            yield arm, run.evidence.seed, run.evidence.rate_ceiling, picture


def _cards(suite: Suite) -> dict[str, list[tuple[Any, ...]]]:
    """Return by heading the name, description, seeds and picture of each arm."""
    controls = {arm for names in CONTROLS.values() for arm in names} - {
        arm for claim in CLAIMS for arm in claim.arms
    }
    cards: dict[str, list[tuple[Any, ...]]] = {
        "Arms of the claims": [],
        "Control arms: what the post argues for and could not run": [],
        "Settings that the post leaves open": [],
    }
    of_claims, of_controls, of_settings = cards.values()
    for arm in suite.runs:
        about = arms()[arm].about if arm in arms() else ""
        seeds = [run.seed for run in suite.evidence(arm)]
        cards_of_kind = of_controls if arm in controls else of_settings if "@" in arm else of_claims
        cards_of_kind.append((arm, about, seeds, figures.svg(report_figures.draw_arm(arm, suite))))
    return cards
