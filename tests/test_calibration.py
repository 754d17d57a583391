"""Promises of the calibration against simulations whose truth is known, the norm's law against exact arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from usf import calibration as cal
from usf.calibration import Calibration, CalibrationError, ChiLaw

SCORES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)
FEW_VALUES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=40)  # many ties


def mc_error(rate: float, trials: int) -> float:
    """Four standard errors of a share: a correct program fails once in 16 000 tests."""
    return 4 * math.sqrt(rate * (1 - rate) / trials)


# -------------------------------------------------------------------------------------------------- conformal p-values


@given(SCORES | FEW_VALUES, SCORES | FEW_VALUES)
def test_conformal_p_is_the_count(normals: list[float], scores: list[float]) -> None:
    expected = [(1 + sum(known >= score for known in normals)) / (len(normals) + 1) for score in scores]
    assert cal.conformal_p(normals, scores).tolist() == expected


@given(SCORES | FEW_VALUES, SCORES | FEW_VALUES, st.integers(0, 99))
def test_conformal_p_properties(normals: list[float], scores: list[float], seed: int) -> None:
    p = cal.conformal_p(normals, scores)
    assert np.all((p > 0) & (p <= 1))
    order = np.argsort(scores, kind="stable")
    assert np.all(np.diff(p[order]) <= 0)  # a higher score is never less suspicious
    shuffled = np.random.default_rng(seed).permutation(normals)
    assert np.array_equal(p, cal.conformal_p(shuffled, scores))
    assert np.array_equal(p[order], cal.conformal_p(normals, np.asarray(scores)[order]))
    broken = cal.conformal_p(normals, scores, seed=3)
    assert np.all((broken > 0) & (broken <= p))
    assert np.array_equal(broken, cal.conformal_p(normals, scores, seed=3))


@pytest.mark.parametrize("n", [9, 50, 199])
def test_conformal_p_keeps_its_level_for_every_n(n: int) -> None:
    """P(p <= a) over calibrations and parts is floor(a (n + 1)) / (n + 1), and a itself with ties broken at random."""
    rng, trials = np.random.default_rng(n), 8_000
    draws = rng.standard_t(3, (trials, n + 1))
    p = np.array([cal.conformal_p(row[:-1], row[-1:])[0] for row in draws])
    broken = np.array([cal.conformal_p(row[:-1], row[-1:], seed=i)[0] for i, row in enumerate(draws)])
    for alpha in (0.02, 0.1, 0.35):
        exact = math.floor(alpha * (n + 1) + 1e-9) / (n + 1)
        assert exact <= alpha
        assert abs(np.mean(p <= alpha) - exact) <= mc_error(exact, trials)
        assert abs(np.mean(broken <= alpha) - alpha) <= mc_error(alpha, trials)


def test_randomised_p_is_uniform_in_spite_of_ties() -> None:
    rng = np.random.default_rng(0)
    draws = rng.integers(0, 4, (4_000, 13)).astype(float)
    broken = [cal.conformal_p(row[:-1], row[-1:], seed=i)[0] for i, row in enumerate(draws)]
    plain = [cal.conformal_p(row[:-1], row[-1:])[0] for row in draws]
    assert stats.kstest(broken, "uniform").pvalue > 0.001
    assert np.mean(np.array(plain) <= 0.25) < 0.25 - mc_error(0.25, 4_000)  # ties cost power without it


def cross_p(data: np.ndarray, folds: int, new: np.ndarray, doubled: bool) -> float:
    """The detector is the mean of its training data; the score the distance to it."""
    parts = np.array_split(np.arange(len(data)), folds)
    held, scores = [], []
    for part in parts:
        centre = np.delete(data, part, axis=0).mean(axis=0)
        held.append(np.linalg.norm(data[part] - centre, axis=1))
        scores.append(np.linalg.norm(new - centre, axis=1))
    return float(cal.cross_conformal_p(held, scores, doubled=doubled)[0])


@pytest.mark.parametrize(("n", "folds"), [(12, 3), (14, 4), (20, 5), (10, 10)])
def test_cross_conformal_p_is_super_uniform(n: int, folds: int) -> None:
    """In 8 dimensions and with few points the detector's mean is poor, so that training parts would score too low."""
    rng, trials = np.random.default_rng(n), 2_000
    draws = rng.standard_normal((trials, n + 1, 8))
    doubled = np.array([cross_p(d[:-1], folds, d[-1:], True) for d in draws])
    pooled = np.array([cross_p(d[:-1], folds, d[-1:], False) for d in draws])
    distances = np.linalg.norm(draws - draws[:, :-1].mean(axis=1, keepdims=True), axis=2)
    naive = np.mean(distances >= distances[:, -1:], axis=1)  # calibrated on what it was trained on
    for alpha in (0.1, 0.2, 0.4):
        assert np.mean(doubled <= alpha) <= alpha + mc_error(alpha, trials)
        bound = cal.cross_conformal_bound([len(part) for part in np.array_split(range(n), folds)], alpha)
        assert np.mean(pooled <= alpha) <= bound + mc_error(min(bound, 0.5), trials)
        assert np.mean(pooled <= alpha) <= alpha + mc_error(alpha, trials)  # not guaranteed, but so in a stable case
    assert np.mean(naive <= 0.2) > 0.2 + mc_error(0.2, trials)
    assert np.all(pooled > 0)


def test_cross_conformal_pooled_counts() -> None:
    held, scores = [[1.0, 2.0, 5.0], [3.0]], [[2.0, 9.0], [4.0, 0.0]]
    assert cal.cross_conformal_p(held, scores, doubled=False).tolist() == [3 / 5, 2 / 5]
    assert cal.cross_conformal_p(held, scores).tolist() == [1.0, 1.0]  # 2 x mean of (3/4, 1/2) and (1/4, 1), at most 1
    with pytest.raises(CalibrationError, match="two folds"):
        cal.cross_conformal_p([[1.0]], [[1.0]])
    with pytest.raises(CalibrationError, match="same parts"):
        cal.cross_conformal_p([[1.0], [1.0]], [[1.0], [1.0, 2.0]])
    with pytest.raises(CalibrationError, match=r"fold 1.*none"):
        cal.cross_conformal_p([[1.0], []], [[1.0], [1.0]])
    for sizes in ([10], [10, 0]):
        with pytest.raises(CalibrationError, match="two folds or more"):
            cal.cross_conformal_bound(sizes, 0.1)


def test_cross_conformal_bound_needs_equal_folds_for_its_second_half() -> None:
    """The part of the bound that was proved for equal folds alone is not printed for others."""
    first = 0.1 + 2 * 0.95 * 3 / 32
    assert cal.cross_conformal_bound([7] * 4, 0.05) == pytest.approx(0.1 + (1 - 4 / 28) / 5)
    assert cal.cross_conformal_bound([6, 7, 7, 8], 0.05) == pytest.approx(first)
    assert cal.cross_conformal_bound([1, 2] * 10, 0.05) == pytest.approx(0.1 + 2 * 0.95 * 19 / 50)
    assert cal.cross_conformal_bound([3, 2], 0.9) == 1


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.data())
def test_pooled_p_is_a_weighted_mean_of_the_folds(sizes: list[int], data: st.DataObject) -> None:
    """What the bound for unequal folds rests on."""
    counts = [data.draw(st.integers(0, size)) for size in sizes]
    held = [np.r_[np.ones(count), np.zeros(size - count)] for count, size in zip(counts, sizes, strict=True)]
    scores = [[0.5]] * len(sizes)
    p = cal.cross_conformal_p(held, scores, doubled=False)[0]
    weights = np.array(sizes) + 1
    mean = np.average([cal.conformal_p(h, [0.5])[0] for h in held], weights=weights)
    n, folds = sum(sizes), len(sizes)
    assert mean == pytest.approx((p * (n + 1) + folds - 1) / (n + folds))


# ---------------------------------------------------------------------------------------------------------- thresholds


@given(SCORES | FEW_VALUES, SCORES | FEW_VALUES, st.floats(0.03, 0.97))
def test_threshold_and_p_value_say_the_same(normals: list[float], scores: list[float], alpha: float) -> None:
    if len(normals) < cal.normals_needed(alpha):
        with pytest.raises(CalibrationError, match=rf"{cal.normals_needed(alpha)} are needed"):
            cal.threshold(normals, alpha)
        return
    above = np.asarray(scores) > cal.threshold(normals, alpha)
    assert np.array_equal(above, cal.conformal_p(normals, scores) <= alpha)


@pytest.mark.parametrize("hundredths", range(1, 100))
def test_rank_survives_rounding(hundredths: int) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point, but 29 of 100 are 29 %."""
    assert cal.tail_rank(99, hundredths / 100) == hundredths


@given(st.floats(0.001, 0.6), st.none() | st.floats(0.5, 0.999))
def test_normals_needed_is_the_least_number(alpha: float, confidence: float | None) -> None:
    least = cal.normals_needed(alpha, confidence)
    assert cal.tail_rank(least, alpha, confidence=confidence) >= 1
    if least > 1:
        with pytest.raises(CalibrationError, match=f"{least} are needed"):
            cal.tail_rank(least - 1, alpha, confidence=confidence)
    if confidence is not None:
        assert (1 - alpha) ** least <= 1 - confidence + 1e-12


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (50, 0.1), (200, 0.05)])
def test_realised_rate_follows_the_beta_law(n: int, alpha: float) -> None:
    """The true rate of each simulated threshold is known exactly, because the scores' law is."""
    rng, trials = np.random.default_rng(n), 4_000
    draws = stats.gumbel_r.rvs(size=(trials, n), random_state=rng)
    rates = [stats.gumbel_r.sf(cal.threshold(row, alpha)) for row in draws]
    law = cal.realised_rate(n, alpha)
    assert law.mean() <= alpha
    assert stats.kstest(rates, law.cdf).pvalue > 0.001
    assert abs(np.mean(rates) - law.mean()) <= 4 * law.std() / math.sqrt(trials)


@pytest.mark.parametrize(("n", "alpha", "confidence"), [(59, 0.05, 0.95), (100, 0.05, 0.9), (300, 0.02, 0.95)])
def test_confident_threshold_keeps_its_rate_in_that_share_of_calibrations(
    n: int, alpha: float, confidence: float
) -> None:
    rng, trials = np.random.default_rng(n), 3_000
    rates = np.array([1 - cal.threshold(row, alpha, confidence=confidence) for row in rng.random((trials, n))])
    kept = float(np.mean(rates <= alpha))
    exact = float(cal.realised_rate(n, alpha, confidence=confidence).cdf(alpha))
    assert exact >= confidence
    assert abs(kept - exact) <= mc_error(exact, trials)
    # The next lower threshold would break it: nothing is given away.
    rank = cal.tail_rank(n, alpha, confidence=confidence)
    assert stats.beta(rank + 1, n - rank).cdf(alpha) < confidence
    assert cal.tail_rank(n, alpha) > rank  # being sure costs power


def test_false_alarms_follow_the_beta_binomial_law() -> None:
    rng, trials, n, parts, alpha = np.random.default_rng(1), 4_000, 39, 20, 0.1
    draws = rng.standard_normal((trials, n + parts))
    counts = [int(np.sum(row[n:] > cal.threshold(row[:n], alpha))) for row in draws]
    law = cal.false_alarms(n, alpha, parts)
    for few in (0, 2, 5):
        assert abs(np.mean(np.array(counts) <= few) - law.cdf(few)) <= mc_error(float(law.cdf(few)), trials)
    assert law.std() > 1.2 * stats.binom(parts, alpha).std()
    with pytest.raises(CalibrationError, match="at least one"):
        cal.false_alarms(n, alpha, 0)


def test_rejection_rate_has_an_exact_interval() -> None:
    rate = cal.rejection_rate([0.01] * 3 + [0.5] * 17, 0.05)
    assert rate.value == 0.15
    assert stats.binom.sf(2, 20, rate.low) == pytest.approx(0.025)
    assert stats.binom.cdf(3, 20, rate.high) == pytest.approx(0.025)


# ------------------------------------------------------------------------------------------------------------- batches


def test_benjamini_hochberg_keeps_the_false_discovery_rate() -> None:
    """Conformal p-values of one batch share their calibration; the rate holds all the same, and most parts are found.

    With n normals, 30 good and 10 bad parts BH's false discovery rate is at most 30/40 of the wanted rate.
    """
    rng, trials, rate = np.random.default_rng(2), 1_500, 0.2
    false, found, yekutieli = [], [], []
    for _ in range(trials):
        p = cal.conformal_p(rng.standard_normal(100), np.r_[rng.standard_normal(30), 3.5 + rng.standard_normal(10)])
        called = cal.discoveries(p, rate)
        false.append(called[:30].sum() / max(1, called.sum()))
        found.append(called[30:].mean())
        yekutieli.append(cal.discoveries(p, rate, method="by").sum() <= called.sum())
    error = 4 * float(np.std(false)) / math.sqrt(trials)
    assert np.mean(false) <= 0.75 * rate + error
    assert np.mean(false) >= 0.75 * rate - error - 0.02  # close to it: not by calling nothing
    assert np.mean(found) > 0.8
    assert all(yekutieli)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 0.5))
def test_discoveries_are_the_step_up_rule(p: list[float], rate: float) -> None:
    ordered = np.sort(p)
    passing = [k for k in range(1, len(p) + 1) if ordered[k - 1] * len(p) / k <= rate]
    limit = ordered[passing[-1] - 1] if passing else -1.0
    assert cal.discoveries(p, rate).tolist() == [value <= limit for value in p]


# -------------------------------------------------------------------------------------------------- the law of the norm


@pytest.mark.parametrize("dimension", [1, 2, 7.5, 300, 114_688])
@pytest.mark.parametrize("factor", [0.5, 0.98, 1.0, 1.3, 4.0, 1e4])
def test_log_survival_against_exact_arithmetic(dimension: float, factor: float) -> None:
    x = dimension * factor
    found = cal.chi2_log_sf([x], dimension)[0]
    with mpmath.workdps(60):
        a, y = mpmath.mpf(dimension) / 2, mpmath.mpf(x) / 2
        if dimension < 1000:
            exact = mpmath.log(mpmath.gammainc(a, y, mpmath.inf, regularized=True))
        elif factor > 1:  # the continued fraction from far behind, in 60 digits
            tail = mpmath.mpf(0)
            for k in range(2_000, 0, -1):
                tail = -k * (k - a) / (y + 2 * k + 1 - a + tail)
            exact = a * mpmath.log(y) - y - mpmath.loggamma(a) - mpmath.log(y + 1 - a + tail)
        else:
            exact = mpmath.mpf(float(stats.chi2.logsf(x, dimension)))
        assert abs((found - exact) / exact) < 1e-12 if exact else found == 0
    assert np.isfinite(found)


@given(st.floats(0.5, 1e6), st.lists(st.floats(0, 1e7), min_size=2, max_size=20))
def test_log_survival_falls(dimension: float, x: list[float]) -> None:
    values = cal.chi2_log_sf(np.sort(x), dimension)
    assert np.all(values <= 0)
    assert np.all(np.diff(values) <= 1e-12 * np.abs(values[1:]))


def test_no_step_where_the_probability_leaves_the_floats() -> None:
    """Both formulas meet at ln p = ln 1e-280 without a step."""
    for dimension in (2.0, 50.0, 114_688.0):
        edge = stats.chi2.isf(1e-280, dimension)
        x = np.linspace(edge * (1 - 1e-4), edge * (1 + 1e-4), 41)
        slopes = np.diff(cal.chi2_log_sf(x, dimension)) / np.diff(x)
        assert np.allclose(slopes, slopes.mean(), rtol=1e-3)


def test_norms_of_gaussian_vectors_have_uniform_p_values() -> None:
    law = ChiLaw(20_000, variance=0.5)
    latent = math.sqrt(0.5) * torch.randn(400, 20_000, generator=torch.Generator().manual_seed(0))
    norms = torch.linalg.vector_norm(latent, dim=1)
    found = cal.agreement(law.pit(norms))
    assert not found.refuted
    assert found.trusted(0.15)
    assert not found.trusted(0.01)  # 400 parts cannot show that much
    assert np.allclose(law.p(norms) + law.pit(norms), 1)
    assert np.mean(np.asarray(norms) > law.threshold(0.1)) == pytest.approx(0.1, abs=mc_error(0.1, 400))
    assert law.p([law.threshold(0.1)])[0] == pytest.approx(0.1, rel=1e-9)
    wrong = cal.agreement(ChiLaw(20_000, variance=0.51).pit(norms))
    assert wrong.refuted
    assert not wrong.trusted(1.0)
    assert "do not use" in wrong.describe()
    assert "shown to be right within" in found.describe()


def test_fitted_law_finds_the_effective_dimension() -> None:
    rng = np.random.default_rng(5)
    few = 3 * rng.standard_normal((20_000, 12))
    copies = np.linalg.norm(np.repeat(few, 50, axis=1), axis=1)  # 600 latents, 12 of them free
    law = ChiLaw.fit(copies)
    assert law.dimension == pytest.approx(12, rel=0.05)
    assert law.variance == pytest.approx(9 * 50, rel=0.05)
    assert not cal.agreement(law.pit(np.linalg.norm(np.repeat(few[:500], 50, axis=1), axis=1))).refuted
    with pytest.raises(CalibrationError, match="two different"):
        ChiLaw.fit([2.0, 2.0])
    with pytest.raises(CalibrationError, match="not negative"):
        ChiLaw.fit([2.0, -2.0])


def test_interval_of_the_distance_covers_the_truth() -> None:
    """The law is wrong by a known distance; the interval holds it in at least 90 % of samples."""
    grid = np.linspace(0, 6, 100_001)
    true = np.max(np.abs(stats.chi(2).cdf(grid) - stats.chi(3).cdf(grid)))
    rng, covered = np.random.default_rng(6), 0
    for _ in range(150):
        norms = np.linalg.norm(rng.standard_normal((60, 2)), axis=1)
        found = cal.agreement(ChiLaw(3).pit(norms), confidence=0.9)
        covered += found.low <= true <= found.high
        assert found.low <= found.distance <= found.high
        assert found.margin <= math.sqrt(math.log(2 / 0.1) / (2 * 60)) + 1e-12
    assert covered >= 135


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("scores", "match"),
    [
        ([], "none"),
        ([1.0, math.nan], "1 of 2 are not finite, the first at position 1"),
        ([[1.0]], "shape"),
        ([math.inf], "not finite"),
    ],
)
def test_bad_scores_are_named(scores: list[float], match: str) -> None:
    for call in (
        lambda: cal.conformal_p(scores, [1.0]),
        lambda: cal.conformal_p([1.0], scores),
        lambda: cal.threshold(scores, 0.5),
        lambda: cal.agreement(scores),
        lambda: ChiLaw(2).p(scores),
        lambda: Calibration(tuple(scores), 0.5),
    ):
        with pytest.raises(CalibrationError, match=match):
            call()


def test_too_few_normals_says_how_many_are_needed() -> None:
    with pytest.raises(CalibrationError, match=r"28 normal parts are too few .* 0\.01: 99 are needed.*0\.0345"):
        cal.threshold(range(28), 0.01)
    with pytest.raises(CalibrationError, match=r"with confidence 0\.95: 59 are needed"):
        Calibration(tuple(range(58)), 0.05, confidence=0.95)
    with pytest.raises(CalibrationError, match="0 normal parts"):
        cal.tail_rank(0, 0.1)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan, 5, "0.1"])
def test_rates_are_shares(value: float) -> None:
    for call in (
        lambda: cal.threshold([1.0], value),
        lambda: cal.tail_rank(100, 0.1, confidence=value),
        lambda: cal.discoveries([0.1], value),
        lambda: cal.agreement([0.1], confidence=value),
    ):
        with pytest.raises(CalibrationError, match="between 0 and 1"):
            call()


def test_other_bad_input() -> None:
    with pytest.raises(CalibrationError, match=r"\[0, 1\]"):
        cal.discoveries([1.2], 0.1)
    with pytest.raises(CalibrationError, match="'bh', 'by'"):
        cal.discoveries([0.2], 0.1, method="holm")  # type: ignore[arg-type]
    for dimension, variance in ((0, 1.0), (math.inf, 1.0), (2, -1.0), ("2", 1.0)):
        with pytest.raises(CalibrationError, match="norm's law"):
            ChiLaw(dimension, variance)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ on disk


@pytest.fixture
def kept() -> Calibration:
    norms = np.linalg.norm(np.random.default_rng(4).standard_normal((120, 9)), axis=1)
    return Calibration(tuple(norms.tolist()), 0.05, 0.95, ChiLaw(9), model="abc", data="manifest 12")


def test_a_calibration_comes_back_as_it_was(kept: Calibration, tmp_path: Path) -> None:
    path = kept.save(tmp_path / "ordner mit ö" / "calibration.json")
    again = Calibration.load(path, model="abc")
    assert again == kept
    assert again.threshold == kept.threshold == sorted(kept.normals)[-cal.tail_rank(120, 0.05, confidence=0.95)]
    assert not again.agreement().refuted
    scores = [2.0, 3.0, 9.0]
    assert np.array_equal(again.p(scores), cal.conformal_p(kept.normals, scores))
    assert again.alarms(scores).tolist() == [False, False, True]
    assert "with confidence 95 %, at most 5 %" in again.promise()
    assert "on average" in dataclasses.replace(kept, confidence=None).promise()
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.alpha = 0.5  # type: ignore[misc]
    plain = Calibration(tuple(torch.arange(30.0)), np.float32(0.125))  # type: ignore[arg-type]
    assert Calibration.load(plain.save(tmp_path / "plain.json")) == plain
    with pytest.raises(CalibrationError, match="no law"):
        plain.agreement()


@given(FEW_VALUES)
def test_order_of_the_normals_does_not_matter(normals: list[float]) -> None:
    assert Calibration(tuple(normals), 0.9) == Calibration(tuple(reversed(normals)), 0.9)


def change(path: Path, digest: bool = True, **fields: object) -> None:
    content = json.loads(path.read_text())
    content.update(fields)
    if digest:
        del content["sha256"]
        content["sha256"] = cal._digest(content)
    path.write_text(json.dumps(content))


def test_a_changed_file_is_refused_by_name(kept: Calibration, tmp_path: Path) -> None:
    path = kept.save(tmp_path / "calibration.json")
    change(path, digest=False, alpha=0.5)
    with pytest.raises(CalibrationError, match=r"calibration\.json was changed after it was written"):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"threshold": 1.0}, "states threshold 1.0, its scores give"),
        ({"alpha": "__import__('os').abort()"}, "wrong type in alpha"),
        ({"alpha": 0.001}, "are needed"),
        ({"normals": []}, "none"),
        ({"normals": [1.0, None]}, "wrong type in normals"),
        ({"law": {"dimension": 9, "variance": 1, "more": 1}}, "wrong type in law"),
        ({"law": {"dimension": -9, "variance": 1}}, "norm's law"),
        ({"format": "usf-calibration-2"}, "usf-calibration-2.*not 'usf-calibration-1'"),
        ({"surprise": 1}, "missing or unknown .surprise"),
    ],
)
def test_a_forged_file_is_still_validated(
    kept: Calibration, tmp_path: Path, fields: dict[str, object], match: str
) -> None:
    path = kept.save(tmp_path / "calibration.json")
    change(path, **fields)
    with pytest.raises(CalibrationError, match=rf"calibration\.json.*{match}"):
        Calibration.load(path)


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', "[" * 100_000, "\x80\x04K\x01."])
def test_what_is_no_calibration_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(text.encode("latin1"))  # the last one is a pickle
    with pytest.raises(CalibrationError, match=r"calibration\.json is not a calibration"):
        Calibration.load(path)
    with pytest.raises(CalibrationError, match=r"missing\.json cannot be read"):
        Calibration.load(tmp_path / "missing.json")


def test_another_models_calibration_is_refused(kept: Calibration, tmp_path: Path) -> None:
    path = kept.save(tmp_path / "calibration.json")
    with pytest.raises(CalibrationError, match=r"calibration\.json was made with model 'abc', not with 'abd'"):
        Calibration.load(path, model="abd")
