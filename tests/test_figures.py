"""Every figure of the book has a caption, words for who cannot see it, and a link to the code that made it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jupytext
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

from usf_figures import PACKAGE, called, drawing, imported, makers, page  # noqa: E402  (lies beside the chapters)

CHAPTERS = sorted((ROOT / "book").glob("*.md"))
KNOWN = drawing(ROOT)


def cells(path: Path) -> list[Any]:
    return jupytext.read(path).cells


def options(cell: Any) -> dict[str, Any]:
    return cell.metadata.get("mystnb", {})


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_figures_have_captions_words_and_makers(path: Path) -> None:
    found = cells(path)
    shown, pasted = makers(found, KNOWN)
    for index, functions in shown.items():
        cell = found[index]
        if not functions:
            assert "figure" not in options(cell), f"no function of {PACKAGE} made this figure:\n{cell.source}"
            continue
        removed = {"remove-output", "remove-cell"} & set(cell.metadata.get("tags", []))
        if removed or any(f'"{key}"' in cell.source for key in pasted):
            continue
        caption = options(cell).get("figure", {}).get("caption", "").strip()
        assert caption.endswith((".", "?")), f"a figure without a caption in whole sentences:\n{cell.source}"
        if not any(name.startswith(f"{PACKAGE}.interactive.") for name in functions):  # those are labelled inside
            alt = options(cell).get("image", {}).get("alt", "")
            assert len(alt) > 20, f"a figure without words for who cannot see it:\n{cell.source}"
    assert all(pasted.values()), f"pasted figures whose code is not found: {pasted}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_pasted_figures_have_captions_and_words(path: Path) -> None:
    for cell in cells(path):
        if cell.cell_type != "markdown":
            continue
        for block in cell.source.split("{glue:figure}")[1:]:
            block = block.split("```")[0].split(":::")[0]
            head = [line for line in block.splitlines()[1:] if line.startswith(":")]
            assert any(line.startswith(":alt: ") and len(line) > 26 for line in head), block
            assert any(line.startswith(":name: ") for line in head), block
            assert block.strip().splitlines()[-1].endswith("."), block


def test_names_are_followed_through_imports() -> None:
    names = imported(
        [
            "import usf.plots\nfrom usf.plots import flows as figures",
            "%matplotlib inline\nfrom usf.plots.images import anomaly_maps\nimport usf.plots.runs as runs",
        ]
    )
    assert called("x = 1\nfigures.weight_path(1);", names, KNOWN) == [f"{PACKAGE}.flows.weight_path"]
    assert called("usf.plots.use()\nusf.plots.flows.gap_bars()", names, KNOWN) == [f"{PACKAGE}.flows.gap_bars"]
    both = called("if a:\n    anomaly_maps(runs.loss_curves())", names, KNOWN)
    assert sorted(both) == [f"{PACKAGE}.images.anomaly_maps", f"{PACKAGE}.runs.loss_curves"]
    assert called("figures.grid_cells(1)", names, KNOWN) == []
    code = 'glue("a", figures.gap_bars(), display=False)\nglue("b", figures.weight_path())'
    assert called(code, names, KNOWN, "b") == [f"{PACKAGE}.flows.weight_path"]
    assert called(code, names, KNOWN, "c") == []


def test_lines_of_functions() -> None:
    for name, line in KNOWN.items():
        target, anchor = page(name)
        assert target == f"code/{name.rsplit('.', 1)[0]}"
        source = (ROOT / "src" / Path(*name.split(".")[:-1])).with_suffix(".py").read_text("utf8").splitlines()
        assert source[line - 1].startswith(f"def {anchor}(")
