"""The paper's tables as data: true to the print, and what follows from them."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from usf import paths
from usf.study import paper

COLUMNS = [(detector, flow) for flow in ("base", "usf") for detector in ("fastflow", "uflow", "cflow")]


def _print() -> tuple[dict[tuple[int, str, str, str], tuple[float, float, bool]], dict[tuple[int, str, str], int]]:
    """The tables read off the paper's text: (table, row, detector, flow) -> (mean, sd, underlined), and best counts."""
    folder = paths.shared("paper")
    if folder is None:
        pytest.skip("the paper's text is not in ../shared")
    (file,) = folder.glob("*.txt")
    cells, counts, block = {}, {}, None
    for line in file.read_text("utf8").splitlines():
        name, *values = line.split("\t")
        end = re.match(r"Table (\d):", line)
        if name in ("Class", "Dataset (Metric)"):
            block = []
        elif end and block is not None:
            for row, texts in block:
                for column, text in zip(COLUMNS, texts, strict=True):
                    numbers = re.findall(r"\d+(?:\.\d+)?", text)
                    if row == "#Best":
                        counts[int(end[1]), *column] = int(numbers[0])
                    else:
                        cells[int(end[1]), row, *column] = (float(numbers[0]), float(numbers[1]), "<u>" in text)
            block = None
        elif block is not None and name and len(values) == 6:
            block.append((name, values))
    return cells, counts


def test_every_cell_is_the_printed_one() -> None:
    cells, counts = _print()
    assert len(cells) == 4 * 6 + 2 * 13 * 6 + 2 * 16 * 6
    table = pd.concat([paper.cells(), paper.cells(average=True)])
    first = {("mvtec", "image"): "MVTec AD (Image)", ("mvtec", "pixel"): "MVTec AD (Pixel)"}
    first |= {("visa", "image"): "VisA (Image)", ("visa", "pixel"): "VisA (Pixel)"}
    ours = {}
    for row in table.itertuples():
        name = "Average" if row.category == "average" else row.category
        name = first[row.dataset, row.level] if row.table == 1 else name
        ours[row.table, name, row.detector, row.flow] = (row.mean, row.sd, row.second)
    assert ours == cells
    best = paper.best()
    assert {(r.table, r.detector, r.flow): r.printed for r in best.itertuples()} == counts


def test_tables_are_complete() -> None:
    table = paper.cells()
    sizes = table.groupby(["table", "dataset", "level"]).category.nunique()
    assert sizes.to_dict() == {
        (2, "visa", "image"): 12,
        (3, "visa", "pixel"): 12,
        (4, "mvtec", "image"): 15,
        (5, "mvtec", "pixel"): 15,
    }
    assert not table.duplicated(["table", "category", "detector", "flow"]).any()
    assert len(table) == 54 * 6  # each is the mean of three runs, an image and a pixel value of one training
    assert len(table) // 2 * paper.RUNS == 486
    assert table["mean"].between(0, 100).all()
    assert table["sd"].between(0, 50).all()


def test_printed_averages_follow_from_the_classes() -> None:
    table = paper.averages()
    assert len(table) == 4 * 6 * 2
    assert table["agrees"].all()
    # Table 1 repeats the averages of tables 2 to 5.
    wide = table.groupby(["dataset", "level", "detector", "flow"])[["mean", "sd"]].nunique()
    assert (wide == 1).all(axis=None)


def test_best_counts_follow_if_a_marked_second_breaks_a_tie() -> None:
    table = paper.best().set_index(["table", "detector", "flow"])
    assert (table["printed"] == table["untied"]).all()
    off = table[table["printed"] != table["equal"]]
    assert off[["printed", "equal"]].to_dict("index") == {
        (4, "fastflow", "base"): {"printed": 2, "equal": 3},  # zipper: 95.9 beside U-Flow's 95.9
        (4, "cflow", "usf"): {"printed": 4, "equal": 5},  # tile: 100.0 beside U-Flow's 100.0
    }


def test_the_list_of_checks_is_what_comes_out() -> None:
    checks = paper.checks().set_index("id")
    assert checks["recomputed"].to_dict() == paper.recompute()
    assert ((checks["printed"] == checks["recomputed"]) == checks["agrees"]).all()
    # Where the print disagrees with itself: a new entry here is a finding, not a formality.
    assert set(checks.index[~checks["agrees"]]) == {"best", "second", "visa-base-best", "regress"}


def test_averages_that_fall_fall_by_little() -> None:
    table = paper.cells(average=True)
    wide = table[table["table"] == 1].pivot(index=["dataset", "level", "detector"], columns="flow", values="mean")
    change = (wide["usf"] - wide["base"]).round(1)
    assert change[change < 0].to_dict() == {
        ("mvtec", "image", "fastflow"): -0.3,
        ("visa", "image", "fastflow"): -0.3,
        ("visa", "pixel", "uflow"): -0.1,
    }


def test_differences_pair_the_flows() -> None:
    table = paper.differences()
    assert len(table) == 54 * 3
    row = table[(table["table"] == 4) & (table["category"] == "metal_nut") & (table["detector"] == "cflow")].iloc[0]
    assert (row["mean_base"], row["mean_usf"], row["sd_base"], row["sd_usf"]) == (32.6, 99.3, 42.6, 0.2)
    assert row["difference"] == pytest.approx(66.7)
    losses = table[(table["table"] == 4) & (table["detector"] == "fastflow")]["difference"] < 0
    assert losses.sum() == 11
    assert list(table["category"].drop_duplicates()[:2]) == ["candle", "capsules"]


def test_printed_spreads_are_sample_standard_deviations() -> None:
    table = paper.cells()
    within = [row.sd - paper.RESOLUTION / 2 for row in table.itertuples()]
    up = (table["mean"] + paper.RESOLUTION / 2).clip(upper=100)
    down = table["mean"] - paper.RESOLUTION / 2
    sample = [max(paper.largest_sd(mean)[0] for mean in pair) for pair in zip(up, down, strict=True)]
    population = [max(paper.largest_sd(m, sample=False)[0] for m in pair) for pair in zip(up, down, strict=True)]
    assert all(low <= high for low, high in zip(within, sample, strict=True))
    impossible = table[np.array(within) > np.array(population)]
    assert ("metal_nut", "uflow", "base") in set(
        impossible[["category", "detector", "flow"]].itertuples(index=False, name=None)
    )


def test_largest_sd_is_not_exceeded() -> None:
    rng = np.random.default_rng(0)
    for runs in (2, 3, 5):
        values = rng.beta(0.2, 0.2, size=(2000, runs)) * 100
        for row in values[:300]:
            assert row.std(ddof=1) <= paper.largest_sd(row.mean(), runs)[0] + 1e-9
        spread, attained = paper.largest_sd(40.0, runs)
        assert np.mean(attained) == pytest.approx(40.0)
        assert np.std(attained, ddof=1) == pytest.approx(spread)
    with pytest.raises(ValueError, match="mean=120"):
        paper.largest_sd(120)


def test_possible_runs_are_all_of_those_with_that_print() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        runs = np.sort(rng.uniform(0, 100, size=3))
        mean, sd = round(runs.mean(), 1), round(runs.std(ddof=1), 1)
        found = paper.possible_runs(mean, sd)
        assert np.abs(found.mean(axis=1) - mean).max() < 0.051
        assert np.abs(found.std(axis=1, ddof=1) - sd).max() < 0.051
        # The true triple is among them, up to the grid over angles and rounding.
        assert np.abs(found - runs).max(axis=1).min() < 0.8
    assert paper.possible_runs(99.9, 5.0).size == 0


def test_affine_cflow_on_metal_nut_was_upside_down_twice() -> None:
    runs = paper.possible_runs(32.6, 42.6)  # as the solution of an exercise in the book says
    assert runs[:, 1].max() < 18
    assert runs[:, 2].min() > 80
    assert runs[:, 2].max() < 82


def test_runs_below_chance_are_affine_ones() -> None:
    found = paper.below_chance()
    assert set(found["flow"]) == {"base"}
    assert set(zip(found["category"], found["detector"], found["level"], strict=True)) == {
        ("fryum", "cflow", "image"),
        ("metal_nut", "cflow", "image"),
        ("metal_nut", "uflow", "image"),
        ("metal_nut", "uflow", "pixel"),
        ("tile", "cflow", "image"),
        ("toothbrush", "cflow", "image"),
        ("wood", "cflow", "image"),
    }
    assert (found["worst_low"] <= found["worst_high"]).all()
