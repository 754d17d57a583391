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
    figure = hybrid.areas({"sum": (rows, "auroc_sum")}, seeds=3)
    assert figure.axes[0].get_title() == "sum"
    assert [text.get_text() for text in figure.axes[0].texts] == ["3/3", "2/3", "3/3"]
    dots = [line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots[1], [50, 70])
    plt.close(figure)


def test_a_group_without_a_valid_training_is_still_there() -> None:
    shared = {"seed": 0, "status": "failed", "auroc_sum": None}
    rows = [{"setting": name, "prior": prior, **shared} for name in ("short", "long") for prior in hybrid.LABELS]
    rows[0] |= {"status": "ok", "auroc_sum": 0.9}
    figure = hybrid.areas({"bottle": (rows, "auroc_sum")}, seeds=1, group="setting")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["short", "long"]
    assert [text.get_text() for text in axis.texts] == ["1/1", *["0/1"] * 5]
    assert all(axis.get_xlim()[0] < text.xy[0] < axis.get_xlim()[1] for text in axis.texts)
    plt.close(figure)


def test_both_panels_of_the_terms_show_every_image_and_lines_of_one_sum() -> None:
    rng = np.random.default_rng(0)
    nats = {"normal": (1e3 * rng.normal(size=20), rng.normal(size=20)), "odd": (np.array([9e3]), np.array([4.0]))}
    surprises = {name: (rng.uniform(0, 3, len(x)), rng.uniform(0, 3, len(x))) for name, (x, _) in nats.items()}
    figure = hybrid.two_terms(nats, surprises, {"normal": "normal", "odd": "anomaly"})
    for axis in figure.axes:
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [len(line.get_xdata()) for line in dots] == [20, 1]
        lines = [np.asarray(line.get_xydata()) for line in axis.lines if line.get_marker() != "o"]
        assert lines
        np.testing.assert_allclose([line.sum(1)[0] for line in lines], [line.sum(1)[1] for line in lines], rtol=1e-6)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), nats["normal"][0])
    plt.close(figure)
    with pytest.raises(ValueError, match="same groups"):
        hybrid.two_terms(nats, {"normal": surprises["normal"]}, {"normal": "normal", "odd": "anomaly"})


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
