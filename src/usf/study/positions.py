"""What a map of anomalies owes to where it looks: its level by position, and what the maximum makes of it.

Additive couplings move a feature by what they see around it, and its scale is the same everywhere. The level of their
map on normal images is therefore the variance that is left at a position, relative to the average one, where an affine
coupling can divide it out. This study trains detectors as the benchmark does, for a fixed number of epochs, and looks
at that level, what it alone is worth as a map, and how images rank when their score is not the maximum of the map::

    python -m usf.study.positions mvtec pill fastflow --variants affine additive additive-lu --seeds 0-2 --epochs 6
    python -m usf.study.positions --publish

Each training is one JSON file under ``build/positions``, written at once, and is not repeated. ``--publish`` adds them
to ``data/results/positions/records.csv``, one row a training and score, with the runs' machines in ``records.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from usf import paths
from usf.study import grid, records
from usf.study.ablation import BASE, USF
from usf.study.metrics import auroc

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from usf.detectors.backbones import Weights
    from usf.study import benchmark
    from usf.study.features import Features
    from usf.study.images import ImageFolder
    from usf.study.schema import Score

__all__ = [
    "COLUMNS",
    "QUANTILES",
    "SHARES",
    "Case",
    "feature_variance",
    "gains",
    "load",
    "means",
    "measure",
    "outcomes",
    "pooled",
    "publish",
    "run",
    "standardised",
]

SHARES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Of a map's positions, the highest ones, whose mean is an image's score; 0 is the maximum alone."""
QUANTILES = tuple(range(0, 101, 5))
"""Percent of the positions; see ``level_*`` of :func:`measure`."""
SCORES: tuple[Score, ...] = ("norm", "log_prob", "anomalib")
GIN = "gin + LU"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that decides a training besides weights and images; as in :class:`usf.study.benchmark.Cell`."""

    dataset: str
    category: str
    detector: str
    coupling: str
    mixing: str
    seed: int
    epochs: int
    size: int
    batch_size: int
    loss: str


def pooled(maps: NDArray[np.floating[Any]], share: float) -> NDArray[np.float64]:
    """The mean of each map's highest values, (N,).

    Args:
        maps: (N, H, W).
        share: of the positions, in [0, 1]; at least one position counts, so that 0 is the maximum.

    Raises:
        ValueError: another share.

    >>> pooled(np.array([[[1.0, 2.0], [3.0, 6.0]]]), 0.5)
    array([4.5])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: a share of the positions lies between 0 and 1")
    flat = maps.reshape(len(maps), -1)
    count = max(1, round(share * flat.shape[1]))
    return np.partition(flat, -count, axis=1)[:, -count:].mean(axis=1, dtype=np.float64)


def standardised(maps: NDArray[np.floating[Any]], normal: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Maps (N, H, W), at each position minus the mean of ``normal`` there and over its standard deviation.

    Args:
        maps: of test images.
        normal: of normal images that are none of them, (M, H, W); in this study those that were trained on.

    Raises:
        ValueError: a position where ``normal`` does not vary.
    """
    spread = normal.std(axis=0)
    if not (spread > 0).all():
        raise ValueError(f"the maps of {len(normal)} normal images do not vary at {int((spread <= 0).sum())} positions")
    return (maps - normal.mean(axis=0)) / spread


def feature_variance(features: Features, size: int) -> NDArray[np.float64]:
    """How much the features of normal images vary at each position, (size, size); 1 on average.

    The variance over images of every channel, over its mean over positions; averaged over channels and stages.
    """
    import torch

    found = torch.zeros(size, size)
    for level in features.batch(slice(None)):
        variance = level.var(dim=0, correction=0)
        relative = variance / variance.mean(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(variance.dtype).tiny)
        found += torch.nn.functional.interpolate(relative.mean(dim=0)[None, None], size=(size, size), mode="bilinear")[
            0, 0
        ]
    return np.asarray(found.double().numpy() / len(features.levels))


def measure(
    normal: NDArray[np.floating[Any]],
    maps: NDArray[np.floating[Any]],
    labels: NDArray[np.bool_],
    masks: NDArray[np.bool_],
) -> dict[str, float]:
    """What a detector's maps (higher is more anomalous) owe to their level.

    Args:
        normal: maps of the training images, (M, H, W).
        maps: of the test images, (N, H, W).
        labels, masks: of the test images, (N,) and (N, H, W).

    Returns:
        areas under ROC curves, in [0, 1]. Of images: ``image_S`` for the shares S of :data:`SHARES`, and
        ``image_standardised`` for the maximum of :func:`standardised` maps. Of pixels: ``pixel`` for the map,
        ``pixel_level`` for the mean of ``normal`` in its place, the same for every image, and ``pixel_standardised``;
        the same three with the suffix ``_inside`` for the positions where some test image has a defect, which are the
        share ``inside`` of all. Where no mean is negative, too, ``level_cv``, standard deviation over mean of the level
        over positions, and ``level_Q``, its quantiles over its mean.
    """
    level = normal.mean(axis=0, dtype=np.float64)
    inside = masks.any(axis=0)
    flat = standardised(maps, normal)
    found = {f"image_{share:g}": auroc(labels, pooled(maps, share)) for share in SHARES}
    found |= {"image_standardised": auroc(labels, pooled(flat, 0.0)), "inside": float(inside.mean())}
    ways = {"pixel": maps, "pixel_level": np.broadcast_to(level, maps.shape), "pixel_standardised": flat}
    for name, values in ways.items():
        found[name] = auroc(masks, values)
        found[f"{name}_inside"] = auroc(masks[:, inside], values[:, inside])
    if (level >= 0).all():
        found["level_cv"] = float(level.std() / level.mean())
        found |= {f"level_{q}": float(np.percentile(level, q) / level.mean()) for q in QUANTILES}
    return found


MEASURED = (
    *(f"image_{share:g}" for share in SHARES),
    *"image_standardised inside pixel pixel_inside pixel_level pixel_level_inside pixel_standardised".split(),
    *("pixel_standardised_inside", "level_cv", "level_variance_rank"),
    *(f"level_{q}" for q in QUANTILES),
)
COLUMNS = (
    *(field.name for field in dataclasses.fields(Case)),
    *("score", "status", "error", *MEASURED, "seconds", "weights_sha256", "manifest_sha256", "run"),
)
"""Of ``records.csv``. ``level_variance_rank`` is Spearman's rank correlation, over positions, of the level with
:func:`feature_variance`; ``seconds`` are those of the training."""


def _train(
    case: Case,
    cell: benchmark.Cell,
    weights: Weights,
    train: Features,
    test: Features,
    labels: Any,
    masks: Any,
    progress: bool,
) -> list[dict[str, Any]]:
    from usf.detectors import FlowOptions
    from usf.study import detection

    options = FlowOptions(coupling=case.coupling, mixing=case.mixing)  # type: ignore[arg-type]
    extra: dict[str, Any] = {"layers": weights.layers} if case.detector == "cflow" else {}
    model = detection.build(cell.detector, case.size, weights, options, seed=case.seed, loss=cell.loss, **extra)
    started = time.perf_counter()
    try:
        history = detection.fit(
            model, train, epochs=case.epochs, batch_size=case.batch_size, seed=case.seed, progress=progress
        )
    except detection.NotFiniteError as error:
        failed = {"status": "failed", "error": " ".join(str(error).split())}
        return [{"score": score, **failed, "seconds": time.perf_counter() - started} for score in SCORES]
    normal, seen = (
        detection.evaluate_scores(model, part, SCORES, batch_size=cell.score_batch) for part in (train, test)
    )
    variance = feature_variance(train, case.size)
    rows = []
    for score in SCORES:
        row: dict[str, Any] = {"score": score, "status": "ok", "error": None, "seconds": history.seconds}
        if lost := sum(int(np.count_nonzero(~np.isfinite(part[score].maps))) for part in (normal, seen)):
            rows.append(row | {"status": "failed", "error": f"{lost} values of the maps are not finite"})
            continue
        row |= measure(normal[score].maps, seen[score].maps, labels, masks)
        level = normal[score].maps.mean(axis=0)
        row["level_variance_rank"] = float(stats.spearmanr(level.ravel(), variance.ravel()).statistic)
        rows.append(row)
    return rows


def run(
    cell: benchmark.Cell,
    images: ImageFolder,
    folder: Path,
    *,
    weights: Weights,
    cache: Path | None = None,
    progress: bool = True,
) -> list[Path]:
    """Train what has no file yet, one JSON file a training.

    Args:
        cell: as of the benchmark, with a fixed number of epochs; its learning rate and its detector's other options
            are the defaults.
        images: of the class, with masks.
        folder: of the files.
        weights: of the backbone.
        cache: of features.
        progress: show bars.

    Raises:
        ValueError: images without masks, or a cell that stops by another rule.
    """
    from usf.detectors import backbones
    from usf.study.features import cache_key, extract
    from usf.study.images import load_masks

    if cell.stopping != "fixed":
        raise ValueError(f"stopping={cell.stopping!r}: positions are looked at after a fixed number of epochs")
    images = images.subset(cell.train_images, cell.per_kind)
    if not images.has_masks:
        raise ValueError(f"{images.name} has no masks: positions can only be looked at with a ground_truth folder")
    shared = {
        "weights_sha256": weights.sha256[:12],
        "manifest_sha256": images.manifest.sha256[:12],
        "run": time.strftime("%Y%m%dT%H%M%S", time.gmtime()),
    }
    found, features = [], None
    for seed in cell.seeds:
        for variant in cell.variants:
            case = Case(
                dataset=cell.dataset,
                category=cell.category,
                detector=cell.detector,
                coupling=variant.coupling,
                mixing=variant.mixing,
                seed=seed,
                epochs=cell.epochs,
                size=cell.size,
                batch_size=cell.batch_size,
                loss=cell.loss,
            )
            name = f"{case.dataset}-{case.category}-{case.detector}-{variant.name}-s{seed}"
            origin = (dataclasses.asdict(case), shared["weights_sha256"], shared["manifest_sha256"])
            path = folder / f"{name}-{records.settings_hash({'origin': origin})}.json"
            found.append(path)
            if path.is_file():
                continue
            if features is None:
                network = backbones.build(weights)
                files = (images.train, [sample.path for sample in images.test])
                train, test = features = tuple(
                    extract(network, part, cell.size, cache=cache, key=cache_key(weights), progress=progress)
                    for part in files
                )
                masks = load_masks(images.test, cell.size)
                records.write_json(folder / "runs" / f"{shared['run']}.json", records.provenance())
            rows = _train(case, cell, weights, train, test, images.labels, masks, progress)
            records.write_json(path, {"rows": [dataclasses.asdict(case) | row | shared for row in rows]})
            said = f"{100 * rows[0]['image_0']:.1f}" if rows[0]["status"] == "ok" else rows[0]["error"]
            print(f"{name}: image AUROC of the norm's maximum {said}", flush=True)
    return found


def publish(folder: Path, target: Path) -> int:
    """Add the trainings under ``folder`` to ``records.csv`` in ``target``; returns how many there are now.

    Trainings that are there already stay, but for those that were run again.

    Raises:
        FileNotFoundError: no training in ``folder``.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no trainings: run python -m usf.study.positions first")
    fields = [field.name for field in dataclasses.fields(Case)]

    def training(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return *(row[name] for name in fields), row["weights_sha256"], row["manifest_sha256"]

    rows = [row for path in files for row in json.loads(path.read_text("utf8"))["rows"]]
    beside = target / "records.json"
    origins: dict[str, Any] = {}
    if (target / "records.csv").is_file():
        again = {training(row) for row in rows}
        rows += [row for row in records.read_csv(target / "records.csv") if training(row) not in again]
        origins = json.loads(beside.read_text("utf8"))
    origins |= {path.stem: json.loads(path.read_text("utf8")) for path in (folder / "runs").glob("*.json")}
    rows.sort(key=lambda row: (*map(str, training(row)), SCORES.index(row["score"])))
    records.write_csv(target / "records.csv", rows, COLUMNS, digits=5)
    records.write_json(beside, {name: origins[name] for name in sorted({row["run"] for row in rows})})
    return len({training(row) for row in rows})


def load(folder: Path | None = None) -> list[dict[str, Any]]:
    """Published rows; by default from ``data/results/positions``; none where that is not there."""
    path = (paths.results("positions") if folder is None else folder) / "records.csv"
    return records.read_csv(path) if path.is_file() else []


def means(rows: Sequence[Mapping[str, Any]], score: str = "norm") -> pd.DataFrame:
    """Every measure, mean over seeds: a row a detector, class and flow (``affine``, ``additive``, ``additive + LU``).

    Args:
        rows: from :func:`load`.
        score: whose maps.

    Returns:
        index ``detector, dataset, category, flow``; columns ``seeds`` and the measures. Failed trainings are left out.
    """
    import pandas as pd

    own = [row for row in rows if row["score"] == score and row["status"] == "ok"]
    table = pd.DataFrame(own, columns=list(COLUMNS))
    table["flow"] = [row["coupling"] + " + LU" * (row["mixing"] == "lu") for row in own]
    groups = table.groupby(["detector", "dataset", "category", "flow"], sort=False)
    found = groups[list(MEASURED)].mean()
    found.insert(0, "seeds", groups["seed"].nunique())
    return found


def gains(table: pd.DataFrame, measure: str) -> pd.Series:
    """Additive + LU minus affine, for every detector and class that has both; from :func:`means`, in its units."""
    wide = table[measure].unstack("flow").reindex(columns=[USF, BASE])
    return (wide[USF] - wide[BASE]).dropna().rename(measure)


def _spots(values: pd.Series, form: str) -> str:
    from usf.study.paper import DETECTORS

    places = values.index.to_frame(index=False)
    return ", ".join(
        f"{value:{form}} ({DETECTORS[detector]}, {category})"
        for detector, category, value in zip(places["detector"], places["category"], values, strict=True)
    )


def _verdict(as_predicted: bool) -> str:
    return "as predicted" if as_predicted else "against the prediction"


def _range(values: pd.Series, form: str) -> str:
    return f"{values.min():{form}} to {values.max():{form}}"


def outcomes(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What came of P1 to P6 in ``book/predictions-positions.md``, a sentence each.

    A prediction that no trainings on record speak of is missing.
    """
    table = means(rows)
    flows = table.reset_index("flow")
    affine, additive = flows[flows["flow"] == BASE], flows[flows["flow"].isin(["additive", USF])]
    if affine.empty or additive.empty:
        return {}
    found = {}
    ratios = (additive["level_cv"] / affine["level_cv"].reindex(additive.index)).dropna()
    found["P1"] = (
        f"over positions the affine flows' level varies by {_range(affine['level_cv'], '.0%')} of itself, the additive "
        f"ones' by {_range(additive['level_cv'], '.0%')}; the smallest ratio on one class is {ratios.min():.1f}: "
        + _verdict(bool((ratios >= 3).all()))
    )
    ranks = additive["level_variance_rank"], affine["level_variance_rank"]
    found["P2"] = (
        f"the rank correlation of level and variance of the features is {_range(ranks[0], '.2f')} for the additive "
        f"flows: {_verdict(bool((ranks[0] > 0.5).all()))}; and {_range(ranks[1], '.2f')} for the affine ones: "
        + _verdict(bool((ranks[1] < 0.5).all()))
    )
    levels = 100 * gains(table, "pixel_level")
    found["P3"] = (
        f"the level alone has a pixel AUROC that is larger for additive + LU by {_range(levels, '.1f')} points: "
        + _verdict(bool((levels >= 10).all()))
    )
    everywhere, inside = (100 * gains(table, name) for name in ("pixel", "pixel_inside"))
    asked = everywhere.index[(everywhere.index.get_level_values("category") == "pill") & (everywhere > 0)]
    asked = asked[asked.get_level_values("detector") != "cflow"]
    if len(asked):
        found["P4"] = (
            f"of the gain in pixel AUROC of {_spots(everywhere[asked], '+.1f')} points, the positions where defects "
            f"lie keep {_spots(inside[asked], '+.1f')}: {_verdict(bool((inside[asked] < everywhere[asked] / 2).all()))}"
        )
    highest, tenth = (100 * gains(table, name) for name in ("image_0", "image_0.1"))
    asked = highest.index[highest.index.get_level_values("category") == "pill"]
    if len(asked):
        shrunk = tenth[asked].abs() < highest[asked].abs() / 2
        found["P5"] = (
            f"of the difference in image AUROC of {_spots(highest[asked], '+.1f')} points, the mean of the highest "
            f"tenth leaves {_spots(tenth[asked], '+.1f')}: {_verdict(bool(shrunk.all()))}"
        )
    wide = table["level_cv"].unstack("flow").reindex(columns=[GIN, USF])
    moved = (wide[GIN] / wide[USF]).dropna()
    moved = moved[moved.index.get_level_values("category") == "pill"]
    if len(moved):
        alone = moved.index.get_level_values("detector") == "cflow"
        found["P6"] = (
            f"the level of GIN + LU varies by {_spots(moved, '.2f')} of what that of additive + LU does: "
            + _verdict(bool((moved[~alone] < 0.5).all() and (moved[alone] > 0.5).all()))
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Exits with 1 where a training failed."""
    import torch

    from usf.detectors import backbones
    from usf.study import benchmark

    parser = argparse.ArgumentParser(prog="python -m usf.study.positions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", nargs="?", help="mvtec, hazelnut_toy, textures; none to publish alone")
    parser.add_argument("category", nargs="?", help="the class, as its folder is called")
    parser.add_argument("detector", nargs="?", choices=grid.DETECTORS)
    parser.add_argument("--variants", nargs="+", default=["affine", "additive", "additive-lu"])
    parser.add_argument("--seeds", nargs="+", default=["0"], help="as in: 0 1 2, or 0-4")
    parser.add_argument("--profile", default="book", choices=["smoke", "book"])
    parser.add_argument("--epochs", type=int, help="instead of the profile's")
    parser.add_argument("--images", help="folder of the class, in MVTec layout")
    parser.add_argument("--weights", help="a safetensors file, 'hub' or 'random'; by default what is found")
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument("--out", type=Path, default=paths.build("positions"), help="folder of the trainings")
    parser.add_argument("--publish", action="store_true", help="also add them to data/results/positions")
    parser.add_argument("--quiet", action="store_true", help="no bars")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    if not (given.dataset or given.publish):
        parser.error("give a data set, a class and a detector, as in: mvtec pill fastflow; or --publish")
    if given.dataset and not (given.category and given.detector):
        parser.error("a data set needs a class and a detector, as in: mvtec pill fastflow")
    files: list[Path] = []
    try:
        if given.dataset:
            cell = benchmark.cell(
                given.dataset,
                given.category,
                given.detector,
                profile=given.profile,
                variants=grid.variants(given.variants),
                seeds=grid.whole_numbers(given.seeds),
                **({"epochs": given.epochs} if given.epochs else {}),
            )
            small = given.profile == "smoke"
            images = benchmark.find_images(given.dataset, given.category, given.images, small=small)
            weights = backbones.resolve(given.weights, backbone=cell.backbone, layers=cell.layers)
            cache = paths.cache("features")
            files = run(cell, images, given.out, weights=weights, cache=cache, progress=not given.quiet)
        if given.publish:
            print(f"{publish(given.out, paths.results('positions'))} trainings in data/results/positions")
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.error(str(error))
    rows = [row for path in files for row in json.loads(path.read_text("utf8"))["rows"]]
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
