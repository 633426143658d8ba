"""Where files are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from fastbyol.errors import UsageError


def cache_folder() -> Path:
    """Return ``$FASTBYOL_CACHE``, else ``$XDG_CACHE_HOME/fastbyol``, else ``~/.cache/fastbyol``. UsageError: nobody's home."""
    own = os.environ.get("FASTBYOL_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fastbyol"
    except RuntimeError:  # a user without HOME of whom the system knows no other
        raise UsageError("no home folder: name one for what can be made again with FASTBYOL_CACHE=DIR") from None
