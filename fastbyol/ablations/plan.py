"""The plan of a call: its runs, each with a configuration, a folder and a status.

The runs follow from claims and arms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.ablations.arms import SCALES, Arm, ScaleName, arm, arms, load
from fastbyol.ablations.claims import CLAIMS
from fastbyol.config import Resolved
from fastbyol.config_io import Flag
from fastbyol.errors import UsageError, check_choice
from fastbyol.fleet import existing
from fastbyol.fleet.asking import FolderStatus
from fastbyol.fleet.ledger import RUNS, Task


@dataclass(frozen=True)
class Run:
    """One run to be made: its arm, seed, folder and configuration.

    ``after`` is the folder of the run that has to come first, because this one replays its rates.
    """

    arm: Arm
    seed: int
    path: Path
    config: Resolved
    origin: Mapping[str, str]
    after: Path | None = None

    @property
    def name(self) -> str:
        """``ARM seed K``, as tables show it."""
        return f"{self.arm.name} seed {self.seed}"

    @property
    def task(self) -> Task:
        """The run as workers know it."""
        after = None if self.after is None else "/".join(self.after.parts[-2:])
        about = {"claims": list(self.arm.claims)}
        return Task(self.arm.name, self.seed, self.config, self.origin, after, about)


def chosen(
    targets: Sequence[str], scale: ScaleName, *, everything: bool = False
) -> tuple[Arm, ...]:
    """Return the arms of ``targets``: ids of claims (their arms and controls) or names of arms.

    With ``everything`` return all that ``scale`` has. Raises UsageError: nothing is named, a claim
    or arm does not exist, an arm belongs to other scales.
    """
    check_choice("scale", scale, SCALES)
    if everything:
        return tuple(each for each in arms().values() if scale in each.scales)
    if not targets:
        raise UsageError(
            "say which claims or arms to run, such as C6 C7, or --all; see `fastbyol ablate list`"
        )
    claims = {claim.id: claim for claim in CLAIMS}
    names: list[str] = []
    for target in targets:
        claim = claims.get(target.upper())
        names += (*claim.arms, *claim.controls) if claim else (target,)
    which = [arm(name) for name in dict.fromkeys(names)]
    odd = next((each for each in which if scale not in each.scales), None)
    if odd is not None:
        raise UsageError(f"{odd.name}: is for --scale {' and '.join(odd.scales)}, not {scale}")
    return tuple(which)


def seeds_of(each: Arm, seeds: int | None) -> int:
    """Return how many seeds to run an arm with: ``seeds``, else as many as its claims need.

    A setting that the post leaves open gets one.
    """
    if seeds is not None:
        return seeds
    if each.base:
        return 1
    return max((claim.needs for claim in CLAIMS if claim.id in each.claims), default=1)


def make(
    which: Sequence[Arm],
    scale: ScaleName,
    out: Path,
    *,
    seeds: int | None = None,
    first_seed: int = 0,
    sets: Sequence[str] = (),
    flags: Mapping[str, Flag] | None = None,
    num_images: int | None = None,
) -> tuple[Run, ...]:
    """Return the runs in the order to start them: a first seed of every arm, then the next.

    Settings that the post leaves open come at the end. A replay takes the rates of the next seed of
    its arm (the last one those of the first), since with its own seed it would be the very same
    run; the runs that this needs are added. If there are fewer images (``num_images``) than the
    scale is made for, runs have more epochs, because events take steps. Raises UsageError for
    settings that cannot work, and for less than a batch of images.
    """
    counts = {each.name: seeds_of(each, seeds) for each in which}
    for each in which:
        if each.rates_of:
            counts[each.rates_of] = max(counts.get(each.rates_of, 0), counts[each.name], 2)
    wanted = [each for each in arms().values() if each.name in counts]
    ranges = {name: range(first_seed, first_seed + count) for name, count in counts.items()}
    runs = [
        _run(each, seed, scale, out, ranges, sets, flags or {}, num_images)
        for each in wanted
        for seed in ranges[each.name]
    ]
    return tuple(
        sorted(runs, key=lambda run: (run.arm.base is not None, run.seed, run.after is not None))
    )


def _run(
    each: Arm,
    seed: int,
    scale: ScaleName,
    out: Path,
    seeds: Mapping[str, range],
    sets: Sequence[str],
    flags: Mapping[str, Flag],
    num_images: int | None,
) -> Run:
    after = None
    if each.rates_of:
        of = seeds[each.rates_of]
        after = run_path(out, each.rates_of, seed + 1 if seed + 1 in of else of[0])
        flags = {**flags, "optim.replay_rates": Flag(f"arm {each.name}", str(after))}
    loaded = load(each, scale, seed=seed, sets=sets, flags=flags)
    if num_images is not None:
        changed = config_io.requested(sets=sets)
        few = {
            key: flag
            for key, flag in _as_many_steps(loaded.config, num_images).items()
            if key not in changed
        }
        loaded = load(each, scale, seed=seed, sets=sets, flags={**flags, **few}) if few else loaded
    return Run(each, seed, run_path(out, each.name, seed), loaded.config, loaded.origin, after)


def _as_many_steps(config: Resolved, num_images: int) -> dict[str, Flag]:
    """Return the flags that give epochs of ``num_images`` as many steps as those of ``config``.

    No flags are returned where the epochs have as many already.
    """
    batch, limit = config.train.batch_size, config.data.limit
    if (taken := min(num_images, limit or num_images)) < batch:
        raise UsageError(
            f"--data: {taken} images are less than a batch of {batch}: name a larger set, or "
            "--set train.batch_size=N"
        )
    if num_images >= limit:
        return {}
    factor = (limit // batch) / (num_images // batch)
    lengths: dict[str, Any] = {
        "train.epochs": round(config.train.epochs * factor),
        "schedule.horizon_epochs": round((config.schedule.horizon_epochs) * factor),
        "schedule.warmup_epochs": config.schedule.warmup_epochs * factor,
        "probe.every_epochs": round(config.probe.every_epochs * factor),
    }
    if config.method.name == "contrastive":
        lengths["method.queue"] = max(batch, round(config.method.queue * num_images / limit))
    return {key: Flag("few images", length) for key, length in lengths.items() if length}


def run_path(out: Path, arm_name: str, seed: int) -> Path:
    """Return the folder of the run of an arm and a seed in the folder ``out``."""
    return out / RUNS / arm_name / f"seed{seed}"


def status(run: Run) -> FolderStatus:
    """Return how far ``run`` is.

    Raises UsageError if its folder holds a run of another configuration.
    """
    return existing.status(run.path, run.config)


def run_folders(out: Path) -> tuple[tuple[str, int, Path], ...]:
    """Return (arm, seed, folder) of every run of an existing arm in ``out``.

    They come in the order of arms and seeds.
    """
    rows = []
    for name in arms():
        for path in (out / RUNS / name).glob("seed*/config.toml"):
            number = path.parent.name.removeprefix("seed")
            if number.isdecimal() and number == str(
                int(number)
            ):  # seed01 beside seed1 is ambiguous
                rows.append((name, int(number), path.parent))
    order = list(arms())
    return tuple(sorted(rows, key=lambda row: (order.index(row[0]), row[1])))


def tasks(runs: Sequence[Run], out: Path) -> tuple[tuple[Task, FolderStatus], ...]:
    """Return ``runs`` as workers know them, each with what its folder says.

    Raises UsageError if ``out`` holds other runs.
    """
    made = tuple((run.task, status(run)) for run in runs)
    refuse_other_data(runs, out)
    return made


def refuse_other_data(runs: Iterable[Run], out: Path) -> None:
    """Raise UsageError if ``out`` has a run on other images than ``runs``: claims compare arms."""
    made = (path for _, _, path in run_folders(out))
    existing.refuse_other_data({run.config.data for run in runs}, made, out)
