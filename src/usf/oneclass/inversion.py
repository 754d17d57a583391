r"""Proposition 1 of the paper: a map with arbitrarily small one-class loss that reverses the order of a density.

The paper prints :math:`F_\alpha(x) = 1/(\alpha \|x\|)`, a number. As a map :math:`\mathbb R^d \to \mathbb R^d` it is

.. math:: F_\alpha(x) = \frac{x}{\alpha \|x\|^2}, \qquad F_\alpha(0) = 0,

the inversion in the sphere of radius :math:`\alpha^{-1/2}`, and the norm of its value is the printed number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

_CHUNK = 4_000_000  # numbers drawn at a time: 32 MB


def inversion_map(x: Tensor, alpha: float) -> Tensor:
    """F_alpha(x) = x / (alpha |x|^2) on vectors of shape (..., d), with F_alpha(0) = 0; an involution up to scale.

    Raises:
        ValueError: for alpha that is not positive.

    >>> inversion_map(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), alpha=2.0)
    tensor([[0.0600, 0.0800],
            [0.0000, 0.0000]])
    """
    _check_alpha(alpha)
    # Divided by the norm twice: the square of a small norm would underflow.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    safe = torch.where(norm > 0, norm, torch.ones_like(norm))
    return torch.where(norm > 0, x / safe / safe / alpha, torch.zeros_like(x))


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """ln N(x; 0, I) in nats, batch shape of x with shape (..., d)."""
    return -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def expected_inverse_square(dim: int) -> float:
    """E[1 / |x|^2] = 1 / (d - 2) for x ~ N(0, I_d), d > 2.

    Raises:
        ValueError: for d <= 2, where the expectation is infinite.
    """
    if dim <= 2:
        raise ValueError(f"E[1/|x|^2] is infinite for d = {dim}: proposition 1 needs d > 2")
    return 1.0 / (dim - 2)


def inversion_loss(dim: int, alpha: float) -> float:
    """The one-class loss of F_alpha on N(0, I_d) with centre 0, exactly: 1 / (alpha^2 (d - 2)).

    Raises:
        ValueError: for d <= 2, where the loss is infinite, and for alpha that is not positive.

    >>> inversion_loss(dim=4, alpha=5.0)
    0.02
    """
    _check_alpha(alpha)
    return expected_inverse_square(dim) / alpha**2


def truncated_loss(alpha: float, epsilon: float) -> float:
    r"""The loss of F_alpha in d = 2 without the disc :math:`\|x\|^2 < \epsilon`.

    :math:`\|x\|^2` is exponential with mean 2, so the integral is :math:`E_1(\epsilon/2) / (2 \alpha^2)`. It grows like
    :math:`\ln(1/\epsilon) / (2 \alpha^2)`: logarithmically, and without bound.

    >>> round(truncated_loss(1.0, 1e-4) - truncated_loss(1.0, 1e-2), 2)  # ln(100) / 2 = 2.30
    2.3
    """
    _check_alpha(alpha)
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive: without a hole at the origin the loss is infinite; got {epsilon}")
    return float(special.exp1(epsilon / 2)) / (2 * alpha**2)


@dataclass(frozen=True)
class MonteCarlo:
    """A Monte-Carlo estimate of the loss of F_alpha.

    Attributes:
        mean: of alpha^-2 / |x|^2 over the samples.
        standard_error: standard deviation over the square root of the number of samples. For d <= 4 the variance it
            estimates is infinite, see ``finite_variance``: read it as a lower bound on the uncertainty.
        samples: how many.
        finite_variance: whether d > 4.
    """

    mean: float
    standard_error: float
    samples: int
    finite_variance: bool


def monte_carlo_loss(dim: int, alpha: float, samples: int, seed: int) -> MonteCarlo:
    """Loss of F_alpha on ``samples`` draws of N(0, I_d), centre 0; any d >= 1, also where the exact loss is infinite.

    The vectors are drawn and mapped, not the chi-square law of their norm: the estimate checks that step too.
    """
    _check_alpha(alpha)
    if dim < 1 or samples < 2:
        raise ValueError(f"monte_carlo_loss needs dim >= 1 and samples >= 2; got {dim} and {samples}")
    values = _losses(dim, alpha, samples, seed)
    return MonteCarlo(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(samples), samples, dim > 4)


@dataclass(frozen=True)
class HomogeneousLimit:
    """The best that a positively homogeneous encoder can do on N(0, I_d), see `homogeneous_limit`.

    Attributes:
        dim: d.
        radius: r* = E[r^2] / E[r], where the score is zero.
        loss: the infimum of the one-class loss, divided by |c|^2: 1 - E[r]^2 / E[r^2].
        spearman: between the limiting score and minus the log-density (1 aligned, -1 inverted).
        inverted_mass: probability of r < r*, where a more likely point scores higher.
        below_mode: probability of a score below that of the mode, r < 2 r*.
    """

    dim: int
    radius: float
    loss: float
    spearman: float
    inverted_mass: float
    below_mode: float

    def score(self, radius: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The limiting score divided by |c|^2, (1 - r / r*)^2, at each radius."""
        return (1 - np.asarray(radius, dtype=np.float64) / self.radius) ** 2


def homogeneous_limit(dim: int) -> HomogeneousLimit:
    r"""What training drives a bias-free ReLU or LeakyReLU network to on N(0, I_d).

    Such a network is positively homogeneous, f(r u) = r f(u) for r >= 0, so along a direction u it chooses one vector
    alone. The choice that minimises the one-class loss is c / r* in every direction, with :math:`r^* = E[r^2] / E[r]`
    and score :math:`\|c\|^2 (1 - r / r^*)^2`. All values are exact up to quadrature.

    >>> limit = homogeneous_limit(2)
    >>> round(limit.loss, 4) == round(1 - math.pi / 4, 4), round(limit.spearman, 3)
    (True, -0.597)
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    mean = math.sqrt(2) * math.exp(special.gammaln((dim + 1) / 2) - special.gammaln(dim / 2))
    radius = dim / mean

    def mass(r: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
        return special.gammainc(dim / 2, np.maximum(r, 0.0) ** 2 / 2)

    # Spearman's coefficient is 12 E[UV] - 3 for the ranks U = P(r' < r) and V = P(score' < score), on a quantile grid.
    u = (np.arange(20_000) + 0.5) / 20_000
    r = np.sqrt(2 * special.gammaincinv(dim / 2, u))
    reach = np.abs(r - radius)
    v = mass(radius + reach) - mass(radius - reach)
    return HomogeneousLimit(
        dim=dim,
        radius=radius,
        loss=1 - mean**2 / dim,
        spearman=float(12 * (u * v).mean() - 3),
        inverted_mass=float(mass(radius)),
        below_mode=float(mass(2 * radius)),
    )


def running_loss(dim: int, alpha: float, samples: int, seed: int) -> npt.NDArray[np.float64]:
    """Mean loss of the first n of ``samples`` draws, for every n; shape (samples,)."""
    _check_alpha(alpha)
    return np.cumsum(_losses(dim, alpha, samples, seed)) / np.arange(1, samples + 1)


def _losses(dim: int, alpha: float, samples: int, seed: int) -> npt.NDArray[np.float64]:
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // dim)
    parts = []
    for start in range(0, samples, rows):
        x = torch.randn(min(rows, samples - start), dim, generator=generator, dtype=torch.float64)
        parts.append(inversion_map(x, alpha).square().sum(-1))
    return torch.cat(parts).numpy()


def _check_alpha(alpha: float) -> None:
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
