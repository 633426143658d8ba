"""A run's folder: its files, and a lock.

The files are config.toml, env.json, metrics.jsonl, layers.npy, timing.jsonl, checkpoints/ and
report.html.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.config import Resolved
from fastbyol.errors import UsageError, quoted
from fastbyol.runs.durable import sync_folder, write_text, writing
from fastbyol.runs.environment import ENV, env_of, environment
from fastbyol.runs.inputs import META, Inputs, of_run
from fastbyol.runs.lock import LOCK, Lock
from fastbyol.runs.metrics import METRICS_FILE

CONFIG, CHECKPOINTS = "config.toml", "checkpoints"
ENGINE, FORK, FIRST_WEIGHTS = "engine", "fork", "first_weights"
_log = logging.getLogger(__name__)


class RunFolder:
    """An open run. Use as a context manager: leaving it releases the lock.

    ``config_text`` is config.toml at that time, with origins in its comments. A new folder whose
    run ends in a UsageError before its first step is removed, so that its name stays free.
    """

    def __init__(self, path: Path, config: Resolved, lock: Lock | None, *, is_new: bool) -> None:
        self.path, self.config, self.is_new = path, config, is_new
        self.config_text = config_io.read_text(path / CONFIG)
        # Called before records and checkpoints are written; raises if the run is another's by now.
        self.fence: Callable[[], None] = lambda: None
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: Path,
        config: Resolved,
        origin: Mapping[str, str] | None = None,
        *,
        launch: str | None = None,
    ) -> RunFolder:
        """Make the folder of a new run of the resolved ``config``: absent before, or empty.

        ``launch`` is the start of several processes that makes it, whose restarts go on with it.
        Raises UsageError where the folder is not empty, is in use, or cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_used(path)
            lock = Lock(path)
            try:
                _refuse_used(path)  # again: another process may have been faster
                (path / CHECKPOINTS).mkdir(exist_ok=True)
                text = config_io.dump(config, origin)
                env = {**environment(), **({"launch": launch} if launch else {}), "config": text}
                write_text(path / ENV, json.dumps(env, indent=2) + "\n")
                write_text(path / CONFIG, text)
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            raise UsageError(
                f"{path}: cannot make a run folder here: {error.strerror}; name another with --out"
            ) from None
        return cls(path, config, lock, is_new=True)

    @classmethod
    def open(cls, path: Path, *, lock: bool) -> RunFolder:
        """Open an existing run. With ``lock`` no other process may work on it until this is closed.

        Raises UsageError where there is no run, its configuration is damaged, or it is in use.
        """
        if not (path / CONFIG).is_file():
            raise UsageError(
                f"{path}: no run here (no {CONFIG}); `fastbyol runs` lists those under runs/"
            )
        config = config_io.read_run(path / CONFIG)
        try:
            return cls(path, config, Lock(path) if lock else None, is_new=False)
        except OSError as error:
            raise UsageError(f"{path}: cannot write in this run folder: {error.strerror}") from None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def env(self) -> dict[str, Any]:
        """The environment that the run was made in, empty where env.json is missing."""
        return env_of(self.path)

    @property
    def kept_mode(self) -> str | None:
        """The engine's mode in env.json, None where there is none."""
        mode = self.env.get(ENGINE)
        return mode if mode in ("eager", "compile", "graph") else None

    def keep_mode(self, mode: str) -> None:
        """Write the engine's mode that ``auto`` stands for to env.json, where resuming reads it.

        Raises FastbyolError where the file cannot be written.
        """
        self._keep({ENGINE: mode})

    @property
    def inputs(self) -> Inputs | None:
        """The run's pinned inputs, None where there are none."""
        return of_run(self.path)

    def keep_inputs(
        self,
        inputs: Inputs,
        made_by: Mapping[str, str | None],
        first_weights: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the run's inputs to env.json, and the versions that it lacks.

        ``first_weights`` describes those in ``inputs``. Raises FastbyolError where the file cannot
        be written.
        """
        self._keep(
            {
                META: inputs.as_json(),
                **({} if first_weights is None else {FIRST_WEIGHTS: first_weights}),
                **{key: name for key, name in made_by.items() if key not in self.env},
            }
        )

    def keep_fork(self, record: Mapping[str, Any], mode: str | None) -> None:
        """Write what the run was forked from, and the engine's mode if one was kept, to env.json.

        Raises FastbyolError where the file cannot be written.
        """
        self._keep({FORK: record, **({} if mode is None else {ENGINE: mode})})

    def move(self, path: Path) -> None:
        """Move the folder, complete by now, to ``path``: absent, or empty. The lock goes along.

        Raises OSError.
        """
        sync_folder(self.path)
        self.path.rename(path)
        self.path, self.is_new = path, False
        sync_folder(path.parent)

    def keep_paths(self, config: Resolved) -> None:
        """Write ``config``, the run's but for paths. Raises FastbyolError where that fails."""
        before, now = (config_io.flatten(each) for each in (self.config, config))
        moved = {
            key: "resume --log" if key.startswith("log.") else "where it was moved to"
            for key in now
            if now[key] != before[key]
        }
        text = config_io.dump(config, config_io.origins(self.config_text) | moved)
        with writing(self.path / CONFIG):
            write_text(self.path / CONFIG, text)
        self.config, self.config_text = config, text

    def _keep(self, fields: Mapping[str, object]) -> None:
        with writing(self.path / ENV):
            write_text(self.path / ENV, json.dumps({**self.env, **fields}, indent=2) + "\n")

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if (
            self.is_new
            and isinstance(error, UsageError)
            and not (self.path / METRICS_FILE).exists()
        ):
            self._remove()
        self.close()

    def _remove(self) -> None:
        """Remove the files of ``create`` and nothing else."""
        for name in (CONFIG, ENV, LOCK):
            (self.path / name).unlink(missing_ok=True)
        try:
            self.checkpoints.rmdir()
            self.path.rmdir()
        except OSError as error:
            _log.info("%s stays: %s", self.path, error.strerror)


def default_run_path(config: Resolved, root: Path = Path("runs")) -> Path:
    """Claim and return a fresh folder ``ROOT/<norm>-<opt><lr>-mlp_<norm>[-ws]-s<seed>-<n>``.

    ``n`` counts up. Processes that call this at the same time get different folders.
    """
    stem = _stem(config)
    try:
        root.mkdir(parents=True, exist_ok=True)
        names = (re.fullmatch(rf"{re.escape(stem)}-(\d+)", path.name) for path in root.iterdir())
        number = max((int(name[1]) for name in names if name), default=0)
        while True:
            number += 1
            try:
                (root / f"{stem}-{number}").mkdir()
            except FileExistsError:
                continue
            return root / f"{stem}-{number}"
    except OSError as error:
        raise UsageError(
            f"{root}: cannot make a run folder here: {error.strerror}; name another with --out"
        ) from None


def _refuse_used(path: Path) -> None:
    if (path / CONFIG).exists():
        raise UsageError(
            f"{path}: holds a run already: go on with `fastbyol resume {quoted(path)}`, or name "
            "another folder with --out"
        )
    # A process that was killed within `create` may have left these.
    ours = (LOCK, ENV, CHECKPOINTS, f".{ENV}.tmp", f".{CONFIG}.tmp")
    if other := next((entry.name for entry in path.iterdir() if entry.name not in ours), ""):
        raise UsageError(
            f"{path}: is not empty ({other}): move that away, or name another folder with --out"
        )


def _stem(config: Resolved) -> str:
    model, optim = config.model, config.optim
    projector, predictor = (
        model.projector.norm,
        model.predictor.norm if model.predictor.layers else "absent",
    )
    method = "" if config.method.name == "byol" else f"{config.method.name}-"
    mlp = projector if projector == predictor else f"{projector}_{predictor}"
    ws = "-ws" if model.ws else ""
    encoder = model.norm if model.foreign is None else model.foreign[1]
    return f"{method}{encoder}-{optim.name}{optim.lr:g}-mlp_{mlp}{ws}-s{config.train.seed}"
