"""Figures of where training breaks and of what collapses.

Rows are those of :mod:`usf.study.stability` and :mod:`usf.study.uncounted`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from usf.plots.theme import COLORS, INK, shades

Rows = Sequence[Mapping[str, Any]]

OUTCOMES: dict[str, dict[str, Any]] = {
    "not finite": {"facecolor": INK},
    "worse than no flow": {"facecolor": "none", "hatch": "//////"},
}
"""Outcome of a failed run -> how its part of a box is filled; in ink, for colours stand for models."""

NORM_COLORS = {"left out": COLORS["other"], "counted": COLORS["usf"], "frozen": shades("usf", 3)[2]}
"""What becomes of the layer normalisation's gain -> its colour: blue where the flow has its whole determinant."""


def column(row: Mapping[str, Any]) -> str:
    """How a run's settings are called in a figure: coupling, mixing, and what is done about it."""
    mixing = " + LU" if row["mixing"] == "lu" else ""
    return f"{row['coupling']}{mixing}" + ("" if row["remedy"] == "none" else f", {row['remedy']}")


def failure_map(rows: Rows, *, size: tuple[float, float] | None = None) -> Figure:
    """Shares of failed runs over learning rates, one line a setting, in the rows' order.

    A box is all runs at one rate; its filled part are the failed ones: solid where something was not finite, hatched
    where the flow ended worse than none.
    """
    labels = list(dict.fromkeys(column(row) for row in rows))
    rates = sorted({float(row["lr"]) for row in rows})
    figure, axis = plt.subplots(figsize=size or (7.2, 0.34 * len(labels) + 1.2))
    for y, label in enumerate(labels):
        for x, rate in enumerate(rates):
            here = [row for row in rows if column(row) == label and float(row["lr"]) == rate]
            if not here:
                continue
            left = x - 0.44
            for kind, style in OUTCOMES.items():
                share = 0.88 * sum(row["outcome"] == kind for row in here) / len(here)
                axis.add_patch(Rectangle((left, y - 0.36), share, 0.72, edgecolor=INK, lw=0, **style))
                left += share
            axis.add_patch(Rectangle((x - 0.44, y - 0.36), 0.88, 0.72, fill=False, ec=INK, lw=0.8))
    axis.set_xlim(-0.6, len(rates) - 0.4)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_yticks(range(len(labels)), labels)
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xlabel("learning rate")
    handles = [Patch(edgecolor=INK, lw=0.8, label=kind, **style) for kind, style in OUTCOMES.items()]
    handles.append(Patch(fill=False, ec=INK, label="trained"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def starts(rows: Rows, labels: Mapping[tuple[str, str], str], styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Untrained loss per dimension against the number of blocks; a triangle is a loss that is not a float.

    Args:
        rows: one a start, with ``coupling``, ``remedy``, ``blocks``, ``size`` and ``held_start``.
        labels: (coupling, remedy) -> name of the line, in order.
        styles: name -> arguments of the line.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    top = 3.4e38
    for (coupling, remedy), label in labels.items():
        chosen = [row for row in rows if (row["coupling"], row["remedy"]) == (coupling, remedy)]
        blocks = sorted({int(row["blocks"]) for row in chosen})
        groups = [[float(r["held_start"]) / r["size"] for r in chosen if r["blocks"] == n] for n in blocks]
        style = {"color": INK, **styles.get(label, {})}
        middle = [(n, float(np.median(group))) for n, group in zip(blocks, groups, strict=True)]
        finite = [(n, value) for n, value in middle if np.isfinite(value)]
        axis.plot(*zip(*finite, strict=True), label=label, **style)
        for n, group in zip(blocks, groups, strict=True):
            fine = [value for value in group if np.isfinite(value)]
            axis.plot([n] * len(fine), fine, ".", color=style["color"], ms=5)
            if len(fine) < len(group):
                axis.plot(n, top, "^", color=style["color"], ms=8, clip_on=False)
    axis.axhline(top, color=INK, lw=1, ls=":")
    axis.set_yscale("log")
    axis.set_xticks(sorted({int(row["blocks"]) for row in rows}))
    axis.set_xlabel("blocks")
    axis.set_ylabel("untrained loss (nats a dimension)")
    figure.legend(loc="outside upper center", ncols=1)
    return figure


def traces(
    runs: Mapping[str, Mapping[str, Sequence[float]]],
    styles: Mapping[str, Mapping[str, Any]],
    *,
    last: str = "condition",
) -> Figure:
    """Loss, log-determinant, latents and one more over the steps of some runs.

    Args:
        runs: label -> ``loss``, ``log_det``, ``reach`` by step, and ``looks``, ``condition`` or ``gradient``. A line
            that ends before the others is a run that broke there; its last finite point has a cross.
        styles: label -> arguments of the line.
        last: what the fourth panel shows, ``"condition"`` (at ``looks``) or ``"gradient"`` (at every step).
    """
    figure, axes = plt.subplots(2, 2, figsize=(9.0, 5.2), sharex=True)
    titles = {"condition": "largest condition number of LU", "gradient": "largest |entry of the gradient|"}
    panels = {
        "loss": "loss (nats)",
        "log_det": "mean ln|det J| (nats)",
        "reach": "largest |latent|",
        last: titles[last],
    }
    longest = max(len(run["loss"]) for run in runs.values())
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        largest = 0.0
        for label, run in runs.items():
            y = np.asarray(run[key], dtype=np.float64)
            x = np.asarray(run["looks"] if key == "condition" else range(len(y)), dtype=np.float64)
            fine = np.isfinite(y)
            (line,) = axis.plot(x[fine], y[fine], label=label, **styles.get(label, {}))
            if fine.any():
                largest = max(largest, float(np.abs(y[fine]).max()))
                if len(run["loss"]) < longest:
                    axis.plot(x[fine][-1], y[fine][-1], "x", color=line.get_color(), ms=9, mew=2)
        if key in ("loss", "log_det"):
            if largest > 1e4:
                axis.set_yscale("symlog", linthresh=100.0)
                axis.yaxis.get_major_locator().set_params(numticks=6)
        elif largest > 100:
            axis.set_yscale("log")
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return figure


def growth(profiles: Mapping[str, Mapping[str, float]], styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Largest absolute value that each block passes on, for some flows at one step."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for label, profile in profiles.items():
        values = np.array(list(profile.values()))
        fine = np.isfinite(values)
        axis.plot(np.arange(1, len(values) + 1)[fine], values[fine], "o-", ms=4, label=label, **styles.get(label, {}))
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("block")
    axis.set_ylabel("largest |value| passed on")
    figure.legend(loc="outside upper center", ncols=min(4, len(profiles)))
    return figure


def boundaries(edges: Mapping[str, Mapping[int, float]], styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The lowest learning rate at which most runs fail against the dimension, with a line of slope -1.

    Args:
        edges: label -> dimension -> rate; infinite where no rate of the grid is enough (not drawn).
        styles: label -> arguments of the line.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.6))
    for label, edge in edges.items():
        found = sorted((d, rate) for d, rate in edge.items() if np.isfinite(rate))
        if found:
            axis.plot(*zip(*found, strict=True), "o-", label=label, **styles.get(label, {}))
    dims = sorted({d for edge in edges.values() for d in edge})
    finite = [(d, rate) for edge in edges.values() for d, rate in edge.items() if np.isfinite(rate)]
    if finite:
        middle = float(np.exp(np.mean([np.log(d * rate) for d, rate in finite])))
        axis.plot(dims, [middle / d for d in dims], color=INK, ls=":", lw=1.2, label="1 / dimension")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(dims, [str(d) for d in dims])
    axis.set_xlabel("dimension")
    axis.set_ylabel("lowest learning rate\nat which most runs fail")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _line(axis: Axes, rows: Rows, key: str, factor: float = 1.0, **style: Any) -> None:
    """A curve over the steps, up to where the loss leaves: there, a cross."""
    start = next((row["loss"] for row in rows), 0.0)
    fine = [row for row in rows if row["loss"] <= start + 1]
    found = [(row["steps"], factor * row[key]) for row in fine if row.get(key) is not None]
    if found:
        axis.plot(*zip(*found, strict=True), **style)
        if len(fine) < len(rows):
            axis.plot(*found[-1], "x", color=style["color"], ms=9, mew=2)


def collapse(looks: Rows) -> Figure:
    """Gains, latents, losses and areas over a training, by what becomes of the layer normalisation's gain.

    Solid: flows with their own learned scales; dashed: without, so that their determinant is exactly one. A curve ends
    with a cross before a look at which the loss is a nat a dimension above its start.
    """
    figure, axes = plt.subplots(2, 2, figsize=(9.0, 5.4), sharex=True)
    norms = [norm for norm in NORM_COLORS if any(row["norm"] == norm for row in looks)]
    scales = [scale for scale in (True, False) if any(row["global_scale"] == scale for row in looks)]
    for norm in norms:
        for scale in scales:
            rows = [row for row in looks if row["norm"] == norm and row["global_scale"] == scale]
            style: dict[str, Any] = {"color": NORM_COLORS[norm], "ls": "-" if scale else "--"}
            _line(axes[0, 0], rows, "log_gain", **style)
            _line(axes[0, 1], rows, "latent_std", **style)
            _line(axes[1, 0], rows, "loss", **style)
            _line(axes[1, 1], rows, "image_auroc", 100.0, **style)
    for axis, title in zip(
        axes.flat,
        ("mean ln|gain|", "root mean square latent", "loss (nats a dimension)", "image AUROC, %"),
        strict=True,
    ):
        axis.set_title(title)
    axes[0, 1].set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step")
    handles = [Line2D([], [], color=NORM_COLORS[norm], label=f"gain {norm}") for norm in norms]
    if len(scales) > 1:
        handles += [
            Line2D([], [], color=INK, ls="-", label="with scales"),
            Line2D([], [], color=INK, ls="--", label="without"),
        ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    return figure
