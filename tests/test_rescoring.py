"""CFlow scored in several ways: the ways are what they say, a training leaves one file and is not repeated."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("anomalib", reason="needs the detectors extra")

from usf.detectors import FlowOptions, resolve
from usf.detectors.model import Latents
from usf.study import detection, records, rescoring, textures
from usf.study.images import read
from usf.study.rescoring import Rescoring

SIZE = 32


@pytest.fixture(scope="module")
def latents() -> Latents:
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 8, 8), (128, 4, 4), (256, 2, 2))
    z = [torch.randn(7, *shape, generator=generator) for shape in shapes]
    return Latents(z, [torch.randn(7, *shape[1:], generator=generator) for shape in shapes])


def test_ways_agree_where_they_must(latents: Latents) -> None:
    weights = resolve("random", layers=rescoring.LAYERS, announce=None)
    options = FlowOptions(coupling="affine", mixing="permutation")
    model = detection.build("cflow", SIZE, weights, options, seed=0, layers=rescoring.LAYERS, coupling_blocks=1)
    maps = rescoring.ways_to_score(model, latents, batch=3)
    assert set(maps) == set(rescoring.WAYS)
    assert all(way.shape == (7, SIZE, SIZE) for way in maps.values())
    whole = model.stock_maps(latents)[:, 0]
    assert torch.allclose(maps["stock, whole set"], whole)
    # An image alone has the largest likelihood of its own batch: its smallest score is zero.
    assert maps["stock, one by one"].amin(dim=(1, 2)).abs().max() < 1e-5
    assert not torch.allclose(maps["stock, batches of 32"], whole)
    # Relative to a fixed number instead of the batch's maximum: the order of one image's pixels under one layer is the
    # same, and an image's map does not change with its neighbours.
    few = rescoring.ways_to_score(model, Latents([z[:2] for z in latents.z], [d[:2] for d in latents.log_dets]))
    for way in ("sum of probabilities", "log_prob", "norm"):
        assert torch.allclose(few[way], maps[way][:2], atol=1e-6), way


def test_training_leaves_one_file_and_is_not_repeated(tmp_path: Path) -> None:
    images = read(textures.ensure(small=True)).subset(train=2, per_kind=1)
    settings = [Rescoring("additive", "lu", 0, 2, SIZE), Rescoring("affine", "permutation", 0, 2, SIZE)]
    said: list[str] = []
    files = rescoring.run(images, settings, tmp_path / "runs", weights="random", progress=False, say=said.append)
    assert len(said) == 2
    rows = rescoring.gather(tmp_path / "runs", tmp_path / "all.csv")
    assert len(rows) == 2 * 2 * len(rescoring.WAYS)
    assert records.read_csv(tmp_path / "all.csv") == rows
    assert all(row["nonfinite"] == 0 and 0 <= row["image_auroc"] <= 1 for row in rows)
    # A constant determinant caps the likelihood at the base's mode, times the scale that all inputs share.
    uniform = [row["max_log_prob"] for row in rows if row["coupling"] == "additive"]
    assert max(uniform) < rescoring.ceiling() + 0.1
    found = rescoring.outcomes(pd.DataFrame(rows))
    assert list(found) == ["H1", "H2", "H3", "H4"]
    assert found["H3"].startswith("no likelihoods")
    areas, fibres = rescoring.summary(pd.DataFrame(rows))
    assert list(areas.index) == list(rescoring.WAYS)
    assert (fibres["seeds"] == 1).all()
    before = [path.stat().st_mtime_ns for path in files]
    rescoring.run(images, settings, tmp_path / "runs", weights="random", progress=False, say=said.append)
    assert len(said) == 2
    assert [path.stat().st_mtime_ns for path in files] == before


def test_bad_input_is_named(tmp_path: Path) -> None:
    images = read(textures.ensure(small=True))
    with pytest.raises(ValueError, match="one size at a time"):
        rescoring.run(
            images, [Rescoring("gin", "lu", 0, 1, 32), Rescoring("gin", "lu", 0, 1, 64)], tmp_path, progress=False
        )
    assert rescoring.outcomes(pd.DataFrame()) == {}
    with pytest.raises(FileNotFoundError, match="no records"):
        rescoring.gather(tmp_path, tmp_path / "all.csv")
