"""A detector to ship: a folder with weights, settings, calibration and a card, and scores that mean something.

::

    model/
      model.safetensors   backbone and flows
      settings.json       how to build the detector; SHA-256 of every other file
      calibration.json    normal scores, threshold, what it promises; SHA-256 of settings.json
      data.csv            the images that it was made from, with their SHA-256
      README.md           the card
      model.onnx          where asked for

Nothing in the folder can execute code when it is loaded: tensors, JSON and text alone. A file that was changed, or that
comes from another folder, is refused by name. The hashes are no signature: they find damage and mix-ups, not somebody
who writes all files anew.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from tqdm.auto import tqdm

from usf.calibration import (
    Calibration,
    CalibrationError,
    cross_conformal_bound,
    cross_conformal_p,
    discoveries,
    tail_rank,
)
from usf.detectors import FastflowModel, FlowOptions, Weights
from usf.detectors.backbones import LAYERS
from usf.detectors.export import Resize, fused
from usf.files import atomic_write, reason
from usf.study import detection
from usf.study.images import batches, load_images, normalise
from usf.study.records import provenance

__all__ = [
    "Deployed",
    "Detector",
    "ModelFolderError",
    "Scored",
    "build",
    "card",
    "load",
    "save",
    "score_files",
    "score_to_csv",
]

FORMAT = "usf-model-1"
MODEL, SETTINGS, CALIBRATION, DATA, CARD, ONNX = (
    "model.safetensors", "settings.json", "calibration.json", "data.csv", "README.md", "model.onnx",
)  # fmt: skip
BACKBONE = "feature_extractor."
SIZES = range(16, 2049, 16)


class ModelFolderError(ValueError):
    """A model folder that is not what was saved; names the file and the remedy."""


def build(size: int, weights: Weights, options: FlowOptions, seed: int, flow_steps: int) -> FastflowModel:
    """An untrained FastFlow for ``size`` x ``size`` images, scored by the norm."""
    # With "mle" the layer normalisation's trained scale is counted: the likelihood cannot grow by shrinking it.
    made = detection.build(
        "fastflow", size, weights, options, seed=seed, loss="mle", score="norm", flow_steps=flow_steps
    )
    return cast("FastflowModel", made)


class Detector(nn.Module):
    """Trained flows on one backbone as one map from pictures to scores; for inference and export.

    With one flow the score of an image is the maximum of its anomaly map. With K flows, each trained without one fold
    of the normal images, it is what cross-conformal calibration compares: with normal scores s_i, each by the flow that
    was trained without image i, and S_k the score by flow k, the score is T plus the j-th lowest S_{k(i)} - s_i, where
    T is the j-th highest s_i and j the rank of the threshold. It is above T exactly where the p-value is at most alpha.

    Args:
        models: trained, with the same backbone; copied.

    Attributes:
        size: of the images inside, pixels; others are resized.
    """

    known: Tensor
    owner: Tensor

    def __init__(self, models: Sequence[FastflowModel]) -> None:
        super().__init__()
        self.size = models[0].input_size[0]
        self.resize = Resize(models[0].input_size)
        self.flows = nn.ModuleList([fused(model) for model in models])
        self.rank = 0
        self.register_buffer("known", torch.empty(0))
        self.register_buffer("owner", torch.empty(0, dtype=torch.int64))
        self.eval().requires_grad_(False)

    def calibrate(self, folds: Sequence[NDArray[np.float64]], alpha: float) -> None:
        """Set the normal scores of each fold, by the flow trained without it.

        Raises:
            CalibrationError: fewer scores than ``alpha`` needs.
        """
        self.known = torch.from_numpy(np.concatenate(folds)).float()
        self.owner = torch.repeat_interleave(torch.arange(len(folds)), torch.tensor([len(fold) for fold in folds]))
        self.rank = tail_rank(len(self.known), alpha)

    def members(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [0, 1] -> (score by each flow (N, K), mean anomaly map (N, 1, size, size))."""
        first = cast("FastflowModel", self.flows[0])
        features = first.features(normalise(self.resize(images)))
        maps = []
        for flow in self.flows:
            model = cast("FastflowModel", flow)
            maps.append(model.maps(model.latents(features)))
        return torch.cat([level.amax(dim=(2, 3)) for level in maps], dim=1), torch.stack(maps).mean(dim=0)

    def combine(self, scores: Tensor) -> Tensor:
        """Scores by each flow (N, K) -> one score (N,), see the class."""
        if len(self.flows) == 1:
            return scores[:, 0]
        excess = scores[:, self.owner] - self.known
        lowest = torch.topk(excess, self.rank, dim=1, largest=False).values[:, -1]
        return torch.topk(self.known, self.rank).values[-1] + lowest

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [0, 1] -> (score (N,), anomaly map (N, 1, size, size)); higher is more anomalous."""
        scores, maps = self.members(images)
        return self.combine(scores), maps


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a detector says of one image.

    Attributes:
        path: of the image.
        score: higher is more anomalous; NaN where the image could not be read.
        p: conformal p-value.
        alarm: whether the score is above the threshold.
        map: (size, size), float32; empty where the image could not be read.
        error: why the image could not be read, else empty.
    """

    path: Path
    score: float
    p: float
    alarm: bool
    map: NDArray[np.float32]
    error: str = ""


@dataclasses.dataclass
class Deployed:
    """A detector with its calibration.

    Attributes:
        detector: see :class:`Detector`.
        calibration: of its score, all folds together.
        folds: normal scores by fold, each (n_k,); one where images were held out once.
        settings: content of ``settings.json``; empty before it is saved.
    """

    detector: Detector
    calibration: Calibration
    folds: list[NDArray[np.float64]]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def calibrated(
        cls, detector: Detector, folds: Sequence[NDArray[np.float64]], alpha: float, confidence: float | None = None
    ) -> Deployed:
        """A detector with scores of normal images that were not trained on.

        Args:
            detector: its flow k was trained without fold k.
            folds: scores of the images of fold k by flow k, each (n_k,).
            alpha: wanted false-alarm rate.
            confidence: share of calibrations that must keep it; for a single fold alone.

        Raises:
            CalibrationError: too few scores, or a confidence with more than one fold.
        """
        if len(folds) != len(detector.flows):
            raise CalibrationError(f"{len(folds)} folds of normal scores for {len(detector.flows)} flows")
        if len(folds) > 1 and confidence is not None:
            raise CalibrationError(
                "cross-conformal calibration has no confidence: hold images out once, or leave it out"
            )
        kept = [np.asarray(fold, dtype=np.float64) for fold in folds]
        calibration = Calibration(tuple(np.concatenate(kept).tolist()), alpha, confidence)
        detector.calibrate(kept, alpha)
        return cls(detector, calibration, kept)

    @property
    def threshold(self) -> float:
        """An image whose score is above it raises an alarm."""
        return self.calibration.threshold

    def promise(self) -> str:
        """What the threshold promises, as text for a reader."""
        if len(self.folds) == 1:
            return self.calibration.promise()
        n, alpha = len(self.calibration.normals), self.calibration.alpha
        return (
            f"Threshold {self.threshold:.6g} from {n} normal parts, each compared by one of {len(self.folds)} flows "
            f"that was trained without it (cross-conformal): about {100 * alpha:.3g} % of new normal parts raise an "
            f"alarm, as experience has it; guaranteed is a rate of at most {100 * self.guaranteed:.2g} % on average. "
            "Both hold as long as new normal parts come from where these came from."
        )

    @property
    def guaranteed(self) -> float:
        """The false-alarm rate, in [0, 1], that is proved, on average over calibrations; see :meth:`promise`."""
        alpha = self.calibration.alpha
        return alpha if len(self.folds) == 1 else cross_conformal_bound([len(fold) for fold in self.folds], alpha)

    def flagged(self, p: Sequence[float] | NDArray[np.float64], rate: float) -> NDArray[np.bool_]:
        """Which parts of a batch to call anomalous, so that a share ``rate`` of them at most is good, on average.

        Args:
            p: p-value of every part of the batch, (m,).
            rate: wanted false-discovery rate, see :func:`usf.calibration.discoveries`.

        Raises:
            CalibrationError: a rate outside (0, 1).
        """
        return discoveries(np.asarray(p, dtype=np.float64), rate) if len(p) else np.zeros(0, dtype=bool)

    def batch_promise(self, rate: float, count: int) -> str:
        """What :meth:`flagged` promises of ``count`` parts, as text for a reader."""
        n = len(self.calibration.normals)
        sure = (
            "This holds on average over calibrations"
            if len(self.folds) == 1
            else "This is what experience says: the proof is for p-values of parts that were held out once"
        )
        fewest = math.ceil(count / (rate * (n + 1)) - 1e-9)
        text = (
            f"Of the parts that are flagged at most {100 * rate:.3g} % are good ones, in the long run (Benjamini and "
            f"Hochberg's false-discovery rate). {sure}, for good parts that come from where the normal ones came from."
        )
        if fewest > count:
            return f"{text} {n} normal parts give no p-value below {1 / (n + 1):.2g}: too few to flag any of {count}."
        if fewest > 1:
            text += (
                f" {n} normal parts give no p-value below {1 / (n + 1):.2g}: with fewer than {fewest} parts of "
                f"{count} as unusual as that, none is flagged."
            )
        return text

    def judge(self, members: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Scores by each flow (N, K) -> (score, p-value, alarm), each (N,)."""
        scores = self.detector.combine(members).double().numpy()
        if len(self.folds) == 1:
            return scores, self.calibration.p(scores), self.calibration.alarms(scores)
        p = cross_conformal_p(self.folds, list(members.double().numpy().T), doubled=False)
        return scores, p, p <= self.calibration.alpha


def members_of(
    detector: Detector, files: Sequence[Path], *, batch_size: int = 8, progress: bool = True, label: str = "scores"
) -> Iterator[tuple[list[Path], Tensor, Tensor, list[tuple[Path, str]]]]:
    """Batches of (images read, scores by flow (N, K), maps (N, size, size), images that could not be read and why)."""
    with torch.inference_mode(), tqdm(total=len(files), desc=label, unit="image", disable=not progress) as bar:
        for part in batches(len(files), batch_size):
            read, pictures, failed = [], [], []
            for path in files[part]:
                try:
                    pictures.append(load_images([path], detector.size))
                    read.append(path)
                except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and struct.error alike
                    failed.append((path, reason(error)))
            if read:
                scores, maps = detector.members(torch.cat(pictures))
                yield read, scores, maps[:, 0], failed
            else:
                yield [], torch.empty(0, len(detector.flows)), torch.empty(0, detector.size, detector.size), failed
            bar.update(len(files[part]))


def score_files(
    deployed: Deployed, files: Sequence[Path], *, batch_size: int = 8, progress: bool = True, label: str = "scores"
) -> Iterator[Scored]:
    """Score images in batches; memory does not grow with their number. Order is kept within what could be read."""
    nothing = np.empty((0, 0), dtype=np.float32)
    detector = deployed.detector
    for read, members, maps, failed in members_of(
        detector, files, batch_size=batch_size, progress=progress, label=label
    ):
        if read:
            scores, p_values, alarms = deployed.judge(members)
            for path, score, p, alarm, level in zip(read, scores, p_values, alarms, maps.numpy(), strict=True):
                yield Scored(path, float(score), float(p), bool(alarm), level)
        for path, why in failed:
            yield Scored(path, float("nan"), float("nan"), False, nothing, why)


# ---------------------------------------------------------------------------------------------------------- the folder


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def data_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The data manifest: one line an image."""
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("image", "part", "width", "height", "sha256"))
    writer.writerows([row[key] for key in ("image", "part", "width", "height", "sha256")] for row in rows)
    return buffer.getvalue()


def save(
    folder: Path,
    models: Sequence[FastflowModel],
    deployed: Deployed,
    *,
    weights: Weights,
    data: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    onnx: bool = False,
) -> Deployed:
    """Write a model folder: whole, or not at all.

    The new one is written beside its place and moved there; the old one, moved out of the way for a moment, comes back
    if that fails. A process that is killed in this moment leaves both under hidden names beside the place, and the
    next save brings the old one back first.

    Args:
        folder: is replaced, if it is a model folder.
        models: what ``deployed.detector`` was made of.
        deployed: calibrated.
        weights: of the backbone, for the card.
        data: image, part, width, height and sha256 of every image that was used.
        notes: lines for the card.
        onnx: also write ``model.onnx``: ``images`` (N, 3, H, W) in [0, 1] -> ``score``, ``map``.

    Returns:
        what :func:`load` would return.

    Raises:
        ModelFolderError: ``folder`` holds something else.
        OSError: it cannot be written; the old one is left as it was.
    """
    _recover(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / SETTINGS).is_file())):
        raise ModelFolderError(f"{folder} exists and is no model folder: choose another place, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    first = models[0]
    tensors = {
        f"backbone.{k.removeprefix(BACKBONE)}": v for k, v in first.state_dict().items() if k.startswith(BACKBONE)
    }
    for index, model in enumerate(models):
        own = {k: v for k, v in model.state_dict().items() if not k.startswith(BACKBONE)}
        tensors |= {f"flow{index}.{key}": value for key, value in own.items()}
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    for left in folder.parent.glob(f".{folder.name}-*"):  # by a run that was killed; no longer the old model
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        files = {MODEL: safetensors.save(tensors, {"format": FORMAT}), DATA: data_csv(data).encode()}
        if onnx:
            export_onnx(deployed.detector, partial / ONNX)
            files[ONNX] = (partial / ONNX).read_bytes()
        settings: dict[str, Any] = {
            "format": FORMAT,
            "detector": "fastflow",
            "size": first.input_size[0],
            "backbone": weights.backbone,
            "weights": weights.describe(),
            "flow_steps": len(first.fast_flow_blocks[0].module_list),  # type: ignore[arg-type]
            "options": dataclasses.asdict(first.options),
            "folds": [fold.tolist() for fold in deployed.folds],
            "made": provenance(("usf", "torch", "anomalib", "timm")),
        }
        files[CARD] = card(deployed, settings, len(data), notes, onnx).encode()
        settings["sha256"] = {name: _sha256(content) for name, content in sorted(files.items())}
        files[SETTINGS] = (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode()
        for name, content in files.items():
            atomic_write(partial / name, content)
        own_model, own_data = _sha256(files[SETTINGS]), _sha256(files[DATA])
        calibration = dataclasses.replace(deployed.calibration, model=own_model, data=own_data)
        calibration.save(partial / CALIBRATION)
        partial.chmod(0o755)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dataclasses.replace(deployed, calibration=calibration, settings=settings)


def _old(folder: Path) -> Path:
    """Where the old folder is for the moment in which it is replaced."""
    return folder.with_name(f".{folder.name}-old")


def _recover(folder: Path) -> None:
    """Bring back the old folder where a replacement was cut short between its two steps."""
    if _old(folder).exists() and not folder.exists():
        _old(folder).rename(folder)


def _replace(new: Path, folder: Path) -> None:
    """Put a folder in the place of another one, which comes back if that fails or is interrupted."""
    shutil.rmtree(_old(folder), ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(_old(folder))
        new.rename(folder)
    except BaseException:  # Ctrl-C too
        _recover(folder)
        raise
    shutil.rmtree(_old(folder), ignore_errors=True)


def export_onnx(detector: Detector, path: Path) -> Path:
    """Write the detector as ONNX: ``images`` (N, 3, H, W) in [0, 1] -> ``score`` (N,), ``map`` (N, 1, size, size).

    Raises:
        ModuleNotFoundError: the ``export`` extra is not installed.
    """
    import logging
    import warnings

    example = torch.rand(2, 3, detector.size + 8, detector.size + 24)
    dynamic = {"images": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                detector, (example,), path, dynamo=True, input_names=["images"], output_names=["score", "map"],
                dynamic_shapes=dynamic, external_data=False, verbose=False,
            )  # fmt: skip
    finally:
        quiet.setLevel(level)
    return path


def card(
    deployed: Deployed, settings: Mapping[str, Any], images: int, notes: Sequence[str] = (), onnx: bool = False
) -> str:
    """The model card, Markdown."""
    flows = len(deployed.folds)
    lines = [
        "# Detector of unusual parts",
        "",
        f"FastFlow as a uniformly scaling flow on {settings['weights']}; images of {settings['size']} x "
        f"{settings['size']} pixels; {flows} flow{'s' if flows > 1 else ''}. Scores are the largest mean squared "
        "latent of a position: higher is more unusual.",
        "",
        "## What the threshold promises",
        "",
        deployed.promise(),
        "",
        "It promises nothing about how many defects are found, and nothing once camera, light or parts have changed: "
        "then make a new one.",
        "",
        "## Use",
        "",
        "```bash",
        "usf score <this folder> <images> --out scores.csv",
        "```",
        "",
        "```python",
        "from pathlib import Path",
        "from usf import deploy",
        "",
        'model = deploy.load(Path("<this folder>"))',
        'for part in deploy.score_files(model, sorted(Path("<images>").glob("*.png"))):',
        "    print(part.path.name, part.score, part.p, part.alarm)",
        "```",
        "",
    ]
    if onnx:
        lines += [
            f"`{ONNX}` runs in onnxruntime without this package: `images` (N, 3, H, W), float32 in [0, 1], any size, "
            f"to `score` (alarm above {deployed.threshold:.9g}) and `map`.",
            "",
        ]
    lines += ["## Data", "", f"{images} images, listed with their SHA-256 in `{DATA}`.", *notes, ""]
    return "\n".join(lines)


def load(folder: str | Path) -> Deployed:
    """Read a model folder. Nothing in it is executed.

    Raises:
        ModelFolderError: a file that is missing, damaged, changed, or from another folder; names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder: pass the model folder that `usf inspect` wrote")
    raw = _read(folder / SETTINGS)
    settings = _settings(folder / SETTINGS, raw)
    try:
        calibration = Calibration.load(folder / CALIBRATION)
    except CalibrationError as error:
        raise ModelFolderError(str(error)) from error
    if calibration.model != _sha256(raw):
        raise ModelFolderError(
            f"{folder / SETTINGS} and {folder / CALIBRATION} do not belong together: one was changed or comes from "
            "another model; copy the whole folder again"
        )
    contents: dict[str, bytes] = {}
    for name, expected in settings["sha256"].items():
        contents[name] = _read(folder / name)
        if _sha256(contents[name]) != expected:
            raise ModelFolderError(
                f"{folder / name} is not the file that was saved (its SHA-256 differs): it is damaged, was changed, or "
                "comes from another model; copy the whole folder again"
            )
    models = _models(folder / MODEL, contents[MODEL], settings)
    folds = [np.asarray(fold, dtype=np.float64) for fold in settings["folds"]]
    if sorted(np.concatenate(folds).tolist()) != list(calibration.normals):
        raise ModelFolderError(f"{folder / CALIBRATION} has other normal scores than {SETTINGS}: copy the folder again")
    try:
        detector = Detector(models)
        detector.calibrate(folds, calibration.alpha)
    except ValueError as error:
        raise ModelFolderError(f"{folder / SETTINGS} fits no detector ({error}): copy the folder again") from error
    return Deployed(detector, calibration, folds, settings)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFolderError(
            f"{path} cannot be read ({error.strerror or error}): the model folder is not complete; copy it again"
        ) from error


def _settings(path: Path, raw: bytes) -> dict[str, Any]:
    """The checked content of ``settings.json``."""

    def broken(what: str) -> ModelFolderError:
        return ModelFolderError(f"{path} {what}: it was changed, or is no settings file of this version; copy it again")

    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise broken(f"is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise broken(f"does not have the format {FORMAT!r}")
    hashes, folds, options = (content.get(key) for key in ("sha256", "folds", "options"))
    fits = {
        "detector": content.get("detector") == "fastflow",
        "size": type(content.get("size")) is int and content["size"] in SIZES,
        "backbone": content.get("backbone") in ("resnet18", "wide_resnet50_2"),
        "weights": isinstance(content.get("weights"), str),
        "flow_steps": type(content.get("flow_steps")) is int and 1 <= content["flow_steps"] <= 64,
        "options": isinstance(options, dict) and set(options) == {f.name for f in dataclasses.fields(FlowOptions)},
        "folds": isinstance(folds, list)
        and 1 <= len(folds) <= 64
        and all(isinstance(f, list) and f and all(type(v) is float for v in f) for f in folds),
        # Plain names: a folder from elsewhere says nothing about files outside of it.
        "sha256": isinstance(hashes, dict)
        and {MODEL, DATA, CARD} <= set(hashes) <= {MODEL, DATA, CARD, ONNX}
        and all(isinstance(value, str) for value in hashes.values()),
    }
    if wrong := [name for name, fit in fits.items() if not fit]:
        raise broken(f"has no valid {', '.join(wrong)}")
    return content


def _models(path: Path, data: bytes, settings: Mapping[str, Any]) -> list[FastflowModel]:
    remedy = "it is not the model of these settings; copy the whole folder again"
    try:
        stored = safetensors.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{path} is not a safetensors file ({error}): {remedy}") from error
    unread = Weights(settings["backbone"], "checkpoint", "", "", layers=LAYERS)
    backbone = {f"{BACKBONE}{k.removeprefix('backbone.')}": v for k, v in stored.items() if k.startswith("backbone.")}
    models = []
    try:
        options = FlowOptions(**settings["options"])
        for index in range(len(settings["folds"])):
            prefix = f"flow{index}."
            own = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
            model = build(settings["size"], unread, options, seed=0, flow_steps=settings["flow_steps"])
            model.load_state_dict(backbone | own)
            models.append(model.eval())
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelFolderError(f"{path} does not fit ({str(error).splitlines()[0]}): {remedy}") from error
    return models


def score_to_csv(
    deployed: Deployed,
    files: Mapping[Path, str],
    out: Path,
    *,
    heatmaps: Path | None = None,
    batch_size: int = 8,
    fdr: float | None = None,
    progress: bool = True,
) -> tuple[list[tuple[str, str]], int, int]:
    """Score images into a CSV file: image, score, p_value, alarm, error; with ``fdr`` also flagged.

    The file is written beside its place line by line, and moved there when it is complete. Memory does not grow with
    the number of images, but for their names and p-values.

    Args:
        deployed: the detector.
        files: image -> its name in the CSV file, relative, also below ``heatmaps``.
        out: CSV file.
        heatmaps: folder for one PNG an image: the image beside its heatmap.
        batch_size: images at a time.
        fdr: judge all images as one batch too, see :meth:`Deployed.flagged`.
        progress: show a bar.

    Returns:
        (name, why) of images that could not be read; number of alarms; number of images flagged.

    Raises:
        OSError: a file that cannot be written; an older CSV file is left as it was.
    """
    from usf.plots.heatmaps import overlay, side_by_side

    unread: list[tuple[str, str]] = []
    alarms = flagged = 0
    p_values = array("d")
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}-")
    temporary = Path(name)
    try:
        with open(handle, "w", newline="", encoding="utf8", errors="backslashreplace") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(("image", "score", "p_value", "alarm", "error"))
            for part in score_files(deployed, list(files), batch_size=batch_size, progress=progress):
                if part.error:
                    unread.append((files[part.path], part.error))
                    writer.writerow((files[part.path], "", "", "", part.error))
                    continue
                alarms += part.alarm
                p_values.append(part.p)
                writer.writerow((files[part.path], f"{part.score:.9g}", f"{part.p:.6g}", int(part.alarm), ""))
                if heatmaps is not None:
                    target = heatmaps / f"{files[part.path]}.png"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    picture = load_images([part.path], deployed.detector.size)[0]
                    side_by_side(picture, overlay(picture, part.map, deployed.threshold)).save(target)
        if fdr is not None:
            flags = deployed.flagged(np.frombuffer(p_values), fdr)
            flagged = int(flags.sum())
            _add_flags(temporary, flags)
        temporary.chmod(0o644)
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return unread, alarms, flagged


def _add_flags(path: Path, flags: NDArray[np.bool_]) -> None:
    """Add a column to a CSV file of scores: which images are flagged; empty for those that could not be read."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}-")
    temporary, left = Path(name), iter(flags.tolist())
    try:
        with (
            path.open(newline="", encoding="utf8") as old,
            open(handle, "w", newline="", encoding="utf8") as new,
        ):
            rows, writer = csv.reader(old), csv.writer(new, lineterminator="\n")
            writer.writerow([*next(rows), "flagged"])
            for row in rows:
                writer.writerow([*row, "" if row[1] == "" else int(next(left))])
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
