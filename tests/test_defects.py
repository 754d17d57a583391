"""What stands between a flow and its AUROC: the functions, tables and figures of the chapter on anomalib."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("anomalib", reason="needs the detectors extra")
matplotlib.use("Agg")

from usf.plots.detectors import alone_and_together, reported
from usf.study import defects, speed
from usf.study.metrics import auroc
from usf.study.schema import example


def test_cflow_score_is_turned_upside_down_by_the_batch() -> None:
    log_probs, labels = defects.uniform_anomalies(4, 6, seed=3)
    assert log_probs.shape == (8, 6, 6)
    assert labels.tolist() == [False] * 4 + [True] * 4
    assert log_probs[labels].max() < log_probs[~labels].min()
    assert auroc(labels, defects.cflow_scores(log_probs, 8)) == 1
    alone = defects.cflow_scores(log_probs, 1)
    assert (alone[labels] == 0).all()
    assert auroc(labels, alone) == 0


def test_uflow_score_saturates_where_it_is_said_to() -> None:
    end = defects.saturation_point()
    assert 34 < end < 37
    below, above = defects.uflow_scores(torch.tensor([end - 0.1, end + 0.1]))
    assert below < 1
    assert above == 1
    rising = defects.uflow_scores(torch.tensor([0.0, 1.0, 4.0]))
    np.testing.assert_allclose(rising, 1 - np.exp([0.0, -0.5, -2.0]), atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_uflow_loss_weighs_the_determinant_by_the_batch(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    z = [torch.randn(count, 4, 6, 6, generator=generator), 3 * torch.randn(count, 2, 3, 3, generator=generator)]
    assert defects.log_det_weight(z, torch.randn(count, generator=generator)) == pytest.approx(1 / count)
    assert defects.best_mean_square(z) == pytest.approx(1 / count, rel=0.01)


def test_squashed_area_is_wrong_for_raw_scores_and_right_for_bounded_ones() -> None:
    labels = np.array([False, True] * 4)
    far = np.linspace(20, 40, 8, dtype=np.float32) + 30 * labels.astype(np.float32)
    assert auroc(labels, far) == 1
    assert defects.squashed_auroc(labels, far, 8) == 0.5
    bounded = (far - far.min()) / np.ptp(far)
    assert defects.squashed_auroc(labels, bounded, 3) == pytest.approx(auroc(labels, bounded))
    # One batch leaves [0, 1], the other does not.
    mixed, two = np.array([0.9, 0.8, 1.1, 1.2], dtype=np.float32), np.array([False, False, True, True])
    assert auroc(two, mixed) == 1
    assert defects.squashed_auroc(two, mixed, 2) == 0


def test_post_processor_clips_what_lies_far_above_the_threshold() -> None:
    post = defects.fitted(0, 10, threshold=1)
    scores = np.array([0.0, 1.0, 6.5, 10.0], dtype=np.float32)
    maps = np.arange(16, dtype=np.float32).reshape(4, 2, 2)
    images, pixels = defects.post_processed(post, scores, maps)
    np.testing.assert_allclose(images, [0.4, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(pixels, np.minimum(1, (maps - 1) / 10 + 0.5), atol=1e-6)
    assert pixels.shape == maps.shape
    assert defects.tied(images) == 2
    assert defects.tied(pixels) == 10, "from 6 on"
    assert defects.tied(scores) == 0


# --- tables and figures -----------------------------------------------------------------------------------------------


def records(tmp_path: Path, **changes: Any) -> Path:
    rows = []
    for cell, side in itertools.product(speed.EPOCH_GOALS, ("engine", "fast", "fast grid")):
        row = {"cell": cell, "side": side, "models": 9 if side == "fast grid" else 1, "seconds": 10.0}
        row |= {"epoch_seconds": 1.0, "setup_seconds": 2.0, "peak_mb": 900.0}
        row |= {"device": "cpu", "processor": "A" if cell == "CFlow" else "B", "threads": 2}
        row |= {"ratio": {"engine": 1.0, "fast": 4.0, "fast grid": 0.5}[side], "epoch_ratio": 10.0}
        rows.append(row | changes)
    path = tmp_path / "detectors.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_goals_are_read_off_the_records(tmp_path: Path) -> None:
    rows = speed.detectors(records(tmp_path))
    goals = speed.detector_goals(rows).set_index("cell")
    assert goals["epoch_ratio"].tolist() == [10.0] * 3
    assert goals["grid_cost"].tolist() == [2.0] * 3, "one run over two"
    assert goals.loc["U-Flow", "epoch_goal"] == 20
    text = speed.detector_goals_in_words(rows)
    assert "FastFlow's 5 is met (10.0)" in text
    assert "U-Flow's 20 is missed (10.0)" in text
    assert "for CFlow it is met (2.0)" in text


def test_machines_are_named_by_detector(tmp_path: Path) -> None:
    rows = speed.detectors(records(tmp_path))
    assert rows is not None
    assert speed.detector_machines(rows) == "FastFlow, U-Flow on B with 2 threads; CFlow on A with 2 threads"
    one = rows[rows["cell"] == "CFlow"].assign(device="NVIDIA H200")
    assert speed.detector_machines(one) == "CFlow on NVIDIA H200 with 2 threads"


def test_goals_that_were_not_measured_are_said_not_to_be(tmp_path: Path) -> None:
    assert speed.detectors(tmp_path / "none.csv") is None
    assert speed.detector_goals(None)["epoch_ratio"].isna().all()
    rows = speed.detectors(records(tmp_path))
    assert rows is not None
    part = rows[(rows["cell"] == "FastFlow") & (rows["side"] != "fast grid")]
    text = speed.detector_goals_in_words(part)
    assert "FastFlow's 5 is met" in text
    assert "CFlow's 5 is not measured" in text
    assert "for FastFlow it is not measured" in text


def test_the_bound_of_the_networks_is_named(tmp_path: Path) -> None:
    rows = speed.detectors(records(tmp_path))
    assert rows is not None
    assert "for nothing" not in speed.detector_goals_in_words(rows)
    networks = rows.iloc[:1].assign(side="networks", epoch_seconds=0.25)
    assert "the factor would be 4.0" in speed.detector_goals_in_words(pd.concat([rows, networks]))


def test_a_longer_run_is_extrapolated(tmp_path: Path) -> None:
    rows = speed.detectors(records(tmp_path, epochs=2))
    assert rows is not None
    rows.loc[rows["side"] == "engine", "epoch_seconds"] = 5.0
    assert speed.detector_run_ratio(rows, "CFlow", 2) == 1.0
    assert speed.detector_run_ratio(rows, "CFlow", 12) == (10 + 10 * 5) / (10 + 10 * 1)
    with pytest.raises(ValueError, match="2 were measured"):
        speed.detector_run_ratio(rows, "CFlow", 1)
    with pytest.raises(ValueError, match="not measured on the side fast"):
        speed.detector_run_ratio(rows[rows["side"] == "engine"], "CFlow", 5)


def test_records_without_a_column_are_refused(tmp_path: Path) -> None:
    path = records(tmp_path)
    pd.read_csv(path).drop(columns="epoch_ratio").to_csv(path, index=False)
    with pytest.raises(ValueError, match="lacks epoch_ratio"):
        speed.detectors(path)


def test_figures_show_every_image_and_case() -> None:
    labels = np.array([False, True, True])
    together, alone = np.array([0.1, 0.5, 0.9], np.float32), np.array([0.1, 0.4, 0.2], np.float32)
    figure = alone_and_together([("a", together, alone), ("b", together, together)], labels)
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    drawn = [len(line.get_xdata()) for line in figure.axes[0].lines[1:]]  # type: ignore[arg-type]
    assert drawn == [1, 2]
    low, high = figure.axes[0].get_xlim()
    assert low < 0.1
    assert high > 0.9
    cases = pd.DataFrame(
        {"finding": ["x", "y"], "case": ["constructed", "real"], "true": [100.0, 90.0], "reported": [50.0, 90.0]}
    )
    figure = reported(cases)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["x: constructed", "y: real"]
    matplotlib.pyplot.close("all")


def test_inference_records_as_a_table_and_in_words(tmp_path: Path) -> None:
    rows = []
    for part, runtime, side in itertools.product(("whole", "flow"), ("torch", "openvino"), ("stock", "usf fused")):
        ratio = {"stock": 1.0, "usf fused": 3.0 if runtime == "torch" else 1.5}[side]
        row = {"detector": "FastFlow", "batch": 1, "part": part, "runtime": runtime, "side": side, "status": "ok"}
        row |= {"images_per_second": 10 * ratio, "ms_p50": 100 / ratio, "ms_p90": 110 / ratio, "megabytes": 20.0}
        rows.append(row | {"ratio": ratio, "ratio_torch": ratio})
    path = tmp_path / "inference.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    table = speed.inference_table(speed.inference(path)).reset_index().set_index("runtime")
    assert table.loc["PyTorch", "stock images/s"] == 10
    assert table.loc["OpenVINO", "USF images/s"] == 15
    assert table["flow ratio"].tolist() == [3.0, 1.5]
    text = speed.inference_in_words(speed.inference(path))
    assert "faster than the stock one in 2 of 2 cells, by factors of 1.5 to 3.0" in text
    assert "1 of 2 cells (1 of 1 in PyTorch, 0 of 1 in OpenVINO; least 1.5)" in text
    assert "cannot be exported" not in text
    rows[-1]["ratio"] = rows[3]["ratio"] = float("nan")
    pd.DataFrame([row for row in rows if (row["side"], row["runtime"]) != ("stock", "openvino")]).to_csv(
        path, index=False
    )
    text = speed.inference_in_words(speed.inference(path))
    assert "in 1 of 1 cells" in text
    assert "The stock FastFlow cannot be exported" in text
    with pytest.raises(FileNotFoundError, match=r"run benchmarks/inference\.py"):
        speed.inference(tmp_path / "none.csv")


def test_half_precision_is_compared_with_the_same_training(tmp_path: Path) -> None:
    fixed = {"detector": "cflow", "coupling": "affine", "mixing": "permutation", "pixel_auroc": 0.9}
    full = [example(**fixed, seed=seed, image_auroc=0.8) for seed in range(2)]
    half = [example(**fixed | {"settings": "0" * 12}, seed=seed, image_auroc=0.803 - 0.01 * seed) for seed in (0, 1, 2)]
    table = speed.half_precision(half, [*full, *half, example(**fixed, seed=2, image_auroc=0.5, epochs=7)])
    assert table["seed"].tolist() == [0, 1]
    assert table["image change"].tolist() == [pytest.approx(0.3), pytest.approx(-0.7)]
    assert table["pixel change"].tolist() == [0.0, 0.0]
    rows = speed.detectors(records(tmp_path))
    assert rows is not None
    text = speed.half_precision_in_words(table, rows)
    assert text.endswith("image AUROC by at most 0.70 and pixel AUROC by at most 0.00 points in any score.")
    fast = rows[(rows["cell"] == "CFlow") & (rows["side"] == "fast")].assign(side="fast bfloat16", epoch_seconds=0.5)
    moved = speed.half_precision_in_words(table.assign(moved=True), rows)
    assert moved.endswith("in any score, the change of processor between the two included.")
    assert "an epoch takes 0.50 times as long" in speed.half_precision_in_words(table, pd.concat([rows, fast]))
    assert speed.half_precision_in_words(speed.half_precision([], full), None) == ""
