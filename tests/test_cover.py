"""The figures of the first page show what the records hold, also where it is not in the USF's favour."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from usf.oneclass import homogeneous_limit
from usf.plots import COLORS, cover
from usf.study import mixtures
from usf.study.schema import example
from usf.study.tables import Cell


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def lines(figure: Figure, color: str) -> list[np.ndarray]:
    """x and y of the lines of one model."""
    return [np.array(line.get_data()) for line in figure.axes[0].get_lines() if line.get_color() == COLORS[color]]


def test_order_is_that_of_the_records() -> None:
    records = mixtures.load()
    best = mixtures.summary(records["trials"], records["bounds"])
    figure = cover.order_by_norm(best)
    for model in ("usf", "non-usf", "deep-svdd"):
        whole, rare = (line[1] for line in lines(figure, model))
        rows = [row for row in best if row["model"] == model]
        assert whole.tolist() == [row["spearman"] for row in rows]
        assert rare.tolist() == [row["spearman_tail"] for row in rows]


def test_reversal_is_where_the_score_falls() -> None:
    figure = cover.reversed_by_training(2)
    (svdd,), (usf,) = lines(figure, "deep-svdd"), lines(figure, "usf")
    shaded = figure.axes[0].patches[0].get_x() + figure.axes[0].patches[0].get_width()
    assert shaded == pytest.approx(homogeneous_limit(2).radius)
    inside = svdd[0] < shaded
    assert np.all(np.diff(svdd[1][inside]) < 0)
    assert np.all(np.diff(svdd[1][~inside]) > 0)
    assert np.all(np.diff(usf[1]) > 0)


def test_areas_show_where_the_usf_is_behind() -> None:
    cells = {
        ("mvtec", "pill", "fastflow", "affine"): Cell((90.0, 92.0), (0, 1)),
        ("mvtec", "pill", "fastflow", "additive + LU"): Cell((80.0,), (0,)),
        ("mvtec", "bottle", "fastflow", "affine"): Cell((99.0,), (0,)),
    }
    figure = cover.areas({"image": cells, "pixel": {}})
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["FastFlow\npill"]
    connections = [line for line in axis.get_lines() if len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in connections] == [[92.5, 88.2], [91.0, 80.0]]  # table 4, and here
    assert {line.get_linestyle() for line in connections} == {":"}
    (printed,) = (line for line in figure.axes[1].get_lines() if len(line.get_xdata()) == 2)
    assert list(printed.get_xdata()) == [96.9, 97.7]  # table 5
    assert printed.get_linestyle() == "-"
    assert cover.pairs(cells) == {("mvtec", "pill", "fastflow"): (91.0, 80.0)}
    with pytest.raises(ValueError, match="both flows"):
        cover.areas({"image": {}})


def test_common_takes_one_setting_for_each_detector() -> None:
    rows = [example(category=name, seed=seed, size=128) for name in ("pill", "bottle") for seed in (0, 1)]
    rows += [
        example(category="pill", seed=0, size=64),
        example(category="pill", seed=2, size=128, protocol="trace", epoch=1),
    ]
    cells = cover.common(rows)
    assert {key[1]: cell.seeds for key, cell in cells.items()} == {"pill": (0, 1), "bottle": (0, 1)}
