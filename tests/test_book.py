"""The built book in a browser whose network is cut: formulas, figures, search, themes, narrow windows.

Needs the built book (`make book`) and Chromium, and is skipped with a reason where one is missing. With the environment
variable ``USF_REQUIRE_BOOK=1`` (CI, after the build) a missing one is a failure.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, Route, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def documents() -> list[str]:
    """Every document of the table of contents, its root first."""
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


def lacking(what: str) -> None:
    """Skip, or fail where the caller insists on the test."""
    if os.environ.get("USF_REQUIRE_BOOK") == "1":
        pytest.fail(f"{what}, and USF_REQUIRE_BOOK=1 demands it", pytrace=False)
    pytest.skip(what)


@dataclass
class Visit:
    """A page in the browser, and what it did."""

    page: Page
    address: str
    left: list[str] = field(default_factory=list)
    """Requests to anywhere but the book."""
    errors: list[str] = field(default_factory=list)
    """Messages of the console, exceptions, and answers of the book's server that are errors."""

    def open(self, path: str) -> None:
        self.page.goto(f"{self.address}/{path}", wait_until="load")
        self.page.evaluate("() => window.MathJax?.startup?.promise?.then(() => true)")

    def clean(self) -> None:
        """Nothing left the page and nothing went wrong in it."""
        assert not self.left, f"requests that leave the book: {self.left}"
        assert not self.errors, f"errors in the page: {self.errors}"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The book, served on this machine only."""
    missing = [name for name in documents() if not (HTML / f"{name}.html").exists()]
    if missing:
        lacking(f"the book is not built, or older than its table of contents ({', '.join(missing)}): run `make book`")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Browser]:
    """Debian's Chromium, or whichever is on the path; its profile is new and empty."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = os.environ.get("USF_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        lacking("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(address: str, browser: Browser) -> Iterator[Visit]:
    context = browser.new_context(viewport=WIDE, color_scheme="light", service_workers="block")  # type: ignore[arg-type]
    visit = Visit(context.new_page(), address)

    def gate(route: Route, request: Request) -> None:
        if request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            visit.left.append(request.url)
            route.abort()

    def answered(response: Response) -> None:
        if response.status >= 400:
            visit.errors.append(f"{response.status} {response.url}")

    def said(message: ConsoleMessage) -> None:
        if message.type == "error":
            visit.errors.append(message.text)

    context.route("**/*", gate)
    visit.page.on("response", answered)
    visit.page.on("console", said)
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    yield visit
    context.close()


RAW_MATH = r"""() => {
  const found = [], article = document.querySelector("article");
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node.parentElement.closest("pre, code, script, style, mjx-container")) continue;
    if (/\$\$|\\\(|\\\)|\\\[|\\\]|\\(frac|mathbb|ln|det)\b/.test(node.data)) found.push(node.data.trim().slice(0, 80));
  }
  return found;
}"""

SQUEEZED = r"""() => [...document.querySelectorAll("article img")].filter(i => {
  const shown = i.getBoundingClientRect();
  return shown.height > 0 && Math.abs(shown.width / shown.height / (i.naturalWidth / i.naturalHeight) - 1) > .03;
}).map(i => i.src)"""

CONTRAST = r"""selector => {
  const rgb = text => { const v = text.match(/[\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const luminance = c => {
    const [r, g, b] = c.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const background = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c[3] > .5) return c;
    }
    return [255, 255, 255, 1];
  };
  return [...document.querySelectorAll(selector)].filter(e => e.offsetParent && e.textContent.trim()).map(e => {
    const a = luminance(rgb(getComputedStyle(e).color)), b = luminance(background(e));
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.trim().slice(0, 40)];
  });
}"""


@pytest.mark.parametrize("name", documents())
def test_page(name: str, visit: Visit) -> None:
    """Formulas are set, figures are there, nothing is wider than the window, and nothing leaves the page."""
    page = visit.page
    visit.open(f"{name}.html")
    formulas = page.locator("article .math").count()
    unset = (
        "() => [...document.querySelectorAll('article .math')].filter(e => !e.querySelector('mjx-container')).length"
    )
    assert page.evaluate(unset) == 0, f"of {formulas} formulas some are not set"
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0, "MathJax does not understand a formula"
    assert page.evaluate(RAW_MATH) == [], "formulas in the text that were not recognised"

    empty = "() => [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src)"
    page.wait_for_function("() => [...document.images].every(i => i.complete)")
    assert page.evaluate(empty) == [], "images that are not there"

    for size in (WIDE, NARROW):
        page.set_viewport_size(size)  # type: ignore[arg-type]
        page.wait_for_timeout(100)
        assert page.evaluate(SQUEEZED) == [], "images out of proportion"
        width = page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= size["width"], f"the page is {width} px wide in a window of {size['width']} px"
    visit.clean()


@pytest.mark.parametrize("name", documents())
def test_page_loads_nothing_foreign(name: str, address: str) -> None:
    """Not even what a browser would fetch only under conditions (fonts, hints, lazy images) names another host."""
    text = (HTML / f"{name}.html").read_text("utf8")
    tags = re.findall(r"<(?:script|link|img|iframe|source|video|audio|object|embed)\b[^>]*>", text)
    foreign = [tag for tag in tags if re.search(r"(?:src|href|srcset|data)=[\"'](?:https?:)?//", tag)]
    assert foreign == []


@pytest.mark.parametrize("name", documents())
def test_dark_theme(name: str, visit: Visit) -> None:
    """The button switches to a dark page, and text, code and captions remain legible on it."""
    page = visit.page
    visit.open(f"{name}.html")
    for _ in range(3):
        if page.evaluate("() => document.documentElement.dataset.theme") == "dark":
            break
        page.locator("button.theme-switch-button:visible").first.click()
    assert page.evaluate("() => document.documentElement.dataset.theme") == "dark"
    page.wait_for_timeout(400)  # the theme fades colours in
    paragraphs = page.evaluate(CONTRAST, "article p, article figcaption, article td, article th")
    assert paragraphs
    assert min(paragraphs)[0] >= 4.5, f"hard to read in the dark: {min(paragraphs)}"
    code = page.evaluate(CONTRAST, "article pre span[class]")
    if code:
        assert min(code)[0] >= 3.0, f"code that is hard to read in the dark: {min(code)}"
    visit.clean()


def test_search(visit: Visit) -> None:
    """Typing a word into the search field leads to pages that contain it."""
    page = visit.page
    visit.open(f"{documents()[0]}.html")
    page.locator(".search-button:visible, .search-button__button:visible").first.click()
    field_ = page.locator("input[type=search]:visible").first
    field_.fill("determinant")
    field_.press("Enter")
    page.wait_for_url("**/search.html?*")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    target = page.locator("#search-results li a").first.get_attribute("href") or ""
    page.locator("#search-results li a").first.click()
    page.wait_for_load_state("load")
    assert target.split("?")[0].split("#")[0].split("/")[-1] in page.url
    visit.clean()


def test_first_page(visit: Visit) -> None:
    """The address that `make book` prints leads to the introduction."""
    visit.page.goto(f"{visit.address}/index.html")
    visit.page.wait_for_url(f"**/{documents()[0]}.html")
    visit.clean()
