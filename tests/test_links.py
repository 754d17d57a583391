"""Where the pages of the built book lead: every link arrives, a chapter is followed by the next, notebooks are there.

Reads the files, without a browser. Skipped with a reason where the book is not built; with ``USF_REQUIRE_BOOK=1`` that
is a failure. Addresses outside the book are judged by their form alone: these tests open no connection.
"""

from __future__ import annotations

import functools
import itertools
import json
import posixpath
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from built import HTML, ROOT, documents, require


@dataclass
class Parsed(HTMLParser):
    """What a page names and where it leads."""

    ids: list[str] = field(default_factory=list)
    links: list[dict[str, str]] = field(default_factory=list)
    """Attributes of its `a` elements with an address."""
    parts: list[str] = field(default_factory=list)
    """Addresses of what it loads: images, scripts, style sheets."""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "a" and "name" in found:
            self.ids.append(found["name"])
        if tag == "a" and "href" in found:
            self.links.append(found)
        address = found.get("href" if tag == "link" else "src", "")
        if tag in ("link", "script", "img", "source", "iframe") and address:
            self.parts.append(address)


@functools.cache
def parsed(page: str) -> Parsed:
    """A page by its path from the book's root."""
    found = Parsed()
    found.feed((HTML / page).read_text("utf8"))
    return found


def pages() -> list[str]:
    """All pages, those that Sphinx adds included."""
    return sorted(path.relative_to(HTML).as_posix() for path in HTML.rglob("*.html") if "_static" not in path.parts)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    require()


def target(page: str, address: str) -> tuple[str, str]:
    """(path from the book's root, anchor) that an address on a page means."""
    split = urlsplit(address)
    path = unquote(split.path)
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page, unquote(split.fragment)


def test_internal_links_arrive() -> None:
    lost = []
    for page in pages():
        for link in parsed(page).links:
            if urlsplit(link["href"]).scheme or link["href"].startswith("//"):
                continue
            path, anchor = target(page, link["href"])
            if path.startswith("..") or not (HTML / path).is_file():
                lost.append(f"{page}: {link['href']}")
            elif anchor and path.endswith(".html") and anchor not in parsed(path).ids:
                lost.append(f"{page}: {link['href']} (no such anchor)")
    assert lost == []


def test_what_pages_load_is_there() -> None:
    lost = []
    for page in pages():
        # What is loaded from elsewhere is for test_book.
        own = [address for address in parsed(page).parts if not urlsplit(address).scheme]
        lost += [f"{page}: {address}" for address in own if not (HTML / target(page, address)[0]).exists()]
    assert lost == []


def test_external_links_are_well_formed() -> None:
    """By their form: https, a host, no blanks; DOIs and arXiv numbers as their sites write them."""
    odd = []
    for page in pages():
        for link in parsed(page).links:
            address = link["href"]
            split = urlsplit(address)
            if not split.scheme and not address.startswith("//"):
                continue
            good = split.scheme == "https" and re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", split.netloc) is not None
            good = good and not re.search(r"[\s<>\"{}|\\^`]", address)
            if "doi.org" in split.netloc:
                good = good and split.netloc == "doi.org" and re.match(r"/10\.\d{4,9}/\S+$", split.path) is not None
            if "arxiv.org" in split.netloc:
                number = r"/(abs|pdf|html)/(\d{4}\.\d{4,5}(v\d+)?|[a-z-]+/\d{7})"
                good = good and re.match(number, split.path) is not None
            if not good:
                odd.append(f"{page}: {address}")
    assert odd == []


def test_next_and_previous_lead_through_the_book() -> None:
    order = documents()
    for before, after in itertools.pairwise(order):
        forward = [link for link in parsed(f"{before}.html").links if "right-next" in link.get("class", "")]
        back = [link for link in parsed(f"{after}.html").links if "left-prev" in link.get("class", "")]
        assert [target(f"{before}.html", link["href"])[0] for link in forward] == [f"{after}.html"]
        assert [target(f"{after}.html", link["href"])[0] for link in back] == [f"{before}.html"]
    assert not [link for link in parsed(f"{order[0]}.html").links if "left-prev" in link.get("class", "")]
    assert not [link for link in parsed(f"{order[-1]}.html").links if "right-next" in link.get("class", "")]


NOTEBOOKS = [name for name in documents() if "{code-cell}" in (ROOT / f"{name}.md").read_text("utf8")]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_can_be_downloaded(name: str) -> None:
    """The page offers the chapter as a notebook with all its cells."""
    page = f"{name}.html"
    offered = {target(page, link["href"])[0] for link in parsed(page).links if "download" in link.get("class", "")}
    found = [HTML / path for path in offered if path.endswith(".ipynb")]
    assert len(found) == 1, f"{name} offers {sorted(offered)}"
    cells = json.loads(found[0].read_text("utf8"))["cells"]
    source = Path(ROOT, f"{name}.md").read_text("utf8")
    assert sum(cell["cell_type"] == "code" for cell in cells) >= source.count("```{code-cell}")
