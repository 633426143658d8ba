"""A run's inputs beside its configuration, pinned by content: data, first weights, replayed rates.

They are pinned before the first step, in env.json and in each checkpoint. Files may move later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastbyol.config import Config, DataConfig, Resolved
from fastbyol.errors import UsageError, quoted
from fastbyol.runs import consistency
from fastbyol.runs.environment import env_of
from fastbyol.text import printable

# Opening data takes a fifth of a second of imports, and a list of runs opens none.
if TYPE_CHECKING:
    from fastbyol.data.beton import BetonInfo
    from fastbyol.data.contents import Contents

META = "inputs"
_FLAGS = {"train": "--data", "test": "--test-data"}
_WORDS = {"train": "training data", "test": "test data"}


@dataclass(frozen=True)
class Inputs:
    """The contents of the data files, digests of the checkpoint and the rates; None: not used.

    ``decoder``, "ffcv" or "torchvision", made pixels of the data files.
    """

    train: Contents
    test: Contents | None
    decoder: str
    weights: str | None = None
    rates: str | None = None

    @staticmethod
    def of(train: BetonInfo, test: BetonInfo | None, decoder: str) -> Inputs:
        """Return the pin of two data files and what decodes them."""
        from fastbyol.data.contents import Contents

        return Inputs(Contents.of(train), None if test is None else Contents.of(test), decoder)

    @staticmethod
    def read(record: object) -> Inputs | None:
        """Return the inputs that ``as_json`` wrote; None where the record is damaged or missing."""
        from fastbyol.data.contents import Contents

        if not isinstance(record, Mapping) or (train := Contents.read(record.get("train"))) is None:
            return None
        test, digests = (
            Contents.read(record.get("test")),
            [record.get(name) for name in ("weights", "rates")],
        )
        decoder = record.get("decoder", "ffcv")  # earlier code had no other
        if (test is None and record.get("test") is not None) or not all(
            text is None or isinstance(text, str) for text in (*digests, decoder)
        ):
            return None
        return Inputs(train, test, decoder, *digests)

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        test = None if self.test is None else self.test._asdict()
        return {**asdict(self), "train": self.train._asdict(), "test": test}


def refuse_other_data(
    run: Path, made: Inputs, now: Inputs, train: str, test: str | None = None
) -> None:
    """Raise UsageError where a data file's content has changed since the run was ``made``.

    ``train`` and ``test`` name the files in the message.
    """
    for name, file, then, today in (
        ("train", train, made.train, now.train),
        ("test", test, made.test, now.test),
    ):
        if then == today:
            continue
        if then is None or today is None:
            missing = (
                "without test data" if then is None else "with test data, and none are named now"
            )
            raise UsageError(
                f"{run}: the run was made {missing}: put config.toml back, or {_afresh(run)}"
            )
        raise UsageError(
            f"{file}: is not the {_WORDS[name]} that the run was made with: {then.change(today)}: "
            "put it back, say where the "
            f"same lies with `fastbyol resume {quoted(run)} {_FLAGS[name]} FILE`, or "
            f"{_afresh(run)}"
        )


def refuse_other_decoder(run: Path, then: str) -> NoReturn:
    """Raise UsageError: the run's images are JPEG, and what decoded them then is missing."""
    raise UsageError(
        f"{run}: the run was made with JPEG images decoded by {then}, which cannot be used here, "
        "and by another decoder their "
        f"pixels are others: install it (`fastbyol doctor` says how), or {_afresh(run)}"
    )


def refuse_missing(run: Path, data: DataConfig) -> None:
    """Raise UsageError if a data file that the run's configuration names is missing."""
    for name, file in (("train", data.train), ("test", data.test)):
        if file is None or not _is_path(file) or "{" in file:  # shards name themselves
            continue
        if not os.path.exists(file):  # noqa: PTH110 - never raises
            raise UsageError(
                f"{file}: no such file, and the run needs it as its {_WORDS[name]}: put it back, "
                "or say where it lies "
                f"now with `fastbyol resume {quoted(run)} {_FLAGS[name]} FILE`"
            )


def moved(config: Resolved, train: str | Path | None, test: str | Path | None) -> Resolved:
    """Return ``config`` with the data files that a caller names, else those that it has."""
    data = config.data
    if train is not None and test is None and data.test is None and _is_built_in(data.train):
        test = data.train
    files = {
        name: absolute(file)
        for name, file in (("train", train), ("test", test))
        if file is not None
    }
    return config.model_copy(update={"data": data.model_copy(update=files)})


def with_paths(config: Resolved, asked: Config) -> Resolved:
    """Return ``config`` with the paths of data and of replayed rates in ``asked``, absolute."""
    data, optim, rates = asked.data, config.optim, asked.optim.replay_rates
    files = {"train": absolute(data.train), "test": data.test and absolute(data.test)}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=files),
            "optim": optim.model_copy(update={"replay_rates": rates and absolute(rates)}),
        }
    )


def absolute(path: str | Path) -> str:
    """Return a path as config.toml keeps it: absolute, so that it is valid from anywhere.

    Names of sets, but for a ROOT in them, and links are kept. Raises UsageError for a name that is
    not UTF-8, since TOML cannot contain it.
    """
    if not _is_path(str(path)):
        from fastbyol.data import source_torchvision

        return source_torchvision.absolute(str(path))
    try:
        full = Path(path).expanduser().absolute()
        if ".." in full.parts:  # would name another file once a folder on the way is gone
            full = full.parent.resolve() / full.name
    # An unknown user's ~, a working folder that is gone, an impossible name:
    except (RuntimeError, OSError, ValueError):
        full = Path(path)
    try:
        str(full).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"{printable(str(full))}: its name is not UTF-8, so no run can keep it: rename it or "
            "make a link to it"
        ) from None
    return str(full)


def of_run(run_or_file: Path) -> Inputs | None:
    """Return the pinned inputs of a run or of a checkpoint file, None where there are none.

    Those in the newest checkpoint count before those in env.json. No configuration is opened.
    """
    if not run_or_file.is_dir():
        return Inputs.read(consistency.meta_of(run_or_file).get(META))
    saved = consistency.last_meta(run_or_file / "checkpoints").get(META)
    return Inputs.read(saved) or Inputs.read(env_of(run_or_file).get(META))


def decoder_of(run_or_file: Path, data: DataConfig) -> str:
    """Return the decoder of what a run is measured on: the run's, if it can be had."""
    from fastbyol.data import decoder

    pinned = of_run(run_or_file)
    return decoder.choose(data.decoder) if pinned is None else decoder.choose_again(pinned.decoder)


def own_data(
    run: Path,
    pinned: Inputs | None,
    name: str,
    file: Path,
    *,
    image_field: str | None,
    label_field: str | None,
) -> BetonInfo:
    """Inspect a run's own data file to measure the run on; fields as ``beton.inspect`` takes them.

    Raises UsageError where its content is not the one in ``pinned``.
    """
    from fastbyol.data import beton
    from fastbyol.data.contents import Contents

    if not file.exists():
        raise UsageError(
            f"{file}: no such file, the {_WORDS[name]} of {run}: put it back, or name a file with "
            f"--{name}-data"
        )
    info = beton.inspect(
        file, image_field=image_field, label_field=label_field, may_lack_labels=name == "train"
    )
    then = None if pinned is None else (pinned.train if name == "train" else pinned.test)
    if then is not None and (change := then.change(Contents.of(info))):
        raise UsageError(
            f"{file}: is not the {_WORDS[name]} of {run}: {change}: put it back, or name the file "
            f"to take with --{name}-data"
        )
    return info


def _is_built_in(name: str) -> bool:
    from fastbyol.data import embedded

    return name in embedded.BUILT_IN


def _is_path(name: str) -> bool:
    from fastbyol.data import sources

    return sources.is_path(name)


def _afresh(run: Path) -> str:
    return f"start another run from these weights with `fastbyol train --init-from {quoted(run)}`"
