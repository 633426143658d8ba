"""What goes wrong on purpose: one line that says what, where and what to do, and the exit code that belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from pathlib import Path


class FastbyolError(Exception):
    """A failure with a one-line message. The command line prints it without a traceback and exits with ``exit_code``."""

    exit_code = 1


class UsageError(FastbyolError):
    """The caller's input is wrong: a flag, a key, a value, a file. Nothing was changed."""

    exit_code = 2


class CollapsedError(FastbyolError):
    """The representation collapsed and the run was asked to stop then."""

    exit_code = 3


class NoGraphError(FastbyolError):
    """No CUDA graph could be recorded, and what that leaves in a process is unsafe: the run goes on in a fresh one, compiled.

    ``run`` is the run's folder, in which that choice is kept.
    """

    def __init__(self, message: str, run: Path | None = None) -> None:
        super().__init__(message)
        self.run = run


def one_line(error: BaseException, most: int | None = 200) -> str:
    """Return what an error of a foreign library says in one line of at most ``most`` letters, or its type."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def size_text(num_bytes: int) -> str:
    """A size for a message in the unit that fits it (bytes, kB, MB, GB, TB, powers of 1000): 12.3 MB, 123 MB, 1.2 GB."""
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


def nearest(word: str, choices: Iterable[str], *, most: int = 1, least: float = 0.3, dotted: bool = False) -> list[str]:
    """Return up to ``most`` of ``choices`` that are spelled most like ``word``, the most alike first.

    Likeness is difflib's ratio in [0, 1], whatever the case; below ``least`` a choice is left out.
    With ``dotted`` the last parts of dotted names are compared too, and the mean counts.
    """

    def ratio(a: str, b: str) -> float:
        return SequenceMatcher(None, a.lower(), b.lower()).ratio()

    def likeness(choice: str) -> float:
        whole = ratio(word, choice)
        return (whole + ratio(word.rpartition(".")[2], choice.rpartition(".")[2])) / 2 if dotted else whole

    scored = {choice: likeness(choice) for choice in choices}
    return sorted((choice for choice in scored if scored[choice] >= least), key=scored.__getitem__, reverse=True)[:most]


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and, one after the other, the errors that led to it."""
    reason: BaseException | None = error
    while reason is not None:
        yield reason
        reason = reason.__cause__ or reason.__context__
