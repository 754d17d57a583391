"""benchmarks/detectors.py: rows and provenance by detector, and the networks alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("anomalib", reason="needs the detectors extra")

from helpers import benchmark_script
from usf.study import records, speed, textures

SECONDS = {"engine": 12.0, "fast": 3.0, "fast grid": 24.0, "fast bfloat16": 2.0, "networks": 1.0}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return benchmark_script("detectors")


def test_a_detector_measured_again_leaves_the_others_and_their_provenance(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def measure(cell: dict[str, Any]) -> dict[str, Any]:
        seen.append(cell["side"])
        assert (Path(cell["folder"]) / "train" / "good").is_dir()
        seconds = SECONDS[cell["side"]]
        fixed = {"setup_seconds": 1.0, "peak_mb": 100.0, "models": 1, "device": "cpu", "threads": 2}
        return {"seconds": seconds, "epochs_seconds": [seconds / 4] * 3, **fixed}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(records, "hardware", lambda: {"cpu": "A", "cores": 2, "gpu": "none"})
    images, out = str(textures.ensure(small=True)), tmp_path / "detectors.csv"
    benchmark.run(out, images=images, repeats=2, cells=["CFlow", "FastFlow"], weights="random")
    sides = ["engine", "fast", "fast grid"]
    halves = [*sides, "fast bfloat16"]
    assert seen == [*halves, *halves[::-1], *sides, "networks", "networks", *sides[::-1]]
    monkeypatch.setattr(records, "hardware", lambda: {"cpu": "B", "cores": 2, "gpu": "none"})
    benchmark.run(out, images=images, repeats=1, cells=["CFlow"], weights="random")

    rows = speed.detectors(out)
    assert rows is not None
    assert sorted(zip(rows["cell"], rows["side"], strict=True)) == sorted(
        [("CFlow", side) for side in halves] + [("FastFlow", side) for side in (*sides, "networks")]
    )
    fast = rows[(rows["cell"] == "FastFlow") & (rows["side"] == "fast")].iloc[0]
    assert (fast["ratio"], fast["epoch_ratio"], fast["repeats"]) == (4.0, 4.0, 2)
    assert speed.detector_machines(rows) == "FastFlow on A with 2 threads; CFlow on B with 2 threads"
    conditions = json.loads(out.with_suffix(".json").read_text("utf8"))
    assert {name: own["hardware"]["cpu"] for name, own in conditions.items()} == {"FastFlow": "A", "CFlow": "B"}


def test_networks_alone_are_those_of_an_epoch(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"detector": "fastflow", "backbone": "resnet18", "size": 32, "epochs": 2, "weights": "random"}
    found = benchmark.run_networks(cell, textures.ensure(small=True))
    assert len(found["epochs_seconds"]) == 2
    assert min(found["epochs_seconds"]) > 0
