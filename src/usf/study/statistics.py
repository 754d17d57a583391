"""Statistics for a benchmark of few runs on few classes.

A benchmark has two sources of chance: which runs (seeds) were made, and which classes of images stand for all the
others. The functions differ in which of them they draw anew, and say so:

===============================  ==============================  ================================================
function                         drawn anew                      speaks about
===============================  ==============================  ================================================
:func:`stratified_bootstrap`     runs, inside each class         these classes, other seeds
:func:`hierarchical_bootstrap`   classes, then runs inside them  other classes of the same kind, other seeds
:func:`student_interval`         classes (normal theory)         the same; safer below some thirty classes
===============================  ==============================  ================================================

Values are in any unit, higher is better. Runs of one model are given as a sequence with one array a class, ``(runs,)``
each; classes may have different numbers of runs. Everything random has a seed.

Sources: Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS 2021 (rliable:
interquartile mean, stratified bootstrap, probability of improvement); Davison and Hinkley, "Bootstrap methods and
their application", 1997, section 3.8 (hierarchical data) and chapter 5 (intervals); Holm, Scand. J. Statist. 6, 1979.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike
from scipy import special, stats

__all__ = [
    "Interval",
    "VarianceTest",
    "hierarchical_bootstrap",
    "holm",
    "improvement_interval",
    "iqm",
    "probability_of_improvement",
    "sign_flip_test",
    "signed_rank_test",
    "stratified_bootstrap",
    "student_interval",
    "variance_test",
    "welch_interval",
]

Array = npt.NDArray[np.float64]
Runs = Sequence[ArrayLike] | npt.NDArray[np.float64]
"""Values (runs,) of each class: a sequence of arrays, or a matrix (classes, runs)."""
Statistic = Callable[[Array], Array]
"""Values (..., n) -> one number for each, (...)."""

LEVEL = 0.95
RESAMPLES = 5000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and an interval around it.

    Attributes:
        estimate, low, high: in the unit of the values.
        level: the share of intervals made like this that are meant to cover the truth.

    >>> print(Interval(1.0, -0.25, 2.5))
    1.00 [-0.25, 2.50]
    """

    estimate: float
    low: float
    high: float
    level: float = LEVEL

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


def _classes(runs: Runs, name: str = "runs") -> list[Array]:
    """One float array a class, checked."""
    found = [np.asarray(part, dtype=np.float64).ravel() for part in runs]
    if not found:
        raise ValueError(f"{name}: no classes")
    for index, part in enumerate(found):
        if not part.size:
            raise ValueError(f"{name}: class {index} has no runs; leave the class out, and say so")
        if not np.isfinite(part).all():
            raise ValueError(f"{name}: class {index} has a value that is not finite; a failed run has no value")
    return found


def _pairs(first: Runs, second: Runs) -> tuple[list[Array], list[Array]]:
    a, b = _classes(first, "first"), _classes(second, "second")
    if len(a) != len(b):
        raise ValueError(f"{len(a)} classes against {len(b)}: give the same classes in the same order")
    return a, b


def _vector(values: ArrayLike, least: int) -> Array:
    """Finite values (n,), at least ``least`` of them."""
    found = np.asarray(values, dtype=np.float64).ravel()
    if found.size < least or not np.isfinite(found).all():
        raise ValueError(
            f"at least {least} finite values are needed, not {found.size}, some of them perhaps not finite"
        )
    return found


def _percentiles(estimate: float, draws: Array, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a number between 0 and 1")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high), level)


def mean(values: ArrayLike) -> Array:
    """Arithmetic mean over the last axis."""
    return np.asarray(np.mean(np.asarray(values, dtype=np.float64), axis=-1))


def iqm(values: ArrayLike) -> Array:
    """Interquartile mean over the last axis: the mean of what is left without the lowest and highest quarter.

    Between mean and median in what one bad run can do to it (Agarwal et al., 2021, section 4.3). As there, a quarter is
    rounded down to whole values.

    >>> float(iqm([0, 0, 1, 2, 3, 4, 90, 99]))
    2.5
    """
    return np.asarray(stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=-1))


def stratified_bootstrap(
    runs: Runs,
    statistic: Statistic = iqm,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of all runs, drawing runs anew inside each class (Agarwal et al., 2021).

    It is about other seeds on *these* classes. With few runs a class it is too short: the spread inside a class of n
    runs is underestimated by the factor sqrt((n - 1) / n), 0.82 for three, 0.89 for five.

    Args:
        runs: one array (runs,) a class.
        statistic: of the pooled values, along the last axis; :func:`iqm`, :func:`mean`, ...
        resamples, level, seed: of the bootstrap.

    Raises:
        ValueError: no classes, a class without runs, values that are not finite.
    """
    classes = _classes(runs)
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([part[rng.integers(part.size, size=(resamples, part.size))] for part in classes], axis=1)
    return _percentiles(float(statistic(np.concatenate(classes))), statistic(drawn), level)


def _draw_means(parts: Sequence[Array], chosen: npt.NDArray[np.int64], rng: np.random.Generator) -> Array:
    """Mean of freshly drawn runs of each chosen class; ``chosen`` (resamples, classes) -> same shape."""
    sizes = np.array([part.size for part in parts])
    width = int(sizes.max())
    padded = np.zeros((len(parts), width))
    for row, part in zip(padded, parts, strict=True):
        row[: part.size] = part
    size = sizes[chosen][..., None]
    index = (rng.random((*chosen.shape, width)) * size).astype(np.int64)
    taken = np.arange(width) < size
    values = np.where(taken, padded[chosen[..., None], index], 0.0)
    return np.asarray(values.sum(axis=-1) / size[..., 0])


def hierarchical_bootstrap(
    first: Runs,
    second: Runs,
    *,
    draw_classes: bool = True,
    paired_runs: bool = False,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean over classes of mean(first) - mean(second), paired by class.

    Draws classes with replacement, then runs inside each of them. With one value a class (a published mean) only
    classes are drawn. The class is the unit: twenty seeds of three classes are three units, and an interval over fewer
    than about ten classes is far too short (at twelve it covers 91 % instead of 95 %; see
    :func:`student_interval`). Drawing runs as well, on top of class means that already vary with them, counts their
    noise twice (Davison and Hinkley, 1997, section 3.8): a little too wide where runs matter.

    Args:
        first, second: one array (runs,) a class, the same classes in the same order.
        draw_classes: ``False`` keeps the classes and draws runs alone: about other seeds on these classes, and as much
            too short as :func:`stratified_bootstrap`.
        paired_runs: run i of both belongs together (same seed): draw the same ones.
        resamples, level, seed: of the bootstrap.

    Raises:
        ValueError: different classes, no runs, values that are not finite, or ``paired_runs`` with unequal numbers.

    >>> print(hierarchical_bootstrap([[2.0], [2.0]], [[1.0], [1.0]]))
    1.00 [1.00, 1.00]
    """
    a, b = _pairs(first, second)
    estimate = float(np.mean([x.mean() - y.mean() for x, y in zip(a, b, strict=True)]))
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(a), size=(resamples, len(a)))
    if not draw_classes:
        chosen = np.broadcast_to(np.arange(len(a)), chosen.shape)
    if paired_runs:
        if any(x.size != y.size for x, y in zip(a, b, strict=True)):
            raise ValueError("paired_runs needs the same seeds for both in every class")
        draws = _draw_means([x - y for x, y in zip(a, b, strict=True)], chosen, rng)
    else:
        draws = _draw_means(a, chosen, rng) - _draw_means(b, chosen, rng)
    return _percentiles(estimate, draws.mean(axis=1), level)


def student_interval(differences: ArrayLike, *, level: float = LEVEL) -> Interval:
    """Student's interval of the mean of differences, one a class: exact for normal ones, safer than a percentile
    bootstrap for few.

    Raises:
        ValueError: fewer than two values, or one that is not finite.

    >>> print(student_interval([1.0, 2.0, 3.0]))
    2.00 [-0.48, 4.48]
    """
    values = _vector(differences, 2)
    half = stats.t.ppf((1 + level) / 2, values.size - 1) * stats.sem(values)
    centre = float(values.mean())
    return Interval(centre, centre - float(half), centre + float(half), level)


def welch_interval(
    mean_first: float,
    sd_first: float,
    mean_second: float,
    sd_second: float,
    runs: int | tuple[int, int] = 3,
    *,
    level: float = LEVEL,
    resolution: float | tuple[float, float] = 0.0,
) -> Interval:
    """Welch's interval of mean_first - mean_second from means and (sample) standard deviations, perhaps printed ones.

    Args:
        mean_first, sd_first, mean_second, sd_second: each sd with n - 1 in the denominator.
        runs: behind each mean, one number or one for each.
        level: of the interval.
        resolution: last printed digit of both or of each (0.1 for one decimal, 0 where nothing was rounded): the
            interval grows by half of it for each mean, and a standard deviation counts as the largest that rounds to
            what is printed.

    Raises:
        ValueError: fewer than two runs, or a negative standard deviation.
    """
    n, m = (runs, runs) if isinstance(runs, int) else runs
    if min(n, m) < 2 or min(sd_first, sd_second) < 0:
        raise ValueError(f"runs={runs}, sd={sd_first}, {sd_second}: two runs at least, and no negative spread")
    r, s = (resolution, resolution) if not isinstance(resolution, tuple) else resolution
    u, v = (sd_first + r / 2) ** 2 / n, (sd_second + s / 2) ** 2 / m
    half = 0.0
    if u + v > 0:
        freedom = (u + v) ** 2 / (u**2 / (n - 1) + v**2 / (m - 1))
        half = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(u + v)
    half += (r + s) / 2
    centre = mean_first - mean_second
    return Interval(centre, centre - half, centre + half, level)


def _wins(first: Array, second: Array) -> Array:
    """Share of pairs that ``first`` wins, ties counting half, along the last axes: (..., n), (..., m) -> (...)."""
    x, y = first[..., :, None], second[..., None, :]
    return np.asarray((x > y).mean(axis=(-2, -1)) + 0.5 * (x == y).mean(axis=(-2, -1)))


def probability_of_improvement(first: Runs, second: Runs) -> float:
    """Probability that a run of ``first`` beats a run of ``second`` on a class drawn at random, ties counting half.

    The mean over classes of the Mann-Whitney share of pairs (Agarwal et al., 2021, section 4.3).

    >>> probability_of_improvement([[2, 3], [1, 1]], [[0, 1], [1, 1]])
    0.75
    """
    a, b = _pairs(first, second)
    return float(np.mean([_wins(x, y) for x, y in zip(a, b, strict=True)]))


def improvement_interval(
    first: Runs,
    second: Runs,
    *,
    resamples: int = 2000,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Stratified percentile bootstrap of :func:`probability_of_improvement`: other seeds, these classes."""
    a, b = _pairs(first, second)
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for x, y in zip(a, b, strict=True):
        drawn_x = x[rng.integers(x.size, size=(resamples, x.size))]
        drawn_y = y[rng.integers(y.size, size=(resamples, y.size))]
        total += _wins(drawn_x, drawn_y)
    return _percentiles(probability_of_improvement(a, b), total / len(a), level)


# --- Tests ------------------------------------------------------------------------------------------------------------

EXACT = 20
"""Up to so many differences the signs are enumerated; beyond, drawn."""


def _sign_flip_p(weights: Array, observed: float, resamples: int, seed: int) -> float:
    """Two-sided probability of |sum of +-weights| >= |observed| with independent fair signs."""
    n = weights.size
    tolerance = 1e-9 * max(1.0, float(np.abs(weights).sum()))
    if n <= EXACT:
        sums = np.zeros(1)
        for weight in weights:
            sums = np.concatenate((sums + weight, sums - weight))
        return float(np.mean(np.abs(sums) >= abs(observed) - tolerance))
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(resamples, n))
    hits = np.count_nonzero(np.abs(signs @ weights) >= abs(observed) - tolerance)
    return float((hits + 1) / (resamples + 1))


def sign_flip_test(differences: ArrayLike, *, resamples: int = 20_000, seed: int = 0) -> float:
    """Two-sided p of a paired permutation test of the mean: in each class the two labels may be exchanged.

    Exact up to 20 classes. The null hypothesis is that the differences are symmetric about zero.

    Raises:
        ValueError: no values, or one that is not finite.

    >>> sign_flip_test([1, 1, 1, 1])
    0.125
    """
    values = _vector(differences, 1)
    return _sign_flip_p(np.abs(values), float(values.sum()), resamples, seed)


def signed_rank_test(differences: ArrayLike, *, resamples: int = 20_000, seed: int = 0) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, exact also with ties and zeros (Pratt: zeros are ranked, then left).

    scipy's ``wilcoxon(x, zero_method="pratt", method=PermutationMethod())`` is the same test, enumerated hundreds of
    times slower; its ``"exact"`` knows no ties, and printed tables are full of them.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    # Differences of printed values: 0.1 + 0.2 must tie with 0.3.
    values = np.round(_vector(differences, 1), 9)
    ranks = stats.rankdata(np.abs(values))
    used = values != 0
    return _sign_flip_p(ranks[used], float((np.sign(values) * ranks)[used].sum()), resamples, seed)


def holm(p_values: ArrayLike) -> Array:
    """Holm's step-down correction: adjusted p-values that keep the family-wise error whatever their dependence.

    Raises:
        ValueError: a value outside [0, 1].

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64).ravel()
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values lie in [0, 1]")
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    adjusted = np.empty_like(p)
    adjusted[order] = stepped
    return adjusted


@dataclasses.dataclass(frozen=True)
class VarianceTest:
    """Is the run-to-run spread of the first model another than that of the second, over classes?

    Attributes:
        ratio: geometric mean over classes of sd(first) / sd(second), with a Student interval.
        p: two-sided, of a permutation test that exchanges the models' labels inside classes.
        lower, equal, higher: classes in which the first one's spread is the smaller, equal (both below the floor
            included), larger.
    """

    ratio: Interval
    p: float
    lower: int
    equal: int
    higher: int


def variance_test(
    sd_first: ArrayLike,
    sd_second: ArrayLike,
    runs_first: ArrayLike = 3,
    runs_second: ArrayLike = 3,
    *,
    floor: float,
    level: float = LEVEL,
    seed: int = 0,
) -> VarianceTest:
    """Paired test on log standard deviations, one pair a class.

    The logarithm makes a ratio of spreads a difference, in every class alike. Three runs leave a single log-ratio with
    a standard deviation of 0.9 even where nothing differs, so that a class alone shows little, a dozen of them much.
    If the spreads are equal in a class, exchanging the two labels changes nothing (with equal numbers of runs): this is
    what the permutation test uses; it needs no normality. Unequal numbers of runs shift the expected logarithm, by
    (digamma((n - 1) / 2) - ln((n - 1) / 2)) / 2, which is taken out.

    Args:
        sd_first, sd_second: sample standard deviations (n - 1 in the denominator), (classes,).
        runs_first, runs_second: numbers of runs behind them, one for all classes or one a class.
        floor: what a smaller standard deviation counts as. For values printed with one decimal 0.05: below it the print
            says 0.0, whose logarithm would decide everything. Both models get the same floor, so that two values below
            it are equal.
        level, seed: of the interval; of the permutations beyond 20 classes.

    Raises:
        ValueError: different shapes, fewer than two classes or runs, a negative value, or a floor that is not positive.
    """
    a, b = _vector(sd_first, 2), _vector(sd_second, 2)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} classes against {b.size}: give the same classes in the same order")
    if not floor > 0 or (a < 0).any() or (b < 0).any():
        raise ValueError("standard deviations must not be negative, and the floor must be positive")
    n = np.broadcast_to(np.asarray(runs_first, dtype=np.float64), a.shape)
    m = np.broadcast_to(np.asarray(runs_second, dtype=np.float64), a.shape)
    if (n < 2).any() or (m < 2).any():
        raise ValueError("a spread needs at least two runs of each model in each class")

    def shift(count: Array) -> Array:
        freedom = (count - 1) / 2
        return np.asarray((special.digamma(freedom) - np.log(freedom)) / 2)

    a, b = np.maximum(a, floor), np.maximum(b, floor)
    logs = np.log(a / b) - np.where(n == m, 0.0, shift(n) - shift(m))
    interval = student_interval(logs, level=level)
    ratio = Interval(math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high), level)
    return VarianceTest(
        ratio=ratio,
        p=sign_flip_test(logs, seed=seed),
        lower=int(np.count_nonzero(a < b)),
        equal=int(np.count_nonzero(a == b)),
        higher=int(np.count_nonzero(a > b)),
    )
