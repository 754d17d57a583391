"""How sure is the alarm? p-values and thresholds from normal scores alone.

Two ways to turn a score into a p-value, the probability that a normal part scores at least as high:

* **Conformal**: compare it with the scores of n normal parts that the detector has not been trained on. Needs nothing
  but exchangeability of those parts with the next normal one, holds for every n, and cannot say less than 1 / (n + 1).
* **Analytic**: under a Gaussian base the norm of a latent vector has a chi law. Needs no further parts and reaches any
  p-value, but holds only where the flow really maps normal parts to that Gaussian. :func:`agreement` measures it.

Convention: a **score** is higher where a part is more anomalous. An *alarm* is a score above a threshold; the
*false-alarm rate* of a threshold is the probability that a new normal part raises one.

Conformal p-values are one count each; conformal libraries (MAPIE, crepes and others) wrap a classifier or a regressor,
which is not at hand here, so the counts are made here and the laws come from scipy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from torch import Tensor

from usf.files import atomic_write

__all__ = [
    "Agreement",
    "Calibration",
    "CalibrationError",
    "ChiLaw",
    "Rate",
    "agreement",
    "chi2_log_sf",
    "conformal_p",
    "cross_conformal_bound",
    "cross_conformal_p",
    "discoveries",
    "false_alarms",
    "normals_needed",
    "realised_rate",
    "rejection_rate",
    "tail_rank",
    "threshold",
]

Array = npt.NDArray[np.float64]
ArrayLike = Tensor | npt.ArrayLike
Discovery = Literal["bh", "by"]


class CalibrationError(ValueError):
    """A calibration that cannot be made from these scores, or read from this file; says which, why and the remedy."""


def _vector(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim != 1:
        raise CalibrationError(f"{name}: one number a part is needed, shape (n,); got shape {array.shape}")
    if array.size == 0:
        raise CalibrationError(f"{name}: there are none")
    if bad := int(np.count_nonzero(~np.isfinite(array))):
        raise CalibrationError(
            f"{name}: {bad} of {array.size} are not finite, the first at position "
            f"{int(np.flatnonzero(~np.isfinite(array))[0])}: such a part was not measured; look for a damaged image"
        )
    return array


def _p_values(name: str, values: ArrayLike) -> Array:
    array = _vector(name, values)
    if array.min() < 0 or array.max() > 1:
        raise CalibrationError(f"{name}: a p-value lies in [0, 1]; got {array.min():g} to {array.max():g}")
    return array


def _share(name: str, value: float) -> float:
    if not isinstance(value, (int, float, np.floating)) or not 0 < value < 1:
        raise CalibrationError(f"{name}={value!r}: a number between 0 and 1, both excluded, is needed")
    return float(value)


# -------------------------------------------------------------------------------------------------- conformal p-values


def conformal_p(normals: ArrayLike, scores: ArrayLike, *, seed: int | None = None) -> Array:
    r"""Split-conformal p-values (1 + #{normals >= score}) / (n + 1).

    If a new normal part is exchangeable with the n ones of ``normals``, then P(p <= a) <= a for every a, whatever the
    score, its law and n; with a seed, ties are broken at random and P(p <= a) = a exactly. The probability is over
    calibration *and* new part; p-values of several parts share the calibration and are positively dependent.

    Args:
        normals: scores of normal parts that took no part in training or in choosing the detector, (n,).
        scores: of the parts in question, (m,).
        seed: draws U in (0, 1] and returns (#{normals > score} + U (1 + #{normals = score})) / (n + 1) instead.

    Returns:
        p-values in [1 / (n + 1), 1], or in (0, 1] with a seed; (m,).

    Raises:
        CalibrationError: no scores, or one that is not finite.

    >>> conformal_p([1.0, 2.0, 3.0], [0.0, 2.5, 9.0])
    array([1.  , 0.5 , 0.25])
    """
    known, new = np.sort(_vector("normal scores", normals)), _vector("scores", scores)
    at_least = known.size - np.searchsorted(known, new, side="left")
    if seed is None:
        return np.asarray((1.0 + at_least) / (known.size + 1))
    above = known.size - np.searchsorted(known, new, side="right")
    uniform = 1.0 - np.random.default_rng(seed).random(new.size)
    return np.asarray((above + uniform * (1 + at_least - above)) / (known.size + 1))


def cross_conformal_p(held_out: Sequence[ArrayLike], scores: Sequence[ArrayLike], *, doubled: bool = True) -> Array:
    r"""Cross-conformal p-values: every normal part is used for training and, by another fold's model, for calibration.

    For each of K folds a detector is trained without it, and scores the fold and the new parts. Twice the mean of the
    K split-conformal p-values is a p-value whatever their dependence (Vovk and Wang, 2020): P(p <= a) <= a. The pooled
    count (1 + sum_k #{fold k >= score}) / (n + 1) (Vovk, 2015) is in practice nearly uniform, but guaranteed only up to
    :func:`cross_conformal_bound`.

    Args:
        held_out: K arrays: scores of the parts of fold k by the detector trained without them.
        scores: K arrays, each (m,): scores of the same m new parts by the K detectors.
        doubled: twice the mean (guaranteed), or the pooled count (sharper).

    Returns:
        (m,), in (0, 1].

    Raises:
        CalibrationError: fewer than two folds, counts that disagree, no scores, or one that is not finite.

    >>> cross_conformal_p([[1.0, 2.0], [1.0, 3.0]], [[2.5], [2.5]], doubled=False)
    array([0.4])
    """
    if len(held_out) < 2 or len(held_out) != len(scores):
        raise CalibrationError(
            f"cross-conformal p-values need two folds or more, and as many detectors' scores as folds; "
            f"got {len(held_out)} folds and {len(scores)} detectors"
        )
    folds = [_vector(f"normal scores of fold {k}", values) for k, values in enumerate(held_out)]
    new = [_vector(f"scores by detector {k}", values) for k, values in enumerate(scores)]
    if len({values.size for values in new}) != 1:
        raise CalibrationError(
            f"every detector must score the same parts; got {[values.size for values in new]} scores"
        )
    separate = np.stack([conformal_p(known, values) for known, values in zip(folds, new, strict=True)])
    if doubled:
        return np.asarray(np.minimum(1.0, 2.0 * separate.mean(axis=0)))
    sizes = np.array([[values.size] for values in folds])
    at_least = np.rint(separate * (sizes + 1) - 1).sum(axis=0)
    return np.asarray((1.0 + at_least) / (sizes.sum() + 1))


def cross_conformal_bound(sizes: Sequence[int], alpha: float) -> float:
    r"""What is guaranteed of P(p <= alpha) for the pooled cross-conformal p-value of n parts in K folds.

    2a + 2 (1 - a)(K - 1) / (n + K), at most 1 (Vovk et al., 2018). This holds for folds of any sizes: p <= a says that
    the mean of the folds' p-values, weighted by n_k + 1, is at most (a (n + 1) + K - 1) / (n + K), and twice such a
    mean is a p-value whatever the weights (Vovk and Wang, 2020). Where all folds are equal the second term may be
    (1 - K / n) / (K + 1) instead, for a training procedure that does not care about the order of its data (Barber et
    al., 2021, theorem 4, whose proof needs equal folds).

    Args:
        sizes: parts in each fold, n_k.
        alpha: in (0, 1).

    Raises:
        CalibrationError: alpha outside (0, 1), fewer than two folds, or one without parts.

    >>> cross_conformal_bound([1] * 100, 0.05)  # leaving one out
    0.1
    """
    alpha = _share("alpha", alpha)
    if len(sizes) < 2 or min(sizes) < 1:
        raise CalibrationError(f"folds of {list(sizes)} parts: two folds or more are needed, and a part in each")
    n, folds = sum(sizes), len(sizes)
    slack = 2 * (1 - alpha) * (folds - 1) / (n + folds)
    if len(set(sizes)) == 1:
        slack = min(slack, (1 - folds / n) / (folds + 1))
    return min(1.0, 2 * alpha + slack)


# ---------------------------------------------------------------------------------------------------------- thresholds


def _largest(n: int, alpha: float, confidence: float | None) -> int:
    """Largest j so that the j-th highest of n scores keeps the promise; 0 where there is none."""
    if confidence is None:
        # Corrected, so that it agrees to the last bit with the comparison (j / (n + 1)) <= alpha of a p-value.
        rank = min(n, math.floor(alpha * (n + 1)))
        while rank < n and (rank + 1) / (n + 1) <= alpha:
            rank += 1
        while rank > 0 and rank / (n + 1) > alpha:
            rank -= 1
        return rank
    # P(Beta(j, n + 1 - j) > alpha) grows with j and equals P(Binomial(n, alpha) < j).
    ranks = np.arange(1, math.ceil(alpha * n) + 1)
    return int(np.count_nonzero(stats.binom.cdf(ranks - 1, n, alpha) <= 1 - confidence))


def normals_needed(alpha: float, confidence: float | None = None) -> int:
    """The fewest normal parts from which a threshold with false-alarm rate ``alpha`` can be had.

    1 / alpha - 1 rounded up; with a ``confidence`` c the least n with (1 - alpha)^n <= 1 - c (Wilks, 1941).

    Raises:
        CalibrationError: a number outside (0, 1).

    >>> normals_needed(0.05), normals_needed(0.05, confidence=0.95)
    (19, 59)
    """
    alpha = _share("alpha", alpha)
    if confidence is None:
        count = max(1, math.ceil(1 / alpha) - 2)
    else:
        count = max(1, math.ceil(math.log1p(-_share("confidence", confidence)) / math.log1p(-alpha)) - 2)
    while not _largest(count, alpha, confidence):  # a step or two: rounding is settled by the rule itself
        count += 1
    return count


def tail_rank(n: int, alpha: float, *, confidence: float | None = None) -> int:
    """Which of n normal scores, counted from the highest (1), is the threshold for false-alarm rate ``alpha``.

    Without ``confidence``: the largest j with j / (n + 1) <= alpha, so that the rate is at most alpha *on average* over
    calibrations. With it: the largest j for which the rate stays below alpha in a share ``confidence`` of all
    calibrations (probably approximately correct; Vovk, 2012).

    Raises:
        CalibrationError: a number outside (0, 1), or too few parts: says how many are needed.
    """
    alpha = _share("alpha", alpha)
    if confidence is not None:
        confidence = _share("confidence", confidence)
    rank = _largest(n, alpha, confidence) if n > 0 else 0
    if rank < 1:
        sure = "" if confidence is None else f" with confidence {confidence:g}"
        least = f"The lowest rate that {n} can promise on average is {1 / (n + 1):.3g}. " if n > 0 else ""
        raise CalibrationError(
            f"{n} normal parts are too few for a false-alarm rate of {alpha:g}{sure}: "
            f"{normals_needed(alpha, confidence)} are needed. {least}Add normal parts, or allow a higher rate"
        )
    return rank


def threshold(normals: ArrayLike, alpha: float, *, confidence: float | None = None) -> float:
    """The score above which a part raises an alarm, for a wanted false-alarm rate.

    Alarms are the scores *strictly* above it; without ``confidence`` these are exactly the parts whose
    :func:`conformal_p` is at most ``alpha``.

    Args:
        normals: as in :func:`conformal_p`, (n,).
        alpha: wanted false-alarm rate.
        confidence: share of calibrations that must keep it; ``None``: on average over calibrations.

    Raises:
        CalibrationError: too few parts (says how many are needed), or a score that is not finite.

    >>> threshold(range(1, 20), 0.05)
    19.0
    """
    known = np.sort(_vector("normal scores", normals))
    return float(known[-tail_rank(known.size, alpha, confidence=confidence)])


def realised_rate(n: int, alpha: float, *, confidence: float | None = None) -> Any:
    """Law of the false-alarm rate that a calibration with n normal parts gets: Beta(j, n + 1 - j), j the tail rank.

    Exact for scores without ties, whatever their law; with ties the rate is lower. Its mean is j / (n + 1) <= alpha.

    Returns:
        a frozen ``scipy.stats.beta``: ``.mean()``, ``.interval(0.95)``, ``.cdf(0.05)``, ...

    Raises:
        CalibrationError: see :func:`tail_rank`.
    """
    rank = tail_rank(n, alpha, confidence=confidence)
    return stats.beta(rank, n + 1 - rank)


def false_alarms(n: int, alpha: float, parts: int, *, confidence: float | None = None) -> Any:
    """Law of the number of false alarms among ``parts`` new normal parts after calibration with n: beta-binomial.

    Wider than a binomial with rate alpha, because all of them meet the same threshold.

    Returns:
        a frozen ``scipy.stats.betabinom``.

    Raises:
        CalibrationError: see :func:`tail_rank`; or fewer than one part.
    """
    if parts < 1:
        raise CalibrationError(f"parts={parts}: at least one new part is needed")
    rank = tail_rank(n, alpha, confidence=confidence)
    return stats.betabinom(parts, rank, n + 1 - rank)


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share that was counted, with its exact (Clopper-Pearson) interval."""

    value: float
    low: float
    high: float


def rejection_rate(p_values: ArrayLike, alpha: float, *, confidence: float = 0.95) -> Rate:
    """Share of p-values at or below ``alpha``: for normal parts the realised false-alarm rate.

    The interval takes the parts as independent, given the calibration.

    Raises:
        CalibrationError: no p-values, one outside [0, 1], or a level outside (0, 1).
    """
    p, alpha = _p_values("p-values", p_values), _share("alpha", alpha)
    found = stats.binomtest(int(np.count_nonzero(p <= alpha)), p.size)
    interval = found.proportion_ci(_share("confidence", confidence), method="exact")
    return Rate(float(found.statistic), float(interval.low), float(interval.high))


def discoveries(p_values: ArrayLike, rate: float, *, method: Discovery = "bh") -> npt.NDArray[np.bool_]:
    """Which parts of a batch to call anomalous so that at most a share ``rate`` of those calls is false, on average.

    ``"bh"`` (Benjamini and Hochberg, 1995) holds for split-conformal p-values although they share a calibration (Bates
    et al., 2023); ``"by"`` (Benjamini and Yekutieli, 2001) under any dependence, e.g. for cross-conformal ones, and
    finds less. Conformal p-values end at 1 / (n + 1): with m parts in the batch, k of them can be called only where
    1 / (n + 1) <= rate * k / m.

    Raises:
        CalibrationError: no p-values, one outside [0, 1], a rate outside (0, 1), or an unknown method.

    >>> discoveries([0.01, 0.02, 0.5, 0.9], 0.1)
    array([ True,  True, False, False])
    """
    if method not in get_args(Discovery):
        raise CalibrationError(f"method={method!r}: choose one of {', '.join(map(repr, get_args(Discovery)))}")
    p, rate = _p_values("p-values", p_values), _share("rate", rate)
    return np.asarray(stats.false_discovery_control(p, method=method) <= rate)


# -------------------------------------------------------------------------------------------------- the law of the norm


def _log_gamma_tail(shape: float, y: Array) -> Array:
    """log Q(shape, y) far out, where Q itself is no float: prefactor times Legendre's continued fraction, y > shape."""
    # Written around the mode: a plain -y + a ln y - ln Gamma(a) loses all digits when a is a million.
    excess = (y - shape) / shape
    stirling = float(special.gammaln(shape) - ((shape - 0.5) * math.log(shape) - shape + 0.5 * math.log(2 * math.pi)))
    if shape > 100:
        stirling = 1 / (12 * shape) - 1 / (360 * shape**3)
    log_prefactor = -shape * (excess - np.log1p(excess)) + 0.5 * math.log(shape / (2 * math.pi)) - stirling
    # Lentz's method for 1 / (y + 1 - a - 1 (1 - a) / (y + 3 - a - ...)).
    b = y + 1 - shape
    c = np.full_like(y, 1e300)
    d = 1 / b
    value = d.copy()
    for k in range(1, 10_000):
        a = -k * (k - shape)
        b = b + 2
        d = 1 / (a * d + b)
        c = b + a / c
        step = c * d
        value *= step
        if np.all(np.abs(step - 1) < 1e-15):
            break
    else:  # pragma: no cover - far tails converge within tens of steps
        raise ArithmeticError(f"the tail of a chi-square with {2 * shape:g} degrees of freedom did not converge")
    return np.asarray(log_prefactor + np.log(value))


def chi2_log_sf(x: ArrayLike, dimension: float) -> Array:
    """ln P(X > x) for a chi-square variable, in nats, where the probability itself underflows too.

    ``scipy.stats.chi2.logsf`` is the logarithm of the probability, hence minus infinity below 1e-308: a strong anomaly
    in 100 000 dimensions is far beyond that, and anomalies could not be ranked.

    Args:
        x: squared norms, (n,), in units of the base's variance; below 0 the probability is 1.
        dimension: degrees of freedom, positive, not necessarily whole.

    Raises:
        CalibrationError: a dimension that is not positive, no values, or one that is not finite.

    >>> chi2_log_sf([2.0, 1e6], 2)  # -x / 2
    array([-1.e+00, -5.e+05])
    """
    if not (math.isfinite(dimension) and dimension > 0):
        raise CalibrationError(f"dimension={dimension!r}: a positive number is needed")
    shape, y = dimension / 2, np.maximum(_vector("squared norms", x), 0.0) / 2
    upper = special.gammaincc(shape, y)
    with np.errstate(divide="ignore"):
        result = np.where(upper < 0.5, np.log(upper), np.log1p(-special.gammainc(shape, y)))
    far = upper < 1e-280
    if far.any():
        result[far] = _log_gamma_tail(shape, y[far])
    return np.asarray(result)


@dataclasses.dataclass(frozen=True)
class ChiLaw:
    """Law of the norm of a Gaussian vector N(c, variance * I) around c, in ``dimension`` dimensions.

    Under a flow with such a base (:class:`usf.flows.GaussianBase`), this is the law of the latent norm of every part
    that the flow models well. The dimension of a *fitted* law need not be whole.

    Raises:
        CalibrationError: a dimension or a variance that is not positive and finite.
    """

    dimension: float
    variance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("dimension", "variance"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) or not 0 < value < math.inf:
                raise CalibrationError(f"{name}={value!r} of the norm's law: a positive finite number is needed")
            object.__setattr__(self, name, float(value))

    @classmethod
    def fit(cls, norms: ArrayLike) -> ChiLaw:
        """The chi law, scaled, whose squared norm has mean and variance of a sample (Satterthwaite, 1946).

        Its ``dimension`` is an effective number of independent directions: where latents are dependent it is far below
        the number of latents.

        Args:
            norms: (n,), two or more different ones.

        Raises:
            CalibrationError: fewer than two different norms, a negative one, or one that is not finite.
        """
        squared = np.square(cls._norms(norms))
        if squared.size < 2 or np.ptp(squared) == 0:
            raise CalibrationError("a law of the norm cannot be fitted to fewer than two different norms")
        mean, variance = float(squared.mean()), float(squared.var(ddof=1))
        return cls(2 * mean**2 / variance, variance / (2 * mean))  # m = v nu, s^2 = 2 v^2 nu

    @staticmethod
    def _norms(norms: ArrayLike) -> Array:
        values = _vector("norms", norms)
        if values.min() < 0:
            raise CalibrationError(f"norms: the lowest is {values.min():g}; a norm is not negative")
        return values

    def log_p(self, norms: ArrayLike) -> Array:
        """ln P(norm > given) in nats, (n,): finite for every finite norm, see :func:`chi2_log_sf`."""
        return chi2_log_sf(np.square(self._norms(norms)) / self.variance, self.dimension)

    def p(self, norms: ArrayLike) -> Array:
        """Analytic p-values P(norm > given), (n,), in [0, 1]; zero where they underflow, see :meth:`log_p`."""
        return np.asarray(np.exp(self.log_p(norms)))

    def pit(self, norms: ArrayLike) -> Array:
        """Probability integral transform P(norm <= given), (n,): uniform on [0, 1] if the law is true."""
        squared = np.square(self._norms(norms)) / self.variance
        return np.asarray(special.gammainc(self.dimension / 2, squared / 2))

    def threshold(self, alpha: float) -> float:
        """The norm that is exceeded with probability ``alpha``."""
        return math.sqrt(self.variance * 2 * special.gammainccinv(self.dimension / 2, _share("alpha", alpha)))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far a law is from the one that a sample follows.

    Attributes:
        count: sample size n.
        distance: Kolmogorov-Smirnov distance between the sample's PIT and the uniform law.
        p_value: probability of a larger distance were the law true (exact).
        low, high: interval of the distance between the law and the *true* law, at ``confidence``. It bounds the error
            of every analytic p-value: the rate of p <= a among normal parts is within ``high`` of a, for all a at once.
        confidence: of the interval, and of the test behind ``refuted``.
    """

    count: int
    distance: float
    p_value: float
    low: float
    high: float
    confidence: float

    @property
    def margin(self) -> float:
        """Half-width of the band around the sample's distribution function: what n parts can resolve."""
        return float(stats.kstwo.ppf(self.confidence, self.count))

    @property
    def refuted(self) -> bool:
        """Whether the sample contradicts the law at this confidence: analytic p-values must not be used."""
        return self.p_value < 1 - self.confidence

    def trusted(self, tolerance: float) -> bool:
        """Whether analytic p-values are shown to be right within ``tolerance``, everywhere and at this confidence.

        Not the opposite of :attr:`refuted`: few parts refute nothing and show nothing.
        """
        return not self.refuted and self.high <= tolerance

    def describe(self) -> str:
        """The verdict as one sentence."""
        interval = f"distance {self.distance:.3f} over {self.count} normal parts, true one in [{self.low:.3f}, "
        interval += f"{self.high:.3f}] with confidence {self.confidence:g}"
        if self.refuted:
            return f"refuted (p = {self.p_value:.2g}; {interval}): do not use analytic p-values"
        shown = f"analytic p-values are shown to be right within {self.high:.2g}"
        return f"not refuted (p = {self.p_value:.2g}; {interval}): {shown}"


def agreement(pit: ArrayLike, *, confidence: float = 0.95) -> Agreement:
    """Whether probability integral transforms of independent normal parts are uniform, and how far from it.

    The distance between a sample of n and its true law has an exact law of its own, free of the true law (Kolmogorov);
    its ``confidence`` quantile, at most sqrt(ln(2 / (1 - confidence)) / (2n)), is added and subtracted.

    Args:
        pit: of normal parts on which the law was *not* fitted, e.g. :meth:`ChiLaw.pit`, (n,).
        confidence: of interval and test.

    Raises:
        CalibrationError: no values, one outside [0, 1], or a confidence outside (0, 1).
    """
    values, confidence = _p_values("probability integral transforms", pit), _share("confidence", confidence)
    found = stats.kstest(values, "uniform", method="exact")
    distance, margin = float(found.statistic), float(stats.kstwo.ppf(confidence, values.size))
    low, high = max(0.0, distance - margin), min(1.0, distance + margin)
    return Agreement(values.size, distance, float(found.pvalue), low, high, confidence)


# -------------------------------------------------------------------------------------------------- a calibration, kept

FORMAT = "usf-calibration-1"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A threshold with what it promises, and what p-values need: plain numbers, kept as JSON.

    Attributes:
        normals: scores of the normal parts, sorted here, (n,).
        alpha: wanted false-alarm rate.
        confidence: share of calibrations that must keep it; ``None``: on average, see :func:`tail_rank`.
        law: law of the score if it is the latent norm, else ``None``.
        model: what scored the parts, e.g. the hash of its weights; a loaded calibration can be held against it.
        data: what the parts were, e.g. the hash of a folder's manifest.

    Raises:
        CalibrationError: too few parts for ``alpha`` (says how many are needed), or scores that are not finite.

    >>> known = Calibration(tuple(range(99)), alpha=0.02)
    >>> known.threshold, known.alarms([97.0, 97.5]).tolist()
    (97.0, [False, True])
    """

    normals: tuple[float, ...]
    alpha: float
    confidence: float | None = None
    law: ChiLaw | None = None
    model: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        scores = np.sort(_vector("normal scores", self.normals))
        object.__setattr__(self, "normals", tuple(scores.tolist()))
        tail_rank(scores.size, self.alpha, confidence=self.confidence)
        object.__setattr__(self, "alpha", float(self.alpha))
        if self.confidence is not None:
            object.__setattr__(self, "confidence", float(self.confidence))
        if self.law is not None:
            self.law.pit(scores)

    @property
    def threshold(self) -> float:
        """A part whose score is strictly above raises an alarm."""
        return threshold(self.normals, self.alpha, confidence=self.confidence)

    def alarms(self, scores: ArrayLike) -> npt.NDArray[np.bool_]:
        """Which parts raise an alarm, (m,)."""
        return np.asarray(_vector("scores", scores) > self.threshold)

    def p(self, scores: ArrayLike, *, seed: int | None = None) -> Array:
        """Conformal p-values, (m,), see :func:`conformal_p`."""
        return conformal_p(self.normals, scores, seed=seed)

    def agreement(self, *, confidence: float = 0.95) -> Agreement:
        """Whether the law of the norm holds for the normal parts, see :func:`agreement`.

        Raises:
            CalibrationError: a calibration without a law.
        """
        if self.law is None:
            raise CalibrationError("this calibration has no law of the norm: its score is not a latent norm")
        return agreement(self.law.pit(self.normals), confidence=confidence)

    def promise(self) -> str:
        """What the threshold promises, as text for a reader."""
        law = realised_rate(len(self.normals), self.alpha, confidence=self.confidence)
        low, high = law.interval(0.95)
        sure = (
            f"at most {100 * self.alpha:.3g} % of new normal parts raise an alarm, on average over calibrations"
            if self.confidence is None
            else f"with confidence {100 * self.confidence:g} %, at most {100 * self.alpha:.3g} % of new normal parts "
            "raise an alarm"
        )
        return (
            f"Threshold {self.threshold:.6g} from {len(self.normals)} normal parts: {sure}. The rate of this threshold "
            f"lies between {100 * low:.2g} and {100 * high:.2g} % in 95 % of calibrations (mean "
            f"{100 * law.mean():.2g} %), as long as new "
            "normal parts come from where these came from and the detector was not trained on these."
        )

    def _content(self) -> dict[str, Any]:
        law = None if self.law is None else dataclasses.asdict(self.law)
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": FORMAT, **own, "normals": list(self.normals), "law": law, "threshold": self.threshold}

    def save(self, path: str | Path) -> Path:
        """Write as JSON, atomically, with a digest of the content."""
        content = self._content()
        return atomic_write(Path(path), json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None) -> Calibration:
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        The digest tells a file that was damaged or edited. It is no signature: who edits the digest too is not found.

        Args:
            path: the file.
            model: if given, what the calibration must have been made with.

        Raises:
            CalibrationError: a file that is missing, not JSON, changed since it was written, of another format, or of
                another model; names the file.
        """
        path = Path(path)
        remedy = "calibrate again"
        try:
            content = json.loads(path.read_text("utf8"), parse_constant=_refuse_constant)
        except OSError as error:
            raise CalibrationError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
        except (ValueError, RecursionError) as error:  # also text that is not UTF-8
            raise CalibrationError(f"{path} is not a calibration ({error}): {remedy}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise CalibrationError(f"{path} has format {found!r}, not {FORMAT!r}: {remedy}")
        known = {field.name for field in dataclasses.fields(cls)} | {"format", "threshold", "sha256"}
        if odd := sorted(known.symmetric_difference(content)):
            raise CalibrationError(f"{path} has fields missing or unknown ({', '.join(odd)}): {remedy}")
        digest = content.pop("sha256")
        if digest != _digest(content):
            raise CalibrationError(f"{path} was changed after it was written (its digest does not fit): {remedy}")
        _check_types(path, content)
        law = content["law"]
        try:
            loaded = cls(
                tuple(content["normals"]),
                content["alpha"],
                content["confidence"],
                None if law is None else ChiLaw(**law),
                content["model"],
                content["data"],
            )
        except (CalibrationError, TypeError) as error:
            raise CalibrationError(f"{path} holds no valid calibration ({error}): {remedy}") from error
        if loaded.threshold != content["threshold"]:
            raise CalibrationError(
                f"{path} states threshold {content['threshold']}, its scores give {loaded.threshold}: {remedy}"
            )
        if model is not None and loaded.model != model:
            raise CalibrationError(
                f"{path} was made with model {loaded.model!r}, not with {model!r}: a threshold is worth nothing for "
                f"another model; {remedy}"
            )
        return loaded


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf8")).hexdigest()


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _check_types(path: Path, content: dict[str, Any]) -> None:
    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    normals, law = content["normals"], content["law"]
    fits = {
        "normals": isinstance(normals, list) and all(map(number, normals)),
        "alpha": number(content["alpha"]),
        "confidence": content["confidence"] is None or number(content["confidence"]),
        "law": law is None or (isinstance(law, dict) and set(law) == {"dimension", "variance"}),
        "model": isinstance(content["model"], str),
        "data": isinstance(content["data"], str),
        "threshold": number(content["threshold"]),
    }
    if wrong := [name for name, fit in fits.items() if not fit]:
        raise CalibrationError(f"{path} has values of the wrong type in {', '.join(wrong)}: calibrate again")
