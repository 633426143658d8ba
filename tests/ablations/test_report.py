"""The ablations' report of small runs is complete and self-contained, and has the right numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from fastbyol import api, config_io
from fastbyol.ablations import report, report_figures, report_tables
from fastbyol.ablations.claims import CLAIMS
from fastbyol.ablations.curves import published
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.suite import Record, Suite, account
from fastbyol.ablations.verdict import judge
from fastbyol.cli import ablate
from fastbyol.errors import UsageError
from fastbyol.fleet import ledger
from fastbyol.runs.layers import read_layers
from made_up import COLLAPSED, HEALTHY, RECOVERED_LATE, made_up

SMALL = ["model.width=4", "model.norm=gn", "model.projector.norm=none", "model.predictor.norm=none"]
SMALL += [
    "model.projector.hidden=16",
    "model.projector.out=8",
    "model.predictor.hidden=16",
    "model.predictor.out=8",
]
SMALL += ["data.train=textures", "views.size=16"]
SMALL += [
    "data.textures_count=64",
    "data.textures_test_count=64",
    "data.workers=1",
    "train.device=cpu",
]
SMALL += [
    "train.batch_size=32",
    "train.epochs=2",
    "schedule.horizon_epochs=2",
    "probe.every_epochs=0",
]
RUNS = {
    ("gn-sgd-mlp-none", 0): ["optim.name=sgd"],
    ("gn-sgd-mlp-none", 1): ["optim.name=sgd"],
    ("gn-sgd-mlp-none@lr0.2", 0): ["optim.name=sgd", "optim.lr=0.2"],
    ("gn-lars-0.5", 0): ["optim.name=lars", "optim.lr=0.5"],
    ("gn-lars-0.1", 0): ["optim.name=lars", "optim.lr=0.1"],
}
LEDGER = {
    "gn-sgd-mlp-none/seed0": {"arm": "gn-sgd-mlp-none", "seed": 0, "status": "done"},
    "gn-sgd-mlp-none/seed1": {"arm": "gn-sgd-mlp-none", "seed": 1, "status": "done"},
    "gn-sgd-mlp-none@lr0.2/seed0": {"arm": "gn-sgd-mlp-none@lr0.2", "seed": 0, "status": "done"},
    "gn-lars-0.5/seed0": {"arm": "gn-lars-0.5", "seed": 0, "status": "done"},
    "gn-lars-0.5/seed1": {
        "arm": "gn-lars-0.5",
        "seed": 1,
        "status": "failed",
        "error": "no <room> left",
    },
    "gn-lars-0.5/seed2": {"arm": "gn-lars-0.5", "seed": 2, "status": "done"},
    "gn-lars-0.5/seed3": {"arm": "gn-lars-0.5", "seed": 3, "status": "stopped"},
}
ASKED = [
    "gn-sgd-mlp-none seed 0",
    "gn-sgd-mlp-none seed 1",
    "gn-lars-0.5 seed 0",
    "gn-lars-0.5 seed 4",
]
SCORED = {"untrained": 200, "best": 300, "last": 250}
COMMAND = ["/somewhere/fastbyol", "ablate", "run", "C5", "C12", "--out", "a folder"]


class Page(HTMLParser):
    """A parsed page: elements, text, series by figure, and the cells of table rows by heading."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[str, list[str]] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if name := attributes.get("data-figure"):
            self.figures[name] = []
        if name := attributes.get("data-series"):
            list(self.figures.values())[-1].append(name)
        if tag == "tr":
            list(self.rows.values())[-1].append([])
        if tag == "td":
            list(self.rows.values())[-1][-1].append("")
        self.handle_data("; " if tag == "br" else "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        data = re.sub(r"[ \n]+", " ", data)
        self.text += data
        if "td" in self.open:
            list(self.rows.values())[-1][-1][-1] += data
        elif self.open and self.open[-1] in ("h2", "h3"):
            self.rows[data.strip()] = []


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "out"
    for (arm, seed), sets in RUNS.items():
        config = config_io.load(preset="demo", sets=[*SMALL, *sets, f"train.seed={seed}"]).config
        api.train(config, folder / "runs" / arm / f"seed{seed}")
    calls = [{"command": COMMAND, "runs": ASKED}]
    (folder / "ledger.json").write_text(
        json.dumps({"scale": "mini", "calls": calls, "runs": LEDGER})
    )
    return folder


@pytest.fixture(scope="module")
def text(out: Path) -> str:
    report.write_report(Suite.read(out), out / "report.html")
    return (out / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def suite(out: Path) -> Suite:
    return Suite.read(out)


def test_every_figure_and_series_is_there(page: Page) -> None:
    expected: dict[str, list[str]] = {}
    for figure, series in published():
        expected.setdefault(figure, []).append(series)
    assert {name: sorted(series) for name, series in page.figures.items()} == {
        n: sorted(s) for n, s in expected.items()
    }
    assert sum(map(len, page.figures.values())) == 29


def test_nothing_is_fetched_and_nothing_runs(text: str, page: Page) -> None:
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "img",
    }
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,"))
    # XML namespaces have names that look like addresses.
    rest = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"http|@import|url\((?!#)", rest)
    assert len(text) < 5 * 2**20


def test_inner_links_and_references_have_their_targets(text: str, page: Page) -> None:
    attributes = [pair for _, attributes in page.elements for pair in attributes.items()]
    ids = {value for name, value in attributes if name == "id"}
    wanted = {
        value[1:]
        for name, value in attributes
        if name.endswith("href") and value and value[0] == "#"
    }
    assert (
        wanted | set(re.findall(r"url\(#([^)]+)\)", text)) | {claim.id for claim in CLAIMS} <= ids
    )


def test_verdicts_are_judges_own(page: Page, out: Path) -> None:
    """Judge the run folders anew: outcome, statements and their evidence stand in the page."""
    runs: dict[str, list[Evidence]] = {}
    for arm, seed in RUNS:
        runs.setdefault(arm, []).append(
            Record.read(
                out / "runs" / arm / f"seed{seed}", arm=arm, seed=seed, scale="mini"
            ).evidence
        )
    summaries = {row[0]: row[1:] for row in page.rows["Verdicts"] if row}
    for claim in CLAIMS:
        verdict = judge(claim, runs, "mini")
        assert summaries[claim.id][:2] == [claim.says, verdict.outcome]
        rows = page.rows[claim.id][1 : len(verdict.statements) + 1]
        for (answer, words, _, evidence), statement in zip(rows, verdict.statements, strict=True):
            assert answer.endswith(f"\N{NO-BREAK SPACE}{statement.answer}")
            assert words == f"{statement.text}; {statement.rule}"
            assert evidence.replace(".; seed", ". seed") == statement.evidence


def test_settings_configurations_command_and_ceilings(page: Page) -> None:
    assert "lr0.2" in [row[0] for row in page.rows["C5"] if row]
    assert ("figure", {"data-arm": "gn-sgd-mlp-none@lr0.2"}) in page.elements
    configurations = page.rows["Configurations"]
    assert ["all arms", "model.norm", '"bn"', '"gn"'] in configurations
    assert ["gn-lars-0.5", "optim.name", '"sgd"', '"lars"'] in configurations
    assert "train.seed" not in [row[1] for row in configurations if row]
    assert "fastbyol ablate run C5 C12 --out 'a folder'" in page.text
    assert "Ceiling lr·eta/wd of ours: 66.67, 333.3." in page.text  # .1 and .5 times 1e-3 / 1.5e-6


def test_bands_are_least_median_and_most_of_the_seeds() -> None:
    """Seeds of different lengths count as far as they go."""
    runs = [
        made_up("arm", {0: value, 23: value}, seed=seed)
        for seed, value in enumerate((0.2, 0.5, 0.6))
    ]
    epochs, rows = report_figures.band([*runs, made_up("arm", {0: 0.9}, seed=3, done=4)], "neg_cos")
    assert list(epochs) == list(range(24))
    assert np.allclose(rows[:, 10], [0.2, 0.5, 0.6])
    assert np.allclose(rows[:, 2], [0.2, 0.55, 0.9])
    epochs, rows = report_figures.band([made_up("arm", COLLAPSED, done=3)], "loss")
    assert (list(epochs), rows.shape) == ([0, 1, 2], (3, 3))
    epochs, rows = report_figures.band([made_up("arm", COLLAPSED)], "accuracy")
    assert (list(epochs), rows.shape) == ([], (3, 0))  # it was not measured


def test_axes_and_units_are_the_posts(suite: Suite) -> None:
    panels = {panel.figure: panel for panel in report_figures.panels()}
    assert len(panels) == 14
    for name, panel in panels.items():
        axes = report_figures.draw_panel(panel, suite).axes[0]
        kind = name.split("_")[0] if name.startswith("accuracy") else name.split("_")[-1]
        assert axes.get_yscale() == ("log" if kind == "loss" else "linear")
        if kind == "accuracy":
            assert axes.get_ylim() == (0, 100)
        if kind == "cosine":
            assert axes.get_ylim()[0] <= 0 < 1 < axes.get_ylim()[1] < 1.05
        if kind == "rate":
            assert axes.get_ylim()[0] == 0


def test_published_and_own_curves_are_drawn_as_they_are(suite: Suite) -> None:
    panel = next(panel for panel in report_figures.panels() if panel.figure == "lars_timing_loss")
    ours, theirs = report_figures.draw_panel(panel, suite).axes
    for source, line, own in zip(panel.sources, theirs.lines, ours.lines, strict=True):
        curve = published()[source.figure, source.series]
        assert np.array_equal(line.get_xydata(), np.column_stack((curve.epoch, curve.value)))
        (run,) = suite.evidence(source.arm)
        assert np.array_equal(own.get_xydata(), np.column_stack((run.epoch, run.loss)))


def test_the_map_of_rates_holds_the_recorded_ones(out: Path, suite: Suite) -> None:
    names, edges, table = report_figures.rate_map(suite.runs["gn-lars-0.5"][0])
    layers = read_layers(out / "runs" / "gn-lars-0.5" / "seed0")
    assert tuple(edges) == (0, len(layers.steps))
    for name, row in zip(names, table, strict=True):
        recorded = layers.values[
            :, layers.names.index(f"{name}.weight"), layers.metrics.index("rate")
        ]
        assert np.allclose(row, recorded, rtol=1e-6)  # fewer steps than columns: one to one


def test_every_run_ever_asked_for_is_accounted_for(page: Page, suite: Suite) -> None:
    account = suite.account
    assert {*account.done, *account.failed, *account.stopped, *account.left} == set(account.asked)
    assert (
        len(account.asked)
        == len(account.done) + len(account.failed) + len(account.stopped) + len(account.left)
        == 8
    )
    for line in (
        "Of 8 runs asked for 5 are done, 1 failed, 1 were stopped, 1 are left.",
        "gn-lars-0.5 seed 1 failed: no <room> left",
        "gn-lars-0.5 seed 2: done by the ledger, not in the folder",
        "gn-lars-0.5 seed 3: stopped by the ledger, not in the folder",
        "gn-lars-0.5 seed 4 is left: not begun, or not ended",
        "gn-lars-0.1 seed 0: in the folder, not in the ledger",
        "trained on textures",
        "counter-example",
    ):
        assert line in page.text


def test_runs_of_earlier_code_and_of_workers_are_each_counted_once(tmp_path: Path) -> None:
    """The one file of earlier code, and a file a run, which counts where both have the run."""
    names = [f"gn-lars-0.1 seed {seed}" for seed in range(5)]
    old = {
        f"gn-lars-0.1/seed{seed}": {"arm": "gn-lars-0.1", "seed": seed, "status": status}
        for seed, status in enumerate(["done", "stopped", "failed"])
    }
    calls = [{"command": COMMAND, "runs": names[:3]}]
    (tmp_path / "ledger.json").write_text(
        json.dumps({"scale": "mini", "calls": calls, "runs": old})
    )
    (tmp_path / "runs").mkdir()
    ledger.Call(tmp_path, "mini", {"runs": names[1:]}).end()
    folder = tmp_path / "ledger/gn-lars-0.1"
    folder.mkdir(parents=True)
    for seed, status in ((1, "done"), (2, "failed"), (3, "new"), (4, "stopped")):
        row = {
            "arm": "gn-lars-0.1", "seed": seed, "status": status, "order": seed, "epochs": 2,
            "claimed": 1, "device": "auto", "config": "", "error": "why",
        }  # fmt: skip
        (folder / f"seed{seed}.json").write_text(json.dumps(row))
    found = account(tmp_path, ledger.read(tmp_path))
    assert list(found.asked) == names
    assert (list(found.done), dict(found.failed)) == (names[:2], {names[2]: "why"})
    assert (list(found.left), list(found.stopped)) == (names[3:4], names[4:])


def test_an_arm_that_is_no_more_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "gone" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    ledger = {"calls": [], "runs": {"gone/seed0": {"arm": "gone", "seed": 0, "status": "done"}}}
    assert account(tmp_path, ledger).odd == (
        "gone seed 0: there is no arm of this name, so it is not judged",
    )


def test_a_damaged_run_is_named_and_the_others_are_judged(out: Path, tmp_path: Path) -> None:
    """Report, verdicts and list leave the run out. A damaged ledger is named too."""
    there = tmp_path / "out"
    shutil.copytree(out, there)
    before = Suite.read(there).runs
    arm, seed = next(iter(RUNS))
    run = there / "runs" / arm / f"seed{seed}"
    (run / "layers.npy").write_bytes((run / "layers.npy").read_bytes()[:100])
    suite = Suite.read(there)
    assert len(suite.left_out) == 1
    assert str(run) in suite.left_out[0]
    assert sum(map(len, suite.runs.values())) == sum(map(len, before.values())) - 1
    (run / "config.toml").write_text("nothing = [")
    assert len(Suite.read(there).left_out) == 1
    printed = CliRunner().invoke(ablate.app, ["report", "--out", str(there), "--json"])
    assert printed.exit_code == 0, printed.output
    assert printed.stderr.startswith(f"not judged: {run}")
    assert json.loads(printed.stdout)["verdicts"]
    listed = json.loads(
        CliRunner().invoke(ablate.app, ["list", "--out", str(there), "--json"]).stdout
    )["arms"]
    assert next(row["damaged"] for row in listed if row["arm"] == arm) == 1
    for text in (
        '{"scale": "mini", "calls": [null], "runs": {}}',
        '{"scale": "mini", "calls": [], "runs": {"a": {}}}',
        "[]",
    ):
        (there / "ledger.json").write_text(text)
        with pytest.raises(UsageError, match=r"ledger\.json: damaged"):
            ledger.read(there)


def test_accuracies_have_their_intervals() -> None:
    run = made_up("arm", HEALTHY, accuracy={0: 50.0, 12: 75.0, 23: 62.5}, num_scored=400)
    expected = {
        name: binomtest(hits, 400).proportion_ci(method="wilson") for name, hits in SCORED.items()
    }
    for name, accuracy in report_tables.accuracies(run).items():
        assert accuracy is not None
        interval = (100 * expected[name].low, 100 * expected[name].high)
        assert (accuracy["low"], accuracy["high"]) == pytest.approx(interval, abs=0.005)
        assert accuracy["accuracy"] == SCORED[name] / 4
        assert accuracy.get("epoch") == (12 if name == "best" else None)
    assert set(report_tables.accuracies(made_up("arm", HEALTHY)).values()) == {None}


def test_the_posts_table_stands_beside_ours(suite: Suite) -> None:
    claim = next(claim for claim in CLAIMS if claim.id == "M1")
    arms = {
        "bn-sgd-mlp-bn": (57.0, 61.0, 60.0),
        "bn-sgd-contrastive": (40.0, 42.0),
        "bn-sgd-simsiam": (50.0,),
    }
    run = suite.runs["gn-lars-0.1"][0]
    runs = {
        arm: tuple(
            dataclasses.replace(
                run, evidence=made_up(arm, HEALTHY, seed=seed, accuracy=(20.0, last))
            )
            for seed, last in enumerate(accuracies)
        )
        for arm, accuracies in arms.items()
    }
    rows = {
        arm: cells
        for arm, *cells in report_tables.number_rows(claim, dataclasses.replace(suite, runs=runs))
    }
    assert tuple(rows) == (*claim.arms, *claim.controls)
    assert rows["bn-sgd-mlp-bn"][:3] == [3, "57.7", "60.0 (57.0 to 61.0)"]
    assert rows["bn-sgd-mlp-bn"][5:] == ["0.2700", "0.2500 (0.2500 to 0.2500)"]
    assert rows["bn-sgd-contrastive"][:3] == [2, "44.1", "41.0 (40.0 to 42.0)"]
    assert rows["bn-sgd-simsiam"][:3] == [1, "-", "50.0"]
    assert rows["random"][:3] == [0, "28.8", "-"]


def test_recoveries_are_drawn_over_steps(suite: Suite) -> None:
    """Ours and the post's share an axis of steps. A setting left open is in its arm's panel."""
    arm = "gn-sgd-weight-decay"
    names = (arm, f"{arm}@wd1e-4", "gn-sgd-high-lr-layer1-layer2")
    run = suite.runs["gn-lars-0.1"][0]
    runs = {
        name: (
            dataclasses.replace(
                run, evidence=made_up(name, RECOVERED_LATE, scale="long", steps_per_epoch=64)
            ),
        )
        for name in names
    }
    first, second = report_figures.draw_recoveries(
        dataclasses.replace(suite, scale="long", runs=runs)
    ).axes
    assert [axes.get_title() for axes in (first, second)] == [arm, "gn-sgd-high-lr-layer1-layer2"]
    theirs, ours, other, _ = first.lines
    curve = published()["weight_decay_cosine", "negative"]
    assert np.allclose(theirs.get_xdata(), (curve.epoch + 1) * 410)
    assert np.allclose(theirs.get_ydata(), np.maximum(1 - curve.value, 0.005))
    assert np.allclose(ours.get_xdata(), 64 * np.arange(1, 25))
    assert np.allclose(ours.get_ydata(), 1 - runs[arm][0].evidence.neg_cos)
    assert other.get_label() == "wd1e-4 (1 seed)"
    assert len(second.lines) == 2
    assert first.get_xscale() == first.get_yscale() == "log"


def test_pictures_and_verdicts_for_the_readme(out: Path, tmp_path: Path, suite: Suite) -> None:
    paths = report.write_pictures(Suite.read(out), tmp_path / "pictures")
    assert [path.name for path in paths] == ["timing.png", "cosines.png", "verdicts.json"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[:2])
    verdicts = json.loads(paths[2].read_text("utf-8"))
    assert (verdicts["scale"], verdicts["runs"]) == ("mini", len(RUNS))
    assert (verdicts["data"], verdicts["account"]["failed"]) == (
        ["textures"],
        {"gn-lars-0.5 seed 1": "no <room> left"},
    )
    assert len(verdicts["accuracies"]) == len(RUNS)
    for row in verdicts["accuracies"]:
        (run,) = (run for run in suite.evidence(row["arm"]) if run.seed == row["seed"])
        assert row["last"]["accuracy"] == pytest.approx(run.last_accuracy, abs=1e-3)
        assert row["untrained"]["accuracy"] == pytest.approx(run.untrained_accuracy, abs=1e-3)
        assert row["num_scored"] == run.num_scored
    assert {row["id"]: row["outcome"] for row in verdicts["claims"]} == {
        k: v.outcome for k, v in suite.verdicts.items()
    }
    c5 = next(row for row in verdicts["claims"] if row["id"] == "C5")
    assert (c5["seeds"], list(c5["unsettled"])) == ("2", ["lr0.2"])


def test_a_report_with_pictures_reads_each_run_once_and_needs_no_torch(
    out: Path, tmp_path: Path
) -> None:
    code = """
import collections, sys
from fastbyol.cli import ablate
from fastbyol.runs import layers, metrics
opened = collections.Counter()
# os.open alone: what wraps its descriptor is reported a second time, with a mode
sys.addaudithook(lambda event,
args: event == "open" and args[1] is None and opened.update([str(args[0])]))
ablate.app(["report", "--out", sys.argv[1], "--png", sys.argv[2], "--html",
sys.argv[2] + "/r.html"], standalone_mode=False)
assert "torch" not in sys.modules
reads = {name: count for name, count in opened.items() if name.endswith(("metrics.jsonl",
"layers.npy"))}
assert len(reads) == int(sys.argv[3]), reads
assert set(reads.values()) == {1}, reads
"""
    (tmp_path / "png").mkdir()
    command = [sys.executable, "-c", code, str(out), str(tmp_path / "png"), str(2 * len(RUNS))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_long_runs_have_a_picture_of_their_recoveries(out: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(out / "runs")
    (tmp_path / "ledger.json").write_text('{"scale": "long", "calls": [], "runs": {}}')
    paths = report.write_pictures(Suite.read(tmp_path), tmp_path / "pictures")
    assert [path.name for path in paths] == ["recoveries.png", "verdicts.json"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")


def test_equal_runs_make_equal_files(text: str, out: Path, tmp_path: Path) -> None:
    report.write_report(Suite.read(out), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text("utf-8") == text


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ablations here"):
        report.write_report(Suite.read(tmp_path), tmp_path / "report.html")
    (tmp_path / "ledger.json").write_text('{"scale": "mini", "calls": [], "runs": {}}')
    with pytest.raises(UsageError, match="no run with a finished epoch"):
        report.write_report(Suite.read(tmp_path), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_without_matplotlib_the_remedy_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape("pip install 'fastbyol[report]'")):
        report.write_report(Suite.read(out), out / "other.html")
