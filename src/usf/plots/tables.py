"""A table of numbers in the style of the pages."""

from __future__ import annotations

import html
import math

import pandas as pd
from pandas.io.formats.style import Styler

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def significant(value: float | None, digits: int = 3) -> str:
    """A number as people write it: so many significant digits, large and small ones as powers of ten.

    Args:
        value: a number; ``None`` and what is not a number are a dash.
        digits: significant ones.

    >>> [significant(x) for x in (54.5533, 0.0123456, 3456, 0, None, float("inf"))]
    ['54.6', '0.0123', '3460', '0', '–', '∞']
    >>> [significant(x, n).replace("\N{NO-BREAK SPACE}", " ") for x, n in ((545533.0, 3), (-2.5e-7, 2), (1.04e12, 1))]
    ['5.46 × 10⁵', '-2.5 × 10⁻⁷', '10¹²']
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    exponent = int(power)
    if value == 0 or -4 <= exponent < max(digits, 4):
        text = f"{float(f'{value:.{digits - 1}e}'):.{max(digits - 1 - exponent, 0)}f}"
        return text if value else "0"
    ten = f"10{str(exponent).translate(_RAISED)}"
    return {"1": ten, "-1": f"-{ten}"}.get(mantissa, f"{mantissa}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{ten}")


def show(table: pd.DataFrame, *, precision: int = 3, caption: str | None = None, index: bool = False) -> Styler:
    """A data frame for display: rounded, captioned, without its index unless asked for.

    Args:
        precision: digits after the decimal point.
        caption: one sentence on what the rows are, plain text.
        index: whether the row labels say something.

    >>> "<span>n &lt; 3</span>" in show(pd.DataFrame({"n": [1, 2]}), caption="n < 3").to_html()
    True
    """
    # The class makes the theme treat it like any data frame, in the dark too; pandas leaves it out of styled tables.
    styler = table.style.format(precision=precision, na_rep="–").set_table_attributes('class="dataframe"')
    styler = styler.set_table_styles([{"selector": "th, td", "props": "padding: 0.15em 0.5em"}])
    if not index:
        styler = styler.hide(axis="index")
    # The span lets the pages keep the caption in view where the table is wider than the column.
    return styler if caption is None else styler.set_caption(f"<span>{html.escape(caption, quote=False)}</span>")
