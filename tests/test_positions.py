"""Positions: pooling and levels are what they say, and an image-free map is recognised as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

pytest.importorskip("anomalib", reason="needs the detectors extra")

from usf.detectors import resolve
from usf.plots.positions import levels_and_scores
from usf.study import benchmark, detection, grid, positions, textures
from usf.study.features import Features
from usf.study.images import read
from usf.study.metrics import auroc


def test_pooling_is_the_mean_of_the_highest() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 10, 10))
    ordered = np.sort(maps.reshape(3, -1), axis=1)[:, ::-1]
    for share, count in ((0.0, 1), (0.001, 1), (0.1, 10), (0.255, 26), (1.0, 100)):
        assert np.allclose(positions.pooled(maps, share), ordered[:, :count].mean(axis=1)), share
    with pytest.raises(ValueError, match=r"share=1.5: .* between 0 and 1"):
        positions.pooled(maps, 1.5)


def _maps(sigma: Any, rng: np.random.Generator, count: int) -> Any:
    """Squares of normal values with a standard deviation by position, as a homoscedastic flow leaves them."""
    return (sigma * rng.normal(size=(count, *sigma.shape))) ** 2


def test_what_the_level_alone_is_worth() -> None:
    """An object of larger variance in the middle, defects on it: seen by the level, not by standardised maps."""
    rng = np.random.default_rng(0)
    sigma = np.full((12, 12), 0.2)
    sigma[3:9, 3:9] = 2.0
    normal = _maps(sigma, rng, 400)
    labels = np.arange(60) % 2 == 1
    masks = np.zeros((60, 12, 12), dtype=bool)
    masks[labels, 3:9, 3:6] = True
    masks[1::4] = masks[1::4, :, ::-1]
    maps = _maps(sigma, rng, 60)
    found = positions.measure(normal, maps, labels, masks)
    assert found["inside"] == 36 / 144
    assert found["pixel_level"] > 0.88, "it is the object"
    assert found["pixel"] > 0.8, "of maps in which no defect shows"
    assert abs(found["pixel_inside"] - 0.5) < 0.06
    assert abs(found["pixel_standardised"] - 0.5) < 0.06
    assert found["level_cv"] == pytest.approx(normal.mean(axis=0).std() / normal.mean())
    assert found["level_100"] == pytest.approx(normal.mean(axis=0).max() / normal.mean())
    assert np.mean([found[f"level_{q}"] for q in positions.QUANTILES]) == pytest.approx(1, abs=0.15)
    # Defects that add where normal images hardly vary are lost to the maximum, and found once the level is gone.
    maps[labels, 0, 0] += 0.6
    masks[labels] = False
    masks[labels, 0, 0] = True
    again = positions.measure(normal, maps, labels, masks)
    assert again["image_0"] == auroc(labels, maps.max(axis=(1, 2))) < 0.7
    assert again["image_standardised"] > 0.9
    # Without a level, there is nothing in it.
    flat = positions.measure(_maps(np.ones((12, 12)), rng, 400), maps, labels, masks)
    assert flat["level_cv"] < 0.1
    with pytest.raises(ValueError, match="do not vary at 144 positions"):
        positions.measure(np.ones((4, 12, 12)), maps, labels, masks)


def test_variance_of_features_by_position() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    level = torch.randn(200, 5, 4, 4, generator=generator)
    level[:, :, :, 2:] *= 3
    level[:, 0] *= 100  # a loud channel counts as much as the others
    found = positions.feature_variance(Features((level, level[..., ::2, ::2])), 8)
    assert found.shape == (8, 8)
    assert found[:, 6:].mean() / found[:, :2].mean() == pytest.approx(9, rel=0.1)


def test_trainings_leave_files_and_are_published_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = read(textures.ensure(small=True))
    weights = resolve("random", announce=None)
    cell = benchmark.cell(
        "textures", "weave", "fastflow", profile="smoke", variants=grid.variants(["affine", "additive-lu"]), size=32
    )
    files = positions.run(cell, images, tmp_path / "runs", weights=weights, progress=False)
    assert len(files) == 2
    before = [path.stat().st_mtime_ns for path in files]
    assert positions.run(cell, images, tmp_path / "runs", weights=weights, progress=False) == files
    assert [path.stat().st_mtime_ns for path in files] == before
    assert capsys.readouterr().out.count("image AUROC of the norm's maximum") == 2

    assert positions.publish(tmp_path / "runs", tmp_path / "out") == 2
    rows = positions.load(tmp_path / "out")
    assert [row["score"] for row in rows] == [*positions.SCORES] * 2
    assert set(rows[0]) == set(positions.COLUMNS)
    assert {row["run"] for row in rows} == set(json.loads((tmp_path / "out" / "records.json").read_text("utf8")))
    # The benchmark's own areas, for the same training.
    record = next(
        r
        for r in benchmark.run_cell(cell, images, tmp_path / "cell", weights=weights, cache=None, progress=False)
        if (r.coupling, r.score) == ("additive", "norm")
    )
    own = next(row for row in rows if (row["coupling"], row["score"]) == ("additive", "norm"))
    assert own["image_0"] == pytest.approx(record.image_auroc, abs=1e-5)
    assert own["pixel"] == pytest.approx(record.pixel_auroc, abs=1e-5)
    # A second publication keeps what is there, and adds.
    files[0].unlink()
    assert positions.publish(tmp_path / "runs", tmp_path / "out") == 2
    assert positions.load(tmp_path / "out") == rows
    with pytest.raises(FileNotFoundError, match="holds no trainings"):
        positions.publish(tmp_path / "nothing", tmp_path / "out")
    assert positions.load(tmp_path / "nothing") == []


def test_a_cell_that_stops_by_itself_is_refused(tmp_path: Path) -> None:
    cell = benchmark.cell("textures", "weave", "fastflow", profile="full", size=32)
    with pytest.raises(ValueError, match="stopping='normal': positions are looked at after a fixed number"):
        positions.run(cell, read(textures.ensure(small=True)), tmp_path, weights=resolve("random", announce=None))


def test_a_failure_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that breaks off, and maps that are not finite; the next one is trained all the same."""
    images, weights = read(textures.ensure(small=True)), resolve("random", announce=None)
    flows = grid.variants(["affine", "additive"])
    cell = benchmark.cell("textures", "weave", "fastflow", profile="smoke", variants=flows, size=32)
    fit, evaluate = detection.fit, detection.evaluate_scores

    def diverge(model: Any, *arguments: Any, **options: Any) -> Any:
        if model.options.coupling == "affine":
            raise detection.NotFiniteError("FastFlow: the loss is nan at epoch 1, step 2", epoch=1, steps=1)
        return fit(model, *arguments, **options)

    def overflow(*arguments: Any, **options: Any) -> Any:
        found = evaluate(*arguments, **options)
        found["log_prob"].maps[0, 0, 0] = np.inf
        return found

    monkeypatch.setattr(detection, "fit", diverge)
    monkeypatch.setattr(detection, "evaluate_scores", overflow)
    positions.run(cell, images, tmp_path / "runs", weights=weights, progress=False)
    positions.publish(tmp_path / "runs", tmp_path / "out")
    rows = {(row["coupling"], row["score"]): row for row in positions.load(tmp_path / "out")}
    assert {rows["affine", score]["error"] for score in positions.SCORES} == {
        "FastFlow: the loss is nan at epoch 1, step 2"
    }
    assert rows["additive", "log_prob"]["error"] == "2 values of the maps are not finite"
    assert rows["additive", "norm"]["status"] == "ok"
    assert list(positions.means(list(rows.values())).index.get_level_values("flow")) == ["additive"]


def _rows(**changes: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of pill for three flows and the detectors; ``changes``: flow -> measures."""
    common = dict.fromkeys(positions.MEASURED, 0.5) | {"level_cv": 0.05, "level_variance_rank": 0.2}
    usf = common | {"level_cv": 0.5, "level_variance_rank": 0.9, "pixel_level": 0.8}
    usf |= {"pixel": 0.54, "pixel_inside": 0.51, "image_0": 0.4, "image_0.1": 0.49}
    fixed = {"dataset": "mvtec", "category": "pill", "epochs": 2, "size": 32, "batch_size": 8, "loss": "anomalib"}
    fixed |= {"score": "norm", "status": "ok", "error": None, "seconds": 1.0, "run": "a"}
    fixed |= {"weights_sha256": "0", "manifest_sha256": "0"}
    return [
        fixed | {"detector": detector, "coupling": coupling, "mixing": mixing, "seed": seed} | values | extra
        for detector in ("fastflow", "uflow", "cflow")
        for seed in (0, 1)
        for coupling, mixing, values, extra in (
            ("affine", "permutation", common, changes.get("affine", {})),
            ("additive", "lu", usf, changes.get("usf", {})),
            # GIN moves scale between positions, but for CFlow's, which sees one at a time.
            ("gin", "lu", usf | {"level_cv": 0.4 if detector == "cflow" else 0.1}, changes.get("gin", {})),
        )
    ]


@pytest.mark.parametrize(
    ("name", "flow", "change"),
    [
        ("P1", "affine", {"level_cv": 0.2}),
        ("P2", "usf", {"level_variance_rank": 0.4}),
        ("P3", "usf", {"pixel_level": 0.55}),
        ("P4", "usf", {"pixel_inside": 0.53}),
        ("P5", "usf", {"image_0.1": 0.44}),
        ("P6", "gin", {"level_cv": 0.3}),
        ("P6", "gin", {"level_cv": 0.1}),
    ],
)
def test_predictions_can_fail(name: str, flow: str, change: dict[str, float]) -> None:
    held = positions.outcomes(_rows())
    assert list(held) == ["P1", "P2", "P3", "P4", "P5", "P6"]
    assert not any("against" in sentence for sentence in held.values())
    broken = positions.outcomes(_rows(**{flow: change}))
    assert [key for key, sentence in broken.items() if "against the prediction" in sentence] == [name]


def test_outcomes_need_both_flows() -> None:
    rows = _rows()
    assert positions.outcomes([]) == {}
    assert positions.outcomes([row for row in rows if row["coupling"] == "affine"]) == {}
    elsewhere = positions.outcomes([row | {"category": "bottle"} for row in rows])
    assert list(elsewhere) == ["P1", "P2", "P3"], "the others are about pill"
    assert list(positions.gains(positions.means(rows), "pixel").round(9)) == [0.04] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a data set, a class and a detector"),
        (["mvtec"], "needs a class and a detector"),
        (["mvtec", "pil", "fastflow", "--images", "nowhere"], "MVTec AD has no class 'pil'"),
        (["textures", "weave", "fastflow", "--variants", "planar"], "planar"),
        (["textures", "weave", "fastflow", "--profile", "full"], "invalid choice"),
        (["--publish", "--out", "nowhere"], "nowhere holds no trainings"),
    ],
)
def test_command_line_says_what_is_wrong(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        positions.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_figure() -> None:
    figure = levels_and_scores(_rows(), "mvtec", "pill")
    assert len(figure.axes) == 9
    plt.close(figure)
    with pytest.raises(ValueError, match="no maps of mvtec/bottle"):
        levels_and_scores(_rows(), "mvtec", "bottle")
