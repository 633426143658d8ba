"""What a run depends on beside its configuration, pinned by content: data files, the weights and the rates it starts from.

The pin is taken before the first step. It lies in env.json and in every checkpoint, whose own comes first. Where files lie
may change between two stretches of a run; what they hold may not. Nothing here imports torch.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastbyol.config import Config, DataConfig
from fastbyol.data import beton, embedded
from fastbyol.data.beton import BetonInfo
from fastbyol.data.contents import Contents
from fastbyol.errors import UsageError
from fastbyol.runs import consistency
from fastbyol.runs.environment import env_of
from fastbyol.text import printable

META = "inputs"
_FLAGS = {"train": "--data", "test": "--test-data"}
_WORDS = {"train": "training data", "test": "test data"}


@dataclass(frozen=True)
class Inputs:
    """Contents of the data files (``test`` None: there is none), digests of the checkpoint and the rates (None: not used).

    ``decoder`` made pixels of the data files: "ffcv" or "torchvision".
    """

    train: Contents
    test: Contents | None
    decoder: str
    weights: str | None = None
    rates: str | None = None

    @staticmethod
    def of(train: BetonInfo, test: BetonInfo | None, decoder: str) -> Inputs:
        """Return the pin of two data files and what decodes them."""
        return Inputs(Contents.of(train), None if test is None else Contents.of(test), decoder)

    @staticmethod
    def read(said: object) -> Inputs | None:
        """Return what ``as_json`` gave; None where it is damaged, or of a run that pinned nothing."""
        if not isinstance(said, Mapping) or (train := Contents.read(said.get("train"))) is None:
            return None
        test, digests = Contents.read(said.get("test")), [said.get(name) for name in ("weights", "rates")]
        decoder = said.get("decoder", "ffcv")  # there was a time when nothing else was
        if (test is None and said.get("test") is not None) or not all(
            text is None or isinstance(text, str) for text in (*digests, decoder)
        ):
            return None
        return Inputs(train, test, decoder, *digests)

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        test = None if self.test is None else self.test._asdict()
        return {**asdict(self), "train": self.train._asdict(), "test": test}


def refuse_other_data(run: Path, made: Inputs, now: Inputs, train: Path, test: Path | None) -> None:
    """Raise UsageError where a data file of the run ``run`` does not hold what it held when the run was ``made``."""
    for name, file, then, found in (("train", train, made.train, now.train), ("test", test, made.test, now.test)):
        if then == found:
            continue
        if then is None or found is None:
            missing = "without test data" if then is None else "with test data, and none are named now"
            raise UsageError(f"{run}: the run was made {missing}: put config.toml back, or {_afresh(run)}")
        raise UsageError(
            f"{file}: is not the {_WORDS[name]} that the run was made with: {then.change(found)}: put it back, say where the "
            f"same lies with `fastbyol resume {_quoted(run)} {_FLAGS[name]} FILE`, or {_afresh(run)}"
        )


def refuse_other_decoder(run: Path, then: str) -> NoReturn:
    """Raise UsageError: images of the run ``run`` are JPEG, and what decoded them then is missing."""
    raise UsageError(
        f"{run}: the run was made with JPEG images decoded by {then}, which cannot be used here, and by another decoder their "
        f"pixels are others: install it (`fastbyol doctor` says how), or {_afresh(run)}"
    )


def refuse_missing(run: Path, data: DataConfig) -> None:
    """Raise UsageError where a data file of a run that was begun is not where the run has it."""
    for name, said in (("train", data.train), ("test", data.test)):
        if said is not None and said not in embedded.BUILT_IN and not os.path.exists(said):  # noqa: PTH110 - never raises
            raise UsageError(
                f"{said}: no such file, and the run needs it as its {_WORDS[name]}: put it back, or say where it lies "
                f"now with `fastbyol resume {_quoted(run)} {_FLAGS[name]} FILE`"
            )


def moved(config: Config, train: str | Path | None, test: str | Path | None) -> Config:
    """Return ``config`` with the data files that a caller names; test data that came with a built-in training set stay."""
    data = config.data
    if train is not None and test is None and data.test is None and data.train in embedded.BUILT_IN:
        test = data.train
    files = {name: absolute(file) for name, file in (("train", train), ("test", test)) if file is not None}
    return config.model_copy(update={"data": data.model_copy(update=files)})


def with_paths(config: Config, asked: Config) -> Config:
    """Return ``config`` with its data files and the run whose rates it takes where ``asked`` has them, as absolute paths."""
    data, optim, rates = asked.data, config.optim, asked.optim.replay_rates
    files = {"train": absolute(data.train), "test": data.test and absolute(data.test)}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=files),
            "optim": optim.model_copy(update={"replay_rates": rates and absolute(rates)}),
        }
    )


def absolute(path: str | Path) -> str:
    """Return the path of a file or folder as a run keeps it: absolute, so that it is found from anywhere.

    A built-in set's name stays one, and so does a link. Raises UsageError for a name that is not UTF-8, since config.toml
    cannot hold it.
    """
    if str(path) in embedded.BUILT_IN:
        return str(path)
    try:
        found = Path(path).expanduser().absolute()
        if ".." in found.parts:  # not what it names once a folder on the way is gone
            found = found.parent.resolve() / found.name
    except (RuntimeError, OSError, ValueError):  # ~ of nobody, a working folder that is gone, a name that cannot be one
        found = Path(path)
    try:
        str(found).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"{printable(str(found))}: its name is not UTF-8, so no run can keep it: rename it or make a link to it"
        ) from None
    return str(found)


def of_run(run_or_file: Path) -> Inputs | None:
    """Return what a run, or that of a checkpoint file, was made from, without opening its configuration; None: not pinned.

    The newest checkpoint's word counts, then env.json's.
    """
    if not run_or_file.is_dir():
        return Inputs.read(consistency.meta_of(run_or_file).get(META))
    saved = consistency.last_meta(run_or_file / "checkpoints").get(META)
    return Inputs.read(saved) or Inputs.read(env_of(run_or_file).get(META))


def own_data(
    run: Path, pinned: Inputs | None, name: str, file: Path, *, image_field: str | None, label_field: str | None
) -> BetonInfo:
    """Inspect a run's own data file to measure the run on; fields as ``beton.inspect`` takes them.

    Raises UsageError where it changed since the run was made, which ``pinned`` says.
    """
    if not file.exists():
        raise UsageError(f"{file}: no such file, the {_WORDS[name]} of {run}: put it back, or name a file with --{name}-data")
    info = beton.inspect(file, image_field=image_field, label_field=label_field, may_lack_labels=name == "train")
    then = None if pinned is None else (pinned.train if name == "train" else pinned.test)
    if then is not None and (change := then.change(Contents.of(info))):
        raise UsageError(
            f"{file}: is not the {_WORDS[name]} of {run}: {change}: put it back, or name the file to take with --{name}-data"
        )
    return info


def _afresh(run: Path) -> str:
    return f"start another run from these weights with `fastbyol train --init-from {_quoted(run)}`"


def _quoted(run: Path) -> str:
    return shlex.quote(str(run))
