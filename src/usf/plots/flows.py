"""Figures of chapters 2 to 4: what layers do to a grid, volume maps, the path to collapse, determinants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from scipy import stats
from torch import Tensor

from usf.flows import Bijection, Flow, GaussianBase
from usf.plots.theme import COLORS, DIVERGING_CMAP, INK, INNER_CMAP
from usf.study.targets import Target

Array = npt.NDArray[np.float64]


def grid_cells(extent: float | tuple[float, float, float, float], cells: int, edge: int = 12) -> Tensor:
    """Outlines of a square grid's cells, shape (cells^2, 4 * edge, 2), float64; each side holds ``edge`` points.

    Args:
        extent: (x0, x1, y0, y1), or one number for the symmetric square.
        cells: cells along each axis.
        edge: points on each side, so that bent sides are drawn and measured as such.
    """
    x0, x1, y0, y1 = (-extent, extent, -extent, extent) if isinstance(extent, (int, float)) else extent
    t = torch.linspace(0, 1, edge + 1, dtype=torch.float64)[:-1]
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    square = torch.cat([torch.stack(side, -1) for side in ((t, zero), (one, t), (1 - t, one), (zero, 1 - t))])
    index = torch.cartesian_prod(torch.arange(cells), torch.arange(cells)).double()
    unit = (index[:, None, :] + square) / cells
    return torch.tensor([x0, y0], dtype=torch.float64) + unit * torch.tensor([x1 - x0, y1 - y0], dtype=torch.float64)


def cell_areas(outlines: Tensor) -> Tensor:
    """Areas of polygons (n, k, 2) by the shoelace formula, shape (n,)."""
    following = outlines.roll(-1, dims=1)
    cross = outlines[..., 0] * following[..., 1] - outlines[..., 1] * following[..., 0]
    return 0.5 * cross.sum(-1).abs()


def _fill(axis: Axes, outlines: Tensor, values: Tensor, norm: Normalize, width: float = 0.6) -> None:
    polygons = PolyCollection(
        list(outlines.numpy()), array=values.numpy(), cmap=DIVERGING_CMAP, norm=norm, edgecolor=INK, linewidth=width
    )
    axis.add_collection(polygons)


def _center(flow: Flow) -> Tensor:
    return flow.base.center if isinstance(flow.base, GaussianBase) else torch.zeros(())


def _bare(axis: Axes) -> None:
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


@torch.no_grad()
def layer_actions(layers: Mapping[str, Bijection], *, extent: float = 1.5, cells: int = 12) -> Figure:
    """What each 2-D layer does to a square grid; a cell's colour is ln of its area after over before.

    Args:
        layers: title -> bijection on (2,), in float64.
    """
    figure, axes = plt.subplots(1, len(layers) + 1, figsize=(1.85 * (len(layers) + 1), 2.3))
    before = grid_cells(extent, cells)
    norm = Normalize(-1, 1)
    for axis, (title, layer) in zip(axes, [("before", None), *layers.items()], strict=True):
        after = before if layer is None else layer(before)[0]
        change = (cell_areas(after) / cell_areas(before)).log()
        _fill(axis, after, change, norm)
        outline = after.reshape(-1, 2).numpy()
        middle = 0.5 * (outline.min(0) + outline.max(0))
        half = 1.04 * float(np.abs(outline - middle).max())
        axis.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
        _bare(axis)
        axis.set_title(title)
    figure.colorbar(ScalarMappable(norm, DIVERGING_CMAP), ax=axes, shrink=0.8, pad=0.01, label="ln area ratio")
    return figure


def _density_contours(axis: Axes, target: Target, extent: tuple[float, float, float, float]) -> None:
    x = torch.linspace(extent[0], extent[1], 160, dtype=torch.float64)
    y = torch.linspace(extent[2], extent[3], 160, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    log_p = target.log_prob(grid)
    top = float(log_p.max())
    levels = [top - drop for drop in (7.0, 5.0, 3.5, 2.25, 1.25, 0.5)]
    axis.contour(x, y, log_p, levels=levels, colors=INK, linewidths=0.8, linestyles="solid")


@torch.no_grad()
def volume_maps(
    flows: Mapping[str, Flow],
    target: Target,
    points: Tensor,
    *,
    extent: tuple[float, float, float, float] = (-7, 6, -4.5, 4.5),
    limit: float = 1.0,
) -> Figure:
    """The paper's figure 3: ln|det J| over the data plane (left) and on the latents (right), a row per flow.

    Args:
        flows: title -> flow on (2,).
        target: the true density, drawn as contours.
        points: samples (n, 2), shown in the latent space.
        limit: ln|det J| minus its mean over ``points`` is shown from minus to plus this many nats.
    """
    figure, axes = plt.subplots(len(flows), 2, figsize=(7.2, 2.75 * len(flows)), width_ratios=(1.35, 1))
    axes = np.asarray(axes).reshape(-1, 2)
    norm = Normalize(-limit, limit)
    dtype = points.dtype
    x = torch.linspace(extent[0], extent[1], 260, dtype=dtype)
    y = torch.linspace(extent[2], extent[3], 180, dtype=dtype)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    for (left, right), (title, flow) in zip(axes, flows.items(), strict=True):
        at_points = flow.log_abs_det_jacobian(points)
        mean = at_points.mean()
        left.pcolormesh(
            x,
            y,
            flow.log_abs_det_jacobian(grid) - mean,
            cmap=DIVERGING_CMAP,
            norm=norm,
            shading="gouraud",
            rasterized=True,
        )
        _density_contours(left, target, extent)
        left.set(xlim=extent[:2], ylim=extent[2:], aspect="equal", ylabel=title)
        latent = flow.latent(points) - _center(flow)
        right.scatter(
            *latent.T,
            c=at_points - mean,
            cmap=DIVERGING_CMAP,
            norm=norm,
            s=7,
            edgecolor=INK,
            linewidth=0.2,
            rasterized=True,
        )
        for radius in (1, 2, 3):
            right.add_patch(Circle((0, 0), radius, fill=False, edgecolor=INK, linestyle="--", linewidth=0.9))
        right.set(xlim=(-4.2, 4.2), ylim=(-4.2, 4.2), aspect="equal")
    axes[0, 0].set_title("data space")
    axes[0, 1].set_title("latent space")
    figure.colorbar(
        ScalarMappable(norm, DIVERGING_CMAP), ax=axes, shrink=0.7, label="ln|det J| minus its mean", extend="both"
    )
    return figure


@torch.no_grad()
def pulled_back_grids(
    flows: Mapping[str, Flow], points: Tensor, *, radius: float = 2.6, cells: int = 20, limit: float = 1.0
) -> Figure:
    """A square grid of the latent space drawn in the data space; colour is ln of a cell's area over the mean's.

    Args:
        flows: title -> flow on (2,).
        points: samples (n, 2), drawn on top.
        radius: half the side of the latent grid.
    """
    figure, axes = plt.subplots(1, len(flows), figsize=(3.8 * len(flows), 3.1), sharex=True, sharey=True)
    norm = Normalize(-limit, limit)
    dtype = points.dtype
    for axis, (title, flow) in zip(np.atleast_1d(axes), flows.items(), strict=True):
        outlines = flow.inverse(grid_cells(radius, cells).to(dtype) + _center(flow)).double()
        areas = cell_areas(outlines)
        _fill(axis, outlines, (areas / areas.mean()).log(), norm, 0.5)
        axis.scatter(*points.T, s=2, color=INK, alpha=0.55, linewidth=0, rasterized=True)
        axis.set(title=title, aspect="equal")
        axis.set_xlim(-8.5, 7)
        axis.set_ylim(-5, 5)
    figure.colorbar(
        ScalarMappable(norm, DIVERGING_CMAP), ax=axes, shrink=0.85, label="ln area, relative", extend="both"
    )
    return figure


def gap_bars(losses: Mapping[str, float], entropy: float, bound: float, colors: Sequence[str]) -> Figure:
    """Test cross-entropy above the entropy, one bar per model, in nats; a line at what no USF can go below."""
    figure, axis = plt.subplots(figsize=(5.6, 0.7 + 0.42 * len(losses)))
    gaps = [value - entropy for value in losses.values()]
    axis.barh(list(losses), gaps, color=list(colors), height=0.6)
    for row, gap in enumerate(gaps):
        axis.text(gap, row, f" {gap:.2f}", va="center")
    axis.axvline(bound - entropy, color=COLORS["oracle"], linestyle="--", label="no USF below this line")
    axis.invert_yaxis()
    axis.set(xlabel="nats above the entropy", xlim=(0, 1.2 * max(gaps)))
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


# --- chapter 3 --------------------------------------------------------------------------------------------------------


def latents_along_path(latents: Mapping[float, Tensor], log_density: Tensor, center: Tensor) -> Figure:
    """Latents of the same points for falling weights of the log-determinant: at one scale, and below each at its own.

    Args:
        latents: weight -> latents (n, 2).
        log_density: true log-density of the points, (n,), nats: the colour.
        center: c, (2,).
    """
    figure, rows = plt.subplots(2, len(latents), figsize=(1.6 * len(latents), 3.7), sharey="row")
    shown = log_density.clamp_min(log_density.quantile(0.02))
    for upper, lower, (weight, z) in zip(*rows, latents.items(), strict=True):
        off = z - center
        own = off.square().mean().sqrt().item()
        for axis, scale in ((upper, 1.0), (lower, own)):
            axis.scatter(*(off / scale).T, c=shown, cmap=INNER_CMAP, s=4, linewidth=0, rasterized=True)
            if weight > 0:
                # Two standard deviations of the base that this weight stands for, in a colour that is not the points'.
                radius = 2 * math.sqrt(weight / 2) / scale
                circle = Circle((0, 0), radius, fill=False, edgecolor=COLORS["other"], linewidth=1.8, zorder=3)
                axis.add_patch(circle)
        upper.set(title=rf"$\lambda$ = {weight:g}", aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
        lower.set(aspect="equal", xlim=(-3.9, 3.9), ylim=(-3.9, 3.9))
        for axis, tick in ((upper, 2), (lower, 3)):
            axis.set_xticks([-tick, 0, tick])
            axis.set_yticks([-tick, 0, tick])
    rows[0, 0].set_ylabel("one scale")
    rows[1, 0].set_ylabel("in units of its\nown std")
    return figure


def weight_path(
    weights: Sequence[float], std: Sequence[float], spearman: Sequence[float], objective: Sequence[float]
) -> Figure:
    """Three quantities along the path: latent scale, rank agreement with weight 1, and the scale-free objective.

    Args:
        weights: positive weights of the log-determinant.
        std: root of E||phi(x) - c||^2 / d for each.
        spearman: rank correlation of the scores with those at the first weight.
        objective: d/2 ln E||phi(x) - c||^2 - ln|det|, nats.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(8.6, 2.6))
    line = np.geomspace(min(weights), max(weights), 50)
    left.loglog(line, np.sqrt(line / 2), color=COLORS["oracle"], linestyle="--", label=r"$\sqrt{\lambda/2}$")
    left.loglog(weights, std, "o", color=COLORS["usf"], label="trained USF")
    left.set(title="latent scale", xlabel=r"$\lambda$", ylabel="std per dimension")
    left.legend()
    middle.semilogx(weights, spearman, "o-", color=COLORS["usf"])
    middle.set(
        title=r"rank agreement with $\lambda=1$",
        xlabel=r"$\lambda$",
        ylabel="Spearman",
        ylim=(min(0.9, min(spearman) - 0.02), 1.005),
    )
    right.semilogx(weights, objective, "o-", color=COLORS["usf"])
    center = float(np.mean(objective))
    right.set(title="scale-free objective", xlabel=r"$\lambda$", ylabel="nats", ylim=(center - 0.5, center + 0.5))
    return figure


def collapse_traces(traces: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]]) -> Figure:
    """Training step against E||phi(x) - c||^2 (left, log) and ln|det| (right), a line per run.

    Args:
        traces: label -> (steps, squared distances, log-determinants).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.7))
    palette = [COLORS["usf"], COLORS["deep-svdd"], COLORS["non-usf"], COLORS["gin"]]
    for (label, (steps, squared, log_det)), color in zip(traces.items(), palette, strict=False):
        left.semilogy(steps, squared, color=color, label=label)
        right.plot(steps, log_det, color=color, label=label)
    left.set(xlabel="step", ylabel=r"$E\,\|\phi(x)-c\|^2$")
    right.set(xlabel="step", ylabel="ln|det J|  (nats)")
    left.legend()
    return figure


# --- chapter 4 --------------------------------------------------------------------------------------------------------


def determinant_traces(
    traces: Mapping[str, tuple[Sequence[int], Sequence[float]]], styles: Mapping[str, Mapping[str, object]]
) -> Figure:
    """ln|det J|, averaged over the training points, against the training step; a line per run.

    Args:
        traces: label -> (steps, log-determinants).
        styles: label -> keyword arguments of the line.
    """
    figure, axis = plt.subplots(figsize=(6.6, 3.1))
    for label, (steps, values) in traces.items():
        axis.plot(steps, values, label=label, **{"linewidth": 1.3, **styles[label]})  # type: ignore[arg-type]
    axis.axhline(0, color=INK, linewidth=0.6)
    axis.set(xlabel="step", ylabel="ln|det J|  (nats)")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def log_det_histograms(samples: Mapping[str, Array], sigma: float, colors: Sequence[str]) -> Figure:
    """Histograms of simulated ln|det| against the normal law N(0, sigma^2) that was promised."""
    figure, axis = plt.subplots(figsize=(6.0, 2.9))
    grid = np.linspace(-4 * sigma, 4 * sigma, 400)
    bins = np.linspace(-4 * sigma, 4 * sigma, 121)
    for (label, values), color in zip(samples.items(), colors, strict=True):
        axis.hist(values, bins.tolist(), density=True, color=color, alpha=0.55, label=label)
    axis.plot(
        grid, stats.norm(0, sigma).pdf(grid), color=COLORS["oracle"], linestyle="--", label=rf"$N(0,\,{sigma:g}^2)$"
    )
    axis.set(xlabel="ln|det|  (nats)", ylabel="density")
    axis.legend()
    return figure


def prior_by_sample_size(
    sizes: Sequence[int],
    losses: Mapping[str, Sequence[float]],
    log_dets: Mapping[str, Sequence[float]],
    *,
    entropy: float,
    true_log_det: float,
    colors: Sequence[str],
) -> Figure:
    """Test cross-entropy above the entropy (left) and ln|det| (right) against the number of samples, a line per prior.

    Args:
        sizes: numbers of training samples.
        losses: label -> test cross-entropy for each size, nats.
        log_dets: label -> ln|det J| for each size, nats.
        entropy: of the target, nats.
        true_log_det: where many samples lead; the dashed line of the right panel.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.0))
    for (label, values), color in zip(losses.items(), colors, strict=True):
        left.loglog(sizes, np.asarray(values) - entropy, "o-", color=color, label=label)
        right.semilogx(sizes, log_dets[label], "o-", color=color, label=label)
    right.axhline(true_log_det, color=COLORS["oracle"], linestyle="--")
    left.set(xlabel="training samples n", ylabel="nats above the entropy")
    right.set(xlabel="training samples n", ylabel="ln|det J|  (nats)")
    left.legend()
    return figure
