"""The table of ``benchmarks/flows.py``: how long other libraries take, relative to this one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from usf import paths
from usf.study import schema
from usf.study.schema import Record

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


def conditions(path: str | Path | None = None) -> dict[str, Any]:
    """Under which conditions the records were measured: hardware, settings with the clock, versions.

    Args:
        path: JSON file; the one beside the committed records by default.
    """
    path = paths.results("benchmarks", "provenance.json") if path is None else Path(path)
    found = json.loads(path.read_text("utf8"))
    assert isinstance(found, dict)
    return found


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
    needed |= {"device", "processor", "threads"}
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


def detector_machines(rows: pd.DataFrame) -> str:
    """Which detector was measured on what, for the prose.

    Args:
        rows: see :func:`detectors`.
    """
    machines: dict[str, list[str]] = {}
    for row in rows.drop_duplicates("cell").to_dict("records"):
        name = row["processor"] if row["device"] == "cpu" else row["device"]
        machines.setdefault(f"{name} with {row['threads']} threads", []).append(row["cell"])
    return "; ".join(f"{', '.join(cells)} on {machine}" for machine, cells in machines.items())


def half_precision(half: Sequence[Record], full: Sequence[Record]) -> pd.DataFrame:
    """What bfloat16 changes in the AUROC: the same trainings in float32 beside them.

    Args:
        half, full: records of trainings; those of one are the other's where all but their model's arguments is equal.

    Returns:
        one row for each training on both sides and score: ``detector, category, variant, seed, score``, then ``image,
        pixel``, AUROC in percent in float32, ``image change, pixel change``, in bfloat16 minus that, points, and
        ``moved``, whether the two were trained on different processors.
    """
    same = [name for name in schema.TRAINING if name != "settings"]
    ours = {record.settings for record in half}
    known = {
        (*(getattr(record, name) for name in same), record.score): record
        for record in full
        if record.status == "ok" and record.settings not in ours
    }
    rows, shown = [], ("detector", "category", "variant", "seed", "score")
    for own in half:
        other = known.get((*(getattr(own, name) for name in same), own.score))
        if other is None or own.status != "ok":
            continue
        row: dict[str, Any] = {name: getattr(own, name) for name in shown}
        for level in ("image", "pixel"):
            before, after = (getattr(record, f"{level}_auroc") for record in (other, own))
            row |= {level: 100 * before, f"{level} change": 100 * (after - before)}
        rows.append(row | {"moved": own.hardware != other.hardware})
    return pd.DataFrame(rows)


def half_precision_in_words(table: pd.DataFrame, rows: pd.DataFrame | None) -> str:
    """What bfloat16 gains and costs in CFlow, for the prose; empty where neither was measured.

    Args:
        table: of :func:`half_precision`.
        rows: of :func:`detectors`.
    """
    said = []
    seconds = {} if rows is None else rows.set_index(["cell", "side"])["epoch_seconds"].to_dict()
    if ("CFlow", "fast bfloat16") in seconds:
        ratio = float(seconds["CFlow", "fast bfloat16"]) / float(seconds["CFlow", "fast"])
        said.append(f"an epoch takes {ratio:.2f} times as long as in float32")
    if len(table):
        trainings = len(table[["category", "variant", "seed"]].drop_duplicates())
        changes = [
            f"{level} AUROC by at most {table[f'{level} change'].abs().max():.2f}" for level in ("image", "pixel")
        ]
        spots = ", ".join(sorted(set(table["category"])))
        said.append(f"over {trainings} trainings on {spots} it changed {' and '.join(changes)} points in any score")
        if table["moved"].any():
            said[-1] += ", the change of processor between the two included"
    return f"With CFlow's coupling networks in bfloat16 {'; '.join(said)}." if said else ""


def detector_run_ratio(rows: pd.DataFrame, cell: str, epochs: int) -> float:
    """A whole run's time in the ``Engine`` over one on the fast path, extrapolated to more epochs than were measured.

    Every further epoch is taken to cost what the measured ones do.

    Args:
        rows: see :func:`detectors`.
        cell: of :data:`EPOCH_GOALS`.
        epochs: of the run, at least as many as were measured.

    Raises:
        ValueError: a cell that was not measured on both sides, or fewer epochs.
    """
    own = rows[rows["cell"] == cell].set_index("side")
    if missing := {"engine", "fast"} - set(own.index):
        raise ValueError(f"{cell} was not measured on the side {', '.join(sorted(missing))}")
    if epochs < (measured := int(own["epochs"].max())):
        raise ValueError(f"epochs={epochs}: {measured} were measured, fewer cannot be extrapolated")
    whole = own["seconds"] + (epochs - measured) * own["epoch_seconds"]
    return float(whole.to_dict()["engine"] / whole.to_dict()["fast"])


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
    seconds = rows.set_index(["cell", "side"])["epoch_seconds"].to_dict()
    bound = ""
    if ("FastFlow", "networks") in seconds and ("FastFlow", "engine") in seconds:
        networks, engine = float(seconds["FastFlow", "networks"]), float(seconds["FastFlow", "engine"])
        bound = (
            f"FastFlow's coupling networks alone, which every implementation has to run, take {networks:.1f} s of an "
            f"epoch: with everything else for nothing the factor would be {engine / networks:.1f}. "
        )
    return (
        f"Of the factors wanted for an epoch, {', '.join(epochs)}. {bound}"
        f"Nine runs were to cost less than {GRID_GOAL:g} stock runs: {', '.join(grids)}."
    )


# --- benchmarks/inference.py ------------------------------------------------------------------------------------------

RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""Runtime in the records -> its name."""

FLOW_GOAL = 2.0
"""The part behind the backbone shall be this many times faster than in the stock detector."""


def inference(path: str | Path | None = None) -> pd.DataFrame:
    """The records of ``benchmarks/inference.py``: one row a detector, batch, part, runtime and side.

    Args:
        path: CSV file; the committed one by default.

    Raises:
        FileNotFoundError: when it is not there, with the command that makes it.
    """
    path = paths.results("benchmarks", "inference.csv") if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no records in {path.name}: run benchmarks/inference.py --out {path.name}")
    return pd.read_csv(path)


def inference_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Whole detectors, fused and stock, side by side.

    Args:
        rows: see :func:`inference`.

    Returns:
        One row a detector, batch size and runtime. Columns: images per second of the stock detector and the fused USF;
        milliseconds a batch at the median and at the 90th percentile of the latter; ``ratio``, how many times faster
        the whole is than stock in the same runtime, ``flow ratio`` the part behind the backbone, and ``stock PyTorch
        ratio`` the whole against stock in PyTorch; size in megabytes. NaN where a side could not be exported.
    """
    keys = ["detector", "batch", "runtime"]
    whole, flow = (rows[rows["part"] == part] for part in ("whole", "flow"))
    stock = whole[(whole["side"] == "stock") & (whole["status"] == "ok")].set_index(keys)["images_per_second"]
    fused = whole[(whole["side"] == "usf fused") & (whole["status"] == "ok")].set_index(keys)
    flow_ratio = flow[flow["side"] == "usf fused"].set_index(keys)["ratio"]
    table = pd.DataFrame(
        {
            "stock images/s": stock.reindex(fused.index),
            "USF images/s": fused["images_per_second"],
            "USF ms p50": fused["ms_p50"],
            "USF ms p90": fused["ms_p90"],
            "ratio": fused["ratio"],
            "flow ratio": flow_ratio.reindex(fused.index),
            "stock PyTorch ratio": fused["ratio_torch"],
            "MB": fused["megabytes"],
        }
    )
    return table.rename(index=RUNTIMES, level="runtime")


def inference_in_words(rows: pd.DataFrame) -> str:
    """Sentences that say where the fused detectors are faster than stock ones, and whether their flows are by enough.

    Args:
        rows: see :func:`inference`.
    """
    fused = rows[(rows["side"] == "usf fused") & (rows["status"] == "ok")]
    paired = fused.dropna(subset="ratio")
    whole, flow = (paired[paired["part"] == part] for part in ("whole", "flow"))
    alone = fused[fused["ratio"].isna() & (fused["part"] == "whole")]
    parts = []
    for runtime, name in RUNTIMES.items():
        ratios = flow[flow["runtime"] == runtime]["ratio"]
        if len(ratios):
            parts.append(f"{(ratios >= FLOW_GOAL).sum()} of {len(ratios)} in {name}")
    text = (
        f"The fused detector is faster than the stock one in {(whole['ratio'] > 1).sum()} of {len(whole)} cells, "
        f"by factors of {whole['ratio'].min():.1f} to {whole['ratio'].max():.1f}. What is behind the backbone was to "
        f"be {FLOW_GOAL:g} times as fast: that is so in {(flow['ratio'] >= FLOW_GOAL).sum()} of {len(flow)} cells "
        f"({', '.join(parts)}; least {flow['ratio'].min():.1f})."
    )
    if len(alone):
        names = ", ".join(sorted(set(alone["detector"])))
        text += f" The stock {names} cannot be exported, so that in the runtimes there is nothing to compare with."
    return text
