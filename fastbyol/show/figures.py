"""How pictures look: colours, SVG that takes the page's colours and fonts, and the style of a self-contained HTML page."""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastbyol.errors import UsageError
from fastbyol.text import printable_lines

# Colours of the Okabe-Ito palette, which colour-blind readers can tell apart (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
DARK_STATES = ("#6b2f27", "#5f4a1c", "#1f4a61", "#555555")
STATE_COLOURS = {"collapsed": "#f7d6d0", "collapsing": "#fcebc8", "recovering": "#d5eaf5", "dead": "#cfcfcf"}
# What an SVG says instead of black: in a page it becomes the text's own colour, to be read on a dark page too.
INK = "#010203"

# Each colour of a picture is a variable of the page: name -> (colour, on a dark page).
PALETTE: Mapping[str, tuple[str, str]] = {
    "blue": (BLUE, "#4aa8e0"),
    "orange": (ORANGE, "#f0b030"),
    "green": (GREEN, "#2fc79b"),
    "red": (RED, "#ff8a4a"),
    "purple": (PURPLE, "#e0a0c4"),
    "sky": (SKY, "#7cc8f4"),
    **{state: (light, dark) for (state, light), dark in zip(STATE_COLOURS.items(), DARK_STATES, strict=True)},
}  # fmt: skip

# Text as text keeps a picture small and takes the reader's fonts; a fixed salt makes equal pictures equal files.
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastbyol",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
_NOTHING_TO_TELL = dict.fromkeys(("Date", "Creator", "Format", "Type"))

STYLE = (
    ":root{color-scheme:light dark;--ink:#222;--paper:#fff;--panel:#f6f6f6;--rule:#ddd;"
    + "".join(f"--{name}:{light};" for name, (light, _) in PALETTE.items())
    + "}@media(prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#16181b;--panel:#22252a;--rule:#3a3e45;"
    + "".join(f"--{name}:{dark};" for name, (_, dark) in PALETTE.items())
    + """}}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem;color:var(--ink);background:var(--paper)}
svg{width:100%;height:auto}table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left}
pre{background:var(--panel);padding:.8rem;overflow-x:auto;font-size:.8rem}h2{font-size:1.1rem;margin:1.6rem 0 .2rem}
.key span{padding:0 .5rem;margin-right:.4rem;white-space:nowrap}
"""
)


def available() -> bool:
    """Whether matplotlib, an optional dependency, is there."""
    return importlib.util.find_spec("matplotlib") is not None


def demand() -> None:
    """Raises UsageError where matplotlib is missing."""
    if not available():
        raise UsageError("report: matplotlib is not installed: pip install 'fastbyol[report]'")


def settings() -> Any:
    """A context in which figures get the house's looks; drawing and ``svg`` both belong in it."""
    import matplotlib as mpl

    return mpl.rc_context(_SETTINGS)


def svg(made: Any) -> str:
    """A figure as an SVG element for a page that has ``STYLE``: its colours and its ink are the page's."""
    buffer = io.StringIO()
    made.savefig(buffer, format="svg", metadata=_NOTHING_TO_TELL)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Groups are numbered anew in every figure; in one page these names would clash, and nothing refers to them.
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    for name, (colour, _) in PALETTE.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def viridis(count: int) -> Sequence[Any]:
    """``count`` colours from dark to light."""
    import numpy as np
    from matplotlib import colormaps

    return [colormaps["viridis"](value) for value in np.linspace(0.0, 0.92, max(count, 1))][:count]


def page(title: str, style: str, body: str) -> str:
    """A whole HTML page without script or network, of characters that are visible and that UTF-8 has: others are escaped."""
    return printable_lines(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{style}</style></head>'
        f"<body>{body}</body></html>\n"
    )
