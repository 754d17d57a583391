"""Exact ranking metrics on raw scores.

A score is only ever compared with other scores, so it is ranked as it is: no squashing, no binning, no threshold grid.
(torchmetrics squashes every batch that leaves [0, 1] on its own, which changes the order between batches.)

Everything follows from how many normal scores lie above each anomalous one and how many tie with it. Only the normal
scores are sorted, in their own precision, and the anomalous ones, which are few among pixels, are looked up: what is
needed beyond the scores is one sorted copy of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

__all__ = ["PixelMetrics", "aupro", "auroc", "auroc_difference", "average_precision", "pixel_metrics"]

FPR_LIMIT = 0.3
"""Up to which false-positive rate the per-region overlap is integrated (Bergmann et al., 2019)."""

CHUNK = 1 << 20
"""Anomalous scores that are looked up at a time."""

EIGHT = np.ones((3, 3), dtype=bool)
"""Pixels that touch at a corner belong to one region, as in MVTec's own evaluation."""


@dataclasses.dataclass(frozen=True)
class PixelMetrics:
    """What :func:`pixel_metrics` computes from one sort; each in [0, 1], see the functions of the same name."""

    auroc: float
    aupro: float


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the probability that an anomaly scores higher than a normal sample, ties counting half.

    The Mann-Whitney statistic, exact in integers up to the last division. Sorting dominates: O(n log n) time, and
    memory for one more copy of the scores.

    Args:
        labels: true (anomalous) or false (normal), any shape. Image level: one per image; pixel level: the masks.
        scores: same shape, higher is more anomalous, any monotone scale.

    Returns:
        a number in [0, 1]; 0.5 is chance.

    Raises:
        ValueError: shapes differ, a score is not finite, a label is neither 0 nor 1, or one of the two classes is
            empty (the area is then undefined; it is not reported as 0.5).

    >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    >>> auroc([0, 1], [2.0, 2.0])
    0.5
    """
    truth, values = _checked("AUROC", labels, scores)
    normals, anomalies = _split(truth, values)
    return _auroc(normals, anomalies)


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean, over the anomalies, of the precision at the threshold that just includes them (scikit-learn's definition).

    Anomalies and normal samples with the same score are included together.

    Args, Raises: as :func:`auroc`.

    >>> average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.8333333333333333
    """
    truth, values = _checked("average precision", labels, scores)
    normals, anomalies = _split(truth, values)
    anomalies.sort()
    total = 0.0
    for part, above, tied in _lookup(normals, anomalies):
        false = above + tied
        true = len(anomalies) - np.searchsorted(anomalies, part, side="left")
        total += float(np.sum(true / (true + false)))
    return total / len(anomalies)


def aupro(masks: ArrayLike, maps: ArrayLike, *, limit: float = FPR_LIMIT) -> float:
    """Area under the per-region overlap, up to a false-positive rate of ``limit``, divided by ``limit``.

    The overlap of a region (pixels of one mask that touch, corners included) is the share of it above a threshold; the
    curve is its mean over all regions of all images, so that a small defect counts as much as a large one, against the
    share of all normal pixels above the threshold, drawn as straight lines between thresholds. Exact: every pixel of a
    region of r pixels adds 1/r from its own place in the order of normal pixels on, which integrates in closed form.

    Args:
        masks: true where anomalous, (N, H, W).
        maps: anomaly maps, same shape, higher is more anomalous.
        limit: in (0, 1].

    Raises:
        ValueError: as :func:`auroc`; not three dimensions; a limit outside (0, 1].

    >>> aupro([[[0, 0], [0, 1]]], [[[0.3, 0.2], [0.1, 0.9]]])
    1.0
    """
    truth, values = _checked("AUPRO", masks, maps, dims=3)
    if not 0 < limit <= 1:
        raise ValueError(f"limit={limit}: a false-positive rate in (0, 1] is needed")
    normals, anomalies = _split(truth, values)
    return _aupro(normals, anomalies, _shares(truth), limit)


def pixel_metrics(masks: ArrayLike, maps: ArrayLike) -> PixelMetrics:
    """:func:`auroc` and :func:`aupro` of maps (N, H, W), with one sort for both."""
    truth, values = _checked("pixel metrics", masks, maps, dims=3)
    normals, anomalies = _split(truth, values)
    return PixelMetrics(_auroc(normals, anomalies), _aupro(normals, anomalies, _shares(truth), FPR_LIMIT))


def auroc_difference(
    labels: ArrayLike, first: ArrayLike, second: ArrayLike, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of auroc(first) - auroc(second) over the choice of test images.

    Paired and stratified bootstrap: normal and anomalous images are redrawn separately, the same for both scores. It
    covers which images were tested, not which seed trained the detectors.

    Args:
        labels: true for anomalous, (N,).
        first, second: scores of the same images, (N,), higher is more anomalous.
        resamples: number of redraws.
        level: of the interval.
        seed: of the redraws.

    Raises:
        ValueError: see :func:`auroc`.

    >>> auroc_difference([0, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3, 4])
    (0.0, 0.0)
    """
    truth = np.asarray(labels, dtype=bool)
    scores = [np.asarray(values) for values in (first, second)]
    for values in scores:
        auroc(truth, values)  # refuses what cannot be ranked, by name
    rng = np.random.default_rng(seed)
    groups = np.flatnonzero(~truth), np.flatnonzero(truth)
    differences = np.empty(resamples)
    for index in range(resamples):
        drawn = np.concatenate([rng.choice(group, len(group)) for group in groups])
        differences[index] = auroc(truth[drawn], scores[0][drawn]) - auroc(truth[drawn], scores[1][drawn])
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _checked(
    name: str, labels: ArrayLike, scores: ArrayLike, dims: int | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.generic]]:
    """Labels as booleans and scores as numbers of the same shape, with something of both kinds; see :func:`auroc`."""
    truth, values = np.asarray(labels), np.asarray(scores)
    if truth.shape != values.shape:
        raise ValueError(f"labels have shape {truth.shape}, scores {values.shape}: one label a score is needed")
    if dims is not None and truth.ndim != dims:
        raise ValueError(f"{name}: masks and maps have shape {truth.shape}, (images, height, width) is needed")
    if truth.dtype != bool:
        if not np.isin(truth, (0, 1)).all():
            raise ValueError("labels must be true/false or 1/0")
        truth = truth.astype(bool)
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of {values.size} scores are not finite")
    positives = int(np.count_nonzero(truth))
    if not positives or positives == truth.size:
        missing = "anomalous" if not positives else "normal"
        raise ValueError(f"the {name} needs both kinds of samples, and none of {truth.size} is {missing}")
    return truth, values


def _split(truth: NDArray[np.bool_], values: NDArray[np.generic]) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """(normal scores, sorted; anomalous scores, in the order of the array)."""
    normals = values[~truth]
    normals.sort()
    return normals, values[truth]


def _lookup(
    normals: NDArray[np.generic], anomalies: NDArray[np.generic]
) -> Iterator[tuple[NDArray[np.generic], NDArray[np.int64], NDArray[np.int64]]]:
    """Parts of the anomalous scores, with the numbers of normal scores above and equal to each."""
    for start in range(0, len(anomalies), CHUNK):
        part = anomalies[start : start + CHUNK]
        below = np.searchsorted(normals, part, side="left")
        upto = np.searchsorted(normals, part, side="right")
        yield part, len(normals) - upto, upto - below


def _auroc(normals: NDArray[np.generic], anomalies: NDArray[np.generic]) -> float:
    # Twice the number of lost pairs, in Python's integers: exact for any number of samples.
    lost = sum(int(np.sum(2 * above + tied)) for _, above, tied in _lookup(normals, anomalies))
    pairs = 2 * len(normals) * len(anomalies)
    return (pairs - lost) / pairs


def _shares(truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """For each anomalous pixel, in the order of the array, 1 / (pixels of its region), over the number of regions."""
    shares, regions = [], 0
    for mask in truth:
        if not mask.any():
            continue
        labelled, count = ndimage.label(mask, structure=EIGHT)
        sizes = np.bincount(labelled.ravel(), minlength=count + 1)
        shares.append(1.0 / sizes[labelled[mask]])
        regions += count
    return np.concatenate(shares) / regions


def _aupro(
    normals: NDArray[np.generic], anomalies: NDArray[np.generic], shares: NDArray[np.float64], limit: float
) -> float:
    total, start = 0.0, 0
    for part, above, tied in _lookup(normals, anomalies):
        # A pixel counts from the rate `first` on; while normal pixels tie with it, in proportion to how many are in.
        first, width = above / len(normals), tied / len(normals)
        inside = np.clip(limit - first, 0.0, None)
        ramp = np.minimum(inside, width)
        with np.errstate(invalid="ignore", divide="ignore"):
            tying = np.where(width > 0, ramp * ramp / (2 * width), 0.0)
        total += float(np.sum(shares[start : start + len(part)] * (tying + inside - ramp)))
        start += len(part)
    return min(1.0, total / limit)
