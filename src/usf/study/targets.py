"""Densities that are known exactly and can be sampled exactly: what the mixture studies train on.

Each target has ``dim``, ``log_prob(x)`` for x of shape (..., dim) in nats, and ``sample(count, seed)`` of shape
(count, dim). Everything is float64 inside; ``sample`` returns float32 where asked.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np
import torch
from scipy import special
from torch import Tensor

__all__ = ["DiagonalMixture", "Shell", "StudentT", "Target", "paper_mixture", "two_blobs"]


class Target(Protocol):
    """A density to learn."""

    @property
    def dim(self) -> int:
        """Dimension of the space."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density in nats, batch shape of ``x``."""
        ...

    def sample(self, count: int, seed: int) -> Tensor:
        """``count`` independent points, shape (count, dim), float64, a function of the seed alone."""
        ...


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclasses.dataclass(frozen=True)
class DiagonalMixture:
    """Mixture of Gaussians with diagonal covariances.

    Args:
        weights: (k,), positive, summing to one.
        means: (k, d).
        variances: (k, d), positive.

    Raises:
        ValueError: for shapes that disagree, weights that do not sum to one, or variances that are not positive.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or self.means.shape != self.variances.shape or len(self.weights) != len(self.means):
            raise ValueError(
                "a mixture has weights (k,), means (k, d) and variances (k, d); got "
                f"{tuple(self.weights.shape)}, {tuple(self.means.shape)}, {tuple(self.variances.shape)}"
            )
        if (self.variances <= 0).any() or (self.weights <= 0).any() or abs(float(self.weights.sum()) - 1) > 1e-9:
            raise ValueError("variances and weights must be positive, and the weights must sum to one")

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.means.shape[1]

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density at x (..., d): shape (...)."""
        x = x.double().unsqueeze(-2)
        quadratic = ((x - self.means).square() / self.variances).sum(-1)
        log_scale = 0.5 * self.variances.log().sum(-1) + 0.5 * self.dim * math.log(2 * math.pi)
        return torch.logsumexp(self.weights.log() - log_scale - 0.5 * quadratic, -1)

    def components(self, count: int, seed: int) -> Tensor:
        """Which component each of the points of ``sample(count, seed)`` comes from: (count,)."""
        return torch.multinomial(self.weights, count, replacement=True, generator=_generator(seed))

    def sample(self, count: int, seed: int) -> Tensor:
        """``count`` points, shape (count, d), float64."""
        generator = _generator(seed)
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        return self.means[k] + self.variances[k].sqrt() * noise

    def covariance(self) -> Tensor:
        """Exact covariance, (d, d)."""
        centred = self.means - self.weights @ self.means
        return torch.diag(self.weights @ self.variances) + (centred.T * self.weights) @ centred

    def gaussian_cross_entropy(self) -> float:
        """Cross-entropy of the best Gaussian with full covariance, in nats: what a linear flow can reach."""
        return 0.5 * (self.dim * math.log(2 * math.pi * math.e) + float(torch.logdet(self.covariance())))


def paper_mixture(dim: int) -> DiagonalMixture:
    """The asymmetric mixture of section 4.3: means +1 and -1, covariances I and diag(5, ..., 5, 1/2, ..., 1/2).

    Raises:
        ValueError: if ``dim`` is odd: half of the second component's variances are 5 and half are 1/2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"the mixture needs an even dimension of at least 2; got {dim}")
    ones = torch.ones(dim, dtype=torch.float64)
    theta = torch.cat([ones[: dim // 2] * 5.0, ones[dim // 2 :] * 0.5])
    return DiagonalMixture(
        torch.full((2,), 0.5, dtype=torch.float64), torch.stack([ones, -ones]), torch.stack([ones, theta])
    )


def two_blobs(ratio: float, *, dim: int = 2, separation: float = 6.0) -> DiagonalMixture:
    """Two equally likely isotropic blobs, far apart, whose standard deviations are 1 and ``ratio``.

    Their centres are ``separation * ratio`` apart, so that they barely overlap whatever the ratio.
    """
    if ratio < 1:
        raise ValueError(f"ratio is the wider blob's standard deviation over the narrower one's, >= 1; got {ratio}")
    means = torch.zeros(2, dim, dtype=torch.float64)
    means[0, 0], means[1, 0] = -0.5 * separation * ratio, 0.5 * separation * ratio
    variances = torch.ones(2, dim, dtype=torch.float64)
    variances[1] = ratio**2
    return DiagonalMixture(torch.full((2,), 0.5, dtype=torch.float64), means, variances)


@dataclasses.dataclass(frozen=True)
class StudentT:
    """Isotropic multivariate Student t around the origin: the heavy tail.

    With ``dof`` <= 2 the second moment is infinite, and so is the cross-entropy of every Gaussian-based USF.
    """

    dim: int = 2
    dof: float = 3.0

    def __post_init__(self) -> None:
        if self.dim < 1 or self.dof <= 0:
            raise ValueError(f"a Student t needs dim >= 1 and dof > 0; got {self.dim} and {self.dof}")

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density at x (..., d): shape (...)."""
        d, v = self.dim, self.dof
        constant = special.gammaln((v + d) / 2) - special.gammaln(v / 2) - 0.5 * d * math.log(v * math.pi)
        return float(constant) - 0.5 * (v + d) * torch.log1p(x.double().square().sum(-1) / v)

    def sample(self, count: int, seed: int) -> Tensor:
        """``count`` points, shape (count, d), float64."""
        noise = torch.randn(count, self.dim, generator=_generator(seed), dtype=torch.float64)
        # torch's gamma sampler takes no generator; numpy's does.
        chi2 = torch.from_numpy(np.random.default_rng(seed).chisquare(self.dof, count))
        return noise * (self.dof / chi2).sqrt().unsqueeze(-1)


@dataclasses.dataclass(frozen=True)
class Shell:
    """A hollow shell: uniform direction, log-normal radius around ``radius`` with log-width ``width``.

    Its density is zero at the centre of symmetry, where a radially decreasing base has its peak.
    """

    dim: int = 2
    radius: float = 3.0
    width: float = 0.1

    def __post_init__(self) -> None:
        if self.dim < 2 or self.radius <= 0 or self.width <= 0:
            raise ValueError(
                f"a shell needs dim >= 2, radius > 0, width > 0; got {self.dim}, {self.radius}, {self.width}"
            )

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density at x (..., d): shape (...)."""
        d = self.dim
        # At the centre the density is 0; the floor makes its logarithm a finite number of about -2e7 instead of nan.
        log_r = torch.linalg.vector_norm(x.double(), dim=-1).clamp_min(1e-300).log()
        log_sphere = math.log(2) + 0.5 * d * math.log(math.pi) - float(special.gammaln(d / 2))
        log_law = -0.5 * ((log_r - math.log(self.radius)) / self.width).square() - log_r
        return log_law - math.log(self.width * math.sqrt(2 * math.pi)) - log_sphere - (d - 1) * log_r

    def sample(self, count: int, seed: int) -> Tensor:
        """``count`` points, shape (count, d), float64."""
        generator = _generator(seed)
        direction = torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        normal = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        return direction * self.radius * (self.width * normal).exp()
