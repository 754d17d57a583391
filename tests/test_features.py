"""Features kept in a cache: the same numbers, named by what they depend on, refused when damaged."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from usf.detectors.backbones import Weights
from usf.study import features as module
from usf.study import images
from usf.study.features import FeatureCacheError, Features, cache_key, extract

WEIGHTS = Weights("resnet18", "random", "seed 0", "ab" * 32, seed=0)


class Pyramid(nn.Module):
    """A backbone of two levels that is no slower than it must be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.second = nn.Conv2d(4, 5, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        level = self.first(x)
        return [level, self.second(level)]


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [picture(tmp_path / "widget" / "good" / f"{index:03d}.png", index) for index in range(3)]


def test_features_equal_the_backbone_with_and_without_cache(files: list[Path], tmp_path: Path) -> None:
    backbone = Pyramid()
    plain = extract(backbone, files, 16, progress=False, batch_size=2)
    direct = backbone(images.normalise(images.load_images(files, 16)))
    assert len(plain) == 3
    assert plain.dimension == 4 * 16 + 5 * 4
    for level, expected in zip(plain.levels, direct, strict=True):
        assert torch.allclose(level, expected, atol=1e-6)
        assert not level.is_inference()
        assert not level.requires_grad
    cache = tmp_path / "features"
    for _ in range(2):
        cached = extract(backbone, files, 16, progress=False, batch_size=2, cache=cache, key="k")
        assert all(torch.equal(a, b) for a, b in zip(cached.levels, plain.levels, strict=True))
    assert [part.shape[0] for part in cached.batch(torch.tensor([2, 0]))] == [2, 2]
    function = extract(lambda batch: backbone(batch), files, 16, progress=False, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(function.levels, plain.levels, strict=True))


def test_cache_is_used(files: list[Path], tmp_path: Path) -> None:
    class Once(Pyramid):
        calls = 0

        def forward(self, x: Tensor) -> list[Tensor]:
            self.calls += 1
            return super().forward(x)

    backbone, cache = Once(), tmp_path / "features"
    for _ in range(3):
        extract(backbone, files, 16, progress=False, cache=cache, key="k")
    assert backbone.calls == 1


def test_everything_that_features_depend_on_names_the_entry(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "features"

    def entries(chosen: list[Path] = files, size: int = 16, key: str = "k") -> int:
        extract(Pyramid(), chosen, size, progress=False, cache=cache, key=key)
        return len(list(cache.iterdir()))

    assert entries() == entries() == 1
    assert entries(key="other weights") == 2
    assert entries(size=32) == 3
    assert entries(files[:2]) == 4
    assert entries(files[::-1]) == 5
    picture(files[1], seed=99)  # another picture under the same name
    assert entries() == 6
    with monkeypatch.context() as patch:
        patch.setattr(module, "IMAGENET_STD", (0.5, 0.5, 0.5))
        assert entries() == 7
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", module.FORMAT + 1)
        assert entries() == 8
    # The same pictures elsewhere are the same entry: what counts is what they show.
    moved = [
        picture(tmp_path / "elsewhere" / "good" / path.name, seed) for path, seed in zip(files, (0, 99, 2), strict=True)
    ]
    assert entries(moved) == 8
    assert not list(cache.glob(".*")), "nothing temporary"


def test_key_of_a_backbone_is_its_architecture_layers_and_weights() -> None:
    assert cache_key(WEIGHTS) == f"resnet18 layer1+layer2+layer3 {'ab' * 32}"


def test_damaged_feature_cache_is_refused_by_name(files: list[Path], tmp_path: Path) -> None:
    backbone, cache = Pyramid(), tmp_path / "features"

    def again() -> Features:
        return extract(backbone, files, 16, progress=False, cache=cache, key="k")

    again()
    victim = next(cache.glob("*/level1.npy"))
    whole = victim.read_bytes()
    data = bytearray(whole)
    data[-1] ^= 1
    for content in (bytes(data), whole[:-3]):
        victim.write_bytes(content)
        for _ in range(2):
            with pytest.raises(FeatureCacheError, match=r"level1.npy is missing or damaged: delete"):
                again()
    victim.unlink()
    with pytest.raises(FeatureCacheError, match=r"level1.npy is missing"):
        again()
    victim.write_bytes(whole)
    again()
    done = victim.parent / "features.json"
    text = done.read_text()
    done.write_text(text[:20])
    with pytest.raises(FeatureCacheError, match=r"features.json is damaged"):
        again()
    done.write_text(json.dumps(json.loads(text) | {"identity": "of another"}))
    with pytest.raises(FeatureCacheError, match="holds other features than its name says"):
        again()


def test_interrupted_extraction_leaves_nothing(files: list[Path], tmp_path: Path) -> None:
    class Failing(Pyramid):
        def forward(self, x: Tensor) -> list[Tensor]:
            raise KeyboardInterrupt

    cache = tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        extract(Failing(), files, 16, progress=False, cache=cache, key="k")
    assert not list(cache.iterdir())


def test_what_a_killed_run_left_is_swept_up_later(files: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "features"
    old, young = cache / ".partial-old", cache / ".partial-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "level0.npy").write_bytes(b"half")
    long_ago = time.time() - module.ABANDONED - 60
    os.utime(old, (long_ago, long_ago))
    extract(Pyramid(), files, 16, progress=False, cache=cache, key="k")
    assert not old.exists()
    assert young.exists(), "another process may be at it"


def test_writing_to_features_does_not_reach_the_file(files: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "features"
    first = extract(Pyramid(), files, 16, progress=False, cache=cache, key="k")
    before = first.levels[0].clone()
    first.levels[0].zero_()
    second = extract(Pyramid(), files, 16, progress=False, cache=cache, key="k")
    assert torch.equal(second.levels[0], before)


def test_cached_features_are_mapped_not_read(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x.new_ones(len(x), 256, 64, 64)]

    many = [picture(tmp_path / "good" / f"{index}.png", index) for index in range(24)]  # 4 MB of features each
    tracemalloc.start()
    found = extract(Wide(), many, 16, progress=False, cache=tmp_path / "features", key="k", batch_size=2)
    assert float(found.batch(slice(0, 2))[0].mean()) == 1.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.levels[0].nbytes > 100e6
    assert peak < 10e6  # torch's own allocations are not traced: those are the batch


def test_subsets_share_the_maps() -> None:
    whole = Features((torch.arange(6.0).reshape(6, 1, 1, 1), 10 * torch.arange(6.0).reshape(6, 1, 1, 1)))
    part = whole.subset([4, 1, 3])
    assert len(part) == 3
    assert part.levels[0] is whole.levels[0]
    assert [level.flatten().tolist() for level in part.batch(slice(0, 2))] == [[4, 1], [40, 10]]
    assert part.batch(torch.tensor([2, 0]))[0].flatten().tolist() == [3, 4]
    nested = part.subset([2, 1])
    assert nested.batch(slice(0, 2))[0].flatten().tolist() == [3, 1]
    assert nested.dimension == whole.dimension == 2
    assert nested.to("cpu").batch(slice(0, 1))[1].flatten().tolist() == [30]


def test_features_are_checked(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        extract(Pyramid(), [], 16)
    with pytest.raises(ValueError, match="needs a key"):
        extract(Pyramid(), files, 16, cache=tmp_path)
    with pytest.raises(ValueError, match="same number"):
        Features((torch.zeros(2, 1, 1, 1), torch.zeros(3, 1, 1, 1)))
