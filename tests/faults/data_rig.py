"""Readers in a child process, so that a signal or a hang is seen and its damage is known.

A child answers after each number; where it dies, the next child continues behind that number.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import run_rig as rig
from mutations import Base, mutated, mutated_manifest, read_by_hand
from numpy.typing import NDArray
from own_time import OwnTime

from fastbyol.cli import main
from fastbyol.data import decoder as decoding
from fastbyol.data import loader as loading
from fastbyol.data import prefetch
from fastbyol.data.verify import verify
from fastbyol.errors import UsageError

SIZE = 16
# Seconds of the child's own time: a user would wait no longer. All of it takes a fraction of one.
HANG_S = 10.0
# Importing and compiling: six seconds alone, more on a busy machine.
START_S = 900.0
PER_CHILD = 500
Delivered = tuple[NDArray[np.uint8], list[int] | None]


@dataclass(frozen=True)
class Fault:
    """A mutation with a wrong answer."""

    number: int
    kind: str
    what: str


def work(
    source: str,
    bases: list[Base],
    numbers: Sequence[int],
    folder: Path,
    pipe: Connection,
    *,
    decoder: str = "auto",
) -> None:
    """For each number damage a base, read it by every way and send (number, kind, outcome)."""
    chosen = decoding.choose(decoder)
    decoding.choose = lambda _: chosen
    prefetch.STALL_S = START_S
    make = {"files": mutated, "manifests": mutated_manifest}[source]
    whole: dict[str, Delivered] = {}
    for base in bases:
        (folder / "whole.beton").write_bytes(base.data)
        whole[base.name] = streamed(folder / "whole.beton", 0)
    pipe.send("ready")
    for number in numbers:
        base, kind, data = make(bases, number)
        path = folder / "damaged.beton"
        path.write_bytes(data)
        pipe.send((number, kind, base.name, outcome(path, data, base, whole[base.name], number)))
    pipe.send("done")


def outcome(path: Path, data: bytes, base: Base, whole: Delivered, number: int) -> str:
    """Return ``refused``, ``the same``, ``as it says``, or what was wrong, capitalised."""
    answers = {
        _answer(way, path, data, base, whole)
        for way in (lambda: resident(path), lambda: streamed(path, number))
    }
    checked = (
        _command(path)
        if number % 8 == 0
        else _answer(lambda: verify(path, deep=True).demand_whole(), path, data, base, whole)
    )
    if len(answers) > 1:
        return f"Ways differ: {sorted(answers)}"
    answer = answers.pop()
    if base.sealed and answer == "as it says":
        return "Sealed, and yet other data was delivered"
    # A whole file may hold damage where no sample lies, but what a reader refuses must not be
    # verified.
    if checked not in ("refused", "") or (answer == "refused") != (checked == "refused"):
        return (
            f"Verify says {checked!r} where reading was {answer}"
            if checked in ("refused", "")
            else checked
        )
    return answer


def _answer(
    way: Callable[[], object], path: Path, data: bytes, base: Base, whole: Delivered
) -> str:
    try:
        delivered = way()
    except UsageError as error:
        line = str(error)
        return (
            "refused"
            if "\n" not in line and line.startswith(str(path)) and ";" in line
            else f"Poor message: {line!r}"
        )
    except Exception as error:
        return f"Raised {type(error).__name__}: {error}"
    return "" if delivered is None else judged(delivered, data, base, whole)


def judged(delivered: object, data: bytes, base: Base, whole: Delivered) -> str:
    """Compare the data with the good file, or else with the damaged file's own bytes."""
    images, labels = delivered  # type: ignore[misc]
    if images.shape == whole[0].shape and (images == whole[0]).all() and labels == whole[1]:
        return "the same"
    try:
        content = read_by_hand(data)
        wanted = content.decoded(SIZE, exact=decoding.choose("auto") == "torchvision")
    except Exception as error:
        return f"Delivered what cannot be read by hand ({type(error).__name__}: {error})"
    if wanted.shape != images.shape or content.labels != labels:
        return "Other labels, sizes or number than the file says"
    return "as it says" if (wanted == images).all() else "Other pixels than the file says"


def resident(path: Path) -> Delivered:
    images, labels, _ = loading.read_all(path, workers=1, size=SIZE)
    return images.numpy(), None if labels is None else labels.tolist()


def streamed(path: Path, number: int) -> Delivered:
    """Read an epoch in batches and sort it; odd numbers stream from the file."""
    before = loading._fits_in_memory
    if number % 2:
        loading._fits_in_memory = lambda info, size: False
    try:
        with loading.open_loader(
            path, batch_size=1, seed=0, device="cpu", cache="none", workers=1, size=SIZE
        ) as batches:
            by_id = {int(batch.ids): batch.images[0].numpy() for batch in batches.epoch(0)}
            labels = batches._decoder.info.labels  # type: ignore[attr-defined]
    finally:
        loading._fits_in_memory = before
    return np.stack(
        [by_id[k] for k in range(len(by_id))]
    ), None if labels is None else labels.tolist()


def _verified(path: Path) -> None:
    verify(path, deep=True).demand_whole()


def command(*arguments: str) -> tuple[object, list[str]] | str:
    """Run ``fastbyol``; return its exit code and lines on standard error, or what was wrong."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["fastbyol", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main()
    except SystemExit as ended:
        return ended.code, err.getvalue().splitlines()
    except Exception as error:
        return f"Command raised {type(error).__name__}: {error}"
    finally:
        sys.argv = before
    return "Command did not exit"


def is_refusal(code: object, lines: list[str]) -> bool:
    """Return whether a command ended with exit code 2 and one line."""
    return code == 2 and len(lines) == 1 and lines[0].startswith("fastbyol: error: ")


def _command(path: Path) -> str:
    """Run ``fastbyol data verify --deep``, which must exit with 0, or with 2 and one line."""
    ended = command("data", "verify", str(path), "--deep")
    if isinstance(ended, str):
        return ended
    code, lines = ended
    if code == 0:
        return "" if not lines else f"Said {lines} and exit code 0"
    return "refused" if is_refusal(code, lines) else f"Exit code {code}, {lines}"


def run(
    source: str,
    bases: list[Any],
    numbers: Sequence[int],
    target: Callable[..., None] = work,
    hang_s: float = HANG_S,
) -> tuple[Counter[tuple[str, str]], list[Fault]]:
    """Count (kind of damage, outcome) and list the faults; a death or hang costs its number only.

    ``target`` is a child's function, ``bases`` its argument, ``hang_s`` its limit for a number.
    """
    counts: Counter[tuple[str, str]] = Counter()
    faults: list[Fault] = []
    left = list(numbers)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        while left:
            _one_child(target, hang_s, source, bases, left, Path(folder), counts, faults)
            print(
                f"{source}: {len(numbers) - len(left)} of {len(numbers)}, {len(faults)} faults",
                flush=True,
            )
    return counts, faults


def _one_child(
    target: Callable[..., None],
    hang_s: float,
    source: str,
    bases: list[Any],
    left: list[int],
    folder: Path,
    counts: Counter[tuple[str, str]],
    faults: list[Fault],
) -> None:
    ours, theirs = rig.PROCESSES.Pipe()
    child = rig.PROCESSES.Process(
        target=target, args=(source, bases, left[:PER_CHILD], folder, theirs)
    )
    child.start()
    theirs.close()
    assert child.pid is not None
    patience = START_S
    try:
        while OwnTime(child.pid).waits(ours.poll, patience):
            message = ours.recv()
            patience = hang_s
            if message == "done":
                return
            if message == "ready":
                continue
            number, kind, base, answer = message
            assert left.pop(0) == number
            counts[
                f"{base}, {kind.partition('+')[0]}", answer if not answer[0].isupper() else "FAULT"
            ] += 1
            if answer[0].isupper():
                faults.append(Fault(number, f"{base}, {kind}", answer))
        faults.append(Fault(left.pop(0), "?", f"nothing for {patience} s of its own"))
    except EOFError:
        child.join()
        faults.append(Fault(left.pop(0), "?", f"the child died: {child.exitcode}"))
    finally:
        child.kill()
        child.join()
        ours.close()
