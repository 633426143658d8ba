"""All printing: a terminal, pipe or log that fails never ends the work.

Text from outside is escaped (``text.printable``), as are characters that the stream's encoding
lacks. After a full disk, a closed pipe or a lost terminal, output is dropped and the error
recorded.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from fastbyol.text import printable, printable_lines

# A narrower table shows nothing. The terminal wraps longer lines.
LEAST_WIDTH = 40
# Longer cells push the others of their line aside, not those of all lines.
_WIDEST = 60


class _Plain(Console):
    """A console that prints text literally: no markup, no emoji, invisible characters escaped."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console(*, err: bool = False) -> Console:
    """Return a console on standard output or, with ``err``, standard error."""
    made = _Plain(stderr=err, markup=False, emoji=False, highlight=False)
    if made.width < LEAST_WIDTH:
        made.width = LEAST_WIDTH
    return made


def is_live(shown: Console) -> bool:
    """Return True if ``shown`` is a terminal that can redraw lines, whatever FORCE_COLOR says."""
    return shown.file.isatty() and shown.is_terminal and not shown.is_dumb_terminal


def say(*lines: str, err: bool = False) -> None:
    """Print ``lines``, each on one line, on standard output or, with ``err``, standard error."""
    print(*map(printable, lines), sep="\n", file=sys.stderr if err else sys.stdout)


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print lines of equal length in columns. The terminal wraps what is too wide for it."""
    cells = [[printable(cell) for cell in line] for line in lines]
    widths = [min(max(map(cell_len, column)), _WIDEST) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)
        )
        say("  ".join(padded).rstrip())


@contextmanager
def bar(shown: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the body runs; yield what moves it, by (done, total). Logs have none."""
    if not is_live(shown):
        yield lambda *_: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), Left())
    with Progress(*columns, console=shown, transient=True) as drawn:
        task = drawn.add_task("", total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


@contextmanager
def announced(what: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Show on standard error what a command does before its own work; show nothing in a library.

    Yield what moves the bar that a terminal has, and what prints the line at the end. A log has
    ``what`` as a line at the beginning.
    """
    if not _Guard.depth:
        yield (lambda *_: None), (lambda _: None)
        return
    shown = console(err=True)
    if not is_live(shown):
        say(what, err=True)
    with bar(shown, what) as progress:
        yield progress, lambda line: shown.print(line, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON in ASCII on standard output.

    Numbers that are not finite become null.
    """
    print(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def print_result(
    result: dict[str, Any], in_words: Callable[[dict[str, Any]], Sequence[str]], *, as_json: bool
) -> None:
    """Print a ``result`` as JSON or ``in_words``, and its ``notes`` on standard error before it."""
    for note in result["notes"]:
        say(note, err=True)
    if as_json:
        print_json(result)
    else:
        say(*in_words(result))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class _Guard:
    """The number of commands that run in this process, with their output guarded."""

    depth = 0


class Failures(dict[str, OSError]):
    """The error after which nothing more was written, by stream:

    "standard output", "standard error".
    """

    def in_words(self) -> str:
        """Describe the first error in one line.

        A closed pipe does not count: its reader left by choice.
        """
        for name, error in self.items():
            if error.errno != errno.EPIPE:
                return f"{name}: cannot write: {error.strerror}; the rest of the output is lost"
        return ""


class _Sink(io.RawIOBase):
    """A file that accepts everything and never raises, over a descriptor."""

    def __init__(self, descriptor: int, name: str, failures: Failures) -> None:
        self._descriptor, self._name, self._failures = descriptor, name, failures

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        size = rest = len(view := memoryview(data))
        while rest and self._name not in self._failures:
            try:
                rest -= os.write(self._descriptor, view[size - rest :])
            except BlockingIOError:  # another process made the terminal so
                select.select((), (self._descriptor,), ())
            except OSError as error:
                self._failures[self._name] = error
        return size


class _OneLine(logging.Formatter):
    """A formatter that keeps fastbyol's records on one line; other libraries' may have several."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return (
            printable(text)
            if record.name.partition(".")[0] == "fastbyol"
            else printable_lines(text)
        )


@contextmanager
def guarded() -> Iterator[Failures]:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that never raise.

    Their failures are yielded. Closed standard streams become /dev/null. Streams that the caller
    has replaced are left alone. Log records go to standard error, one line each.
    """
    _open_closed()
    last_resort = logging.lastResort
    format_before = last_resort.formatter if last_resort is not None else None
    if last_resort is not None:
        last_resort.setFormatter(_OneLine())
    before, failures = (sys.stdout, sys.stderr), Failures()
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(1, "standard output", failures, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, "standard error", failures, sys.stderr)
    _Guard.depth += 1
    try:
        yield failures
    finally:
        _Guard.depth -= 1
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        if last_resort is not None:
            last_resort.setFormatter(format_before)


def _stream(descriptor: int, name: str, failures: Failures, before: Any) -> io.TextIOWrapper:
    if before is not None:  # None: it was closed when Python began
        before.flush()
    encoding = before.encoding if before is not None else "utf-8"
    buffer = io.BufferedWriter(_Sink(descriptor, name, failures))
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)


def _open_closed() -> None:
    """Open /dev/null at 0, 1 and 2 where they are free.

    The next file that is opened would get the output otherwise.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
