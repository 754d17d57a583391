"""Figures of the VAE with a flow prior: areas by class, the two levels of its latent space, images that it decodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from usf.plots.theme import COLORS, INK

__all__ = ["LABELS", "areas", "image_grid", "two_levels", "two_terms"]

LABELS = {"usf": "VAE-USFlow", "non-usf": "VAE-NonUSFlow", "gaussian": "VAE"}
_COLORS = {"usf": "usf", "non-usf": "non-usf", "gaussian": "other"}


def areas(panels: Mapping[str, tuple[Sequence[Mapping[str, Any]], str]], *, seeds: int, group: str = "class") -> Figure:
    """Image AUROC by group: one panel after the other, one colour a prior, a dot a training and a bar at their mean.

    Under each group stands how many of ``seeds`` trainings are valid, so that a failed one is seen. The dotted line is
    chance.

    Args:
        panels: title -> (records of :mod:`usf.study.hybrid`, the column that is shown). Failed ones have no area.
        seeds: trainings per group and prior that were planned.
        group: column of the records by which they stand together.
    """
    groups = list(dict.fromkeys(row[group] for rows, _ in panels.values() for row in rows))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.1 * len(panels) + 0.6, 3.2), sharey=True, sharex=True, squeeze=False
    )
    for axis, (title, (rows, column)) in zip(axes[0], panels.items(), strict=True):
        for place, name in enumerate(groups):
            for shift, (prior, label) in enumerate(LABELS.items()):
                own = [row for row in rows if row[group] == name and row["prior"] == prior]
                values = [100 * row[column] for row in own if row["status"] == "ok"]
                x = place + 0.28 * (shift - 1)
                color = COLORS[_COLORS[prior]]
                axis.plot([x] * len(values), values, "o", color=color, markersize=4, alpha=0.85, label=label)
                if values:
                    axis.plot([x - 0.11, x + 0.11], [np.mean(values)] * 2, color=color)
                axis.annotate(
                    f"{len(values)}/{seeds}",
                    (x, 0),
                    (0, 2),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=INK,
                )
        axis.axhline(50, color=INK, linewidth=0.8, linestyle=":")
        axis.set(title=title, xticks=range(len(groups)), xticklabels=groups, xlim=(-0.5, len(groups) - 0.5))
    axes[0, 0].set(ylabel="image AUROC, %")
    axes[0, 0].margins(y=0.14)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=len(known))
    return figure


def two_terms(
    groups: Mapping[str, tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]],
    surprises: Mapping[str, tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]],
    colors: Mapping[str, str],
) -> Figure:
    """Reconstruction against latent term, in nats and after calibration, with lines along which their sum is constant.

    Args:
        groups: group of images -> (-ln p(x | z), -ln p_Z(z)), nats, (n,) each.
        surprises: the same groups -> (-ln p of the first term, of the second), p among held-out normal images.
        colors: group -> key of :data:`usf.plots.COLORS`.

    Raises:
        ValueError: when the groups differ, or there are none.
    """
    if list(groups) != list(surprises) or not groups:
        raise ValueError("both panels need the same groups, at least one")
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.5))
    # Ties of p-values would hide each other.
    jitter = np.random.default_rng(0)
    for axis, panel, width in zip(axes, (groups, surprises), (0.0, 0.06), strict=True):
        for name, (x, y) in panel.items():
            shaken = [values + width * jitter.standard_normal(len(values)) for values in (x, y)]
            axis.plot(*shaken, "o", markersize=3, alpha=0.7, color=COLORS[colors[name]], label=name)
        (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
        for total in np.linspace(left + low, right + high, 9)[1:-1]:
            axis.plot([left, right], [total - left, total - right], color=INK, linewidth=0.7, linestyle=":", zorder=0)
        axis.set(xlim=(left, right), ylim=(low, high))
    axes[0].set(title="in nats", xlabel=r"$-\ln p(x\mid z)$", ylabel=r"$-\ln p_Z(z)$")
    axes[1].set(title="as p-values", xlabel=r"$-\ln p$ of the reconstruction", ylabel=r"$-\ln p$ of the latent density")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    return figure


def two_levels(
    encoded: Mapping[str, NDArray[np.floating[Any]]],
    latent: Mapping[str, NDArray[np.floating[Any]]],
    colors: Mapping[str, str],
) -> Figure:
    """Both spaces of a flow-prior VAE: what the encoder makes of images, and what the flow makes of that.

    Left the means of q(z | x), then their flow latents, each in the plane of the first two principal components of the
    first group. Beside them the distribution of the latter's norm.

    Args:
        encoded: group -> (n, d), e.g. training, held-out normal and anomalous images.
        latent: the same groups -> (n, d).
        colors: group -> key of :data:`usf.plots.COLORS`.

    Raises:
        ValueError: when the groups differ, or d is below 2.
    """
    if list(encoded) != list(latent) or not encoded:
        raise ValueError("encoded and latent need the same groups, at least one")
    dimension = next(iter(encoded.values())).shape[1]
    if dimension < 2:
        raise ValueError(f"a plane needs two dimensions or more, got {dimension}")
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), width_ratios=[1, 1, 0.9])
    titles = ("encoder: mean of q(z | x)", "flow latent of that mean")
    for axis, groups, title in zip(axes[:2], (encoded, latent), titles, strict=True):
        first = next(iter(groups.values()))
        center = first.mean(0)
        _, _, directions = np.linalg.svd(first - center, full_matrices=False)
        for name, points in groups.items():
            plane = (points - center) @ directions[:2].T
            axis.plot(*plane.T, "o", markersize=3, alpha=0.7, color=COLORS[colors[name]], label=name)
        axis.set(title=title, xlabel="first component", ylabel="second component")
    for name, points in latent.items():
        norms = np.sort(np.linalg.norm(points, axis=1))
        share = (np.arange(len(norms)) + 1) / len(norms)
        axes[2].step(norms, share, where="post", color=COLORS[colors[name]], label=name)
    axes[2].set(title="norm of the flow latent", xlabel="norm", ylabel="share of images below")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(encoded))
    return figure


def image_grid(rows: Mapping[str, Tensor], columns: Sequence[str] | None = None) -> Figure:
    """Rows of images with their names: samples of the prior, or the way along one latent direction.

    Args:
        rows: name -> (n, 3, h, w) in [0, 1], the same n for all.
        columns: a title for each column.
    """
    counts = {len(images) for images in rows.values()}
    if len(counts) != 1:
        raise ValueError(f"every row needs the same number of images, got {sorted(counts)}")
    (count,) = counts
    figure, axes = plt.subplots(len(rows), count, figsize=(1.1 * count + 0.8, 1.15 * len(rows) + 0.2), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
    for axis, title in zip(axes[0], columns or [], strict=False):
        axis.set_title(title, fontsize=9)
    return figure
