"""Records of the benchmark: what a row holds, and files that hold rows.

One :class:`Record` is one row: one trained model, scored in one way. The fields of that class are the schema; nothing
else defines it. Whoever trains writes records, whoever reads them gets them checked, or an error that names the file,
the row, the column and the remedy.

A running study writes one small JSON file for each training, under a name that follows from what was trained
(:func:`write_records`), so that a file is there whole or not at all, a training that is repeated replaces its file, and
any number of processes write side by side. :func:`merge` gathers them into one CSV file that is committed, with the
settings that the hashes stand for in a JSON file beside it. :func:`read` takes either kind, or a folder of both.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> record = example(category="bottle", seed=0, image_auroc=0.998)
>>> _ = write_records([record], folder / "records")
>>> path = merge(folder / "records", folder / "records.csv")
>>> read(path) == read(folder / "records") == [record]
True
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from usf.files import atomic_write
from usf.study.records import settings_hash, write_json

__all__ = [
    "COLUMNS",
    "ERROR_LENGTH",
    "METRICS",
    "TRAINING",
    "Coupling",
    "Detector",
    "Device",
    "Diagonal",
    "Loss",
    "Mixing",
    "Profile",
    "Protocol",
    "Record",
    "RecordError",
    "Score",
    "Status",
    "example",
    "file_name",
    "latest",
    "merge",
    "read",
    "read_settings",
    "write_records",
]

Detector = Literal["fastflow", "cflow", "uflow"]
Coupling = Literal["affine", "additive", "gin"]
Mixing = Literal["permutation", "lu"]
Diagonal = Literal["fixed", "learned"]
Loss = Literal["mle", "anomalib"]
Score = Literal["norm", "log_prob", "anomalib"]
Protocol = Literal["main", "paper", "trace"]
Profile = Literal["smoke", "book", "full"]
Status = Literal["ok", "failed"]
Device = Literal["cpu", "cuda"]

METRICS = ("image_auroc", "pixel_auroc", "aupro", "image_ap")
"""Columns that hold a metric, each in [0, 1]."""
DIGESTS = ("weights_sha256", "manifest_sha256", "initial_sha256")
DIGEST_LENGTH = 16
"""Hexadecimal digits of a SHA-256 that a record keeps: 64 bits, enough to tell files apart."""
ERROR_LENGTH = 300


class RecordError(ValueError):
    """A record that does not fit the schema."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One trained model, scored in one way. ``None``, an empty cell, means "not measured", where a type allows it.

    What was trained, and how it was scored:

    Attributes:
        dataset: ``"mvtec"`` (MVTec AD), ``"visa"``, or another name in lower case (``"hazelnut_toy"``, ``"textures"``).
        category: the class, as its folder is called (``"bottle"``, ``"metal_nut"``).
        detector: ``"fastflow"``, ``"cflow"`` or ``"uflow"``.
        backbone: timm architecture (``"resnet18"``).
        layers: its stages, joined by ``+`` (``"layer1+layer2+layer3"``).
        size: height and width of the images in pixels.
        coupling, mixing, diagonal, global_scale, match_parameters, train_layer_norm:
            as in :class:`usf.detectors.FlowOptions`. The paper's base is affine with permutation, its USF additive with
            lu and a fixed diagonal.
        loss: ``"mle"`` (the negative log-likelihood), or ``"anomalib"`` (the detector's own).
        score: of images and pixels: ``"norm"`` (mean squared latent), ``"log_prob"``, or ``"anomalib"`` (its own map).
        protocol: ``"main"``: nothing is selected on test images. ``"paper"``: stopped early on, and scored at the best
            epoch of, the test set's image AUROC. ``"trace"``: scored after a given ``epoch``, to see how a result
            depends on the length of training; such rows are not in the tables.
        profile: ``"smoke"``, ``"book"`` or ``"full"``.
        epochs: at most as many.
        seed: of everything: initial weights, shuffles, held-out images.
        settings: :func:`usf.study.records.settings_hash` of all other settings that can change the result (learning
            rate, batch size, patience and what it watches, ...). Nothing that is a column, so that all couplings, seeds
            and classes of a study share one hash.

    What came of it:

    Attributes:
        status: ``"ok"`` or ``"failed"``. A training that fails has the same rows, for every score and protocol asked
            for, without metrics.
        error: of a failed run, one line, at most 300 characters: what, at which epoch. Empty otherwise.
        image_auroc, pixel_auroc, aupro, image_ap: in [0, 1]. A row that is ok has at least the first.
        epoch: whose weights were scored, counted from 1.
        epochs_run, steps: trained epochs and optimiser steps; of a failed run, those before it failed.
        train_nll, val_nll: nats per dimension at ``epoch``: of the training images, of held-out normal images.
        log_det_std: standard deviation over the test images of the log-determinant, nats; 0 for a USF.
        nonfinite: values (fibres, positions) without a finite likelihood among the test images' scores.
        parameters: trainable ones.
        train_images, val_images, test_images, test_anomalous: how many images of which kind.

    What it cost, and on what:

    Attributes:
        seconds: wall time of the training.
        seconds_features, seconds_score: wall time of extracting the features (once for all models that share them; the
            same figure in each of their rows) and of scoring the test images.
        memory_mb: peak memory of the device, in 10^6 bytes.
        device: ``"cpu"`` or ``"cuda"``.
        hardware: name of the GPU, or of the processor.
        threads: of the processor that the training used.

    Where it comes from:

    Attributes:
        started: UTC, ``2026-01-31T23:59:59Z``. Of two records of the same training the later one counts.
        revision: :func:`usf.study.records.git_revision`.
        versions: ``"python 3.11.7; torch 2.11.0; anomalib 2.7.0"``.
        weights: of the backbone: tag or file name (``"resnet18.tv_in1k"``), or ``"seed 0"``.
        weights_sha256, manifest_sha256, initial_sha256: SHA-256 of the backbone's weights, of the images (their
            manifest) and of the detector's initial weights. The first 16 digits are kept. Only a failed run may leave
            the last one empty.

    Raises:
        RecordError: a value of the wrong type or outside its range, naming the column and what is expected.
    """

    dataset: str
    category: str
    detector: Detector
    backbone: str
    layers: str
    size: int
    coupling: Coupling
    mixing: Mixing
    diagonal: Diagonal
    global_scale: bool
    match_parameters: bool
    train_layer_norm: bool
    loss: Loss
    score: Score
    protocol: Protocol
    profile: Profile
    epochs: int
    seed: int
    settings: str

    status: Status
    error: str = ""
    image_auroc: float | None = None
    pixel_auroc: float | None = None
    aupro: float | None = None
    image_ap: float | None = None
    epoch: int | None = None
    epochs_run: int
    steps: int
    train_nll: float | None = None
    val_nll: float | None = None
    log_det_std: float | None = None
    nonfinite: int | None = None
    parameters: int
    train_images: int
    val_images: int
    test_images: int
    test_anomalous: int

    seconds: float
    seconds_features: float | None = None
    seconds_score: float | None = None
    memory_mb: float | None = None
    device: Device
    hardware: str
    threads: int

    started: str
    revision: str
    versions: str
    weights: str
    weights_sha256: str
    manifest_sha256: str
    initial_sha256: str

    def __post_init__(self) -> None:
        for name, (kinds, optional) in _schema().items():
            _check(name, getattr(self, name), kinds, optional)
        for name in DIGESTS:
            object.__setattr__(self, name, getattr(self, name).lower()[:DIGEST_LENGTH])
        for name in _FLOATS:  # as the CSV file keeps them, so that a record read back is the record written
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, float(f"{value:.{DIGITS}g}"))
        _check_together(self)

    @property
    def training(self) -> tuple[Any, ...]:
        """What was trained: equal for the rows of one training (its scores, protocols and epochs)."""
        return tuple(getattr(self, name) for name in TRAINING)

    @property
    def key(self) -> tuple[Any, ...]:
        """What names a row; of two with the same key the later one counts. The epoch counts for ``"trace"`` alone."""
        epoch = self.epoch if self.protocol == "trace" else None
        return (*self.training, self.score, self.protocol, epoch)

    @property
    def variant(self) -> str:
        """The flow in short: ``"affine"``, ``"additive"``, ``"additive + LU"``, ``"gin + LU"``, ...

        A learned diagonal and a missing global scale are said, the usual fixed one and the usual scale are not.
        """
        mixing = {"permutation": "", "lu": " + LU" if self.diagonal == "fixed" else " + LU (learned diagonal)"}
        return self.coupling + mixing[self.mixing] + ("" if self.global_scale else ", no scale")

    @property
    def flow(self) -> Literal["base", "usf"] | None:
        """Which of the paper's two columns the model belongs to, ``None`` for what the paper's tables do not have."""
        flows: dict[str, Literal["base", "usf"]] = {"affine": "base", "additive + LU": "usf"}
        return flows.get(self.variant)


COLUMNS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(Record))
"""The columns, in their order."""
TRAINING: tuple[str, ...] = tuple(
    name for name in COLUMNS[: COLUMNS.index("settings") + 1] if name not in ("score", "protocol")
)
"""Columns that say what was trained."""
DIGITS = 6
"""Significant digits of a float in a record."""

_PATTERNS: dict[str, tuple[str, str]] = {
    "dataset": (r"[a-z][a-z0-9_]*", "a name in lower case, as mvtec, visa"),
    "category": (r"[A-Za-z0-9][A-Za-z0-9_.-]*", "the name of the class's folder, without spaces or slashes"),
    "backbone": (r"[a-z0-9][a-z0-9_.]*", "a timm architecture, as resnet18"),
    "layers": (r"[a-z0-9_.]+(\+[a-z0-9_.]+)*", "stages joined by +, as layer1+layer2+layer3"),
    "settings": (r"[0-9a-f]{12}", "12 hexadecimal digits from usf.study.records.settings_hash"),
    "started": (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "UTC as 2026-01-31T23:59:59Z"),
    "weights_sha256": (r"[0-9a-fA-F]{16,64}", "16 to 64 hexadecimal digits"),
    "manifest_sha256": (r"[0-9a-fA-F]{16,64}", "16 to 64 hexadecimal digits"),
    "initial_sha256": (r"([0-9a-fA-F]{16,64})?", "16 to 64 hexadecimal digits, or empty for a failed run"),
    "error": (rf"[^\n\r]{{0,{ERROR_LENGTH}}}", f"one line of at most {ERROR_LENGTH} characters"),
    "hardware": (r"[^\n\r]+", "the name of the GPU or processor"),
    "revision": (r"\S+", "usf.study.records.git_revision()"),
    "versions": (r"\S+ \S+(; \S+ \S+)*", "as python 3.11.7; torch 2.11.0"),
    "weights": (r"[^\n\r/\\]+", "a tag or file name, without a path"),
}
_MINIMUM: dict[str, int] = {
    "size": 1, "epochs": 1, "seed": 0, "epoch": 1, "epochs_run": 0, "steps": 0, "nonfinite": 0, "parameters": 0,
    "train_images": 0, "val_images": 0, "test_images": 0, "test_anomalous": 0, "threads": 1, "seconds": 0,
    "seconds_features": 0, "seconds_score": 0, "memory_mb": 0, "log_det_std": 0,
}  # fmt: skip


@functools.cache
def _schema() -> dict[str, tuple[tuple[Any, ...], bool]]:
    """Column -> (its type, or its allowed words), whether it may be empty)."""
    found: dict[str, tuple[tuple[Any, ...], bool]] = {}
    for name, hint in get_type_hints(Record).items():
        if name not in COLUMNS:
            continue
        optional = get_origin(hint) in (Union, types.UnionType)
        kind = next(part for part in get_args(hint) if part is not type(None)) if optional else hint
        words = get_args(kind) if get_origin(kind) is Literal else (kind,)
        found[name] = (words, optional)
    return found


_FLOATS = tuple(field.name for field in dataclasses.fields(Record) if "float" in str(field.type))


def _fault(name: str, value: Any, expected: str) -> RecordError:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return RecordError(f"column {name}: {shown}, expected {expected}")


def _check(name: str, value: Any, kinds: tuple[Any, ...], optional: bool) -> None:
    if value is None:
        if optional:
            return
        raise _fault(name, value, "a value: this column may not be empty")
    if isinstance(kinds[0], str):
        if value not in kinds:
            raise _fault(name, value, f"one of {', '.join(map(repr, kinds))}")
        return
    (kind,) = kinds
    fits = isinstance(value, bool) if kind is bool else isinstance(value, kind) and not isinstance(value, bool)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        fits = True
    if not fits:
        raise _fault(name, value, {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind])
    if kind is float and not math.isfinite(value):
        raise _fault(name, value, "a finite number; leave it empty where there is none, and count it in nonfinite")
    if name in METRICS and not 0 <= value <= 1:
        raise _fault(name, value, "a fraction in [0, 1], not percent")
    if name in _MINIMUM and value < _MINIMUM[name]:
        raise _fault(name, value, f"at least {_MINIMUM[name]}")
    if name in _PATTERNS and not re.fullmatch(_PATTERNS[name][0], value):
        raise _fault(name, value, _PATTERNS[name][1])


def _check_together(record: Record) -> None:
    """What columns say about each other."""
    if record.status == "failed":
        if not record.error.strip():
            raise _fault("error", record.error, "what failed and when: a failed run says why")
        for name in (*METRICS, "epoch"):
            if getattr(record, name) is not None and not (name == "epoch" and record.protocol == "trace"):
                raise _fault(name, getattr(record, name), "an empty cell: a failed run has no metrics")
    else:
        if record.error:
            raise _fault("error", record.error, "an empty cell, or status failed")
        for name in ("image_auroc", "epoch", "initial_sha256"):
            if getattr(record, name) in (None, ""):
                raise _fault(name, getattr(record, name), "a value: only a failed run goes without")
        if record.epoch is not None and not record.epoch <= record.epochs_run:
            raise _fault("epoch", record.epoch, f"at most the {record.epochs_run} epochs that were run")
    if record.protocol == "trace" and record.epoch is None:
        raise _fault("epoch", None, "the epoch that a row of protocol trace is about")
    if record.epochs_run > record.epochs:
        raise _fault("epochs_run", record.epochs_run, f"at most epochs, which is {record.epochs}")
    if record.test_anomalous > record.test_images:
        raise _fault("test_anomalous", record.test_anomalous, f"at most test_images, which is {record.test_images}")


def example(**changes: Any) -> Record:
    """A record with made-up values, for tests and doctests. Not a measurement."""
    values: dict[str, Any] = {
        "dataset": "mvtec", "category": "bottle", "detector": "fastflow", "backbone": "resnet18",
        "layers": "layer1+layer2+layer3", "size": 256, "coupling": "additive", "mixing": "lu", "diagonal": "fixed",
        "global_scale": True, "match_parameters": False, "train_layer_norm": True, "loss": "mle", "score": "norm",
        "protocol": "main", "profile": "smoke", "epochs": 2, "seed": 0, "settings": settings_hash({}), "status": "ok",
        "image_auroc": 0.5, "epoch": 2, "epochs_run": 2, "steps": 20, "parameters": 1000, "train_images": 10,
        "val_images": 1, "test_images": 4, "test_anomalous": 2, "seconds": 1.5, "device": "cpu",
        "hardware": "a processor", "threads": 1, "started": "2026-01-31T12:00:00Z", "revision": "0123456789ab",
        "versions": "python 3.11.7; torch 2.11.0", "weights": "seed 0", "weights_sha256": "ab" * 32,
        "manifest_sha256": "cd" * 32, "initial_sha256": "ef" * 32,
    }  # fmt: skip
    if changes.get("status") == "failed":
        values |= {"image_auroc": None, "epoch": None, "error": "the loss is nan at epoch 1"}
    return Record(**(values | changes))


# --- Files ------------------------------------------------------------------------------------------------------------


def file_name(record: Record) -> str:
    """Name of the JSON file that holds the records of one training: readable, and a function of what was trained.

    A study asks ``(folder / file_name(record)).exists()`` to know what is done.

    >>> file_name(example(category="pill", seed=3))
    'mvtec-pill-fastflow-additive-lu-s3-....json'
    """
    names = (record.dataset, record.category, record.detector, record.coupling, record.mixing, f"s{record.seed}")
    return "-".join((*names, settings_hash(dict(zip(TRAINING, record.training, strict=True))))) + ".json"


def write_records(records: Sequence[Record], folder: Path, *, settings: Mapping[str, Any] | None = None) -> Path:
    """Write the rows of one training (its scores, protocols, epochs) as one file, whole or not at all.

    All rows of a training are written together. What decides when it stops is part of ``settings``, so that a training
    that is stopped by another rule is another training, with a file of its own.

    Args:
        records: of one training.
        folder: made where it does not exist. Any number of processes may write into it and read from it.
        settings: what the column ``settings`` is the hash of; kept in the file, and by :func:`merge` beside the CSV.

    Returns:
        the file, ``folder / file_name(records[0])``; an older one of the same training is replaced.

    Raises:
        RecordError: no records, records of several trainings, two with the same key, or settings with another hash.
    """
    if not records:
        raise RecordError("no records to write: a run that failed is a record with status failed")
    if len({record.training for record in records}) != 1:
        raise RecordError("records of several trainings: write one file for each")
    if len({record.key for record in records}) != len(records):
        raise RecordError("two records with the same score, protocol and epoch")
    if settings is not None and settings_hash(settings) != records[0].settings:
        raise RecordError(f"column settings: {records[0].settings}, expected {settings_hash(settings)} by the settings")
    content = {
        "records": [dataclasses.asdict(record) for record in records],
        "settings": None if settings is None else dict(settings),
    }
    return write_json(folder / file_name(records[0]), content)


def _from_mapping(row: Mapping[str, Any], where: str, convert: Any) -> Record:
    """A checked record; every fault names ``where`` it is."""
    if missing := [name for name in COLUMNS if name not in row]:
        raise RecordError(f"{where}: no column {', '.join(missing)}; made with an older schema? Run the cell again")
    if unknown := [name for name in row if name not in COLUMNS]:
        raise RecordError(f"{where}: unknown column {', '.join(map(str, unknown))}; made with a newer schema? Update")
    try:
        return Record(**{name: convert(name, row[name]) for name in COLUMNS})
    except RecordError as fault:
        raise RecordError(f"{where}, {fault}. Correct the cell, or run it again") from None


def _typed(name: str, text: str | None) -> Any:
    """A CSV cell as the schema's type; what does not parse is left to the check."""
    kinds, optional = _schema()[name]
    if text is None:
        raise RecordError(f"column {name}: the row ends before it")
    if text == "" and optional:
        return None
    kind = kinds[0]
    if kind is bool:
        return {"true": True, "false": False}.get(text, text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _read_csv(path: Path) -> list[Record]:
    with path.open(newline="", encoding="utf8") as stream:
        rows = list(csv.DictReader(stream, restkey="<beyond the last column>"))
    # Line 1 is the header; a record never spans lines.
    return [_from_mapping(row, f"{path.name} row {number}", _typed) for number, row in enumerate(rows, start=2)]


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf8"))
    except ValueError as fault:
        raise RecordError(f"{path.name}: not JSON ({fault}); delete the file and run the cell again") from None
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise RecordError(f"{path.name}: no list 'records'; not a file of write_records. Move it elsewhere")
    return content


def _read_json(path: Path) -> list[Record]:
    rows = _load_json(path)["records"]
    return [_from_mapping(row, f"{path.name} row {n}", lambda _, value: value) for n, row in enumerate(rows, start=1)]


def _files(path: Path) -> list[Path]:
    """Files with records in a folder; unfinished ones start with a dot, settings are no records."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no records at {path.name}: run a cell of the benchmark, or give the right folder")
    found = [p for p in path.iterdir() if p.suffix in (".csv", ".json") and not p.name.startswith(".")]
    return sorted(p for p in found if not p.name.endswith(SETTINGS))


SETTINGS = "settings.json"


def latest(records: Iterable[Record]) -> list[Record]:
    """One record for each key, the one that started last (of equal ones the later in the list), ordered by key."""
    kept: dict[tuple[Any, ...], Record] = {}
    for record in records:
        other = kept.get(record.key)
        if other is None or record.started >= other.started:
            kept[record.key] = record
    return [kept[key] for key in sorted(kept, key=str)]


def read(path: Path) -> list[Record]:
    """Checked records of a CSV file, of a JSON file, or of all of both kinds in a folder (not below it).

    Of several records with one key, the latest. An empty folder has no records. Files that are being written are not
    seen before they are whole.

    Raises:
        FileNotFoundError: no such file or folder.
        RecordError: a record that does not fit the schema, naming file, row, column and remedy.
    """
    found: list[Record] = []
    for file in _files(path):
        found.extend(_read_csv(file) if file.suffix == ".csv" else _read_json(file))
    return latest(found)


def read_settings(path: Path) -> dict[str, Any]:
    """Settings by their hash, from the record files of a folder and the ``settings.json`` beside a CSV."""
    folder = path if path.is_dir() else path.parent
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.json")):
        if file.name.startswith("."):
            continue
        if file.name.endswith(SETTINGS):
            found |= json.loads(file.read_text("utf8"))
            continue
        content = _load_json(file)
        if content.get("settings") is not None:
            found |= {row["settings"]: content["settings"] for row in content["records"]}
    return found


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def merge(folder: Path, target: Path) -> Path:
    """Gather the records in ``folder`` and those already in ``target`` into ``target``, a CSV file.

    Of several records with one key, the latest. The settings go into ``settings.json`` beside it. Both are written
    whole or not at all, and merging twice changes nothing.

    Raises:
        FileNotFoundError: no such folder.
        RecordError: see :func:`read`.
    """
    records = latest([*(read(target) if target.is_file() else []), *read(folder)])
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(getattr(record, name)) for name in COLUMNS] for record in records)
    settings = (read_settings(target) if target.parent.is_dir() else {}) | read_settings(folder)
    used = {record.settings for record in records}
    write_json(target.parent / SETTINGS, {key: value for key, value in settings.items() if key in used})
    return atomic_write(target, buffer.getvalue())
