"""The appendices that are gathered: errata with what shows them, exercises with solutions, the API with every name."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import usf_reference as reference  # noqa: E402  (lies beside the chapters, for Sphinx)

PAGES = sorted((ROOT / "book").glob("appendix-*.md"))
TARGETS = sorted({target for row in reference.errata(ROOT) for target in reference.shown_by(row)})


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf8"))) if isinstance(node, ast.FunctionDef)}


# --- errata -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_shows_an_erratum_exists(target: str) -> None:
    if "::" in target:
        file, test = target.split("::")
        assert (ROOT / file).is_file(), file
        assert test in names_in(ROOT / file), f"{file} has no {test}"
    else:
        assert reference.role(ROOT, target), f"no chapter has {target}"


def test_every_erratum_is_whole_and_shown() -> None:
    rows = reference.errata(ROOT)
    assert {row["about"] for row in rows} == set(reference.GROUPS)
    for row in rows:
        assert all(row[name] and row[name] == row[name].strip() for name in ("place", "statement", "holds")), row
        assert reference.shown_by(row), f"nothing shows: {row['statement']}"


def test_a_reference_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "data" / "paper").mkdir(parents=True)
    (tmp_path / "_toc.yml").write_text("root: book/intro\n")
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "intro.md").write_text("# Intro\n")
    table = tmp_path / "data" / "paper" / "errata.csv"
    table.write_text("about,place,statement,holds,shown\npaper,P,S,H,fig-nowhere\n")
    with pytest.raises(ValueError, match="no chapter has the label 'fig-nowhere'"):
        reference.expand("% usf: errata", tmp_path)
    table.write_text("about,place,statement,holds,shown\npapre,P,S,H,intro\n")
    with pytest.raises(ValueError, match=r"unknown groups \['papre'\]"):
        reference.expand("% usf: errata", tmp_path)
    with pytest.raises(ValueError, match="known are api, errata, exercises"):
        reference.expand("% usf: exercise", tmp_path)


# --- exercises --------------------------------------------------------------------------------------------------------


def test_every_exercise_is_listed_and_has_its_solution() -> None:
    toc = (ROOT / "_toc.yml").read_text("utf8")
    chapters = [path for path in sorted((ROOT / "book").glob("[0-9][0-9]-*.md")) if f"book/{path.stem}\n" in toc]
    listed = reference.exercises(ROOT)
    opened = sum(len(re.findall(r"^`{3,}\{exercise(?:-start)?\}", path.read_text("utf8"), re.M)) for path in chapters)
    assert len(listed) == opened > 0, "an exercise without a label"
    assert [exercise.label for exercise in listed if not exercise.solved] == []
    assert {exercise.chapter for exercise in listed} == {path.stem for path in chapters}, (
        "a chapter without an exercise"
    )
    text = reference.expand("% usf: exercises", ROOT)
    assert all(exercise.label in text for exercise in listed)


# --- API --------------------------------------------------------------------------------------------------------------


def documented() -> list[str]:
    """Modules that the pages document, once each time that they do."""
    asked = [match[2] for path in PAGES for match in reference.MARKER.finditer(path.read_text("utf8")) if match[2]]
    return [name for package in asked for name in reference.modules(ROOT, package)]


def test_every_public_module_is_on_one_page() -> None:
    files = (path.relative_to(ROOT / "src").with_suffix("") for path in (ROOT / "src" / "usf").rglob("*.py"))
    names = {".".join(file.parts).removesuffix(".__init__") for file in files}
    public = {name for name in names if not any(part.startswith("_") for part in name.split("."))} - {"usf"}
    found = documented()
    assert len(found) == len(set(found)), "a module on two pages"
    assert set(found) == public


def test_every_name_of_a_package_is_defined_in_a_documented_module() -> None:
    """What ``__all__`` of a package lists stands, with its docstring, in a module on a page."""
    packages = [name for name in documented() if (ROOT / "src").joinpath(*name.split(".")).is_dir()]
    assert "usf.flows" in packages
    for package in packages:
        init = (ROOT / "src").joinpath(*package.split("."), "__init__.py")
        names = re.search(r"^__all__ = (\[.*?\])", init.read_text("utf8"), re.M | re.S)
        if names is None:
            continue
        homes = reference.exported(ROOT, package)
        own = {node.name for node in ast.parse(init.read_text("utf8")).body if hasattr(node, "name")}
        assert set(ast.literal_eval(names[1])) - own == set(homes), package
        assert set(homes.values()) <= set(documented()), package


def test_bars_and_stars_are_plain_in_prose_alone() -> None:
    lines = ["ln|det| of ``a|b`` and `c|d`, :func:`e|f`", "", ">>> print('|*')", "|*", "", "(*batch, *shape), *so* |x|"]
    expected = [r"ln\|det\| of ``a|b`` and `c|d`, :func:`e|f`", "", ">>> print('|*')", "|*", ""]
    assert reference.plain(lines) == [*expected, r"(\*batch, \*shape), *so* \|x\|"]


@pytest.mark.skipif(importlib.util.find_spec("anomalib") is None, reason="needs the detectors extra")
def test_docstrings_become_pages_without_a_warning(tmp_path: Path) -> None:
    """Sphinx reads every docstring, with unresolved references as errors, as in the book; and every name is there."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["sphinx"]["config"]
    chosen = {key: value for key, value in config.items() if key.startswith(("autodoc", "napoleon", "default_role"))}
    pages = [path for path in PAGES if path.stem.startswith("appendix-api-")]
    names = [path.stem for path in pages]
    toc = "\n".join(["```{toctree}", *(f"book/{name}" for name in names), "```"])
    (tmp_path / "index.md").write_text(f"# API\n\n{toc}\n")
    (tmp_path / "book").mkdir()
    for path in pages:
        (tmp_path / "book" / path.name).write_text(path.read_text("utf8"))
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
        "extensions = ['myst_parser', 'usf_reference']\nmyst_enable_extensions = ['deflist', 'dollarmath']\n"
        f"include_patterns = ['index.md', 'book/*.md']\nglobals().update({chosen!r})\n"
        "def setup(app):\n    app.connect('build-finished', lambda app, error: open('names.txt', 'w').write(\n"
        "        '\\n'.join(app.env.get_domain('py').objects)))\n"
    )
    command = [sys.executable, "-m", "sphinx", "-b", "dummy", "-W", "-n", "--keep-going", "-q", ".", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-6000:]
    there = set((tmp_path / "names.txt").read_text().split())
    missing = []
    for package in documented():
        homes = reference.exported(ROOT, package)
        missing += [f"{home}.{name}" for name, home in homes.items() if f"{home}.{name}" not in there]
    assert missing == [], "names in __all__ without a docstring"
