"""What came of the hypotheses H5 to H7 in ``book/predictions.md``, from records of the benchmark.

Those about CFlow's scores, H1 to H4, are in :mod:`usf.study.rescoring`. Every function takes records of the main
protocol; a table is empty where nothing was run, and an outcome is missing where its table is empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from usf import paths
from usf.study import schema, statistics
from usf.study.paper import DETECTORS
from usf.study.schema import TRAINING, Record
from usf.study.tables import METRIC, SPREAD_FLOOR, VARIANTS, model_order, select

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LARGE", "flows", "likelihood_runs", "losses", "outcomes", "score_costs", "score_costs_in_words", "spreads"]

LARGE = 5.0
"""Percent points of image AUROC that would have changed our mind, as the page of predictions says."""
LOSSES = ("anomalib", "mle")


def _groups(records: Iterable[Record], apart: Sequence[str], score: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records of one score that succeeded, by everything that was trained but for the columns in ``apart``."""
    columns = [name for name in TRAINING if name not in apart]
    found: dict[tuple[Any, ...], list[Record]] = {}
    chosen = select(records, status="ok", protocol="main", score=score, variant=tuple(VARIANTS.values()))
    for record in chosen:
        found.setdefault(tuple(getattr(record, name) for name in columns), []).append(record)
    return dict(sorted(found.items(), key=lambda item: (model_order(item[1][0].detector, "affine"), item[0])))


def _values(records: Sequence[Record], metric: str) -> dict[int, float]:
    """Seed -> the metric in percent."""
    return {record.seed: 100 * getattr(record, metric) for record in records if getattr(record, metric) is not None}


def _about(record: Record, level: str) -> dict[str, Any]:
    names = ("detector", "dataset", "category", "epochs")
    return {name: getattr(record, name) for name in names} | {"level": level}


def likelihood_runs(records: Iterable[Record], folder: Path | None = None, *, detector: str = "uflow") -> list[Record]:
    """What H5 needs beside the library's loss: a detector's trainings with the likelihood, wherever they are on record.

    The ablation trains them, and keeps them in a folder of its own.

    Args:
        records: of the benchmark, in all losses and protocols.
        folder: of the ablation's records, by default ``data/results/ablation``; one that does not exist has none.
        detector: H5 is about U-Flow.

    Returns:
        the rows of both with the main protocol, in all scores; of a training that is in both, the later row.

    Raises:
        RecordError: a record of the ablation that does not fit the schema.
    """
    folder = paths.results("ablation") if folder is None else folder
    both = [*records, *(schema.read(folder) if folder.is_dir() else [])]
    return schema.latest(select(both, detector=detector, loss="mle", protocol="main"))


def losses(records: Iterable[Record], score: str = "anomalib") -> pd.DataFrame:
    """H5: the two flows of a detector, each trained with the library's loss and with the likelihood.

    Only seeds for which all four were trained count, so that every difference is between models of the same seeds.

    Returns:
        one row for each detector, class, length of training and level: ``detector, dataset, category, epochs, level,
        seeds``; AUROC in percent, ``base_anomalib, usf_anomalib, base_mle, usf_mle``; ``gain_anomalib``, ``gain_mle``
        (uniformly scaling minus affine under either loss, percent points); ``difference``, the first gain minus the
        second, which is also how much more the library's loss costs the affine flow than the other one; with Student's
        95 % interval over seeds, ``low, high`` (empty for a single seed).
    """
    import pandas as pd

    rows = []
    for group in _groups(records, ("coupling", "mixing", "loss", "seed"), score).values():
        for level, metric in METRIC.items():
            runs = {
                (flow, loss): _values([r for r in group if r.flow == flow and r.loss == loss], metric)
                for flow, loss in itertools.product(VARIANTS, LOSSES)
            }
            seeds = sorted(set.intersection(*(set(values) for values in runs.values())))
            if not seeds:
                continue
            row = _about(group[0], level) | {"seeds": len(seeds)}
            for (flow, loss), values in runs.items():
                row[f"{flow}_{loss}"] = fmean(values[seed] for seed in seeds)
            gains = {loss: [runs["usf", loss][s] - runs["base", loss][s] for s in seeds] for loss in LOSSES}
            row |= {f"gain_{loss}": fmean(values) for loss, values in gains.items()}
            apart = [first - second for first, second in zip(*gains.values(), strict=True)]
            row["difference"] = fmean(apart)
            if len(apart) > 1:
                interval = statistics.student_interval(apart)
                row |= {"low": interval.low, "high": interval.high}
            rows.append(row)
    return pd.DataFrame(rows)


def flows(records: Iterable[Record], score: str = "log_prob") -> pd.DataFrame:
    """H6: uniformly scaling minus affine, class by class, in one score.

    Returns:
        one row for each detector, class, length of training and level: ``detector, dataset, category, epochs, level``;
        ``base, usf``, mean AUROC in percent; ``runs``, of the flow with fewer; ``difference`` in percent points with
        Welch's 95 % interval over seeds, ``low, high`` (empty where a flow has a single run).
    """
    import pandas as pd

    rows = []
    for group in _groups(records, ("coupling", "mixing", "seed"), score).values():
        for level, metric in METRIC.items():
            runs = {flow: list(_values([r for r in group if r.flow == flow], metric).values()) for flow in VARIANTS}
            if not all(runs.values()):
                continue
            row = _about(group[0], level) | {flow: fmean(values) for flow, values in runs.items()}
            row |= {"runs": min(map(len, runs.values())), "difference": row["usf"] - row["base"]}
            if row["runs"] > 1:
                spread = {flow: stdev(values) for flow, values in runs.items()}
                counts = len(runs["usf"]), len(runs["base"])
                found = statistics.welch_interval(row["usf"], spread["usf"], row["base"], spread["base"], counts)
                row |= {"low": found.low, "high": found.high}
            rows.append(row)
    return pd.DataFrame(rows)


def spreads(records: Iterable[Record], score: str = "anomalib") -> pd.DataFrame:
    """H7: standard deviations over seeds of the two flows, on the seeds that both have.

    Returns:
        one row for each detector, class, length of training and level with at least two such seeds: ``detector,
        dataset, category, epochs, level, seeds``; ``base, usf``, sample standard deviations in percent points;
        ``ratio``, uniformly scaling over affine, where less than :data:`~usf.study.tables.SPREAD_FLOOR` counts as that.
    """
    import pandas as pd

    rows = []
    for group in _groups(records, ("coupling", "mixing", "seed"), score).values():
        for level, metric in METRIC.items():
            runs = {flow: _values([r for r in group if r.flow == flow], metric) for flow in VARIANTS}
            seeds = sorted(set.intersection(*(set(values) for values in runs.values())))
            if len(seeds) < 2:
                continue
            found = {flow: stdev([values[seed] for seed in seeds]) for flow, values in runs.items()}
            ratio = max(found["usf"], SPREAD_FLOOR) / max(found["base"], SPREAD_FLOOR)
            rows.append(_about(group[0], level) | {"seeds": len(seeds)} | found | {"ratio": ratio})
    return pd.DataFrame(rows)


def score_costs(records: Iterable[Record], detector: str = "cflow") -> pd.DataFrame:
    """What the library's score takes from trained models, where some were trained with the likelihood.

    The same weights are ranked by the library's map and by their log-likelihood, so that a difference is the score's.

    Args:
        records: of the main protocol, in all scores and both losses.
        detector: of :data:`usf.study.paper.DETECTORS`.

    Returns:
        one row for each class that has both losses, loss and flow: ``category, loss, flow, seeds``; image AUROC in
        percent, means over seeds, ``library, log_prob, norm``; ``cost``, the second minus the first, in percent points,
        with Student's 95 % interval over seeds, ``low, high`` (empty for a single seed); ``worst``, of a single run,
        ``largest``, in absolute value; ``sd_library, sd_log_prob``, over seeds (empty for a single one).
    """
    import pandas as pd

    scores = {"anomalib": "library", "log_prob": "log_prob", "norm": "norm"}
    runs: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
    settings: dict[str, set[tuple[Any, ...]]] = {}
    chosen = select(
        records,
        detector=detector,
        status="ok",
        protocol="main",
        variant=tuple(VARIANTS.values()),
        match_parameters=False,
    )
    for record in select(chosen, loss="mle"):
        settings.setdefault(record.category, set()).add((record.dataset, record.epochs, record.settings))
    for record in chosen:
        known = (record.dataset, record.epochs, record.settings) in settings.get(record.category, ())
        if known and (area := record.image_auroc) is not None:
            own = runs.setdefault((record.category, record.loss, str(record.flow)), {})
            own.setdefault(record.seed, {})[scores[record.score]] = 100 * area
    rows = []
    for (category, loss, flow), seeds in sorted(runs.items()):
        complete = [found for found in seeds.values() if set(found) == set(scores.values())]
        if not complete:
            continue
        costs = [found["log_prob"] - found["library"] for found in complete]
        row: dict[str, Any] = {"category": category, "loss": loss, "flow": flow, "seeds": len(complete)}
        row |= {name: fmean(found[name] for found in complete) for name in scores.values()}
        row |= {"cost": fmean(costs), "low": None, "high": None, "worst": max(costs), "largest": max(map(abs, costs))}
        row |= {"sd_library": None, "sd_log_prob": None}
        if len(costs) > 1:
            interval = statistics.student_interval(costs)
            row |= {"low": interval.low, "high": interval.high}
            row |= {f"sd_{name}": stdev(found[name] for found in complete) for name in ("library", "log_prob")}
        rows.append(row)
    return pd.DataFrame(rows)


def score_costs_in_words(table: pd.DataFrame) -> str:
    """What :func:`score_costs` found under the likelihood, for the prose; empty where nothing was trained with it."""
    likely = table if table.empty else table[table["loss"] == "mle"]
    sentences = []
    for category, part in likely.groupby("category") if len(likely) else ():
        flows_there = part.set_index("flow").to_dict("index")
        if "base" not in flows_there:
            continue
        base = flows_there["base"]
        low, high = base["low"], base["high"]
        span = "" if low is None or low != low else f" [{low:.1f}, {high:.1f}]"
        seeds = f"{base['seeds']} seed" + "s" * (base["seeds"] > 1)
        sentence = (
            f"On {category} the affine flow then has a mean image AUROC of {base['library']:.1f} in the library's "
            f"score and of {base['log_prob']:.1f} by the log-likelihood of the same weights: the score costs "
            f"{base['cost']:.1f}{span} points over {seeds}, {base['worst']:.1f} in the worst"
        )
        if (usf := flows_there.get("usf")) is not None:
            sentence += f"; the uniformly scaling flow {usf['largest']:.1f} at most"
        if (spread := base["sd_library"]) is not None and spread == spread:
            sentence += (
                f". The affine flow's standard deviation over seeds is {spread:.1f} points in the library's score and "
                f"{base['sd_log_prob']:.1f} by the log-likelihood"
            )
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _points(row: Mapping[Hashable, Any], name: str = "difference") -> str:
    """``"pill -8.1 [-9.0, -7.2]"``, or without an interval where there is none."""
    text = f"{row['category']} {row[name]:+.1f}"
    low, high = row.get("low"), row.get("high")
    return text if low is None or low != low else f"{text} [{low:.1f}, {high:.1f}]"


def _listed(table: pd.DataFrame) -> str:
    return ", ".join(_points(row) for row in table.to_dict("records"))


def _h5(records: Sequence[Record]) -> Iterable[str]:
    table = losses(records)
    table = table if table.empty else table[table["detector"] == "uflow"]
    for level in METRIC if len(table) else ():
        part = table[table["level"] == level]
        stock, likelihood = part["gain_anomalib"].mean(), part["gain_mle"].mean()
        if stock <= 0:
            verdict = "the library's loss gives no gain that could vanish"
        elif likelihood < stock / 2:
            verdict = "most of the gain vanishes with the likelihood"
        else:
            verdict = "the gain does not vanish with the likelihood"
        hurts = part["difference"].mean()
        expected = "as predicted" if hurts > 0 else "against the prediction"
        yield (
            f"{level} AUROC: the uniformly scaling U-Flow is {stock:+.1f} points from the affine one under the "
            f"library's loss and {likelihood:+.1f} under the likelihood: {verdict}. The library's loss costs the "
            f"affine flow {hurts:+.1f} points more than the other, {expected} ({_listed(part)})"
        )


def _h6(records: Sequence[Record]) -> Iterable[str]:
    table = flows(records)
    for detector in DETECTORS if len(table) else ():
        for level in METRIC:
            part = table[(table["detector"] == detector) & (table["level"] == level)]
            if part.empty:
                continue
            leads = int((part["difference"] < 0).sum())
            yield (
                f"{DETECTORS[detector]}, {level} AUROC of the log-likelihood, uniformly scaling minus affine: "
                f"{_listed(part)}; the affine flow leads on {leads} of {len(part)}"
            )


def _h7(records: Sequence[Record]) -> Iterable[str]:
    table = spreads(records)
    for level in METRIC if len(table) else ():
        part = table[(table["detector"] == "fastflow") & (table["level"] == level)]
        if part.empty:
            continue
        said = ", ".join(
            f"{r['category']} {r['usf']:.2f} against {r['base']:.2f}"
            for r in part.sort_values("ratio").to_dict("records")
        )
        lower = int((part["usf"] < part["base"]).sum())
        yield (
            f"FastFlow, {level} AUROC, standard deviation over {part['seeds'].min()} seeds, uniformly scaling against "
            f"affine: {said}; smaller on {lower} of {len(part)} classes"
        )


def outcomes(records: Sequence[Record]) -> dict[str, list[str]]:
    """What came of H5 to H7: sentences by hypothesis; a hypothesis without a run is missing.

    Args:
        records: of the main protocol, in all scores; for H6 and H7 those with the library's loss count.
    """
    stock = select(records, loss="anomalib")
    found = {"H5": list(_h5(records)), "H6": list(_h6(stock)), "H7": list(_h7(stock))}
    return {name: sentences for name, sentences in found.items() if sentences}
