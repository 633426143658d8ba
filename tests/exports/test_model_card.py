"""A model card says what the run's files say, in the hub's form, and shows names as text."""

from __future__ import annotations

import html
import shutil
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from fastbyol import api, config_io
from fastbyol.evaluation.intervals import accuracy_interval
from fastbyol.exports import model_card
from fastbyol.runs import checkpoint
from fastbyol.runs.metrics import read_events
from tiny import beton_files, tiny_config

NAME = "<script>alert(1)</script> *a* [b](c) `d` |e|\n---\n# f & $g$"
SETS = ("train.epochs=2", "data.test_limit=40")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "<i>secret"
    folder.mkdir()
    api.train(tiny_config(beton_files(folder), *SETS), folder / NAME.replace("/", "_"))
    return folder / NAME.replace("/", "_")


def exported(run: Path, out: Path, **options: Any) -> str:
    result = api.export(run, out, format="safetensors", **options)
    return Path(result["card"]).read_text("utf-8")


def test_the_head_is_yaml_that_the_hub_reads(trained: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the extra [timm] is not installed")
    for number, (licence, name, words) in enumerate(
        (
            (None, "other", "unknown"),
            ("MIT", "mit", None),
            ("cc-by-4.0", "cc-by-4.0", None),
            ("1.0", "1.0", None),
            ('Mine: "all" \\ of # it\n---', "other", 'Mine: "all" \\ of # it\\n---'),
        )
    ):
        text = exported(trained, tmp_path / str(number), license=licence)
        card = hub.ModelCard(text)
        assert (card.data.license, card.data.license_name) == (name, words)
        assert {"byol", "self-supervised-learning"} <= set(card.data.tags)
        assert card.data.library_name == "torchvision"
        assert ("Its licence is not stated." in card.content) == (licence is None)


def test_names_are_text_and_folders_stay_private(trained: Path, tmp_path: Path) -> None:
    text = exported(trained, tmp_path / "out")
    assert "secret" not in text
    assert "<script" not in text
    page = MarkdownIt().enable("table").render(text.partition("---\n\n")[2])
    shown = html.escape(trained.name.replace("\n", "\\n"), quote=False)
    assert f"<h1>ResNet-18 encoder of {shown}</h1>" in page
    assert page.count("<h1>") == 1
    assert "<em>" not in page
    assert "<a " not in page
    assert "<td>&quot;train.beton&quot;</td>" in page


def test_it_says_what_the_run_recorded(trained: Path, tmp_path: Path) -> None:
    text = exported(trained, tmp_path / "out")
    events = read_events(trained)
    last = [event for event in events if event["event"] == "epoch"][-1]
    low, high = accuracy_interval(last["accuracy"], events[0]["num_scored"])
    assert f"- State: {last['state']}, at the end of epoch 2\n" in text
    assert f"- Accuracy: {last['accuracy']:.1f}% ({low:.1f} to {high:.1f}); blog" in text
    assert "- Trained: 12 steps, 2 of 2 epochs done\n" in text
    assert "- Training: train.beton, 48 images\n- Test: test.beton, 40 images\n" in text
    assert "| `model.width` | 4 | 64 |\n" in text
    block = text.partition("```toml\n")[2].partition("```")[0]
    config = config_io.flatten(config_io.parse(block, "card"))
    own = config_io.flatten(config_io.read_run(trained / "config.toml"))
    differ = {key for key in own if own[key] != config[key]}
    assert differ == {"data.train", "data.test"}
    assert f"normalised with mean {list(own['views.mean'])}" in text  # type: ignore[call-overload]
    assert "(N, 3, 16, 16)" in text


def test_an_earlier_checkpoint_has_its_own_results(trained: Path, tmp_path: Path) -> None:
    first = checkpoint.file_of(trained / "checkpoints", 6)
    text = exported(first, tmp_path / "a")
    accuracy = next(event for event in read_events(trained) if event["event"] == "epoch")
    assert "- Trained: 6 steps, 1 of 2 epochs done\n" in text
    assert f"- Accuracy: {accuracy['accuracy']:.1f}% " in text
    target = exported(trained, tmp_path / "b", weights="target")
    assert "- Accuracy of the online network: " in target
    random = exported(trained, tmp_path / "c", weights="random")
    before = read_events(trained)[0]["accuracy"]
    assert "- Trained: not at all\n" in random
    assert "for features of images, not trained. The weights are random, as" in random
    assert f"- Accuracy: {before:.1f}% " in random
    alone = tmp_path / "alone.safetensors"
    shutil.copy(first, alone)
    text = exported(alone, tmp_path / "d")
    assert "- State: not recorded\n- Accuracy: not measured\n" in text
    assert "- Training: train.beton, 48 images\n" in text


def test_damaged_records_do_not_stop_it(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "metrics.jsonl").write_bytes(b"\xff{}\n")
    (run / "env.json").write_text("[")
    text = exported(run, tmp_path / "out")
    assert "- State: not recorded\n" in text
    assert "- Trained with: not recorded\n" in text


def test_escaping_is_undone_by_markdown() -> None:
    for value in (NAME, "\\`a\\`", "&lt;b&gt;", "a_b_c ~~d~~ @e https://f.g", "\u202eabc\x1b[0m"):
        page = MarkdownIt().render(f"x {model_card.escaped(value)} y")
        shown = html.unescape(page.removeprefix("<p>x ").removesuffix(" y</p>\n"))
        assert "<p>" not in shown
        assert (
            shown == value.encode("unicode_escape").decode()
            if not value.isprintable()
            else (shown == value)
        )
