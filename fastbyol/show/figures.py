"""The style of all pictures and HTML pages: colours, figures as SVG, templates."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fastbyol.errors import UsageError
from fastbyol.text import printable_lines

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure

# Without a home that can be written matplotlib tells of it at every import, and works.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

# Colours of the Okabe-Ito palette, which colour-blind readers can tell apart (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
)
DARK_STATES = ("#6b2f27", "#5f4a1c", "#1f4a61", "#555555")
STATE_COLOURS = {
    "collapsed": "#f7d6d0",
    "collapsing": "#fcebc8",
    "recovering": "#d5eaf5",
    "dead": "#cfcfcf",
}
# Stand for black and white in an SVG. In a page they become the colours of its text and its paper,
# also on a dark page.
INK, PAPER = "#010203", "#fefdfc"

# Each colour of a picture is a CSS variable of the page: name -> (on a light page, on a dark page).
PALETTE: Mapping[str, tuple[str, str]] = {
    "blue": (BLUE, "#4aa8e0"),
    "orange": (ORANGE, "#f0b030"),
    "green": (GREEN, "#2fc79b"),
    "red": (RED, "#ff8a4a"),
    "purple": (PURPLE, "#e0a0c4"),
    "sky": (SKY, "#7cc8f4"),
    **{state: (light, dark) for (state, light), dark in zip(STATE_COLOURS.items(), DARK_STATES,
    strict=True)},
}  # fmt: skip

# Text that stays text keeps a picture small and takes the reader's fonts. With a fixed salt equal
# pictures are equal files.
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastbyol",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def available() -> bool:
    """Return whether matplotlib, an optional dependency, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def demand(what: str = "report") -> None:
    """Raise UsageError if matplotlib, which draws ``what``, is missing."""
    if not available():
        raise UsageError(f"{what}: matplotlib is not installed: pip install 'fastbyol[report]'")


def settings() -> Any:
    """Return a context with the style of all pictures. Both drawing and ``svg`` need it."""
    import matplotlib as mpl

    return mpl.rc_context(_SETTINGS)


def blank(width: float, height: float, **options: Any) -> Figure:
    """Return an empty figure of ``width`` by ``height`` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", **options)


def svg(figure: Figure) -> Markup:
    """Return a figure as an SVG element that takes its colours from the page around it."""
    from markupsafe import Markup

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    # matplotlib numbers groups anew in every figure: in one page these ids would clash. Nothing
    # refers to them.
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    for name, (colour, _) in PALETTE.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text)


def viridis(count: int) -> Sequence[Any]:
    """Return ``count`` colours from dark to light."""
    import numpy as np
    from matplotlib import colormaps

    return [colormaps["viridis"](value) for value in np.linspace(0.0, 0.92, max(count, 1))][:count]


@cache
def _templates(package: str) -> Environment:
    """Return the templates of ``package`` and those of this package, which they extend."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("fastbyol.show")]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip


def page(template: str, package: str = "fastbyol.show", **values: Any) -> str:
    """Return the HTML page that ``template`` makes of ``values``.

    It loads nothing. Only the pages of many runs and of ``watch`` have scripts, whose digests their
    policies name.
    """
    text = _templates(package).get_template(template).render(palette=PALETTE, **values)
    # Control characters and surrogates become visible escapes, in pictures and attributes too.
    return printable_lines(text)


def source_of(content: str) -> str:
    """Return what a page's Content-Security-Policy calls an inline script or style: its digest."""
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
