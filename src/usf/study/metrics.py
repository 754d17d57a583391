"""Exact ranking metrics on raw scores.

A score is only ever compared with other scores, so it is ranked as it is: no squashing, no binning, no threshold grid.
(torchmetrics squashes every batch that leaves [0, 1] on its own, which changes the order between batches.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["auroc", "auroc_difference"]


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the probability that an anomaly scores higher than a normal sample, ties counting half.

    Computed from the rank sum of the anomalies (Mann-Whitney), ties sharing their mean rank; exact in integers up to
    the last division. Sorting dominates: O(n log n) time, about 30 bytes a sample.

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
    truth = np.asarray(labels)
    values = np.asarray(scores)
    if truth.shape != values.shape:
        raise ValueError(f"labels have shape {truth.shape}, scores {values.shape}: one label a score is needed")
    truth, values = truth.ravel(), values.ravel()
    if truth.dtype != bool:
        if not np.isin(truth, (0, 1)).all():
            raise ValueError("labels must be true/false or 1/0")
        truth = truth.astype(bool)
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of {values.size} scores are not finite")
    positives = int(np.count_nonzero(truth))
    negatives = truth.size - positives
    if not positives or not negatives:
        missing = "anomalous" if not positives else "normal"
        raise ValueError(f"the AUROC needs both kinds of samples, and none of {truth.size} is {missing}")

    order = np.argsort(values, kind="stable")
    ordered = values[order]
    hits = truth[order]
    # First position of every run of equal scores; each anomaly of a run beats all normals before the run, and half of
    # those inside it.
    starts = np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1))
    anomalies = np.add.reduceat(hits.astype(np.int64), starts)
    sizes = np.diff(np.concatenate((starts, [ordered.size])))
    normals = sizes - anomalies
    before = np.cumsum(normals) - normals
    # Twice the number of won pairs: integers, below 2^63 for up to 2e9 samples of each kind.
    won = int(np.sum(anomalies * (2 * before + normals), dtype=np.int64))
    return won / (2 * positives * negatives)


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
