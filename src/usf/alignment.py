"""How well a score orders a density, and how well any constant-determinant flow could.

Three measures of order (Spearman, Kendall, rate of inversions), each over all points or over the least dense ones
alone, with bootstrap intervals; three baselines that need no network; and the *rearrangement bound*, the lowest
cross-entropy a flow with a constant Jacobian determinant can reach.

Convention: a **score** is higher where a point is more anomalous, so a perfect score *decreases* as the density
increases, and every coefficient below is the one between the score and **minus** the log-density: 1 is perfect
alignment, 0 is none, -1 is density inversion.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from scipy import special, stats
from torch import Tensor

__all__ = [
    "Alignment",
    "Estimate",
    "Interval",
    "RearrangementBound",
    "alignment",
    "distance_to_mean",
    "gaussian_radial_bound",
    "inversions",
    "kde",
    "kendall",
    "laplace_radial_bound",
    "lowest",
    "mahalanobis",
    "rearranged_radii",
    "rearrangement_bound",
    "spearman",
]

Array = npt.NDArray[np.float64]
ArrayLike = Tensor | npt.ArrayLike


def _vector(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, one value a point; got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} has {bad} non-finite values of {array.size}; a diverged model has no ranking")
    return array


def _pair(score: ArrayLike, log_density: ArrayLike) -> tuple[Array, Array]:
    s, t = _vector("score", score), _vector("log_density", log_density)
    if s.shape != t.shape:
        raise ValueError(f"score and log_density must have one value a point each; got {s.size} and {t.size}")
    if s.size < 2:
        raise ValueError(f"ranking needs at least two points; got {s.size}")
    return s, t


# --------------------------------------------------------------------------------------------------- measures of order


def _spearman(s: Array, t: Array) -> float:
    rs, rt = stats.rankdata(s), stats.rankdata(t)
    rs, rt = rs - rs.mean(), rt - rt.mean()
    norm = math.sqrt(float(rs @ rs) * float(rt @ rt))
    return -float(rs @ rt) / norm if norm > 0 else 0.0


def _concordance(s: Array, t: Array) -> tuple[float, float, float]:
    """(C - D, pairs untied in s, pairs untied in t), with t the log-density and concordance taken against -t."""
    n = s.size
    pairs = n * (n - 1) / 2

    def ties(values: Array) -> float:
        counts = np.unique(values, return_counts=True)[1].astype(np.float64)
        return float((counts * (counts - 1) / 2).sum())

    untied_s, untied_t = pairs - ties(s), pairs - ties(t)
    if untied_s == 0 or untied_t == 0:
        return 0.0, untied_s, untied_t
    if n == 2:  # scipy's asymptotic variance divides by n - 2
        return float(np.sign(s[1] - s[0]) * np.sign(t[0] - t[1])), untied_s, untied_t
    tau_b = float(stats.kendalltau(s, -t, method="asymptotic").statistic)
    return tau_b * math.sqrt(untied_s) * math.sqrt(untied_t), untied_s, untied_t


def _kendall(s: Array, t: Array) -> float:
    difference, untied_s, untied_t = _concordance(s, t)
    return difference / math.sqrt(untied_s * untied_t) if untied_s * untied_t > 0 else 0.0


def _inversions(s: Array, t: Array) -> float:
    difference, _, untied_t = _concordance(s, t)
    return min(max(0.5 * (1.0 - difference / untied_t), 0.0), 1.0) if untied_t > 0 else 0.5


def lowest(log_density: ArrayLike, tail: float | None) -> npt.NDArray[np.intp]:
    """Indices of the share ``tail`` of points with the lowest density (all points when it is ``None``).

    The points an anomaly detector is asked about are rare ones, and a score that orders the bulk perfectly can still
    be useless among them.
    """
    t = _vector("log_density", log_density)
    if tail is None:
        return np.arange(t.size)
    if not 0 < tail <= 1:
        raise ValueError(f"tail is a share of the points in (0, 1]; got {tail}")
    return np.argsort(t, kind="stable")[: max(2, math.ceil(tail * t.size))]


def _measure(
    measure: Callable[[Array, Array], float], score: ArrayLike, log_density: ArrayLike, tail: float | None
) -> float:
    s, t = _pair(score, log_density)
    keep = lowest(t, tail)
    return measure(s[keep], t[keep])


def spearman(score: ArrayLike, log_density: ArrayLike, *, tail: float | None = None) -> float:
    """Spearman's rank correlation between a score and minus the log-density.

    Both arguments have shape (n,). ``tail=0.05`` restricts it to the 5 % of points with the lowest density. A constant
    score orders nothing and gets 0.

    Raises:
        ValueError: for shapes that disagree, fewer than two points, or non-finite values.

    >>> spearman([1.0, 2.0, 3.0], [-0.1, -0.5, -9.0])
    1.0
    """
    return _measure(_spearman, score, log_density, tail)


def kendall(score: ArrayLike, log_density: ArrayLike, *, tail: float | None = None) -> float:
    """Kendall's tau-b between a score and minus the log-density; arguments and errors as in :func:`spearman`.

    >>> kendall([1.0, 3.0, 2.0], [-0.1, -0.5, -9.0])
    0.3333333333333333
    """
    return _measure(_kendall, score, log_density, tail)


def inversions(score: ArrayLike, log_density: ArrayLike, *, tail: float | None = None) -> float:
    """Probability that, of two random points of unequal density, the score calls the *denser* one more anomalous.

    A tie in the score counts one half, as it does in the AUROC; without ties this is (1 - tau) / 2. Arguments and
    errors as in :func:`spearman`.

    >>> inversions([1.0, 3.0, 2.0], [-0.1, -0.5, -9.0])
    0.3333333333333333
    """
    return _measure(_inversions, score, log_density, tail)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with the ends of its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Spearman, Kendall and the rate of inversions of one score against one density, with intervals."""

    spearman: Interval
    kendall: Interval
    inversions: Interval
    points: int


def alignment(
    score: ArrayLike,
    log_density: ArrayLike,
    *,
    tail: float | None = None,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Alignment:
    """All three measures at once with percentile bootstrap intervals over the points.

    Points are drawn with replacement, ``resamples`` times; both the tail's threshold and the model are held fixed, so
    the interval says how much the test sample matters, not how much another training would.

    Args:
        score: shape (n,), higher is more anomalous.
        log_density: shape (n,), nats.
        tail: share of the least dense points to keep, or ``None`` for all.
        resamples: number of bootstrap samples; 0 gives empty intervals.
        confidence: level of the intervals.
        seed: seed of the resampling.

    Raises:
        ValueError: as :func:`spearman`; and for ``confidence`` outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies in (0, 1); got {confidence}")
    s, t = _pair(score, log_density)
    keep = lowest(t, tail)
    s, t = s[keep], t[keep]
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, s.size, s.size) for _ in range(resamples)]

    def interval(measure: Callable[[Array, Array], float]) -> Interval:
        value = measure(s, t)
        if not draws:
            return Interval(value, value, value)
        values = [measure(s[i], t[i]) for i in draws]
        low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(value, float(low), float(high))

    return Alignment(interval(_spearman), interval(_kendall), interval(_inversions), s.size)


# ----------------------------------------------------------------------------------------------------------- baselines


def _check_points(train: Tensor, test: Tensor) -> None:
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise ValueError(f"points have shape (n, d) with one d; got {tuple(train.shape)} and {tuple(test.shape)}")
    if len(train) < 2:
        raise ValueError("a baseline needs at least two training points")


def distance_to_mean(train: Tensor, test: Tensor) -> Tensor:
    """Euclidean distance of each row of ``test`` (m, d) to the mean of ``train`` (n, d): shape (m,)."""
    _check_points(train, test)
    return torch.linalg.vector_norm(test - train.mean(0), dim=-1)


def mahalanobis(train: Tensor, test: Tensor) -> Tensor:
    """Mahalanobis distance of each row of ``test`` (m, d) under mean and covariance of ``train`` (n, d): shape (m,).

    This is the latent norm of the best *linear* flow, so it is what a USF has to beat.

    Raises:
        ValueError: if the covariance is singular (fewer points than dimensions, or a constant feature).
    """
    _check_points(train, test)
    factor, info = torch.linalg.cholesky_ex(torch.cov(train.T).reshape(train.shape[1], -1))
    if int(info) != 0:
        raise ValueError("the covariance of the training points is singular; use more points or fewer features")
    centred = (test - train.mean(0)).T
    return torch.linalg.vector_norm(torch.linalg.solve_triangular(factor, centred, upper=False), dim=0)


def kde(
    train: Tensor, test: Tensor, *, validation: Tensor | None = None, bandwidth: float | None = None, chunk: int = 512
) -> Tensor:
    """Minus the log-density of a Gaussian kernel estimate fitted to ``train`` (n, d), at ``test`` (m, d): shape (m,).

    The kernel has the covariance of ``train`` times the squared bandwidth. Without ``bandwidth`` it is Scott's
    n^(-1/(d+4)), or, where ``validation`` is given, the multiple of it in {1/4, ..., 2} with the best validation
    likelihood.

    Raises:
        ValueError: for shapes that disagree, a bandwidth that is not positive, or a singular covariance.
    """
    _check_points(train, test)
    n, d = train.shape
    factor, info = torch.linalg.cholesky_ex(torch.cov(train.T).reshape(d, -1))
    if int(info) != 0:
        raise ValueError("the covariance of the training points is singular; use more points or fewer features")
    log_det = float(factor.diagonal().log().sum())

    def white(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, (x - train.mean(0)).T, upper=False).T

    source = white(train)

    def log_prob(points: Tensor, widths: list[float]) -> Tensor:
        """Shape (len(widths), m): the distances are the cost, so every bandwidth shares them."""
        out = []
        for part in white(points).split(chunk):
            squared = torch.cdist(part, source).square()
            out.append(torch.stack([torch.logsumexp(squared / (-2 * h * h), 1) - d * math.log(h) for h in widths]))
        return torch.cat(out, 1) - math.log(n) - log_det - 0.5 * d * math.log(2 * math.pi)

    if bandwidth is None:
        scott = n ** (-1 / (d + 4))
        bandwidth = scott
        if validation is not None:
            widths = [scott * m for m in (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)]
            bandwidth = widths[int(log_prob(validation, widths).mean(1).argmax())]
    if bandwidth <= 0:
        raise ValueError(f"bandwidth must be positive; got {bandwidth}")
    return -log_prob(test, [bandwidth])[0]


# ------------------------------------------------------------------------------------------- the rearrangement bound


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo estimate with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.error:.4f}"


@dataclasses.dataclass(frozen=True)
class RearrangementBound:
    """What :func:`rearrangement_bound` found, in nats.

    Attributes:
        bound: lowest cross-entropy of a constant-determinant flow with the given base.
        entropy: differential entropy of the target, the lowest cross-entropy of any density.
        gap: their difference, with its own (smaller) error: both come from the same samples.
    """

    bound: Estimate
    entropy: Estimate
    gap: Estimate


def log_ball_volume(dim: int, order: float) -> float:
    """Log-volume of the unit ball of the p-norm in R^dim: (2 Gamma(1 + 1/p))^d / Gamma(1 + d/p); 2^d for p = inf."""
    if dim < 1 or order < 1:
        raise ValueError(f"a norm ball needs dim >= 1 and order >= 1; got dim={dim}, order={order}")
    inverse = 0.0 if math.isinf(order) else 1.0 / order
    return float(dim * (math.log(2) + special.gammaln(1 + inverse)) - special.gammaln(1 + dim * inverse))


def rearranged_radii(log_density: ArrayLike, dim: int, *, order: float = 2.0) -> Array:
    """Radii of a sample after symmetric decreasing rearrangement of its density.

    The rearrangement p* of a density p decreases with the norm and has superlevel sets of the same volume. A sample
    x ~ p with density t = p(x) is sent to the sphere whose ball has the volume V(t) = |{p > t}|, and that volume is
    itself an expectation over p: V(t) = E_p[1/p; p > t]. Sorted by density, it is a cumulative sum, taken here in the
    log domain because 1/p spans hundreds of nats in high dimension.

    Args:
        log_density: log p(x_i), shape (n,), of a sample x_i ~ p.
        dim: dimension d of the space.
        order: order of the norm whose balls are filled (2: Euclidean; 1: what a Laplace base needs).

    Returns:
        Radii in ascending order, shape (n,): a sample of ||x|| under p*.
    """
    t = _vector("log_density", log_density)
    if t.size < 2:
        raise ValueError(f"the rearrangement needs a sample; got {t.size} points")
    ascending = np.sort(-t)
    log_terms = ascending - math.log(t.size)
    cumulative = np.logaddexp.accumulate(log_terms)
    # The sample's own shell counts half: the volume strictly inside and the volume including it, averaged.
    log_volume = cumulative + np.log1p(-0.5 * np.exp(log_terms - cumulative))
    return np.exp((log_volume - log_ball_volume(dim, order)) / dim)


def gaussian_radial_bound(radii: Array, dim: int) -> float:
    """Cross-entropy of a radial sample (Euclidean norms) against the best-scaled Gaussian base, in nats."""
    return 0.5 * dim * math.log(2 * math.pi * math.e * float(np.mean(np.square(radii))) / dim)


def laplace_radial_bound(radii: Array, dim: int) -> float:
    """Cross-entropy of a radial sample (1-norms) against the best-scaled product of Laplace bases, in nats."""
    return dim * math.log(2 * math.e * float(np.mean(radii)) / dim)


def rearrangement_bound(
    log_density: ArrayLike, dim: int, *, base: str = "gaussian", batches: int = 10
) -> RearrangementBound:
    """The lowest cross-entropy that any constant-determinant flow with a given base can reach.

    A USF's superlevel sets are images of balls, up to one constant factor in volume. Among densities with given
    superlevel volumes, none has a lower cross-entropy under p than the one whose superlevel sets are p's own
    (Hardy and Littlewood), and its cross-entropy is that of the rearrangement p* under the base; the free determinant
    optimises the base's scale. Chapter 7 has the proof. For a Gaussian base this is
    d/2 ln(2 pi e E||x||^2 / d) with x ~ p*.

    Args:
        log_density: log p(x_i), shape (n,), of a sample x_i ~ p (use 10^5 points or more).
        dim: dimension d.
        base: ``"gaussian"`` (Euclidean balls) or ``"laplace"`` (balls of the 1-norm).
        batches: independent parts of the sample; their spread gives the error of the gap and of the bound.

    Raises:
        ValueError: for an unknown base, or a sample too small for the batches.
    """
    if base not in ("gaussian", "laplace"):
        raise ValueError(
            f"base is 'gaussian' or 'laplace'; got {base!r}. A learned radial base has gap 0 by definition"
        )
    t = _vector("log_density", log_density)
    if batches < 2 or t.size < 100 * batches:
        raise ValueError(f"{t.size} points are too few for {batches} batches of at least 100")
    order, cross_entropy = (2.0, gaussian_radial_bound) if base == "gaussian" else (1.0, laplace_radial_bound)
    bound = cross_entropy(rearranged_radii(t, dim, order=order), dim)
    entropy = -float(t.mean())
    parts = list(np.array_split(t, batches))
    bounds = np.array([cross_entropy(rearranged_radii(part, dim, order=order), dim) for part in parts])
    entropies = np.array([-part.mean() for part in parts])

    def error(values: Array) -> float:
        return float(values.std(ddof=1) / math.sqrt(batches))

    return RearrangementBound(
        bound=Estimate(bound, error(bounds)),
        entropy=Estimate(entropy, error(entropies)),
        gap=Estimate(bound - entropy, error(bounds - entropies)),
    )
