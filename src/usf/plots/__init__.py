"""Every figure of the book, one function each, in one visual theme.

Needs the ``book`` extra (matplotlib, seaborn).
"""

from usf.plots.theme import COLORS, DENSITY_CMAP, DIVERGING_CMAP, shades, theme, use

__all__ = ["COLORS", "DENSITY_CMAP", "DIVERGING_CMAP", "shades", "theme", "use"]
