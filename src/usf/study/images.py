"""Folders of images in MVTec layout, checked before anything is trained on them.

``CLASS/train/good/*.png``, ``CLASS/test/DEFECT/*.png``, ``CLASS/ground_truth/DEFECT/*_mask.png``; ``test/good`` holds
the normal test images, which have no mask. Every problem is an :class:`ImageFolderError` that names the file and the
remedy.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from usf import paths

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SUFFIXES",
    "ImageFolder",
    "ImageFolderError",
    "Manifest",
    "Sample",
    "find",
    "hold_out",
    "load_images",
    "load_masks",
    "normalise",
    "read",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LAYOUT = "CLASS/train/good/*.png, CLASS/test/DEFECT/*.png, CLASS/ground_truth/DEFECT/*_mask.png"

# First match on any folder name above the class wins.
SOURCES: tuple[tuple[str, str], ...] = (
    ("mvtec_ad", "MVTec AD (Bergmann et al., 2019), CC BY-NC-SA 4.0"),
    ("hazelnut_toy", "anomalib's hazelnut_toy, CC BY 4.0"),
    ("textures", "the built-in set of procedural textures"),
)


class ImageFolderError(ValueError):
    """A folder of images that cannot be used as it is; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One test image.

    Attributes:
        path: the image.
        defect: name of its folder; ``"good"`` for a normal one.
        mask: ground truth of an anomalous image, where the folder has one.
    """

    path: Path
    defect: str
    mask: Path | None = None

    @property
    def anomalous(self) -> bool:
        """Whether the image has a defect."""
        return self.defect != "good"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds, in a form that goes into a record.

    Attributes:
        counts: images by part, e.g. ``{"train/good": 209, "test/good": 20, ..., "masks": 63}``.
        sha256: over the sorted relative paths and the SHA-256 of every file; equal for equal content wherever it lies.
    """

    counts: dict[str, int]
    sha256: str


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A class of images that passed every check.

    Attributes:
        root: the class folder.
        train: normal images.
        test: normal and anomalous images, normal ones first, then by defect and name.
        manifest: counts and hash.
        source: where the images are from and under which licence, for captions; no path of a machine in it.
    """

    root: Path
    train: tuple[Path, ...]
    test: tuple[Sample, ...]
    manifest: Manifest
    source: str

    @property
    def name(self) -> str:
        """The class."""
        return self.root.name

    @property
    def defects(self) -> tuple[str, ...]:
        """Names of the defects, sorted, without ``"good"``."""
        return tuple(sorted({sample.defect for sample in self.test if sample.anomalous}))

    @property
    def has_masks(self) -> bool:
        """Whether every anomalous test image has a mask, which pixel-level numbers need."""
        return all(sample.mask is not None for sample in self.test if sample.anomalous)

    @property
    def labels(self) -> NDArray[np.bool_]:
        """Whether each test image is anomalous, shape (test images,)."""
        return np.array([sample.anomalous for sample in self.test])

    def describe(self) -> str:
        """One line for outputs, captions and records."""
        bad = int(self.labels.sum())
        kinds = f"{len(self.defects)} kind{'s' if len(self.defects) != 1 else ''} of defect"
        return (
            f"{self.name} from {self.source}: {len(self.train)} normal images to train on, "
            f"{len(self.test) - bad} normal and {bad} anomalous ones ({kinds}) to test on, "
            f"manifest {self.manifest.sha256[:12]}"
        )

    def subset(self, train: int | None = None, per_kind: int | None = None) -> ImageFolder:
        """The first ``train`` training images and the first ``per_kind`` test images of every kind, good included.

        The manifest stays that of the whole folder.
        """
        kept: list[Sample] = []
        seen: dict[str, int] = {}
        for sample in self.test:
            seen[sample.defect] = seen.get(sample.defect, 0) + 1
            if per_kind is None or seen[sample.defect] <= per_kind:
                kept.append(sample)
        return dataclasses.replace(self, train=self.train[:train], test=tuple(kept))


def _listing(folder: Path) -> list[Path]:
    """Files of a folder that are meant to be images, sorted; hidden files are left out."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_folder(root: Path) -> Path:
    if not root.exists():
        raise ImageFolderError(f"image folder {root} does not exist: pass a folder in MVTec layout ({LAYOUT})")
    if not root.is_dir():
        raise ImageFolderError(f"{root} is a file: pass the folder of one class, in MVTec layout ({LAYOUT})")
    if (root / "train").is_dir():
        return root
    classes = [folder.name for folder in _subfolders(root) if (folder / "train").is_dir()]
    if len(classes) == 1:
        return root / classes[0]
    if classes:
        raise ImageFolderError(
            f"{root} holds {len(classes)} classes: pass the folder of one of them: {', '.join(classes)}"
        )
    raise ImageFolderError(f"{root} has no train/ folder: MVTec layout is needed ({LAYOUT})")


def _mask_of(image: Path, masks: Path) -> Path | None:
    for stem in (f"{image.stem}_mask", image.stem):
        for suffix in SUFFIXES:
            if (path := masks / f"{stem}{suffix}").is_file():
                return path
    return None


def _check_decodes(path: Path) -> tuple[int, int]:
    """Decode ``path`` to the end; its (width, height)."""
    if path.suffix.lower() not in SUFFIXES:
        raise ImageFolderError(f"{path} is not an image ({', '.join(SUFFIXES)} are read): move it out of the folder")
    try:
        with Image.open(path) as image:
            image.load()
            return image.size
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and struct.error alike
        raise ImageFolderError(
            f"{path} cannot be decoded ({error}): the file is truncated or not an image; copy it again or remove it"
        ) from error


def _manifest(root: Path, parts: Iterable[tuple[str, Path]]) -> Manifest:
    counts: dict[str, int] = {}
    total = hashlib.sha256()
    for part, path in sorted(parts, key=lambda pair: pair[1].relative_to(root).as_posix()):
        counts[part] = counts.get(part, 0) + 1
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {digest}\n".encode())
    return Manifest(counts, total.hexdigest())


def _source(root: Path) -> str:
    for folder in (root, *root.parents):
        for prefix, text in SOURCES:
            if folder.name.lower().startswith(prefix):
                return text
    return "a folder of the reader's (licence not stated)"


def read(folder: str | Path, *, masks: bool = True, source: str | None = None) -> ImageFolder:
    """Read and check a folder in MVTec layout: every file is decoded once, every mask compared with its image.

    Args:
        folder: the folder of a class, or one that holds exactly one class.
        masks: whether every anomalous test image must have a mask.
        source: what captions say; by default recognised from the folder's name.

    Raises:
        ImageFolderError: a missing or empty folder, no normal training image, no anomalous or no normal test image, a
            file that is not an image or is truncated, a mask that is missing, empty, or of another size than its image.
    """
    root = _class_folder(Path(folder).expanduser().resolve())
    train_folder, test_folder = root / "train" / "good", root / "test"
    if not train_folder.is_dir():
        raise ImageFolderError(f"{train_folder} does not exist: put the normal training images there")
    if extra := [path.name for path in _subfolders(root / "train") if path.name != "good"]:
        raise ImageFolderError(
            f"{root / 'train'} holds {', '.join(extra)} besides good: training images must be normal"
        )
    train = _listing(train_folder)
    if not train:
        raise ImageFolderError(f"{train_folder} is empty: put the normal training images there")
    if not test_folder.is_dir():
        raise ImageFolderError(f"{test_folder} does not exist: put test images into test/good and test/DEFECT")

    samples: list[Sample] = []
    kinds = _subfolders(test_folder)
    for kind in sorted(kinds, key=lambda path: (path.name != "good", path.name)):
        images = _listing(kind)
        if not images:
            raise ImageFolderError(f"{kind} is empty: fill it, or remove it")
        for image in images:
            mask = None if kind.name == "good" else _mask_of(image, root / "ground_truth" / kind.name)
            samples.append(Sample(image, kind.name, mask))
    for kind_name, wanted, present in (
        ("normal", "test/good", any(not sample.anomalous for sample in samples)),
        ("anomalous", "test/DEFECT", any(sample.anomalous for sample in samples)),
    ):
        if not present:
            raise ImageFolderError(f"{test_folder} has no {kind_name} image: put some into {wanted}")

    for path in train:
        _check_decodes(path)
    for sample in samples:
        size = _check_decodes(sample.path)
        if not sample.anomalous:
            continue
        if sample.mask is None:
            if masks:
                expected = root / "ground_truth" / sample.defect / f"{sample.path.stem}_mask.png"
                raise ImageFolderError(
                    f"{sample.path} has no mask: put it at {expected}, or ask for image-level numbers alone"
                )
            continue
        mask_size = _check_decodes(sample.mask)
        if mask_size != size:
            raise ImageFolderError(
                f"{sample.mask} has {mask_size[0]}x{mask_size[1]} pixels, its image {size[0]}x{size[1]}: "
                "masks must have the size of their image"
            )
        if not _mask_array(sample.mask).any():
            raise ImageFolderError(
                f"{sample.mask} marks no pixel: an anomalous image needs a mask with values above 127"
            )

    parts = [("train/good", path) for path in train]
    parts += [(f"test/{sample.defect}", sample.path) for sample in samples]
    parts += [("masks", sample.mask) for sample in samples if sample.mask is not None]
    return ImageFolder(root, tuple(train), tuple(samples), _manifest(root, parts), source or _source(root))


def hold_out(files: Sequence[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """(kept, held out): a random ``share`` of ``files``, at least one, is set aside; both parts keep their order.

    Raises:
        ValueError: fewer than two files, or a share outside (0, 1).
    """
    if len(files) < 2 or not 0 < share < 1:
        raise ValueError(
            f"cannot hold out {share:g} of {len(files)} images: two images and a share in (0, 1) are needed"
        )
    count = min(len(files) - 1, max(1, round(share * len(files))))
    out = set(np.random.default_rng(seed).permutation(len(files))[:count].tolist())
    kept = [path for index, path in enumerate(files) if index not in out]
    return kept, [path for index, path in enumerate(files) if index in out]


def find(images: str | Path | None = None, *, small: bool = False) -> ImageFolder:
    """The images of a chapter: the folder asked for, else MVTec's bottle under ``../shared``, else the built-in set.

    Args:
        images: a folder in MVTec layout; ``None`` (or ``""``) for the stated order, ``"built-in"`` for the built-in
            set.
        small: where the built-in set is used, its first few images of every kind (seconds, for tests).

    Raises:
        ImageFolderError: see :func:`read`. A folder that was asked for is never replaced by another one.
    """
    if images and str(images) != "built-in":
        return read(images)
    if not images and (bottle := paths.shared("images", "mvtec_ad_256", "bottle")):
        return read(bottle)
    from usf.study import textures

    return read(textures.ensure(small=small))


def _rgb(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _mask_array(path: Path) -> NDArray[np.bool_]:
    with Image.open(path) as image:
        return np.asarray(image.convert("L")) > 127


def load_images(files: Sequence[Path], size: int) -> Tensor:
    """Decode and resize to ``size`` x ``size``: (N, 3, size, size), float32 in [0, 1].

    Bilinear with antialiasing, as anomalib's and torchvision's ``Resize``; images that have the size already are not
    touched.
    """
    out = torch.empty(len(files), 3, size, size)
    for index, path in enumerate(files):
        pixels = torch.from_numpy(_rgb(path).copy()).permute(2, 0, 1)[None].float() / 255
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        out[index] = pixels[0]
    return out


def load_masks(samples: Sequence[Sample], size: int) -> NDArray[np.bool_]:
    """Ground truth at ``size`` x ``size``, nearest neighbour: (N, size, size); all false for normal images.

    Raises:
        ImageFolderError: an anomalous image without a mask.
    """
    out = np.zeros((len(samples), size, size), dtype=bool)
    for index, sample in enumerate(samples):
        if not sample.anomalous:
            continue
        if sample.mask is None:
            raise ImageFolderError(f"{sample.path} has no mask")
        mask = torch.from_numpy(_mask_array(sample.mask))[None, None].float()
        out[index] = F.interpolate(mask, size=(size, size), mode="nearest")[0, 0].numpy() > 0.5
    return out


def normalise(images: Tensor) -> Tensor:
    """ImageNet's mean and deviation per channel, for a backbone: (N, 3, H, W) -> (N, 3, H, W)."""
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def batches(count: int, size: int) -> Iterator[slice[Any, Any, Any]]:
    """Slices that cover ``range(count)`` in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
