"""The ablations as one self-contained HTML file: verdicts with evidence, the post's figures under ours, how it was done."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastbyol.ablations import report_figures, report_tables
from fastbyol.ablations.arms import arms
from fastbyol.ablations.claims import CLAIMS, CONTROLS
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
# The arms of the README's picture: what collapses, what leaves, what never does.
README_ARMS = ("bn-sgd-mlp-bn", "gn-sgd-mlp-bn", "gn-sgd-mlp-none", "gn-lars-0.1", "gn-lars-0.2", "gn-lars-0.5")
VERDICTS = "verdicts.json"
# Said with every suite, since a reader of one folder cannot see the others.
HONESTY = (
    "Several data sets were tried before the suite's own was chosen, and C6 came out on one of them, Fashion-MNIST. The "
    "textures, on which no recovery showed, stay beside it as the counter-example. The suite's settings were fixed before its "
    "seeds were run."
)

STYLE = figures.STYLE + (files("fastbyol.ablations") / "report.css").read_text("utf-8")


def write_report(suite: Suite, html: Path) -> None:
    """Write the report of ``suite`` into the file ``html``.

    Raises UsageError: matplotlib is missing, there is no run with a finished epoch, the file cannot be written.
    """
    _demand(suite)
    text = page(suite)
    with writing(html):
        write_text(html, text)


def write_pictures(suite: Suite, folder: Path) -> list[Path]:
    """Write what the README shows into ``folder`` and return the paths: PNG files and the verdicts as JSON.

    Of long runs the picture is of their recoveries over steps. Raises UsageError as ``write_report`` does.
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
        write_text(folder / VERDICTS, json.dumps(verdicts(suite), indent=1, ensure_ascii=False) + "\n")
    return [folder / name for name in (*pictures, VERDICTS)]


def _demand(suite: Suite) -> None:
    figures.demand()
    if not suite.runs:
        why = f": {suite.left_out[0]}" if suite.left_out else ""
        raise UsageError(f"{suite.out}: no run with a finished epoch{why}")


def verdicts(suite: Suite) -> dict[str, Any]:
    """Return scale, data, commands, the account of runs, every verdict with its statements, and accuracies, as plain values."""
    rows = [
        {
            "id": claim.id,
            "says": claim.says,
            "seeds": suite.seeds(claim),
            "outcome": suite.verdicts[claim.id].outcome,
            "statements": [s._asdict() for s in suite.verdicts[claim.id].statements],
            "unsettled": {what: verdict.outcome for what, verdict in suite.variants[claim.id].items()},
        }
        for claim in CLAIMS
    ]
    return {
        "scale": suite.scale,
        "data": list(suite.data),
        "commands": list(suite.commands),
        "runs": sum(map(len, suite.runs.values())),
        "account": asdict(suite.account),
        "claims": rows,
        "accuracies": [
            {"arm": run.arm, "seed": run.seed, "num_scored": run.scored, **report_tables.accuracies(run)}
            for arm in suite.runs
            for run in suite.evidence(arm)
        ],
    }


def page(suite: Suite) -> str:
    """The HTML text: no script, no network."""
    with figures.settings():
        return figures.page(f"The appendix, {suite.scale} scale", STYLE, "".join(_sections(suite)))


def _sections(suite: Suite) -> Iterator[str]:
    yield _head(suite)
    yield f"<h2>Verdicts</h2>{report_tables.verdict_table(suite)}"
    yield f'<h2>The post\'s figures</h2>{_how_to_read(suite)}<div class="grid">'
    yield from (_panel(panel, suite) for panel in report_figures.panels())
    yield "</div><h2>Evidence, claim by claim</h2>"
    yield from (report_tables.claim_section(claim, suite) for claim in CLAIMS)
    yield f"<h2>Runs in numbers</h2>{_run_note()}{report_tables.run_table(suite)}"
    yield f"<h2>States</h2>{_states_key()}{report_tables.timeline(suite)}"
    yield "<details><summary>Every change of state, with the signals that brought it</summary>"
    yield f"{report_tables.event_table(suite)}</details>"
    yield from _rates(suite)
    yield from _arms(suite)
    yield "<h2>Configurations</h2><p>What each arm says otherwise than its preset, seeds and devices aside.</p>"
    yield report_tables.configuration_table(suite)
    yield f"<h2>Environment</h2>{report_tables.environment_table(run for runs in suite.runs.values() for run in runs)}"
    yield f"<h2>To make it again</h2><pre>{html.escape(chr(10).join(suite.commands))}</pre>"


def _head(suite: Suite) -> str:
    num_runs, seeds = sum(map(len, suite.runs.values())), {run.evidence.seed for runs in suite.runs.values() for run in runs}
    unfinished = sum(not run.evidence.finished for runs in suite.runs.values() for run in runs)
    outcomes = [suite.verdicts[claim.id].outcome for claim in CLAIMS]
    counts = " ".join(f"{report_tables.badge(o)} {outcomes.count(o)}" for o in dict.fromkeys(sorted(outcomes)))
    notes = f" {unfinished} of them are not finished: they are drawn, and not judged." if unfinished else ""
    source = html.escape(appendix()["source"])
    return (
        f"<h1>The appendix, reproduced at {suite.scale} scale</h1><p>{num_runs} runs of {len(suite.runs)} arms, "
        f"up to {len(seeds)} seed{'s' * (len(seeds) != 1)}, trained on {html.escape(' and '.join(suite.data))}.{notes} "
        f"Source of the claims and curves: {source}.</p><p>{HONESTY}</p><p>{counts}</p>{_account(suite)}"
    )


def _account(suite: Suite) -> str:
    """Count every run that was ever asked for, and name those that did not end well."""
    found = suite.account
    lines = [f"{name} failed: {why}" for name, why in found.failed.items()]
    lines += [f"{name} was stopped" for name in found.stopped]
    lines += [f"{name} is left: not begun, or not ended" for name in found.left]
    lines += [*found.odd, *(f"left out: {line}" for line in suite.left_out)]
    rows = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return (
        f"<p>Of {len(found.asked)} runs asked for {len(found.done)} are done, {len(found.failed)} failed, "
        f"{len(found.stopped)} were stopped, {len(found.left)} are left.</p>" + (f"<ul>{rows}</ul>" if rows else "")
    )


def _how_to_read(suite: Suite) -> str:
    axis = (
        "Epochs are the same on both sides."
        if suite.scale == "full"
        else "Our runs are shorter than the post's 320 epochs of 410 steps: the lower axis counts our epochs over a whole run, "
        "the upper one the published figure's, both stretched to the same width. Shapes and orders compare, epochs do not."
    )
    return (
        "<p>Ours: a solid line, the median over seeds, with a band from the least to the most. Published: dashed, single runs. "
        f"{axis} Epochs count from 0.</p>"
    )


def _panel(panel: Panel, suite: Suite) -> str:
    keys = []
    for source, colour in zip(panel.sources, NAMES, strict=False):
        runs = suite.evidence(source.arm)
        ours = f"{len(runs)} seed{'s' * (len(runs) != 1)}" if runs else "not run"
        dashed = _line(colour, "stroke-dasharray='6 3'")
        solid = _line(colour, "") if runs else ""
        series = html.escape(source.series)
        keys.append(
            f'<span data-series="{series}"><span>{dashed}{series}, published</span> '
            f"<span>{solid}<code>{html.escape(source.arm)}</code>, {ours}</span></span>"
        )
    bound = ", ".join(f"{value:.4g}" for value in report_figures.ceilings(panel, suite))
    note = f'<span class="note">Ceiling lr·eta/wd of ours: {bound}.</span>' if bound else ""
    links = ", ".join(f'<a href="#{claim}">{claim}</a>' for claim in panel.claim.split(", "))
    return (
        f'<figure data-figure="{panel.figure}">{figures.svg(report_figures.draw_panel(panel, suite))}<figcaption><b>'
        f'{TITLES[panel.figure]} ({links})</b><p class="key">{"".join(keys)}</p>{note}</figcaption></figure>'
    )


def _line(colour: str, dash: str) -> str:
    path = f"<path d='M0 5H30' stroke='var(--{colour})' stroke-width='3' {dash}/>"
    return f"<svg viewBox='0 0 30 10' aria-hidden='true'>{path}</svg>"


def _run_note() -> str:
    return (
        "<p class='small'>Epochs count from 0. Accuracies are in percent, with their 95 % intervals by the number of images "
        "scored; those of the untrained weights were measured before the first step. The early gradient is that of conv1 and "
        "layer1, the mean over an epoch; a rate's peak is its highest epoch mean, with how many times the first rate recorded "
        "that is.</p>"
    )


def _states_key() -> str:
    states = {"healthy": "green", "collapsing": "orange", "collapsed": "red", "recovering": "sky", "dead": "ink"}
    tags = "".join(f"<span><i class='tag' style='background:var(--{c})'></i>{state}</span>" for state, c in states.items())
    return f"<p>The state at each epoch's end, left to right over the length of the run.</p><p class='key'>{tags}</p>"


def _rates(suite: Suite) -> Iterator[str]:
    shown = {arm: runs[0] for arm, runs in suite.runs.items() if runs[0].config.optim.name == "lars"}
    if not shown:
        return
    yield (
        "<h2>LARS's rates, layer by step</h2><p>The first seed of each arm with LARS. The red line on the colour bar is the "
        "ceiling lr·eta/wd: |w| / (|g| + wd |w|) cannot exceed 1/wd, whatever the gradient. Layers that do not adapt "
        "keep the learning rate.</p><div class='grid maps'>"
    )
    for arm, run in shown.items():
        ceiling = run.evidence.rate_ceiling
        bound = f"ceiling lr·eta/wd = {ceiling:.4g}" if ceiling is not None else "no ceiling"
        yield (
            f'<figure class="map"><figcaption><b><code>{html.escape(arm)}</code> seed {run.evidence.seed}: {bound}</b>'
            f'</figcaption><div class="wide">{figures.svg(report_figures.draw_rates(run))}</div></figure>'
        )
    yield "</div>"


def _arms(suite: Suite) -> Iterator[str]:
    """A card per arm, those of the claims first, then controls, then settings that the post leaves open."""
    controls = {arm for names in CONTROLS.values() for arm in names} - {arm for claim in CLAIMS for arm in claim.arms}
    kinds = {
        "Arms of the claims": [arm for arm in suite.runs if "@" not in arm and arm not in controls],
        "Control arms: what the post argues for and could not run": [arm for arm in suite.runs if arm in controls],
        "Settings that the post leaves open": [arm for arm in suite.runs if "@" in arm and arm not in controls],
    }
    for title, names in kinds.items():
        if names:
            yield f'<h2>{title}</h2><div class="grid">'
            yield from (_arm(arm, suite) for arm in names)
            yield "</div>"


def _arm(arm: str, suite: Suite) -> str:
    runs, known = suite.evidence(arm), arms().get(arm)
    about = html.escape(f"{known.about}. ") if known else ""
    seeds = ", ".join(str(run.seed) for run in runs)
    picture = figures.svg(report_figures.draw_arm(arm, suite))
    return (
        f'<figure data-arm="{html.escape(arm)}">{picture}<figcaption><b><code>{html.escape(arm)}</code></b>'
        f"{about}Seed{'s' * (len(runs) != 1)} {seeds}; a line per seed; negative pairs red, positive green"
        "</figcaption></figure>"
    )
