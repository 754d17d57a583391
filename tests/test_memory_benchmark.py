"""The benchmark of memory: it runs, and its processes are measured by themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("anomalib", reason="needs the detectors extra")

from helpers import benchmark_script
from usf import cli
from usf.study import records


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return benchmark_script("memory")


def test_peak_memory_is_that_of_the_process_alone(benchmark: ModuleType) -> None:
    held = np.ones(60_000_000)  # 480 MB that the child has not
    small = [sys.executable, "-S", "-c", "print('small')"]
    large = [sys.executable, "-S", "-c", "import sys; x = bytearray(200_000_000); sys.exit(len(x) // 10**8)"]
    code, _, spent = benchmark.measured(small, 1)
    assert code == 0
    assert 2 < spent["peak_mb"] < 60
    code, _, more = benchmark.measured(large, 1)
    assert code == 2
    assert more["peak_mb"] == pytest.approx(200 + spent["peak_mb"], abs=15)
    assert held[-1] == 1


def test_every_folder_is_a_row(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(command: list[str], threads: int) -> tuple[int, str, dict[str, float]]:
        """The command without a process of its own."""
        assert command[:3] == [sys.executable, "-m", "usf"]
        return cli.main(command[3:]), "", {"peak_mb": 200.0, "seconds": 1.0, "cpu_seconds": float(threads)}

    monkeypatch.setattr(benchmark, "measured", here)
    out = tmp_path / "memory.csv"
    benchmark.run(out, counts=[3], size=64, weights="random")
    rows = records.read_csv(out)
    assert [(row["images"], row["heatmaps"], row["status"]) for row in rows] == [(3, 0, "ok"), (3, 1, "ok")]
    assert all(row["peak_mb"] == 200 for row in rows)
    assert "random" in rows[0]["weights"]
    assert json.loads(out.with_suffix(".json").read_text())["settings"]["size"] == 64
    with pytest.raises(ValueError, match="at least one image"):
        benchmark.run(out, counts=[0])
