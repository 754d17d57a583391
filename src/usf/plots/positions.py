"""What a map of anomalies owes to where it looks; rows come from :mod:`usf.study.positions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from usf.plots.ablation import color
from usf.plots.theme import INK
from usf.study import paper
from usf.study.ablation import BASE, USF
from usf.study.positions import GIN, QUANTILES, SHARES

__all__ = ["levels_and_scores"]

FLOWS = {BASE: "-", "additive": ":", USF: "-", GIN: "-"}
"""Flow -> line; a filled marker has LU, as in the ablation."""
PIXELS = {
    "pixel": "map",
    "pixel_level": "level\nalone",
    "pixel_inside": "map,\ninside",
    "pixel_level_inside": "level,\ninside",
}


def _flow(row: Mapping[str, Any]) -> str:
    return str(row["coupling"]) + " + LU" * (row["mixing"] == "lu")


def _face(flow: str) -> str:
    return color(flow) if flow.endswith("LU") else "none"


def _lines(axis: Axes, x: Sequence[float], runs: Mapping[str, Sequence[Sequence[float]]], marker: str = "") -> None:
    """A thin line a seed and a thick one their mean."""
    for flow, style in FLOWS.items():
        if not (found := runs.get(flow)):
            continue
        for values in found:
            axis.plot(x, values, style, color=color(flow), lw=0.6, alpha=0.5)
        axis.plot(
            x,
            np.mean(found, axis=0),
            style,
            color=color(flow),
            lw=1.6,
            marker=marker,
            ms=4,
            markerfacecolor=_face(flow),
        )


def levels_and_scores(rows: Sequence[Mapping[str, Any]], dataset: str, category: str, score: str = "norm") -> Figure:
    """The level of the maps of one class, and AUROC of images and pixels with more or less of it; a row a detector.

    Left: level over its mean, positions in its order. Middle: image AUROC when an image's score is the mean of the
    highest values of its map, from one to all. Right: pixel AUROC of the maps and of their level alone, on all
    positions and on those where defects lie.

    Args:
        rows: from :func:`usf.study.positions.load`.
        dataset, category: the class.
        score: whose maps.

    Raises:
        ValueError: no row of them.
    """
    wanted = {"dataset": dataset, "category": category, "score": score, "status": "ok"}
    own = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    detectors = [name for name in paper.DETECTORS if any(row["detector"] == name for row in own)]
    if not detectors:
        raise ValueError(f"no maps of {dataset}/{category} with the score {score}: run python -m usf.study.positions")
    shape = (8.2, 2.1 * len(detectors) + 0.7)
    figure, axes = plt.subplots(len(detectors), 3, figsize=shape, squeeze=False, sharex="col", sharey="col")
    places = list(range(len(SHARES)))
    for (left, middle, right), detector in zip(axes, detectors, strict=True):
        runs = {flow: [r for r in own if r["detector"] == detector and _flow(r) == flow] for flow in FLOWS}
        _lines(left, QUANTILES, {flow: [[r[f"level_{q}"] for q in QUANTILES] for r in f] for flow, f in runs.items()})
        pooled = {flow: [[100 * r[f"image_{s:g}"] for s in SHARES] for r in f] for flow, f in runs.items()}
        _lines(middle, places, pooled, "s")
        for number, (flow, found) in enumerate(runs.items()):
            for x, name in enumerate(PIXELS):
                values = [100 * r[name] for r in found]
                at = np.full(len(values), x + 0.16 * (number - 1.5))
                right.plot(at, values, "s", color=color(flow), markerfacecolor=_face(flow), ms=4)
        left.set_ylabel(f"{paper.DETECTORS[detector]}\nlevel, over its mean")
        middle.set_ylabel("image AUROC, %")
        right.set_ylabel("pixel AUROC, %")
        right.axhline(50, color=INK, lw=0.8, ls="--")
        for axis in (left, middle, right):
            axis.grid(axis="y")
    left, middle, right = axes[-1]
    left.set_xlabel("positions, %")
    middle.set_xticks(places, ["max", *(f"{100 * share:g}" for share in SHARES[1:])], fontsize=8)
    middle.set_xlabel("highest positions averaged, %")
    right.set_xticks(range(len(PIXELS)), list(PIXELS.values()))
    handles = [
        Line2D(
            [], [], color=color(flow), ls=style, marker="s", ms=4, label=flow,
            markerfacecolor=_face(flow),
        )
        for flow, style in FLOWS.items()
        if any(_flow(row) == flow for row in own)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure
