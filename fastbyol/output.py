"""The one way out for text: what goes to a terminal, a pipe or a log never ends the work that it tells of.

Names that others chose are escaped (``text.printable``), and so are characters that the stream's encoding lacks. What can no
longer be written, for a full disk, a closed pipe or a terminal that is gone, is dropped, and that is remembered.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from fastbyol.text import printable, printable_lines

# In less a table shows nothing; the terminal breaks what is longer than its lines.
LEAST_WIDTH = 40


class _Plain(Console):
    """A console that takes every text as it is: no markup, no smileys, escapes for what is not visible."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console(*, err: bool = False) -> Console:
    """Return a console on standard output or, with ``err``, standard error."""
    made = _Plain(stderr=err, markup=False, emoji=False, highlight=False)
    if made.width < LEAST_WIDTH:
        made.width = LEAST_WIDTH
    return made


def is_live(shown: Console) -> bool:
    """Whether ``shown`` is a terminal on which lines can be drawn again, whatever FORCE_COLOR says: a log is none."""
    return shown.file.isatty() and shown.is_terminal and not shown.is_dumb_terminal


def say(*lines: str, err: bool = False) -> None:
    """Print ``lines``, each of which stays one, on standard output or, with ``err``, standard error."""
    print(*map(printable, lines), sep="\n", file=sys.stderr if err else sys.stdout)


def print_json(value: Any) -> None:
    """Print ``value`` as one JSON object in ASCII on standard output; numbers that are not finite become null."""
    print(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class Failures(dict[str, OSError]):
    """Stream ("standard output", "standard error") -> the error from which on nothing more was written to it."""

    def in_words(self) -> str:
        """One line on the first; empty where there is none, or where a reader closed its pipe, which it knows itself."""
        told = next(((name, error) for name, error in self.items() if error.errno != errno.EPIPE), None)
        return f"{told[0]}: cannot write: {told[1].strerror}; from there on what was to be said is lost" if told else ""


class _Sink(io.RawIOBase):
    """A descriptor's file that takes everything and raises nothing."""

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
    """Our log lines stay lines; those of others may be several."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return printable(text) if record.name.partition(".")[0] == "fastbyol" else printable_lines(text)


@contextmanager
def guarded() -> Iterator[Failures]:
    """While entered, ``sys.stdout`` and ``sys.stderr`` take every text and raise nothing; yields what fails meanwhile.

    Standard streams that are closed are /dev/null from here on. Streams that somebody put in their place are left alone.
    What is logged goes to standard error a line at a time.
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
    try:
        yield failures
    finally:
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
    """Take the numbers 0, 1 and 2 where they are free, or the next file that is opened gets what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
