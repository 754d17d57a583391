"""From a folder of good parts to a detector with a known false-alarm rate; the work behind ``usf inspect``.

:func:`survey` says what is in a folder, :func:`plan` how many of the normal images are trained on, :func:`inspect` does
the rest. A run that is stopped, however it is stopped, goes on where it was when it is started again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from usf.calibration import CalibrationError, ChiLaw, normals_needed, tail_rank
from usf.files import atomic_write, reason
from usf.study.catalogue import ImageFolderError
from usf.study.images import SUFFIXES, Sample, batches, load_masks, upright
from usf.study.records import hardware, settings_hash, write_json

if TYPE_CHECKING:
    from usf.deploy import Deployed, Scored
    from usf.detectors import FastflowModel, Weights
    from usf.study.features import Features

__all__ = [
    "InspectionError",
    "Norms",
    "Options",
    "Part",
    "Plan",
    "Result",
    "Speed",
    "Survey",
    "files_below",
    "inspect",
    "plan",
    "survey",
    "train",
]

Method = Literal["auto", "split", "cross"]

FEWEST = 5
"""Normal images below which nothing is trained."""
SPLIT_SHARE, MOST_SHARE = 0.25, 0.4
"""Of the normal images, held out to calibrate: this many, or as many as the rate needs up to the second."""
GOOD = ("good", "normal", "ok")
"""Names of folders of normal images, in any case."""


class InspectionError(RuntimeError):
    """Something that stops an inspection while it runs; says what to do."""


# ---------------------------------------------------------------------------------------------------- what is there


@dataclasses.dataclass(frozen=True)
class Part:
    """One image that can be read.

    Attributes:
        path: the file.
        name: relative to the folder that was given.
        role: ``"normal"`` (to train and calibrate on) or ``"test"``.
        label: of a test image: ``"good"``, the name of a defect, or ``None`` where nobody said.
        mask: ground truth, where there is one.
        size: (width, height), pixels, upright.
        mode: Pillow's name of the pixel format.
        sha256: of the file.
        turned: whether its EXIF orientation had to be followed to have it upright.
    """

    path: Path
    name: str
    role: Literal["normal", "test"]
    label: str | None
    mask: Path | None
    size: tuple[int, int]
    mode: str
    sha256: str
    turned: bool = False


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a folder holds.

    Attributes:
        root: the folder.
        layout: in words.
        parts: images that are used: readable, each content once among the normal ones.
        unreadable: (name, why) of files that look like images and are none.
        ignored: names of files that do not look like images.
        duplicates: groups of names with the same content. Of normal ones the first is used.
        leaked: names of test images that are also normal ones to train on.
        unused: names of images in folders that the layout has no use for.
    """

    root: Path
    layout: str
    parts: tuple[Part, ...]
    unreadable: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    leaked: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def normals(self) -> list[Part]:
        """Images to train and calibrate on."""
        return [part for part in self.parts if part.role == "normal"]

    @property
    def test(self) -> list[Part]:
        """The other images."""
        return [part for part in self.parts if part.role == "test"]

    @property
    def labelled(self) -> bool:
        """Whether the test images are known to be normal and anomalous ones, both."""
        labels = [part.label for part in self.test]
        return None not in labels and len({label == "good" for label in labels}) == 2

    @property
    def masked(self) -> bool:
        """Whether every anomalous test image has a mask."""
        return self.labelled and all(part.mask is not None for part in self.test if part.label != "good")

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """(width x height, images), most frequent first."""
        return collections.Counter(f"{p.size[0]} x {p.size[1]}" for p in self.parts).most_common()

    @property
    def modes(self) -> list[tuple[str, int]]:
        """(pixel format, images), most frequent first."""
        names = {"RGB": "colour, 8 bit", "L": "grey, 8 bit", "RGBA": "colour with transparency (dropped)",
                 "P": "palette", "1": "black and white"}  # fmt: skip
        kinds = (names.get(p.mode, "grey, 16 bit (high byte used)" if p.mode[0] == "I" else p.mode) for p in self.parts)
        return collections.Counter(kinds).most_common()

    @property
    def turned(self) -> int:
        """Images that their EXIF orientation turned."""
        return sum(part.turned for part in self.parts)

    @property
    def sha256(self) -> str:
        """Of names and contents of all images that are used."""
        lines = "\n".join(f"{part.name} {part.sha256}" for part in self.parts)
        return hashlib.sha256(lines.encode("utf8", "surrogateescape")).hexdigest()

    def describe(self) -> str:
        """One line."""
        text = f"{len(self.normals)} normal images"
        if self.test:
            bad = sum(part.label != "good" for part in self.test)
            kind = f"{len(self.test) - bad} normal, {bad} anomalous" if self.labelled else "not labelled"
            text += f", {len(self.test)} to test ({kind})"
        for count, what in (
            (len(self.unreadable), "unreadable"),
            (len(self.duplicates), "there more than once"),
            (len(self.unused), "in other folders not used"),
        ):
            text += f", {count} {what}" if count else ""
        return f"{text}; {self.layout}"


def files_below(folder: Path, recursive: bool = True) -> list[Path]:
    """Files of a folder, sorted; without hidden ones and without those in hidden folders below it."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(
        path for path in found
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )  # fmt: skip


def _look(path: Path) -> tuple[tuple[int, int], str, str, bool]:
    """(size, mode, SHA-256, whether it was turned upright) of an image that decodes to the end."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with Image.open(path) as image:
        turned = upright(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose scale nobody knows: save as 8 or 16 bit")
        return image.size, image.mode, digest, turned


def survey(folder: str | Path, test: str | Path | None = None, *, progress: bool = False) -> Survey:
    """Find out what a folder holds; every image is decoded once.

    Three layouts are known: images in the folder itself (all normal); a folder ``good``, ``normal``, ``ok`` or
    ``train`` beside a folder ``test`` of images that nobody has labelled; MVTec's ``train/good``, ``test/DEFECT``,
    ``ground_truth``. Images in other folders are not used, and named in the result.

    Args:
        folder: see above.
        test: images that nobody has labelled, or with subfolders ``good`` and DEFECT, where they lie elsewhere.
        progress: show a bar.

    Raises:
        ImageFolderError: a folder that is missing or empty, no normal image, or none that can be read; images in a
            folder below ``train`` that may or may not be normal.
    """
    root = Path(folder).expanduser()
    for given in (root, *([Path(test).expanduser()] if test else [])):
        if not given.exists():
            raise ImageFolderError(f"{given} does not exist: pass a folder of images")
        if not given.is_dir():
            raise ImageFolderError(f"{given} is a file: pass the folder that it is in")
    normal_folder = _normal_folder(root)
    test_folder = Path(test).expanduser() if test else root / "test"
    # Images in the folder itself are normal ones; folders below it would be anything.
    candidates = [("normal", path) for path in files_below(normal_folder, normal_folder != root)]
    if test_folder.is_dir():
        candidates += [("test", path) for path in files_below(test_folder)]
    if not any(path.suffix.lower() in SUFFIXES for role, path in candidates if role == "normal"):
        raise ImageFolderError(
            f"{normal_folder} holds no images ({', '.join(SUFFIXES)}): put normal images there, or into "
            f"{root / 'good'}, and mixed ones into {root / 'test'}"
        )

    kinds = {child.name.lower() for child in test_folder.iterdir() if child.is_dir()} if test_folder.is_dir() else set()
    labelled = bool(kinds & set(GOOD))
    parts: list[Part] = []
    unreadable: list[tuple[str, str]] = []
    ignored: list[str] = []
    for role, path in tqdm(candidates, desc="looking", unit="file", disable=not progress):
        base = root if path.is_relative_to(root) else test_folder.parent
        name = path.relative_to(base).as_posix()
        if path.suffix.lower() not in SUFFIXES:
            ignored.append(name)
            continue
        try:
            size, mode, digest, turned = _look(path)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and struct.error alike
            unreadable.append((name, reason(error)))
            continue
        label, mask = None, None
        if role == "test" and labelled:
            inner = path.relative_to(test_folder).parts
            label = inner[0] if len(inner) > 1 else None
            if label is not None and label.lower() in GOOD:
                label = "good"
            elif label is not None:
                mask = _mask(path, test_folder.parent / "ground_truth" / label, size)
        kind: Literal["normal", "test"] = "normal" if role == "normal" else "test"
        parts.append(Part(path, name, kind, label, mask, size, mode, digest, turned))
    known = {path for _, path in candidates}
    masks = test_folder.parent / "ground_truth"
    unused = [
        path.relative_to(root).as_posix()
        for path in files_below(root)
        if path.suffix.lower() in SUFFIXES and path not in known and masks not in path.parents
    ]
    layout = _layout(root, normal_folder, kinds, labelled)
    return dataclasses.replace(_without_copies(root, layout, parts, unreadable, ignored), unused=tuple(unused))


def _normal_folder(root: Path) -> Path:
    """Where the normal images are: ``train/good``, ``train``, ``good`` (or another name for it), or the folder itself.

    Raises:
        ImageFolderError: images below ``train`` of which nobody has said that they are normal.
    """

    def inside(folder: Path) -> list[Path]:
        return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))

    train = root / "train"
    if not train.is_dir():
        return next((root / child.name for name in GOOD for child in inside(root) if child.name.lower() == name), root)
    filled = [child for child in inside(train) if any(path.suffix.lower() in SUFFIXES for path in files_below(child))]
    good = [child for child in filled if child.name.lower() in GOOD]
    # To train on defects would be worse than to stop.
    if unknown := [child for child in filled if child not in good[:1]]:
        names = ", ".join(f"train/{child.name}" for child in unknown)
        raise ImageFolderError(
            f"{root} has images in {names}, and nobody has said that they are normal: move the normal ones into "
            f"train/{good[0].name if good else 'good'}, and others into test/{unknown[0].name} or out of {root.name}"
        )
    return good[0] if good else train


def _mask(image: Path, folder: Path, size: tuple[int, int]) -> Path | None:
    """The mask of an image, where there is one that fits and marks something."""
    for stem in (f"{image.stem}_mask", image.stem):
        for suffix in SUFFIXES:
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                try:
                    with Image.open(path) as mask:
                        upright(mask)
                        if mask.size == size and np.asarray(mask.convert("L")).max() > 127:
                            return path
                except Exception:  # a damaged mask is no mask; the report says that masks are missing
                    return None
    return None


def _layout(root: Path, normal_folder: Path, kinds: set[str], labelled: bool) -> str:
    if labelled:
        return "MVTec layout: test images by kind of defect"
    where = "in the folder itself" if normal_folder == root else f"in {normal_folder.relative_to(root).as_posix()}/"
    return f"normal images {where}" + (", kinds of test images not known" if kinds else "")


def _without_copies(
    root: Path, layout: str, parts: list[Part], unreadable: list[tuple[str, str]], ignored: list[str]
) -> Survey:
    if not any(part.role == "normal" for part in parts):
        named = "; ".join(f"{name}: {why}" for name, why in unreadable[:5])
        raise ImageFolderError(f"none of the normal images in {root} can be read ({named}): copy them again")
    by_content: dict[str, list[Part]] = {}
    for part in parts:
        by_content.setdefault(part.sha256, []).append(part)
    # A copy on both sides of the division would be trained on and calibrate.
    first = {content: group[0].name for content, group in by_content.items()}
    kept = [part for part in parts if part.role == "test" or first[part.sha256] == part.name]
    groups = [tuple(part.name for part in group) for group in by_content.values() if len(group) > 1]
    leaked = [p.name for group in by_content.values() if group[0].role == "normal" for p in group if p.role == "test"]
    return Survey(root, layout, tuple(kept), tuple(unreadable), tuple(ignored), tuple(groups), tuple(leaked))


# ----------------------------------------------------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True)
class Options:
    """What to do with a folder.

    Attributes:
        alpha: wanted false-alarm rate.
        confidence: share of calibrations that must keep it, or ``None``: on average.
        calibration: ``"split"``: hold normal images out once; ``"cross"``: each once, with a flow for each fold;
            ``"auto"``: split where there are images enough, else cross.
        folds: of ``"cross"``.
        fdr: wanted share of good parts among those that a batch of test images has called anomalous.
        size: images are resized to so many pixels square, a multiple of 16.
        backbone: ``"resnet18"`` or ``"wide_resnet50_2"``.
        weights: see :func:`usf.detectors.backbones.resolve`.
        steps: of the optimiser, at least; rounded up to whole epochs, and at least three of them.
        batch_size: images a step.
        flow_steps: of each flow.
        seed: of the division, the initial weights and the order of images.
        onnx: also export to ONNX.

    Raises:
        ValueError: a value that cannot be; names it.
        CalibrationError: a rate or a confidence outside (0, 1).
        ModuleNotFoundError: ``onnx`` without the ``export`` extra.
    """

    alpha: float = 0.05
    confidence: float | None = None
    calibration: Method = "auto"
    folds: int = 4
    fdr: float = 0.1
    size: int = 256
    backbone: str = "resnet18"
    weights: str | None = None
    steps: int = 40
    batch_size: int = 8
    flow_steps: int = 8
    seed: int = 0
    onnx: bool = False

    def __post_init__(self) -> None:
        if self.calibration not in get_args(Method):
            raise ValueError(f"calibration={self.calibration!r}: choose one of {', '.join(get_args(Method))}")
        if self.size not in range(16, 2049, 16):
            raise ValueError(f"size={self.size}: a multiple of 16 from 16 to 2048 pixels is needed")
        for name in ("steps", "batch_size", "flow_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.folds < 2:
            raise ValueError(f"folds={self.folds}: at least 2 are needed")
        if self.calibration == "cross" and self.confidence is not None:
            raise ValueError("calibration='cross' makes no promise with a confidence: leave it out, or use 'split'")
        if not 0 < self.fdr < 1:
            raise ValueError(f"fdr={self.fdr!r}: a number between 0 and 1, both excluded, is needed")
        normals_needed(self.alpha, self.confidence)
        # Found out here, and not after all the training.
        missing = [name for name in ("onnx", "onnxscript") if self.onnx and importlib.util.find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"writing ONNX needs {' and '.join(missing)}, of the extra 'export': pip install 'usf[export]', or "
                "leave out --onnx"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which normal images calibrate which flow.

    Attributes:
        folds: positions among the normal images that flow k is not trained on; one fold where they are held out once.
        alpha: the false-alarm rate that can be promised.
        notes: what was decided and why, for the reader.
    """

    folds: tuple[tuple[int, ...], ...]
    alpha: float
    notes: tuple[str, ...]


def plan(count: int, options: Options) -> Plan:
    """Divide ``count`` normal images.

    Raises:
        ImageFolderError: fewer than five.
        CalibrationError: a division that was asked for by name and cannot promise ``alpha``.
    """
    if count < FEWEST:
        raise ImageFolderError(
            f"{count} normal images (copies not counted) are too few: at least {FEWEST} are needed to try, "
            f"{math.ceil(normals_needed(options.alpha, options.confidence) / MOST_SHARE)} for the promise asked for"
        )
    alpha, confidence = options.alpha, options.confidence
    needed = normals_needed(alpha, confidence)
    order = np.random.default_rng(options.seed).permutation(count)
    most = math.floor(MOST_SHARE * count)
    held = max(needed, round(SPLIT_SHARE * count))
    sure = "" if confidence is None else f" with confidence {confidence:g}"
    if options.calibration != "cross" and held <= most:
        note = f"{held} of {count} normal images, drawn at random, were not trained on: they set the threshold."
        return Plan((_sorted(order[:held]),), alpha, (note,))
    if options.calibration != "split" and confidence is None and (needed <= count or options.calibration == "cross"):
        tail_rank(count, alpha)  # says how many are needed
        folds = min(options.folds, count)
        note = (
            f"{count} normal images are too few to set {needed} of them aside for a rate of {alpha:g} (at most "
            f"{MOST_SHARE:.0%} are). "
            if options.calibration == "auto"
            else ""
        )
        note += (
            f"They were cut into {folds} parts, and for each a flow was trained on the others (cross-conformal): every "
            f"image trains and calibrates, scoring takes {folds} flows, and the guarantee is weaker."
        )
        return Plan(tuple(_sorted(part) for part in np.array_split(order, folds)), alpha, (note,))
    held = max(1, most)
    lowest = 1 / (held + 1) if confidence is None else 1 - (1 - confidence) ** (1 / held)
    lowest = math.ceil(lowest * 1e4) / 1e4
    wanted = math.ceil(needed / MOST_SHARE)
    if options.calibration == "split":
        raise CalibrationError(
            f"{held} of {count} normal images can be held out, too few for a false-alarm rate of {alpha:g}{sure}: "
            f"{needed} are needed. Collect {wanted} normal images, allow a rate of {lowest:.4g}, or leave out "
            "--calibration split"
        )
    note = (
        f"{held} of {count} normal images were held out. That is too few for the wanted false-alarm rate of {alpha:g}"
        f"{sure}, which takes {needed}: the lowest that they can promise is {lowest:.4g}, and this is what the "
        f"threshold is for. With {wanted} normal images the wanted rate could be had."
    )
    return Plan((_sorted(order[:held]),), lowest, (note,))


def _sorted(values: NDArray[np.intp]) -> tuple[int, ...]:
    return tuple(sorted(int(value) for value in values))


# ------------------------------------------------------------------------------------------------------------ training


def _bytes(tensors: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    return save(
        {key: value.detach().contiguous().clone() for key, value in tensors.items()}, {"usf": json.dumps(about)}
    )


def _resume(
    path: Path, identity: str, say: Callable[[str], None] = print
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and notes of a checkpoint of this very training; ``None`` where there is none.

    A damaged one is removed, and said to be.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("usf", "{}"))
            if about.get("identity") != identity:
                return None
            return {key: stored.get_tensor(key) for key in stored.keys()}, about  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        say(f"{path.name} is damaged ({error}): removed, and its flow is trained from the start")
        path.unlink(missing_ok=True)
        return None


class _Clock:
    """Seconds over all legs of a run that was stopped and went on; each counts to its last checkpoint.

    Args:
        path: JSON file that keeps them.
        key: of the trainings; seconds of others do not count.
        started: ``time.perf_counter()`` at the start of this leg.
    """

    def __init__(self, path: Path, key: str, started: float) -> None:
        self.path, self.key, self.started, self.earlier = path, key, started, 0.0
        # A clock that cannot be read is no reason to stop.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(path.read_text("utf8"))
            if kept["key"] == key:
                self.earlier = float(kept["seconds"])

    def seconds(self) -> float:
        """All legs, this one to now."""
        return self.earlier + time.perf_counter() - self.started

    def keep(self) -> None:
        """Write them down."""
        write_json(self.path, {"key": self.key, "seconds": self.seconds()})


def train(
    model: FastflowModel,
    features: Features,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    checkpoint: Path,
    identity: str,
    progress: bool = True,
    label: str = "training",
    say: Callable[[str], None] = print,
    kept: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train on cached features, with a checkpoint after every epoch; goes on from the last one.

    As :func:`usf.study.detection.fit`, but for the order of the images, which is drawn anew for each epoch from its
    number: a training that was stopped and went on gives the weights of one that was not.

    Args:
        model: from :func:`usf.deploy.build`, changed in place.
        features: of normal images.
        epochs, batch_size, seed: as there.
        checkpoint: safetensors file.
        identity: of the training; a checkpoint with another one is not used.
        progress: show a bar.
        label: the bar's title.
        say: receives a line where the checkpoint is damaged.
        kept: called after each checkpoint.

    Returns:
        mean negative log-likelihood of each epoch, nats per dimension.

    Raises:
        NotFiniteError: a loss that is not finite.
    """
    from usf.study.detection import NotFiniteError

    parameters = dict(zip(map(str, range(10**6)), model.trainable_parameters(), strict=False))
    optimiser = model.optimiser()
    losses: list[float] = []
    if (found := _resume(checkpoint, identity, say)) is not None:
        tensors, about = found
        losses = [float(loss) for loss in about["losses"]]
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(tensors[f"p{key}"])
        state = {
            int(key): {name: tensors[f"{name}.{key}"] for name in ("step", "exp_avg", "exp_avg_sq")}
            for key in parameters
            if f"step.{key}" in tensors
        }
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    count = len(features)
    constant = 0.5 * math.log(2 * math.pi)
    with tqdm(total=epochs * count, initial=len(losses) * count, desc=label, unit="image", disable=not progress) as bar:
        for epoch in range(len(losses) + 1, epochs + 1):
            model.train()
            order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))
            total = 0.0
            for part in batches(count, batch_size):
                maps = features.batch(order[part])
                optimiser.zero_grad(set_to_none=True)
                for loss in model.gradients(maps):
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                    total += float(loss) * len(maps[0])
                bar.update(len(maps[0]))
            if not math.isfinite(total):
                raise NotFiniteError(f"{label}: the loss is {total} in epoch {epoch}", epoch=epoch)
            losses.append(total / count / features.dimension + constant)
            bar.set_postfix({"nats/dim": f"{losses[-1]:.3f}"}, refresh=False)
            tensors = {f"p{key}": parameter for key, parameter in parameters.items()}
            for key, own in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}.{key}": value for name, value in own.items()}
            atomic_write(checkpoint, _bytes(tensors, {"identity": identity, "losses": losses}))
            kept()
    model.eval()
    return losses


# ---------------------------------------------------------------------------------------------------------- the result


@dataclasses.dataclass(frozen=True)
class Norms:
    """Norms of all latents of normal images: they have a chi law where a flow did what its Gaussian base asks for.

    Attributes:
        dimension: latents of an image.
        fit: of the images that flow k was trained on, each (m_k,).
        held_out: of those that it was not trained on, each (n_k,).
    """

    dimension: int
    fit: list[NDArray[np.float64]]
    held_out: list[NDArray[np.float64]]

    @property
    def square(self) -> float:
        """Mean squared latent of the images not trained on; 1 under the base."""
        return float(np.mean(np.concatenate(self.held_out) ** 2)) / self.dimension

    @property
    def effective(self) -> float:
        """Degrees of freedom with which the norms vary, as many as latents under the base; median over flows.

        Raises:
            CalibrationError: norms that do not vary at all.
        """
        return float(np.median([ChiLaw.fit(norms).dimension for norms in self.fit]))

    def pit(self) -> NDArray[np.float64]:
        """Probability integral transforms (n,) of images not trained on, under the chi law of all latents.

        The law's variance is the mean squared latent of the images that the flow was trained on: the learned scales
        are still on their way after a short training, and one number repairs that.
        """
        return np.concatenate(
            [
                ChiLaw(self.dimension, float(np.mean(fit**2)) / self.dimension).pit(held)
                for fit, held in zip(self.fit, self.held_out, strict=True)
            ]
        )

    def pit_fitted(self) -> NDArray[np.float64]:
        """The same under the chi law that has mean and variance of the images trained on.

        Raises:
            CalibrationError: norms that do not vary at all.
        """
        return np.concatenate([ChiLaw.fit(fit).pit(held) for fit, held in zip(self.fit, self.held_out, strict=True)])


@dataclasses.dataclass(frozen=True)
class Speed:
    """How long scoring takes on this machine, reading of files included.

    Attributes:
        latency: median seconds of one image alone.
        slow: 95th percentile of the same.
        rate: images a second, in batches of eight.
        machine: processor and threads.
    """

    latency: float
    slow: float
    rate: float
    machine: str


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything that the report shows.

    Attributes:
        survey, options, plan: what was found, asked for and decided.
        weights: of the backbone.
        deployed: the detector, as saved.
        model: its folder.
        losses: of each flow, nats per dimension by epoch.
        norms: of the latents of normal images.
        calibration: normal images with the score by the flow that was not trained on them.
        scored: test images.
        metrics: name -> value in [0, 1], where labels allow.
        speed: of scoring.
        seconds: of the whole run; of one that was stopped all legs, each but the last to its last checkpoint.
    """

    survey: Survey
    options: Options
    plan: Plan
    weights: Weights
    deployed: Deployed
    model: Path
    losses: list[list[float]]
    norms: Norms
    calibration: list[Scored]
    scored: list[Scored]
    metrics: dict[str, float]
    speed: Speed
    seconds: float


def _probe(folder: Path) -> None:
    """Fail before the work, not after it, where nothing can be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
        pass


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock ends with the process, however it ends.

    Raises:
        InspectionError: another process is in there.
    """
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InspectionError(
            f"{folder.parent} is being written by another `usf inspect`: wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InspectionError(
            f"{folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: make room, choose another "
            "--out, or a smaller --size"
        )


def inspect(
    found: Survey,
    out: str | Path,
    options: Options | None = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Result:
    """Train, calibrate, test and save a detector; see :mod:`usf.report` for the page about it.

    Args:
        found: from :func:`survey`.
        out: folder for ``model/`` and for ``state/``, from which a stopped run goes on.
        options: by default :class:`Options`.
        progress: show bars.
        say: receives lines for the reader.

    Raises:
        ImageFolderError: too few normal images.
        CalibrationError: a promise that cannot be made.
        InspectionError: not enough disk space, or another process that writes to ``out``.
        OSError: ``out`` cannot be written.
        ValueError, FileNotFoundError, ConnectionError: weights that do not exist or do not fit.
    """
    options = options or Options()
    out = Path(out).expanduser()
    decided = plan(len(found.normals), options)
    for folder in (out, out / "state"):
        _probe(folder)
    with _alone(out / "state"):
        return _inspect(found, out, options, decided, progress, say)


def _inspect(
    found: Survey, out: Path, options: Options, decided: Plan, progress: bool, say: Callable[[str], None]
) -> Result:
    started = time.perf_counter()
    for note in decided.notes:
        say(note)

    from usf import deploy
    from usf.detectors import FlowOptions, backbones

    weights = backbones.resolve(options.weights, backbone=options.backbone, seed=options.seed, announce=say)
    models = [
        deploy.build(options.size, weights, FlowOptions(), options.seed + k, options.flow_steps)
        for k in range(len(decided.folds))
    ]
    losses, norms, clock = _train_all(models, found, out / "state", options, decided, weights, progress, say, started)

    detector = deploy.Detector(models)
    normal_files = [part.path for part in found.normals]
    held, pictures = _calibrate(detector, normal_files, decided, progress)
    deployed = deploy.Deployed.calibrated(detector, held, decided.alpha, options.confidence)
    scored = list(deploy.score_files(deployed, [p.path for p in found.test], progress=progress)) if found.test else []
    roles = {index: "calibration" for fold in decided.folds for index in fold}
    if len(decided.folds) > 1:
        roles = dict.fromkeys(roles, "training and calibration")
    index = {part.path: roles.get(i, "training") for i, part in enumerate(found.normals)}
    data = [
        {
            "image": p.name,
            "part": index.get(p.path, "test"),
            "width": p.size[0],
            "height": p.size[1],
            "sha256": p.sha256,
        }
        for p in found.parts
    ]
    deployed = deploy.save(
        out / "model", models, deployed, weights=weights, data=data, notes=decided.notes, onnx=options.onnx
    )
    calibration = _own_scores(deployed, found.normals, decided, pictures)
    speed = _speed(deployed, normal_files)
    shutil.rmtree(out / "state" / "features", ignore_errors=True)
    return Result(
        found, options, decided, weights, deployed, out / "model", losses, norms, calibration, scored,
        _metrics(found, scored, options.size), speed, clock.seconds(),
    )  # fmt: skip


def _train_all(
    models: Sequence[FastflowModel],
    found: Survey,
    state: Path,
    options: Options,
    decided: Plan,
    weights: Weights,
    progress: bool,
    say: Callable[[str], None],
    started: float,
) -> tuple[list[list[float]], Norms, _Clock]:
    from usf.detectors import backbones
    from usf.study.features import cache_key, extract

    normals = found.normals
    names = {part.path: f"{part.name} {part.sha256}" for part in normals}
    trainings = []
    for k, fold in enumerate(decided.folds):
        own = [i for i in range(len(normals)) if i not in set(fold)]
        steps = math.ceil(len(own) / options.batch_size)
        epochs = max(3, math.ceil(options.steps / steps))
        what = {
            "images": [names[normals[i].path] for i in own], "weights": cache_key(weights), "size": options.size,
            "epochs": epochs, "batch_size": options.batch_size, "seed": options.seed + k,
            "flow_steps": options.flow_steps, "torch": torch.__version__, "format": 1,
        }  # fmt: skip
        trainings.append((own, epochs, settings_hash(what)))
    checkpoints = [state / f"flow-{identity}.safetensors" for _, _, identity in trainings]
    measured = [state / f"norms-{identity}.json" for _, _, identity in trainings]
    clock = _Clock(state / "clock.json", settings_hash([identity for _, _, identity in trainings]), started)
    done = []
    for path, norms, (_, epochs, identity) in zip(checkpoints, measured, trainings, strict=True):
        stored = _resume(path, identity, say)
        done.append(stored is not None and len(stored[1]["losses"]) == epochs and norms.is_file())
    first = models[0]
    example = first.features(torch.zeros(1, 3, options.size, options.size))
    if all(done):
        features = None
    else:
        bytes_each = 4 * sum(level.numel() for level in example)
        trained = 4 * sum(parameter.numel() for parameter in first.trainable_parameters())
        state.mkdir(parents=True, exist_ok=True)
        _room(state, len(normals) * bytes_each + 8 * len(models) * trained)
        features = extract(
            backbones.build(weights), [part.path for part in normals], options.size, batch_size=options.batch_size,
            cache=state / "features", key=cache_key(weights), progress=progress, label="features",
        )  # fmt: skip
    losses = []
    for k, (model, path, (own, epochs, identity)) in enumerate(zip(models, checkpoints, trainings, strict=True), 1):
        chosen = features.subset(own) if features is not None else None
        label = "training" if len(models) == 1 else f"training {k} of {len(models)}"
        if chosen is None:
            stored = _resume(path, identity)
            assert stored is not None  # all are done
            with torch.no_grad():
                for number, parameter in enumerate(model.trainable_parameters()):
                    parameter.copy_(stored[0][f"p{number}"])
            model.eval()
            losses.append([float(loss) for loss in stored[1]["losses"]])
            continue
        assert features is not None
        losses.append(
            train(
                model,
                chosen,
                epochs=epochs,
                batch_size=options.batch_size,
                seed=options.seed + k - 1,
                checkpoint=path,
                identity=identity,
                progress=progress,
                label=label,
                say=say,
                kept=clock.keep,
            )
        )
        held = features.subset(list(decided.folds[k - 1]))
        write_json(measured[k - 1], {"fit": _norms(model, chosen), "held_out": _norms(model, held)})
    for path in (*state.glob("flow-*.safetensors"), *state.glob("norms-*.json")):  # of other settings
        if path not in (*checkpoints, *measured):
            path.unlink(missing_ok=True)
    rows = [json.loads(path.read_text("utf8")) for path in measured]
    fit, held_out = ([np.array(row[part], dtype=np.float64) for row in rows] for part in ("fit", "held_out"))
    return losses, Norms(sum(level.numel() for level in example), fit, held_out), clock


def _norms(model: FastflowModel, features: Features, batch_size: int = 8) -> list[float]:
    """Norms of all latents of each image."""
    found: list[float] = []
    with torch.inference_mode():
        for part in batches(len(features), batch_size):
            found += (2 * model.latents(features.batch(part)).energies()).sqrt().tolist()
    return found


def _calibrate(
    detector: Any, files: Sequence[Path], decided: Plan, progress: bool
) -> tuple[list[NDArray[np.float64]], dict[int, tuple[Tensor, NDArray[np.float32]]]]:
    """Scores of each fold by the flow that was not trained on it, and for the report (scores by all flows, map)."""
    from usf.deploy import members_of

    wanted = sorted(index for fold in decided.folds for index in fold)
    rows: dict[int, tuple[Tensor, NDArray[np.float32]]] = {}
    position = iter(wanted)
    for read, members, maps, failed in members_of(
        detector, [files[i] for i in wanted], progress=progress, label="calibration"
    ):
        if failed:
            raise InspectionError(f"{failed[0][0]} cannot be read any more ({failed[0][1]}): run again")
        for k in range(len(read)):
            rows[next(position)] = (members[k], maps[k].numpy())
    folds = [np.array([float(rows[i][0][k]) for i in fold]) for k, fold in enumerate(decided.folds)]
    return folds, rows


def _own_scores(
    deployed: Deployed, normals: Sequence[Part], decided: Plan, rows: dict[int, tuple[Tensor, NDArray[np.float32]]]
) -> list[Scored]:
    """Normal images as the calibration sees them: the score by the flow that was not trained on them."""
    from usf.deploy import Scored

    found = []
    for k, fold in enumerate(decided.folds):
        for i in fold:
            score = float(rows[i][0][k])
            p = float(deployed.calibration.p([score])[0])
            found.append(Scored(normals[i].path, score, p, score > deployed.threshold, rows[i][1]))
    return found


def _metrics(found: Survey, scored: Sequence[Scored], size: int) -> dict[str, float]:
    from usf.study.metrics import auroc, average_precision, pixel_metrics

    if not found.labelled:
        return {}
    by_path = {item.path: item for item in scored if not item.error}
    kept = [part for part in found.test if part.path in by_path]
    labels = np.array([part.label != "good" for part in kept])
    if len(set(labels.tolist())) < 2:
        return {}
    scores = np.array([by_path[part.path].score for part in kept])
    values = {
        "image AUROC": auroc(labels, scores),
        "average precision": average_precision(labels, scores),
        "false-alarm rate on normal test images": float(
            np.mean([by_path[p.path].alarm for p in kept if p.label == "good"])
        ),
        "anomalous test images found": float(np.mean([by_path[p.path].alarm for p in kept if p.label != "good"])),
    }
    if found.masked:
        samples = [Sample(part.path, part.label or "", part.mask) for part in kept]
        pixels = pixel_metrics(load_masks(samples, size), np.stack([by_path[part.path].map for part in kept]))
        values |= {"pixel AUROC": pixels.auroc, "AUPRO": pixels.aupro}
    return values


def _speed(deployed: Deployed, files: Sequence[Path], repeats: int = 12) -> Speed:
    from usf.deploy import score_files

    many = [files[i % len(files)] for i in range(max(16, repeats))]
    list(score_files(deployed, many[:2], progress=False))
    seconds = []
    for path in many[:repeats]:
        start = time.perf_counter()
        list(score_files(deployed, [path], batch_size=1, progress=False))
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    list(score_files(deployed, many[:16], batch_size=8, progress=False))
    rate = 16 / (time.perf_counter() - start)
    processor = hardware()["cpu"] or platform.machine()
    machine = f"{processor}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return Speed(float(np.median(seconds)), float(np.quantile(seconds, 0.95)), rate, machine)
