"""One cell of the benchmark: a data set's class and a detector, with all the couplings and seeds asked for.

All trainings of a cell share one set of frozen features. Each leaves one file of records, written whole or not at all,
when it is done; a training that has its file is not run again, so that a cell that was stopped, however it was stopped,
goes on where it was. A training that fails leaves a record that says why, and the others go on.

::

    python -m usf.study.benchmark mvtec bottle fastflow --variants affine additive-lu --seeds 0-4 --profile book

runs a cell from the command line; :func:`run_cell` does it from Python, and hands over every trained model's curves and
maps on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from usf import paths
from usf.detectors import backbones
from usf.detectors.backbones import Weights
from usf.study import detection, schema
from usf.study.catalogue import DATASETS
from usf.study.detection import Evaluation, FitHistory, NotFiniteError, Stopping
from usf.study.features import Features, cache_key, extract
from usf.study.grid import PAPER, VARIANTS, Variant, variants, whole_numbers
from usf.study.grid import folder as profile_folder
from usf.study.images import ImageFolder, hold_out, load_masks, read, read_class
from usf.study.metrics import average_precision, pixel_metrics
from usf.study.profile import select
from usf.study.records import git_revision, hardware, settings_hash
from usf.study.schema import Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from usf.detectors.model import DetectorModel

__all__ = ["Cell", "Outcome", "cell", "find_images", "run_cell"]

SHARED = {"mvtec": "mvtec_ad_256", "hazelnut_toy": "hazelnut_toy_256"}
"""Data set -> its folder under ``../shared/images``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What to train and how. The defaults are section 5.1's, but for the stopping rule, which it does not name.

    Attributes:
        dataset, category, detector, profile, backbone, size, epochs, diagonal, global_scale, match_parameters,
            train_layer_norm, loss: as the columns of :class:`usf.study.schema.Record`.
        variants: couplings and mixings.
        seeds: one training each, of every variant.
        layers: stages of a ResNet.
        scores: every trained model is scored in each of these ways.
        stopping: see :func:`usf.study.detection.fit`. ``"paper"`` selects the epoch on test images; its rows say so.
        patience: epochs, unless ``stopping`` is ``"fixed"``.
        val_share: of the training images, held out: needed to stop ``"normal"``, and never trained on.
        watch_score: whose image AUROC ``"paper"`` goes by.
        trace: epochs after which the test images are scored too. Nothing is decided by that.
        batch_size: images.
        score_batch: images that are scored together; changes CFlow's ``"anomalib"`` score and no other.
        lr: learning rate, ``None`` for the detector's own.
        model: other arguments of the detector's model.
        train_images, per_kind: at most so many training images, and test images of a kind; ``None`` for all.

    Raises:
        ValueError: values that contradict each other.
    """

    dataset: str
    category: str
    detector: detection.Detector
    profile: schema.Profile
    variants: tuple[Variant, ...] = PAPER
    seeds: tuple[int, ...] = (0, 1, 2)
    backbone: str = "resnet18"
    layers: tuple[str, ...] = backbones.LAYERS
    size: int = 256
    epochs: int = 100
    batch_size: int = 32
    lr: float | None = None
    diagonal: schema.Diagonal = "fixed"
    global_scale: bool = True
    match_parameters: bool = False
    train_layer_norm: bool = True
    loss: schema.Loss = "anomalib"
    scores: tuple[schema.Score, ...] = ("norm", "log_prob", "anomalib")
    stopping: Stopping = "fixed"
    patience: int = 3
    val_share: float = 0.0
    watch_score: schema.Score = "anomalib"
    trace: tuple[int, ...] = ()
    score_batch: int = 32
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_images: int | None = None
    per_kind: int | None = None

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds or not self.scores:
            raise ValueError("a cell needs at least one variant, one seed and one score")
        for name, allowed in (("stopping", Stopping), ("loss", schema.Loss), ("profile", schema.Profile)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(get_args(allowed))}")
        if unknown := set(self.scores) - set(get_args(schema.Score)):
            raise ValueError(f"scores: {', '.join(sorted(unknown))} unknown, choose among {get_args(schema.Score)}")
        if self.detector not in detection.MODELS:
            raise ValueError(f"detector={self.detector!r}: choose one of {', '.join(detection.MODELS)}")
        if self.stopping == "normal" and not self.val_share:
            raise ValueError("stopping='normal' needs val_share: the share of the training images to hold out")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share={self.val_share}: a share in [0, 1) is needed")
        if self.stopping == "paper" and self.watch_score not in self.scores:
            raise ValueError(f"stopping='paper' watches the score {self.watch_score!r}, which is not among the scores")
        if wrong := [epoch for epoch in self.trace if not 1 <= epoch <= self.epochs]:
            raise ValueError(f"trace: epochs {wrong} are not among the {self.epochs}")

    def settings(self) -> dict[str, Any]:
        """Everything that can change a result and is no column of a record."""
        stopping: dict[str, Any] = {"rule": self.stopping}
        if self.stopping != "fixed":
            stopping["patience"] = self.patience
        if self.stopping == "paper":
            stopping["watches"] = f"image AUROC of the test images, score {self.watch_score}"
        return {
            "batch_size": self.batch_size,
            "lr": self.lr,
            "stopping": stopping,
            "val_share": self.val_share,
            "score_batch": self.score_batch,
            "model": dict(self.model),
            "images": {"train": self.train_images, "per_kind": self.per_kind},
        }

    @property
    def protocol(self) -> schema.Protocol:
        """Of the rows that are scored after training."""
        return "paper" if self.stopping == "paper" else "main"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one training of a cell.

    Attributes:
        variant, seed: which one.
        records: its rows, as they are on file.
        resumed: whether they were on file already; nothing was trained then, and the rest is empty.
        history: of the training; ``None`` where it failed.
        evaluations: of the test images, by score.
    """

    variant: Variant
    seed: int
    records: tuple[Record, ...]
    resumed: bool = False
    history: FitHistory | None = None
    evaluations: Mapping[schema.Score, Evaluation] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether any of its rows is about a failure."""
        return any(record.status == "failed" for record in self.records)


def cell(
    dataset: str,
    category: str,
    detector: detection.Detector,
    *,
    profile: str,
    variants: Sequence[Variant] = PAPER,
    seeds: Sequence[int] = (0,),
    **changes: Any,
) -> Cell:
    """The settings of a profile, with ``changes``.

    ``full`` is section 5.1: each detector on its own backbone, at most a hundred epochs, stopped three epochs after the
    best likelihood of a held-out tenth of the normal images. ``book`` and ``smoke`` put all three on the ResNet-18
    trunk, at a size and for a number of epochs that processor cores can bear.
    """
    if detector not in detection.MODELS:
        raise ValueError(f"detector={detector!r}: choose one of {', '.join(detection.MODELS)}")
    trunk: dict[str, Any] = {"backbone": "resnet18", "layers": backbones.LAYERS}
    whole: dict[str, Any] = {"stopping": "fixed", "val_share": 0.0, "train_images": None, "per_kind": None}
    paper: dict[str, dict[str, Any]] = {
        "fastflow": {**trunk, "size": 256},
        "cflow": {"backbone": "wide_resnet50_2", "layers": ("layer2", "layer3", "layer4"), "size": 256},
        "uflow": {"backbone": "mcait", "layers": backbones.LAYERS, "size": 448},
    }
    epochs = {"fastflow": 8, "cflow": 2, "uflow": 8}[detector]
    settings = select(
        profile,
        smoke={**trunk, **whole, "size": 64, "epochs": 1, "batch_size": 8, "train_images": 12, "per_kind": 2},
        book={**trunk, **whole, "size": 128, "epochs": epochs, "batch_size": 8},
        full={**paper[detector], **whole, "epochs": 100, "batch_size": 32, "stopping": "normal", "val_share": 0.1},
    )
    return Cell(
        dataset=dataset,
        category=category,
        detector=detector,
        profile=profile,  # type: ignore[arg-type]  # checked above
        variants=tuple(variants),
        seeds=tuple(seeds),
        **{**settings, **changes},
    )


def find_images(dataset: str, category: str, images: str | Path | None = None, *, small: bool = False) -> ImageFolder:
    """The images of a class, checked: a folder in MVTec layout, what lies under ``../shared``, or the built-in set.

    Args:
        dataset, category: as in a record.
        images: the folder of the class, or for MVTec AD and VisA the one of all classes; ``None`` (or ``""``) to look
            for it.
        small: of the built-in set, the first few images of every kind.

    Raises:
        FileNotFoundError: nothing was given and nothing is found, with the remedy.
        ImageFolderError: a folder that cannot be used as it is.
    """
    if images:
        if dataset in DATASETS and not (Path(images) / "train").is_dir():
            return read_class(dataset, images, category)
        return read(images)
    if dataset == "textures":
        from usf.study import textures

        return read(textures.ensure(small=small))
    if dataset in SHARED and (beside := paths.shared("images", SHARED[dataset], category)):
        return read(beside)
    raise FileNotFoundError(
        f"no images of {dataset}/{category}: give the folder of the class (--images, or the parameter images), "
        "in MVTec layout"
    )


# --- Running ----------------------------------------------------------------------------------------------------------


def run_cell(
    cell: Cell,
    images: ImageFolder,
    folder: Path,
    *,
    weights: Weights | None = None,
    cache: Path | None = None,
    device: str | None = None,
    retry_failed: bool = False,
    progress: bool = True,
    elsewhere: Sequence[Record] = (),
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Record]:
    """Train and score all models of a cell that have no records yet, one file of records each.

    Stopped at any point, by an exception, a signal or a power cut, it has lost the model that was being trained and
    nothing else. Two processes with the same cell do the same work twice and spoil nothing; the caller may keep them
    apart with :func:`usf.study.jobs.hold`.

    Args:
        cell: what to train.
        images: of the class, see :func:`find_images`.
        folder: where the records go.
        weights: of the backbone, by default those that :func:`usf.detectors.backbones.resolve` finds.
        cache: folder of a feature cache; ``None`` keeps features in memory.
        device: ``"cpu"`` or ``"cuda"``; by default the GPU where there is one.
        retry_failed: train again what has failed before.
        progress: show bars.
        elsewhere: records that another study has on file. A training that is among them, of the same images and weights
            of the backbone, is not repeated, and gets no file here.
        on_outcome: called after each training, with its curves and maps, and for each that was on record already.

    Returns:
        the records of all trainings of the cell, old and new, in order.

    Raises:
        ValueError: images of another class than the cell's.
        RecordError: a file of records that does not fit the schema.
    """
    if images.name != cell.category:
        raise ValueError(f"the images are of {images.name}, the cell is about {cell.category}")
    images = images.subset(cell.train_images, cell.per_kind)
    weights = weights or backbones.resolve(backbone=cell.backbone, layers=cell.layers)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(cell, images, folder, weights, cache, device, progress, elsewhere)
    found: list[Record] = []
    jobs = [(variant, seed) for seed in cell.seeds for variant in cell.variants]
    for number, (variant, seed) in enumerate(jobs, start=1):
        known = run.known(variant, seed, retry_failed)
        if known is not None:
            outcome = Outcome(variant, seed, tuple(known), resumed=True)
        else:
            outcome = run.train(variant, seed, f"{number}/{len(jobs)}")
        found.extend(outcome.records)
        if on_outcome is not None:
            on_outcome(outcome)
    return found


class _Run:
    """A cell while it runs: what its trainings share, made when the first of them needs it."""

    def __init__(
        self,
        cell: Cell,
        images: ImageFolder,
        folder: Path,
        weights: Weights,
        cache: Path | None,
        device: str,
        progress: bool,
        elsewhere: Sequence[Record] = (),
    ) -> None:
        self.cell, self.images, self.folder, self.weights = cell, images, folder, weights
        self.cache, self.device, self.progress = cache, device, progress
        self.settings = cell.settings()
        self.elsewhere: dict[tuple[Any, ...], list[Record]] = {}
        for record in elsewhere:
            self.elsewhere.setdefault(_same(record), []).append(record)
        self.shared: tuple[Features, Features] | None = None
        self.masks: NDArray[Any] | None = None
        self.seconds_features = 0.0
        gpu = device.startswith("cuda")
        known = hardware()
        self.fixed: dict[str, Any] = {
            "dataset": cell.dataset,
            "category": cell.category,
            "detector": cell.detector,
            "backbone": cell.backbone,
            "layers": _layers(weights),
            "size": cell.size,
            "diagonal": cell.diagonal,
            "global_scale": cell.global_scale,
            "match_parameters": cell.match_parameters,
            "train_layer_norm": cell.train_layer_norm,
            "loss": cell.loss,
            "profile": cell.profile,
            "epochs": cell.epochs,
            "settings": settings_hash(self.settings),
            "test_images": len(images.test),
            "test_anomalous": int(images.labels.sum()),
            "device": "cuda" if gpu else "cpu",
            "hardware": str(known["gpu"] if gpu else known["cpu"]),
            "threads": torch.get_num_threads(),
            "revision": git_revision(),
            "versions": _versions(),
            "weights": weights.tag,
            "weights_sha256": weights.sha256,
            "manifest_sha256": images.manifest.sha256,
        }

    def row(self, variant: Variant, seed: int, **values: Any) -> Record:
        """A record of a training; by default one that failed before it began."""
        start: dict[str, Any] = {
            "status": "failed",
            "error": "not run",
            "epochs_run": 0,
            "steps": 0,
            "parameters": 0,
            "train_images": 0,
            "val_images": 0,
            "seconds": 0.0,
            "started": _now(),
            "initial_sha256": "",
            "protocol": self.cell.protocol,
            "score": self.cell.scores[0],
        }
        made = {"coupling": variant.coupling, "mixing": variant.mixing, "seed": seed}
        return Record(**{**self.fixed, **made, **start, **values})

    def known(self, variant: Variant, seed: int, retry_failed: bool) -> list[Record] | None:
        """The records of a training, where they are all on file; else ``None``."""
        training = self.row(variant, seed)
        path = self.folder / schema.file_name(training)
        records = schema.read(path) if path.is_file() else self.elsewhere.get(_same(training), [])
        main = {record.score: record for record in records if record.protocol == self.cell.protocol}
        if not set(self.cell.scores) <= set(main):
            return None
        failed = any(record.status == "failed" for record in main.values())
        if failed:
            return None if retry_failed else records
        traced = {(record.score, record.epoch) for record in records if record.protocol == "trace"}
        last = max(record.epochs_run for record in main.values())
        wanted = {(score, epoch) for score in self.cell.scores for epoch in self.cell.trace if epoch <= last}
        return records if wanted <= traced else None

    def features(self) -> tuple[Features, Features]:
        """Of the training and the test images, once."""
        if self.shared is None:
            start = time.perf_counter()
            network = backbones.build(self.weights).to(self.device)
            test = [sample.path for sample in self.images.test]
            self.shared = tuple(  # type: ignore[assignment]  # two
                extract(
                    network,
                    files,
                    self.cell.size,
                    cache=self.cache,
                    key=cache_key(self.weights),
                    progress=self.progress,
                    label=f"{self.images.name} {part}",
                ).to(self.device)
                for part, files in (("train", self.images.train), ("test", test))
            )
            if self.images.has_masks:
                self.masks = load_masks(self.images.test, self.cell.size)
            self.seconds_features = time.perf_counter() - start
        assert self.shared is not None  # made above
        return self.shared

    def train(self, variant: Variant, seed: int, number: str) -> Outcome:
        """Train, score, and write the records of one model."""
        train, test = self.features()
        training = _Training(self, variant, seed, f"{self.images.name} {variant.name} seed {seed} ({number})")
        try:
            training.fit(train, test)
        except Exception as error:  # whatever it is, the row says so, and the next model may do better
            training.fail(error)
        schema.write_records(training.rows, self.folder, settings=self.settings)
        return Outcome(variant, seed, tuple(training.rows), False, training.finished, training.evaluations)


class _Training:
    """One training of a cell, and its rows so far."""

    def __init__(self, run: _Run, variant: Variant, seed: int, label: str) -> None:
        self.run, self.variant, self.seed, self.label = run, variant, seed, label
        self.rows: list[Record] = []
        self.evaluations: dict[schema.Score, Evaluation] = {}
        self.finished: FitHistory | None = None
        self.history: FitHistory | None = None
        self.start = time.perf_counter()
        self.memory = _Memory(run.device)
        self.values: dict[str, Any] = {"started": _now()}

    def fit(self, features: Features, test: Features) -> None:
        """Train, and score what was trained."""
        from usf.detectors import FlowOptions

        cell = self.run.cell
        train, val = features, None
        if cell.val_share:
            files = self.run.images.train
            kept, held = hold_out(files, cell.val_share, self.seed)
            place = {path: index for index, path in enumerate(files)}
            train, val = (features.subset([place[path] for path in part]) for part in (kept, held))
        self.values |= {
            "train_images": len(train),
            "val_images": 0 if val is None else len(val),
            "seconds_features": self.run.seconds_features,
        }
        options = FlowOptions(
            self.variant.coupling,  # type: ignore[arg-type]  # checked there
            self.variant.mixing,  # type: ignore[arg-type]
            cell.diagonal,
            cell.global_scale,
            cell.train_layer_norm,
            cell.match_parameters,
        )
        model_options = dict(cell.model)
        if cell.detector == "cflow":
            model_options["layers"] = self.run.weights.layers
        model = detection.build(
            cell.detector, cell.size, self.run.weights, options, seed=self.seed, loss=cell.loss, **model_options
        ).to(self.run.device)
        self.values |= {
            "parameters": sum(parameter.numel() for parameter in model.trainable_parameters()),
            "initial_sha256": detection.initial_digest(model),
        }
        watches = bool(cell.trace) or cell.stopping == "paper"

        def watch(model: DetectorModel, history: FitHistory) -> float | None:
            self.history = history
            return self.look(model, history, test) if watches else None

        history = detection.fit(
            model,
            train,
            epochs=cell.epochs,
            batch_size=cell.batch_size,
            lr=cell.lr,
            seed=self.seed,
            stopping=cell.stopping,
            patience=cell.patience,
            val=val,
            watch=watch,
            progress=self.run.progress,
            label=self.label,
        )
        self.history = history
        self.evaluations = self.score(model, test, cell.protocol, history.best_epoch, history)
        train_nll = _finite(detection.nll(model, train))
        self.rows = [
            dataclasses.replace(row, train_nll=train_nll) if row.protocol == cell.protocol else row for row in self.rows
        ]
        self.finished = history

    def look(self, model: DetectorModel, history: FitHistory, test: Features) -> float | None:
        """After an epoch: rows of the trace, and the value that the paper's rule goes by."""
        cell = self.run.cell
        if history.epochs in cell.trace:
            found = self.score(model, test, "trace", history.epochs, history)
            if cell.stopping == "paper":
                return found[cell.watch_score].image_auroc(self.run.images.labels)
        elif cell.stopping == "paper":
            score = cell.watch_score
            result = detection.evaluate(model, test, score=score, batch_size=cell.score_batch)
            return result.image_auroc(self.run.images.labels)
        return None

    def score(
        self, model: DetectorModel, test: Features, protocol: schema.Protocol, epoch: int, history: FitHistory
    ) -> dict[schema.Score, Evaluation]:
        """Score the test images in every way; one row each."""
        cell, images, masks = self.run.cell, self.run.images, self.run.masks
        start = time.perf_counter()
        found = detection.evaluate_scores(model, test, cell.scores, batch_size=cell.score_batch)
        seconds = (time.perf_counter() - start) / len(cell.scores)
        shared = {
            "protocol": protocol,
            "epochs_run": history.epochs,
            "steps": history.steps,
            "seconds": history.seconds,
        }
        for score, result in found.items():
            start = time.perf_counter()
            values: dict[str, Any] = {"score": score, "nonfinite": result.nonfinite, **shared}
            try:
                result.check(f"{model.label} (coupling {self.variant.coupling}), score {score}")
            except NotFiniteError as error:
                if protocol == "trace":
                    values["epoch"] = epoch
                self.rows.append(self.failure(error, **values))
                continue
            values |= {
                "status": "ok",
                "error": "",
                "epoch": epoch,
                "image_auroc": result.image_auroc(images.labels),
                "image_ap": average_precision(images.labels, result.scores),
                "val_nll": _finite(history.val[epoch - 1]) if history.val else None,
                "log_det_std": _finite(result.log_det_std),
            }
            if masks is not None:
                pixels = pixel_metrics(masks, result.maps)
                values |= {"pixel_auroc": pixels.auroc, "aupro": pixels.aupro}
            values["seconds_score"] = seconds + time.perf_counter() - start
            self.rows.append(self.row(**values))
        return found

    def row(self, **values: Any) -> Record:
        """A row of this training."""
        return self.run.row(self.variant, self.seed, **{**self.values, "memory_mb": self.memory.peak(), **values})

    def failure(self, error: Exception, **values: Any) -> Record:
        """A row that says what went wrong."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return self.row(status="failed", error=text[: schema.ERROR_LENGTH], **values)

    def fail(self, error: Exception) -> None:
        """Rows of a training that broke off; those of its trace stay."""
        values: dict[str, Any] = {"seconds": time.perf_counter() - self.start}
        if self.history is not None:
            values |= {"epochs_run": self.history.epochs, "steps": self.history.steps}
        if isinstance(error, NotFiniteError) and error.epoch is not None:
            values |= {"epochs_run": error.epoch - 1, "steps": error.steps}
        self.rows = [row for row in self.rows if row.protocol == "trace"]
        self.rows += [self.failure(error, score=score, **values) for score in self.run.cell.scores]


class _Memory:
    """Peak memory of the device since it was made: of the process on a CPU, of what torch allocated on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # then the peak is that of the process since it began
                Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use now

    def peak(self) -> float | None:
        """In 10^6 bytes; ``None`` where the system does not say."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        kilobytes = [float(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return kilobytes[0] * 1024 / 1e6 if kilobytes else None


def _finite(value: float) -> float | None:
    """A record has an empty cell where a number is not finite."""
    return value if math.isfinite(value) else None


def _same(record: Record) -> tuple[Any, ...]:
    """Equal for records of one training, on the same images and with the same backbone."""
    return *record.training, record.weights_sha256, record.manifest_sha256


def _layers(weights: Weights) -> str:
    if weights.backbone == "mcait":
        return "+".join(f"block{cait.depth}" for cait in backbones.MCAIT)
    return "+".join(weights.layers)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in ("torch", "anomalib", "timm", "numpy"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


# --- Command line -----------------------------------------------------------------------------------------------------


EPILOG = """\
examples (usf benchmark is the same command):
  python -m usf.study.benchmark textures weave fastflow --profile smoke
  python -m usf.study.benchmark mvtec bottle fastflow --variants affine additive-lu --seeds 0-4
  python -m usf.study.benchmark my_parts nut cflow --images my_parts/nut --epochs 4

Stop it whenever you like, and start it again with the same arguments: it goes on where it was.

exit codes:
  0    every training is on record
  1    a training failed; its record says why
  2    a wrong command, folder or file; nothing was done
  130  stopped with Ctrl-C
  143  told to end
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m usf.study.benchmark",
        description="Train and score the models of one cell that have no records yet.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="mvtec, hazelnut_toy, textures, or a name of your own with --images")
    parser.add_argument("category", help="the class, as its folder is called")
    parser.add_argument("detector", choices=list(detection.MODELS))
    parser.add_argument("--variants", nargs="+", default=["affine", "additive-lu"], help=", ".join(VARIANTS))
    parser.add_argument("--seeds", nargs="+", default=["0"], help="as in: 0 1 2, or 0-4")
    parser.add_argument("--profile", default="book", choices=get_args(schema.Profile))
    parser.add_argument("--images", help="folder of the class, in MVTec layout")
    parser.add_argument("--weights", help="a safetensors file, 'hub' or 'random'; by default what is found")
    parser.add_argument("--out", type=Path, help="folder of the records; by default build/benchmark/PROFILE/records")
    parser.add_argument("--cache", type=Path, help="folder of the feature cache; by default the user's")
    parser.add_argument("--no-cache", action="store_true", help="keep features in memory")
    parser.add_argument("--device", choices=get_args(schema.Device))
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument("--retry-failed", action="store_true", help="train again what has failed before")
    parser.add_argument("--quiet", action="store_true", help="no bars")
    change = parser.add_argument_group("what the profile sets")
    change.add_argument("--size", type=int, help="pixels")
    change.add_argument("--epochs", type=int)
    change.add_argument("--batch-size", type=int)
    change.add_argument("--lr", type=float)
    change.add_argument("--loss", choices=get_args(schema.Loss))
    change.add_argument("--backbone", choices=list(backbones.BACKBONES))
    change.add_argument("--layers", nargs="+")
    change.add_argument("--scores", nargs="+", choices=get_args(schema.Score))
    change.add_argument("--stopping", choices=get_args(Stopping))
    change.add_argument("--patience", type=int)
    change.add_argument("--val-share", type=float)
    change.add_argument("--trace", nargs="+", help="epochs after which to score the test images, as in: 1 2 5-10")
    change.add_argument("--model", type=json.loads, help="arguments of the detector's model, as JSON")
    change.add_argument("--train-images", type=int)
    change.add_argument("--per-kind", type=int)
    for name in ("global-scale", "match-parameters", "train-layer-norm"):
        change.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    change.add_argument("--diagonal", choices=get_args(schema.Diagonal))
    return parser


CHANGES = (
    "size", "epochs", "batch_size", "lr", "loss", "backbone", "layers", "scores", "stopping", "patience", "val_share",
    "trace", "model", "train_images", "per_kind", "global_scale", "match_parameters", "train_layer_norm", "diagonal",
)  # fmt: skip


def _stop(number: int, frame: object) -> None:
    del frame
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exits with 1 where a training failed, with 143 when it is told to end."""
    from usf.study.jobs import hold  # Linux's and macOS's alone, where everything else here runs anywhere

    parser = _parser()
    given = parser.parse_args(arguments)
    # As with Ctrl-C: what is half written is cleared away.
    signal.signal(signal.SIGTERM, _stop)
    if given.threads:
        torch.set_num_threads(given.threads)
    changes = {name: getattr(given, name) for name in CHANGES if getattr(given, name) is not None}
    try:
        if "trace" in changes:
            changes["trace"] = whole_numbers(changes["trace"])
        for name in ("layers", "scores"):
            if name in changes:
                changes[name] = tuple(changes[name])
        chosen = cell(
            given.dataset,
            given.category,
            given.detector,
            profile=given.profile,
            variants=variants(given.variants),
            seeds=whole_numbers(given.seeds),
            **changes,
        )
        images = find_images(given.dataset, given.category, given.images, small=given.profile == "smoke")
        weights = backbones.resolve(given.weights, backbone=chosen.backbone, layers=chosen.layers)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.error(str(error))
    print(images.describe(), flush=True)

    def report(outcome: Outcome) -> None:
        for record in outcome.records:
            if record.protocol != chosen.protocol:
                continue
            what = f"failed: {record.error}" if record.status == "failed" else _line(record)
            note = " (on record)" if outcome.resumed else ""
            print(f"{outcome.variant.name} seed {outcome.seed}, {record.score}: {what}{note}", flush=True)

    if given.out:
        out, locks = given.out, given.out / ".locks"
    else:  # where the notebook of a cell looks, too
        where = profile_folder(given.profile)
        out, locks = where / "records", where / "locks"
    with hold(locks / f"{given.dataset}-{given.category}-{given.detector}.lock"):
        records = run_cell(
            chosen,
            images,
            out,
            weights=weights,
            cache=None if given.no_cache else given.cache or paths.cache("features"),
            device=given.device,
            retry_failed=given.retry_failed,
            progress=not given.quiet,
            on_outcome=report,
        )
    return int(any(record.status == "failed" for record in records))


def _line(record: Record) -> str:
    numbers = {"image AUROC": record.image_auroc, "pixel AUROC": record.pixel_auroc, "AUPRO": record.aupro}
    shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in numbers.items() if value is not None)
    return f"{shown}; epoch {record.epoch} of {record.epochs_run}, {record.seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
