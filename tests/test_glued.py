"""The look at executed chapters that `make test` takes: see `pytest_configure` in conftest.py."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from glued import faults
from nbformat import v4

SAID = "Of {glue:text}`n` runs {glue:text}`share:.1f` %."


def executed(text: str, **values: str) -> nbformat.NotebookNode:
    """A notebook that has glued these payloads, and whose text is this."""
    outputs = [
        v4.new_output(
            "display_data",
            {"application/papermill.record/text/plain": value},
            metadata={"scrapbook": {"name": name, "mime_prefix": "application/papermill.record/"}},
        )
        for name, value in values.items()
    ]
    return v4.new_notebook(cells=[v4.new_code_cell(outputs=outputs), v4.new_markdown_cell(text)])


def test_python_numbers_pass() -> None:
    assert list(faults(executed(SAID, n="'many'", share="12.5"))) == []
    assert list(faults(executed(SAID, n="12", share="nan"))) == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"n": "12", "share": "np.float64(12.5)"}, "share"),
        ({"n": "np.int64(12)", "share": "12.5"}, "n"),
        ({"n": "12", "share": "tensor(12.5)"}, "share"),
        ({"n": "12", "share": "'much'"}, "share"),
    ],
)
def test_what_the_book_cannot_format_is_named(values: dict[str, str], key: str) -> None:
    (fault,) = faults(executed(SAID, **values))
    assert fault.startswith(key)


def test_captions_are_text_too() -> None:
    notebook = executed("", n="np.float64(1.0)")
    notebook.cells[0].metadata["mystnb"] = {"figure": {"caption": "{glue:text}`n:.2f`"}}
    assert len(list(faults(notebook))) == 1


def test_a_chapter_with_such_a_number_fails(tmp_path: Path) -> None:
    """Through the class with which nbmake runs a notebook."""
    from nbmake import pytest_items

    cell = "import numpy as np\nfrom myst_nb import glue\nglue('n', np.float64(1), display=False)"
    for text, failed in (("{glue:text}`n:.1f`", True), ("", False)):
        notebook = v4.new_notebook(cells=[v4.new_code_cell(cell), v4.new_markdown_cell(text)])
        nbformat.write(notebook, tmp_path / "chapter.ipynb")
        error = pytest_items.NotebookRun(tmp_path / "chapter.ipynb", 60).execute().error
        assert (error is not None) == failed
        assert not failed or "np.float64(1.0)" in error.summary
