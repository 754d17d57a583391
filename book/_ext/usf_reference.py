"""The appendices that are gathered rather than written: API reference, errata, exercises.

A page asks for one of them by a comment on a line of its own, and the comment is replaced by MyST before the page is
parsed, so that headings, labels and links in it are like any others:

``% usf: api usf.flows``
    Every module of a package, from its docstrings.
``% usf: errata``
    ``data/paper/errata.csv`` as tables, with links to what shows each.
``% usf: exercises``
    Every exercise of every chapter.

Docstrings are reStructuredText in Google's style. A reference in one (``:func:`read```) that leads nowhere is an error.
"""

from __future__ import annotations

import ast
import csv
import itertools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

MARKER = re.compile(r"^% usf: (\w+) ?(\S*)$", re.MULTILINE)

# --- what the chapters hold -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exercise:
    """An exercise, and whether a solution belongs to it."""

    chapter: str
    label: str
    title: str
    solved: bool


def _order(root: Path) -> list[Path]:
    """The pages of the book as ``_toc.yml`` has them."""
    names = re.findall(r"^\s*(?:- )?(?:file|root): book/(\S+)", (root / "_toc.yml").read_text("utf8"), re.MULTILINE)
    return [root / "book" / f"{name}.md" for name in names]


def heading(page: Path) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", page.read_text("utf8"), re.MULTILINE)
    return found[1].strip() if found else page.stem


def exercises(root: Path) -> list[Exercise]:
    """Every exercise, in the order of the book."""
    found = []
    for page in _order(root):
        text = page.read_text("utf8")
        solved = set(re.findall(r"^`{3,}\{solution(?:-start)?\} *(\S+)", text, re.MULTILINE))
        found += [
            Exercise(page.stem, match[2], match[1].strip(), match[2] in solved)
            for match in re.finditer(r"^`{3,}\{exercise(?:-start)?\} *(.*)\n:label: *(\S+)", text, re.MULTILINE)
        ]
    return found


def _exercises(root: Path) -> str:
    chapters: dict[str, list[str]] = {}
    for exercise in exercises(root):
        words = f"{exercise.title} <{exercise.label}>" if exercise.title else exercise.label
        own = chapters.setdefault(exercise.chapter, [])
        own.append(f"- {{ref}}`{words}`" + ("" if exercise.solved else ", without a solution"))
    return "\n\n".join(f"**{{doc}}`{chapter}`**\n\n" + "\n".join(lines) for chapter, lines in chapters.items())


# --- errata -----------------------------------------------------------------------------------------------------------

GROUPS = {
    "paper": "The paper",
    "code": "The authors' code and settings",
    "anomalib": "anomalib 2.7.0, on which the paper's detectors build",
    "here": "What this project expected and did not find",
}
"""Value of the column ``about`` -> heading."""


def errata(root: Path) -> list[dict[str, str]]:
    """Rows of ``data/paper/errata.csv``: about, place, statement, holds, shown (separated by semicolons)."""
    with (root / "data" / "paper" / "errata.csv").open(newline="", encoding="utf8") as stream:
        return list(csv.DictReader(stream))


def shown_by(row: dict[str, str]) -> list[str]:
    """Tests (``tests/test_x.py::test_y``) and labels or names of chapters that show what a row says."""
    return [part.strip() for part in row["shown"].split(";") if part.strip()]


_LABELS = {  # how a label is written where it stands -> the role that refers to it
    r"^`{{3,}}\{{prf:\w+\}}[^\n]*\n:label: *{}$": "prf:ref",
    r"^`{{3,}}\{{exercise(?:-start)?\}}[^\n]*\n:label: *{}$": "ref",
    r"^(?::? *)name: *{}$": "numref",
    r"^.*\$\$ \({}\)$": "eq",
    r"^\({}\)=$": "ref",
}


def role(root: Path, label: str) -> str | None:
    """The role that refers to a label or chapter, or ``None`` where there is no such thing."""
    pages = _order(root)
    if label in {page.stem for page in pages}:
        return "doc"
    texts = [page.read_text("utf8") for page in pages]
    for pattern, name in _LABELS.items():
        if any(re.search(pattern.format(re.escape(label)), text, re.MULTILINE) for text in texts):
            return name
    return None


def _reference(root: Path, target: str) -> str:
    if "::" in target:
        file, _, test = target.partition("::")
        return f"`{Path(file).name}`: `{test}`"
    if (found := role(root, target)) is None:
        raise ValueError(f"data/paper/errata.csv: no chapter has the label {target!r}")
    return f"{{{found}}}`{target}`"


def _errata(root: Path) -> str:
    rows = errata(root)
    if unknown := {row["about"] for row in rows} - set(GROUPS):
        raise ValueError(f"data/paper/errata.csv: unknown groups {sorted(unknown)}; known are {', '.join(GROUPS)}")
    lines = []
    for about, title in GROUPS.items():
        lines += [f"## {title}", ""]
        for row in (row for row in rows if row["about"] == about):
            shown = "; ".join(_reference(root, target) for target in shown_by(row))
            lines += [f"**{row['place']}.** {row['statement']}", f": {row['holds']}", "", f"  Shown by {shown}.", ""]
    return "\n".join(lines)


# --- API --------------------------------------------------------------------------------------------------------------


def modules(root: Path, package: str) -> list[str]:
    """A module, or a package and everything public in it, by name."""
    path = (root / "src").joinpath(*package.split("."))
    if not path.is_dir():
        if not path.with_suffix(".py").is_file():
            raise ValueError(f"no module {package} in src")
        return [package]
    found = [package]
    for inside in sorted(path.iterdir(), key=lambda entry: entry.stem):
        if not inside.name.startswith("_") and (inside.suffix == ".py" or (inside / "__init__.py").is_file()):
            found += modules(root, f"{package}.{inside.stem}")
    return found


def exported(root: Path, package: str) -> dict[str, str]:
    """Names in ``__all__`` of a package that its modules define -> module, read without importing anything."""
    init = (root / "src").joinpath(*package.split("."), "__init__.py")
    if not init.is_file():
        return {}
    tree = ast.parse(init.read_text("utf8"))
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
    homes = {
        alias.asname or alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {name: homes[name] for name in names if name in homes}


def _api(root: Path, package: str) -> str:
    lines = []
    for name in modules(root, package):
        lines += [f"{'##' if name == package else '###'} `{name}`", ""]
        # Of a package, only what it says itself: its names stand where they are defined.
        is_package = (root / "src").joinpath(*name.split(".")).is_dir()
        options = (
            ["   :no-members:"] if is_package else ["   :members:", "   :ignore-module-all:", "   :show-inheritance:"]
        )
        lines += ["```{eval-rst}", f".. automodule:: {name}", *options, "```", ""]
        if homes := exported(root, name):
            listed = ", ".join(f"{{py:obj}}`{key} <{home}.{key}>`" for key, home in sorted(homes.items()))
            lines += [f"To be imported from `{name}`: {listed}.", ""]
    return "\n".join(lines)


def expand(text: str, root: Path) -> str:
    """A page with everything that it asks for in its place.

    Raises:
        ValueError: for something that this extension does not have, or a label that no chapter has.
    """

    def made(match: re.Match[str]) -> str:
        if match[1] == "api":
            return _api(root, match[2])
        if match[1] in ("errata", "exercises"):
            return _errata(root) if match[1] == "errata" else _exercises(root)
        raise ValueError(f"% usf: {match[1]}: known are api, errata, exercises")

    return MARKER.sub(made, text)


def gather(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fill a page in, and have Sphinx read it again when what it was filled with changes."""
    if MARKER.search(source[0]) is None:
        return
    root = Path(app.srcdir)
    asked = {match[1] for match in MARKER.finditer(source[0])}
    source[0] = expand(source[0], root)
    if asked & {"errata", "exercises"}:  # autodoc sees to the others
        for path in (*_order(root), root / "data" / "paper" / "errata.csv"):
            if path.stem != Path(docname).name:
                app.env.note_dependency(str(path))


# --- docstrings -------------------------------------------------------------------------------------------------------


_LITERAL = re.compile(r"(``.*?``|:[\w:]+:`[^`]*`|`[^`]*`|(?<![\w*])\*(?=\w)[^*]*(?<=\w)\*(?![\w*]))")


def plain(lines: list[str]) -> list[str]:
    """Docstring lines in which a bar is a bar and a star a star, as in ``ln|det|`` and ``(*batch, d)``.

    Code, literals, references and words in stars stay as they are.
    """
    out, code = [], False
    for line in lines:
        code = line.lstrip().startswith(">>>") or (code and bool(line.strip()))
        parts = [line] if code else _LITERAL.split(line)
        if not code:
            parts[::2] = [re.sub(r"(\||\*(?=\S))", r"\\\1", part) for part in parts[::2]]
        out.append("".join(parts))
    return out


_VALUES = ("attribute", "data", "property")


def _before_napoleon(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = plain(lines)
    app.env.temp_data["usf_docstring"] = list(lines)


def _after_napoleon(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Of a value, the docstring as it was: what stands before its first colon is no type."""
    if what in _VALUES:
        lines[:] = app.env.temp_data["usf_docstring"]


def resolve(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A reference by a short name, or by the name a package gives it, to where the object is documented.

    Types in signatures are linked where they are documented here, and stay plain where they are not.
    """
    if node.get("refdomain") != "py":
        return None
    parts = node["reftarget"].split(".")
    if len(parts) > 1 and (parts[0] != "usf" or parts[-1].startswith("_")):
        return contnode  # another package's, or not public
    start = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    tail, package = parts[start:], ".".join(parts[:start])
    within = ".".join(filter(None, (node.get("py:module"), node.get("py:class")))).split(".")

    def nearness(name: str) -> tuple[int, int]:
        pairs = zip(name.split("."), within, strict=False)
        return -len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))), len(name)

    objects = env.get_domain("py").objects
    found = [
        name
        for name in objects
        if name.split(".")[-len(tail) :] == tail and (not package or name.startswith(package + "."))
    ]
    if found:
        best = min(found, key=nearness)
        entry = objects[best]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, best)
    return None if isinstance(contnode, nodes.literal) else contnode


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point for Sphinx."""
    # anomalib's own imports warn of what anomalib itself deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="anomalib")
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.napoleon")
    app.connect("source-read", gather)
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    app.connect("missing-reference", resolve, priority=400)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
