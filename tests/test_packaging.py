"""The project as a package and as a repository: versions agree, imports are light, chapters are complete."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import usf

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]-*.md"))
NOTEBOOKS = [ROOT / "book" / "intro.md", *CHAPTERS]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, set[str]]:
    """Package -> versions in the lock (more than one where they depend on the platform)."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", (ROOT / "requirements.lock").read_text(), re.M):
        found.setdefault(normal(name), set()).add(version)
    return found


def direct() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return PROJECT["project"]["dependencies"] + [item for extra in extras for item in extra]


def ignored(path: str) -> bool:
    return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0


def committed() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listing.splitlines() if (ROOT / name).exists()]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


# --- one set of versions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requirement", direct())
def test_every_dependency_is_locked_within_its_range(requirement: str) -> None:
    wanted = Requirement(requirement)
    versions = locked().get(normal(wanted.name), set())
    assert versions, f"{wanted.name} is not in requirements.lock: run `make lock`"
    assert all(wanted.specifier.contains(version) for version in versions)


def test_constraints_are_what_is_locked() -> None:
    for constraint in PROJECT["tool"]["uv"]["constraint-dependencies"]:
        name, version = constraint.split("==")
        assert locked()[normal(name)] == {version}


def test_lock_has_hashes_and_no_addresses() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
    assert len(entries) > 100
    assert all("--hash=sha256:" in entry for entry in entries)


def test_conda_environment_agrees_with_lock_and_project() -> None:
    """environment.yml takes every pin from the lock itself, and a Python that the project supports."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip == ["-r requirements.lock"]
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert python.split("=")[1] in PROJECT["project"]["requires-python"]
    assert f"--python-version {python.split('=')[1]}" in (ROOT / "requirements.lock").read_text()
    others = [item for item in environment["dependencies"] if isinstance(item, str) and item != python]
    assert others == ["pip"], "pins beside the lock would drift from it"


def test_one_version_number() -> None:
    assert usf.__version__ == PROJECT["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == usf.__version__
    assert f"## {usf.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# --- light imports ---------------------------------------------------------------------------------------------------

HEAVY = {"anomalib", "lightning", "matplotlib", "optuna", "pandas"}
HEAVY |= {"scipy", "seaborn", "sklearn", "timm", "torchvision"}
CORE = ["usf.files", "usf.flows", "usf.oneclass", "usf.paths", "usf.study.profile", "usf.training"]


def test_import_usf_is_light() -> None:
    assert not loaded_by("import usf") & HEAVY


def test_core_needs_no_extra() -> None:
    """What needs only torch, numpy, scipy and safetensors loads nothing of the extras."""
    assert not loaded_by(f"import {', '.join(CORE)}") & (HEAVY - {"scipy"})


# --- the repository --------------------------------------------------------------------------------------------------


def test_table_of_contents_lists_every_chapter() -> None:
    toc = (ROOT / "_toc.yml").read_text()
    listed = re.findall(r"^\s*(?:- )?(?:file|root): (\S+)", toc, re.M)
    chapters = [f"book/{path.stem}" for path in CHAPTERS]
    assert listed[: len(chapters) + 1] == ["book/intro", *chapters]
    assert listed[-3:] == ["book/predictions", "book/predictions-positions", "book/references"]
    appendices = sorted(f"book/{path.stem}" for path in (ROOT / "book").glob("appendix-*.md"))
    assert sorted(listed[len(chapters) + 1 : -3]) == appendices


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter_has_its_parameters(path: Path) -> None:
    """The first cell is the parameters' one, so that papermill can set the profile and the seed."""
    text = path.read_text("utf8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["jupytext"]["text_representation"]["format_name"] == "myst"
    assert front["kernelspec"]["name"] == "python3"
    cell = re.search(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, re.M | re.S)
    assert cell is not None
    assert ":tags: [parameters]" in cell[1]
    assert 'profile = os.environ.get("USF_PROFILE", "book")' in cell[1]
    assert re.search(r"^seed = \d+$", cell[1], re.M)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter_refuses_an_unknown_profile(path: Path) -> None:
    assert re.search(r"\bselect\(\s*profile\b", path.read_text("utf8")), "use usf.study.profile.select"


def test_citations_exist() -> None:
    """A cited key that the bibliography lacks is found without building the book."""
    keys = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text("utf8"), re.M))
    for path in NOTEBOOKS:
        cited = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", path.read_text("utf8"))
        missing = {key.strip() for group in cited for key in group.split(",")} - keys
        assert not missing, f"{path.name} cites {missing}"


def test_nothing_generated_is_committed() -> None:
    names = committed()
    assert not [name for name in names if name.endswith((".ipynb", ".pyc", ".ckpt", ".pt", ".pth"))]
    assert not [name for name in names if (ROOT / name).stat().st_size > 1_000_000]
    assert all(ignored(name) for name in ("build/x", "_build/x", ".venv/x", "src/usf/__pycache__/x"))


def test_clean_keeps_the_records_of_every_study(tmp_path: Path) -> None:
    """Records that are not merged yet are hours of training; the rest of build/ is made again in minutes."""
    sources = [path.read_text("utf8") for path in (ROOT / "src" / "usf" / "study").rglob("*.py")]
    studies = {name for source in sources for name in re.findall(r"paths\.build\(\"(\w+)\"", source)}
    assert {"ablation", "benchmark", "rescoring"} <= studies
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text("utf8"), "utf8")
    kept = [tmp_path / "build" / name / "book" / "a.json" for name in studies]
    gone = [tmp_path / name for name in ("build/notebooks/a.ipynb", "build/a.html", "_build/html/a.html")]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert all(path.is_file() for path in kept)
    assert not any(path.exists() for path in gone)
    assert not (tmp_path / "build" / "notebooks").exists()


def test_readme_example_runs() -> None:
    """The README's Python, run as a reader would run it."""
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf8"), re.M | re.S)
    assert code is not None
    result = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
