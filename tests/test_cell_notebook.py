"""The notebook that runs one cell of the benchmark: by hand, as the README shows it, and again when all is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from usf.study import grid, schema

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "book" / "runs" / "cell.md"


def run(folder: Path, **parameters: str) -> tuple[int, Any]:
    """Exit status of papermill, and the executed notebook."""
    notebook = folder / "cell.ipynb"
    if not notebook.exists():
        convert = [sys.executable, "-m", "jupytext", "--quiet", "--to", "notebook", "--output", str(notebook)]
        subprocess.run([*convert, str(SOURCE)], check=True)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "cell.ipynb", "out.ipynb"]
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


def errors(notebook: Any) -> str:
    """What was raised."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["evalue"] for output in outputs if output["output_type"] == "error")


def figures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/svg+xml" in output.get("data", {}) for output in outputs)


def test_one_cell_by_hand_and_again(tmp_path: Path) -> None:
    code, notebook = run(tmp_path, variants="affine additive-lu", seeds="1")
    assert code == 0, text(notebook)
    records = schema.read(tmp_path / "records")
    assert {(r.coupling, r.mixing, r.seed) for r in records} == {("affine", "permutation", 1), ("additive", "lu", 1)}
    assert {r.status for r in records} == {"ok"}
    assert {r.score for r in records} == {"norm", "log_prob", "anomalib"}
    said = text(notebook)
    assert "built-in set" in said
    assert "2 of 2: additive-lu seed 1: image AUROC" in said
    assert "2 trainings on record" in said
    assert figures(notebook) == 2, "losses and maps"

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    code, again = run(tmp_path, variants="affine additive-lu", seeds="1")
    assert code == 0, text(again)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()} == written
    assert text(again).count("on record before") == 2
    assert "Nothing was trained" in text(again)
    assert figures(again) == 0


def test_what_the_profile_sets_can_be_changed(tmp_path: Path) -> None:
    """The leaky protocol, with everything that the committed records need; and what is no setting is refused."""
    changes = {"epochs": "2", "trace": "1 2", "stopping": "paper", "size": "32", "loss": "mle"}
    code, notebook = run(tmp_path, variants="additive-lu", seeds="0", **changes)
    assert code == 0, text(notebook)
    records = schema.read(tmp_path / "records")
    assert {(r.epochs, r.size, r.loss) for r in records} == {(2, 32, "mle")}
    assert {(r.protocol, r.epoch) for r in records if r.protocol == "trace"} == {("trace", 1), ("trace", 2)}
    assert {r.protocol for r in records} == {"paper", "trace"}
    (rule,) = schema.read_settings(tmp_path / "records").values()
    assert rule["stopping"]["rule"] == "paper"
    assert "1 trainings on record" in text(notebook)

    code, notebook = run(tmp_path, stopping="best")
    assert code != 0
    assert "stopping='best': choose one of" in errors(notebook)
    code, notebook = run(tmp_path, size="100")
    assert code != 0
    assert "size=100: fastflow takes multiples of 16 pixels" in errors(notebook)
    assert schema.read(tmp_path / "records") == records, "nothing was run"


@pytest.mark.parametrize("path", sorted((ROOT / "book" / "runs").glob("*.md")), ids=lambda path: path.stem)
def test_a_run_is_a_notebook_with_parameters(path: Path) -> None:
    source = path.read_text("utf8")
    front = yaml.safe_load(source.split("---")[1])
    assert front["jupytext"]["text_representation"]["format_name"] == "myst"
    first = source.split("```{code-cell}")[1].split("```")[0]
    assert ":tags: [parameters]" in first
    assert 'profile = os.environ.get("USF_PROFILE", "book")' in first


def test_default_parameters_are_a_cell_of_a_grid() -> None:
    first = SOURCE.read_text("utf8").split("```{code-cell}")[1].split("```")[0]
    values: dict[str, Any] = {}
    exec(first.split(":tags: [parameters]")[1], values)
    name = f"{values['dataset']}-{values['category']}-{values['detector']}"
    assert grid.grid(f"textures/{name}").cells
    assert grid.variants(values["variants"]) == grid.PAPER
    assert grid.whole_numbers(values["seeds"]) == (0, 1, 2)
