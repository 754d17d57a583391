"""The library's rooms: which may know which, where a newcomer finds them, and that what is public explains itself."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "usf"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")

LAYERS = [
    {"paths", "files"},
    {"flows", "training", "alignment", "calibration"},
    {"oneclass", "detectors"},
    {"hybrid"},
    {"study"},
    {"plots"},
    {"inspection", "deploy", "report"},  # one application: a report on a folder of images, and the model it ships
    {"cli"},
    {"__main__"},
]
"""The rooms from the ground up. A room knows those below it; those beside it only on the application's floor."""
APPLICATION = 6
INHERITED = {"extra_repr", "expand"}
"""Methods of torch's that are overridden and need no words of their own."""


def room(module: str) -> str:
    """``usf.study.mixtures.search`` -> ``study``; a program, whatever its place, may use everything."""
    parts = module.split(".")
    return "__main__" if parts[-1] == "__main__" else parts[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf8"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports anywhere in it, also late or for types alone, and on which line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute here"
            # `from usf import paths` and `from usf.paths import root` name the same room.
            names = [
                f"{node.module}.{alias.name}" if node.module == "usf" else str(node.module) for alias in node.names
            ]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.startswith("usf."))


def floor(name: str) -> int:
    found = [level for level, rooms in enumerate(LAYERS) if name in rooms]
    assert len(found) == 1, f"usf.{name} has no place in LAYERS"
    return found[0]


def test_every_room_has_a_floor() -> None:
    assert {room(name_of(path)) for path in MODULES} == set().union(*LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_between_rooms_point_downwards(path: Path) -> None:
    own = room(name_of(path))
    for target, line in imports(path):
        other = room(target)
        allowed = other == own or floor(other) < floor(own) or floor(other) == floor(own) == APPLICATION
        assert allowed, f"{path.relative_to(ROOT)}:{line}: usf.{own} must not know usf.{other}, which is not below it"


def listed(text: str, heading: str) -> str:
    """The part of a Markdown text below a heading."""
    return text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


def test_readme_says_where_every_room_is() -> None:
    table = listed((ROOT / "README.md").read_text("utf8"), "Where things are")
    rooms = {room(name_of(path)) for path in MODULES} - {"__main__"}
    assert sorted(name for name in rooms if f"`{name}`" not in table) == []
    named = re.search(r"\| `src/usf/` \|(.*)\|", table)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == rooms, "a room that is not there"
    for path in re.findall(r"^\| `([^`]+)`", table, re.M):
        assert path in ("build/", "_build/") or (ROOT / path).exists(), path


def classes() -> dict[str, tuple[list[str], set[str]]]:
    """Class -> its bases and its documented methods, by bare names."""
    found: dict[str, tuple[list[str], set[str]]] = {}
    for path in MODULES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                found[node.name] = (bases, {method.name for method in methods if ast.get_docstring(method)})
    return found


CLASSES = classes()


def inherits_words(name: str, method: str) -> bool:
    bases, documented = CLASSES.get(name, ([], set()))
    return method in documented or any(inherits_words(base, method) for base in bases if base != name)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    """Modules, classes, functions and methods, by their own or, where they override a method, by that one's."""
    assert ast.get_docstring(tree(path)), "the module says nothing"
    silent = []
    for node in tree(path).body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            silent.append(node.name)
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            if not isinstance(part, ast.FunctionDef) or part.name.startswith("_") or part.name in INHERITED:
                continue
            if not ast.get_docstring(part) and not inherits_words(node.name, part.name):
                silent.append(f"{node.name}.{part.name}")
    assert silent == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_listed_as_public_exists_and_is_not_only_passed_on(path: Path) -> None:
    """``__all__`` names what the file defines. A package's own file also names what its modules define."""
    body = tree(path).body
    lists = [n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    if not lists:
        return
    public = ast.literal_eval(lists[0])
    assert len(public) == len(set(public))
    own: set[str] = set()
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            own.add(node.name)
        elif isinstance(node, ast.Assign):
            own.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and path.name == "__init__.py":
            own.update(alias.asname or alias.name for alias in node.names)
    assert [name for name in public if name not in own] == []
