"""False alarms on real images: what thresholds set without anomalies do beside those that look at the test set.

The normal training images of a class are cut into folds. For each fold a uniformly scaling FastFlow is trained on the
others, by maximum likelihood with its layer normalisation counted; the fold, the training images and the test images
are scored. What is kept are the scores, so that every threshold and p-value
of the chapter is computed from the record::

    python -m usf.study.alarms --profile smoke             # built-in textures, a minute
    python -m usf.study.alarms --profile full --publish    # three classes under ../shared, about ten minutes of CPU

``--publish`` writes ``data/results/calibration/``: ``scores.csv`` (one row an image and fold), ``folds.csv`` (one row a
training), ``brightness.csv`` (one row a normal image), ``provenance.json``. A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from usf import paths
from usf.study import records
from usf.study.features import Features, extract
from usf.study.images import ImageFolder, find, load_images, load_masks, read
from usf.study.metrics import pixel_metrics
from usf.study.positions import standardised
from usf.study.profile import select

if TYPE_CHECKING:
    from usf.detectors.model import DetectorModel

__all__ = ["Scores", "Settings", "f1_threshold", "fold_indices", "load", "measure", "run"]

Array = NDArray[np.float64]

CLASSES: dict[str, tuple[str, ...]] = {
    "bottle": ("mvtec_ad_256", "bottle"),
    "pill": ("mvtec_ad_256", "pill"),
    "hazelnut": ("hazelnut_toy_256", "hazelnut"),
    "textures": (),
}
"""Name -> folder of a class under ``../shared/images``; an empty one is the built-in set."""

SCORES = ("map", "relative", "standardised", "norm")
"""One number for an image.

``map``: the maximum of the anomaly map, by which images are told apart. ``relative``: the same of the map over its mean
at each position, and ``standardised``: of the map less this mean and over its standard deviation; both over the
training images. ``norm``: the norm of all latents of an image, whose law is chi under the Gaussian base.
"""

PARTS = ("fit", "held_out", "normal", "anomalous")
"""Images trained on; normal ones kept out of training; normal and anomalous test images."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of one run.

    Attributes:
        classes: keys of :data:`CLASSES`.
        size: of the images, pixels.
        folds: into which the normal training images of a class are cut.
        steps: optimiser steps of a training, rounded up to whole epochs: equally many for large and small classes.
        batch_size: images a step.
        train, per_kind: the first images of a class and of each kind of test image; ``None`` for all.
        seed: of folds, initial weights and shuffles.
    """

    classes: tuple[str, ...] = ("bottle", "pill", "hazelnut")
    size: int = 128
    folds: int = 4
    steps: int = 80
    batch_size: int = 8
    train: int | None = None
    per_kind: int | None = None
    seed: int = 0


def settings(profile: str) -> Settings:
    """The settings of a profile: ``smoke`` on textures, ``book`` and ``full`` as on record."""
    small = Settings(classes=("textures",), size=32, folds=2, steps=2, train=12, per_kind=2)
    return select(profile, smoke=small, book=Settings(), full=Settings())


@dataclasses.dataclass(frozen=True)
class Scores:
    """One score of one detector for all images of a class; each part is (n,), higher is more anomalous.

    Attributes:
        fit: normal images the detector was trained on.
        held_out: normal images it was not trained on.
        normal: normal test images.
        anomalous: anomalous test images.
    """

    fit: Array
    held_out: Array
    normal: Array
    anomalous: Array


def fold_indices(count: int, folds: int, seed: int) -> list[NDArray[np.intp]]:
    """``range(count)`` at random into ``folds`` parts whose sizes differ by one at most; each part is sorted.

    Raises:
        ValueError: fewer than two folds, or more than images.
    """
    if not 2 <= folds <= count:
        raise ValueError(f"cannot cut {count} images into {folds} folds: at least 2, at most one an image")
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.array_split(order, folds)]


def measure(
    model: DetectorModel,
    fit: Features,
    held_out: Features,
    test: Features,
    labels: NDArray[np.bool_],
    masks: NDArray[np.bool_] | None = None,
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Every score of a trained detector.

    Args:
        model: trained.
        fit, held_out, test: features; see :class:`Scores`.
        labels: which test images are anomalous, (test images,).
        masks: of the test images' defects, (test images, size, size).

    Returns:
        scores by their name in :data:`SCORES`; and, where there are ``masks``, the areas in [0, 1] of each kind of map
        against them, ``pixel_auroc_MAP`` and ``aupro_MAP``.

    Raises:
        NotFiniteError: a score that is not finite, see :func:`usf.study.detection.evaluate`.
        ValueError: a position where the maps of ``fit`` do not vary.
    """
    from usf.study import detection

    found = [detection.evaluate(model, part) for part in (fit, held_out, test)]
    known = found[0].maps
    ways: dict[str, Callable[[NDArray[np.floating[Any]]], NDArray[np.floating[Any]]]] = {
        "map": lambda maps: maps,
        "relative": lambda maps: maps / known.mean(axis=0),
        "standardised": lambda maps: standardised(maps, known),
    }
    parts = {name: [way(part.maps) for part in found] for name, way in ways.items()}
    areas: dict[str, float] = {}
    if masks is not None:
        for name, (_, _, maps) in parts.items():
            pixels = pixel_metrics(masks, maps)
            areas |= {f"pixel_auroc_{name}": pixels.auroc, f"aupro_{name}": pixels.aupro}
    values = {name: [maps.max(axis=(1, 2)) for maps in own] for name, own in parts.items()}
    values["norm"] = [np.sqrt(2 * part.energies) for part in found]
    scores = {}
    for name in SCORES:
        own = [np.asarray(part, dtype=np.float64) for part in values[name]]
        scores[name] = Scores(own[0], own[1], own[2][~labels], own[2][labels])
    return scores, areas


def f1_threshold(normal: Array, anomalous: Array) -> float:
    """anomalib's F1-adaptive threshold: the score at which calling higher ones anomalous has the best F1.

    It needs labelled anomalies. In anomalib they are by default those of the test set.

    Args:
        normal, anomalous: scores, (n,) and (m,).
    """
    from anomalib.data import ImageBatch
    from anomalib.metrics import F1AdaptiveThreshold

    scores = torch.as_tensor(np.r_[normal, anomalous])
    labels = torch.arange(len(scores)) >= len(normal)
    metric = F1AdaptiveThreshold(fields=["pred_score", "gt_label"])
    metric.update(ImageBatch(image=torch.zeros(len(scores), 3, 1, 1), pred_score=scores, gt_label=labels))
    return float(metric.compute())


# --------------------------------------------------------------------------------------------------------- the records


def _folder(name: str) -> ImageFolder:
    if not CLASSES[name]:
        return find("built-in", small=True)
    path = paths.shared("images", *CLASSES[name])
    if path is None:
        raise FileNotFoundError(f"the images of {name} are not under ../shared/images: choose other classes")
    return read(path)


def run_class(options: Settings, name: str, folder: Path, run: str, *, progress: bool = True) -> None:
    """Train and measure what is missing of a class, one JSON file a fold."""
    from usf.detectors import FlowOptions, backbones
    from usf.study import detection

    missing = [fold for fold in range(options.folds) if not (folder / f"{name}-{fold}.json").is_file()]
    if not missing:
        return
    images = _folder(name).subset(options.train, options.per_kind)
    weights = backbones.resolve("", seed=options.seed, announce=None)
    backbone = backbones.build(weights)
    train = extract(backbone, images.train, options.size, progress=progress, label=f"{name}, training")
    test = extract(backbone, [s.path for s in images.test], options.size, progress=progress, label=f"{name}, test")
    masks = load_masks(images.test, options.size)
    folds = fold_indices(len(images.train), options.folds, options.seed)
    for fold in missing:
        started = time.perf_counter()
        held = folds[fold]
        fit = np.setdiff1d(np.arange(len(images.train)), held)
        row: dict[str, Any] = {
            "class": name,
            "fold": fold,
            "fit": len(fit),
            "held_out": len(held),
            "test": len(images.test),
            "dimension": train.dimension,
            "weights": weights.describe(),
            "manifest": images.manifest.sha256,
            "settings_hash": records.settings_hash({**dataclasses.asdict(options), "classes": name}),
            "run": run,
        }
        kept: dict[str, Any] = {}
        try:
            model = detection.build(
                "fastflow", options.size, weights, FlowOptions(), seed=options.seed + fold, loss="mle"
            )
            history = detection.fit(
                model,
                train.subset(fit.tolist()),
                epochs=math.ceil(options.steps / math.ceil(len(fit) / options.batch_size)),
                batch_size=options.batch_size,
                seed=options.seed + fold,
                progress=progress,
                label=f"{name}, fold {fold}",
            )
            measured, areas = measure(
                model, train.subset(fit.tolist()), train.subset(held.tolist()), test, images.labels, masks
            )
            row |= {"status": "ok", "epochs": history.epochs, "steps": history.steps, "loss": history.train[-1]}
            row |= areas
            for score, values in measured.items():
                kept[score] = {part: getattr(values, part).tolist() for part in PARTS}
        except (ArithmeticError, RuntimeError, ValueError) as error:
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        row["seconds"] = time.perf_counter() - started
        names = {
            "fit": [f"train/{images.train[i].name}" for i in fit],
            "held_out": [f"train/{images.train[i].name}" for i in held],
            "normal": [f"good/{s.path.name}" for s in images.test if not s.anomalous],
            "anomalous": [f"{s.defect}/{s.path.name}" for s in images.test if s.anomalous],
        }
        records.write_json(folder / f"{name}-{fold}.json", {"row": row, "names": names, "scores": kept})


def run(options: Settings, folder: Path, *, progress: bool = True) -> list[dict[str, Any]]:
    """Run what is missing under ``folder``; the content of all its files, see :func:`run_class`."""
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{records.settings_hash(options)}"
    files = [folder / f"{c}-{fold}.json" for c in options.classes for fold in range(options.folds)]
    if not all(path.is_file() for path in files):
        records.write_json(
            folder / "runs" / f"{name}.json",
            {**records.provenance(("torch", "numpy", "scipy", "anomalib")), "settings": options, "threads": 1},
        )
    for class_name in options.classes:
        run_class(options, class_name, folder, name, progress=progress)
    return [json.loads(path.read_text("utf8")) for path in files]


FOLD_COLUMNS = (
    *"class fold fit held_out test dimension status reason epochs steps loss".split(),
    *(f"{area}_{name}" for area in ("pixel_auroc", "aupro") for name in SCORES if name != "norm"),
    *"seconds weights manifest settings_hash run".split(),
)
"""Columns of ``folds.csv``; ``loss`` in nats per dimension, the last epoch's mean over the training images."""

SCORE_COLUMNS = ("class", "fold", "part", "image", *SCORES)
"""Columns of ``scores.csv``; ``part`` is one of :data:`PARTS`."""


def write(results: Iterable[Mapping[str, Any]], folder: Path, out: Path) -> None:
    """Gather what :func:`run` returned into the files of ``out``."""
    results = list(results)
    records.write_csv(out / "folds.csv", [result["row"] for result in results], FOLD_COLUMNS)
    rows = [
        {"class": result["row"]["class"], "fold": result["row"]["fold"], "part": part, "image": image}
        | {score: values[part][index] for score, values in result["scores"].items()}
        for result in results
        if result["scores"]
        for part in PARTS
        for index, image in enumerate(result["names"][part])
    ]
    records.write_csv(out / "scores.csv", rows, SCORE_COLUMNS, digits=9)
    used = {result["row"]["run"] for result in results}
    runs = {path.stem: json.loads(path.read_text("utf8")) for path in sorted((folder / "runs").glob("*.json"))}
    records.write_json(out / "provenance.json", {name: value for name, value in runs.items() if name in used})


def brightness(options: Settings) -> list[dict[str, Any]]:
    """Mean pixel value, in [0, 1], of every normal image: are those of the training and the test set alike?

    Returns:
        rows with ``class``, ``part`` (``"train"`` or ``"normal"``), ``image``, ``brightness``.
    """
    rows = []
    for name in options.classes:
        images = _folder(name).subset(options.train, options.per_kind)
        normal = [sample.path for sample in images.test if not sample.anomalous]
        for part, files in (("train", images.train), ("normal", normal)):
            values = load_images(files, options.size).mean(dim=(1, 2, 3)).tolist()
            rows += [
                {"class": name, "part": part, "image": f"{path.parent.name}/{path.name}", "brightness": value}
                for path, value in zip(files, values, strict=True)
            ]
    return rows


def load(folder: Path | None = None) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Scores]]]]:
    """The record: (rows of ``folds.csv``, class -> for each fold the score's name -> :class:`Scores`).

    Args:
        folder: by default ``data/results/calibration``.

    Raises:
        FileNotFoundError: no record there.
    """
    folder = folder or paths.results("calibration")
    folds = records.read_csv(folder / "folds.csv")
    values: dict[tuple[str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for row in records.read_csv(folder / "scores.csv"):
        values.setdefault((row["class"], row["fold"]), {}).setdefault(row["part"], []).append(row)
    found: dict[str, list[dict[str, Scores]]] = {}
    for (name, _), parts in sorted(values.items(), key=lambda item: item[0][1]):
        found.setdefault(name, []).append(
            {
                score: Scores(*(np.array([row[score] for row in parts[part]], dtype=np.float64) for part in PARTS))
                for score in SCORES
            }
        )
    return folds, {name: found[name] for name in dict.fromkeys(row["class"] for row in folds) if name in found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="book", help="smoke, book or full")
    parser.add_argument("--out", type=Path, help="folder of the records; default: under build/alarms")
    parser.add_argument("--classes", nargs="+", choices=sorted(CLASSES), help="only these; cannot be published alone")
    parser.add_argument("--publish", action="store_true", help="also write data/results/calibration")
    chosen = parser.parse_args(arguments)
    options = settings(chosen.profile)
    folder = chosen.out or paths.build("alarms", f"{chosen.profile}-{records.settings_hash(options)}")
    if chosen.classes:
        if chosen.publish:
            parser.error("--publish needs all classes of the profile: run again without --classes")
        options = dataclasses.replace(options, classes=tuple(chosen.classes))
    torch.set_num_threads(1)
    results = run(options, folder)
    out = paths.results("calibration") if chosen.publish else folder
    write(results, folder, out)
    records.write_csv(out / "brightness.csv", brightness(options))
    for result in results:
        print("  ".join(f"{key} {result['row'][key]}" for key in FOLD_COLUMNS[:11] if key in result["row"]))


if __name__ == "__main__":
    main()
