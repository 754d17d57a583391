"""A chapter's text without the syntax that only this book understands, for notebooks that are read elsewhere.

Numbers that cells compute are put in as the built book has them; references become names and links; propositions,
exercises and figures keep their titles and captions as bold text. What is not known is said in words, never left as
syntax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from myst_nb.core.variables import format_plain_text
from pybtex.database import parse_file  # type: ignore[import-untyped]

_ROLE = re.compile(r"\{([a-z]+(?::[a-z]+)?)\}(`+)(.+?)\2", re.DOTALL)
_OPEN = re.compile(r"^(?P<fence>`{3,}|:{3,})\{(?P<name>[\w:-]+)\}(?P<argument>.*)$")
_OPTION = re.compile(r"^:([\w-]+):\s*(.*)$")
_NUMBERED = re.compile(r"\$\$\s*\(([\w-]+)\)")
_TITLED = re.compile(r"^(.*?)\s*<([^<>]+)>$", re.DOTALL)
_PAYLOADS = ("application/papermill.record/text/plain", "text/plain")


@dataclass(frozen=True)
class Known:
    """What of a book can be put into words.

    Attributes:
        values: key -> text of what was glued to it.
        labels: label -> what the book calls it: ``"Figure 12.5"``, ``"Proposition 12.1"``, ``"(12.2)"``.
        pages: name of a page -> its title.
        notebooks: pages that can be opened as notebooks.
        works: key of a work -> (authors and year, address or nothing).
    """

    values: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)
    notebooks: frozenset[str] = frozenset()
    works: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def titles(folder: Path) -> tuple[dict[str, str], frozenset[str]]:
    """(title by page, pages with cells) of a folder of chapters."""
    texts = {path.stem: path.read_text("utf8") for path in sorted(folder.glob("*.md"))}
    found = {name: re.search(r"^# (.+)$", text, re.MULTILINE) for name, text in texts.items()}
    cells = frozenset(name for name, text in texts.items() if re.search(r"^kernelspec:", text, re.MULTILINE))
    return {name: match[1].strip() for name, match in found.items() if match}, cells


def works(bibliography: Path) -> dict[str, tuple[str, str]]:
    """Key -> ("Abuzaid et al., 2025", address) of each work in a BibTeX file."""
    found = {}
    for key, entry in parse_file(str(bibliography)).entries.items():
        names = [" ".join(person.last_names).strip("{}") for person in entry.persons.get("author", ())]
        who = " and ".join(names[:2]) if len(names) < 3 else f"{names[0]} et al."
        doi = entry.fields.get("doi", "")
        address = entry.fields.get("url") or (f"https://doi.org/{doi}" if doi else "")
        found[key] = (f"{who or key}, {entry.fields.get('year', 'no year')}", address)
    return found


def numbers(env: Any) -> dict[str, str]:
    """Label -> what the book calls it, from Sphinx's environment once all pages were read."""
    found = {}
    for kinds in env.toc_fignumbers.values():
        for kind, ids in kinds.items():
            for label, number in ids.items():
                text = ".".join(map(str, number))
                if kind == "displaymath":
                    found[label.removeprefix("equation-")] = f"({text})"
                else:
                    found[label] = f"{kind.capitalize()} {text}"
    return found


def glued(path: Path) -> dict[str, str]:
    """Key -> text, from the file that MyST-NB writes beside an executed chapter; nothing where it is not there."""
    if not path.is_file():
        return {}
    outputs = json.loads(path.read_text("utf8"))
    texts = {
        key: next((o["data"][name] for name in _PAYLOADS if name in o["data"]), None) for key, o in outputs.items()
    }
    return {key: text for key, text in texts.items() if text is not None}


# --- roles ------------------------------------------------------------------------------------------------------------


def _glue(target: str, known: Known) -> str:
    key, _, spec = target.partition(":")
    if key not in known.values:
        return "(computed below)"
    try:
        return format_plain_text(known.values[key], spec)
    except ValueError:
        return "(computed below)"


def _cite(target: str, known: Known, *, textual: bool = False) -> str:
    found = []
    for key in (part.strip() for part in target.split(",")):
        name, address = known.works.get(key, (key, ""))
        if textual and ", " in name:
            name = "{} ({})".format(*name.rsplit(", ", 1))
        found.append(f"[{name}]({address})" if address else name)
    return ", ".join(found) if textual else f"({', '.join(found)})"


def _titled(target: str) -> tuple[str, str]:
    """(text or nothing, target) of ``text <target>`` or ``target``."""
    match = _TITLED.match(target)
    return (match[1], match[2]) if match else ("", target)


def _doc(target: str, known: Known) -> str:
    text, page = _titled(target)
    name = Path(page).name
    text = text or known.pages.get(name, name)
    return f"[{text}]({name}.ipynb)" if name in known.notebooks else f"*{text}*"


def _label(target: str, known: Known) -> str:
    text, label = _titled(target)
    return text or known.labels.get(label, f"*{label}*")


def _equation(target: str, known: Known) -> str:
    return known.labels.get(target, f"({target})")


_ROLES: dict[str, Callable[[str, Known], str]] = {
    "glue:text": _glue,
    "cite": _cite,
    "cite:p": _cite,
    "cite:t": lambda target, known: _cite(target, known, textual=True),
    "doc": _doc,
    "eq": _equation,
    "numref": _label,
    "ref": _label,
    "prf:ref": _label,
}


def _inline(text: str, known: Known) -> str:
    def role(match: re.Match[str]) -> str:
        return _ROLES.get(match[1], lambda target, _: target)(match[3].strip(), known)

    def numbered(match: re.Match[str]) -> str:
        return rf"\tag{{{_equation(match[1], known).strip('()')}}} $$"

    return _NUMBERED.sub(numbered, _ROLE.sub(role, text))


# --- directives -------------------------------------------------------------------------------------------------------

_TRANSPARENT = {"grid", "grid-item"}
_ENDS = {"exercise-end", "solution-end"}


def _heading(name: str, argument: str, label: str, known: Known) -> str:
    """The bold words that a directive becomes."""
    kind = name.removeprefix("prf:").removesuffix("-start").replace("-", " ").capitalize()
    if kind == "Solution":  # its argument is the exercise's label
        return f"**Solution** of {_label(argument, known)}."
    if kind == "Proof":
        return "*Proof.*"
    title = known.labels.get(label, kind)
    return f"**{title}** ({argument})." if argument else f"**{title}.**"


def _directive(name: str, argument: str, body: list[str], known: Known) -> str:
    label = ""
    while body and (not body[0].strip() or _OPTION.match(body[0])):
        if (option := _OPTION.match(body[0])) and option[1] in ("label", "name"):
            label = option[2].strip()
        body = body[1:]
    inside = plain("\n".join(body), known).strip()
    if name in _ENDS:
        return ""
    if name in _TRANSPARENT:
        return inside
    if name == "glue:figure":
        return f"*{known.labels.get(label, 'Figure')}.* {inside}"
    return f"{_heading(name, argument.strip(), label, known)} {inside}".strip()


def plain(text: str, known: Known) -> str:
    """Text of a Markdown cell that any notebook shows as it is meant."""
    out: list[str] = []
    prose: list[str] = []
    lines = text.splitlines()

    def flush() -> None:
        if prose:
            out.extend(_inline("\n".join(prose), known).split("\n"))
            prose.clear()

    at = 0
    while at < len(lines):
        line = lines[at]
        if match := _OPEN.match(line):
            flush()
            close = next((i for i in range(at + 1, len(lines)) if lines[i].rstrip() == match["fence"]), len(lines))
            argument = _inline(match["argument"], known)
            out.append(_directive(match["name"], argument, lines[at + 1 : close], known))
            at = close
        elif re.match(r"^`{3,}", line):  # code: as it is
            flush()
            fence = re.match(r"^`{3,}", line)[0]  # type: ignore[index]
            close = next((i for i in range(at + 1, len(lines)) if lines[i].rstrip() == fence), len(lines) - 1)
            out.extend(lines[at : close + 1])
            at = close
        elif not re.match(r"^\([\w-]+\)=$|^%( |$)", line):  # labels and comments are nobody's text
            prose.append(line)
        at += 1
    flush()
    return "\n".join(out)


def caption(cell: Any, known: Known) -> str | None:
    """The caption of the figure that a code cell makes, with its number; ``None`` for a cell without."""
    figure = cell.metadata.get("mystnb", {}).get("figure", {})
    text = str(figure.get("caption", "")).strip()
    if not text:
        return None
    return f"*{known.labels.get(figure.get('name', ''), 'Figure')}.* {_inline(text, known)}"


def rewrite(notebook: Any, known: Known) -> None:
    """Make the Markdown cells of a notebook plain, and put the captions of its figures below them."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            cells.append(cell)
            if (below := caption(cell, known)) is not None:
                cells.append(nbformat.v4.new_markdown_cell(below))
            continue
        cell.source = plain(cell.source, known).strip()
        if cell.source:
            cells.append(cell)
    notebook.cells = cells
