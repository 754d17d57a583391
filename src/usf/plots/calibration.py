"""Figures of the calibration chapter: does a law hold, what rate does a threshold get, where do p-values lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from usf.calibration import agreement, realised_rate
from usf.plots.theme import COLORS, INK

__all__ = ["false_alarm_rates", "p_values", "pit", "realised_rates"]

MARKERS = "osD^v"


def _histogram(axis: Axes, values: NDArray[np.float64], edges: NDArray[np.float64], color: str, **how: Any) -> None:
    density = np.histogram(values, edges)[0] / (len(values) * np.diff(edges))
    axis.stairs(density, edges, color=color, **how)


def pit(
    samples: Mapping[str, ArrayLike],
    colors: Mapping[str, str],
    *,
    bins: int = 10,
    confidence: float = 0.95,
    stacked: bool = False,
) -> Figure:
    """Probability integral transforms of normal parts: histogram, and distribution function with its exact band.

    A law that holds gives bars of height one (the grey band holds a bar of the smallest sample with probability
    ``confidence``) and a coloured band that contains the diagonal; what leaves it refutes the law.

    Args:
        samples: label -> values in [0, 1], (n,).
        colors: label -> key of :data:`usf.plots.COLORS`.
        bins: of the histogram.
        confidence: of both bands.
        stacked: one above the other, for narrow pages.

    Raises:
        CalibrationError: values outside [0, 1], not finite, or none.
    """
    shape, size = ((2, 1), (3.6, 6.2)) if stacked else ((1, 2), (7.4, 3.4))
    figure, (left, right) = plt.subplots(*shape, figsize=size)
    edges = np.linspace(0, 1, bins + 1)
    fewest = min(np.size(values) for values in samples.values())
    low, high = stats.binom(fewest, 1 / bins).interval(confidence)
    left.axhspan(low * bins / fewest, high * bins / fewest, color=INK, alpha=0.15, lw=0)
    left.axhline(1, color=INK, lw=0.8, ls=":")
    right.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
    grid = np.linspace(0, 1, 801)
    for label, values in samples.items():
        color = COLORS[colors[label]]
        found = agreement(values, confidence=confidence)
        ordered = np.sort(np.asarray(values, dtype=np.float64))
        _histogram(left, ordered, edges, color, lw=1.8)
        share = np.searchsorted(ordered, grid, side="right") / found.count
        right.plot(grid, share, color=color, drawstyle="steps-post", label=f"{label} ($n = {found.count}$)")
        lower, upper = np.clip(share - found.margin, 0, 1), np.clip(share + found.margin, 0, 1)
        right.fill_between(grid, lower, upper, step="post", color=color, alpha=0.18, lw=0)
    left.set(xlabel="PIT of the norm", ylabel="density", xlim=(-0.02, 1.02))
    left.set_ylim(bottom=0)
    right.set(xlabel="PIT of the norm", ylabel="share of normal parts below", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=1 if stacked else len(samples))
    return figure


def realised_rates(
    rates: Mapping[int, ArrayLike], alpha: float, *, confidence: float | None = None, bins: int = 60
) -> Figure:
    """False-alarm rates that simulated calibrations got (bars), with the Beta law they must follow (lines).

    Args:
        rates: number n of normal parts -> realised rate of each calibration.
        alpha: the wanted rate, a dotted line.
        confidence: of the threshold, see :func:`usf.calibration.tail_rank`.
        bins: of the histograms.
    """
    figure, axes = plt.subplots(1, len(rates), figsize=(2.7 * len(rates), 2.8), squeeze=False, sharex=True)
    top = max(float(np.quantile(np.asarray(values), 0.999)) for values in rates.values())
    edges, grid = np.linspace(0, top, bins + 1), np.linspace(0, top, 400)[1:]
    for axis, (n, values) in zip(axes[0], rates.items(), strict=True):
        law = realised_rate(n, alpha, confidence=confidence)
        _histogram(axis, np.asarray(values), edges, COLORS["normal"], fill=True, alpha=0.6, label="simulated")
        axis.plot(grid, law.pdf(grid), color=COLORS["oracle"], lw=1.4, label="Beta law")
        axis.axvline(alpha, color=INK, lw=1, ls=":", label="wanted")
        axis.set(title=f"$n = {n}$", xlabel="realised false-alarm rate", yticks=[], xlim=(0, top))
        axis.set_ylim(bottom=0)
        axis.spines["left"].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def false_alarm_rates(
    nominal: Sequence[float],
    panels: Mapping[str, Mapping[str, ArrayLike]],
    colors: Mapping[str, str],
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]],
) -> Figure:
    """Realised against wanted false-alarm rate, one panel a data set; a method that keeps its promise is on the line.

    Args:
        nominal: wanted rates, (k,).
        panels: title -> label -> realised rates, (k,); NaN where the method has no threshold for that rate.
        colors: label -> key of :data:`usf.plots.COLORS`; a label that is the n-th of its colour gets the n-th marker.
        bands: title -> (lowest, highest) rate that chance alone explains for a method that keeps its promise, (k,).
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 * len(panels) + 0.4, 3.4), squeeze=False, sharex=True, sharey=True
    )
    seen: list[str] = []
    style = {}
    for label, color in colors.items():
        style[label] = MARKERS[seen.count(color) % len(MARKERS)]
        seen.append(color)
    handles: list[Any] = []
    for axis, (title, methods) in zip(axes[0], panels.items(), strict=True):
        axis.fill_between(nominal, *bands[title], color=INK, alpha=0.18, lw=0)
        axis.plot([0, max(nominal)], [0, max(nominal)], color=INK, lw=0.8, ls=":")
        handles = [
            axis.plot(nominal, rates, marker=style[label], ms=4, lw=1.3, color=COLORS[colors[label]], label=label)[0]
            for label, rates in methods.items()
        ]
        axis.set(title=title, xlabel="wanted false-alarm rate", ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("realised false-alarm rate")
    band = Patch(color=INK, alpha=0.18, lw=0, label="by chance, 95 %")
    figure.legend(handles=[*handles, band], loc="outside lower center", ncols=min(3, len(handles) + 1))
    return figure


def p_values(panels: Mapping[str, tuple[ArrayLike, ArrayLike]], *, bins: int = 20) -> Figure:
    """Histograms of p-values, normal parts (filled) and anomalous ones (outline); one panel a data set.

    Normal parts should be level, on the dotted line or below it near zero; anomalous ones pile up at the left end.

    Args:
        panels: title -> (p-values of normal parts, p-values of anomalous parts).
        bins: in [0, 1].
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels) + 0.3, 2.8), squeeze=False, sharey=True)
    edges = np.linspace(0, 1, bins + 1)
    for axis, (title, (normal, anomalous)) in zip(axes[0], panels.items(), strict=True):
        _histogram(axis, np.asarray(normal), edges, COLORS["normal"], fill=True, alpha=0.6, label="normal")
        _histogram(axis, np.asarray(anomalous), edges, COLORS["anomaly"], lw=1.8, label="anomalous")
        axis.axhline(1, color=INK, lw=0.8, ls=":", label="uniform")
        axis.set(title=title, xlabel="p-value", xlim=(-0.02, 1.02))
    axes[0, 0].set_ylabel("density")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
