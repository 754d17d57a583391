"""Figures of the report on a folder: how training went, where scores and threshold lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from usf.plots.theme import COLORS, INK

__all__ = ["score_histogram", "training"]


def training(losses: Sequence[Sequence[float]], *, width: float = 4.6) -> Figure:
    """Negative log-likelihood of the training images, nats per dimension, over epochs; one line a flow.

    Args:
        losses: of each flow, by epoch.
        width: of the figure, inches.
    """
    figure, axis = plt.subplots(figsize=(width, 2.6))
    for values in losses:
        axis.plot(np.arange(1, len(values) + 1), values, color=COLORS["usf"], marker="o", markersize=3, alpha=0.8)
    axis.set(xlabel="epoch", ylabel="nats per dimension")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def score_histogram(groups: Mapping[str, tuple[ArrayLike, str]], threshold: float, *, width: float = 8.6) -> Figure:
    """Histograms of positive scores, one row a group, on a shared logarithmic axis; the line is the threshold.

    Args:
        groups: label -> (scores (n,), key of :data:`usf.plots.COLORS`); empty ones are left out.
        threshold: an alarm is to the right of it.
        width: of the figure, inches.
    """
    kept = {label: (np.asarray(values, dtype=np.float64), color) for label, (values, color) in groups.items()}
    kept = {label: pair for label, pair in kept.items() if pair[0].size}
    total = np.concatenate([values for values, _ in kept.values()] + [np.array([threshold])])
    low, high = float(total.min()) / 1.05, float(total.max()) * 1.05
    edges = np.geomspace(low, high, 41)
    figure, axes = plt.subplots(len(kept), 1, figsize=(width, 1.05 * len(kept) + 0.7), sharex=True, squeeze=False)
    for axis, (label, (values, color)) in zip(axes[:, 0], kept.items(), strict=True):
        axis.hist(values, edges, color=COLORS[color], alpha=0.85)
        axis.axvline(threshold, color=INK, linestyle="--", linewidth=1.2)
        above = int(np.count_nonzero(values > threshold))
        axis.set_title(f"{label}: {above} of {values.size} above the threshold", fontsize=9, loc="left")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    axes[-1, 0].set(xscale="log", xlabel="score (dashed: the threshold)", xlim=(low, high))
    axes[-1, 0].xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[-1, 0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[-1, 0].xaxis.set_minor_formatter(NullFormatter())
    return figure
