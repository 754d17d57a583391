"""What makes the book public: the workflow, the notebooks that run anywhere, the links that open them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from usf import paths

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import usf_launch as launch  # noqa: E402  (these lie beside the chapters, for Sphinx)
import usf_plain as plain  # noqa: E402
from usf_book import Fingerprints  # noqa: E402

CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]-*.md"))
NOTEBOOKS = [ROOT / "book" / "intro.md", *CHAPTERS, ROOT / "book" / "appendix-reproducibility.md"]
URL = "https://github.com/someone/book"

# --- the workflow -----------------------------------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text("utf8"))["jobs"]
    assert isinstance(found, dict)
    return found


def steps() -> list[dict[str, Any]]:
    return [step for path in WORKFLOWS for job in jobs(path).values() for step in job["steps"]]


def targets() -> set[str]:
    """Targets of the Makefile that its help lists."""
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf8"), re.M))


def test_every_command_is_a_target_of_the_makefile() -> None:
    commands = [step["run"] for step in steps() if "run" in step]
    assert {"make book", "make test", "make publish"} <= set(commands)
    for command in commands:
        match = re.fullmatch(r"make ([a-z]+)((?: [A-Z_]+=\w+)*)", command)
        assert match is not None, f"not a plain make target: {command}"
        assert match[1] in targets(), f"the Makefile has no {match[1]}"
        for variable in re.findall(r" ([A-Z_]+)=", match[2]):
            assert re.search(rf"^{variable} \?=", (ROOT / "Makefile").read_text("utf8"), re.M), variable


def test_actions_are_pinned_to_a_commit_with_its_version_beside_it() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert {action.split("@")[0] for action in used} >= {"actions/checkout", "actions/deploy-pages"}
    text = "".join(path.read_text("utf8") for path in WORKFLOWS)
    for action in used:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action), action
        assert re.search(rf"{action} # v\d+\.\d+\.\d+\n", text), f"which version is {action}?"


def test_a_job_may_do_no_more_than_it_must() -> None:
    for path in WORKFLOWS:
        whole = yaml.safe_load(path.read_text("utf8"))
        assert whole["permissions"] == {"contents": "read"}
        for name, job in whole["jobs"].items():
            if "permissions" in job:
                assert job["if"] == "github.ref == 'refs/heads/main'", f"{name} writes, and for any branch"
            for step in job["steps"]:
                if step.get("uses", "").startswith("actions/checkout") and "permissions" not in job:
                    assert step["with"]["persist-credentials"] is False
    assert jobs(WORKFLOWS[0])["pages"]["permissions"] == {"pages": "write", "id-token": "write"}
    assert jobs(WORKFLOWS[0])["notebooks"]["permissions"] == {"contents": "write"}


def test_pages_and_notebooks_are_artefacts() -> None:
    uploads = [step["with"]["path"] for step in steps() if "upload" in step.get("uses", "")]
    assert {"_build/html", "build/executed/*.ipynb"} <= set(uploads)


# --- notebooks that run anywhere ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fingerprints() -> Fingerprints:
    return Fingerprints(ROOT)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_installation(path: Path, fingerprints: Fingerprints) -> None:
    notebook = launch.portable(path, URL, "c0ffee", fingerprints)
    first, *others = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0] is first
    assert f"@ git+{URL}@c0ffee" in first.source
    assert any("parameters" in cell.metadata.get("tags", []) for cell in others), "papermill still finds them"
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    deep = "usf.detectors" in path.read_text("utf8")
    assert ("[book,detectors]" in first.source) >= deep
    assert json.dumps(notebook) == json.dumps(launch.portable(path, URL, "c0ffee", fingerprints)), "differs every time"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_readable_without_the_book(path: Path, fingerprints: Fingerprints) -> None:
    pages, notebooks = plain.titles(ROOT / "book")
    known = plain.Known(pages=pages, notebooks=notebooks, works=plain.works(ROOT / "book" / "references.bib"))
    for cell in launch.portable(path, "", "main", fingerprints, known).cells:
        if cell.cell_type == "markdown":
            left = re.findall(r"\{[a-z:]+\}`[^`]*`|^[`:]{3,}\{.*|^:[a-z]+:.*|^\([\w-]+\)=$", cell.source, re.MULTILINE)
            assert left == []


KNOWN = plain.Known(
    values={"share": "12.345", "name": "'pill'", "broken": "np.float64(1.0)"},
    labels={"p": "Proposition 3.1", "x": "Exercise 3.2", "f": "Figure 3.4", "e": "(3.5)"},
    pages={"05-density-inversion": "Density inversion"},
    notebooks=frozenset({"05-density-inversion"}),
    works={"a": ("A and B, 2025", "https://example.org/a"), "b": ("C, 2024", "")},
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{glue:text}`share:.1f` % of {glue:text}`name`", "12.3 % of pill"),
        ("{glue:text}`other` and {glue:text}`broken:.1f`", "(computed below) and (computed below)"),
        (
            "{cite}`a,b`; {cite:t}`a`",
            "([A and B, 2025](https://example.org/a), C, 2024); [A and B (2025)](https://example.org/a)",
        ),
        ("{doc}`05-density-inversion`, {doc}`intro`", "[Density inversion](05-density-inversion.ipynb), *intro*"),
        (
            "{numref}`f`, {prf:ref}`p`, {eq}`e`, {ref}`here <f>`, {ref}`g`",
            "Figure 3.4, Proposition 3.1, (3.5), here, *g*",
        ),
        ("(label)=\n$$ y $$ (e)", r"$$ y \tag{3.5} $$"),
        ("````{prf:proposition} Title\n:label: p\n\nBody {eq}`e`.\n````", "**Proposition 3.1** (Title). Body (3.5)."),
        ("```{prf:proof}\nSo.\n```", "*Proof.* So."),
        (
            "```{solution-start} x\n:class: dropdown\n```\nIt is.\n```{solution-end}\n```",
            "**Solution** of Exercise 3.2.\nIt is.",
        ),
        (
            "`````{grid} 1 2\n````{grid-item}\n```{glue:figure} k\n:name: f\n\nSeen.\n```\n````\n`````",
            "*Figure 3.4.* Seen.",
        ),
        ("```python\n{eq}`e`\n```", "```python\n{eq}`e`\n```"),
        ("{strange}`text`", "text"),
    ],
)
def test_text_in_plain_markdown(text: str, expected: str) -> None:
    assert plain.plain(text, KNOWN).strip() == expected


def test_captions_stand_below_their_figures(tmp_path: Path, fingerprints: Fingerprints) -> None:
    page = tmp_path / "page.md"
    front = "---\nkernelspec:\n  name: python3\n  display_name: P\n---\n"
    cell = "---\nmystnb:\n  figure:\n    name: f\n    caption: |\n      Of {glue:text}`name`.\n---\nplot()\n"
    page.write_text(f"{front}\n# Page\n\n```{{code-cell}} ipython3\n{cell}```\n")
    *_, figure, below = launch.portable(page, "", "main", fingerprints, KNOWN).cells
    assert (figure.source, below.source) == ("plot()", "*Figure 3.4.* Of pill.")


def test_extras_are_what_a_chapter_imports(fingerprints: Fingerprints) -> None:
    assert launch.extras("from usf.flows import USFlow", fingerprints) == "book"
    assert launch.extras("from usf.study import detection", fingerprints) == "book,detectors"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    assert {"book", "detectors"} <= set(project["optional-dependencies"])


def run_cell(code: str, tmp_path: Path, *, installed: bool) -> subprocess.CompletedProcess[str]:
    """The first cell of a notebook in a fresh IPython, in which `%pip` says what it was asked for."""
    hide = "" if installed else "import sys; sys.modules['usf'] = None\n"
    show = "from IPython import get_ipython\nget_ipython().register_magic_function(print, 'line', 'pip')\n"
    (tmp_path / "cell.ipy").write_text(hide + show + code)
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "cell.ipy"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


def test_the_first_cell_installs_only_what_is_missing(tmp_path: Path) -> None:
    code = launch.install(URL, "c0ffee", "book")
    assert run_cell(code, tmp_path, installed=True).stdout.strip() == ""
    asked = run_cell(code, tmp_path, installed=False).stdout
    assert f'--quiet "usf[book] @ git+{URL}@c0ffee"' in asked
    unknown = run_cell(launch.install("", "c0ffee", "book"), tmp_path, installed=False)
    assert "install the library from a checkout" in unknown.stdout + unknown.stderr
    assert "pip install usf" not in launch.install("", "c0ffee", "book"), "the name alone could be anybody's package"


def test_a_wheel_brings_what_the_chapters_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(build["only-include"]) == set(build["sources"])
    assert build["dev-mode-dirs"] == ["src"], "an editable installation has no copies"
    packaged = {name for name, target in build["sources"].items() if target == f"usf/_repository/{name}"}
    assert packaged == {"data", "examples", "book"}
    monkeypatch.setattr(paths, "_is_root", lambda folder: False)
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "usf" / "_repository"
    copy.mkdir(parents=True)
    monkeypatch.setattr(paths, "_packaged", lambda: copy)
    assert paths.results("mixtures") == copy / "data" / "results" / "mixtures"
    assert paths.examples("a.yaml") == copy / "examples" / "a.yaml"
    assert paths.book() == copy / "book"
    for path in CHAPTERS:
        assert "paths.root" not in path.read_text("utf8"), f"{path.name}: outside of a clone there is no root"


# --- links ------------------------------------------------------------------------------------------------------------


def test_links_lead_to_what_is_published() -> None:
    colab, binder = (button["url"] for button in launch.links(URL, "05-density-inversion"))
    assert colab == f"{launch.COLAB}/someone/book/blob/notebooks/05-density-inversion.ipynb"
    assert launch.BRANCH in (ROOT / "Makefile").read_text("utf8")
    assert binder == f"{launch.BINDER}/someone/book/HEAD?urlpath=lab/tree/build/notebooks/05-density-inversion.ipynb"
    assert 'build/notebooks/$(basename "$chapter" .md).ipynb' in (ROOT / "postBuild").read_text("utf8")
    for address in ("", "https://example.org/someone/book", "https://github.com/someone"):
        assert launch.links(address, "05-density-inversion") == []
    # The theme's own buttons would open the chapter's text, and would need an address at every build.
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))
    assert not any(config["launch_buttons"].get(key) for key in ("binderhub_url", "colab_url", "thebe"))


def test_binder_finds_what_it_needs() -> None:
    """Its folder is the repository's root, where environment.yml takes every version from the lock."""
    assert (ROOT / "environment.yml").is_file()
    assert (ROOT / "postBuild").stat().st_mode & 0o111, "not executable"
    assert not (ROOT / "binder").exists()
    assert not (ROOT / ".binder").exists()
    assert subprocess.run(["bash", "-n", "postBuild"], cwd=ROOT).returncode == 0
    # Every page with a link to it, and no other.
    listed = subprocess.run("grep -l '^kernelspec:' book/*.md", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.split() == sorted(str(path.relative_to(ROOT)) for path in NOTEBOOKS)


def test_publishing_touches_nothing_but_its_branch(tmp_path: Path) -> None:
    """`make publish` in a clone: a branch with the notebooks alone; index, work tree and branch stay as they are."""

    def git(*arguments: str, cwd: Path) -> str:
        options = ["-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "protocol.file.allow=always"]
        return subprocess.run(
            ["git", *options, *arguments], cwd=cwd, check=True, capture_output=True, text=True
        ).stdout.strip()

    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    git("init", "--quiet", "--bare", "--initial-branch=main", cwd=origin)
    clone.mkdir()
    git("init", "--quiet", "--initial-branch=main", cwd=clone)
    git("remote", "add", "origin", str(origin), cwd=clone)
    (clone / "Makefile").write_text((ROOT / "Makefile").read_text("utf8"))
    (clone / ".gitignore").write_text("_build/\n*.ipynb\n")
    git("add", ".", cwd=clone)
    git("commit", "--quiet", "-m", "first", cwd=clone)
    before = git("rev-parse", "HEAD", cwd=clone)
    failed = subprocess.run(["make", "publish"], cwd=clone, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "There is no built book" in failed.stderr
    source = clone / "_build" / "html" / "_sources" / "book"
    source.mkdir(parents=True)
    (source / "01-a.ipynb").write_text("{}")
    (source / "01-a.md").write_text("# A")
    subprocess.run(["make", "publish"], cwd=clone, check=True, capture_output=True, text=True)
    assert git("ls-tree", "--name-only", "notebooks", cwd=origin) == "01-a.ipynb"
    assert git("rev-parse", "HEAD", cwd=clone) == before
    assert git("status", "--porcelain", cwd=clone) == ""
    (source / "01-a.ipynb").rename(source / "01-b.ipynb")
    subprocess.run(["make", "publish"], cwd=clone, check=True, capture_output=True, text=True)
    assert git("ls-tree", "--name-only", "notebooks", cwd=origin) == "01-b.ipynb"
