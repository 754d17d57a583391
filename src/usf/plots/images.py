"""Figures of the image chapters: anomaly maps beside ground truth, training curves, scores by kind of defect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from usf.plots.theme import COLORS, INK, MAP_CMAP, MASK_CMAP, PAPER
from usf.study.detection import FitHistory

__all__ = ["anomaly_maps", "scores_by_kind", "training_curves"]


def anomaly_maps(
    images: Tensor,
    masks: NDArray[np.bool_],
    maps: Mapping[str, NDArray[np.float32]],
    titles: Sequence[str],
) -> Figure:
    """One column per image: the image with the outline of its defect, the ground truth, and one map per detector.

    Each detector has one logarithmic colour scale for all its maps, from the median of the normal pixels (black) to the
    99.5th percentile of all pixels shown, so that a normal image may be compared with an anomalous one.

    Args:
        images: (N, 3, H, W) in [0, 1].
        masks: (N, H, W), true where the defect is.
        maps: label -> (N, H, W), positive, higher is more anomalous.
        titles: one per image.

    Raises:
        ValueError: when the numbers of images, masks, maps and titles differ.
    """
    count = len(titles)
    if {len(images), len(masks), *map(len, maps.values())} != {count}:
        raise ValueError("images, masks, maps and titles must have the same length")
    rows = 2 + len(maps)
    figure, axes = plt.subplots(
        rows,
        count + 1,
        figsize=(1.5 * count + 0.9, 1.5 * rows + 0.2),
        width_ratios=[1.0] * count + [0.05],
        squeeze=False,
    )
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    for column, title in enumerate(titles):
        axes[0, column].imshow(images[column].permute(1, 2, 0).clamp(0, 1).numpy())
        axes[0, column].set_title(title.replace("_", " "), fontsize=9)
        axes[1, column].imshow(masks[column], cmap=MASK_CMAP, vmin=0, vmax=1, interpolation="nearest")
    for row, values in enumerate(maps.values(), start=2):
        low = float(np.median(values[~masks]))
        high = max(float(np.quantile(values, 0.995)), 1.01 * low)
        scale = LogNorm(low, high, clip=True)
        for column in range(count):
            shown = axes[row, column].imshow(values[column], cmap=MAP_CMAP, norm=scale)
            if masks[column].any():
                axes[row, column].contour(masks[column], levels=[0.5], colors=PAPER, linewidths=0.7)
        ticks = [low, (low * high) ** 0.5, high]
        bar = figure.colorbar(shown, cax=axes[row, count], ticks=ticks, format="%.3g")
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    for row, label in enumerate(("image", "ground truth", *maps)):
        axes[row, 0].set_ylabel(label, fontsize=9)
    for axis in axes[:2, count]:
        axis.set_visible(False)
    for axis in axes[:, :count].flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure


def training_curves(histories: Mapping[str, FitHistory], colors: Mapping[str, str]) -> Figure:
    """Negative log-likelihood in nats per dimension over epochs: training (line) and held-out normal images (dashed).

    Args:
        histories: label -> what the run did.
        colors: label -> key of :data:`usf.plots.COLORS`.
    """
    figure, axis = plt.subplots(figsize=(6.0, 3.0))
    for label, history in histories.items():
        epochs = np.arange(1, history.epochs + 1)
        color = COLORS[colors[label]]
        axis.plot(epochs, history.train, color=color, marker="o", markersize=3, label=f"{label}, training")
        if history.val:
            axis.plot(epochs, history.val, color=color, linestyle="--", label=f"{label}, held out")
    axis.set(xlabel="epoch", ylabel="nats per dimension")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def scores_by_kind(scores: Mapping[str, NDArray[np.float32]], kinds: Sequence[str]) -> Figure:
    """Image scores of each detector, one row a kind of test image, normal ones first; the scale is logarithmic.

    The vertical line is the highest score of a normal test image: what lies to its right is told from every normal one.

    Args:
        scores: label -> (N,), positive.
        kinds: the kind of each image, ``"good"`` for normal ones, (N,).
    """
    names = sorted(set(kinds), key=lambda kind: (kind != "good", kind))
    of_kind = np.asarray(kinds)
    figure, axes = plt.subplots(
        1, len(scores), figsize=(3.6 * len(scores), 0.32 * len(names) + 1.1), sharey=True, squeeze=False
    )
    # Spread by a fixed pattern, so that the figure is the same every time.
    for axis, (label, values) in zip(axes[0], scores.items(), strict=True):
        for row, name in enumerate(names):
            own = np.sort(values[of_kind == name])
            offset = 0.22 * ((np.arange(len(own)) * 0.618) % 1 - 0.5)
            color = COLORS["normal" if name == "good" else "anomaly"]
            axis.plot(own, row + offset, linestyle="none", marker="o", markersize=3.5, alpha=0.8, color=color)
        axis.axvline(values[of_kind == "good"].max(), color=INK, linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="image score", title=label)
    axes[0, 0].set(yticks=range(len(names)), yticklabels=[name.replace("_", " ") for name in names])
    axes[0, 0].invert_yaxis()
    return figure
