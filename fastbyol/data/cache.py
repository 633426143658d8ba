"""Where files are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$FASTBYOL_CACHE``, else ``$XDG_CACHE_HOME/fastbyol``, else ``~/.cache/fastbyol``."""
    own = os.environ.get("FASTBYOL_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastbyol"
