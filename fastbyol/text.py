"""Text that others chose, such as names of files and classes, as it may be shown: on one line, and nothing but letters."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return ``text`` with Python's escape (``\x1b``, ``\n``, ``\udce9``) for each character that is no visible one.

    Those are what moves a terminal's cursor or colours, ends a line, turns the direction of reading, and the halves of
    surrogate pairs by which Python names files whose names are not UTF-8, and which no encoding takes.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    """``printable`` of each line of ``text``, with its line ends and tabs as they are."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
