"""The execution cache of the book: what makes a chapter stale, what does not, and what a failed cell does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import times  # noqa: E402  (both lie beside the chapters, for Sphinx)
from usf_book import Fingerprints, signed  # noqa: E402

CODE = "import usf.plots as plots\nfrom usf.study import profile"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small repository: two rooms, of which one imports a module of the other's package."""
    files = {
        "requirements.lock": "torch==1",
        "data/results/a.csv": "x\n1\n",
        "src/usf/__init__.py": "",
        "src/usf/plots/__init__.py": "from usf.plots.theme import use",
        "src/usf/plots/theme.py": "from .. import colours",
        "src/usf/colours.py": "",
        "src/usf/study/__init__.py": "",
        "src/usf/study/profile.py": "",
        "src/usf/study/tables.py": "from usf import paths\ntable = paths.results('a.csv')",
        "src/usf/flows.py": "",
        "book/intro.md": "# Intro",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("requirements.lock", True),
        ("data/results/a.csv", False),
        ("src/usf/plots/theme.py", True),
        ("src/usf/study/profile.py", True),
        ("src/usf/colours.py", True),  # through a relative import, two steps away
        ("src/usf/flows.py", False),
        ("book/intro.md", False),
    ],
)
def test_a_chapter_is_stale_when_something_it_uses_changed(project: Path, changed: str, stale: bool) -> None:
    before = Fingerprints(project).of(CODE)
    assert Fingerprints(project).of(CODE) == before
    with (project / changed).open("a") as stream:
        stream.write("# changed\n")
    assert (Fingerprints(project).of(CODE) != before) == stale


@pytest.mark.parametrize("code", ["import usf.study.tables", "from usf import paths\npaths.data('results')"])
@pytest.mark.parametrize("changed", ["a.csv", "new.csv"])
def test_data_count_where_they_are_asked_for(project: Path, code: str, changed: str) -> None:
    before = Fingerprints(project).of(code)
    (project / "data" / "results" / changed).write_text("x\n2\n")
    assert Fingerprints(project).of(code) != before


def test_shared_material_counts_where_it_is_asked_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USF_SHARED", str(project / "material"))
    code = "from usf import paths\npaths.shared('images')"
    before = Fingerprints(project).of(code), Fingerprints(project).of(CODE)
    (project / "material" / "images").mkdir(parents=True)
    (project / "material" / "images" / "a.png").write_bytes(b"1")
    assert Fingerprints(project).of(code) != before[0]
    assert Fingerprints(project).of(CODE) == before[1]


def test_environment_is_part_of_the_fingerprint(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USF_PROFILE", "book")
    before = Fingerprints(project).of(CODE)
    monkeypatch.setenv("USF_PROFILE", "smoke")
    assert Fingerprints(project).of(CODE) != before


def test_code_that_does_not_parse_depends_on_everything(project: Path) -> None:
    assert set(Fingerprints(project).sources("from usf import (")) == set((project / "src").rglob("*.py"))


def test_fingerprint_goes_into_the_front_matter_once() -> None:
    text = "---\nkernelspec:\n  name: python3\n---\n\nkernelspec:\n"
    assert signed(text, "abc") == "---\nkernelspec:\n  fingerprint: 'abc'\n  name: python3\n---\n\nkernelspec:\n"


def test_papermill_sets_the_parameters(tmp_path: Path) -> None:
    """As the README shows it, from a folder that is not the repository's."""
    programs = Path(sys.executable).parent
    notebook, out = tmp_path / "intro.ipynb", tmp_path / "out.ipynb"
    convert = [programs / "jupytext", "--quiet", "--to", "notebook", "--output", notebook, ROOT / "book" / "intro.md"]
    subprocess.run(convert, check=True, cwd=ROOT)
    command = [programs / "papermill", notebook, out, "-p", "profile", "smoke"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Executing: 100%" in result.stderr
    sources = ["".join(cell["source"]) for cell in json.loads(out.read_text("utf8"))["cells"]]
    injected = next(position for position, source in enumerate(sources) if source.startswith("# Parameters"))
    assert 'profile = "smoke"' in sources[injected]
    assert 'os.environ.get("USF_PROFILE"' in sources[injected - 1]


CHAPTER = """---
jupytext: {{text_representation: {{extension: .md, format_name: myst}}}}
kernelspec:
  display_name: Python 3
  name: python3
---
# {title}

```{{code-cell}} ipython3
from pathlib import Path
with Path({log!r}).open("a") as stream:
    stream.write({title!r} + "\\n")
{code}
```
"""


def test_builds(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole builds: executed once, again after a change in data, never kept after a failure."""
    shutil.copy(ROOT / "_config.yml", project)
    for folder in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / folder, project / "book" / folder)
    (project / "book" / "references.bib").write_text("")
    (project / "_toc.yml").write_text("format: jb-book\nroot: book/intro\nchapters:\n- file: book/01-one\n")
    log = project / "log"

    def chapter(name: str, code: str) -> None:
        (project / "book" / f"{name}.md").write_text(CHAPTER.format(title=name, log=str(log), code=code))

    def build() -> tuple[int, list[str], str]:
        """Exit status, what was executed, and what was said."""
        log.write_text("")
        command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "-q", "-W", "-n", "--keep-going", "."]
        environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        return result.returncode, sorted(log.read_text().split()), result.stdout + result.stderr

    chapter("intro", "x = 1")
    chapter("01-one", "print(6 * 7)  # paths.data")
    status, executed, said = build()
    assert (status, executed) == (0, ["01-one", "intro"]), said
    assert "42" in (project / "_build" / "html" / "book" / "01-one.html").read_text()
    assert (project / "_build" / "html" / "_static" / "mathjax" / "tex-chtml.js").exists()

    assert build()[:2] == (0, [])  # the times that were kept are no part of the cache's key
    times.main(project / "_build" / ".jupyter_cache")
    said = capsys.readouterr().out
    assert re.search(r"^\| `01-one` \| \d+ \|$", said, re.M)
    assert re.search(r"^\| `.+` \| `01-one` \| \d+ \|$", said, re.M)

    (project / "data" / "results" / "a.csv").write_text("x\n2\n")
    assert build()[:2] == (0, ["01-one"])

    chapter("01-one", "1 / 0")
    for _ in range(2):  # a second attempt must not take the first one's failure for a result
        status, executed, said = build()
        assert status != 0
        assert executed == ["01-one"]
        assert "division by zero" in said
