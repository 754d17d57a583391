"""The table of ``benchmarks/flows.py``: how long other libraries take, relative to this one."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from usf import paths

MEASURES = {"log_prob": "log-density", "step": "training step", "sample": "sampling", "training": "whole training"}


def load(path: str | Path | None = None) -> pd.DataFrame:
    """The benchmark's records, one row a model, architecture, measure, dimension and batch size.

    Args:
        path: CSV file; the committed one by default.

    Raises:
        FileNotFoundError: when there are no records, saying how they are made.
    """
    path = paths.results("benchmarks", "flows.csv") if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no records at {path.name}: run benchmarks/flows.py")
    return pd.read_csv(path)


def table(path: str | Path | None = None, architecture: str = "sandwich") -> pd.DataFrame:
    """Time of each peer over the time of usf, as ``median [quartiles]``; above 1 the peer is slower.

    Rows: measure and peer. Columns: dimension and batch size. What could not be measured shows its status.

    Args:
        path: the records; the committed ones by default.
        architecture: ``"sandwich"``, ``"plain"`` or ``"affine"``.

    Raises:
        ValueError: when the records hold no such architecture.
    """
    rows = load(path)
    known = sorted(rows["architecture"].unique())
    if architecture not in known:
        raise ValueError(f"no records of architecture {architecture!r}; there are {known}")
    rows = rows[(rows["architecture"] == architecture) & (rows["model"] != "usf")]
    cells = [
        f"{r.ratio:.2g} [{r.ratio_q25:.2g}, {r.ratio_q75:.2g}]" if r.status == "ok" else str(r.status)
        for r in rows.itertuples()
    ]
    tidy = rows.assign(cell=cells, measure=rows["measure"].map(MEASURES))
    order = list(dict.fromkeys(zip(tidy["measure"], tidy["model"], strict=True)))
    pivot = tidy.pivot(index=["measure", "model"], columns=["dim", "batch"], values="cell")
    return pivot.reindex(pd.MultiIndex.from_tuples(order, names=["measure", "peer"])).sort_index(axis=1)


def faster_peers(path: str | Path | None = None) -> pd.DataFrame:
    """The cells in which a peer beats usf: those where three quarters of the ratios are below 1.

    What does not do the same work is left out: inference-only variants (fused, cached) and the conditioners alone.
    """
    rows = load(path)
    other_work = ["usf", "usf fused", "nflows cached", "conditioners"]
    same_work = rows[(rows["status"] == "ok") & ~rows["model"].isin(other_work)]
    columns = ["architecture", "model", "measure", "dim", "batch", "ratio", "ratio_q25", "ratio_q75"]
    return same_work.loc[same_work["ratio_q75"] < 1, columns].reset_index(drop=True)


def authors_range(path: str | Path | None = None) -> tuple[float, float]:
    """Smallest and largest median ratio of the authors' library over all cells of the paper's architecture.

    Raises:
        ValueError: when it was not measured.
    """
    rows = load(path)
    ratios = rows.loc[
        (rows["model"] == "authors") & (rows["architecture"] == "sandwich") & (rows["status"] == "ok"), "ratio"
    ]
    if ratios.empty:
        raise ValueError("the records hold no successful measurement of the authors' library")
    return float(ratios.min()), float(ratios.max())


# --- benchmarks/detectors.py ------------------------------------------------------------------------------------------

EPOCH_GOALS = {"FastFlow": 5.0, "CFlow": 5.0, "U-Flow": 20.0}
"""Detector -> how many times faster an epoch of the fast path shall be than one in anomalib's ``Engine``, on a CPU."""

GRID_GOAL = 3.0
"""Nine runs of the fast path shall cost less than this many runs in the ``Engine``."""


def detectors(path: str | Path | None = None) -> pd.DataFrame | None:
    """The records of ``benchmarks/detectors.py``, one row a detector and side; ``None`` where nothing was measured.

    Args:
        path: CSV file; the committed one by default.

    Raises:
        ValueError: a file without the columns that the tables need, naming them.
    """
    path = paths.results("benchmarks", "detectors.csv") if path is None else Path(path)
    if not path.is_file():
        return None
    rows = pd.read_csv(path)
    needed = {"cell", "side", "models", "seconds", "epoch_seconds", "setup_seconds", "peak_mb", "ratio", "epoch_ratio"}
    if missing := needed - set(rows.columns):
        raise ValueError(f"{path.name} lacks {', '.join(sorted(missing))}: run benchmarks/detectors.py again")
    return rows


def detector_goals(rows: pd.DataFrame | None) -> pd.DataFrame:
    """What was wanted beside what was measured: one row a detector of :data:`EPOCH_GOALS`.

    Args:
        rows: see :func:`detectors`.

    Returns:
        columns ``cell``; ``epoch_ratio``, an epoch's time in the ``Engine`` over one on the fast path, and
        ``epoch_goal``; ``grid_cost``, nine runs of the fast path over one run in the ``Engine``, and ``grid_goal``.
        NaN where it was not measured.
    """
    found = []
    for cell, goal in EPOCH_GOALS.items():
        values = {"epoch_ratio": float("nan"), "grid_cost": float("nan")}
        if rows is not None:
            own = rows[rows["cell"] == cell].set_index("side")
            if "fast" in own.index:
                values["epoch_ratio"] = float(own["epoch_ratio"].to_dict()["fast"])
            if "fast grid" in own.index:
                values["grid_cost"] = 1 / float(own["ratio"].to_dict()["fast grid"])
        found.append({"cell": cell, **values, "epoch_goal": goal, "grid_goal": GRID_GOAL})
    return pd.DataFrame(found)


def detector_goals_in_words(rows: pd.DataFrame | None) -> str:
    """Sentences that say which goals were met, for the prose.

    >>> detector_goals_in_words(None)
    'Not measured yet.'
    """
    if rows is None:
        return "Not measured yet."

    def verdict(value: float, met: bool, text: str) -> str:
        return f"{'met' if met else 'missed'} ({text})" if value == value else "not measured"

    epochs, grids = [], []
    for row in detector_goals(rows).to_dict("records"):
        cell, ratio, cost = row["cell"], row["epoch_ratio"], row["grid_cost"]
        met = verdict(ratio, ratio >= row["epoch_goal"], f"{ratio:.1f}")
        epochs.append(f"{cell}'s {row['epoch_goal']:g} is {met}")
        grids.append(f"for {cell} it is {verdict(cost, cost < row['grid_goal'], f'{cost:.1f}')}")
    return (
        f"Of the factors wanted for an epoch, {', '.join(epochs)}. "
        f"Nine runs were to cost less than {GRID_GOAL:g} stock runs: {', '.join(grids)}."
    )
