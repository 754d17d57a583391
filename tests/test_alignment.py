"""Measures of order against brute force, baselines and the rearrangement bound against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from usf import alignment as al
from usf.study import targets

GENERATOR = torch.Generator().manual_seed(7)


def brute_inversions(score: np.ndarray, log_density: np.ndarray) -> float:
    wrong = pairs = 0.0
    for i in range(len(score)):
        for j in range(len(score)):
            if log_density[i] < log_density[j]:  # i should score higher
                pairs += 1
                wrong += 1.0 if score[i] < score[j] else 0.5 if score[i] == score[j] else 0.0
    return wrong / pairs if pairs else 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=25))
def test_inversions_agree_with_counting_every_pair(points: list[tuple[int, int]]) -> None:
    score, log_density = np.array(points, dtype=float).T
    assert al.inversions(score, log_density) == pytest.approx(brute_inversions(score, log_density), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=30))
def test_correlations_agree_with_scipy(points: list[tuple[int, int]]) -> None:
    score, log_density = np.array(points, dtype=float).T
    if np.ptp(score) == 0 or np.ptp(log_density) == 0:
        assert al.spearman(score, log_density) == 0.0 == al.kendall(score, log_density)
        return
    assert al.spearman(score, log_density) == pytest.approx(stats.spearmanr(score, -log_density).statistic, abs=1e-12)
    assert al.kendall(score, log_density) == pytest.approx(stats.kendalltau(score, -log_density).statistic, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=30, unique=True))
def test_only_the_order_counts(log_density: list[int]) -> None:
    t = np.array(log_density, dtype=float)
    for score, expected in ((np.exp(-t / 20), 1.0), (t**3, -1.0)):
        assert al.spearman(score, t) == pytest.approx(expected)
        assert al.kendall(score, t) == pytest.approx(expected)
        assert al.inversions(score, t) == pytest.approx((1 - expected) / 2)


def test_tail_looks_only_at_the_least_dense_points() -> None:
    log_density = np.arange(100.0)
    score = -log_density
    score[:5] = score[:5][::-1]  # inverted among the five rarest, perfect elsewhere
    assert al.spearman(score, log_density) > 0.99
    assert al.spearman(score, log_density, tail=0.05) == pytest.approx(-1.0)
    assert al.inversions(score, log_density, tail=0.05) == pytest.approx(1.0)
    assert sorted(al.lowest(log_density, 0.05)) == [0, 1, 2, 3, 4]


def test_bootstrap_interval_covers_the_truth() -> None:
    """Two correlated normals have a known Kendall tau, 2/pi asin(rho); a 95 % interval covers it about as often."""
    rng = np.random.default_rng(3)
    truth, covered = 2 / math.pi * math.asin(0.6), 0
    for trial in range(40):
        a, e = rng.standard_normal((2, 150))
        found = al.alignment(0.6 * a + 0.8 * e, -a, resamples=100, seed=trial)
        covered += found.kendall.low <= truth <= found.kendall.high
        assert found.spearman.low <= found.spearman.value <= found.spearman.high
    assert covered >= 34
    again = al.alignment(0.6 * a + 0.8 * e, -a, resamples=100, seed=39)
    assert again == found


@pytest.mark.parametrize(
    ("score", "log_density", "match"),
    [
        ([1.0, 2.0], [1.0], "one value a point"),
        ([1.0], [1.0], "at least two"),
        ([1.0, float("nan")], [1.0, 2.0], "non-finite"),
        ([[1.0], [2.0]], [1.0, 2.0], "one-dimensional"),
    ],
)
def test_bad_input_is_named(score: list[float], log_density: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        al.spearman(score, log_density)


# ----------------------------------------------------------------------------------------------------------- baselines


def test_mahalanobis_orders_a_gaussian_perfectly_and_distance_does_not() -> None:
    target = targets.DiagonalMixture(
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([[9.0, 1.0, 0.1]]).double(),
    )
    train, test = target.sample(20_000, 0), target.sample(1_000, 1)
    log_density = target.log_prob(test)
    assert al.spearman(al.mahalanobis(train, test), log_density) > 0.999
    assert al.spearman(al.distance_to_mean(train, test), log_density) < 0.8


def test_kde_is_a_density_and_validation_chooses_its_width() -> None:
    target = targets.paper_mixture(2)
    train, test = target.sample(4_000, 0), target.sample(1_000, 1)
    chosen = al.kde(train, test, validation=target.sample(1_000, 2))
    truth = target.log_prob(test)
    blobs = targets.two_blobs(5.0)
    points, query = blobs.sample(4_000, 0), blobs.sample(500, 1)
    narrowed = al.kde(points, query, validation=blobs.sample(1_000, 2))
    assert narrowed.mean() < al.kde(points, query).mean() - 0.1  # Scott's rule is too wide for two scales
    assert float(chosen.mean()) == pytest.approx(-float(truth.mean()), abs=0.05)
    assert al.spearman(chosen, truth) > 0.97
    axis = torch.linspace(-14, 12, 131, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    assert float((-al.kde(train[:500], grid)).exp().sum()) * 0.2**2 == pytest.approx(1.0, abs=1e-3)


def test_kde_matches_scipy() -> None:
    train, test = torch.randn(200, 3, generator=GENERATOR).double(), torch.randn(20, 3, generator=GENERATOR).double()
    expected = -stats.gaussian_kde(train.T.numpy()).logpdf(test.T.numpy())
    assert torch.allclose(al.kde(train, test, chunk=7), torch.from_numpy(expected), atol=1e-9)


def test_a_constant_feature_is_refused() -> None:
    train = torch.cat([torch.randn(50, 1, generator=GENERATOR), torch.ones(50, 1)], 1)
    for baseline in (al.mahalanobis, al.kde):
        with pytest.raises(ValueError, match="singular"):
            baseline(train, train)


# ---------------------------------------------------------------------------------------------- the rearrangement bound


@pytest.mark.parametrize("dim", [1, 2, 8, 32, 128])
def test_a_gaussian_has_no_gap(dim: int) -> None:
    """p* of any Gaussian is an isotropic Gaussian of the same volume: the base itself."""
    variances = torch.linspace(0.1, 9.0, dim, dtype=torch.float64)
    target = targets.DiagonalMixture(torch.ones(1).double(), torch.ones(1, dim).double(), variances[None])
    found = al.rearrangement_bound(target.log_prob(target.sample(100_000, 0)), dim)
    entropy = 0.5 * (dim * math.log(2 * math.pi * math.e) + float(variances.log().sum()))
    assert found.entropy.value == pytest.approx(entropy, abs=4 * found.entropy.error)
    assert found.bound.value == pytest.approx(entropy, abs=4 * found.bound.error)
    assert abs(found.gap.value) < max(4 * found.gap.error, 1e-3)


def test_rearranged_radii_of_an_isotropic_gaussian_are_its_norms() -> None:
    x = torch.randn(100_000, 3, generator=GENERATOR, dtype=torch.float64)
    log_density = -0.5 * x.square().sum(-1) - 1.5 * math.log(2 * math.pi)
    norms = torch.linalg.vector_norm(x, dim=-1).sort().values.numpy()
    assert np.quantile(np.abs(al.rearranged_radii(log_density, 3) - norms), 0.99) < 0.03


def test_a_laplace_product_has_no_gap_under_a_laplace_base_and_a_known_one_under_a_gaussian() -> None:
    """Closed form: p = prod exp(-|x|)/2 and {|x|_1 < s} has volume (2s)^d/d!, so r^2 = c s^2 with d = 2, E s^2 = 6."""
    rng = np.random.default_rng(0)
    x = rng.laplace(size=(400_000, 2))
    log_density = -np.abs(x).sum(1) - 2 * math.log(2)
    laplace = al.rearrangement_bound(log_density, 2, base="laplace")
    assert abs(laplace.gap.value) < 2e-3
    gaussian = al.rearrangement_bound(log_density, 2)
    closed = math.log(2 * math.pi * math.e * (2 / math.pi) * 6 / 2) - (2 + 2 * math.log(2))
    assert gaussian.gap.value == pytest.approx(closed, abs=4 * gaussian.gap.error + 1e-3)


@pytest.mark.parametrize(("ratio", "gap"), [(2.0, 0.05), (10.0, 0.99), (100.0, 3.22)])
def test_two_blobs(ratio: float, gap: float) -> None:
    target = targets.two_blobs(ratio)
    found = al.rearrangement_bound(target.log_prob(target.sample(300_000, 0)), 2)
    assert found.gap.value == pytest.approx(gap, abs=0.015)


@pytest.mark.parametrize(("dim", "entropy", "bound"), [(2, 3.5580, 3.5603), (8, 12.9553, 12.9667)])
def test_paper_mixture(dim: int, entropy: float, bound: float) -> None:
    target = targets.paper_mixture(dim)
    found = al.rearrangement_bound(target.log_prob(target.sample(300_000, 1)), dim)
    assert found.entropy.value == pytest.approx(entropy, abs=0.02)
    assert found.gap.value == pytest.approx(bound - entropy, abs=1.5e-3)
    assert found.bound.value < target.gaussian_cross_entropy()


def test_the_bound_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="gaussian"):
        al.rearrangement_bound(np.zeros(10_000), 2, base="cauchy")
    with pytest.raises(ValueError, match="too few"):
        al.rearrangement_bound(np.zeros(50), 2)


# -------------------------------------------------------------------------------------------------------------- targets


ALL_TARGETS = {
    "mixture": targets.paper_mixture(2),
    "blobs": targets.two_blobs(3.0),
    "student": targets.StudentT(2, 3.0),
    "shell": targets.Shell(2),
}


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_samples_follow_the_density(name: str) -> None:
    """Mass in polar cells: Monte Carlo from the sampler against integration of the density."""
    target = ALL_TARGETS[name]
    x = target.sample(200_000, 0)
    assert torch.equal(x, target.sample(200_000, 0))
    assert x.dtype == torch.float64
    for radius in (1.0, 3.0, 8.0):
        n = 801
        axis = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 * radius - radius
        grid = torch.cartesian_prod(axis, axis)
        inside = torch.linalg.vector_norm(grid, dim=-1) < radius
        mass = target.log_prob(grid[inside]).exp().sum() * (2 * radius / n) ** 2
        share = (torch.linalg.vector_norm(x, dim=-1) < radius).double().mean()
        assert share == pytest.approx(float(mass), abs=0.006)


def test_paper_mixture_is_the_papers() -> None:
    target = targets.paper_mixture(8)
    x, k = target.sample(100_000, 0), target.components(100_000, 0)
    assert torch.allclose(x[k == 0].mean(0), torch.ones(8).double(), atol=0.05)
    assert torch.allclose(x[k == 1].mean(0), -torch.ones(8).double(), atol=0.05)
    assert torch.allclose(x[k == 1].var(0), torch.tensor([5.0] * 4 + [0.5] * 4).double(), rtol=0.05)
    assert torch.allclose(torch.cov(x.T), target.covariance(), atol=0.1)
    with pytest.raises(ValueError, match="even dimension"):
        targets.paper_mixture(3)


def test_student_matches_scipy() -> None:
    x = torch.randn(50, 4, generator=GENERATOR).double()
    expected = stats.multivariate_t(np.zeros(4), np.eye(4), df=3.0).logpdf(x.numpy())
    assert torch.allclose(targets.StudentT(4, 3.0).log_prob(x), torch.from_numpy(expected), atol=1e-10)
