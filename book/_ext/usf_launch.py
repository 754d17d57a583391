"""Chapters that run elsewhere: a notebook to download on each page, and links to Colab and Binder.

The downloaded notebook can be read everywhere: no syntax of MyST is left in its text (``usf_plain``). It begins with a
cell that installs the library where it is missing, from the repository at the revision that made the page. Colab opens
the same notebooks from the branch ``notebooks`` (`make publish` pushes them), Binder the chapters of the repository
itself.

The repository's address is ``repository.url`` in ``_config.yml``, or the environment variable ``USF_REPOSITORY``, which
the workflow that publishes the book sets. Without one there are no links, and the notebooks say how to install.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import usf_plain as plain
from sphinx.application import Sphinx
from usf_book import Fingerprints

BRANCH = "notebooks"
"""Where `make publish` puts the notebooks."""
COLAB = "https://colab.research.google.com/github"
BINDER = "https://mybinder.org/v2/gh"


def install(url: str, revision: str, extras: str) -> str:
    """Code that installs the library where it is missing.

    Args:
        url: of the repository; empty where it is not known.
        revision: commit or branch.
        extras: of the package, separated by commas.
    """
    if url:
        remedy = f'%pip install --quiet "usf[{extras}] @ git+{url}@{revision}"'
    else:
        # Never by name alone: on a package index the name could be anybody's.
        message = f"install the library from a checkout of the book's repository: pip install 'CHECKOUT[{extras}]'"
        remedy = f"raise ModuleNotFoundError({json.dumps(message)}) from None"
    lines = ["# The library, where it is missing: at the revision that made this page.", "try:", "    import usf"]
    return "\n".join([*lines, "except ModuleNotFoundError:", f"    {remedy}"])


def extras(code: str, fingerprints: Fingerprints) -> str:
    """Extras of the package that a chapter's code needs, read off what it imports."""
    rooms = {"detectors", "hybrid"}
    deep = "anomalib" in code or any(rooms & set(path.parts) for path in fingerprints.sources(code))
    return "book,detectors" if deep else "book"


def portable(page: Path, url: str, revision: str, fingerprints: Fingerprints, known: plain.Known | None = None) -> Any:
    """A chapter as a notebook in plain Markdown, with a cell before all others that installs what it needs.

    Args:
        page: the chapter.
        url: of the repository; empty where it is not known.
        revision: commit or branch.
        fingerprints: know what a chapter imports.
        known: what its text refers to.
    """
    notebook = jupytext.read(page, fmt="md:myst")
    lines = [line for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    code = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))
    first = nbformat.v4.new_code_cell(install(url, revision, extras(code, fingerprints)))
    plain.rewrite(notebook, plain.Known() if known is None else known)
    notebook.cells.insert(0, first)
    for index, cell in enumerate(notebook.cells):  # else random, so that no two builds were alike
        cell["id"] = f"cell-{index}"
    return notebook


def links(url: str, name: str) -> list[dict[str, str]]:
    """Buttons that open a chapter elsewhere; none where the repository is not on GitHub."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)/?", url)
    if found is None:
        return []
    repository = f"{found[1]}/{found[2]}"
    targets = {
        "Colab": (f"{COLAB}/{repository}/blob/{BRANCH}/{name}.ipynb", "_static/images/logo_colab.png"),
        "Binder": (
            f"{BINDER}/{repository}/HEAD?urlpath=lab/tree/build/notebooks/{name}.ipynb",
            "_static/images/logo_binder.svg",
        ),
    }
    return [
        {"type": "link", "text": text, "tooltip": f"Open in {text}", "icon": icon, "url": target}
        for text, (target, icon) in targets.items()
    ]


def _revision(root: Path) -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "main"
    return done.stdout.strip()


def configure(app: Sphinx, config: Any) -> None:
    """The repository's address, where the environment names it."""
    options = config.html_theme_options
    if url := os.environ.get("USF_REPOSITORY", "").rstrip("/"):
        options["repository_url"] = url
        options["use_repository_button"] = True


def offer(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Write the notebook of a page and have the theme's download button offer it."""
    if "kernelspec" not in app.env.metadata.get(pagename, {}):
        return
    root, url = Path(app.srcdir), app.config.html_theme_options.get("repository_url", "")
    if not hasattr(app, "usf_launch"):
        pages, notebooks = plain.titles(root / "book")
        works = plain.works(root / "book" / "references.bib")
        known = plain.Known(labels=plain.numbers(app.env), pages=pages, notebooks=notebooks, works=works)
        app.usf_launch = (Fingerprints(root), _revision(root), known)  # type: ignore[attr-defined]
    fingerprints, revision, known = app.usf_launch  # type: ignore[attr-defined]
    values = plain.glued(Path(app.outdir).parent / "jupyter_execute" / f"{pagename}.glue.json")
    known = dataclasses.replace(known, values=values)
    target = Path(app.outdir, "_sources", f"{pagename}.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(portable(Path(app.env.doc2path(pagename)), url, revision, fingerprints, known), target)
    context["ipynb_source"] = f"{pagename}.ipynb"


def launch(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Add the links to the header of a page that is a notebook."""
    url = app.config.html_theme_options.get("repository_url", "")
    if "kernelspec" in app.env.metadata.get(pagename, {}) and (buttons := links(url, Path(pagename).name)):
        group = {"type": "group", "tooltip": "Launch interactive content", "icon": "fas fa-rocket"}
        context["header_buttons"].append({**group, "buttons": buttons, "label": "launch-buttons"})


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point for Sphinx."""
    app.connect("config-inited", configure, priority=400)
    app.connect("html-page-context", offer, priority=400)
    app.connect("html-page-context", launch, priority=502)  # after the theme's own buttons
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": False}
