"""What goes wrong on purpose: one line that says what, where and what to do, and the exit code that belongs to it."""

from __future__ import annotations


class FastbyolError(Exception):
    """A failure with a one-line message. The command line prints it without a traceback and exits with ``exit_code``."""

    exit_code = 1


class UsageError(FastbyolError):
    """The caller's input is wrong: a flag, a key, a value, a file. Nothing was changed."""

    exit_code = 2


class CollapsedError(FastbyolError):
    """The representation collapsed and the run was asked to stop then."""

    exit_code = 3
