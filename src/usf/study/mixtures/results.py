"""What is published: the selected trials, what bounds and untrained scores reach on the same points, and the files."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from usf import alignment, paths
from usf.study import records
from usf.study.mixtures.experiment import MODELS, TAIL, Study, data, stable_seed
from usf.study.mixtures.search import Arrays, Trial, evaluate, search_space, train, trial_name
from usf.study.targets import paper_mixture

COLUMNS: tuple[str, ...] = tuple(
    """
    model dim trial status reason val_loss test_nll excess_nll
    spearman kendall inversions spearman_tail kendall_tail inversions_tail spearman_nll
    seconds epochs best_epoch parameters
    blocks layers width depth lr batch_size weight_decay
    latent_std_min latent_std_median latent_std_max spread effective_rank distinct_fraction
    log_det_std seed settings_hash run
    """.split()
)
"""Columns of ``trials.csv``. ``excess_nll`` is test NLL minus the mean of the exact -ln p over the same test points."""
POINT_COLUMNS = (
    "model",
    "dim",
    "choice",
    "trial",
    "point",
    "true",
    "estimated",
    "norm",
    "log_det",
    "x0",
    "x1",
    "z0",
    "z1",
)


def selected(rows: Iterable[Mapping[str, Any]], model: str, dim: int, *, by: str = "val_loss") -> Mapping[str, Any]:
    """The trial with the lowest validation loss, as in the paper; ``by="spearman"`` is an oracle's choice.

    Raises:
        LookupError: when no trial of this model and dimension succeeded.
    """
    candidates = [r for r in rows if r["model"] == model and r["dim"] == dim and r["status"] == "ok"]
    if not candidates:
        raise LookupError(f"no successful trial of {model} in {dim} dimensions among the records")
    if by == "spearman":
        return max(candidates, key=lambda r: r["spearman"])
    return min(candidates, key=lambda r: r[by])


def bounds(settings: Study) -> list[dict[str, Any]]:
    """Entropy, rearrangement bound and best Gaussian of each dimension, nats; one row a dimension."""
    rows = []
    for dim in settings.dims:
        started = time.perf_counter()
        mixture = paper_mixture(dim)
        chunk = 50_000
        log_density = torch.cat(
            [
                mixture.log_prob(
                    mixture.sample(min(chunk, settings.bound_samples - start), stable_seed("bound", start))
                )
                for start in range(0, settings.bound_samples, chunk)
            ]
        )
        found = alignment.rearrangement_bound(log_density, dim)
        row: dict[str, Any] = {"dim": dim, "samples": settings.bound_samples}
        for name in ("entropy", "bound", "gap"):
            estimate = getattr(found, name)
            row |= {name: estimate.value, f"{name}_error": estimate.error}
        row |= {
            "gaussian": mixture.gaussian_cross_entropy(),
            "test_entropy": -float(data(settings, dim).log_density.mean()),
            "seconds": time.perf_counter() - started,
        }
        rows.append(row)
    return rows


def baselines(settings: Study) -> list[dict[str, Any]]:
    """Scores that need no network, on the same samples; one row a baseline and dimension."""
    rows = []
    for dim in settings.dims:
        found = data(settings, dim)
        scores: dict[str, Callable[[], Tensor]] = {
            "distance to the mean": functools.partial(alignment.distance_to_mean, found.train, found.test),
            "Mahalanobis": functools.partial(alignment.mahalanobis, found.train, found.test),
            # 10 000 kernels: the estimate is limited by dimension long before it is by their number.
            "KDE": functools.partial(alignment.kde, found.train[:10_000], found.test, validation=found.val),
        }
        for name, compute in scores.items():
            started = time.perf_counter()
            score = compute()
            row: dict[str, Any] = {"baseline": name, "dim": dim}
            for suffix, tail in (("", None), ("_tail", TAIL)):
                for measure in ("spearman", "kendall", "inversions"):
                    row[measure + suffix] = getattr(alignment, measure)(score, found.log_density, tail=tail)
            if name == "KDE":
                row["test_nll"] = float(score.mean())
            row["seconds"] = time.perf_counter() - started
            rows.append(row)
    return rows


def points(settings: Study, folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Subsampled test points of each selected model (and of the oracle's Deep SVDD), for figures 2 to 5."""
    keep = np.sort(
        np.random.default_rng(settings.seed).choice(settings.test, min(settings.points, settings.test), False)
    )
    out: list[dict[str, Any]] = []
    for dim in settings.dims:
        test = data(settings, dim).test.numpy()
        for model in MODELS:
            for choice in ("val_loss", "spearman") if model == "deep-svdd" else ("val_loss",):
                try:
                    row = selected(rows, model, dim, by=choice)
                except LookupError:
                    continue
                with np.load(folder / f"{trial_name(model, dim, row['trial'])}.npz") as stored:
                    arrays = {key: stored[key] for key in stored.files}
                for i in keep:
                    point = {"model": model, "dim": dim, "choice": choice, "trial": row["trial"], "point": int(i)}
                    point |= {key: float(value[i]) for key, value in arrays.items()}
                    if dim == 2:
                        point |= {"x0": float(test[i, 0]), "x1": float(test[i, 1])}
                    out.append(point)
    return out


def write(settings: Study, folder: Path, rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Gather a run's records under ``out``: the files named in the package's docstring.

    Bounds and baselines depend on the settings alone; they are computed once and kept beside the records.
    """
    oracle = folder / "oracle"
    for name, compute in (("bounds", bounds), ("baselines", baselines)):
        if not (oracle / f"{name}.csv").is_file():
            records.write_csv(oracle / f"{name}.csv", compute(settings))
        records.atomic_write(out / "oracle" / f"{name}.csv", (oracle / f"{name}.csv").read_bytes())
    records.write_csv(out / "trials.csv", rows, COLUMNS)
    records.write_csv(out / "figures" / "points.csv", points(settings, folder, rows), POINT_COLUMNS, digits=5)
    used = {str(row["run"]) for row in rows}
    runs = {p.stem: json.loads(p.read_text("utf8")) for p in sorted((folder / "runs").glob("*.json")) if p.stem in used}
    records.write_json(out / "provenance.json", runs)


def load(folder: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Published records: ``trials``, ``points``, ``bounds``, ``baselines``, each a list of rows.

    Args:
        folder: where they are; ``data/results/mixtures`` by default.
    """
    where = paths.results("mixtures") if folder is None else folder
    return {
        "trials": records.read_csv(where / "trials.csv"),
        "points": records.read_csv(where / "figures" / "points.csv"),
        "bounds": records.read_csv(where / "oracle" / "bounds.csv"),
        "baselines": records.read_csv(where / "oracle" / "baselines.csv"),
    }


def repeat(settings: Study, row: Mapping[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """Train a recorded trial again, here and now, from its settings and seed; returns its measures and arrays."""
    chosen = {name: row[name] for name in search_space(row["model"])}
    trial = Trial(settings, row["model"], row["dim"], row["trial"], chosen)
    model, cost = train(trial)
    measures, arrays = evaluate(model, data(settings, trial.dim))
    return {"model": trial.model, "dim": trial.dim, "trial": trial.number, **cost, **measures}, arrays


def summary(rows: Sequence[Mapping[str, Any]], oracle: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The selected trial of each model and dimension beside the bound; one row each.

    ``above_bound`` is the test NLL's excess over the test points' own entropy, minus the bound's gap, in per cent of
    the bound: both are taken over the same points, so the sampling error of the entropy cancels.
    """
    out = []
    for entry in oracle:
        for model in MODELS:
            try:
                row = selected(rows, model, entry["dim"])
            except LookupError:
                continue
            all_rows = [r for r in rows if r["model"] == model and r["dim"] == entry["dim"]]
            excess = row.get("excess_nll")
            out.append(
                {
                    "model": model,
                    "dim": entry["dim"],
                    "trial": row["trial"],
                    "test_nll": row.get("test_nll"),
                    "bound": entry["test_entropy"] + entry["gap"],
                    "above_bound": None if excess is None else 100 * (excess - entry["gap"]) / abs(entry["bound"]),
                    "spearman": row["spearman"],
                    "kendall": row["kendall"],
                    "inversions": row["inversions"],
                    "spearman_tail": row["spearman_tail"],
                    "best_spearman": max(r["spearman"] for r in all_rows if r["status"] == "ok"),
                    "failed": sum(r["status"] != "ok" for r in all_rows),
                    "seconds": math.fsum(r["seconds"] for r in all_rows),
                }
            )
    return out
