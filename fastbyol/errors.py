"""Errors of one line that say what, where and what to do, with their exit codes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from pathlib import Path


class FastbyolError(Exception):
    """A failure with a one-line message.

    The command line prints the message before it exits with ``exit_code``.
    """

    exit_code = 1
    # Whether all ranks of a run raise it, so that one has to say it.
    is_of_all = False
    # Whether this rank was the first of its machine to leave its exit code; None before that.
    is_claimed: bool | None = None


class UsageError(FastbyolError):
    """Wrong input: a flag, a key, a value, a file. Nothing was changed."""

    exit_code = 2


class CollapsedError(FastbyolError):
    """A representation that collapsed in a run that stops on collapse."""

    exit_code = 3


class LostRankError(FastbyolError):
    """A rank that the others wait for in vain: its process or thread has ended."""


class NoGraphError(FastbyolError):
    """A CUDA graph that could not be recorded.

    The attempt leaves the process unsafe, so a fresh one continues the run, compiled. ``run`` is
    the run's folder, which stores that choice.
    """

    def __init__(self, message: str, run: Path | None = None) -> None:
        super().__init__(message)
        self.run = run


def one_line(error: BaseException, most: int | None = 200) -> str:
    """Return a library's error in one line of at most ``most`` letters.

    If it has no message, its type is returned.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


def quoted(path: Path) -> str:
    """Return a path as a shell reads it, for commands that messages suggest."""
    return shlex.quote(str(path))


def size_text(num_bytes: int) -> str:
    """Return a size in the unit that fits it, of powers of 1000: 12.3 MB, 123 MB, 1.2 GB."""
    size, unit = float(num_bytes), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if abs(size) >= 99.95 or unit == "bytes" else f"{size:.1f} {unit}"


def check_choice(what: str, word: object, choices: Iterable[str]) -> None:
    """Raise ``UsageError`` unless ``word``, the value of ``what``, is one of ``choices``.

    The message names the choices and the nearest one.
    """
    words = tuple(choices)
    if not isinstance(word, str) or word not in words:
        hint = "".join(f"; the nearest is {near}" for near in nearest(str(word), words, least=0.5))
        raise UsageError(f"{what}: {word!r} is none of {', '.join(words)}{hint}")


def nearest(
    word: str, choices: Iterable[str], *, most: int = 1, least: float = 0.3, dotted: bool = False
) -> list[str]:
    """Return up to ``most`` of ``choices`` that are spelled most like ``word``.

    The most alike comes first. Likeness is difflib's ratio in [0, 1], whatever the case; below
    ``least`` a choice is left out. With ``dotted`` the last parts of dotted names are compared too,
    and the mean counts.
    """

    def ratio(a: str, b: str) -> float:
        return SequenceMatcher(None, a.lower(), b.lower()).ratio()

    def likeness(choice: str) -> float:
        whole = ratio(word, choice)
        return (
            (whole + ratio(word.rpartition(".")[2], choice.rpartition(".")[2])) / 2
            if dotted
            else whole
        )

    scored = {choice: likeness(choice) for choice in choices}
    return sorted(
        (choice for choice in scored if scored[choice] >= least),
        key=scored.__getitem__,
        reverse=True,
    )[:most]


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error``, the error that led to it, and so on."""
    reason: BaseException | None = error
    while reason is not None:
        yield reason
        reason = reason.__cause__ or reason.__context__
