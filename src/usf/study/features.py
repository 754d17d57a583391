"""Frozen features, computed once.

A frozen backbone in evaluation mode without augmentation gives the same features in every epoch, so they are extracted
once and shared by every coupling and seed. The numbers are those of running the backbone in every step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from usf.study.images import batches, load_images, normalise

__all__ = ["FeatureCacheError", "Features", "extract"]

DONE = "features.json"


class FeatureCacheError(RuntimeError):
    """A cached feature file that is not what was written."""


@dataclasses.dataclass(frozen=True)
class Features:
    """Feature maps of a set of images.

    Attributes:
        levels: one tensor (N, C_i, H_i, W_i) per stage, float32; in memory, or mapped from the cache.
    """

    levels: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.levels or len({len(level) for level in self.levels}) != 1:
            raise ValueError("every level needs the same number of images")

    def __len__(self) -> int:
        return len(self.levels[0])

    def batch(self, index: Tensor | slice) -> list[Tensor]:
        """The maps of some images, one tensor a stage."""
        return [level[index] for level in self.levels]

    @property
    def dimension(self) -> int:
        """Features of one image, over all stages."""
        return sum(level[0].numel() for level in self.levels)


def extract(
    backbone: nn.Module,
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
        backbone: frozen; images (N, 3, size, size) -> a list of maps.
        files: images.
        size: pixels.
        batch_size: images at a time; the result does not depend on it beyond float32 rounding.
        cache: folder to keep the maps in, as memory-mapped files; ``None`` keeps them in memory (1.8 MB an image with
            ResNet-18 at 256 pixels).
        key: with ``cache``: what else the features depend on, i.e. the hashes of the weights and of the image manifest.
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
        raise ValueError("a cache needs a key: the hashes of the backbone's weights and of the image manifest")
    names = "\n".join(f"{path.parent.name}/{path.name}" for path in files)
    identity = hashlib.sha256(f"{key}\n{size}\nfloat32\nimagenet\n{names}".encode()).hexdigest()
    folder = cache / identity[:24]
    if not (folder / DONE).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        # Written beside its place and moved there when complete: an interrupted run leaves no half cache.
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(folder: Path, identity: str) -> Features:
    stored = json.loads((folder / DONE).read_text())
    remedy = f"delete {folder} and run again"
    if stored.get("identity") != identity:
        raise FeatureCacheError(f"{folder} holds other features than its name says: {remedy}")
    levels = []
    for name, expected in sorted(stored["sha256"].items()):
        path = folder / name
        if not path.is_file() or _sha256(path) != expected:
            raise FeatureCacheError(f"{path} is missing or damaged: {remedy}")
        # Copy on write: torch wants writable memory, the file stays as it is.
        levels.append(torch.from_numpy(np.load(path, mmap_mode="c")))
    return Features(tuple(levels))


def _compute(
    backbone: nn.Module,
    files: Sequence[Path],
    size: int,
    batch_size: int,
    folder: Path | None,
    progress: bool,
    label: str,
) -> Features:
    backbone.eval()
    levels: list[Tensor] = []
    device = next(backbone.parameters()).device
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
    return torch.from_numpy(np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape))
