"""Has a one-class model collapsed? Three monitors that need no labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SCORE_TOLERANCE = 1e-4
"""Relative difference below which two scores count as one."""


@dataclass(frozen=True)
class CollapseReport:
    """What is left of a latent space.

    Attributes:
        std: standard deviation of each latent dimension, in latent units.
        spread: root of the mean squared distance of the latents to *their own mean*, divided by the norm of the
            centre; free of units. Zero where all inputs have become one point, infinite where the centre is the origin.
        effective_rank: Roy and Vetterli's (2007) effective rank of the latents around their mean; between 1 and
            the latent dimension, and 0 for a single point.
        distinct_scores: number of scores that differ by more than ``tolerance``, relatively.
        samples: number of samples the report is about.
        tolerance: of ``distinct_scores``.
    """

    std: tuple[float, ...]
    spread: float
    effective_rank: float
    distinct_scores: int
    samples: int
    tolerance: float

    @property
    def distinct_fraction(self) -> float:
        """Share of samples with a score of their own."""
        return self.distinct_scores / self.samples


@torch.no_grad()
def collapse_report(latent: Tensor, center: Tensor, *, tolerance: float = SCORE_TOLERANCE) -> CollapseReport:
    """The three monitors for latents of shape (n, k) and a centre of shape (k,).

    Raises:
        ValueError: for fewer than two samples, another shape, or values that are not finite.

    >>> z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> healthy, collapsed = collapse_report(z, torch.ones(2)), collapse_report(1 + 0 * z, torch.ones(2))
    >>> healthy.effective_rank > 1.9, collapsed.effective_rank, collapsed.distinct_scores
    (True, 0.0, 1)
    """
    if latent.ndim != 2 or len(latent) < 2 or center.shape != latent.shape[1:]:
        raise ValueError(
            "collapse_report needs latents of shape (n, k) with n >= 2 and a centre of shape (k,); "
            f"got {tuple(latent.shape)} and {tuple(center.shape)}"
        )
    if not (torch.isfinite(latent).all() and torch.isfinite(center).all()):
        raise ValueError("latents or centre are not finite: the model has diverged, or its centre is not set")
    rounding = torch.finfo(latent.dtype).eps * float(torch.maximum(latent.abs().max(), center.abs().max()))
    z, c = latent.double(), center.double()
    deviation = z - z.mean(0)
    # What rounding alone would show for one repeated point is no spread.
    floor = 4 * rounding * z.shape[1] ** 0.5
    scores = (z - c).square().sum(-1)
    rms, norm = float(deviation.square().sum(-1).mean().sqrt()), float(c.norm())
    return CollapseReport(
        std=tuple(deviation.std(0).tolist()),
        spread=rms / norm if norm > 0 else float("inf"),
        effective_rank=effective_rank(z, floor=floor),
        distinct_scores=distinct(scores, tolerance=tolerance, floor=floor**2),
        samples=len(z),
        tolerance=tolerance,
    )


def effective_rank(latent: Tensor, *, floor: float = 0.0) -> float:
    """Effective rank of latents around their mean (Roy and Vetterli 2007).

    The exponential of the Shannon entropy of the singular values, normalised to sum to one: k for k directions of
    equal spread, 1 for a line, and by convention 0 for a point.

    Args:
        latent: shape (n, k).
        floor: root-mean-square deviation along a singular direction that still counts as nothing.
    """
    values = torch.linalg.svdvals(latent.double() - latent.double().mean(0))
    values = values[values > floor * len(latent) ** 0.5]
    if values.numel() == 0 or float(values.sum()) == 0:
        return 0.0
    share = values / values.sum()
    return float(torch.exp(torch.special.entr(share).sum()))


def distinct(scores: Tensor, *, tolerance: float = SCORE_TOLERANCE, floor: float = 0.0) -> int:
    """How many different values there are among non-negative scores of shape (n,).

    Sorted scores open a new value whenever they exceed the first of the current one by more than ``tolerance`` times
    themselves; everything up to ``floor`` is one value.

    >>> distinct(torch.tensor([1.0, 1.00001, 2.0, 4.0]), tolerance=1e-3)
    3
    """
    count, start = 0, -np.inf
    for value in np.sort(scores.detach().double().clamp_min(floor).cpu().numpy()):
        if value - start > tolerance * value:
            count, start = count + 1, value
    return count
