"""The built-in image set: known pixels, honest masks, atomic and verified in the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from usf.study import textures


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the small set was made once."""
    cache = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USF_CACHE", str(cache))
        textures.ensure(small=True)
    return cache


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache, to be damaged."""
    copy = tmp_path / "cache"
    shutil.copytree(made, copy)
    monkeypatch.setenv("USF_CACHE", str(copy))
    return copy


def test_small_set_has_the_committed_hash_and_is_kept(cache: Path) -> None:
    folder = textures.ensure(small=True)
    assert textures.sha256_of_folder(folder) == textures.SHA256[True]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    train, good, each = textures.COUNTS[True]
    assert len(before) == train + good + 2 * each * len(textures.DEFECTS)
    assert textures.ensure(small=True) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before
    assert [path.name for path in folder.parent.iterdir()] == [textures.CLASS], "nothing temporary is left"


def _change_a_pixel(path: Path) -> None:
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    "damage", [_change_a_pixel, lambda path: path.write_bytes(path.read_bytes()[:500]), Path.unlink]
)
def test_damage_is_noticed(cache: Path, damage: Callable[[Path], object]) -> None:
    folder = textures.ensure(small=True)
    damage(folder / "test" / "hole" / "001.png")
    assert not textures._intact(folder, small=True)


def test_damaged_set_is_made_anew(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = textures.ensure(small=True)
    (folder / "test" / "hole" / "001.png").unlink()
    assert textures.sha256_of_folder(textures.ensure(small=True)) == textures.SHA256[True]
    assert "damaged" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == [textures.CLASS]


def test_wrong_generator_is_found_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USF_CACHE", str(tmp_path))
    monkeypatch.setitem(textures.COUNTS, True, (1, 1, 0))
    for _ in range(2):
        with pytest.raises(textures.TextureError, match="expected 780d"):
            textures.ensure(small=True)
    assert not list((tmp_path / "textures" / "small").iterdir()), "a wrong set is never left in the cache"


def test_small_set_is_the_beginning_of_the_large_one() -> None:
    assert set(textures._contents(True)) <= set(textures._contents(False))


@pytest.mark.parametrize("kind", list(textures.DEFECTS))
def test_defects_are_marked_and_small(kind: str) -> None:
    for index in range(2):
        image, mask = textures.generate(kind, index)
        assert image.shape == (textures.SIZE, textures.SIZE, 3)
        assert image.dtype == np.uint8
        assert 0 < mask.mean() < 0.15
        assert np.array_equal(image, textures.generate(kind, index)[0])


@pytest.mark.parametrize("kind", ["hole", "scratch", "thread"])
def test_pixels_outside_the_mask_are_those_of_the_undisturbed_cloth(kind: str) -> None:
    # These defects are painted on finished cloth, so that the same draws without them give the reference.
    image, mask = textures.generate(kind, 1)
    cloth = textures._Cloth.normal(textures._Draws(textures.SEED, *kind.encode(), 1))
    reference = np.clip(cloth.render(), 0, 255)
    assert np.array_equal(image[~mask], reference[~mask])
    assert (image[mask] != reference[mask]).mean() > 0.3


def test_mean_colour_does_not_tell_defects() -> None:
    normal = np.stack([textures.generate("train", index)[0].mean((0, 1)) for index in range(12)])
    spread = normal.std(axis=0)
    for kind in textures.DEFECTS:
        distance = abs(textures.generate(kind, 0)[0].mean((0, 1)) - normal.mean(axis=0))
        assert (distance < 3.5 * spread).all(), kind


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown kind 'tear'"):
        textures.generate("tear", 0)
