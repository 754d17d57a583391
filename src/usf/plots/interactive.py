"""Figures that answer: a slider, and points that are the same in every panel.

Each function computes all that its figure can show and returns a :class:`Figure`, which displays itself as one HTML
element with the data in it. The pages of the book draw it (``book/_static/figures.js``, no library, no server, no
network); elsewhere, in a notebook for instance, a sentence stands in its place and points to the still figure beside
it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colors import Normalize, to_hex
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from usf.alignment import spearman
from usf.oneclass import inversion_loss, inversion_map, standard_normal_log_prob
from usf.plots.theme import COLORS, INNER_CMAP

__all__ = ["Figure", "collapse_path", "density_inversion", "latent_explorer"]

Array = npt.NDArray[np.float64]
NAMES = {"usf": "USFlow", "non-usf": "NonUSFlow", "deep-svdd": "Deep SVDD"}
"""Model -> its name, in the order of the panels."""


def short(values: npt.ArrayLike, digits: int = 4) -> list[float]:
    """Numbers with ``digits`` significant digits, which is what a screen can show.

    >>> short([1 / 3, 20000 / 3])
    [0.3333, 6667.0]
    """
    return [float(f"{value:.{digits}g}") for value in np.asarray(values, dtype=np.float64).ravel()]


def ranks(values: npt.ArrayLike) -> list[int]:
    """1 for the smallest value, n for the largest; equal values in the order of their places.

    >>> ranks([0.3, 0.1, 0.2])
    [3, 1, 2]
    """
    order = np.argsort(np.asarray(values), kind="stable")
    found = np.empty(len(order), dtype=int)
    found[order] = np.arange(1, len(order) + 1)
    return found.tolist()


@dataclasses.dataclass(frozen=True)
class Figure:
    """What an interactive figure shows, ready for display.

    Attributes:
        content: ``slider`` (label, one text a position), ``colors`` of the points, ``positions`` (name -> x and y of
            the points, for each position of the slider or once), ``panels``, ``frame`` and ``point`` (what is said of
            the slider's position and of the chosen point), ``order`` (points from the likeliest to the rarest) and
            ``focus`` (points that stand out at a position of the slider, or nothing).
    """

    content: Mapping[str, Any]

    def json(self) -> str:
        """The content, in a form that may stand inside an HTML element.

        Raises:
            ValueError: for a number that is not finite.
        """
        text = json.dumps(self.content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.replace("<", "\\u003c")

    def _repr_html_(self) -> str:
        slider = escape(self.content["slider"]["label"])
        return (
            f'<usf-figure><script type="application/json">{self.json()}</script>'
            f"<p>In the pages of the book, with JavaScript, a slider ({slider}) moves here what the figure beside this "
            "one shows standing still.</p></usf-figure>"
        )


def _ticks(low: float, high: float, count: int = 4) -> list[tuple[float, str]]:
    found = [float(v) for v in MaxNLocator(count).tick_values(low, high) if low <= v <= high]
    return [(v, f"{v:g}".replace("-", "\N{MINUS SIGN}")) for v in found]


def _points(
    of: str, title: str, x: str, y: str, xlim: tuple[float, float], ylim: tuple[float, float]
) -> dict[str, Any]:
    """A panel of points; ``of`` names their positions."""
    return {
        "of": of,
        "title": title,
        "x": x,
        "y": y,
        "xlim": short(xlim, 6),
        "ylim": short(ylim, 6),
        "xticks": _ticks(*xlim),
        "yticks": _ticks(*ylim),
    }


def _lines(title: str, lines: Sequence[tuple[str, str, npt.ArrayLike]]) -> dict[str, Any]:
    """A panel of lines over the positions of the slider: (label, colour, values) each."""
    values = np.concatenate([np.asarray(v, dtype=np.float64) for _, _, v in lines])
    margin = 0.06 * float(np.ptp(values)) or 1.0
    ylim = (float(values.min()) - margin, float(values.max()) + margin)
    return {
        "title": title,
        "ylim": short(ylim, 6),
        "yticks": _ticks(*ylim),
        "lines": [{"label": label, "color": color, "values": short(v)} for label, color, v in lines],
    }


def _square(reach: float, center: tuple[float, float] = (0.0, 0.0)) -> dict[str, tuple[float, float]]:
    return {
        "xlim": (center[0] - reach, center[0] + reach),
        "ylim": (center[1] - reach, center[1] + reach),
    }


def _colors(log_density: Array) -> list[str]:
    """A colour for each point, bright where it is likely; the rarest two per cent share one."""
    scale = Normalize(float(np.quantile(log_density, 0.02)), float(log_density.max()), clip=True)
    return [to_hex(color) for color in INNER_CMAP(scale(log_density))]


def _order(log_density: Array) -> list[int]:
    return np.argsort(-log_density, kind="stable").tolist()


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


# ------------------------------------------------------------------------------------------------------------ chapter 3


def collapse_path(
    path: Mapping[float, tuple[float, float, Tensor, Tensor]],
    log_density: Tensor,
    center: Tensor,
    *,
    points: int = 240,
) -> Figure:
    r"""From maximum likelihood to collapse: a slider over the weight of the log-determinant.

    Args:
        path: weight -> (:math:`E\|\phi-c\|^2`, scale-free objective, scores (n,), latents (n, 2)) of the flow that was
            trained with it; see :func:`usf.study.collapse.scale_free_objective`.
        log_density: true log-density of the same n samples, nats.
        center: c, (2,).
        points: how many of the samples are drawn; ranks are among these.

    Raises:
        ValueError: for latents that are not in the plane.
    """
    weights = sorted(path, reverse=True)
    if any(path[w][3].shape[1] != 2 for w in weights):
        raise ValueError("the path is drawn in the plane: latents must have two coordinates")
    true = log_density.double().numpy()
    squared = np.array([path[w][0] for w in weights])
    # The scale-free objective is (d / 2) ln E||phi - c||^2 - ln|det J|, with d = 2 here.
    log_det = np.log(squared) - np.array([path[w][1] for w in weights])
    terms = np.array(weights) * -log_det
    cloud = [(path[w][3][:points] - center).double().numpy() for w in weights]
    scores = [path[w][2][:points].double().numpy() for w in weights]
    reach = 1.03 * float(np.quantile(np.abs(cloud[0]), 0.995))
    own = 1.03 * max(float(np.quantile(np.abs(z) / math.sqrt(s), 0.98)) for z, s in zip(cloud, squared, strict=True))
    agreement = [spearman(path[w][2], log_density) for w in weights]
    return Figure(
        {
            "slider": {"label": "weight λ of the log-determinant", "values": [f"{w:g}" for w in weights]},
            "colors": _colors(true[:points]),
            "order": _order(true[:points]),
            "positions": {"z": [[short(z[:, 0]), short(z[:, 1])] for z in cloud]},
            "panels": [
                _points("z", "Latents, at one scale", "z₁ − c₁", "z₂ − c₂", **_square(reach)) | {"orbit": True},
                _points("z", "The same, in units of their own size", "", "", **_square(own))
                | {"orbit": True, "scale": short(1 / np.sqrt(squared), 6)},
                _lines(
                    "The loss and its two terms",
                    [
                        ("E‖φ − c‖²", COLORS["deep-svdd"], squared),
                        ("−λ ln|det J|", COLORS["usf"], terms),
                        ("their sum", COLORS["oracle"], squared + terms),
                    ],
                ),
                _lines("ln|det J|, nats", [("ln|det J|", COLORS["usf"], log_det)]),
            ],
            "frame": [
                ["E‖φ − c‖²", [_minus(f"{v:.3g}") for v in squared]],
                ["ln|det J|", [_minus(f"{v:.2f}") for v in log_det]],
                ["|det J|", [_minus(f"{math.exp(v):.3g}") for v in log_det]],
                ["loss", [_minus(f"{v:.3g}") for v in squared + terms]],
                ["Spearman, score and −ln p", [_minus(f"{v:.3f}") for v in agreement]],
            ],
            "point": [
                ["true ln p", [short(true[:points], 3)]],
                ["rank by density", [ranks(-true[:points])]],
                ["distance to c", [short(s, 3) for s in scores]],
                ["rank by distance", [ranks(s) for s in scores]],
            ],
        }
    )


# ------------------------------------------------------------------------------------------------------------ chapter 5


def density_inversion(alphas: Sequence[float], *, dim: int = 3, points: int = 240, seed: int = 0) -> Figure:
    r"""Proposition 1: a slider over :math:`\alpha` of :math:`F_\alpha`, on samples of :math:`N(0, I_d)`.

    A sample is drawn in the direction of its first two coordinates at its distance from the origin, which is all that
    the density and the score depend on.

    Args:
        alphas: positions of the slider.
        dim: d > 2.
        points: how many samples.
        seed: of the samples.
    """
    x = torch.randn(points, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    true = standard_normal_log_prob(x).numpy()
    images = [inversion_map(x, alpha) for alpha in alphas]

    def drawn(v: Tensor) -> list[list[float]]:
        flat = v[:, :2] / v[:, :2].norm(dim=-1, keepdim=True) * v.norm(dim=-1, keepdim=True)
        return [short(flat[:, 0]), short(flat[:, 1])]

    scores = [z.square().sum(-1).numpy() for z in images]
    exact = [inversion_loss(dim, alpha) for alpha in alphas]
    logs = np.log10(np.stack(scores))
    reach = 1.05 * float(x.norm(dim=-1).max())
    outside = [int((z.norm(dim=-1) > reach).sum()) for z in images]
    flipped = [spearman(torch.from_numpy(s), torch.from_numpy(true)) for s in scores]
    return Figure(
        {
            "slider": {"label": "α", "values": [f"{a:g}" for a in alphas]},
            "colors": _colors(true),
            "order": _order(true),
            "positions": {
                "x": [drawn(x)],
                "z": [drawn(z) for z in images],
                "s": [[short(true), short(s)] for s in logs],
            },
            "panels": [
                _points("x", "Data x, at its true distance", "", "", **_square(reach)) | {"orbit": True},
                _points("z", "Latents F_α(x), same scale", "", "", **_square(reach)) | {"orbit": True},
                _points(
                    "s",
                    "Score against density",
                    "true ln p",
                    "log₁₀ score",
                    (float(true.min()) - 0.3, float(true.max()) + 0.3),
                    (float(logs.min()) - 0.2, float(np.quantile(logs[0], 0.995)) + 0.2),
                ),
                _lines("Deep SVDD loss, log₁₀", [("exact", COLORS["deep-svdd"], np.log10(exact))]),
            ],
            "frame": [
                ["loss, exact", [f"{v:.3g}" for v in exact]],
                ["loss of these points", [f"{s.mean():.3g}" for s in scores]],
                ["Spearman, score and −ln p", [_minus(f"{v:.3f}") for v in flipped]],
                ["latents outside the window", [str(n) for n in outside]],
            ],
            "point": [
                ["‖x‖", [short(x.norm(dim=-1), 3)]],
                ["true ln p", [short(true, 3)]],
                ["score", [short(s, 3) for s in scores]],
                ["rank by density", [ranks(-true)]],
                ["rank by score", [ranks(s) for s in scores]],
            ],
        }
    )


# ------------------------------------------------------------------------------------------------------------ chapter 7


def latent_explorer(points: Sequence[Mapping[str, Any]], *, window: int = 50, step: int = 25) -> Figure:
    """The mixture in the plane and three latent spaces: a slider moves a window of equal density through the points.

    Args:
        points: as :func:`usf.study.mixtures.load` returns them; the selected model of each kind with d = 2 is shown.
        window: how many points of neighbouring density rank stand out at once.
        step: ranks between two positions of the slider.

    Raises:
        ValueError: when the models were not recorded on the same points.
    """
    rows = {
        model: sorted(
            (r for r in points if r["model"] == model and r["dim"] == 2 and r["choice"] == "val_loss"),
            key=lambda r: r["point"],
        )
        for model in NAMES
    }
    numbers = [[r["point"] for r in own] for own in rows.values()]
    if not numbers[0] or any(own != numbers[0] for own in numbers):
        raise ValueError("the explorer links the points of three models: record the same points of each in d = 2")

    def column(model: str, name: str) -> Array:
        return np.array([r[name] for r in rows[model]], dtype=np.float64)

    true = column("usf", "true")
    order = _order(true)
    count = len(order)
    starts = range(0, count - window + 1, step)
    focus = [order[start : start + window] for start in starts]
    norm_ranks = {model: np.array(ranks(column(model, "norm"))) for model in NAMES}

    def span(model: str, own: list[int]) -> str:
        low, high = np.quantile(norm_ranks[model][own], [0.1, 0.9])
        return f"{low:.0f} to {high:.0f}"

    positions: dict[str, list[list[list[float]]]] = {"x": [[short(column("usf", "x0")), short(column("usf", "x1"))]]}
    x = np.stack([column("usf", "x0"), column("usf", "x1")])
    middle = 0.5 * (x.min(1) + x.max(1))
    panels = [_points("x", "Data", "x₁", "x₂", **_square(0.54 * float(np.ptp(x, axis=1).max()), tuple(middle)))]
    for model, name in NAMES.items():
        z = np.stack([column(model, "z0"), column(model, "z1")])
        # A collapsed cloud is drawn in thousandths, say, so that its ticks are short.
        size = float(np.ptp(z))
        unit = 1 if size > 0.5 else 10 ** (1 + math.ceil(-math.log10(size)))
        z, title = z * unit, f"{name}: latents" if unit == 1 else f"{name}, × {unit}"
        positions[model] = [[short(z[0]), short(z[1])]]
        middle = 0.5 * (z.min(1) + z.max(1)) if model == "deep-svdd" else np.zeros(2)
        half = 0.54 * float(np.ptp(z, axis=1).max()) if model == "deep-svdd" else 1.03 * float(np.abs(z).max())
        panels.append(_points(model, title, "", "", **_square(half, tuple(middle))) | {"orbit": True})
    said = [["true ln p", [short(true, 3)]], ["rank by density", [ranks(-true)]]]
    for model, name in NAMES.items():
        said.append([f"{name}: norm", [short(column(model, "norm"), 3)]])
        said.append([f"{name}: rank by norm", [norm_ranks[model].tolist()]])
    return Figure(
        {
            "slider": {
                "label": "points of one density, ranks",
                "values": [f"{start + 1} to {start + window} of {count}" for start in starts],
            },
            "colors": _colors(true),
            "order": order,
            "focus": focus,
            "positions": positions,
            "panels": panels,
            "frame": [
                [f"{name}: ranks by norm, 80 % of them", [span(model, own) for own in focus]]
                for model, name in NAMES.items()
            ],
            "point": said,
        }
    )
