"""Text from outside, such as names of files and classes, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return ``text`` with Python's escape for each invisible character.

    Such escapes are ``\x1b``, ``\n`` and ``\udce9``. Invisible characters move a terminal's cursor,
    change its colours, end a line or reverse the reading direction. Lone surrogates, which Python
    uses in file names that are not UTF-8, are escaped too: no encoding can write them.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def printable_lines(text: str) -> str:
    """Return ``text`` with each line ``printable``, keeping line ends and tabs."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def utf8(text: str) -> str:
    """Return ``text`` with a visible escape for each lone surrogate, which UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()
