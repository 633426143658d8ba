"""The reference has all of the code: commands, options, keys, metrics, events and names."""

from __future__ import annotations

import ast
import re
from html import unescape
from html.parser import HTMLParser

import markdown
import numpy as np
import pytest
import typer
from docs_rig import ROOT
from hypothesis import given
from hypothesis import strategies as st

import fastbyol
from fastbyol import config_io
from fastbyol.ablations.claims import CLAIMS
from fastbyol.ablations.rules import in_words
from fastbyol.cli.main import app
from fastbyol.engine.step import METRIC_MEANINGS, METRICS
from fastbyol.runs.metrics import EVENTS, read_metrics
from fastbyol_bench.site import reference
from fastbyol_kernels.lars_ema import LAYER_METRIC_MEANINGS, LAYER_METRICS

EXTENSIONS = ["tables", "attr_list", "toc", "pymdownx.superfences"]
PRINTABLE = st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="`")


class Rows(HTMLParser):
    """The texts of a page's table cells, row by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._is_cell = False
        self.feed(markdown.markdown(page, extensions=EXTENSIONS))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._is_cell = tag in ("td", "th") or (self._is_cell and tag not in ("table", "h2"))
        if tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.rows[-1][-1] += data


@given(st.text(PRINTABLE, max_size=40))
def test_escaped_words_show_as_they_are(text: str) -> None:
    (_, row) = Rows(reference.table(("a", "b"), iter([("x", reference.escaped(text))]))).rows
    assert row == ["x", " ".join(text.split())]


@given(st.text(PRINTABLE, min_size=1, max_size=40).filter(lambda text: text == text.strip()))
def test_code_shows_as_it_is(text: str) -> None:
    (_, row) = Rows(reference.table(("a", "b"), iter([("x", reference.code(text))]))).rows
    assert row[1] == text


def commands(command: object, words: str = "fastbyol") -> dict[str, object]:
    below = getattr(command, "commands", {})
    inner = {
        k: v for name, part in below.items() for k, v in commands(part, f"{words} {name}").items()
    }
    return {words: command} | inner


def test_every_command_and_option_has_its_place() -> None:
    pages = reference.command_pages()
    every = commands(typer.main.get_command(app))
    assert pages.keys() == every.keys()
    for words, command in every.items():
        names = [row[0] for row in Rows(pages[words]).rows]
        for parameter in command.params:  # type: ignore[attr-defined]
            options = [option for option in parameter.opts if option != "--help"]
            if parameter.param_type_name == "option" and options:
                assert any(set(options) & set(re.split(r"[ ,/]+", name)) for name in names), options


def test_the_exit_codes_of_a_command_are_those_that_its_options_can_cause() -> None:
    pages = reference.command_pages()
    codes = {
        words: [row[0] for row in Rows(pages[words]).rows if row[0].isdecimal()] for words in pages
    }
    assert codes["fastbyol eval"] == ["0", "1", "2"]
    assert codes["fastbyol train"] == ["0", "1", "2", "3"]
    assert codes["fastbyol ablate run"] == ["0", "1", "2", "4"]


def test_every_key_has_its_row() -> None:
    """Key and flags, what is allowed, default and presets, and a meaning."""
    rows = {row[0].split("\n")[0]: row for row in Rows(reference.configuration_page()).rows}
    for key, field in config_io.keys().items():
        assert field.description, f"{key}: no description in config.py"
        row = rows[key]
        assert row[3] == " ".join(field.description.replace("`", "").split())
        assert row[1], key
    assert rows["optim.lr"][0].split("\n")[1:] == ["--lr"]
    assert rows["train.batch_size"][1] == "whole number from 2 to 65,536"
    assert rows["optim.momentum"][1] == "number from 0 below 1"
    assert rows["model.norm"][1] == "bn, gn, ln, none"
    assert rows["train.seed"][1] == "whole number from 0 below 2^63"


@pytest.mark.parametrize("name", config_io.presets())
def test_a_preset_s_values_are_the_default_or_named(name: str) -> None:
    from fastbyol.config import Config

    rows = {row[0].split("\n")[0]: row for row in Rows(reference.configuration_page()).rows}
    defaults = config_io.flatten(Config())
    for key, value in config_io.flatten(config_io.load(preset=name).config).items():
        named = [line for line in rows[key][2].split("\n") if line.startswith(f"{name} ")]
        if value == defaults[key] or key == "preset":
            assert not named, key
        else:
            shown = "none" if value is None else config_io.toml_value(value)
            assert named == [f"{name} {shown}"], key


def test_metrics_are_those_of_the_code() -> None:
    rows = {row[0]: row for row in Rows(reference.metrics_page()).rows}
    assert {*METRICS, *LAYER_METRICS, *EVENTS} <= rows.keys()
    assert tuple(METRIC_MEANINGS) == METRICS
    assert tuple(LAYER_METRIC_MEANINGS) == LAYER_METRICS


def test_events_are_those_that_runs_write() -> None:
    """By the calls that write them, and in a run of old."""
    kinds = set()
    for path in (ROOT / "fastbyol" / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("telemetry.event"):
                kinds.add(ast.literal_eval(node.args[0]))
    assert kinds | {"skipped"} == EVENTS.keys()
    _, events = read_metrics(ROOT / "tests" / "runs" / "old" / "finished")
    assert {event["event"] for event in events} <= EVENTS.keys()


def test_every_claim_has_its_statements_and_runs() -> None:
    page = reference.claims_page()
    html = markdown.markdown(page, extensions=EXTENSIONS)
    texts = [unescape(re.sub(r"<[^>]+>", "", item)) for item in re.findall(r"<li>.*?</li>", html)]
    names = [row[0] for row in Rows(page).rows]
    for claim in CLAIMS:
        assert {*claim.arms, *claim.controls} <= set(names)
        for line in in_words(claim.id).splitlines():
            assert " ".join(line.split()) in texts


def test_python_names_are_those_of_the_package() -> None:
    page = reference.python_page()
    named = re.findall(r"^::: fastbyol\.(\w+)$", page, re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(fastbyol.__all__)


def test_a_name_in_no_group_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastbyol, "__all__", [*fastbyol.__all__, "new"])
    assert reference.python_page().endswith("## Others\n\n::: fastbyol.new\n")


def test_update_norm_is_the_change_of_the_weights() -> None:
    """What the page says of a layer's measures, against a step in float64."""
    import torch

    config = fastbyol.load_config(
        "demo", ["model.width=4", "views.size=16", "train.precision=fp64", "optim.name=lars"]
    )
    state = fastbyol.TrainState.create(config, steps_per_epoch=4)
    names = dict(state.online.named_parameters())
    before = {name: names[name].detach().clone() for name in state.segment_names}
    views = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    metrics = fastbyol.train_step(state, views)
    layers = dict(zip(LAYER_METRICS, metrics.layers.T.numpy(), strict=True))
    change = [float((names[name].detach() - old).norm()) for name, old in before.items()]
    np.testing.assert_allclose(layers["update_norm"], change, rtol=1e-5, atol=1e-12)
    weights = [float(old.norm()) for old in before.values()]
    np.testing.assert_allclose(layers["weight_norm"], weights, rtol=1e-6)
    total = float(np.sqrt(np.square(layers["grad_norm"].astype(np.float64)).sum()))
    assert float(metrics.values[METRICS.index("grad_norm")]) == pytest.approx(total, rel=1e-5)
