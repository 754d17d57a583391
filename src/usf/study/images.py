"""Folders of images, checked before anything is trained on them.

MVTec layout: ``CLASS/train/good/*.png``, ``CLASS/test/DEFECT/*.png``, ``CLASS/ground_truth/DEFECT/*_mask.png``;
``test/good`` holds the normal test images, which have no mask. VisA also comes with a split file of its own. A class of
MVTec AD or VisA must be complete. Every problem is an :class:`ImageFolderError` that names the file and the remedy.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from usf import paths
from usf.study import catalogue
from usf.study.catalogue import Counts, Dataset, ImageFolderError

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SUFFIXES",
    "ImageFolder",
    "Manifest",
    "Sample",
    "datamodule",
    "find",
    "hold_out",
    "load_images",
    "load_masks",
    "normalise",
    "read",
    "read_class",
    "upright",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LAYOUT = "CLASS/train/good/*.png, CLASS/test/DEFECT/*.png, CLASS/ground_truth/DEFECT/*_mask.png"

# Beginnings of folder names, beside those of the catalogue.
SOURCES: tuple[tuple[str, str], ...] = (
    ("hazelnut_toy", "anomalib's hazelnut_toy, CC BY 4.0"),
    ("textures", "the built-in set of procedural textures"),
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One test image.

    Attributes:
        path: the image.
        defect: name of its folder; ``"good"`` for a normal one.
        mask: ground truth of an anomalous image, where the folder has one.
        threshold: what is above it in a mask is anomalous: 127, or 0 where a mask numbers the kinds of defect.
    """

    path: Path
    defect: str
    mask: Path | None = None
    threshold: int = 127

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
    def counts(self) -> Counts:
        """How many images there are to train and to test on."""
        bad = int(self.labels.sum())
        return Counts(len(self.train), len(self.test) - bad, bad)

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
            upright(image)
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


def _recognise(root: Path) -> tuple[str, Dataset | None]:
    """(what captions say, dataset of the catalogue), from the names of the class folder and those above it."""
    for folder in (root, *root.parents):
        name = folder.name.lower()
        for prefix, text in SOURCES:
            if name.startswith(prefix):
                return text, None
        for known in catalogue.DATASETS.values():
            if name.startswith(known.folders):
                return known.title, known
    return "a folder of the reader's (licence not stated)", None


def _check_counts(found: ImageFolder, known: Dataset) -> ImageFolder:
    expected = known.counts(found.name)
    if found.counts != expected:
        raise ImageFolderError(
            f"{found.root} holds {found.counts}, but {known.name}'s {found.name} has {expected}: the folder is not "
            "complete, or not that class; unpack the archive again, or keep images of your own under another name"
        )
    return found


def read(folder: str | Path, *, masks: bool = True, source: str | None = None) -> ImageFolder:
    """Read and check a folder in MVTec layout: every file is decoded once, every mask compared with its image.

    A class of MVTec AD or VisA, recognised by its name and that of a folder above it, must be complete.

    Args:
        folder: the folder of a class, or one that holds exactly one class.
        masks: whether every anomalous test image must have a mask.
        source: what captions say; by default recognised from the folders' names.

    Raises:
        ImageFolderError: a missing or empty folder, no normal training image, no anomalous or no normal test image, a
            file that is not an image or is truncated, a mask that is missing, empty, or of another size than its image,
            a class of a known dataset with another number of images.
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

    recognised, known = _recognise(root)
    found = _checked(root, train, samples, masks, source or recognised)
    return _check_counts(found, known) if known is not None and root.name in known.classes else found


def _checked(root: Path, train: Sequence[Path], samples: Sequence[Sample], masks: bool, source: str) -> ImageFolder:
    """Decode everything, and compare masks with images."""
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
        if not _mask_array(sample).any():
            raise ImageFolderError(
                f"{sample.mask} marks no pixel: an anomalous image needs a mask with values above {sample.threshold}"
            )
    parts = [("train/good", path) for path in train]
    parts += [(f"test/{sample.defect}", sample.path) for sample in samples]
    parts += [("masks", sample.mask) for sample in samples if sample.mask is not None]
    return ImageFolder(root, tuple(train), tuple(samples), _manifest(root, parts), source)


VISA_SPLIT = ("split_csv", "1cls.csv")


def _read_visa(root: Path, category: str, masks: bool) -> ImageFolder:
    """A class of VisA as it is published, by its split file."""
    split = root.joinpath(*VISA_SPLIT)
    train: list[Path] = []
    samples: list[Sample] = []

    def file(name: str) -> Path:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ImageFolderError(f"{split}, line {number}: {name} is outside of {root}; unpack the archive again")
        if not path.is_file():
            raise ImageFolderError(f"{path} is missing, which {split} lists in line {number}: unpack the archive again")
        return path

    with split.open(newline="", encoding="utf8") as stream:
        rows = csv.DictReader(stream)
        if missing := {"object", "split", "label", "image", "mask"} - set(rows.fieldnames or ()):
            raise ImageFolderError(f"{split} has no column {', '.join(sorted(missing))}: it is not VisA's split file")
        for number, row in enumerate(rows, start=2):
            if row["object"] != category:
                continue
            part = (row["split"], row["label"])
            if part == ("train", "normal"):
                train.append(file(row["image"]))
            elif part == ("test", "normal"):
                samples.append(Sample(file(row["image"]), "good"))
            elif part == ("test", "anomaly"):
                # VisA's masks hold the number of the defect's kind.
                mask = file(row["mask"]) if row["mask"] else None
                samples.append(Sample(file(row["image"]), "bad", mask, threshold=0))
            else:
                raise ImageFolderError(f"{split}, line {number}: split and label {' '.join(part)} are not VisA's")
    samples.sort(key=lambda sample: (sample.anomalous, sample.path.name))
    return _checked(root / category, sorted(train), samples, masks, catalogue.VISA.title)


def read_class(dataset: str, root: str | Path, category: str, *, masks: bool = True) -> ImageFolder:
    """Read and check a class of MVTec AD or VisA, which must be complete.

    Args:
        dataset: ``"mvtec"`` or ``"visa"``.
        root: the folder with all classes: as published, or as anomalib leaves it (``visa_pytorch/`` for VisA).
        category: the class.
        masks: see :func:`read`.

    Raises:
        ImageFolderError: an unknown dataset or class (with the nearest name), an archive with a wrong hash beside the
            classes, another number of images than was published, and everything that :func:`read` refuses.

    >>> read_class("mvtec", ".", "bottel")
    Traceback (most recent call last):
    ...
    usf.study.catalogue.ImageFolderError: MVTec AD has no class 'bottel': did you mean 'bottle'? There are bottle, ...
    """
    known = catalogue.dataset(dataset)
    known.counts(category)
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise ImageFolderError(f"{root} is not a folder: pass the one that holds the classes of {known.name}")
    known.check_archive(root)
    for folder in (root / category, root / "visa_pytorch" / category):
        if (folder / "train").is_dir():
            found = read(folder, masks=masks, source=known.title)
            break
    else:
        if known is not catalogue.VISA or not root.joinpath(*VISA_SPLIT).is_file():
            present = ", ".join(folder.name for folder in _subfolders(root)) or "nothing"
            raise ImageFolderError(
                f"{root} has no class {category} (it holds {present}): pass the folder with the classes of "
                f"{known.name}, or let anomalib fetch them with datamodule(..., download=True)"
            )
        found = _read_visa(root, category, masks)
    return _check_counts(found, known)


def datamodule(
    dataset: str, root: str | Path, category: str, *, download: bool = False, **settings: Any
) -> AnomalibDataModule:
    """anomalib's datamodule of a class, after the checks of :func:`read_class`: what it would find out while it trains,
    or not at all.

    Args:
        dataset, root, category: see :func:`read_class`.
        download: let anomalib fetch and unpack what is missing, gigabytes of it.
        settings: the datamodule's, e.g. ``train_batch_size``. Its validation images are the test images unless
            ``val_split_mode`` says otherwise.

    Raises:
        ImageFolderError: see :func:`read_class`.
    """
    known = catalogue.dataset(dataset)
    known.counts(category)
    folder = Path(root).expanduser().resolve()
    # Before anomalib sees it: an archive that it refused once it accepts the second time.
    known.check_archive(folder)
    from anomalib.data import MVTecAD, Visa

    module = (Visa if known is catalogue.VISA else MVTecAD)(root=folder, category=category, **settings)
    if download:
        module.prepare_data()
    read_class(dataset, folder, category)
    return module


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


def upright(image: Image.Image) -> bool:
    """Decode an opened image to its end and turn it, in place, as its EXIF orientation says; whether that turned it.

    Cameras store a photo as the sensor lay and say in its EXIF how it was held. Two photos of one part are alike only
    when both are turned. anomalib's own datamodules do not turn images.
    """
    turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return turned


def _rgb(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3), upright. Transparency is dropped; grey of 16 bits keeps its high byte, where Pillow would clip it."""
    with Image.open(path) as image:
        upright(image)
        if image.mode.startswith("I"):
            high = np.clip(np.asarray(image, dtype=np.int64) // 256, 0, 255).astype(np.uint8)
            return np.repeat(high[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def _mask_array(sample: Sample) -> NDArray[np.bool_]:
    assert sample.mask is not None
    with Image.open(sample.mask) as image:
        upright(image)
        return np.asarray(image.convert("L")) > sample.threshold


def load_images(files: Sequence[Path], size: int) -> Tensor:
    """Decode, turn upright and resize to ``size`` x ``size``: (N, 3, size, size), float32 in [0, 1].

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
        mask = torch.from_numpy(_mask_array(sample))[None, None].float()
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
