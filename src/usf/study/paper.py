"""The paper's tables 1 to 5, and what follows from them by arithmetic alone.

``data/paper/tables.csv`` holds every printed cell: the table, the data set, the level (``image`` or ``pixel``), the
category (``average`` for the printed average), the detector, the flow (``base``: affine, ``usf``), the mean AUROC and
its standard deviation over three runs, both in percent, and whether the print marks it as second in its row.
``best.csv`` holds the printed counts of best values. ``checks.csv`` compares what the paper says about its tables with
what the tables say: a test recomputes every row of it.

The standard deviations are sample ones (n - 1): U-Flow's 82.7 +- 29.9 on metal_nut is out of reach of the other kind,
see :func:`largest_sd`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from usf import paths
from usf.study import statistics

__all__ = [
    "DATASETS",
    "DETECTORS",
    "RESOLUTION",
    "RUNS",
    "averages",
    "below_chance",
    "best",
    "cells",
    "checks",
    "differences",
    "largest_sd",
    "possible_runs",
    "reanalysis",
    "recompute",
]

DETECTORS: dict[str, str] = {"fastflow": "FastFlow", "uflow": "U-Flow", "cflow": "CFlow"}
"""Detector -> its name, in the order of the tables."""
FLOWS = ("base", "usf")
DATASETS: dict[str, str] = {"mvtec": "MVTec AD", "visa": "VisA"}
TABLE: dict[tuple[str, str], int] = {
    ("visa", "image"): 2,
    ("visa", "pixel"): 3,
    ("mvtec", "image"): 4,
    ("mvtec", "pixel"): 5,
}
"""(data set, level) -> the paper's table with its classes."""
RUNS = 3
"""Runs behind every cell."""
RESOLUTION = 0.1
"""The last printed digit, in percent points."""
_ROUNDING = RESOLUTION / 2 + 1e-9


def cells(*, average: bool = False) -> pd.DataFrame:
    """The printed cells of tables 2 to 5, one row a class, detector and flow; with ``average`` the printed averages
    of tables 1 to 5 instead.

    Raises:
        FileNotFoundError: outside the repository.
    """
    table = pd.read_csv(paths.data("paper", "tables.csv"))
    return table[(table["category"] == "average") == average].reset_index(drop=True)


def averages() -> pd.DataFrame:
    """Averages over classes, recomputed, beside the printed ones of tables 1 to 5.

    Returns:
        a row for each printed average, with ``mean``, ``sd`` (printed), ``mean_recomputed``, ``sd_recomputed`` (the
        mean of the classes' standard deviations, which is what the print has) and ``agrees``, within rounding.
    """
    keys = ["dataset", "level", "detector", "flow"]
    own = cells().groupby(keys)[["mean", "sd"]].mean()
    printed = cells(average=True).drop(columns=["category", "second"])
    table = printed.join(own.rename(columns="{}_recomputed".format), on=keys)
    table["agrees"] = ((table["mean"] - table["mean_recomputed"]).abs() <= _ROUNDING) & (
        (table["sd"] - table["sd_recomputed"]).abs() <= _ROUNDING
    )
    return table


def best() -> pd.DataFrame:
    """How often each column has the highest value of a class: ``printed``, ``equal`` (equal values count for each) and
    ``untied`` (not where the print marks a value that equals the highest as second)."""
    table = cells()
    top = table["mean"] == table.groupby(["table", "category"])["mean"].transform("max")
    table = table.assign(equal=top, untied=top & ~table["second"])
    keys = ["table", "dataset", "level", "detector", "flow"]
    counts = table.groupby(keys)[["equal", "untied"]].sum()
    printed = pd.read_csv(paths.data("paper", "best.csv")).rename(columns={"best": "printed"})
    return printed.join(counts, on=keys)


def differences() -> pd.DataFrame:
    """USF beside affine, one row for each class and detector.

    Returns:
        ``table, dataset, level, detector, category``, then ``mean_base, mean_usf, sd_base, sd_usf`` as printed, and
        ``difference``, USF minus affine, all in percent points; classes and detectors in the paper's order.
    """
    table = cells()
    keys = ["table", "dataset", "level", "detector", "category"]
    wide = table.pivot(index=keys, columns="flow", values=["mean", "sd"])
    wide.columns = wide.columns.map("_".join)
    order = pd.MultiIndex.from_frame(table[keys].drop_duplicates())
    wide = wide.loc[order].reset_index()
    wide["difference"] = (wide["mean_usf"] - wide["mean_base"]).round(9)
    return wide


def reanalysis(*, resamples: int = statistics.RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """The twelve comparisons of USF and affine in tables 2 to 5, with the class as the unit.

    Args:
        resamples, seed: of the bootstrap.

    Returns:
        one row for each data set, level and detector. Of the means: ``classes, higher, equal, lower`` (classes by the
        sign of the difference), ``difference``, its percentile bootstrap interval over classes (``low, high``) and
        Student's (``student_low, student_high``), Wilcoxon's ``p`` and, corrected for the twelve, ``p_holm``. Of the
        standard deviations: ``ratio`` (USF over affine, geometric mean), ``ratio_low, ratio_high``, ``ratio_p``,
        ``ratio_p_holm``, ``sd_lower, sd_equal, sd_higher``; ``correlation``: Spearman's, over classes, between the
        difference of the means and the logarithm of the ratio. Points are percent points.
    """
    rows = []
    for (dataset, level, detector), group in differences().groupby(["dataset", "level", "detector"], sort=False):
        change = group["difference"].to_numpy()
        base, usf = group["mean_base"].to_numpy(), group["mean_usf"].to_numpy()
        interval = statistics.hierarchical_bootstrap(usf[:, None], base[:, None], resamples=resamples, seed=seed)
        student = statistics.student_interval(change)
        spread = statistics.variance_test(group["sd_usf"], group["sd_base"], RUNS, RUNS, floor=RESOLUTION / 2)
        floored = group[["sd_usf", "sd_base"]].clip(lower=RESOLUTION / 2)
        rows.append(
            {
                "dataset": dataset,
                "level": level,
                "detector": detector,
                "classes": len(group),
                "higher": int((change > 0).sum()),
                "equal": int((change == 0).sum()),
                "lower": int((change < 0).sum()),
                "difference": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "student_low": student.low,
                "student_high": student.high,
                "p": statistics.signed_rank_test(change),
                "ratio": spread.ratio.estimate,
                "ratio_low": spread.ratio.low,
                "ratio_high": spread.ratio.high,
                "ratio_p": spread.p,
                "sd_lower": spread.lower,
                "sd_equal": spread.equal,
                "sd_higher": spread.higher,
                "correlation": float(stats.spearmanr(change, floored["sd_usf"] / floored["sd_base"]).statistic),
            }
        )
    table = pd.DataFrame(rows)
    table["p_holm"] = statistics.holm(table["p"])
    table["ratio_p_holm"] = statistics.holm(table["ratio_p"])
    return table


def largest_sd(mean: float, runs: int = RUNS, *, sample: bool = True, high: float = 100.0) -> tuple[float, list[float]]:
    """Largest standard deviation that values in [0, ``high``] with a given mean can have, and values that attain it.

    All values but one lie at an end: the spread is convex, so it is largest in a corner of what the mean allows.

    Args:
        mean: in [0, ``high``].
        runs: number of values, at least two.
        sample: with n - 1 in the denominator, else n.
        high: upper end.

    >>> spread, values = largest_sd(82.7)
    >>> round(spread, 2), [round(value, 1) for value in values]
    (29.96, [100.0, 100.0, 48.1])
    """
    if runs < 2 or not 0 <= mean <= high:
        raise ValueError(f"mean={mean}, runs={runs}: a mean in [0, {high}] of at least two runs")
    full = min(int(mean * runs // high), runs - 1)
    values = [high] * full + [mean * runs - high * full] + [0.0] * (runs - full - 1)
    return float(np.std(values, ddof=int(sample))), values


def possible_runs(mean: float, sd: float, *, angles: int = 241) -> npt.NDArray[np.float64]:
    """All triples of runs, up to a grid, that a printed mean and standard deviation leave possible.

    Three numbers with a given mean and standard deviation lie on a circle about the mean in the plane of that mean:
    run k is mean + sd * (2 / sqrt(3)) * cos(angle + 2 pi k / 3). What is left open is the angle, and the rounding of
    the print; an AUROC outside [0, 100] rules angles out.

    Args:
        mean, sd: as printed, in percent; the sd with n - 1 in the denominator.
        angles: of the grid.

    Returns:
        sorted triples (n, 3); empty if no three areas can have that mean and standard deviation.

    >>> runs = possible_runs(82.7, 29.9)
    >>> runs.min(axis=0).round().tolist(), runs.max(axis=0).round().tolist()
    ([48.0, 100.0, 100.0], [48.0, 100.0, 100.0])
    """
    angle = np.linspace(0, np.pi / 3, angles)[:, None] + np.array([0.0, 2.0, 4.0]) * np.pi / 3
    slack = np.array([-0.5, 0.0, 0.5]) * RESOLUTION
    centres = (mean + slack)[:, None, None, None]
    spreads = np.maximum(sd + slack, 0)[None, :, None, None]
    runs = np.sort((centres + spreads * 2 / np.sqrt(3) * np.cos(angle)).reshape(-1, 3), axis=1)
    return np.asarray(runs[(runs[:, 0] >= 0) & (runs[:, -1] <= 100)])


def below_chance() -> pd.DataFrame:
    """Cells of tables 2 to 5 with a run that was certainly below an AUROC of 50, whatever the three runs were.

    Returns:
        these cells, with ``worst_low`` and ``worst_high``, between which the worst of the three runs lies.
    """
    table = cells()
    bounds = []
    for row in table.itertuples():
        worst = possible_runs(float(str(row.mean)), float(str(row.sd)))[:, 0]
        bounds.append((worst.min(), worst.max()))
    table[["worst_low", "worst_high"]] = bounds
    return table[table["worst_high"] < 50].reset_index(drop=True)


def checks() -> pd.DataFrame:
    """What the paper says about its tables (``printed``), what they say (``recomputed``), whether that ``agrees``."""
    return pd.read_csv(paths.data("paper", "checks.csv"), dtype={"printed": str, "recomputed": str})


def _best_by_flow(dataset: str, level: str) -> str:
    table = best()
    table = table[table["table"] == TABLE[dataset, level]]
    return " and ".join(str(table.loc[table["flow"] == flow, "untied"].sum()) for flow in ("usf", "base"))


def _second() -> str:
    """Classes in which the underlined values are not exactly those next to the highest."""
    wrong = 0
    groups = cells().groupby(["table", "category"])
    for _, row in groups:
        below = row.loc[row["mean"] < row["mean"].max(), "mean"].max()
        wrong += bool(((row["mean"] == below) != row["second"]).any())
    return f"{wrong} of {len(groups)} classes differ"


def _change(detector: str) -> str:
    table = differences()
    chosen = table[(table["table"] == TABLE["mvtec", "image"]) & (table["detector"] == detector)]
    spread = (chosen["sd_usf"] - chosen["sd_base"]).mean()
    return f"{chosen['difference'].mean():+.2f} and {spread:+.2f}"


def _printed_averages(column: str) -> pd.DataFrame:
    table = cells(average=True)
    return table[table["table"] == 1].pivot(index=["dataset", "level", "detector"], columns="flow", values=column)


def _base_best() -> str:
    base = _printed_averages("mean")["base"]
    return " and ".join(DETECTORS[str(base["visa", level].idxmax())] for level in ("image", "pixel"))


def _averages_differ() -> str:
    table = averages()
    off = table[["mean", "sd"]].to_numpy() - table[["mean_recomputed", "sd_recomputed"]].to_numpy()
    return f"{int((np.abs(off) > _ROUNDING).sum())} of {off.size} differ"


def _uflow_best() -> str:
    table = best().set_index(["table", "detector", "flow"])["untied"]
    return " and ".join(str(table[TABLE["mvtec", "image"], "uflow", flow]) for flow in ("usf", "base"))


def _counts_differ(rule: str) -> str:
    table = best()
    return f"{int((table['printed'] != table[rule]).sum())} of {len(table)} differ"


def _screw() -> str:
    table = differences().set_index(["table", "detector", "category"])["difference"]
    return f"{table[TABLE['mvtec', 'image'], 'fastflow', 'screw']:+.1f}"


def _worse(column: str, *, equal_counts: bool, lower_is_worse: bool) -> str:
    table = _printed_averages(column)
    change = table["usf"] - table["base"] if lower_is_worse else table["base"] - table["usf"]
    count = int(((change <= 0) if equal_counts else (change < 0)).sum())
    return f"{count} of {len(table)}"


_RECOMPUTE: dict[str, Callable[[], str]] = {
    "averages": _averages_differ,
    "best": lambda: _counts_differ("equal"),
    "best-untied": lambda: _counts_differ("untied"),
    "second": _second,
    "visa-image-best": lambda: _best_by_flow("visa", "image"),
    "visa-pixel-best": lambda: _best_by_flow("visa", "pixel"),
    "mvtec-pixel-best": lambda: _best_by_flow("mvtec", "pixel"),
    "uflow-best": _uflow_best,
    "screw": _screw,
    "ablation-uflow": lambda: _change("uflow"),
    "ablation-cflow": lambda: _change("cflow"),
    "ablation-fastflow": lambda: _change("fastflow"),
    "visa-base-best": _base_best,
    "regress": lambda: _worse("mean", equal_counts=False, lower_is_worse=True),
    "spread": lambda: _worse("sd", equal_counts=True, lower_is_worse=False),
}


def recompute() -> dict[str, str]:
    """The column ``recomputed`` of :func:`checks`, from the printed cells, by id."""
    return {name: function() for name, function in _RECOMPUTE.items()}
