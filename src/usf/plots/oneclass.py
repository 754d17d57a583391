"""Figures of chapter 1 (two views of normality) and chapter 5 (density inversion)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from usf.flows import Flow
from usf.oneclass import DeepSVDD, HomogeneousLimit, MonteCarlo, inversion_loss, inversion_map, standard_normal_log_prob
from usf.plots.theme import COLORS, INK, INNER_CMAP
from usf.study.inversion import Trajectory
from usf.study.moons import Moons

QUANTILES = (0.5, 0.9, 0.99)
_STYLES = ("-", "--", ":")


def _points(ax: Axes, x: Tensor, role: str, *, size: float = 5, alpha: float = 0.6) -> None:
    ax.scatter(x[:, 0], x[:, 1], s=size, color=COLORS[role], alpha=alpha, linewidths=0, rasterized=True, zorder=2)


def _square(ax: Axes, limit: float, center: Sequence[float] = (0.0, 0.0)) -> None:
    ax.set_xlim(center[0] - limit, center[0] + limit)
    ax.set_ylim(center[1] - limit, center[1] + limit)
    ax.set_aspect("equal")


def _circle(ax: Axes, center: Sequence[float], radius: float, style: str, color: str) -> None:
    t = np.linspace(0, 2 * np.pi, 300)
    ax.plot(center[0] + radius * np.cos(t), center[1] + radius * np.sin(t), style, color=color, lw=1.5, zorder=3)


# ------------------------------------------------------------------------------------------------------------ chapter 1


@torch.no_grad()
def two_views(moons: Moons, svdd: DeepSVDD, flow: Flow) -> Figure:
    """Figure 1 of the paper: the data with level sets of each score, and the two latent spaces.

    Level sets hold 50, 90 and 99 % of the training samples; in a latent space they are circles round the centre.
    """
    fig, axes = plt.subplots(2, 2, figsize=(7.8, 7.6))
    axis = torch.linspace(-3, 3, 241)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    shown_normal, shown_outliers = moons.test[:1000], moons.outliers[:400]
    for (left, right), model, key, name in (
        (axes[0], svdd, "deep-svdd", "Deep SVDD"),
        (axes[1], flow, "usf", "Uniformly scaling flow"),
    ):
        root = model.score(moons.train).sqrt() if model is svdd else model.score(moons.train)
        levels = np.quantile(root.numpy(), QUANTILES)
        surface = model.score(grid.reshape(-1, 2)).reshape(grid.shape[:-1])
        surface = surface.sqrt() if model is svdd else surface
        _points(left, shown_normal, "normal", alpha=0.45)
        _points(left, shown_outliers, "anomaly")
        left.contour(axis, axis, surface.numpy(), levels=levels, colors=COLORS[key], linestyles=_STYLES, linewidths=1.8)
        _square(left, 3.05)
        left.set(title=f"{name}: data space", xlabel="$x_1$", ylabel="$x_2$")

        center = svdd.center.tolist() if model is svdd else [0.0, 0.0]
        for sample, role in ((shown_outliers, "anomaly"), (shown_normal, "normal")):
            _points(right, model.latent(sample), role)
        for level, style in zip(levels, _STYLES, strict=True):
            _circle(right, center, level, style, COLORS[key])
        right.plot(*center, marker="+", ms=12, mew=2, color=INK, zorder=4)
        reach = float((model.latent(moons.outliers) - torch.tensor(center)).norm(dim=-1).quantile(0.9))
        _square(right, max(1.15 * levels[-1], reach), center)
        right.set(title=f"{name}: latent space", xlabel="$z_1$", ylabel="$z_2$")
    marks = [
        Line2D([], [], ls="", marker="o", color=COLORS["normal"], label="normal"),
        Line2D([], [], ls="", marker="o", color=COLORS["anomaly"], label="outlier"),
        *(
            Line2D([], [], ls=style, color=INK, label=f"{100 * q:.0f} % of normal data")
            for q, style in zip(QUANTILES, _STYLES, strict=True)
        ),
        Line2D([], [], ls="", marker="+", ms=9, mew=2, color=INK, label="centre"),
    ]
    fig.legend(handles=marks, loc="outside lower center", ncols=3)
    return fig


@torch.no_grad()
def inverse_map(moons: Moons, flow: Flow, seed: int) -> Figure:
    """A polar grid and samples of the base, and what the inverse of the flow makes of them."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.8, 4.2))
    t = torch.linspace(0, 2 * torch.pi, 721)
    around = torch.stack([t.cos(), t.sin()], -1)
    rings = [r * around for r in (0.5, 1.0, 1.5, 2.0, 2.5)]
    along = torch.linspace(0, 2.5, 301).unsqueeze(-1)
    rays = [along * torch.tensor([np.cos(a), np.sin(a)], dtype=torch.float32) for a in np.arange(12) * np.pi / 6]
    z = torch.randn(700, 2, generator=torch.Generator().manual_seed(seed))
    for ax, to in ((left, lambda v: v), (right, flow.inverse)):
        _points(ax, to(z), "usf", size=6, alpha=0.7)
        for line in rings:
            ax.plot(*to(line).numpy().T, color=INK, lw=0.9, zorder=1)
        for line in rays:
            ax.plot(*to(line).numpy().T, color=INK, lw=0.5, alpha=0.6, zorder=1)
    _points(right, moons.test[:700], "normal", size=6, alpha=0.5)
    _square(left, 3.05)
    _square(right, 3.05)
    left.set(title="Latent space: base samples", xlabel="$z_1$", ylabel="$z_2$")
    right.set(title="Mapped back by the inverse", xlabel="$x_1$", ylabel="$x_2$")
    marks = [
        Line2D([], [], ls="", marker="o", color=COLORS["usf"], label="samples of the flow"),
        Line2D([], [], ls="", marker="o", color=COLORS["normal"], label="held-out data"),
        Line2D([], [], color=INK, lw=0.9, label="radius 0.5, 1, 1.5, 2, 2.5"),
    ]
    fig.legend(handles=marks, loc="outside lower center", ncols=3)
    return fig


def collapse_curves(curves: Mapping[str, Sequence], styles: Mapping[str, tuple[str, str]]) -> Figure:
    """The three monitors over training.

    Args:
        curves: label -> `usf.oneclass.CollapseReport` before each epoch and at the end.
        styles: label -> (key of ``COLORS``, line style).
    """
    fig, axes = plt.subplots(1, 3, figsize=(8.8, 3.1))
    panels = (
        ("Latent standard deviation", lambda r: float(np.mean(r.std))),
        ("Effective rank", lambda r: r.effective_rank),
        ("Share of distinct scores", lambda r: r.distinct_fraction),
    )
    for ax, (title, measure) in zip(axes, panels, strict=True):
        for label, reports in curves.items():
            color, style = styles[label]
            values = [measure(report) for report in reports]
            ax.plot(np.linspace(0, 1, len(values)), values, style, color=COLORS[color], label=label)
        ax.set(title=title, xlabel="training progress")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("mean over dimensions")
    axes[1].set_ylim(0.9, 2.05)
    axes[2].set_ylim(-0.03, 1.03)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


# ------------------------------------------------------------------------------------------------------------ chapter 5


def inversion_geometry(alphas: Sequence[float], seed: int) -> Figure:
    """Samples of N(0, I_2), their images under F_1, and the score of F_alpha against the radius."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9.0, 3.4), width_ratios=(1, 1, 1.15))
    x = torch.randn(1500, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    density = standard_normal_log_prob(x).exp().numpy()
    for ax, points in ((left, x), (middle, inversion_map(x, 1.0))):
        shown = ax.scatter(points[:, 0], points[:, 1], c=density, cmap=INNER_CMAP, s=7, linewidths=0, rasterized=True)
        _square(ax, 3.2)
    bar = fig.colorbar(shown, ax=[left, middle], location="bottom", shrink=0.6, aspect=40, label="true density of $x$")
    bar.outline.set_visible(False)
    left.set(title="$x$", xlabel="$x_1$", ylabel="$x_2$")
    middle.set(title="$F_1(x)$", xlabel="$z_1$", ylabel="$z_2$")
    for ax in (left, middle):
        ax.plot(0, 0, "+", ms=12, mew=2, color=INK)

    r = np.linspace(0.25, 4, 300)
    for alpha in alphas:
        right.plot(r, 1 / (alpha * r) ** 2, color=COLORS["deep-svdd"])
        right.text(4.1, 1 / (alpha * r[-1]) ** 2, rf"$\alpha = {alpha:g}$", color=COLORS["deep-svdd"], va="center")
    right.plot(r, r**2 / 2, color=COLORS["oracle"])
    right.text(4.1, r[-1] ** 2 / 2, r"$-\ln p + \mathrm{const}$", color=COLORS["oracle"], va="center")
    right.set(title=r"Score $\|F_\alpha(x)\|^2$", xlabel=r"$\|x\|$", yscale="log", xlim=(0, 4))
    return fig


def inversion_losses(estimates: Mapping[tuple[int, float], MonteCarlo]) -> Figure:
    """Exact loss (lines) and Monte-Carlo estimates against the dimension; and their ratio with error bars.

    Args:
        estimates: (d, alpha) -> estimate.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.5))
    alphas = sorted({alpha for _, alpha in estimates})
    dims = np.array(sorted({dim for dim, _ in estimates}))
    for index, (alpha, marker) in enumerate(zip(alphas, "osD^v", strict=False)):
        exact = np.array([inversion_loss(int(d), alpha) for d in dims])
        found = np.array([estimates[int(d), alpha].mean for d in dims])
        error = np.array([estimates[int(d), alpha].standard_error for d in dims])
        finite = np.array([estimates[int(d), alpha].finite_variance for d in dims])
        left.plot(dims, exact, color=COLORS["oracle"], lw=1.2, label="exact" if index == 0 else None)
        left.plot(dims, found, marker, ms=5, color=COLORS["deep-svdd"], label=rf"Monte Carlo, $\alpha = {alpha:g}$")
        place = np.arange(len(dims)) + 0.16 * (index - (len(alphas) - 1) / 2)
        for mask, face in ((finite, COLORS["deep-svdd"]), (~finite, "none")):
            right.errorbar(
                place[mask],
                (found / exact)[mask],
                2 * (error / exact)[mask],
                fmt=marker,
                ms=5,
                mfc=face,
                color=COLORS["deep-svdd"],
                lw=1.2,
            )
    right.axhline(1, color=COLORS["oracle"], lw=1.2)
    right.set_xticks(np.arange(len(dims)), [str(d) for d in dims])
    left.set(xscale="log", yscale="log", xlabel="dimension $d$", ylabel="one-class loss", title="Loss of $F_\\alpha$")
    left.set_xticks(dims, [str(d) for d in dims])
    left.minorticks_off()
    left.legend(loc="lower left", fontsize=8)
    right.set(xlabel="dimension $d$", title="Monte Carlo / exact, two standard errors")
    return fig


def running_means(curves: Mapping[int, np.ndarray]) -> Figure:
    """Mean loss of the first n samples for several dimensions, alpha = 1; in d = 2 it has nowhere to go.

    Args:
        curves: d -> array of shape (repetitions, n).
    """
    fig, axes = plt.subplots(1, len(curves), figsize=(2.9 * len(curves), 3.0))
    for ax, (dim, runs) in zip(axes, curves.items(), strict=True):
        n = np.unique(np.geomspace(10, runs.shape[1], 400).astype(int))
        ax.plot(n, runs[:, n - 1].T, color=COLORS["deep-svdd"], lw=1.0, alpha=0.7)
        if dim > 2:
            ax.axhline(inversion_loss(dim, 1.0), color=COLORS["oracle"], lw=1.8, zorder=3, label="$1/(d-2)$")
        else:
            ax.plot(n, np.log(n) / 2, color=COLORS["oracle"], lw=1.8, zorder=3, label=r"$(\ln n)/2$")
        top = float(np.quantile(runs[:, n - 1], 0.985))
        ax.set(xscale="log", xlabel="samples $n$", title=f"$d = {dim}$", ylim=(0, 1.15 * top))
        ax.legend(loc="lower right")
    axes[0].set_ylabel("mean loss of the first $n$")
    return fig


def inversion_training(
    svdd: Mapping[int, Sequence[Trajectory]],
    usf: Mapping[int, Sequence[Trajectory]],
    limits: Mapping[int, HomogeneousLimit],
) -> Figure:
    """Spearman coefficient of score and minus log-density over training, one panel a dimension, one line a seed."""
    fig, axes = plt.subplots(1, len(svdd), figsize=(max(4.0, 2.9 * len(svdd)), 3.4), sharey=True, squeeze=False)
    for ax, dim in zip(axes[0], svdd, strict=True):
        ax.axhline(0, color=INK, lw=0.6)
        for runs, key, name in ((svdd[dim], "deep-svdd", "Deep SVDD"), (usf[dim], "usf", "USF")):
            for index, run in enumerate(runs):
                x = np.array(run.epochs) / run.epochs[-1]
                ax.plot(x, run.spearman, color=COLORS[key], lw=1.4, label=name if index == 0 else None)
        ax.axhline(limits[dim].spearman, color=COLORS["oracle"], ls="--", lw=1.4, label="homogeneous limit")
        ax.set(title=f"$d = {dim}$", xlabel="training progress", ylim=(-1.03, 1.05))
    axes[0][0].set_ylabel("alignment with the density\n(Spearman; 1 right, $-1$ reversed)")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


@torch.no_grad()
def score_against_radius(
    svdd: Mapping[int, Trajectory], usf: Mapping[int, Trajectory], limits: Mapping[int, HomogeneousLimit]
) -> Figure:
    """Score of every test sample against its distance from the mode: Deep SVDD above, USF below."""
    fig, axes = plt.subplots(2, len(svdd), figsize=(max(4.0, 2.9 * len(svdd)), 5.4), sharex="col", squeeze=False)
    for column, dim in enumerate(svdd):
        upper, lower = axes[:, column]
        top = 1.08 * float(svdd[dim].test.norm(dim=-1).max())
        r = np.linspace(0, top, 300)
        run = svdd[dim]
        assert isinstance(run.model, DeepSVDD)
        scale = float(run.model.center.square().sum())
        upper.scatter(
            run.test.norm(dim=-1),
            run.model.score(run.test) / scale,
            s=4,
            color=to_rgba(COLORS["deep-svdd"], 0.45),
            linewidths=0,
            rasterized=True,
        )
        upper.plot(r, limits[dim].score(r), "--", color=COLORS["oracle"], lw=1.4)
        upper.plot(0, 1, "*", ms=13, color=INK, clip_on=False, zorder=5)
        upper.set(title=f"$d = {dim}$", ylim=(0, 1.5))
        flow = usf[dim]
        assert isinstance(flow.model, Flow)
        lower.scatter(
            flow.test.norm(dim=-1),
            flow.model.score(flow.test),
            s=4,
            color=to_rgba(COLORS["usf"], 0.45),
            linewidths=0,
            rasterized=True,
        )
        mode = float(flow.model.score(torch.zeros(1, dim)))
        lower.plot(r, r, "--", color=COLORS["oracle"], lw=1.4)
        lower.plot(0, mode, "*", ms=13, color=INK, clip_on=False, zorder=5)
        lower.set(xlabel=r"distance from the mode $\|x\|$", xlim=(0, top), ylim=(0, top))
    axes[0, 0].set_ylabel("Deep SVDD\nscore / $\\|c\\|^2$")
    axes[1, 0].set_ylabel("USF\nscore")
    marks = [
        Line2D([], [], ls="", marker="o", color=COLORS["deep-svdd"], label="Deep SVDD"),
        Line2D([], [], ls="", marker="o", color=COLORS["usf"], label="USF"),
        Line2D([], [], ls="--", color=COLORS["oracle"], label="limit (above), identity (below)"),
        Line2D([], [], ls="", marker="*", ms=10, color=INK, label="the mode, $x = 0$"),
    ]
    fig.legend(handles=marks, loc="outside lower center", ncols=4)
    return fig
