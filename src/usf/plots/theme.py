"""One visual theme for every figure of the book.

Colours follow the model, never the order of plotting, so that a reader who has learnt a colour in chapter 1
recognises it in chapter 8. The categorical colours are Okabe and Ito's palette (distinguishable under the common
colour-vision deficiencies); kinds of one model are shades of its colour. This is the only module of the figures in
which a colour is written down.

Backgrounds are transparent and the ink is a mid grey, so that one file serves the light and the dark page. No grey
reaches a contrast of 4.5:1 on both: the ink does on white, and on the dark page the style sheet brightens the figures
by `DARK_BRIGHTNESS`, after which it does there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.font_manager import get_font_names

COLORS: dict[str, str] = {
    "usf": "#0072B2",  # blue
    "non-usf": "#D55E00",  # vermilion
    "deep-svdd": "#009E73",  # green
    "oracle": "#777777",  # bounds and ground truth
    "normal": "#56B4E9",  # normal samples
    "anomaly": "#CC79A7",  # anomalous samples
    "gin": "#E69F00",  # orange: GIN couplings
    "other": "#962D66",  # wine: what is none of these
}
"""Model or role -> colour. The same key means the same colour in every chapter."""

DENSITY_CMAP = "viridis"
"""Sequential colour map for densities and log-densities."""
INNER_CMAP = LinearSegmentedColormap.from_list("inner", mpl.colormaps[DENSITY_CMAP](np.linspace(0.2, 0.93, 256)))
"""`DENSITY_CMAP` for points: its darkest purple is lost on a dark page, its brightest yellow on a white one."""
DIVERGING_CMAP = "RdBu_r"
"""Diverging colour map for signed quantities (log-volume change)."""
MAP_CMAP = "magma"
"""Sequential colour map for anomaly maps, black where nothing is wrong."""
OVERLAY_CMAP = "inferno"
"""The same where the map lies over its photograph."""
MASK_CMAP = "gray"
"""Ground truth: white where the defect is."""

INK = "#767676"
"""Text, axes and everything that belongs to no model."""
PAPER = "white"
"""Lines on photographs and maps, where the ink would be lost."""
OUTLINE = (0, 229, 255)
"""Outline over an anomaly map, red, green and blue up to 255: a hue that neither map nor photographs have."""
DARK_BRIGHTNESS = 1.25
"""Factor by which ``book/_static/book.css`` brightens figures on the dark page."""

_FAMILIES = ("Liberation Sans", "Arial", "Helvetica", "DejaVu Sans")
FONTS = [name for name in _FAMILIES if name in get_font_names()]
"""What the pages have or what has the same widths, where installed; DejaVu, which always is, has the missing glyphs."""

_RC: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.bbox": "tight",
    "font.family": FONTS,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "usf",
}


def shades(key: str, count: int) -> list[str]:
    """``count`` shades of a model's colour, from itself to a light tint, for kinds of one model.

    Args:
        key: of `COLORS`.
        count: at least 1.

    >>> shades("usf", 3)[0] == COLORS["usf"].lower(), len(set(shades("usf", 3)))
    (True, 3)
    """
    base = np.array(to_rgb(COLORS[key]))
    return [to_hex(base + (1 - base) * share) for share in np.linspace(0, 0.55, count)]


def use() -> None:
    """Make the theme the default of this process; a chapter calls it once, in its first cell.

    >>> import matplotlib as mpl
    >>> use(); mpl.rcParams["axes.spines.top"]
    False
    """
    mpl.rcParams.update(_RC)
    with contextlib.suppress(ImportError, NameError):
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # Lines and text as vectors; clouds of points and images inside them are pixels, finer than a plain screen's.
        # The same figure gives the same file: without the date, and see ``svg.hashsalt``.
        set_matplotlib_formats("svg", dpi=150, metadata={"Date": None})


@contextlib.contextmanager
def theme() -> Iterator[None]:
    """The theme for the length of a ``with`` block; figures made inside keep it."""
    with mpl.rc_context(_RC):
        yield
