"""How much of a CFlow's AUROC is the flow, and how much the way its likelihoods become a score?

One model is trained once, and after every epoch the same latents of the test images are scored in several ways (see
:data:`WAYS`), so that what differs between two numbers is the score alone. Beside them: the largest log-likelihood of a
fibre, which a constant determinant caps at the mode of the base and an affine flow can raise without bound, and how
many likelihoods are not finite.

``python -m usf.study.rescoring --help`` runs it; each training leaves one CSV file, written whole, and is not repeated.
A training that diverges leaves one too: the rows of the epochs that it reached, and a last one that says what happened.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from usf import paths
from usf.study import detection, grid, records
from usf.study.features import Features, extract
from usf.study.images import ImageFolder, batches, load_masks, read
from usf.study.metrics import auroc

if TYPE_CHECKING:
    from usf.detectors.model import DetectorModel, Latents

__all__ = [
    "COLUMNS",
    "WAYS",
    "Rescoring",
    "batches_in_words",
    "ceiling",
    "gather",
    "outcomes",
    "run",
    "summary",
    "ways_to_score",
]

WAYS = {
    "stock, whole set": "the library's score, all test images in one batch",
    "stock, batches of 32": "the same in batches of 32, in the order of the folder, as the library evaluates",
    "stock, shuffled": "the same in batches of 32, in a random order",
    "stock, one by one": "the same, every image a batch of its own",
    "sum of probabilities": "the library's combination of layers without the batch: every layer's likelihood relative "
    "to the base's mode, added up",
    "log_prob": "mean over layers of the negative log-likelihood per channel",
    "norm": "the same without the log-determinant",
}
"""Way of scoring -> what it is."""

# fmt: off
COLUMNS = [
    "category", "coupling", "mixing", "seed", "epoch", "epochs", "steps", "way", "image_auroc", "pixel_auroc",
    "max_log_prob", "max_log_prob_normal", "nonfinite", "loss", "loss_kind", "size", "batch_size", "fiber_batch_size",
    "train_images", "test_images", "parameters", "seconds", "weights_sha256", "manifest_sha256", "settings_hash",
    "revision", "run", "status", "error",
]
# fmt: on

LAYERS = ("layer1", "layer2", "layer3")
PACKAGES = ("torch", "anomalib", "timm")
"""Whose versions the provenance of a run has."""


@dataclasses.dataclass(frozen=True)
class Rescoring:
    """Settings of one training.

    Attributes:
        coupling, mixing: of the flow.
        seed: of weights and shuffles.
        epochs: all traced.
        size: pixels.
        batch_size: images.
        loss_kind: ``"anomalib"`` or ``"mle"``.
    """

    coupling: str
    mixing: str
    seed: int
    epochs: int
    size: int = 128
    batch_size: int = 32
    loss_kind: str = "anomalib"

    @property
    def name(self) -> str:
        """Of the training, for a person; not everything that it depends on, see :func:`run`."""
        return f"{self.coupling}-{self.mixing}-{self.loss_kind}-seed{self.seed}-epochs{self.epochs}"

    def hash(self, fiber_batch_size: int) -> str:
        """Of all settings."""
        return records.settings_hash(
            dataclasses.asdict(self) | {"fiber_batch_size": fiber_batch_size, "layers": LAYERS}
        )


def ceiling() -> float:
    """ln p / C at the mode of the base with determinant one, nats per channel: no additive flow's fibre is above it by
    more than its constant log-determinant.

    >>> round(ceiling(), 3)
    -0.919
    """
    return -0.5 * math.log(2 * math.pi)


def _log_probs(latents: Latents) -> list[Tensor]:
    """ln p / C of every fibre, one (N, H_i, W_i) per layer, nats per channel."""
    return [
        log_det / z.shape[1] - 0.5 * z.square().mean(dim=1) + ceiling()
        for z, log_det in zip(latents.z, latents.log_dets, strict=True)
    ]


def _part(latents: Latents, index: Tensor | slice) -> Latents:
    return type(latents)([z[index] for z in latents.z], [part[index] for part in latents.log_dets])


def ways_to_score(model: DetectorModel, latents: Latents, *, batch: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Way (see :data:`WAYS`) -> anomaly maps (N, H, W) of the same latents.

    Args:
        model: a CFlow.
        latents: of all test images.
        batch: images, of the ways that depend on it.
        seed: of the random order.
    """
    count = len(latents.z[0])

    def stock(order: Tensor, size: int) -> Tensor:
        maps = torch.cat([model.stock_maps(_part(latents, order[part]))[:, 0] for part in batches(count, size)])
        return maps[order.argsort()]

    straight = torch.arange(count)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    likelihoods = [(level - ceiling()).exp() for level in _log_probs(latents)]
    added = torch.stack(
        [
            torch.nn.functional.interpolate(
                level[:, None], size=model.input_size, mode="bilinear", align_corners=model.align_corners
            )[:, 0]
            for level in likelihoods
        ]
    ).sum(dim=0)
    return {
        "stock, whole set": stock(straight, count),
        "stock, batches of 32": stock(straight, batch),
        "stock, shuffled": stock(shuffled, batch),
        "stock, one by one": stock(straight, 1),
        "sum of probabilities": -added,
        "log_prob": model.maps(latents, "log_prob")[:, 0],
        "norm": model.maps(latents, "norm")[:, 0],
    }


def _area(labels: Any, scores: Any) -> float | None:
    """AUROC, or None where a score is not finite."""
    return auroc(labels, scores) if bool(torch.isfinite(torch.as_tensor(scores)).all()) else None


def _test_latents(model: DetectorModel, features: Features) -> Latents:
    with torch.inference_mode():
        parts = [model.latents(features.batch(part)) for part in batches(len(features), 16)]
    return type(parts[0])(
        [torch.cat(levels) for levels in zip(*(part.z for part in parts), strict=True)],
        [torch.cat(levels) for levels in zip(*(part.log_dets for part in parts), strict=True)],
    )


IDENTITY = ("category", "settings_hash", "weights_sha256", "manifest_sha256", "train_images", "test_images")
"""Columns that name a training: the class, all settings, the backbone's weights, the images and how many of them."""


def _names(path: Path) -> list[dict[str, str]]:
    """:data:`IDENTITY` of each row of a file, as text: a hash may look like a number."""
    with path.open(newline="", encoding="utf8") as stream:
        return [{name: row[name] for name in IDENTITY} for row in csv.DictReader(stream)]


def _on_file(folder: Path) -> dict[tuple[str, ...], Path]:
    """Training -> its file, by what the rows say, whatever the file is called."""
    files = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    return {tuple(names.values()): path for path in files for names in _names(path)}


def run(
    images: ImageFolder,
    settings: Sequence[Rescoring],
    folder: Path,
    *,
    weights: str | Path | None = None,
    cache: Path | None = None,
    fiber_batch_size: int = 64,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Train what has no file yet, and write one file of rows for each training.

    Another setting, other weights or other images are another training, with a file of its own. A training whose loss
    is not finite has a file that ends with a row of ``status`` failed, and is not tried again while that file is there.

    Args:
        images: a class.
        settings: one for each training, all of one size.
        folder: of the files, ``CLASS-NAME-HASH.csv``.
        weights: of the ResNet-18, see :func:`usf.detectors.backbones.resolve`.
        cache: of the features; ``None`` keeps them in memory.
        fiber_batch_size: fibres per optimiser step.
        progress: show bars.
        say: receives one line for each training.

    Returns:
        the files, one for each of ``settings``, old and new.

    Raises:
        ValueError: settings of more than one size.
    """
    from usf.detectors import FlowOptions, backbones
    from usf.study.features import cache_key

    if len(sizes := {setting.size for setting in settings}) != 1:
        raise ValueError(f"settings of sizes {sorted(sizes)}: one size at a time, for they share their features")
    (size,) = sizes
    chosen = backbones.resolve(weights, backbone="resnet18", layers=LAYERS, announce=None)
    known, targets = _on_file(folder), []
    shown = (chosen.sha256[:12], images.manifest.sha256[:12], str(len(images.train)), str(len(images.test)))
    for setting in settings:
        own = (setting.hash(fiber_batch_size), *shown)
        named = folder / f"{images.name}-{setting.name}-{records.settings_hash(own)}.csv"
        targets.append((setting, known.get((images.name, *own), named)))
    waiting = [(setting, path) for setting, path in targets if not path.is_file()]
    run_name = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    if waiting:
        records.write_json(folder / "runs" / f"{run_name}.json", records.provenance(PACKAGES))
        backbone = backbones.build(chosen)
        train, test = (
            extract(backbone, files, size, cache=cache, key=cache_key(chosen), progress=progress)
            for files in (images.train, [sample.path for sample in images.test])
        )
        masks, normal = load_masks(images.test, size), ~torch.as_tensor(images.labels)
    for setting, path in waiting:
        options = FlowOptions(coupling=setting.coupling, mixing=setting.mixing)  # type: ignore[arg-type]
        model = detection.build(
            "cflow",
            size,
            chosen,
            options,
            seed=setting.seed,
            loss=setting.loss_kind,  # type: ignore[arg-type]
            layers=LAYERS,
            fiber_batch_size=fiber_batch_size,
        )
        rows: list[dict[str, Any]] = []
        shared = dataclasses.asdict(setting) | {
            "category": images.name,
            "fiber_batch_size": fiber_batch_size,
            "train_images": len(images.train),
            "test_images": len(images.test),
            "parameters": sum(parameter.numel() for parameter in model.trainable_parameters()),
            "weights_sha256": chosen.sha256[:12],
            "manifest_sha256": images.manifest.sha256[:12],
            "settings_hash": setting.hash(fiber_batch_size),
            "revision": records.git_revision(),
            "run": run_name,
            "status": "ok",
        }

        def watch(
            model: DetectorModel,
            history: detection.FitHistory,
            rows: list[dict[str, Any]] = rows,
            shared: dict[str, Any] = shared,
        ) -> None:
            latents = _test_latents(model, test)
            levels = _log_probs(latents)
            measured = {
                "epoch": history.epochs,
                "steps": history.steps,
                "loss": history.losses[-1],
                "seconds": history.seconds,
                "max_log_prob": max(float(level.max()) for level in levels),
                "max_log_prob_normal": max(float(level[normal].max()) for level in levels),
                "nonfinite": sum(int((~torch.isfinite(level)).sum()) for level in levels),
            }
            for way, maps in ways_to_score(model, latents).items():
                areas = {
                    "image_auroc": _area(images.labels, maps.amax(dim=(1, 2)).numpy()),
                    "pixel_auroc": _area(masks, maps.numpy()),
                }
                rows.append(shared | measured | {"way": way} | areas)

        started = time.perf_counter()
        try:
            detection.fit(
                model,
                train,
                epochs=setting.epochs,
                batch_size=setting.batch_size,
                seed=setting.seed,
                watch=watch,
                progress=progress,
                label=f"CFlow {setting.coupling} {setting.mixing} seed {setting.seed}",
            )
        except detection.NotFiniteError as error:
            failure = {"status": "failed", "error": " ".join(str(error).split()), "epoch": error.epoch}
            rows.append(shared | failure | {"steps": error.steps, "seconds": time.perf_counter() - started})
            said = f"failed: {error}"
        else:
            last = {row["way"]: row["image_auroc"] for row in rows if row["epoch"] == setting.epochs}
            said = f"image AUROC {last}"
        records.write_csv(path, rows, COLUMNS, digits=5)
        say(f"{path.stem}: {time.perf_counter() - started:.0f} s, {said}")
    return [path for _, path in targets]


def gather(folder: Path, out: Path) -> list[dict[str, Any]]:
    """All files of ``folder`` as one CSV file, sorted, with the provenance of their runs beside it; returns the rows.

    Runs that the file beside ``out`` already knows are kept where their rows are.

    Raises:
        FileNotFoundError: no file in ``folder``.
    """
    known = _on_file(folder)
    if not known:
        raise FileNotFoundError(f"no records in {folder}: run python -m usf.study.rescoring first")
    rows = []
    for path in sorted(set(known.values())):
        for names, row in zip(_names(path), records.read_csv(path), strict=True):
            if known[tuple(names.values())] == path:  # once, where two files have it
                # Files from before a training could fail have no column that says so.
                hashes = {name: value for name, value in names.items() if name.endswith(("hash", "sha256"))}
                rows.append({"run": None, "status": "ok", "error": None} | row | hashes)
    beside = out.with_suffix(".json")
    origins = json.loads(beside.read_text("utf8")) if beside.is_file() else {}
    origins |= {path.stem: json.loads(path.read_text("utf8")) for path in (folder / "runs").glob("*.json")}
    used = sorted({row["run"] for row in rows} & set(origins))
    records.write_csv(out, rows, COLUMNS, digits=5)
    records.write_json(beside, {name: origins[name] for name in used})
    return rows


_TRAINING = ["category", "coupling", "mixing", "loss_kind", "size", "batch_size", "epochs", "seed"]
"""Columns that tell trainings apart."""


def _parts(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows that were measured in trainings that reached their last epoch, one row for each training that failed)."""
    if "status" not in rows:  # records from before a training could fail
        return rows, rows[:0]
    failed = rows[rows["status"] == "failed"]
    lost = pd.MultiIndex.from_frame(failed[_TRAINING])
    return rows[~pd.MultiIndex.from_frame(rows[_TRAINING]).isin(lost)], failed


def summary(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(mean image AUROC in per cent after the last epoch, a row a way; the largest log-likelihoods).

    Means are over seeds. Both are of trainings that reached their last epoch; where one failed, the second table counts
    them. Models are told apart by class, flow and epochs, and by loss, size and batch where there are several.

    Args:
        rows: as :func:`gather` writes them.
    """
    whole, failed = _parts(rows)
    flow = rows["coupling"] + rows["mixing"].map({"lu": " + LU", "permutation": ""})
    several = [name for name in ("loss_kind", "size", "batch_size") if rows[name].nunique() > 1]
    names = ["category", "flow", *several, "epochs"]
    whole, failed = whole.assign(flow=flow[whole.index]), failed.assign(flow=flow[failed.index])
    last = whole[whole["epoch"] == whole["epochs"]]
    areas = 100 * last.pivot_table(values="image_auroc", index="way", columns=names, sort=False)
    one = whole[whole["way"] == "log_prob"]
    groups = one.groupby(names, sort=False)
    first, final = (
        part.groupby(names, sort=False)["max_log_prob"].max()
        for part in (one[one["epoch"] == 1], one[one["epoch"] == one["epochs"]])
    )
    fibres = {"seeds": groups["seed"].nunique(), "first epoch": first, "last epoch": final}
    table = pd.DataFrame(fibres | {"not finite": groups["nonfinite"].sum()})
    if len(failed):
        lost = failed.groupby(names)["seed"].nunique()
        table = table.reindex(table.index.union(lost.index, sort=False))
        table = table.assign(failed=lost.reindex(table.index))
        for name in ("seeds", "not finite", "failed"):
            table[name] = table[name].fillna(0).astype(int)
    return areas, table.reset_index()


def _rests(trainings: pd.DataFrame) -> str:
    """``"6 trainings (3 classes, 2 flows, 1 seed)"``: on what a sentence rests.

    Args:
        trainings: one row for each, with the columns that tell them apart.
    """
    kinds = {
        "class": trainings["category"].nunique(),
        "flow": len(trainings[["coupling", "mixing"]].drop_duplicates()),
        "seed": trainings["seed"].nunique(),
    }
    return f"{_many(len(trainings), 'training')} ({', '.join(_many(n, name) for name, n in kinds.items())})"


def _many(count: int, name: str) -> str:
    """``"1 seed"``, ``"2 classes"``."""
    return f"{count} {name}" + ("" if count == 1 else "es" if name.endswith("s") else "s")


def _combining(change: pd.Series) -> str:
    """H4's verdict: one to three points were predicted, of either sign, and not tens.

    Args:
        change: percent points, one a training.
    """
    mean, most = change.abs().mean(), change.abs().max()
    if most >= 10:
        size = "against the prediction, tens of points"
    elif most > 3:
        size = "more than the predicted one to three points, but not tens"
    elif mean < 1:
        size = "less than the predicted one to three points"
    else:
        size = "as predicted, one to three points"
    either = change.min() < 0 < change.max()
    return size + (", of either sign, as predicted" if either else ", of one sign, where either was predicted")


def outcomes(rows: pd.DataFrame) -> dict[str, str]:
    """What came of the hypotheses H1 to H4 in ``book/predictions.md``, a sentence each, with the number of trainings
    that it rests on; a hypothesis without a training that says anything about it is missing."""
    if rows.empty:
        return {}
    whole, failed = _parts(rows)
    last = whole[whole["epoch"] == whole["epochs"]]
    found = {}
    areas = pd.DataFrame(columns=list(WAYS))
    if last["image_auroc"].notna().any():
        areas = 100 * last.pivot_table(values="image_auroc", index=_TRAINING, columns="way").reindex(columns=list(WAYS))
        stock = areas[[way for way in WAYS if way.startswith("stock")]]
        apart = float((stock.max(axis=1) - stock.min(axis=1)).max())
        found["H1"] = (
            f"over {_rests(areas.reset_index())}, the ways of batching differ by {apart:.1f} points at most: "
            + ("as predicted, not the cause here" if apart <= 5 else "against the prediction, a cause")
        )
    one = whole[(whole["way"] == "stock, batches of 32") & (whole["coupling"] == "affine")].sort_values("epoch")
    if len(one):
        grown = one.groupby(_TRAINING)["max_log_prob"].agg(lambda values: values.iloc[-1] - values.iloc[0])
        fallen = one.groupby(_TRAINING)["image_auroc"].agg(lambda values: 100 * (values.max() - values.iloc[-1]))
        pixels = []
        for name, coupling in (("affine", "affine"), ("uniformly scaling", "additive")):
            own = whole[(whole["way"] == "log_prob") & (whole["coupling"] == coupling)].sort_values("epoch")
            change = own.groupby(_TRAINING)["pixel_auroc"].agg(lambda values: 100 * (values.iloc[-1] - values.iloc[0]))
            if len(change):
                pixels.append(f"the {name} model changes by {change.min():+.1f} to {change.max():+.1f} points")
                pixels[-1] += f" ({_many(len(change), 'training')})"
        found["H2"] = (
            f"over {_rests(grown.reset_index())}, from the first epoch to the last the affine model's likeliest fibre "
            f"gains {grown.min():.2f} to {grown.max():.2f} nats per channel; its image AUROC ends {fallen.max():.1f} "
            f"points below its best epoch, at most. In pixel AUROC of the log-likelihood {', '.join(pixels)}"
        )
    # All rows: those of a training that failed are about the epochs that it reached.
    count = int(rows.loc[rows["way"] == "log_prob", "nonfinite"].sum())
    trainings = rows[_TRAINING].drop_duplicates()
    found["H3"] = f"over {_rests(trainings)}, {count or 'no'} likelihoods that are not finite, and " + (
        f"{_many(len(failed), 'training')} broke off at a loss that is not" if len(failed) else "none broke off"
    )
    found["H3"] += ": against the prediction" if count or len(failed) else ": as predicted"
    change = (areas["sum of probabilities"] - areas["log_prob"]).dropna()
    if len(change):
        found["H4"] = (
            f"over {_rests(change.reset_index())}, adding probabilities instead of log-likelihoods changes the image "
            f"AUROC by {change.min():+.1f} to {change.max():+.1f} points, {change.abs().mean():.1f} in absolute value "
            f"on average: {_combining(change)}"
        )
    return found


def batches_in_words(rows: pd.DataFrame) -> tuple[str, float]:
    """What the batch does to the library's score of flows trained with the likelihood, for the prose.

    Args:
        rows: of :data:`COLUMNS`.

    Returns:
        sentences, empty where no affine flow was so trained and scored; and by how many points of image AUROC the
        library's score of one and the same affine model differs between batches, the largest of all models.
    """
    stock = [way for way in WAYS if way.startswith("stock")]

    def areas(coupling: str) -> pd.DataFrame:
        own = rows[(rows["loss_kind"] == "mle") & (rows["coupling"] == coupling) & (rows["status"] == "ok")]
        own = own[own["epoch"] == own["epochs"]]
        wide = own.pivot_table(index=["category", "epochs", "seed"], columns="way", values="image_auroc")
        return 100 * wide.reindex(columns=stock)

    def apart(found: pd.DataFrame) -> float:
        return float((found.max(axis=1) - found.min(axis=1)).max())

    if rows.empty or (affine := areas("affine")).empty:
        return "", 0.0
    mean = affine.mean()
    models = "One affine flow so trained was" if len(affine) == 1 else f"{len(affine)} affine flows so trained were"
    classes = ", ".join(sorted(set(affine.index.get_level_values("category"))))
    found = (
        f"{models} scored in every way ({classes}): a mean of {mean['stock, whole set']:.1f} with all test images in "
        f"one batch, {mean['stock, shuffled']:.1f} in shuffled batches of 32, {mean['stock, batches of 32']:.1f} in "
        f"batches of 32 in the order of the folder, {mean['stock, one by one']:.1f} image by image. Between two of "
        f"these the same weights differ by up to {apart(affine):.1f} points"
    )
    if not (uniform := areas("additive")).empty:
        found += f", those of {len(uniform)} uniformly scaling flow{'s' * (len(uniform) > 1)} by {apart(uniform):.1f}"
    return found + ".", apart(affine)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exits with 1 where a training failed."""
    parser = argparse.ArgumentParser(prog="python -m usf.study.rescoring", description="Train CFlow, score it in ways.")
    parser.add_argument("images", type=Path, nargs="?", help="folder of a class, in MVTec layout")
    parser.add_argument("--variants", nargs="+", default=["affine", "additive-lu"], help=", ".join(grid.VARIANTS))
    parser.add_argument("--seeds", nargs="+", default=["0"], help="as in: 0 1 2, or 0-4")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--loss", default="anomalib", choices=["anomalib", "mle"])
    parser.add_argument("--weights")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=paths.build("rescoring"), help="folder of the files")
    parser.add_argument(
        "--gather", type=Path, help="write all files of --out into this one; to add to it, copy it into --out first"
    )
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args(arguments)
    files = []
    if given.images:
        try:
            settings = [
                Rescoring(
                    coupling=variant.coupling,
                    mixing=variant.mixing,
                    seed=seed,
                    epochs=given.epochs,
                    size=given.size,
                    loss_kind=given.loss,
                )
                for seed in grid.whole_numbers(given.seeds)
                for variant in grid.variants(given.variants)
            ]
            images = read(given.images)
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
        files = run(
            images,
            settings,
            given.out,
            weights=given.weights,
            cache=given.cache,
            progress=not given.quiet,
        )
    if given.gather:
        gather(given.out, given.gather)
    return int(any(row.get("status") == "failed" for path in files for row in records.read_csv(path)))


if __name__ == "__main__":
    sys.exit(main())
