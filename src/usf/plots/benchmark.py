"""Figures of the benchmark: the paper's tables re-read, and what was measured here beside them.

Frames come from :mod:`usf.study.paper` and :mod:`usf.study.tables`; every function returns a figure. Circles are the
paper's, squares what was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from usf.plots.theme import COLORS, INK
from usf.study import paper, statistics, tables
from usf.study.schema import Record
from usf.study.tables import Cell, Key

__all__ = [
    "class_differences",
    "fibres_over_epochs",
    "interquartile_means",
    "mean_differences",
    "measured",
    "over_epochs",
    "spread_ratios",
]

PAPER, HERE = "o", "s"
"""Markers."""


def _name(row: pd.Series) -> str:
    return f"{paper.DATASETS[row['dataset']]} {row['level']}, {paper.DETECTORS[row['detector']]}"


def _rows(axis: Axes, labels: list[str]) -> None:
    """Labels from top to bottom."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")


def _symlog(axis: Axes, reach: float) -> None:
    """Linear within one percent point, logarithmic beyond: single classes differ by 0.1 and by 60 points."""
    axis.set_xscale("symlog", linthresh=1.0, linscale=0.7)
    axis.set_xlim(-reach, reach)
    axis.xaxis.set_major_locator(FixedLocator([-10, -1, 0, 1, 10]))
    # A hundred has a mark without a number: the panels are narrow, and numbers at their edges would meet.
    axis.xaxis.set_minor_locator(FixedLocator([-100, 100] if reach > 100 else []))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0f}" if value else "0"))


def mean_differences(table: pd.DataFrame) -> Figure:
    """Forest plot of :func:`usf.study.paper.reanalysis`: USF minus affine, mean over classes, with two intervals.

    Thick: percentile bootstrap over classes. Thin: Student's. Filled where Wilcoxon's test, corrected after Holm for
    all rows, stays below 5 %.
    """
    figure, axis = plt.subplots(figsize=(6.8, 0.33 * len(table) + 0.9))
    for y, row in enumerate(table.to_dict("records")):
        shown = row["p_holm"] < 0.05
        axis.plot([row["student_low"], row["student_high"]], [y, y], color=COLORS["usf"], lw=1.0)
        axis.plot([row["low"], row["high"]], [y, y], color=COLORS["usf"], lw=3.5, alpha=0.55, solid_capstyle="butt")
        face = COLORS["usf"] if shown else "none"
        axis.plot(row["difference"], y, PAPER, color=COLORS["usf"], markerfacecolor=face, ms=6, zorder=3)
        axis.text(1.01, y, f"{row['p_holm']:.2g}", transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.text(1.01, -0.8, "Holm p", transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.axvline(0, color=INK, lw=0.8)
    _rows(axis, [_name(row) for _, row in table.iterrows()])
    _symlog(axis, 60)
    axis.set_xlabel("AUROC, USF minus affine, percent points")
    return figure


def spread_ratios(classes: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Standard deviation over runs, USF over affine: a dot a class, and the geometric mean with its interval.

    Args:
        classes: from :func:`usf.study.paper.differences`.
        table: from :func:`usf.study.paper.reanalysis`.
    """
    figure, axis = plt.subplots(figsize=(6.8, 0.33 * len(table) + 0.9))
    floor = paper.RESOLUTION / 2
    rng = np.random.default_rng(0)
    for y, row in enumerate(table.to_dict("records")):
        keys = ["dataset", "level", "detector"]
        own = classes[keys].eq([row[key] for key in keys])
        part = classes[own.all(axis=1)]
        ratio = part["sd_usf"].clip(lower=floor) / part["sd_base"].clip(lower=floor)
        axis.plot(ratio, y + rng.uniform(-0.17, 0.17, len(part)), ".", color=INK, ms=4, alpha=0.6)
        axis.plot([row["ratio_low"], row["ratio_high"]], [y, y], color=COLORS["usf"], lw=1.8)
        face = COLORS["usf"] if row["ratio_p_holm"] < 0.05 else "none"
        axis.plot(row["ratio"], y, PAPER, color=COLORS["usf"], markerfacecolor=face, ms=6, zorder=3)
        text = f"{row['ratio_p_holm']:.2g}"
        axis.text(1.01, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.text(1.01, -0.8, "Holm p", transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.axvline(1, color=INK, lw=0.8)
    _rows(axis, [_name(row) for _, row in table.iterrows()])
    axis.set_xscale("log")
    axis.set_xlabel("standard deviation over runs, USF / affine")
    return figure


def _panels(level: str) -> tuple[Figure, dict[str, Axes], list[tuple[str, str]]]:
    classes = paper.differences()
    classes = classes[classes["level"] == level]
    keys = list(classes[["dataset", "category"]].drop_duplicates().itertuples(index=False, name=None))
    keys.sort(key=lambda key: list(paper.DATASETS).index(key[0]))
    figure, axes = plt.subplots(1, 3, figsize=(7.8, 0.21 * len(keys) + 1.0), sharey=True)
    return figure, dict(zip(paper.DETECTORS, axes, strict=True)), keys


def class_differences(level: str, cells: Mapping[Key, Cell] | None = None) -> Figure:
    """USF minus affine class by class, one panel a detector: the paper's difference and, where both flows have two
    runs, the measured one, each with Welch's interval for three or as many runs.

    Args:
        level: ``"image"`` or ``"pixel"``.
        cells: measured ones of that level, see :func:`usf.study.tables.collect`.
    """
    figure, axes, keys = _panels(level)
    keyed = paper.differences().set_index(["level", "detector", "dataset", "category"])
    table = dict(keyed.iterrows())
    own = cells or {}
    for detector, axis in axes.items():
        for y, (dataset, category) in enumerate(keys):
            row = table[level, detector, dataset, category]
            printed = statistics.welch_interval(
                row["mean_usf"], row["sd_usf"], row["mean_base"], row["sd_base"], paper.RUNS, resolution=0.1
            )
            pair = [own.get((dataset, category, detector, tables.VARIANTS[flow]), Cell()) for flow in ("usf", "base")]
            measured = all(cell.sd is not None for cell in pair)
            shift = 0.18 if measured else 0.0
            _interval(axis, printed, y - shift, INK, PAPER)
            if measured:
                (usf, base) = pair
                found = statistics.welch_interval(
                    float(usf.mean or 0), float(usf.sd or 0), float(base.mean or 0), float(base.sd or 0),
                    (len(usf.values), len(base.values)),
                )  # fmt: skip
                _interval(axis, found, y + shift, COLORS["usf"], HERE)
        axis.axvline(0, color=INK, lw=0.8)
        _rows(axis, [category for _, category in keys])
        _symlog(axis, 150)
        axis.set_title(paper.DETECTORS[detector])
        axis.axhline(sum(dataset == keys[0][0] for dataset, _ in keys) - 0.5, color=INK, lw=0.5, ls=":")
    axes["uflow"].set_xlabel(f"{level} AUROC, USF minus affine, percent points")
    _legend(figure, here=any(marker == HERE for marker in _markers(figure)))
    return figure


def _interval(axis: Axes, interval: statistics.Interval, y: float, color: str, marker: str) -> None:
    """Interval and estimate; pale where the interval holds zero."""
    alpha = 1.0 if interval.excludes_zero else 0.45
    axis.plot([interval.low, interval.high], [y, y], color=color, lw=1.2, alpha=alpha)
    axis.plot(interval.estimate, y, marker, color=color, ms=3.5, alpha=alpha)


def _markers(figure: Figure) -> set[str]:
    return {str(line.get_marker()) for axis in figure.axes for line in axis.get_lines()}


def _legend(figure: Figure, *, here: bool) -> None:
    handles = [Line2D([], [], color=INK, marker=PAPER, ms=4, lw=1.2, label="paper")]
    if here:
        handles.append(Line2D([], [], color=COLORS["usf"], marker=HERE, ms=4, lw=1.2, label="measured here"))
        figure.legend(handles=handles, loc="outside upper right", ncols=2)


def interquartile_means(*, resamples: int = statistics.RESAMPLES, seed: int = 0) -> Figure:
    """Interquartile mean over classes of the paper's tables, affine and USF, with percentile bootstrap intervals.

    Only means are printed, so classes are drawn, not runs. Overlapping intervals do not say that two models are equal:
    both vary with the same classes, which :func:`mean_differences` takes out.
    """
    table = paper.cells()
    levels = [(dataset, level) for dataset in paper.DATASETS for level in ("image", "pixel")]
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 4.0), sharey=True)
    for axis, (dataset, level) in zip(axes.flat, levels, strict=True):
        part = table[(table["dataset"] == dataset) & (table["level"] == level)]
        for y, detector in enumerate(paper.DETECTORS):
            for flow, shift in (("base", -0.15), ("usf", 0.15)):
                values = part[(part["detector"] == detector) & (part["flow"] == flow)]["mean"].to_numpy()
                interval = statistics.stratified_bootstrap([values], resamples=resamples, seed=seed)
                color = COLORS["non-usf" if flow == "base" else "usf"]
                axis.plot([interval.low, interval.high], [y + shift] * 2, color=color)
                axis.plot(interval.estimate, y + shift, PAPER, color=color, ms=5)
        _rows(axis, list(paper.DETECTORS.values()))
        axis.set_title(f"{paper.DATASETS[dataset]} {level}")
    for axis in axes[1]:
        axis.set_xlabel("AUROC, %")
    handles = [
        Line2D([], [], color=COLORS[key], marker=PAPER, ms=5, label=label)
        for key, label in (("non-usf", "affine"), ("usf", "USF"))
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure


def _color(variant: str) -> str:
    if variant.startswith("affine"):
        return COLORS["non-usf"]
    return COLORS["gin"] if variant.startswith("gin") else COLORS["usf"]


def measured(cells: Mapping[str, Mapping[Key, Cell]], *, seed: int = 0) -> Figure:
    """What was measured here: every run as a dot, and for each detector and variant the interquartile mean of its runs
    with a stratified bootstrap interval (other seeds, these classes). Crosses: the paper's mean over the same classes.

    A variant is drawn over the classes it was run on, whose number stands beside its name.

    Args:
        cells: by level, with at least one run.
        seed: of the bootstrap.

    Raises:
        ValueError: no run to draw.
    """
    groups: dict[tuple[str, str, str], list[tuple[Key, Cell]]] = {}
    for level, own in cells.items():
        for key, cell in sorted(own.items()):
            if cell.values:
                groups.setdefault((level, key[2], key[3]), []).append((key, cell))
    if not groups:
        raise ValueError("no runs to draw: run a cell of the benchmark first")
    models = sorted({(detector, variant) for _, detector, variant in groups}, key=lambda m: tables.model_order(*m))
    levels = [level for level in cells if any(group[0] == level for group in groups)]
    shape = (8.2, 0.36 * len(models) + 1.1)
    figure, axes = plt.subplots(1, len(levels), figsize=shape, sharey=True, squeeze=False)
    printed = paper.cells().set_index(["level", "dataset", "category", "detector", "flow"])["mean"]
    flows = {variant: flow for flow, variant in tables.VARIANTS.items()}
    labels = []
    for detector, variant in models:
        classes = max(len(groups.get((level, detector, variant), [])) for level in levels)
        labels.append(f"{paper.DETECTORS[detector]}, {variant} ({classes})")
    for axis, level in zip(axes[0], levels, strict=True):
        for y, (detector, variant) in enumerate(models):
            part = groups.get((level, detector, variant), [])
            if not part:
                continue
            runs = [np.asarray(cell.values) for _, cell in part]
            values, color = np.concatenate(runs), _color(variant)
            axis.plot(values, np.full(len(values), y + 0.22), ".", color=color, ms=4, alpha=0.5)
            interval = statistics.stratified_bootstrap(runs, seed=seed)
            axis.plot([interval.low, interval.high], [y, y], color=color)
            axis.plot(interval.estimate, y, HERE, color=color, ms=5)
            names = [(level, key[0], key[1], detector, flows.get(variant, "")) for key, _ in part]
            if all(name in printed.index for name in names):
                axis.plot(np.mean([printed[name] for name in names]), y, "x", color=INK, ms=6)
        _rows(axis, labels)
        axis.set_title(f"{level} level")
        axis.set_xlabel("AUROC, %")
    return figure


def over_epochs(records: Sequence[Record], metric: str = "image_auroc") -> Figure:
    """AUROC after every traced epoch, a panel a detector and class: a thin line a training, a thick one the mean of the
    trainings of a variant that are equally long.

    Args:
        records: of protocol ``"trace"`` and one score; runs that failed leave their lines where they broke off.
        metric: a column.

    Raises:
        ValueError: no such records, or several scores.
    """
    rows = [r for r in records if r.protocol == "trace" and r.status == "ok" and getattr(r, metric) is not None]
    if not rows or len({record.score for record in rows}) > 1:
        raise ValueError("records of protocol trace and of one score are needed; choose with usf.study.tables.select")
    detectors = list(paper.DETECTORS)
    panels = sorted({(detectors.index(r.detector), r.dataset, r.category) for r in rows})
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(8.2, 2.3 * lines + 0.4), sharey=True, squeeze=False)
    table = tables.frame(rows)
    shown: dict[str, Line2D] = {}
    for axis, (number, dataset, category) in zip(axes.flat, panels, strict=False):
        detector = detectors[number]
        part = table[(table["detector"] == detector) & (table["dataset"] == dataset) & (table["category"] == category)]
        for variant in sorted(part["variant"].unique(), key=lambda variant: tables.model_order(detector, variant)):
            style = "-" if variant.endswith("LU") or variant.startswith("affine") else "--"
            for _, own in part[part["variant"] == variant].groupby("epochs"):
                for _, line in own.groupby(["seed", "settings"]):
                    line = line.sort_values("epoch")
                    axis.plot(line["epoch"], line[metric], style, color=_color(variant), lw=0.6, alpha=0.35)
                mean = own.groupby("epoch")[metric].mean()
                (thick,) = axis.plot(mean.index, mean, style, color=_color(variant), lw=2.0)
                shown.setdefault(variant, thick)
        axis.set_title(f"{paper.DETECTORS[detector]}, {category}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(f"{metric.removesuffix('_auroc')} AUROC, %")
    figure.supxlabel("epoch", fontsize=10, color=INK)
    order = sorted(shown, key=lambda variant: tables.model_order("fastflow", variant))
    figure.legend([shown[variant] for variant in order], order, loc="outside upper right", ncols=len(order))
    return figure


def fibres_over_epochs(rows: pd.DataFrame, *, ceiling: float, way: str = "log_prob") -> Figure:
    """CFlow after every epoch: image AUROC, pixel AUROC, and the likeliest fibre of the test images.

    Args:
        rows: as :func:`usf.study.rescoring.gather` writes them.
        ceiling: the base's mode, nats per channel; a dotted line.
        way: of scoring.

    Raises:
        ValueError: no row of that way.
    """
    own = rows[rows["way"] == way]
    if own.empty:
        raise ValueError(f"no rows of the way {way!r}: run python -m usf.study.rescoring first")
    panels = {
        "image_auroc": ("image AUROC, %", 100.0),
        "pixel_auroc": ("pixel AUROC, %", 100.0),
        "max_log_prob": ("largest ln p / C, nats", 1.0),
    }
    figure, axes = plt.subplots(1, 3, figsize=(8.2, 2.7))
    # What a line's dashes say: the class, and the loss where it is not the library's.
    own = own.assign(shown=own["category"] + own["loss_kind"].map({"anomalib": "", "mle": ", likelihood"}))
    styles = dict(zip(dict.fromkeys(own["shown"]), ("-", "--", ":", "-."), strict=False))
    apart = ["shown", "coupling", "mixing", "size", "epochs", "seed"]
    for axis, (column, (label, scale)) in zip(axes, panels.items(), strict=True):
        for (shown, coupling, *_), line in own.groupby(apart, sort=False):
            line = line.sort_values("epoch")
            axis.plot(line["epoch"], scale * line[column], styles[shown], color=_color(str(coupling)), lw=1.6)
        axis.set_ylabel(label)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].axhline(ceiling, color=INK, lw=0.8, ls=":")
    names = {"affine": "affine", "additive": "additive + LU", "gin": "GIN"}
    handles = [Line2D([], [], color=_color(c), label=names[c]) for c in dict.fromkeys(own["coupling"])]
    handles += [Line2D([], [], color=INK, ls=style, label=shown) for shown, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    return figure
