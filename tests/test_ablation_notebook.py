"""The notebook that runs the ablation on one class, as the README shows it, and again when all is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytest.importorskip("anomalib", reason="needs the detectors extra")

from usf.study import ablation, grid, schema

SOURCE = Path(__file__).resolve().parents[1] / "book" / "runs" / "ablation.md"


def run(folder: Path, **parameters: str) -> tuple[int, Any]:
    """Exit status of papermill, and the executed notebook."""
    notebook = folder / "ablation.ipynb"
    if not notebook.exists():
        convert = [sys.executable, "-m", "jupytext", "--quiet", "--to", "notebook", "--output", str(notebook)]
        subprocess.run([*convert, str(SOURCE)], check=True)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "ablation.ipynb", "out.ipynb"]
    for name, value in {"profile": "smoke", "folder": str(folder), **parameters}.items():
        command += ["-p", name, value]
    # Figures belong into the notebook, where the tests otherwise draw nowhere.
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, nbformat.read(folder / "out.ipynb", as_version=4)


def text(notebook: Any) -> str:
    """Everything that was printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def test_the_ablation_by_hand_and_again(tmp_path: Path) -> None:
    code, notebook = run(tmp_path, seeds="0 1")
    assert code == 0, text(notebook)
    records = schema.read(tmp_path / "records")
    assert len({record.training for record in records}) == 6 * 3 * 2
    assert {record.status for record in records} == {"ok"}
    assert {record.score for record in records} == {"norm", "log_prob", "anomalib"}
    table = ablation.frame(records)
    assert set(table["condition"]) == set(ablation.CONDITIONS)
    assert set(table["variant"]) == set(ablation.VARIANTS)
    said = text(notebook)
    assert "built-in set" in said
    assert "36 of 36: frozen, gin-lu seed 1: image AUROC" in said
    assert "36 trainings on record" in said
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/svg+xml" in output["data"] for output in pictures) == 2, "conditions and effects"

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    code, again = run(tmp_path, seeds="0 1")
    assert code == 0, text(again)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()} == written
    assert text(again).count("on record before") == 36


def test_default_parameters_are_the_whole_factorial() -> None:
    first = SOURCE.read_text("utf8").split("```{code-cell}")[1].split("```")[0]
    values: dict[str, Any] = {}
    exec(first.split(":tags: [parameters]")[1], values)
    assert grid.variants(values["variants"]) == tuple(grid.VARIANTS.values())
    assert values["trainings"].split() == list(ablation.TRAININGS)
    assert values["detector"] in grid.DETECTORS
