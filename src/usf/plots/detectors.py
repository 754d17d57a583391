"""Figures of the chapter on anomalib: an image's score alone and among others; what a score loses on its way."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from usf.plots.theme import COLORS, INK

__all__ = ["alone_and_together", "reported"]


def alone_and_together(
    panels: Sequence[tuple[str, NDArray[np.float32], NDArray[np.float32]]], labels: NDArray[np.bool_]
) -> Figure:
    """One panel a score: each image's score when scored with all others, and when scored alone.

    Args:
        panels: (title, scores together (N,), scores alone (N,)).
        labels: true where anomalous, (N,).
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.2), squeeze=False)
    for axis, (title, together, alone) in zip(axes[0], panels, strict=True):
        both = np.concatenate((together, alone))
        margin = 0.05 * float(np.ptp(both)) or 0.05
        ends = [float(both.min()) - margin, float(both.max()) + margin]
        axis.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":")
        for anomalous, name in ((False, "normal"), (True, "anomaly")):
            own = labels == anomalous
            axis.plot(
                together[own],
                alone[own],
                linestyle="none",
                marker="s" if anomalous else "o",
                markersize=4.5,
                alpha=0.8,
                color=COLORS[name],
                label="anomalous" if anomalous else "normal",
            )
        axis.set(title=title, xlabel="score among all", xlim=ends, ylim=ends)
        axis.set_aspect("equal")
    axes[0, 0].set_ylabel("score alone")
    axes[0, 0].legend(loc="upper left", handletextpad=0.2)
    return figure


def reported(table: pd.DataFrame) -> Figure:
    """One row a case: the area of the order as it is (open circle), and what is reported (filled).

    Args:
        table: columns ``finding``, ``case`` (``"constructed..."``, or what was measured), ``true`` and ``reported``, in
            per cent.
    """
    figure, axis = plt.subplots(figsize=(6.4, 0.34 * len(table) + 0.9))
    cases = table.to_dict("records")
    for row, case in enumerate(cases):
        ink = COLORS["oracle" if case["case"].startswith("constructed") else "usf"]
        axis.plot([case["true"], case["reported"]], [row, row], color=ink, linewidth=1.2)
        axis.plot(case["true"], row, marker="o", markersize=8, markerfacecolor="none", color=ink, linestyle="none")
        axis.plot(case["reported"], row, marker="o", markersize=4.5, color=ink, linestyle="none")
    axis.set(
        yticks=range(len(table)),
        yticklabels=[f"{case['finding']}: {case['case']}" for case in cases],
        xlabel="AUROC, %",
        xlim=(-4, 104),
    )
    axis.axvline(50, color=INK, linewidth=0.8, linestyle=":")
    axis.invert_yaxis()
    return figure
