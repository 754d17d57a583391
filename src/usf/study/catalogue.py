"""MVTec AD and VisA: their classes, how many images each has, and their archives. Facts, to check a folder against."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

__all__ = ["DATASETS", "MVTEC_AD", "VISA", "Counts", "Dataset", "ImageFolderError", "dataset", "nearest"]


class ImageFolderError(ValueError):
    """A folder of images that cannot be used as it is; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Images of a class: normal ones to train on, normal and anomalous ones to test on."""

    train: int
    good: int
    bad: int

    def __str__(self) -> str:
        return f"{self.train} training, {self.good} normal and {self.bad} anomalous test images"


def _table(text: str) -> Mapping[str, Counts]:
    rows = (line.split() for line in text.strip().splitlines())
    return MappingProxyType({name: Counts(*map(int, counts)) for name, *counts in rows})


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A published dataset.

    Attributes:
        key: its name in records.
        title: name, reference and licence, for captions.
        folders: beginnings of folder names that stand for it, lower case.
        archive: file name under which anomalib downloads it.
        sha256: of the archive.
        classes: name -> how many images, of the whole class.
    """

    key: str
    title: str
    folders: tuple[str, ...]
    archive: str
    sha256: str
    classes: Mapping[str, Counts]

    @property
    def name(self) -> str:
        """The title without reference and licence."""
        return self.title.split(" (")[0]

    def counts(self, category: str) -> Counts:
        """How many images a class has.

        Raises:
            ImageFolderError: no such class; suggests the nearest name.
        """
        if category not in self.classes:
            raise ImageFolderError(f"{self.name} has no class {category!r}: {nearest(category, self.classes)}")
        return self.classes[category]

    def check_archive(self, folder: Path) -> None:
        """Refuse an archive in ``folder`` that is not the published one; do nothing where there is none.

        anomalib checks the hash right after its download, and leaves the file: the next call finds it and unpacks it
        unchecked.

        Raises:
            ImageFolderError: a wrong hash.
        """
        path = folder / self.archive
        if not path.is_file():
            return
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != self.sha256:
            raise ImageFolderError(
                f"{path} has SHA-256 {actual}, {self.name} has {self.sha256}: the download is damaged or another file; "
                "delete it, and everything that was unpacked from it"
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say to a name that does not exist.

    >>> nearest("bottel", ["bottle", "cable"])
    "did you mean 'bottle'? There are bottle, cable"
    >>> nearest("x", ["bottle", "cable"])
    'there are bottle, cable'
    """
    known = list(known)
    listing = ", ".join(known)
    if close := difflib.get_close_matches(name.lower(), known, n=1):
        return f"did you mean {close[0]!r}? There are {listing}"
    return f"there are {listing}"


MVTEC_AD = Dataset(
    key="mvtec",
    title="MVTec AD (Bergmann et al., 2019), CC BY-NC-SA 4.0",
    folders=("mvtec_ad", "mvtecad", "mvtec_anomaly_detection"),
    archive="mvtec_anomaly_detection.tar.xz",
    sha256="cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
    classes=_table("""
        bottle      209 20  63
        cable       224 58  92
        capsule     219 23 109
        carpet      280 28  89
        grid        264 21  57
        hazelnut    391 40  70
        leather     245 32  92
        metal_nut   220 22  93
        pill        267 26 141
        screw       320 41 119
        tile        230 33  84
        toothbrush   60 12  30
        transistor  213 60  40
        wood        247 19  60
        zipper      240 32 119
    """),
)
"""Counts of the dataset's own paper; 3629 training and 1725 test images."""

VISA = Dataset(
    key="visa",
    title="VisA (Zou et al., 2022), CC BY 4.0",
    folders=("visa",),
    archive="VisA_20220922.tar",
    sha256="2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
    classes=_table("""
        candle      900 100 100
        capsules    542  60 100
        cashew      450  50 100
        chewinggum  453  50 100
        fryum       450  50 100
        macaroni1   900 100 100
        macaroni2   900 100 100
        pcb1        904 100 100
        pcb2        901 100 100
        pcb3        905 101 100
        pcb4        904 101 100
        pipe_fryum  450  50 100
    """),
)
"""Counts of the dataset's own one-class split, ``split_csv/1cls.csv``; 8659 training and 2162 test images."""

DATASETS: Mapping[str, Dataset] = MappingProxyType({known.key: known for known in (MVTEC_AD, VISA)})


def dataset(key: str) -> Dataset:
    """The dataset of that key.

    Raises:
        ImageFolderError: there is none; suggests the nearest key.
    """
    if key not in DATASETS:
        raise ImageFolderError(f"unknown dataset {key!r}: {nearest(key, DATASETS)}")
    return DATASETS[key]
