"""Figures of the hybrid: what they show is what they were given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from usf.plots import hybrid


def test_failed_trainings_have_no_dot_and_are_counted() -> None:
    rows = [
        {"class": "bottle", "prior": prior, "seed": seed, "status": "ok", "auroc_sum": 0.5 + 0.1 * seed}
        for prior in hybrid.LABELS
        for seed in range(3)
    ]
    rows[4] |= {"status": "failed", "auroc_sum": None}
    figure = hybrid.areas(rows, {"auroc_sum": "sum"}, seeds=3)
    assert [text.get_text() for text in figure.axes[0].texts] == ["3/3", "2/3", "3/3"]
    dots = [line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots[1], [50, 70])
    plt.close(figure)


def test_the_two_levels_show_every_image_and_refuse_other_groups() -> None:
    points = {"training": np.random.default_rng(0).normal(size=(9, 4)), "anomalous": np.ones((2, 4))}
    colors = {"training": "oracle", "anomalous": "anomaly"}
    figure = hybrid.two_levels(points, {name: 2 * value for name, value in points.items()}, colors)
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [9, 2]
    plt.close(figure)
    with pytest.raises(ValueError, match="same groups"):
        hybrid.two_levels(points, {"training": points["training"]}, colors)


def test_rows_of_images_need_one_length() -> None:
    with pytest.raises(ValueError, match="same number"):
        hybrid.image_grid({"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(1, 3, 4, 4)})
