"""AUROC by rank against scikit-learn, and the inputs it must refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from usf.study.metrics import auroc, auroc_difference


@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=200).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
def test_equals_scikit_learn_with_many_ties(rows: list[tuple[bool, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_equals_scikit_learn_on_pixel_maps() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((7, 31, 33)) < 0.05
    maps = (rng.normal(size=masks.shape) + masks).astype(np.float32)
    assert auroc(masks, maps) == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)


@given(st.integers(0, 10_000))
def test_invariant_under_monotone_maps_and_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate(([True, False], rng.random(40) < 0.3))
    scores = rng.integers(-8, 8, size=42).astype(float)
    shuffled = rng.permutation(42)
    assert auroc(labels, scores) == auroc(labels[shuffled], np.exp(scores[shuffled]))
    assert auroc(labels, scores) == pytest.approx(1 - auroc(labels, -scores), abs=1e-12)


def test_extreme_scores_do_not_saturate() -> None:
    # A sigmoid in float32 maps all four to 1.0 and would report chance.
    assert auroc([0, 0, 1, 1], np.float32([100, 200, 300, 400])) == 1.0


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0], [1.0, 2.0], "none of 2 is anomalous"),
        ([1, 1], [1.0, 2.0], "none of 2 is normal"),
        ([0, 1], [1.0, float("nan")], "1 of 2 scores are not finite"),
        ([0, 1], [1.0, float("inf")], "not finite"),
        ([0, 1], [1.0], "shape"),
        ([0, 2], [1.0, 2.0], "true/false"),
        ([], [], "both kinds"),
    ],
)
def test_undefined_areas_are_errors(labels: list[int], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auroc(labels, scores)


def test_interval_of_a_difference() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat([False, True], 60)
    good, bad = rng.normal(size=120) + 2 * labels, rng.normal(size=120) + 0.3 * labels
    low, high = auroc_difference(labels, good, bad)
    assert 0 < low < auroc(labels, good) - auroc(labels, bad) < high
    assert auroc_difference(labels, bad, good) == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="not finite"):
        auroc_difference(labels, good, np.full(120, np.nan))
