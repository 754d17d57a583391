"""Ranking metrics against scikit-learn, anomalib and a curve drawn point by point; the inputs they must refuse."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from usf.study import metrics
from usf.study.metrics import aupro, auroc, auroc_difference, average_precision, pixel_metrics


@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=200).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
def test_equals_scikit_learn_with_many_ties(rows: list[tuple[bool, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = average_precision_score(labels, scores)
    assert average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_equals_scikit_learn_on_pixel_maps() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((7, 31, 33)) < 0.05
    maps = (rng.normal(size=masks.shape) + masks).astype(np.float32)
    assert auroc(masks, maps) == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    expected = average_precision_score(masks.ravel(), maps.ravel())
    assert average_precision(masks, maps) == pytest.approx(expected, abs=1e-12)


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


# --- per-region overlap ----------------------------------------------------------------------------------------------


def drawn(masks: np.ndarray, maps: np.ndarray, limit: float) -> float:
    """The same area from the definition: every threshold, every region, the trapezoid rule."""
    regions = []
    for index, mask in enumerate(masks):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(index, labelled == number) for number in range(1, count + 1)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        rates.append(float((maps[~masks] >= threshold).mean()))
        overlaps.append(float(np.mean([(maps[index][region] >= threshold).mean() for index, region in regions])))
    grid = np.unique(np.append(np.asarray(rates)[np.asarray(rates) < limit], limit))
    # At a rate that several thresholds share the curve is a vertical line: integrate left and right limits apart.
    area, rate, overlap = 0.0, np.asarray(rates), np.asarray(overlaps)
    for low, high in itertools.pairwise(grid):
        start = overlap[rate <= low][-1]
        after = np.flatnonzero(rate > low)[0]
        end = start + (overlap[after] - start) * (high - low) / (rate[after] - low)
        area += (start + end) / 2 * (high - low)
    return area / limit


@given(st.integers(0, 10_000), st.sampled_from([2, 5, 1000]), st.sampled_from([0.1, 0.3, 1.0]))
def test_overlap_is_the_area_under_the_curve_of_its_definition(seed: int, levels: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 6, 7)) < 0.25
    masks[0, 0, 0], masks[0, 5, 5], masks[2] = True, False, False
    maps = rng.integers(0, levels, masks.shape) / levels + 0.2 * masks
    assert aupro(masks, maps, limit=limit) == pytest.approx(drawn(masks, maps, limit), abs=1e-12)


def test_regions_count_alike_whatever_their_size() -> None:
    masks = np.zeros((1, 20, 20), dtype=bool)
    masks[0, :10, :10], masks[0, 19, 19] = True, True
    found_large, found_small = np.zeros((2, 1, 20, 20))
    found_large[0, :10, :10] = found_small[0, 19, 19] = 1.0
    # The region that is found counts fully, the other along the line from (0, 1/2) to (1, 1).
    assert aupro(masks, found_large) == aupro(masks, found_small) == pytest.approx(0.5 + 0.5 * 0.15)
    assert auroc(masks, found_large) > 0.99 > 0.51 > auroc(masks, found_small)


def test_two_regions_that_touch_at_a_corner_are_one() -> None:
    masks = np.zeros((1, 4, 4), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 1, 2] = True
    maps = np.zeros((1, 4, 4))
    maps[0, 0, 0] = 1.0
    assert aupro(masks, maps, limit=1.0) == pytest.approx(1 / 3 + (1 - 1 / 3) / 2)


def test_equals_anomalib_on_maps_in_the_unit_interval() -> None:
    pytest.importorskip("anomalib", reason="needs the detectors extra")
    import torch
    from anomalib.metrics.aupro import _AUPRO
    from anomalib.metrics.auroc import _AUROC

    rng = np.random.default_rng(4)
    masks = np.zeros((6, 48, 48), dtype=bool)
    for index in range(4):
        row, column = rng.integers(0, 30, 2)
        masks[index, row : row + 12, column : column + 5] = True
        masks[index, -3:, -3:] = True
    maps = np.clip(0.4 + 0.1 * rng.normal(size=masks.shape) + 0.15 * masks, 0, 1).astype(np.float32)
    maps[3] = maps[3].round(1)  # ties
    target, predicted = torch.from_numpy(masks).int(), torch.from_numpy(maps)
    theirs = _AUPRO()
    theirs.update(predicted, target)
    # anomalib adds up hundreds of thousands of shares in float32.
    assert aupro(masks, maps) == pytest.approx(float(theirs.compute()), abs=1e-4)
    area = _AUROC()
    area.update(predicted.flatten(), target.flatten())
    assert auroc(masks, maps) == pytest.approx(float(area.compute()), abs=1e-5)
    images = maps.max(axis=(1, 2))
    area = _AUROC()
    area.update(torch.from_numpy(images), target.amax((1, 2)))
    assert auroc(masks.any(axis=(1, 2)), images) == pytest.approx(float(area.compute()), abs=1e-6)


def test_one_sort_gives_both_pixel_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    masks = rng.random((4, 40, 40)) < 0.1
    maps = (rng.normal(size=masks.shape) + masks).astype(np.float32)
    whole = pixel_metrics(masks, maps)
    assert (whole.auroc, whole.aupro) == (auroc(masks, maps), aupro(masks, maps))
    monkeypatch.setattr(metrics, "CHUNK", 17)  # the anomalous pixels in many parts
    parts = pixel_metrics(masks, maps)
    assert parts.auroc == whole.auroc
    assert parts.aupro == pytest.approx(whole.aupro, abs=1e-12)
    assert average_precision(masks, maps) == pytest.approx(
        average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12
    )


def test_memory_stays_near_one_copy_of_the_scores() -> None:
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(40, 224, 224)).astype(np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    masks[:20, 50:90, 60:100] = True
    tracemalloc.start()
    pixel_metrics(masks, maps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Chunks of looked-up scores have a fixed size, which shows at this small one.
    assert peak < 1.5 * maps.nbytes + 40 * metrics.CHUNK


def test_undefined_overlaps_are_errors() -> None:
    masks, maps = np.zeros((1, 2, 2), dtype=bool), np.zeros((1, 2, 2))
    with pytest.raises(ValueError, match="AUPRO needs both kinds of samples, and none of 4 is anomalous"):
        aupro(masks, maps)
    with pytest.raises(ValueError, match=r"\(images, height, width\) is needed"):
        aupro(masks[0], maps[0])
    masks[0, 0, 0] = True
    with pytest.raises(ValueError, match="limit=0"):
        aupro(masks, maps, limit=0)
    maps[0, 1, 1] = np.inf
    with pytest.raises(ValueError, match="1 of 4 scores are not finite"):
        pixel_metrics(masks, maps)
    with pytest.raises(ValueError, match="average precision needs both"):
        average_precision([1], [0.5])
