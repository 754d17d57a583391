"""The benchmark of inference: it runs, writes its schema, and measures models that score alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("anomalib", reason="needs the detectors extra")

from helpers import benchmark_script
from usf.study import records

SIZE = 32


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    module = benchmark_script("inference")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_every_cell_is_a_row(benchmark: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "inference.csv"
    benchmark.run(out, size=SIZE, batches={1: 2, 2: 1}, runtimes=["torch"], threads=1, progress=False)
    rows = records.read_csv(out)
    assert list(rows[0]) == benchmark.COLUMNS
    cells = {(row["detector"], row["batch"], row["part"], row["side"]) for row in rows}
    assert len(cells) == len(rows) == 3 * 2 * 2 * 3
    for row in rows:
        assert row["status"] == "ok"
        assert row["ms_p50"] > 0
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms_p50"], rel=1e-2)
        assert row["ratio"] == row["ratio_torch"]
        if row["side"] == "stock":
            assert row["ratio"] == 1
    times = {(row["detector"], row["batch"], row["part"], row["side"]): row["ms_p50"] for row in rows}
    assert all(value < times[(*key[:2], "whole", key[3])] for key, value in times.items() if key[2] == "flow")
    size = {(row["detector"], row["side"]): row["megabytes"] for row in rows}
    assert all(size[name, "usf fused"] < size[name, "stock"] for name in benchmark.DETECTORS)
    provenance = json.loads((tmp_path / "inference-provenance.json").read_text())
    assert provenance["settings"]["clock"] == "process CPU time"
    assert provenance["settings"]["batches"] == {"1": 2, "2": 1}
    assert "vs stock" in benchmark.summary(rows)


@pytest.mark.parametrize("side", ["stock", "usf", "usf fused"])
@pytest.mark.parametrize("detector", ["FastFlow", "CFlow", "U-Flow"])
def test_the_flow_is_what_is_behind_the_backbone(benchmark: ModuleType, detector: str, side: str) -> None:
    model = benchmark.build(detector, side, SIZE)
    images = benchmark.inputs_of(model, "whole", 2, SIZE)
    maps = benchmark.inputs_of(model, "flow", 2, SIZE)
    assert [tuple(level.shape) for level in maps] == [(2, 64, 8, 8), (2, 128, 4, 4), (2, 256, 2, 2)]
    with torch.no_grad():
        expected = model(images[0])
        score, heat = benchmark.Part(model, "flow", SIZE)(*maps)
    assert torch.allclose(score, expected.pred_score, rtol=1e-4, atol=1e-5)
    assert torch.allclose(heat, expected.anomaly_map, rtol=1e-4, atol=1e-5)


def test_fused_model_is_timed_with_the_scores_of_the_other(benchmark: ModuleType) -> None:
    plain, fused = (benchmark.build("FastFlow", side, SIZE) for side in ("usf", "usf fused"))
    images = benchmark.inputs_of(plain, "whole", 2, SIZE)[0]
    with torch.no_grad():
        assert torch.allclose(plain(images).pred_score, fused(images).pred_score, rtol=1e-5)


def test_a_failed_export_is_a_row(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("no such operator\nat all") from ValueError("the cause")

    monkeypatch.setattr(benchmark, "export", fail)
    out = tmp_path / "inference.csv"
    runtimes = ["torch", "openvino"]
    benchmark.run(out, detectors=["FastFlow"], size=SIZE, batches={1: 1}, runtimes=runtimes, threads=1, progress=False)
    failed = [row for row in records.read_csv(out) if row["status"] == "failed"]
    assert {(row["runtime"], row["part"], row["side"]) for row in failed} == {
        ("openvino", part, side) for part in ("whole", "flow") for side in ("stock", "usf fused")
    }
    assert {row["reason"] for row in failed} == {"ValueError: the cause"}


def test_bad_settings_are_named(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown: \['EfficientAD'\]"):
        benchmark.run(tmp_path / "x.csv", detectors=["EfficientAD"])
    with pytest.raises(ValueError, match="must be at least 1"):
        benchmark.run(tmp_path / "x.csv", batches={1: 0})
