"""The figures of the benchmark show what their tables hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import matplotlib as mpl
import pandas as pd
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from usf.plots import benchmark
from usf.study import paper, schema, tables


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def _drawn(figure: Figure, marker: str) -> int:
    return sum(line.get_marker() == marker for axis in figure.axes for line in axis.get_lines())


def _cells() -> dict[str, dict[tables.Key, tables.Cell]]:
    records = [
        schema.example(category=c, coupling=k, mixing=m, seed=s, image_auroc=0.9 + 0.01 * s, pixel_auroc=0.95)
        for c in ("bottle", "pill")
        for k, m in (("affine", "permutation"), ("additive", "lu"), ("gin", "lu"))
        for s in range(3)
    ]
    return {level: tables.collect(records, metric) for level, metric in tables.METRIC.items()}


def test_figures_of_the_papers_tables_have_a_mark_for_each_comparison() -> None:
    table = paper.reanalysis(resamples=200)
    for figure in (benchmark.mean_differences(table), benchmark.spread_ratios(paper.differences(), table)):
        assert _drawn(figure, benchmark.PAPER) == len(table) == 12
        filled = [
            line.get_markerfacecolor() != "none"
            for line in figure.axes[0].get_lines()
            if line.get_marker() == benchmark.PAPER
        ]
        column = "p_holm" if figure.axes[0].get_xscale() == "symlog" else "ratio_p_holm"
        assert filled == list(table[column] < 0.05)
    assert _drawn(benchmark.interquartile_means(resamples=100), benchmark.PAPER) == 4 * 3 * 2


def test_class_differences_add_what_was_measured() -> None:
    figure = benchmark.class_differences("image")
    assert (_drawn(figure, benchmark.PAPER), _drawn(figure, benchmark.HERE)) == (27 * 3, 0)
    figure = benchmark.class_differences("image", _cells()["image"])
    assert (_drawn(figure, benchmark.PAPER), _drawn(figure, benchmark.HERE)) == (27 * 3, 2)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0] == "bottle"
    assert labels[15] == "candle"


def test_measured_draws_each_variant_and_the_papers_value_where_there_is_one() -> None:
    figure = benchmark.measured(_cells())
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "FastFlow, affine (2)",
        "FastFlow, additive + LU (2)",
        "FastFlow, gin + LU (2)",
    ]
    assert _drawn(figure, benchmark.HERE) == 2 * 3
    assert _drawn(figure, "x") == 2 * 2  # GIN is not in the paper
    with pytest.raises(ValueError, match="no runs to draw"):
        benchmark.measured({"image": {}})


def test_over_epochs_has_a_line_a_training_and_one_a_variant() -> None:
    records = [
        schema.example(protocol="trace", epoch=epoch, seed=seed, coupling=coupling, image_auroc=0.9 + 0.01 * epoch)
        for epoch in (1, 2)
        for seed in (0, 1, 2)
        for coupling in ("additive", "gin")
    ]
    figure = benchmark.over_epochs(records)
    (axis,) = figure.axes
    assert len(axis.get_lines()) == 2 * (3 + 1)
    thick = [line for line in axis.get_lines() if line.get_linewidth() == 2.0]
    assert list(thick[0].get_ydata()) == pytest.approx([91.0, 92.0])
    with pytest.raises(ValueError, match="protocol trace"):
        benchmark.over_epochs([schema.example()])
    with pytest.raises(ValueError, match="one score"):
        benchmark.over_epochs([*records, schema.example(protocol="trace", score="anomalib")])


def test_fibres_have_a_line_a_training_in_every_panel() -> None:
    rows = pd.DataFrame(
        {
            "category": category, "coupling": coupling, "epochs": 2, "seed": seed, "epoch": epoch, "way": way,
            "mixing": "lu", "size": 128, "loss_kind": loss,
            "image_auroc": 0.9, "pixel_auroc": 0.8 + 0.01 * epoch, "max_log_prob": float(epoch),
        }
        for category in ("bottle", "hazelnut")
        for coupling in ("affine", "additive")
        for seed in (0, 1)
        for epoch in (2, 1)
        for way in ("log_prob", "norm")
        for loss in ("anomalib", "mle")
    )  # fmt: skip
    figure = benchmark.fibres_over_epochs(rows, ceiling=-0.9)
    assert [len(axis.get_lines()) for axis in figure.axes] == [16, 16, 17]
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == pytest.approx([81.0, 82.0])
    with pytest.raises(ValueError, match="stock"):
        benchmark.fibres_over_epochs(rows, ceiling=0.0, way="stock")


def test_numbers_on_the_axes_of_class_differences_do_not_meet() -> None:
    figure = benchmark.class_differences("image")
    figure.canvas.draw()
    boxes = [
        label.get_window_extent()
        for axis in figure.axes
        for label in axis.get_xticklabels(which="both")
        if label.get_text()
    ]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["-10", "-1", "0", "+1", "+10"]
    for left, right in itertools.pairwise(sorted(boxes, key=lambda box: box.x0)):
        assert left.x1 < right.x0
