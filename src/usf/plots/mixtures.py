"""Figures of the Gaussian-mixture study and of what a constant determinant cannot do.

Every function takes rows as :func:`usf.study.mixtures.load` returns them and returns a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from usf import alignment
from usf.plots.theme import COLORS, DENSITY_CMAP, DIVERGING_CMAP, INK, INNER_CMAP, PAPER, shades
from usf.study.targets import Target, paper_mixture

Rows = Sequence[Mapping[str, Any]]
Array = npt.NDArray[np.float64]

NAMES = {"deep-svdd": "Deep SVDD", "non-usf": "NonUSFlow", "usf": "USFlow"}
"""Model -> its name in figures."""

WIDTH = 8.0
"""Inches of a figure with one column a dimension: a little wider than the page's column, so that type stays legible."""


def _columns(points: Rows, model: str, dim: int, *names: str, choice: str = "val_loss") -> list[Array]:
    """Columns of one model's points, each (n,); empty arrays where the records hold none."""
    rows = [r for r in points if r["model"] == model and r["dim"] == dim and r["choice"] == choice]
    return [np.array([r[name] for r in rows], dtype=np.float64) for name in names]


def _dims(points: Rows) -> list[int]:
    return sorted({int(r["dim"]) for r in points})


def _letter(index: int) -> str:
    return f"({chr(ord('a') + index)})"


def _shared_limits(*arrays: Array, share: float = 0.004, pad: float = 0.05) -> tuple[float, float]:
    low = min(float(np.quantile(a, share)) for a in arrays)
    high = max(float(np.quantile(a, 1 - share)) for a in arrays)
    margin = pad * (high - low)
    return low - margin, high + margin


def density_contours(axis: Axes, target: Target, levels: Sequence[float], *, cells: int = 200) -> None:
    """Thin contours of a two-dimensional target at the given log-densities (ascending), over the axis' limits."""
    x = np.linspace(*axis.get_xlim(), cells)
    y = np.linspace(*axis.get_ylim(), cells)
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1))
    values = target.log_prob(grid).numpy()
    axis.contour(x, y, values, levels=sorted(levels), colors=INK, linewidths=0.7, alpha=0.8)


def _circles(axis: Axes, radii: Sequence[float], **style: Any) -> None:
    angle = np.linspace(0, 2 * np.pi, 4000)
    axis.autoscale(False)
    for radius in radii:
        axis.plot(radius * np.cos(angle), radius * np.sin(angle), **{"color": INK, "lw": 1.0, "ls": "--", **style})


def _plane(axis: Axes, title: str, *coordinates: Array) -> None:
    """A square panel with one scale on both axes that holds the points, and the circles of the base if centred."""
    spans = [(float(c.min()), float(c.max())) for c in coordinates]
    half = 0.54 * max(high - low for low, high in spans)
    centre = [0.5 * (low + high) for low, high in spans]
    axis.set_xlim(centre[0] - half, centre[0] + half)
    axis.set_ylim(centre[1] - half, centre[1] + half)
    axis.set_aspect("equal")
    axis.set_title(title)
    axis.locator_params(nbins=4)
    axis.tick_params(length=2.5, labelsize=8)


def _latent_panel(axis: Axes, z: Array, color: Array, norm: Normalize, cmap: Colormap, size: float = 7.0) -> Any:
    order = np.argsort(color)[::-1]  # the rarest points on top
    return axis.scatter(z[0][order], z[1][order], c=color[order], s=size, cmap=cmap, norm=norm, lw=0, rasterized=True)


def latent_spaces(points: Rows) -> Figure:
    """Figure 2: the data in two dimensions and where each model maps them, coloured by the true log-density.

    Dashed: one, two and three standard deviations of the flows' base; for Deep SVDD the 99th percentile of its
    distance.
    """
    figure, grid = plt.subplots(2, 2, figsize=(7.2, 6.2))
    axes = grid.ravel()
    x0, x1, true = _columns(points, "usf", 2, "x0", "x1", "true")
    norm = Normalize(float(np.quantile(true, 0.01)), float(true.max()))
    axis = axes[0]
    _plane(axis, "(a) data", x0, x1)
    density_contours(axis, paper_mixture(2), list(np.quantile(true, [0.02, 0.1, 0.3, 0.6, 0.9])))
    shown = _latent_panel(axis, np.stack([x0, x1]), true, norm, INNER_CMAP)
    for i, model in enumerate(NAMES, start=1):
        axis = axes[i]
        z0, z1, true, distance = _columns(points, model, 2, "z0", "z1", "true", "norm")
        radii = [float(np.quantile(distance, 0.99))] if model == "deep-svdd" else [1.0, 2.0, 3.0]
        # A collapsed Deep SVDD is a dot at the scale of its distances: there the points set the window, not the circle.
        reach = np.array([] if model == "deep-svdd" else [-radii[-1], radii[-1]])
        _plane(axis, f"{_letter(i)} {NAMES[model]}", np.append(z0, reach), np.append(z1, reach))
        _latent_panel(axis, np.stack([z0, z1]), true, norm, INNER_CMAP)
        _circles(axis, radii)
    figure.colorbar(shown, ax=grid, label="true log-density (nats)", pad=0.01, aspect=30)
    return figure


def volume_change(points: Rows) -> Figure:
    """Figure 3: ln|det J| at each point, in data space and in latent space, for the USFlow and the NonUSFlow."""
    figure, grid = plt.subplots(2, 2, figsize=(7.2, 6.2))
    axes = grid.ravel()
    both = np.concatenate([_columns(points, model, 2, "log_det")[0] for model in ("usf", "non-usf")])
    middle = float(np.median(_columns(points, "usf", 2, "log_det")[0]))
    reach = max(float(np.quantile(np.abs(both - middle), 0.99)), 1e-3)
    norm = TwoSlopeNorm(middle, middle - reach, middle + reach)
    for i, model in enumerate(("usf", "non-usf")):
        x0, x1, z0, z1, true, log_det = _columns(points, model, 2, "x0", "x1", "z0", "z1", "true", "log_det")
        axis = axes[2 * i]
        _plane(axis, f"{_letter(2 * i)} {NAMES[model]}: data", x0, x1)
        density_contours(axis, paper_mixture(2), list(np.quantile(true, [0.02, 0.1, 0.3, 0.6, 0.9])))
        shown = axis.scatter(
            x0, x1, c=log_det, s=9, cmap=DIVERGING_CMAP, norm=norm, lw=0.25, edgecolor=INK, rasterized=True
        )
        axis = axes[2 * i + 1]
        _plane(axis, f"{_letter(2 * i + 1)} {NAMES[model]}: latent", np.append(z0, [-3, 3]), np.append(z1, [-3, 3]))
        axis.scatter(z0, z1, c=log_det, s=9, cmap=DIVERGING_CMAP, norm=norm, lw=0.25, edgecolor=INK, rasterized=True)
        _circles(axis, [1, 2, 3])
    figure.colorbar(shown, ax=grid, label="ln|det J| (nats)", pad=0.01, aspect=30)
    return figure


def _correlations(trials: Rows | None, points: Rows, model: str, dim: int) -> str:
    """Spearman and Kendall over all test points where the trials are given, else over the points shown."""
    norm, true, number = _columns(points, model, dim, "norm", "true", "trial")
    rows = [r for r in trials or () if r["model"] == model and r["dim"] == dim and r["trial"] == int(number[0])]
    if rows:
        return f"ρ = {rows[0]['spearman']:.3f}, τ = {rows[0]['kendall']:.3f}"
    return f"ρ = {alignment.spearman(norm, true):.3f}, τ = {alignment.kendall(norm, true):.3f}"


def density_against_norm(points: Rows, trials: Rows | None = None) -> Figure:
    """Figure 4: true log-density against the latent norm, one row a model and one column a dimension.

    A model that ranks by density shows a falling curve. The number in each panel is the rank correlation over the whole
    test set where ``trials`` is given.
    """
    dims = _dims(points)
    figure, axes = plt.subplots(3, len(dims), figsize=(WIDTH, 6.6), squeeze=False, sharey="col")
    for row, model in enumerate(NAMES):
        for column, dim in enumerate(dims):
            axis = axes[row, column]
            norm, true = _columns(points, model, dim, "norm", "true")
            title = f"{_letter(row * len(dims) + column)} {NAMES[model]}, d = {dim}"
            axis.set_title(title, fontsize=9)
            axis.tick_params(length=2.5, labelsize=8)
            axis.locator_params(nbins=4)
            if not len(norm):
                axis.text(0.5, 0.5, "every trial failed", transform=axis.transAxes, ha="center")
                continue
            axis.scatter(norm, true, s=5, color=COLORS[model], alpha=0.55, lw=0, rasterized=True)
            axis.set_xlim(*_shared_limits(norm))
            axis.set_ylim(*_shared_limits(true))
            axis.set_title(f"{title}\n{_correlations(trials, points, model, dim)}", fontsize=9)
            if row == 2:
                axis.set_xlabel("latent norm")
            if column == 0:
                axis.set_ylabel("true ln p (nats)")
    return figure


def estimated_against_true(points: Rows, trials: Rows | None = None) -> Figure:
    """Figure 5: log-density of the model against the true one, one row a flow and one column a dimension."""
    dims, models = _dims(points), ("non-usf", "usf")
    figure, axes = plt.subplots(2, len(dims), figsize=(WIDTH, 4.6), squeeze=False)
    for row, model in enumerate(models):
        for column, dim in enumerate(dims):
            axis = axes[row, column]
            estimated, true, number = _columns(points, model, dim, "estimated", "true", "trial")
            title = f"{_letter(row * len(dims) + column)} {NAMES[model]}, d = {dim}"
            axis.set_title(title, fontsize=9)
            axis.tick_params(length=2.5, labelsize=8)
            axis.locator_params(nbins=4)
            if not len(true):
                axis.text(0.5, 0.5, "every trial failed", transform=axis.transAxes, ha="center")
                continue
            limits = _shared_limits(true)
            axis.plot(limits, limits, color=COLORS["oracle"], lw=1.0, ls="--")
            axis.scatter(true, estimated, s=5, color=COLORS[model], alpha=0.55, lw=0, rasterized=True)
            axis.set_xlim(*limits)
            axis.set_ylim(*_shared_limits(true, estimated))
            chosen = [r for r in trials or () if (r["model"], r["dim"], r["trial"]) == (model, dim, int(number[0]))]
            rank = chosen[0]["spearman_nll"] if chosen else alignment.spearman(-estimated, true)
            axis.set_title(f"{title}\nρ = {rank:.3f}", fontsize=9)
            if row == 1:
                axis.set_xlabel("true ln p (nats)")
            if column == 0:
                axis.set_ylabel("estimated ln p (nats)")
    return figure


def all_trials(trials: Rows, oracle: Rows, best: Rows) -> Figure:
    """Every trial of the search: what it reached in its own loss and how well its norm ranks.

    Upper row: flows, test NLL above the entropy of the same points; the vertical line is the rearrangement bound, left
    of which no USF can be. Lower row: Deep SVDD against its own validation loss. Rings mark the selected trials;
    failed trials are counted, not dropped.
    """
    dims = [int(row["dim"]) for row in oracle]
    figure, axes = plt.subplots(2, len(dims), figsize=(WIDTH, 5.2), squeeze=False)
    chosen = {(r["model"], r["dim"], r["trial"]) for r in best}
    for column, entry in enumerate(oracle):
        dim = int(entry["dim"])
        for model in NAMES:
            axis = axes[int(model == "deep-svdd"), column]
            mine = [r for r in trials if r["model"] == model and r["dim"] == dim]
            good = [r for r in mine if r["status"] == "ok"]
            x = np.array([r["val_loss"] if model == "deep-svdd" else r["excess_nll"] for r in good])
            y = np.array([r["spearman"] for r in good])
            axis.scatter(x, y, s=26, color=COLORS[model], alpha=0.85, lw=0, label=NAMES[model])
            ring = np.array([(model, dim, r["trial"]) in chosen for r in good], dtype=bool)
            if ring.any():
                axis.scatter(x[ring], y[ring], s=95, facecolor="none", edgecolor=INK, lw=1.2)
            if len(mine) > len(good):
                axis.text(0.97, 0.06, f"{len(mine) - len(good)} failed", transform=axis.transAxes, ha="right")
        upper, lower = axes[0, column], axes[1, column]
        upper.set_title(f"d = {dim}")
        upper.axvline(entry["gap"], color=COLORS["oracle"], ls="--", lw=1.2)
        for axis in (upper, lower):
            axis.set_xscale("log")
        upper.margins(y=0.12)
        upper.set_xlabel("NLL - entropy (nats)")
        lower.set_xlabel("one-class loss")
        lower.axhline(0, color=INK, lw=0.7, alpha=0.6)
        if column == 0:
            upper.set_ylabel("Spearman ρ")
            lower.set_ylabel("Spearman ρ")
    (lower_dots, lower_names), (dots, names) = (axes[i, 0].get_legend_handles_labels() for i in (1, 0))
    figure.legend(dots + lower_dots, names + lower_names, loc="outside upper center", ncols=3, handletextpad=0.1)
    return figure


def collapse(trials: Rows) -> Figure:
    """Deep SVDD, all trials and dimensions: loss against spread and effective rank; rings mark the lowest losses."""
    rows = [r for r in trials if r["model"] == "deep-svdd" and r["status"] == "ok"]
    dims = sorted({int(r["dim"]) for r in rows})
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.2))
    markers = dict(zip(dims, "osD^vP", strict=False))
    for dim in dims:
        mine = [r for r in rows if r["dim"] == dim]
        loss = [r["val_loss"] for r in mine]
        style: dict[str, Any] = {"marker": markers[dim], "ls": "", "alpha": 0.85, "label": f"d = {dim}"}
        axes[0].plot(loss, [r["spread"] for r in mine], color=COLORS["deep-svdd"], **style)
        axes[1].plot(loss, [r["effective_rank"] / dim for r in mine], color=COLORS["deep-svdd"], **style)
        lowest = min(mine, key=lambda r: r["val_loss"])
        for axis, value in zip(axes, (lowest["spread"], lowest["effective_rank"] / dim), strict=True):
            axis.scatter(lowest["val_loss"], value, s=110, facecolor="none", edgecolor=INK, lw=1.2)
    axes[0].set(xscale="log", yscale="log", xlabel="one-class loss (validation)", ylabel="spread / norm of the centre")
    axes[1].set(xscale="log", xlabel="one-class loss (validation)", ylabel="effective rank / d", ylim=(0, 1.05))
    axes[0].legend()
    return figure


BASES = {
    "gaussian": "normal",
    "gaussian shaken": "normal, shaken start",
    "laplace": "Laplace",
    "gamma mixture": "radial, gamma mixture",
    "spline": "radial, spline",
}
"""Base -> its name in the figures of the chapter on limits, all of them bases of USFs."""


def gaps(rows: Rows) -> Figure:
    """Measured excess over the entropy of each target and base, beside the bound of each fixed base."""
    targets = list(dict.fromkeys(str(r["target"]) for r in rows))
    figure, axes = plt.subplots(1, len(targets), figsize=(2.1 * len(targets) + 1.4, 2.7), sharey=True, squeeze=False)
    names = list(BASES)
    for axis, target in zip(axes[0], targets, strict=True):
        for place, base in enumerate(names):
            for row in rows:
                if row["target"] != target or row["base"] != base:
                    continue
                if row["status"] == "ok":
                    axis.barh(place, row["excess_nll"], height=0.62, color=COLORS["usf"], alpha=0.85, lw=0)
                else:
                    axis.text(0.02, place, "failed", va="center", transform=axis.get_yaxis_transform())
                if row.get("test_gap"):
                    axis.plot([row["test_gap"]] * 2, [place - 0.42, place + 0.42], color=INK, lw=1.6)
        axis.set_title(target)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks(range(len(names)), [BASES[name] for name in names])
        axis.set_xlabel("NLL - entropy (nats)")
    return figure


def plane_scores(
    target: Target, scores: Mapping[str, Any], points: Array, *, extent: float, cells: int = 160
) -> Figure:
    """Scores over the plane beside the target, each as its rank, so that maps with unlike units can be compared.

    Args:
        target: the density, of dimension 2.
        scores: title -> function from points (n, 2), float64 tensor, to scores (n,).
        points: samples to draw, (n, 2).
        extent: half the side of the square.
        cells: pixels along a side.
    """
    axis_values = torch.linspace(-extent, extent, cells, dtype=torch.float64)
    grid = torch.cartesian_prod(axis_values, axis_values)
    maps = {"-ln p": -target.log_prob(grid)} | {title: score(grid) for title, score in scores.items()}
    figure, axes = plt.subplots(1, len(maps), figsize=(2.9 * len(maps) + 0.8, 2.9), squeeze=False)
    for axis, (title, values) in zip(axes[0], maps.items(), strict=True):
        ranks = values.argsort().argsort().reshape(cells, cells).T.numpy() / (cells**2 - 1)
        box = (-extent, extent, -extent, extent)
        shown = axis.imshow(ranks, origin="lower", extent=box, cmap=DENSITY_CMAP + "_r", interpolation="bilinear")
        axis.scatter(points[:, 0], points[:, 1], s=1.2, color=PAPER, alpha=0.5, lw=0, rasterized=True)
        axis.set_title(title)
        axis.set_xlim(-extent, extent)
        axis.set_ylim(-extent, extent)
        axis.tick_params(length=2.5, labelsize=8)
    figure.colorbar(shown, ax=axes, label="score (rank)", pad=0.01, aspect=30)
    return figure


def radial_profiles(profiles: Mapping[str, tuple[Array, Array]], ideal: tuple[Array, Array] | None = None) -> Figure:
    """ln p of bases against the distance to their centre, each shifted to a maximum of 0.

    Args:
        profiles: base (a key of `BASES`) -> (distances, log-densities).
        ideal: the target's own rearrangement, where it is known.
    """
    figure, axis = plt.subplots(figsize=(5.2, 3.2))
    tones = shades("usf", len(profiles))
    for place, (base, (r, values)) in enumerate(profiles.items()):
        style = ("-", "--", "-.", ":")[place % 4]
        axis.plot(r, values - values.max(), style, color=tones[place], label=BASES[base])
    if ideal is not None:
        axis.plot(ideal[0], ideal[1] - ideal[1].max(), color=COLORS["oracle"], ls="--", label="rearranged target")
    axis.set(xlabel="distance to the centre", ylabel="ln p - max (nats)", ylim=(-12, 0.8))
    axis.legend()
    return figure
