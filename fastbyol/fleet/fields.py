"""The types of fields in JSON files that other processes write, or that were damaged."""

from __future__ import annotations

from collections.abc import Mapping

Types = Mapping[str, tuple[type, ...]]
TEXT, WHOLE, NUMBER, LIST = (str,), (int,), (int, float), (list,)


def fit(content: object, needed: Types, more: Types) -> bool:
    """Return whether ``content`` has all fields ``needed``, and these and ``more`` their types.

    Those of ``more`` may be missing. True and False are no numbers.
    """
    return (
        isinstance(content, dict)
        and needed.keys() <= content.keys()
        and all(
            type(content[name]) in types
            for name, types in {**needed, **more}.items()
            if name in content
        )
    )
