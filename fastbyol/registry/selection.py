"""Which of many runs, and in which order: ``KEY OP VALUE`` and a key to sort by."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastbyol import config_io
from fastbyol.errors import UsageError, nearest
from fastbyol.registry.row import DESCENDING, FIELDS, MEASURES, Row, is_number
from fastbyol.text import printable

_SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_CONDITION = re.compile(r"\s*([^\s=!<>]+)[ \t]*(==|!=|<=|>=|=|<|>)(?![=<>])(.*)", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """One ``--where``: ``sign`` is a key of ``_SIGNS``, and ``text`` the value as typed."""

    key: str
    sign: str
    text: str

    @classmethod
    def parse(cls, typed: str) -> Condition:
        """Return the condition in ``KEY OP VALUE``. Raises UsageError."""
        match = _CONDITION.fullmatch(typed)
        if match is None:
            raise UsageError(
                f"--where {config_io.show(typed)}: expected KEY OP VALUE with one of = != < <= > "
                ">=, such as --where optim.name=lars"
            )
        return cls(match[1], match[2], match[3].strip())

    def holds(self, row: Row) -> bool:
        """Return whether ``row`` meets it.

        The value is read as the row's own kind, as ``--set`` does: a bare word for a text, commas
        for a list, TOML else; ``none`` is no value. Without a value a run is neither less nor more.
        Raises UsageError for an order that the two values do not have.
        """
        actual, is_order = row.value(self.key), self.sign[0] in "<>"
        asked = self._read_as(actual)
        if not is_order:
            return (self.sign == "!=") is not _equal(actual, asked)
        if actual is None:
            return False
        if not _have_order(actual, asked):
            raise UsageError(
                f"--where {config_io.show(f'{self.key}{self.sign}{self.text}')}: no order: "
                f"{self.key} of {row.name} is {config_io.show(actual)}"
            )
        return _SIGNS[self.sign](actual, asked)

    def _read_as(self, actual: object) -> object:
        if self.text == "none" and not isinstance(actual, str):  # which may be the word itself
            return None
        return _read_as(self.text, self._value, actual)

    @cached_property
    def _value(self) -> object:
        return config_io.value_of(self.text)


def _read_as(text: str, value: object, actual: object) -> object:
    """Return ``text``, whose value as TOML is ``value``, as a value of the kind of ``actual``."""
    if isinstance(actual, str):
        return value if text[:1] in ('"', "'") else text
    if isinstance(actual, list) and not isinstance(value, list):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        kinds = [*actual, *[""] * len(parts)]
        return [
            _read_as(part, config_io.value_of(part), kind)
            for part, kind in zip(parts, kinds, strict=False)
        ]
    return value


def _equal(a: object, b: object) -> bool:
    """Return whether two values are the same: 1 is 1.0, but not true."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _have_order(a: object, b: object) -> bool:
    return (is_number(a) and is_number(b)) or (isinstance(a, str) and isinstance(b, str))


def known_keys(rows: Iterable[Row]) -> list[str]:
    """Return every key that a row may be asked for."""
    measured = (name for row in rows for name in row.measures)
    return list(dict.fromkeys((*FIELDS, *MEASURES, *measured, *config_io.keys())))


def check_key(key: str, option: str, rows: Sequence[Row]) -> None:
    """Raise UsageError, with the nearest key, where no row could have ``key``."""
    keys = known_keys(rows)
    if key not in keys:
        inside = next((each for each in keys if each.startswith(f"{key}.")), None)
        near = inside or nearest(key, keys, least=0.0, dotted=True)[0]
        raise UsageError(f"{printable(key)} ({option}): no such key; the nearest is {near}")


def chosen(rows: Sequence[Row], conditions: Sequence[Condition]) -> list[Row]:
    """Return the rows for which all conditions hold. Raises UsageError for an unknown key."""
    for condition in conditions:
        check_key(condition.key, "--where", rows)
    return [row for row in rows if all(condition.holds(row) for condition in conditions)]


def ordered(rows: Sequence[Row], key: str, option: str, *, reverse: bool = False) -> list[Row]:
    """Return the rows by ``key``: measures best first, settings ascending, without a value last.

    Raises UsageError for an unknown key.
    """
    check_key(key, option, rows)
    having = [row for row in rows if row.value(key) is not None]
    having.sort(key=lambda row: _rank(row.value(key)), reverse=(key in DESCENDING) is not reverse)
    return having + [row for row in rows if row.value(key) is None]


def _rank(value: Any) -> tuple[int, Any]:
    """Return what sorts values of several kinds: numbers, then the texts of others."""
    if is_number(value):
        return 0, value
    return 1, value if isinstance(value, str) else config_io.toml_value(value)
