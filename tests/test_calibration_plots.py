"""The figures show the numbers they are given."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy import stats

from usf import calibration as cal
from usf.plots import COLORS
from usf.plots import calibration as figures


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_pit_shows_density_and_band() -> None:
    values = np.random.default_rng(0).random(60)
    left, right = figures.pit({"a": values, "b": values[:20] ** 2}, {"a": "usf", "b": "non-usf"}).axes
    bars = [patch for patch in left.patches if hasattr(patch, "get_data")]
    for bar, given in zip(bars, (values, values[:20] ** 2), strict=True):
        heights, edges, _ = bar.get_data()
        assert np.sum(heights * np.diff(edges)) == pytest.approx(1)
        assert heights[0] == pytest.approx(np.mean(given < 0.1) * 10)
    curve = next(line for line in right.lines if line.get_label().startswith("a "))
    x, y = curve.get_data()
    assert np.array_equal(y, np.searchsorted(np.sort(values), x, side="right") / 60)
    band = right.collections[0].get_paths()[0].vertices
    middle = np.abs(band[:, 0] - 0.5) < 0.001
    width = np.ptp(band[middle, 1])
    assert width == pytest.approx(2 * stats.kstwo.ppf(0.95, 60), abs=0.02)
    with pytest.raises(cal.CalibrationError, match="not finite"):
        figures.pit({"a": [np.nan]}, {"a": "usf"})


def test_realised_rates_are_drawn_with_their_law() -> None:
    rates = {n: np.random.default_rng(n).beta(2, n - 1, 500) for n in (19, 80)}
    figure = figures.realised_rates(rates, 0.1)
    assert [axis.get_title() for axis in figure.axes] == ["$n = 19$", "$n = 80$"]
    x, y = figure.axes[0].lines[0].get_data()
    assert np.allclose(y, stats.beta(2, 18).pdf(x))


def test_false_alarm_rates_has_a_panel_a_set_and_a_marker_a_method() -> None:
    nominal = [0.1, 0.2, 0.4]
    panels = {name: {"one": [0.1, 0.2, 0.5], "two": [np.nan, 0.3, 0.6]} for name in ("bottle", "pill")}
    bands = {name: ([0, 0.1, 0.2], [0.3, 0.4, 0.6]) for name in panels}
    figure = figures.false_alarm_rates(nominal, panels, {"one": "usf", "two": "usf"}, bands)
    assert [axis.get_title() for axis in figure.axes] == list(panels)
    one, two = (line for line in figure.axes[1].lines if line.get_label() in ("one", "two"))
    assert one.get_ydata().tolist() == [0.1, 0.2, 0.5]
    assert one.get_marker() != two.get_marker()
    assert to_hex(one.get_color()).lower() == COLORS["usf"].lower()


def test_p_value_histograms() -> None:
    figure = figures.p_values({"pill": (np.linspace(0.01, 0.99, 50), np.full(30, 0.01))}, bins=10)
    (normal, anomalous) = (patch for patch in figure.axes[0].patches if hasattr(patch, "get_data"))
    assert np.allclose(normal.get_data().values, 1)
    assert anomalous.get_data().values.tolist() == [10] + 9 * [0]
