"""The built book, for the tests that read it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"


def documents() -> list[str]:
    """Every document of the table of contents, its root first, in the order of reading."""
    found: list[str] = []

    def walk(entry: Any) -> None:
        if isinstance(entry, dict):
            found.extend(str(value) for key, value in entry.items() if key in ("root", "file"))
            for value in entry.values():
                walk(value)
        elif isinstance(entry, list):
            for value in entry:
                walk(value)

    walk(yaml.safe_load((ROOT / "_toc.yml").read_text("utf8")))
    return found


def lacking(what: str) -> NoReturn:
    """Skip, or fail where the caller insists on the test."""
    if os.environ.get("USF_REQUIRE_BOOK") == "1":
        pytest.fail(f"{what}, and USF_REQUIRE_BOOK=1 demands it", pytrace=False)
    pytest.skip(what)


def require() -> None:
    """Skip, or fail, where the book is not built or not whole."""
    missing = [name for name in documents() if not (HTML / f"{name}.html").exists()]
    if missing:
        lacking(f"the book is not built, or older than its table of contents ({', '.join(missing)}): run `make book`")
