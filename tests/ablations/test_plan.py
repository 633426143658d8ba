"""From what is asked to runs: which arms, how many seeds, in which order, and how far each is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastbyol import config_io
from fastbyol.ablations import plan
from fastbyol.ablations.arms import arm, arms
from fastbyol.config_io import Flag
from fastbyol.data import beton, convert
from fastbyol.errors import UsageError
from fastbyol.runs import inputs


def names(runs: tuple[plan.Run, ...]) -> list[str]:
    return [run.name for run in runs]


def test_a_claim_stands_for_its_arms_and_controls() -> None:
    chosen = plan.chosen(["c6", "gn-lars-0.1", "C7"], "mini")
    assert [found.name for found in chosen] == [
        "gn-lars-0.2",
        "gn-lars-0.2-replayed",
        "gn-lars-0.2-capped",
        "gn-lars-0.1",
    ]


def test_all_is_every_arm_of_the_scale() -> None:
    mini = {found.name for found in plan.chosen((), "mini", everything=True)}
    long = {found.name for found in plan.chosen((), "long", everything=True)}
    # What needs thousands of steps is for long; plain SGD and a higher learning rate are what that
    # is compared with.
    assert mini & long == {"gn-sgd-mlp-none", "gn-sgd-high-lr-layer1-layer2"}
    assert {arm(name).claims for name in long} == {
        ("C5",),
        ("C8",),
        ("C9",),
        ("C10", "C13"),
        ("C11",),
        ("C13",),
    }
    assert {name for name in set(arms()) - mini - long if "bf16" not in name} == {
        *("gn-sgd-weight-decay@wd1e-6", "gn-ws-sgd@lr0.2", "gn-ws-sgd@mlp-ws"),
        *("gn-lars-layer1-layer2@lr0.5", "gn-lars-mlps@lr0.5"),
    }
    assert {found.name for found in plan.chosen((), "short", everything=True)} == set(arms())


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ([], "--all"),
        (["C99"], "no such arm"),
        (["gn-lars-0.2@bf16"], "is for --scale short and full"),
    ],
)
def test_what_cannot_be_chosen_is_said(targets: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan.chosen(targets, "mini")


def test_seeds_are_what_verdicts_want() -> None:
    three = (
        "bn-sgd-mlp-bn",
        "gn-sgd-mlp-bn",
        "gn-sgd-mlp-none",
        "gn-lars-0.2",
        "gn-ws-sgd",
        "bn-sgd-simsiam",
    )
    assert {plan.seeds_of(arm(name), None) for name in three} == {3}
    assert {plan.seeds_of(arm(name), None) for name in ("gn-lars-0.1", "gn-lars-0.5")} == {5}
    assert plan.seeds_of(arm("gn-lars-0.2@exclude"), None) == 1
    assert plan.seeds_of(arm("gn-lars-0.2@exclude"), 5) == 5


def test_a_replay_takes_another_seed_and_comes_after_it() -> None:
    runs = plan.make([arm("gn-lars-0.2-replayed")], "mini", Path("out"), seeds=1)
    assert names(runs) == [
        "gn-lars-0.2 seed 0",
        "gn-lars-0.2-replayed seed 0",
        "gn-lars-0.2 seed 1",
    ]
    replay = runs[1]
    assert (
        replay.after
        == Path("out/runs/gn-lars-0.2/seed1")
        == Path(str(replay.config.optim.replay_rates))
    )
    for run in plan.make([arm("gn-lars-0.2-replayed")], "mini", Path("out")):
        assert run.after is None or run.after.name != f"seed{run.seed}"


def test_first_seeds_come_first_and_open_settings_last() -> None:
    runs = plan.make(plan.chosen((), "mini", everything=True), "mini", Path("out"))
    places = [(run.arm.base is not None, run.seed) for run in runs]
    assert places == sorted(places)
    assert len({run.path for run in runs}) == len(runs)


def test_fewer_images_make_more_epochs(tmp_path: Path) -> None:
    """1,000 images instead of 4,096:

    31 steps an epoch instead of 128, and so 83 epochs instead of 20.
    """
    flags = {"data.train": Flag("--data", str(tmp_path / "few.beton"))}
    (few,) = plan.make(
        [arm("gn-lars-0.2")], "mini", tmp_path, seeds=1, flags=flags, num_images=1000
    )
    (many,) = plan.make(
        [arm("gn-lars-0.2")], "mini", tmp_path, seeds=1, flags=flags, num_images=60_000
    )
    assert (
        many.config.train.epochs,
        many.config.probe.every_epochs,
        many.config.schedule.horizon_epochs,
    ) == (20, 2, 320)
    assert (
        few.config.train.epochs,
        few.config.probe.every_epochs,
        few.config.schedule.horizon_epochs,
    ) == (83, 8, 1321)
    assert few.config.train.epochs * (1000 // 32) == pytest.approx(
        many.config.train.epochs * (4096 // 32), rel=0.02
    )


@pytest.mark.parametrize("num_images", [32, 63, 500, 1024, 4095])
def test_a_small_set_takes_the_steps_of_a_large_one_in_everything(
    tmp_path: Path, num_images: int
) -> None:
    flags = {"data.train": Flag("--data", str(tmp_path / "few.beton"))}
    arms = [
        arm(name)
        for name in ("gn-lars-0.2@warmup", "gn-lars-0.2@warmup-steps", "bn-sgd-contrastive")
    ]
    few = plan.make(arms, "mini", tmp_path, seeds=1, flags=flags, num_images=num_images)
    for small, large in zip(
        few, plan.make(arms, "mini", tmp_path, seeds=1, flags=flags), strict=True
    ):
        steps, usual = num_images // 32, 4096 // 32
        for part in ("train.epochs", "schedule.warmup_epochs", "schedule.horizon_epochs"):
            ours, theirs = (config_io.flatten(each.config)[part] for each in (small, large))
            assert ours * steps == pytest.approx(theirs * usual, abs=steps / 2)
        assert small.config.method.queue == (
            max(32, round(0.625 * num_images)) if "contrastive" in small.name else 65536
        )


def test_less_than_a_batch_is_refused_at_once_and_what_was_said_is_not_changed(
    tmp_path: Path,
) -> None:
    flags = {"data.train": Flag("--data", str(tmp_path / "few.beton"))}
    with pytest.raises(UsageError, match="--data: 16 images are less than a batch of 32"):
        plan.make([arm("gn-lars-0.2")], "mini", tmp_path, seeds=1, flags=flags, num_images=16)
    said = ["train.batch_size=8", "train.epochs=3"]
    (run,) = plan.make(
        [arm("gn-lars-0.2")], "mini", tmp_path, seeds=1, flags=flags, sets=said, num_images=16
    )
    assert (run.config.train.epochs, run.config.schedule.horizon_epochs) == (3, 320 * 512 // 2)


def lay(run: plan.Run, epochs: int) -> None:
    """A run's folder with ``epochs`` finished ones."""
    run.path.mkdir(parents=True)
    (run.path / "config.toml").write_text(config_io.dump(run.config))
    said = {"event": "epoch", "state": "healthy", "accuracy": None, "neg_cos": 0.5}
    events = [
        json.dumps({**said, "step": 8 * (epoch + 1), "epoch": epoch}) for epoch in range(epochs)
    ]
    (run.path / "metrics.jsonl").write_text("".join(f"{event}\n" for event in events))


def test_status_is_read_from_the_run(tmp_path: Path) -> None:
    new, stopped, done = plan.make([arm("gn-lars-0.2")], "mini", tmp_path, seeds=3)
    lay(stopped, 3)
    lay(done, done.config.train.epochs)
    assert [plan.status(run) for run in (new, stopped, done)] == ["new", "stopped", "done"]
    assert plan.run_folders(tmp_path) == (
        ("gn-lars-0.2", 1, stopped.path),
        ("gn-lars-0.2", 2, done.path),
    )


def test_a_folder_holds_runs_on_the_same_images_alone(tmp_path: Path) -> None:
    """Claims are judged across arms. Files of one name in one folder's name are others still."""
    near, far = (str(tmp_path / name / "betons" / "train.beton") for name in ("mnist", "kmnist"))

    def planned(name: str, data: str) -> tuple[plan.Run, ...]:
        return plan.make(
            [arm(name)], "mini", tmp_path, seeds=1, flags={"data.train": Flag("--data", data)}
        )

    (run,) = planned("gn-lars-0.2", near)
    lay(run, 1)
    plan.refuse_other_data(planned("gn-lars-0.1", near), tmp_path)
    for other in (far, "textures"):
        with pytest.raises(UsageError, match="holds runs on other images, such as"):
            plan.refuse_other_data(planned("gn-lars-0.1", other), tmp_path)
        with pytest.raises(UsageError, match=r"holds a run with data\.train"):
            plan.status(planned("gn-lars-0.2", other)[0])


def test_where_the_data_were_pinned_their_content_counts(tmp_path: Path) -> None:
    """A moved file is the same, another under the old name is not, and neither need be in the run's
    own words.
    """
    files = [tmp_path / name for name in ("a.beton", "b.beton", "c.beton")]
    for seed, file in zip((0, 0, 1), files, strict=True):
        convert.convert("textures", file, count=64, size=16, seed=seed)

    def planned(name: str, data: Path) -> tuple[plan.Run, ...]:
        flags = {
            "data.train": Flag("--data", str(data)),
            "data.test": Flag("--test-data", str(files[2])),
        }
        return plan.make([arm(name)], "mini", tmp_path / "out", seeds=1, flags=flags)

    (run,) = planned("gn-lars-0.2", files[0])
    lay(run, 1)
    pinned = inputs.Inputs.of(beton.inspect(files[0]), beton.inspect(files[2]), "ffcv")
    (run.path / "env.json").write_text(json.dumps({inputs.META: pinned.as_json()}))
    assert plan.status(planned("gn-lars-0.2", files[1])[0]) == "stopped"
    plan.refuse_other_data(planned("gn-lars-0.1", files[1]), tmp_path / "out")
    with pytest.raises(UsageError, match="holds runs on other images"):
        plan.refuse_other_data(planned("gn-lars-0.1", files[2]), tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds a run with data\.train"):
        plan.status(planned("gn-lars-0.2", files[2])[0])
    convert.convert("textures", files[0], count=80, size=16, overwrite=True)
    with pytest.raises(UsageError, match=r"a\.beton: holds other data than when .* was made"):
        plan.status(run)


def test_a_copy_beside_a_run_is_not_another_seed(tmp_path: Path) -> None:
    (run,) = plan.make([arm("gn-lars-0.2")], "mini", tmp_path, seeds=1)
    lay(run, 1)
    shutil.copytree(run.path, run.path.with_name("seed00"))
    assert [seed for _, seed, _ in plan.run_folders(tmp_path)] == [0]


def test_another_configuration_in_the_folder_is_refused(tmp_path: Path) -> None:
    (run,) = plan.make([arm("gn-ws-sgd")], "mini", tmp_path, seeds=1)
    lay(run, 1)
    (other,) = plan.make([arm("gn-ws-sgd")], "mini", tmp_path, seeds=1, sets=["train.epochs=7"])
    with pytest.raises(UsageError, match=r"holds a run with train.epochs = 20, asked for is 7"):
        plan.status(other)
    (faster,) = plan.make(
        [arm("gn-ws-sgd")], "mini", tmp_path, seeds=1, sets=["run.keep_checkpoints=9"]
    )
    assert plan.status(faster) == "stopped"


def test_a_folder_that_was_moved_is_known_again(tmp_path: Path) -> None:
    replay = plan.make([arm("gn-lars-0.2-replayed")], "mini", tmp_path / "before", seeds=1)[1]
    lay(replay, 2)
    (tmp_path / "before").rename(tmp_path / "after")
    assert (
        plan.status(
            plan.make([arm("gn-lars-0.2-replayed")], "mini", tmp_path / "after", seeds=1)[1]
        )
        == "stopped"
    )
