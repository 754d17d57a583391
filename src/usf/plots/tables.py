"""A table of numbers in the style of the pages."""

from __future__ import annotations

import pandas as pd
from pandas.io.formats.style import Styler


def show(table: pd.DataFrame, *, precision: int = 3, caption: str | None = None, index: bool = False) -> Styler:
    """A data frame for display: rounded, captioned, without its index unless asked for.

    Args:
        precision: digits after the decimal point.
        caption: one sentence on what the rows are.
        index: whether the row labels say something.
    """
    # The class makes the theme treat it like any data frame, in the dark too; pandas leaves it out of styled tables.
    styler = table.style.format(precision=precision).set_table_attributes('class="dataframe"')
    styler = styler.set_table_styles([{"selector": "th, td", "props": "padding: 0.15em 0.6em"}])
    if not index:
        styler = styler.hide(axis="index")
    return styler if caption is None else styler.set_caption(caption)
