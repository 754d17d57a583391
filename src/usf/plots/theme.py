"""One visual theme for every figure of the book.

Colours follow the model, never the order of plotting, so that a reader who has learnt a colour in chapter 1
recognises it in chapter 8. The categorical colours are Okabe and Ito's palette (distinguishable under the common
colour-vision deficiencies). Backgrounds are transparent and the ink is a mid grey that keeps a contrast of at least
4.5:1 on the light and on the dark page, so that one file serves both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl

COLORS: dict[str, str] = {
    "usf": "#0072B2",  # blue
    "non-usf": "#D55E00",  # vermilion
    "deep-svdd": "#009E73",  # green
    "oracle": "#777777",  # bounds and ground truth
    "normal": "#56B4E9",  # normal samples
    "anomaly": "#CC79A7",  # anomalous samples
    "gin": "#E69F00",  # orange: GIN couplings
}
"""Model or role -> colour. The same key means the same colour in every chapter."""

DENSITY_CMAP = "viridis"
"""Sequential colour map for densities and log-densities."""
DIVERGING_CMAP = "RdBu_r"
"""Diverging colour map for signed quantities (log-volume change)."""

INK = "#767676"

_RC: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.bbox": "tight",
    "font.family": "sans-serif",
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


def use() -> None:
    """Make the theme the default of this process; a chapter calls it once, in its first cell.

    >>> import matplotlib as mpl
    >>> use(); mpl.rcParams["axes.spines.top"]
    False
    """
    mpl.rcParams.update(_RC)
    with contextlib.suppress(ImportError, NameError):
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # Raster at twice the density: sharp on high-resolution screens, and small for scatter plots.
        set_matplotlib_formats("retina")


@contextlib.contextmanager
def theme() -> Iterator[None]:
    """The theme for the length of a ``with`` block; figures made inside keep it."""
    with mpl.rc_context(_RC):
        yield
