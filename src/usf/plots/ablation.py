"""Figures of the ablation: what couplings, mixings and repairs change.

Frames come from :mod:`usf.study.ablation`; every function returns a figure. Circles are the paper's, squares and dots
what was measured here. The colour is the coupling's; what has LU is filled.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from usf.plots.theme import COLORS, INK
from usf.study import paper
from usf.study.ablation import BASE, CLASS, CONDITIONS, VARIANTS, paper_differences

__all__ = ["class_changes", "conditions", "contrasts", "layer_combinations", "name_of"]

MARKERS = ("s", "D", "^", "v", "P", "X")
"""One a class."""
LABELS = {"library": "library", "score": "score", "loss": "loss", "norm": "norm", "loss and score": "loss +\nscore"}


def color(variant: str) -> str:
    """By the coupling."""
    if variant.startswith("affine"):
        return COLORS["non-usf"]
    return COLORS["gin"] if variant.startswith("gin") else COLORS["usf"]


def name_of(dataset: str, category: str) -> str:
    """A class as it is shown; image sets that are not the paper's say so.

    >>> name_of("mvtec", "pill"), name_of("hazelnut_toy", "hazelnut")
    ('pill', 'hazelnut (toy)')
    """
    if dataset in paper.DATASETS:
        return category
    return f"{category} (toy)" if dataset.endswith("_toy") else f"{category} ({dataset})"


def _face(variant: str) -> str:
    return color(variant) if variant.endswith("LU") else "none"


def _symlog(axis: Axes, reach: float, letter: str = "x", *, narrow: bool = False) -> None:
    """Linear within one percent point, logarithmic beyond; in a narrow panel the ticks at one point have no number."""
    scaled = getattr(axis, f"{letter}axis")
    getattr(axis, f"set_{letter}scale")("symlog", linthresh=1.0, linscale=0.7)
    getattr(axis, f"set_{letter}lim")(-reach, reach)
    ticks = [sign * value for value in (1, 10) for sign in (-1, 1) if value <= reach]
    scaled.set_major_locator(FixedLocator([*ticks, 0]))
    scaled.set_minor_locator(NullLocator())
    bare = (1,) if narrow else ()
    scaled.set_major_formatter(
        FuncFormatter(lambda value, _: "" if abs(value) in bare else f"{value:+.0f}" if value else "0")
    )


def _rows(axis: Axes, labels: Sequence[str]) -> None:
    """Labels from top to bottom."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)


def _classes(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(data set, class), the paper's data sets first."""
    found = {(str(d), str(c)) for d, c in zip(table["dataset"], table["category"], strict=True)}
    return sorted(found, key=lambda key: (key[0] not in paper.DATASETS, key))


def class_changes(table: pd.DataFrame, what: str = "mean") -> Figure:
    """Figure 7: change against the affine baseline, class by class, a row of panels a detector.

    Grey circles and the bar, their mean: the paper's classes of MVTec AD, as far as its tables and its text give them.
    Squares: classes measured here, one marker a class; of the mean with Student's interval over seeds. Where seeds
    have no difference because a run failed, the margin says how many.

    Args:
        table: from :func:`usf.study.ablation.effects` with :func:`usf.study.ablation.differences`, both levels
            concatenated; may be empty.
        what: ``"mean"``, or ``"spread"``: the standard deviation over seeds.

    Raises:
        ValueError: another quantity.
    """
    if what not in ("mean", "spread"):
        raise ValueError(f"what={what!r}: choose mean or spread")
    printed = paper_differences()
    column, own_column = ("mean", "estimate") if what == "mean" else ("sd", "sd_change")
    shown = [variant for variant in VARIANTS if variant != BASE]
    classes = _classes(table)
    figure, axes = plt.subplots(3, 2, figsize=(8.2, 6.6), sharex=True, sharey=True)
    rng = np.random.default_rng(0)
    for row, detector in zip(axes, paper.DETECTORS, strict=True):
        for axis, level in zip(row, ("image", "pixel"), strict=True):
            for y, variant in enumerate(shown):
                keys = (printed["detector"] == detector) & (printed["variant"] == variant) & (printed["level"] == level)
                part = printed[keys]
                single = part.loc[part["category"] != "average", column]
                jitter = rng.uniform(-0.1, 0.1, len(single))
                axis.plot(single, y - 0.2 + jitter, "o", color=INK, ms=2.5, alpha=0.6, lw=0)
                for value in part.loc[part["category"] == "average", column]:
                    axis.plot([value, value], [y - 0.42, y + 0.02], color=INK, lw=2.2)
                keys = (table["detector"] == detector) & (table["effect"] == variant) & (table["level"] == level)
                _own(axis, table[keys], y, variant, own_column, classes)
            if not (table["detector"] == detector).any():
                axis.text(0.03, 0.06, "not run here", transform=axis.transAxes, fontsize=9)
            axis.axvline(0, color=INK, lw=0.8, ls="--")
            axis.grid(axis="x")
            _symlog(axis, 80)
            _rows(axis, shown)
            if level == "image":
                axis.set_ylabel(paper.DETECTORS[detector])
    for axis, level in zip(axes[0], ("image", "pixel"), strict=True):
        axis.set_title(f"{level} AUROC")
    said = "mean" if what == "mean" else "standard deviation over runs"
    figure.supxlabel(f"change of the {said} against affine, percent points", color=INK, fontsize=10)
    handles = [
        Line2D([], [], color=INK, marker="o", ms=3, lw=0, label="paper, a class"),
        Line2D([], [], color=INK, marker="|", ms=11, mew=2.2, lw=0, label="paper, mean over classes"),
        *_class_handles(classes),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _own(axis: Axes, part: pd.DataFrame, y: int, variant: str, column: str, classes: list[tuple[str, str]]) -> None:
    """What was measured: a marker a class, below the paper's."""
    step = 0.42 / max(1, len(classes))
    for row in part.to_dict("records"):
        number = classes.index((row["dataset"], row["category"]))
        place = y + 0.1 + step * number
        if column == "estimate" and not np.isnan(row["low"]):
            axis.plot([row["low"], row["high"]], [place, place], color=color(variant), lw=1.0, alpha=0.7)
        axis.plot(row[column], place, MARKERS[number], color=color(variant), markerfacecolor=_face(variant), ms=4.5)
    if lost := int(part["failed"].sum()):
        axis.text(
            0.985, y + 0.3, f"{lost} failed", transform=axis.get_yaxis_transform(), fontsize=8, ha="right", va="center"
        )


def _class_handles(classes: Sequence[tuple[str, str]]) -> list[Line2D]:
    return [
        Line2D([], [], color=INK, marker=marker, ms=5, lw=0, label=name_of(*key))
        for marker, key in zip(MARKERS, classes, strict=False)
    ]


def layer_combinations(table: pd.DataFrame, detector: str = "uflow", condition: str = "library") -> Figure:
    """Figure 8: AUROC of each combination of layers, class by class, with the standard deviation over seeds.

    Grey circles: the paper's classes of MVTec AD for the two combinations that its tables have. A combination in which
    runs failed says how many.

    Args:
        table: from :func:`usf.study.ablation.frame`.
        detector, condition: which runs.
    """
    own = table[(table["detector"] == detector) & (table["condition"] == condition) & ~table["matched"]]
    classes = _classes(own)
    printed = paper.cells()
    printed = printed[(printed["dataset"] == "mvtec") & (printed["detector"] == detector)]
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.4), sharey=True)
    rng = np.random.default_rng(0)
    flows = {"base": BASE, "usf": "additive + LU"}
    for axis, level in zip(axes, ("image", "pixel"), strict=True):
        for flow, variant in flows.items():
            values = printed.loc[(printed["flow"] == flow) & (printed["level"] == level), "mean"]
            places = VARIANTS.index(variant) - 0.24 + rng.uniform(-0.1, 0.1, len(values))
            axis.plot(values, places, "o", color=INK, ms=2.5, alpha=0.6, lw=0)
        for number, key in enumerate(classes):
            for y, variant in enumerate(VARIANTS):
                part = own[(own["variant"] == variant) & (own["dataset"] == key[0]) & (own["category"] == key[1])]
                values, place = part[level].dropna(), y + 0.05 + 0.3 * number / max(1, len(classes))
                if len(values):
                    sd = values.std() if len(values) > 1 else 0.0
                    axis.errorbar(
                        values.mean(), place, xerr=sd, fmt=MARKERS[number], color=color(variant), lw=1.2,
                        markerfacecolor=_face(variant), ms=5,
                    )  # fmt: skip
                    axis.plot(values, np.full(len(values), place + 0.12), ".", color=color(variant), ms=3, alpha=0.6)
                if failed := int(part["failed"].sum()):
                    transform = axis.get_yaxis_transform()
                    axis.text(
                        0.02, place, f"{failed} of {len(part)} failed", transform=transform, fontsize=8, va="center"
                    )
        _rows(axis, VARIANTS)
        axis.grid(axis="x")
        axis.set_xlabel(f"{level} AUROC, %")
    handles = [Line2D([], [], color=INK, marker="o", ms=3, lw=0, label="paper, a class"), *_class_handles(classes)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def conditions(table: pd.DataFrame, level: str = "image") -> Figure:
    """AUROC of every flow under every condition: a row of panels a detector, a column a class.

    Dots are runs, lines join means over seeds; lines that cross or fan out are interactions of a flow with a repair.
    Conditions under which nothing was run have no place.

    Args:
        table: from :func:`usf.study.ablation.frame`.
        level: ``"image"`` or ``"pixel"``.

    Raises:
        ValueError: no runs.
    """
    own = table[~table["matched"]]
    if own.empty:
        raise ValueError("no runs to draw: run the ablation first")
    detectors = [name for name in paper.DETECTORS if (own["detector"] == name).any()]
    classes = _classes(own)
    shape = (max(4.2, 2.75 * len(classes)), 2.1 * len(detectors) + 0.7)
    figure, axes = plt.subplots(len(detectors), len(classes), figsize=shape, squeeze=False, sharex=True)
    order = [name for name in CONDITIONS if (own["condition"] == name).any()]
    for row, detector in zip(axes, detectors, strict=True):
        for axis, key in zip(row, classes, strict=True):
            part = own[(own["detector"] == detector) & (own["dataset"] == key[0]) & (own["category"] == key[1])]
            if part.empty:
                axis.set_axis_off()
                continue
            for number, variant in enumerate(VARIANTS):
                runs = part[part["variant"] == variant]
                x = runs["condition"].map(order.index) + 0.06 * (number - 2.5)
                axis.plot(x, runs[level], ".", color=color(variant), ms=3.5, alpha=0.6)
                # What a detector does not have (CFlow's normalisation) is passed over, and the line goes on.
                means = runs.groupby("condition")[level].mean().reindex(order).dropna()
                style = "-" if variant.endswith("LU") else ":"
                axis.plot(
                    means.index.map(order.index) + 0.06 * (number - 2.5), means, style, color=color(variant), lw=1.3,
                    marker="s", ms=3.5, markerfacecolor=_face(variant),
                )  # fmt: skip
            low, high = np.nanmin([part[level].min(), 99.0]), np.nanmax([part[level].max(), 100.0])
            room = 0.04 * (high - low)
            axis.set_ylim(low - room, high + room)
            axis.set_title(f"{paper.DETECTORS[detector]}, {name_of(*key)}", fontsize=9.5)
            axis.set_xticks(range(len(order)), [LABELS[name] for name in order], fontsize=8)
            axis.tick_params(axis="x", labelbottom=True)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(axis="y")
    for row in axes:
        row[0].set_ylabel(f"{level} AUROC, %")
    figure.align_ylabels(axes[:, 0])
    handles = [
        Line2D(
            [], [], color=color(variant), marker="s", ms=4, markerfacecolor=_face(variant),
            ls="-" if variant.endswith("LU") else ":", label=variant,
        )
        for variant in VARIANTS
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=3 if len(classes) < 2 else 6)
    return figure


def contrasts(table: pd.DataFrame) -> Figure:
    """Effects with Student's interval over seeds: a panel an effect, a row a detector and class.

    Pale: the interval holds zero, or there is a single seed and hence none.

    Args:
        table: from :func:`usf.study.ablation.effects`, of one or two levels.

    Raises:
        ValueError: no effects.
    """
    table = table[table["seeds"] > 0]
    if table.empty:
        raise ValueError("no effects to draw: a contrast needs all the runs that it compares")
    names = list(dict.fromkeys(table["effect"]))
    rank = {name: number for number, name in enumerate(paper.DETECTORS)}
    found = {(str(r["detector"]), str(r["dataset"]), str(r["category"])) for r in table[CLASS].to_dict("records")}
    groups = sorted(found, key=lambda key: (rank[key[0]], key[1] not in paper.DATASETS, key))
    shape = (8.2, 0.42 * len(groups) + 1.3)
    figure, axes = plt.subplots(1, len(names), figsize=shape, sharey=True, sharex=True, squeeze=False)
    looks = {"image": ("s", INK, -0.14), "pixel": ("o", "none", 0.14)}
    for axis, name in zip(axes[0], names, strict=True):
        for row in table[table["effect"] == name].to_dict("records"):
            marker, face, shift = looks[row["level"]]
            y = groups.index((row["detector"], row["dataset"], row["category"])) + shift
            shown = not np.isnan(row["low"]) and (row["low"] > 0 or row["high"] < 0)
            alpha = 1.0 if shown else 0.45
            if not np.isnan(row["low"]):
                axis.plot([row["low"], row["high"]], [y, y], color=INK, lw=1.3, alpha=alpha)
            axis.plot(row["estimate"], y, marker, color=INK, markerfacecolor=face, ms=4.5, alpha=alpha)
        axis.axvline(0, color=INK, lw=0.8)
        axis.grid(axis="x")
        axis.set_title(name, fontsize=10)
        _rows(axis, [f"{paper.DETECTORS[key[0]]}, {name_of(*key[1:])}" for key in groups])
        _symlog(axis, 40, narrow=True)
    figure.supxlabel("effect on AUROC, percent points", color=INK, fontsize=10)
    handles = [
        Line2D([], [], color=INK, marker=marker, markerfacecolor=face, ms=4.5, label=level)
        for level, (marker, face, _) in looks.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure
