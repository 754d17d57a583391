"""CFlow scored in several ways: the ways are what they say, a training leaves one file and is not repeated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

pytest.importorskip("anomalib", reason="needs the detectors extra")

from usf import paths
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
    assert "no likelihoods that are not finite, and none broke off: as predicted" in found["H3"]
    areas, fibres = rescoring.summary(pd.DataFrame(rows))
    assert list(areas.index) == list(rescoring.WAYS)
    assert (fibres["seeds"] == 1).all()
    # Both were trained in one run, whose machine and versions stand beside the rows; a run known before stays.
    (name,) = {row["run"] for row in rows}
    origins = json.loads((tmp_path / "all.json").read_text("utf8"))
    assert set(origins) == {name}
    assert origins[name]["versions"]["torch"] == torch.__version__.split("+")[0]
    (tmp_path / "runs" / "runs" / f"{name}.json").unlink()
    rescoring.gather(tmp_path / "runs", tmp_path / "all.csv")
    assert json.loads((tmp_path / "all.json").read_text("utf8")) == origins
    before = [path.stat().st_mtime_ns for path in files]
    rescoring.run(images, settings, tmp_path / "runs", weights="random", progress=False, say=said.append)
    assert len(said) == 2
    assert [path.stat().st_mtime_ns for path in files] == before


def test_another_setting_is_another_file(tmp_path: Path) -> None:
    images = read(textures.ensure(small=True)).subset(train=2, per_kind=1)
    setting = Rescoring("additive", "lu", 0, 1, SIZE)
    said: list[str] = []

    def files(setting: Rescoring, train: int = 2, fibres: int = 64) -> list[Path]:
        own = images.subset(train=train)
        return rescoring.run(
            own, [setting], tmp_path, weights="random", fiber_batch_size=fibres, progress=False, say=said.append
        )

    (first,) = files(setting)
    others = [
        *files(dataclasses.replace(setting, size=48)),
        *files(dataclasses.replace(setting, batch_size=1)),
        *files(setting, fibres=32),
        *files(setting, train=1),
    ]
    assert len({first, *others}) == len(said) == 5
    # A file from before names had a hash, and rows a status, is known by what it says.
    old = tmp_path / "weave-additive-lu-anomalib-seed0-epochs1.csv"
    rows = [{k: v for k, v in row.items() if k not in ("status", "error")} for row in records.read_csv(first)]
    first.unlink()
    records.write_csv(old, rows, digits=5)
    assert files(setting) == [old]
    assert len(said) == 5
    # The same training in two files counts once.
    records.write_csv(tmp_path / "again.csv", rows, digits=5)
    together = rescoring.gather(tmp_path, tmp_path.parent / "all.csv")
    assert len(together) == 5 * len(rescoring.WAYS)
    assert {row["status"] for row in together} == {"ok"}


def test_a_training_that_diverges_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = read(textures.ensure(small=True)).subset(train=2, per_kind=1)
    settings = [Rescoring("affine", "permutation", seed, 2, SIZE) for seed in (0, 1)]
    fit = detection.fit

    def diverge(*arguments: Any, **options: Any) -> Any:
        if options["seed"]:
            return fit(*arguments, **options)
        fit(*arguments, **options | {"epochs": 1})
        raise detection.NotFiniteError("CFlow: the loss is nan at epoch 2, step 7", epoch=2, steps=6)

    monkeypatch.setattr(detection, "fit", diverge)
    said: list[str] = []
    files = rescoring.run(images, settings, tmp_path / "runs", weights="random", progress=False, say=said.append)
    assert len(files) == 2, "the next one was trained"
    assert "failed: CFlow: the loss is nan" in said[0]
    rows = records.read_csv(files[0])
    assert [row["status"] for row in rows] == ["ok"] * len(rescoring.WAYS) + ["failed"]
    last = rows[-1]
    assert (last["epoch"], last["steps"], last["way"]) == (2, 6, None)
    assert last["error"] == "CFlow: the loss is nan at epoch 2, step 7"
    rescoring.run(images, settings, tmp_path / "runs", weights="random", progress=False, say=said.append)
    assert len(said) == 2, "it is not tried again"

    rescoring.gather(tmp_path / "runs", tmp_path / "all.csv")
    table = pd.DataFrame(records.read_csv(tmp_path / "all.csv"))
    found = rescoring.outcomes(table)
    assert "1 training broke off at a loss that is not: against the prediction" in found["H3"]
    assert found["H3"].startswith("over 2 trainings (1 class, 1 flow, 2 seeds)")
    assert found["H1"].startswith("over 1 training (1 class, 1 flow, 1 seed)"), "the other has no last epoch"
    areas, fibres = rescoring.summary(table)
    assert (fibres["seeds"].item(), fibres["failed"].item()) == (1, 1)
    assert areas.shape == (len(rescoring.WAYS), 1)
    # Nothing but a failure: said by H3, and by nothing that has no number.
    alone = table[table["status"] == "failed"]
    assert list(rescoring.outcomes(alone)) == ["H3"]
    assert rescoring.summary(alone)[1]["seeds"].item() == 0


def _rows(areas: dict[str, float], **changes: Any) -> list[dict[str, Any]]:
    """One training with one epoch; image AUROC by way, 0.9 where nothing is said."""
    shared = {
        "category": "pill", "coupling": "affine", "mixing": "permutation", "seed": 0, "epoch": 1, "epochs": 1,
        "pixel_auroc": 0.9, "max_log_prob": 0.0, "nonfinite": 0, "loss_kind": "anomalib", "size": 128, "batch_size": 32,
    }  # fmt: skip
    return [shared | {"way": way, "image_auroc": areas.get(way, 0.9)} | changes for way in rescoring.WAYS]


def test_trainings_that_differ_in_mixing_loss_or_size_are_several() -> None:
    changes: list[dict[str, Any]] = [{}, {"mixing": "lu"}, {"loss_kind": "mle"}, {"size": 256}]
    # Averaged into one, the ways of batching would be 2 points apart instead of 8.
    table = pd.DataFrame(
        [
            row
            for n, change in enumerate(changes)
            for row in _rows({"stock, one by one": 0.9 + 0.08 * (n == 1)}, **change)
        ]
    )
    found = rescoring.outcomes(table)
    assert found["H1"].startswith("over 4 trainings (1 class, 2 flows, 1 seed)")
    assert "by 8.0 points at most: against" in found["H1"]
    areas, fibres = rescoring.summary(table)
    assert areas.shape[1] == len(fibres) == 4
    assert areas.columns.names == ["category", "flow", "loss_kind", "size", "epochs"]
    assert list(rescoring.summary(pd.DataFrame(_rows({})))[0].columns.names) == ["category", "flow", "epochs"]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ((0.02, -0.01), "as predicted, one to three points, of either sign, as predicted"),
        ((0.02, 0.01), "as predicted, one to three points, of one sign, where either was predicted"),
        ((0.002, -0.001), "less than the predicted"),
        ((0.05, -0.01), "more than the predicted one to three points, but not tens"),
        ((-0.3, -0.01), "against the prediction, tens of points"),
    ],
)
def test_h4_has_a_verdict(changes: tuple[float, float], verdict: str) -> None:
    rows = [_rows({"sum of probabilities": 0.9 + d}, seed=seed) for seed, d in enumerate(changes)]
    said = rescoring.outcomes(pd.DataFrame([row for part in rows for row in part]))["H4"]
    assert verdict in said
    assert said.startswith("over 2 trainings (1 class, 1 flow, 2 seeds)")


def test_the_committed_records_can_be_read() -> None:
    """They are from before a training could fail."""
    table = pd.DataFrame(records.read_csv(paths.results("rescoring", "cflow.csv")))
    assert list(rescoring.outcomes(table)) == ["H1", "H2", "H3", "H4"]
    areas, fibres = rescoring.summary(table)
    assert list(areas.index) == list(rescoring.WAYS)
    assert areas.shape[1] == len(fibres)


def test_bad_input_is_named(tmp_path: Path) -> None:
    images = read(textures.ensure(small=True))
    with pytest.raises(ValueError, match="one size at a time"):
        rescoring.run(
            images, [Rescoring("gin", "lu", 0, 1, 32), Rescoring("gin", "lu", 0, 1, 64)], tmp_path, progress=False
        )
    assert rescoring.outcomes(pd.DataFrame()) == {}
    with pytest.raises(FileNotFoundError, match="no records"):
        rescoring.gather(tmp_path, tmp_path / "all.csv")


@pytest.mark.parametrize(("arguments", "said"), [(["--variants", "afine"], "afine"), (["--seeds", "one"], "no seed")])
def test_a_wrong_argument_is_refused_before_anything_runs(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        rescoring.main([str(tmp_path), *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rescoring.main([str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err


def test_what_the_batch_does_is_said_of_affine_flows_trained_with_the_likelihood() -> None:
    areas = {"stock, whole set": 0.82, "stock, shuffled": 0.80, "stock, batches of 32": 0.74, "stock, one by one": 0.70}
    fixed = {"category": "pill", "coupling": "affine", "loss_kind": "mle", "epoch": 2, "epochs": 2, "seed": 0}
    rows = [{**fixed, "status": "ok", "way": way, "image_auroc": area} for way, area in areas.items()]
    others = [
        {**row, "image_auroc": 0.1, **change}
        for row in rows
        for change in ({"coupling": "gin"}, {"loss_kind": "anomalib"}, {"epoch": 1}, {"status": "failed"})
    ]
    said, apart = rescoring.batches_in_words(pd.DataFrame(rows + others))
    assert apart == pytest.approx(12.0)
    assert said.startswith("One affine flow so trained was scored in every way (pill): a mean of 82.0 with all")
    more = [{**row, "seed": 1, "image_auroc": 0.8} for row in rows]
    said, apart = rescoring.batches_in_words(pd.DataFrame(rows + more))
    assert said.startswith("2 affine flows so trained were scored")
    assert apart == pytest.approx(12.0)
    uniform = [{**row, "coupling": "additive", "image_auroc": 0.8} for row in rows]
    said, _ = rescoring.batches_in_words(pd.DataFrame(rows + uniform))
    assert said.endswith("differ by up to 12.0 points, those of 1 uniformly scaling flow by 0.0.")
    for empty in ([], others):
        assert rescoring.batches_in_words(pd.DataFrame(empty)) == ("", 0.0)
