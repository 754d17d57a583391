"""The result at a glance: three small figures for the first page, beside each other or, on a phone, in a column.

All that is drawn comes from committed records, from the paper's tables, or from a closed form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator
from scipy import stats

from usf.oneclass import homogeneous_limit
from usf.plots.theme import COLORS, INK
from usf.study import paper, tables
from usf.study.schema import Record
from usf.study.tables import Cell, Key

__all__ = ["areas", "common", "order_by_norm", "pairs", "reversed_by_training"]

SIZE = (2.5, 2.9)
"""Inches: a third of the page, and less than the width of a phone."""
TEXT: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
NAMES = {"usf": "USF", "non-usf": "affine flow", "deep-svdd": "Deep SVDD"}


def _panel(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    with mpl.rc_context(TEXT):
        return plt.subplots(figsize=(SIZE[0], height))


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    figure.legend(
        handles=handles, loc="outside upper center", ncols=2, handlelength=1.3, handletextpad=0.4,
        columnspacing=0.9, fontsize=TEXT["legend.fontsize"],
    )  # fmt: skip


def order_by_norm(best: Sequence[Mapping[str, Any]]) -> Figure:
    """Rank correlation of latent norm and minus log-density over the dimension: all test points, and the rarest 5 %.

    Args:
        best: the selected trials, from :func:`usf.study.mixtures.summary`.
    """
    figure, axis = _panel()
    dims = sorted({int(row["dim"]) for row in best})
    for model, name in NAMES.items():
        rows = {int(row["dim"]): row for row in best if row["model"] == model}
        for column, style, marker in (("spearman", "-", "o"), ("spearman_tail", ":", "")):
            values = [rows[dim][column] if dim in rows else np.nan for dim in dims]
            label = name if marker else None
            axis.plot(range(len(dims)), values, style, marker=marker, ms=4, color=COLORS[model], label=label)
    axis.axhline(0, color=INK, lw=0.7)
    axis.set_xticks(range(len(dims)), [str(dim) for dim in dims])
    axis.set(xlabel="dimension of the mixture", ylabel="rank correlation", ylim=(None, 1.05))
    _legend(figure, [*axis.get_legend_handles_labels()[0], Line2D([], [], color=INK, ls=":", label="rarest 5 %")])
    return figure


def reversed_by_training(dim: int = 2) -> Figure:
    """Score against the distance from the mode of N(0, I_d): where training drives Deep SVDD, and the USF.

    Both are divided by their mean. Shaded: where Deep SVDD calls the likelier point the more anomalous one.
    """
    figure, axis = _panel()
    limit, law = homogeneous_limit(dim), stats.chi(dim)
    r = np.linspace(0, float(law.ppf(0.995)), 300)
    axis.axvspan(0, limit.radius, color=COLORS["deep-svdd"], alpha=0.15, lw=0)
    axis.plot(r, limit.score(r) / limit.loss, color=COLORS["deep-svdd"], label=NAMES["deep-svdd"])
    axis.plot(r, r**2 / dim, color=COLORS["usf"], label=NAMES["usf"])
    axis.text(
        0.5 * limit.radius, 0.98, f"{100 * limit.inverted_mass:.0f} % of\nall points", ha="center", va="top",
        transform=axis.get_xaxis_transform(),
    )  # fmt: skip
    axis.set(xlabel="distance from the likeliest point", ylabel="score / its mean", xlim=(0, r[-1]))
    axis.set_ylim(0, 1.05 * max(float(limit.score(0.0)) / limit.loss, r[-1] ** 2 / dim))
    _legend(figure, axis.get_legend_handles_labels()[0])
    return figure


def common(records: Iterable[Record], metric: str = "image_auroc") -> dict[Key, Cell]:
    """Cells of the main protocol in one setting for each detector, the one that most trainings share."""
    main = tables.select(records, protocol="main")

    def by_count(name: str) -> list[Any]:
        return [value for value, _ in Counter(getattr(record, name) for record in main).most_common()]

    kept = tables.prefer(
        main,
        profile=("full", "book", "smoke"),
        loss=("anomalib", "mle"),
        score=("anomalib", "log_prob", "norm"),
        match_parameters=(False, True),
        train_layer_norm=(True, False),
        **{name: by_count(name) for name in ("size", "epochs", "settings")},
    )
    return tables.collect(kept, metric)


def pairs(cells: Mapping[Key, Cell]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(data set, category, detector) -> means of the affine flow and the USF, where both were measured; in per cent."""
    found = {}
    detectors = list(paper.DETECTORS)
    models = {(detectors.index(detector), dataset, category) for dataset, category, detector, _ in cells}
    for number, dataset, category in sorted(models):
        key = (dataset, category, detectors[number])
        base, usf = (cells.get((*key, tables.VARIANTS[flow]), Cell()).mean for flow in ("base", "usf"))
        if base is not None and usf is not None:
            found[key] = base, usf
    return found


def areas(cells: Mapping[str, Mapping[Key, Cell]]) -> Figure:
    """AUROC of each class and detector that was measured here with both flows; above it the paper's, if it has one.

    A line leads from the affine flow to the USF; it is dotted where the USF is the worse one.

    Args:
        cells: ``"image"`` and ``"pixel"`` -> cells of that level, see :func:`common`.

    Raises:
        ValueError: nothing was measured with both flows.
    """
    own = {level: pairs(part) for level, part in cells.items()}
    rows = list(dict.fromkeys(key for part in own.values() for key in part))
    if not rows:
        raise ValueError("no class was measured with both flows: run cells of the benchmark first")
    printed = paper.cells().set_index(["level", "dataset", "category", "detector", "flow"])["mean"].to_dict()
    with mpl.rc_context(TEXT):
        shape = (SIZE[0], max(SIZE[1], 0.42 * len(rows) * len(own) + 1.2))
        figure, axes = plt.subplots(len(own), 1, figsize=shape, sharex=True, squeeze=False)
    for axis, (level, part) in zip(axes[:, 0], own.items(), strict=True):
        for place, key in enumerate(rows):
            shown: list[tuple[str, tuple[float, float]]] = []
            if (level, *key, "usf") in printed:
                shown.append(("o", (printed[level, *key, "base"], printed[level, *key, "usf"])))
            if key in part:
                shown.append(("s", part[key]))
            for index, (marker, (base, usf)) in enumerate(shown):
                y = place + 0.4 * (index - (len(shown) - 1) / 2)
                axis.plot([base, usf], [y, y], color=INK, lw=1.2, ls="-" if usf >= base else ":")
                axis.plot(base, y, marker, color=COLORS["non-usf"], ms=4.5)
                axis.plot(usf, y, marker, color=COLORS["usf"], ms=4.5)
        axis.set_yticks(range(len(rows)), [f"{paper.DETECTORS[key[2]]}\n{key[1]}" for key in rows], linespacing=0.95)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x")
        axis.xaxis.set_major_locator(MultipleLocator(10))
        axis.set_xlabel(f"{level} AUROC, %")
        axis.tick_params(labelbottom=True)
    marks = (("s", "non-usf", "affine flow"), ("s", "usf", "USF"), ("s", None, "here"), ("o", None, "paper"))
    _legend(
        figure,
        [
            Line2D([], [], ls="", marker=marker, ms=5, color=COLORS[key] if key else INK, label=label)
            for marker, key, label in marks
        ],
    )
    return figure
