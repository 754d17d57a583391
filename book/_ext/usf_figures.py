"""Every figure's caption ends in a link to the code that made it.

Which function that is, is read off the cell: a call of a function of ``usf.plots`` that returns a figure. For a figure
that is pasted elsewhere in its chapter (``{glue:figure}``) it is the call inside ``glue``. The link leads to a page
with the source of that module, which is made here and needs neither network nor repository.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from usf_book import read

PACKAGE = "usf.plots"
_PASTED = re.compile(r"^[`:]{3,}\{glue:figure\}\s*(\S+)\s*\n(?::\w+:.*\n)*?:name:\s*(\S+)", re.MULTILINE)
_logger = logging.getLogger(__name__)


def drawing(root: Path) -> dict[str, int]:
    """Functions that return a figure, by their full names, and the lines where they begin."""
    found = {}
    for path in sorted((root / "src" / Path(*PACKAGE.split("."))).glob("*.py")):
        for node in ast.parse(path.read_text("utf8")).body:
            if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == "Figure":
                found[f"{PACKAGE}.{path.stem}.{node.name}"] = node.lineno
    return found


def parse(code: str) -> ast.Module:
    """A cell's code without the lines that only IPython understands."""
    return ast.parse("\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!"))))


def imported(cells: Sequence[str]) -> dict[str, str]:
    """Names that a chapter's imports bind, with what they stand for."""
    names = {}
    for code in cells:
        for node in ast.walk(parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    whole = alias.name if alias.asname else alias.name.split(".")[0]
                    names[alias.asname or whole] = whole
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def called(code: str, names: dict[str, str], known: dict[str, int], key: str | None = None) -> list[str]:
    """Full names of the drawing functions that a cell calls, in order; with ``key`` those inside ``glue(key, ...)``."""
    tree: ast.AST = parse(code)
    if key is not None:
        glued = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and _dotted(node.func) == "glue" and node.args
            and isinstance(node.args[0], ast.Constant) and node.args[0].value == key
        ]  # fmt: skip
        if not glued:
            return []
        tree = glued[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, _, rest = _dotted(node.func).partition(".")
            name = ".".join(filter(None, (names.get(first, first), rest)))
            if name in known:
                found.append((node.lineno, name))
    return list(dict.fromkeys(name for _, name in sorted(found)))


def page(function: str) -> tuple[str, str]:
    """(page, anchor) of a function's source."""
    module, name = function.rsplit(".", 1)
    return f"code/{module}", name


def makers(cells: Sequence[Any], known: dict[str, int]) -> tuple[dict[int, list[str]], dict[str, list[str]]]:
    """The drawing functions of a notebook's cells by number, and of its pasted figures by name."""
    code = {index: cell.source for index, cell in enumerate(cells) if cell.cell_type == "code"}
    names = imported(list(code.values()))
    shown = {index: called(source, names, known) for index, source in code.items()}
    pasted = {}
    for cell in cells:
        for key, name in _PASTED.findall(cell.source) if cell.cell_type == "markdown" else ():
            pasted[name] = [f for source in code.values() for f in called(source, names, known, key)]
    return shown, pasted


def link(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Append the links to the captions of a page; a figure whose code is not found is worth a warning."""
    if app.builder.format != "html" or (found := read(app.env, docname)) is None:
        return
    shown, pasted = makers(found[1].cells, drawing(Path(app.srcdir)))
    pasted = {nodes.make_id(name): functions for name, functions in pasted.items()}
    for figure in doctree.findall(nodes.figure):
        captions = [child for child in figure.children if isinstance(child, nodes.caption)]
        functions: list[str] = []
        cell: nodes.Node | None = figure
        while cell is not None and not (isinstance(cell, nodes.Element) and cell.get("nb_element") == "cell_code"):
            cell = cell.parent
        if isinstance(cell, nodes.Element):
            functions = shown.get(cell["cell_index"], [])
        else:
            functions = next((pasted[name] for name in figure["ids"] if name in pasted), [])
        if not functions or not captions:
            _logger.warning("a figure has no caption, or no function of %s made it", PACKAGE, location=figure)
            continue
        captions[0] += nodes.Text(" ")
        line = nodes.inline("", "Code: ", classes=["figure-code"])
        for number, function in enumerate(functions):
            target, anchor = page(function)
            uri = f"{app.builder.get_relative_uri(docname, target)}#{anchor}"
            line += nodes.Text(", " if number else "")
            line += nodes.reference("", "", nodes.literal("", function), refuri=uri, internal=True)
        captions[0] += line


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """One page a module of `PACKAGE`: its source, with an anchor at each function that draws."""
    if app.builder.format != "html":
        return
    known = drawing(Path(app.srcdir))
    for module in dict.fromkeys(name.rsplit(".", 1)[0] for name in known):
        path = Path(app.srcdir, "src", *module.split(".")).with_suffix(".py")
        highlighter = app.builder.highlighter  # type: ignore[attr-defined]
        lines = highlighter.highlight_block(path.read_text("utf8"), "python").splitlines()
        for name, number in known.items():
            if name.rsplit(".", 1)[0] == module:
                lines[number - 1] = f'<span id="{escape(page(name)[1])}"></span>' + lines[number - 1]
        title = f"Source of {module}"
        body = f"<h1>{title}</h1>" + "\n".join(lines)
        yield f"code/{module}", {"title": title, "body": body, "parents": []}, "page.html"


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point for Sphinx."""
    app.connect("doctree-resolved", link)
    app.connect("html-collect-pages", source_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
