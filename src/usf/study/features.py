"""Frozen features, computed once.

A frozen backbone in evaluation mode without augmentation gives the same features in every epoch, so they are extracted
once and shared by every coupling and seed. The numbers are those of running the backbone in every step.

A cache keeps them in memory-mapped files, so that a set of features need not fit into memory. What an entry holds
follows from its name, a hash of everything that the features depend on: the backbone's weights and layers, the
preprocessing, the type, the device, and the images' contents. Its files are checked whenever it is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from usf.detectors.backbones import Weights
from usf.study.images import IMAGENET_MEAN, IMAGENET_STD, batches, load_images, normalise

__all__ = ["FeatureCacheError", "Features", "cache_key", "extract"]

DONE = "features.json"
PARTIAL = ".partial-"
FORMAT = 2
"""Part of every entry's name; to be raised when the way from a file to its features changes."""

ABANDONED = 24 * 3600.0
"""Seconds after which an unfinished entry belongs to a run that was killed."""


class FeatureCacheError(RuntimeError):
    """A cached feature file that is not what was written."""


@dataclasses.dataclass(frozen=True)
class Features:
    """Feature maps of a set of images.

    Attributes:
        levels: one tensor (M, C_i, H_i, W_i) per stage, float32; in memory, or mapped from the cache.
        chosen: which of the M images this set has, in its order; ``None`` for all.
    """

    levels: tuple[Tensor, ...]
    chosen: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.levels or len({len(level) for level in self.levels}) != 1:
            raise ValueError("every level needs the same number of images")

    def __len__(self) -> int:
        return len(self.levels[0] if self.chosen is None else self.chosen)

    def batch(self, index: Tensor | slice) -> list[Tensor]:
        """The maps of some images, one tensor a stage."""
        where = index if self.chosen is None else self.chosen[index]
        return [level[where] for level in self.levels]

    def subset(self, index: Sequence[int]) -> Features:
        """Some of the images, by position; the maps are shared, not copied."""
        where = torch.as_tensor(list(index), dtype=torch.int64)
        return Features(self.levels, where if self.chosen is None else self.chosen[where])

    def to(self, device: torch.device | str) -> Features:
        """The same on another device."""
        return Features(tuple(level.to(device) for level in self.levels), self.chosen)

    @property
    def dimension(self) -> int:
        """Features of one image, over all stages."""
        return sum(level[0].numel() for level in self.levels)


def cache_key(weights: Weights) -> str:
    """What names a backbone in a cache: architecture, layers, and hash of the weights."""
    return f"{weights.backbone} {'+'.join(weights.layers)} {weights.sha256}"


def extract(
    backbone: Callable[[Tensor], Sequence[Tensor]],
    files: Sequence[Path],
    size: int,
    *,
    batch_size: int = 16,
    cache: Path | None = None,
    key: str = "",
    progress: bool = True,
    label: str = "features",
) -> Features:
    """Feature maps of ``files``, resized to ``size`` x ``size`` and normalised as ImageNet's.

    Args:
        backbone: frozen, e.g. from :func:`usf.detectors.backbones.build`; images (N, 3, size, size) -> a list of maps.
            Images are brought to the device of its parameters.
        files: images.
        size: pixels.
        batch_size: images at a time; the result does not depend on it beyond float32 rounding.
        cache: folder to keep the maps in, as memory-mapped files; ``None`` keeps them in memory (1.8 MB an image with
            ResNet-18 at 256 pixels).
        key: with ``cache``: which backbone with which weights this is, see :func:`cache_key`.
        progress: show a bar.
        label: the bar's title.

    Raises:
        ValueError: no files, or ``cache`` without ``key``.
        FeatureCacheError: a cached file was changed since it was written; names it.
    """
    if not files:
        raise ValueError("no images to extract features from")
    if cache is None:
        return _compute(backbone, files, size, batch_size, None, progress, label)
    if not key:
        raise ValueError("a cache needs a key: the backbone and the hash of its weights (see cache_key)")
    identity = _identity(key, files, size, _device(backbone))
    folder = cache / identity[:24]
    if not (folder / DONE).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        # Written beside its place and moved there when complete: an interrupted run leaves no half cache.
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=cache))
        try:
            _compute(backbone, files, size, batch_size, partial, progress, label)
            hashes = {path.name: _sha256(path) for path in sorted(partial.glob("*.npy"))}
            (partial / DONE).write_text(json.dumps({"identity": identity, "sha256": hashes}, indent=1))
            try:
                partial.rename(folder)
            except OSError:
                if not (folder / DONE).is_file():  # else another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _load(folder, identity)


def _identity(key: str, files: Sequence[Path], size: int, device: torch.device) -> str:
    """SHA-256 of everything that the features depend on."""
    parts = {
        "format": FORMAT,
        "backbone": key,
        "size": size,
        "resize": "bilinear, antialias, no aligned corners",
        "normalise": [IMAGENET_MEAN, IMAGENET_STD],
        "dtype": "float32",
        "device": device.type,
        "images": [[f"{path.parent.name}/{path.name}", _sha256(path)] for path in files],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sweep(cache: Path) -> None:
    """Remove unfinished entries of runs that were killed."""
    for path in cache.glob(f"{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(folder: Path, identity: str) -> Features:
    remedy = f"delete {folder} and run again"
    try:
        stored = json.loads((folder / DONE).read_text())
        expected: dict[str, str] = dict(stored["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise FeatureCacheError(f"{folder / DONE} is damaged ({error}): {remedy}") from error
    if stored.get("identity") != identity:
        raise FeatureCacheError(f"{folder} holds other features than its name says: {remedy}")
    levels = []
    # By the number in the name: level10 comes after level9.
    for name in sorted(expected, key=lambda name: int("".join(filter(str.isdigit, name)) or 0)):
        path = folder / name
        if not path.is_file() or _sha256(path) != expected[name]:
            raise FeatureCacheError(f"{path} is missing or damaged: {remedy}")
        # Copy on write: torch wants writable memory, the file stays as it is.
        levels.append(torch.from_numpy(np.load(path, mmap_mode="c")))
    return Features(tuple(levels))


def _device(backbone: object) -> torch.device:
    if isinstance(backbone, nn.Module):
        parameter = next(backbone.parameters(), None)
        if parameter is not None:
            return parameter.device
    return torch.device("cpu")


def _compute(
    backbone: Callable[[Tensor], Sequence[Tensor]],
    files: Sequence[Path],
    size: int,
    batch_size: int,
    folder: Path | None,
    progress: bool,
    label: str,
) -> Features:
    if isinstance(backbone, nn.Module):
        backbone.eval()
    levels: list[Tensor] = []
    device = _device(backbone)
    with torch.inference_mode(), tqdm(total=len(files), desc=label, unit="image", disable=not progress) as bar:
        for part in batches(len(files), batch_size):
            images = normalise(load_images(files[part], size)).to(device)
            maps = [level.cpu() for level in backbone(images)]
            if not levels:
                levels = [_allocate((len(files), *level.shape[1:]), folder, i) for i, level in enumerate(maps)]
            for target, level in zip(levels, maps, strict=True):
                target[part] = level
            bar.update(len(images))
    # Inference tensors cannot enter a graph later.
    return Features(tuple(level.clone() if level.is_inference() else level for level in levels))


def _allocate(shape: tuple[int, ...], folder: Path | None, index: int) -> Tensor:
    if folder is None:
        # Through numpy: memory made inside inference_mode by torch would be marked as inference's own.
        return torch.from_numpy(np.empty(shape, dtype=np.float32))
    path = os.fspath(folder / f"level{index}.npy")
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # A full disk is an error here and now, and not a signal that ends the process when a page is written.
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return torch.from_numpy(mapped)
