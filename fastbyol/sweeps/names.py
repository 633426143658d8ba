"""Names of axes and points: readable, safe as names of folders, and the same in a larger grid."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from fastbyol.config_io import toml_value

# Upper case is left out: some file systems do not tell it from lower case.
_SAFE = re.compile(r"[a-z0-9._+-]+")
_MOST_VALUE, _MOST_NAME, _DIGEST = 32, 180, 10


def labels(keys: Iterable[str]) -> dict[str, str]:
    """Return the short name of each dotted key: its last part, or all of it where two clash."""
    wanted = tuple(keys)
    counts = Counter(key.rpartition(".")[2] for key in wanted)
    lasts = {key: key.rpartition(".")[2] for key in wanted}
    return {key: last if counts[last] == 1 else key for key, last in lasts.items()}


def point_name(values: Mapping[str, object]) -> str:
    """Return the name of a point, such as ``lr=0.1,weight_decay=1.5e-06``.

    ``values`` are by dotted key, as the configuration has them. Points of the same keys have the
    same name only if their values are the same, whatever the order of the keys.
    """
    short, ordered = labels(values), sorted(values.items())
    name = ",".join(f"{short[key]}={_value_name(value)}" for key, value in ordered)
    whole = "\n".join(f"{key} = {toml_value(value)}" for key, value in ordered)
    return _cut(name, _MOST_NAME, whole)


def text(value: object) -> str:
    """Return a value as people read it: ``0.1``, ``none``, ``encoder.layer1+encoder.layer2``."""
    if isinstance(value, list | tuple):
        return "+".join(map(text, value)) if value else "empty"
    if value is None:
        return "none"
    return value if isinstance(value, str) else toml_value(value)


def _value_name(value: object) -> str:
    name = text(value)
    items = value if isinstance(value, list | tuple) else ()
    is_plain = not any(isinstance(item, list | tuple) or "+" in text(item) for item in items)
    if _SAFE.fullmatch(name) and is_plain and value not in ([], ()):
        return _cut(name, _MOST_VALUE, name)
    safe = re.sub(r"[^a-z0-9._+-]+", "-", name.lower()).strip("-")
    # Never as long as the name may be, so that the digest is always there.
    return _cut(safe.ljust(_MOST_VALUE + 1, "-"), _MOST_VALUE, toml_value(value))


def _cut(name: str, most: int, whole: str) -> str:
    """Return ``name``, or the beginning of a longer one and the digest of ``whole``."""
    if len(name) <= most:
        return name
    digest = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=_DIGEST // 2)
    return f"{name[: most - _DIGEST - 1].rstrip('-')}~{digest.hexdigest()}"
