"""Evidence of a run that was really trained, against its files read by hand; and of the post's
figures.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fastbyol import config_io
from fastbyol.ablations.claims import CLAIMS
from fastbyol.ablations.evidence import EARLY, Evidence, Scale, group_of
from fastbyol.ablations.suite import Record
from fastbyol.engine import trainer
from fastbyol.errors import UsageError
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.layers import read_layers
from fastbyol.runs.metrics import read_events, read_metrics
from published import published
from tiny import STEPS_PER_EPOCH, beton_files, tiny_config

LARS = (
    "model.norm=gn", "model.groups=2", "model.projector.norm=none", "model.predictor.norm=none",
    "optim.name=lars",
    "probe.every_epochs=2",
)  # fmt: skip


def of_run(path: Path, *, arm: str, seed: int, scale: Scale = "mini") -> Evidence:
    return Record.read(path, arm=arm, seed=seed, scale=scale).evidence


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(beton_files(tmp_path_factory.mktemp("data")), *LARS)
    path = tmp_path_factory.mktemp("runs") / "run"
    with RunFolder.create(path, config) as folder:
        trainer.fit(folder, config)
    return path


def test_columns_are_means_over_the_epochs_steps(run: Path) -> None:
    evidence = of_run(run, arm="gn-lars-0.2", seed=3)
    rows, _ = read_metrics(run)
    assert (evidence.arm, evidence.seed, evidence.steps_per_epoch, evidence.epochs,
    evidence.finished) == (
        "gn-lars-0.2", 3, STEPS_PER_EPOCH, 3, True,
    )  # fmt: skip
    for name in ("loss", "neg_cos", "pos_cos", "std_z", "grad_norm"):
        by_hand = np.array([row[name] for row in rows]).reshape(3, STEPS_PER_EPOCH).mean(axis=1)
        np.testing.assert_allclose(
            getattr(evidence, name), by_hand, rtol=1e-12
        )  # sums of six, in another order


def test_accuracy_is_nan_where_it_was_not_measured(run: Path) -> None:
    """Every second epoch, and the last."""
    assert np.isfinite(of_run(run, arm="a", seed=0).accuracy).tolist() == [False, True, True]


def test_the_untrained_weights_are_scored_before_the_first_step(run: Path, tmp_path: Path) -> None:
    """A random network's accuracy, which the run's own weights had: read from its event, unknown
    where an old run has none.
    """
    evidence = of_run(run, arm="a", seed=0)
    (event,) = (row for row in read_events(run) if row["event"] == "untrained")
    assert (evidence.untrained_accuracy, evidence.num_scored) == (
        event["accuracy"],
        event["num_scored"],
    )
    assert evidence.scored == event["num_scored"]
    old = shutil.copytree(run, tmp_path / "old")
    lines = (old / "metrics.jsonl").read_text().splitlines(keepends=True)
    (old / "metrics.jsonl").write_text("".join(line for line in lines if '"untrained"' not in line))
    unknown = of_run(old, arm="a", seed=0)
    assert np.isnan(unknown.untrained_accuracy)
    assert (unknown.num_scored, unknown.scored) == (None, 1024)
    assert of_run(old, arm="a", seed=0, scale="full").scored == 3968


def test_rates_are_means_over_the_kernels_of_a_group(run: Path) -> None:
    evidence, layers = of_run(run, arm="a", seed=0), read_layers(run)
    assert list(evidence.rates) == [
        "encoder.conv1", "encoder.layer1", "encoder.layer2", "encoder.layer3", "encoder.layer4",
        "projector.linear1", "projector.linear2", "predictor.linear1", "predictor.linear2",
    ]  # fmt: skip
    kernels = [
        f"encoder.layer2.{name}.weight"
        for name in ("0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2")
    ]
    rate = layers.values[
        :, [layers.names.index(name) for name in kernels], layers.metrics.index("rate")
    ]
    np.testing.assert_allclose(
        evidence.rates["encoder.layer2"], rate.astype(np.float64).mean(axis=1), rtol=1e-6
    )  # fp32 sums
    np.testing.assert_allclose(
        evidence.rate_by_epoch("encoder.layer2"), rate.reshape(3, -1).mean(axis=1), rtol=1e-6
    )
    assert np.isnan(evidence.rate_by_epoch("nowhere")).all()


def test_the_early_gradient_is_the_norm_over_all_parameters_of_the_first_layers(run: Path) -> None:
    evidence, layers = of_run(run, arm="a", seed=0), read_layers(run)
    norms = layers.values[
        :, [group_of(name) in EARLY for name in layers.names], layers.metrics.index("grad_norm")
    ]
    np.testing.assert_allclose(
        evidence.early_gradient_norm, np.linalg.norm(norms.astype(np.float64), axis=1), rtol=1e-12
    )
    assert evidence.early_gradient_by_epoch().shape == (3,)


def test_no_rate_passes_the_ceiling(run: Path) -> None:
    """lr * eta / wd of the blog's LARS, with each epoch's lr along its cosine."""
    evidence = of_run(run, arm="a", seed=0)
    assert evidence.rate_ceiling == pytest.approx(0.2 * 1e-3 / 1.5e-6)
    for group in evidence.rates:
        by_hand = evidence.rate_by_epoch(group) / (evidence.lr * 1e-3 / 1.5e-6)
        np.testing.assert_allclose(
            evidence.ceiling_share(group), by_hand, rtol=1e-6
        )  # the lr is in fp32
        assert np.all(by_hand < 1)


def test_a_folder_without_a_finished_epoch_is_refused(tmp_path: Path) -> None:
    config = config_io.load(preset="blog").config
    with RunFolder.create(tmp_path / "run", config) as folder:
        (folder.path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="no epoch has ended"):
        of_run(tmp_path / "run", arm="a", seed=0)
    with pytest.raises(UsageError, match="no run here"):
        of_run(tmp_path, arm="a", seed=0)


def test_published_evidence_holds_the_curves_points_and_nan_between() -> None:
    (evidence,) = published(next(c for c in CLAIMS if c.id == "C8"))["gn-sgd-weight-decay"]
    assert (len(evidence.epoch), evidence.epochs, evidence.scale) == (320, 320, "published")
    assert evidence.neg_cos[111] < 0.5 < evidence.neg_cos[110]
    assert np.isnan(evidence.pos_cos[:95]).all()
    assert evidence.accuracy[-1] == evidence.last_accuracy == 56
    assert (evidence.steps, evidence.scored) == (320 * 410, 3968)


def test_the_published_table_has_all_its_rows() -> None:
    claim = next(c for c in CLAIMS if c.id == "M1")
    found = published(claim)
    assert list(found) == list(claim.arms)
    accuracies = [rows[0].last_accuracy for rows in found.values()]
    assert accuracies == [57.7, 55.3, 48, 28.3, 29.4, 28.8, 44.1]
