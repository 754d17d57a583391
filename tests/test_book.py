"""The built book in a browser whose network is cut: formulas, figures, search, themes, narrow windows, accessibility.

Needs the built book (`make book`) and Chromium, and is skipped with a reason where one is missing. With the environment
variable ``USF_REQUIRE_BOOK=1`` (CI, after the build) a missing one is a failure.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from built import HTML, ROOT, documents, lacking, require
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, Route, sync_playwright

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
NOTEBOOKS = [name for name in documents() if "{code-cell}" in (ROOT / f"{name}.md").read_text("utf8")]
THEMES = ("light", "dark")


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

    def show(self, theme: str, size: dict[str, int]) -> None:
        """A reader's system prefers this theme, and has a window of this size."""
        self.page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
        self.page.set_viewport_size(size)  # type: ignore[arg-type]
        # the theme learns of it from an event, which may come after this call has returned
        self.page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
        self.page.wait_for_timeout(400)  # the theme fades colours in

    def clean(self) -> None:
        """Nothing left the page and nothing went wrong in it."""
        assert not self.left, f"requests that leave the book: {self.left}"
        assert not self.errors, f"errors in the page: {self.errors}"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The book, served on this machine only."""
    require()

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
    context.set_default_timeout(120_000)  # a busy machine is no fault of the pages
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
  const style = getComputedStyle(i), side = name => parseFloat(style[`padding${name}`]);
  const width = i.clientWidth - side("Left") - side("Right"), height = i.clientHeight - side("Top") - side("Bottom");
  return height > 0 && Math.abs(width / height / (i.naturalWidth / i.naturalHeight) - 1) > .03;
}).map(i => i.src)"""

UNFOLD = """() => {
  document.querySelectorAll("details").forEach(e => { e.open = true; });
  document.querySelectorAll(".toggle-hidden").forEach(e => e.classList.remove("toggle-hidden"));
}"""

CUT = r"""() => {
  const cut = [], name = e => `${e.tagName.toLowerCase()} ${(e.id || e.textContent).trim().slice(0, 50)}`;
  const parts = "mjx-container, table, pre, img, svg, figure, iframe, .admonition, .cell_output, p, li, figcaption";
  for (const e of document.querySelectorAll(parts.split(", ").map(s => `article ${s}`).join(", "))) {
    const box = e.getBoundingClientRect();
    if (!box.width || !box.height || e.closest("mjx-assistive-mml")) continue;
    let reachable = false;
    for (let a = e.parentElement; a && a !== document.body && !reachable; a = a.parentElement) {
      const flow = getComputedStyle(a).overflowX, b = a.getBoundingClientRect();
      if (box.right <= b.right + 1 && box.left >= b.left - 1) continue;
      if (flow === "auto" || flow === "scroll") reachable = true;
      else if (flow !== "visible") { cut.push(name(e)); break; }
    }
    if (!reachable && (box.right > innerWidth + 1 || box.left < -1)) cut.push(name(e));
  }
  for (const e of document.querySelectorAll("article div.math, article mjx-container[display='true']")) {
    if (getComputedStyle(e).overflowY === "hidden" && e.scrollHeight > e.clientHeight + 2) cut.push("low: " + name(e));
  }
  return [...new Set(cut)];
}"""

CAPTIONS = r"""() => [...document.querySelectorAll("article caption")].filter(c => {
  const range = document.createRange();
  range.selectNodeContents(c);
  const box = range.getBoundingClientRect(), place = (c.closest(".text_html") ?? document.body).getBoundingClientRect();
  return box.width && (box.left < place.left - 1 || box.right > place.right + 1);
}).map(c => c.textContent.trim().slice(0, 50))"""

BROKEN_WORDS = r"""() => {
  const broken = [];
  for (const cell of document.querySelectorAll("article :is(td, th)")) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode, range = document.createRange();
      if (node.parentElement.closest("mjx-container, script, style")) continue;
      for (const word of node.data.matchAll(/\p{L}{2,}/gu)) {
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
        if (lines.size > 1) broken.push(`${word[0]}, in: ${cell.textContent.trim().slice(0, 50)}`);
      }
    }
  }
  return broken;
}"""

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
    """Formulas are set, figures are there, nothing is wider than its place, and nothing leaves the page."""
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

    page.evaluate(UNFOLD)
    for theme, size in itertools.product(THEMES, (WIDE, NARROW)):
        visit.show(theme, size)
        assert page.evaluate(SQUEEZED) == [], "images out of proportion"
        width = page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= size["width"], f"the page is {width} px wide in a window of {size['width']} px"
        assert page.evaluate(CUT) == [], f"cut off, and not to be reached by scrolling, at {size['width']} px, {theme}"
        assert page.evaluate(CAPTIONS) == [], f"captions that are cut off at {size['width']} px"
        broken = page.evaluate(BROKEN_WORDS)
        assert broken == [], f"words of a table that do not fit their cells at {size['width']} px"
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
    page.wait_for_selector("#search-results li a")
    target = page.locator("#search-results li a").first.get_attribute("href") or ""
    page.locator("#search-results li a").first.click()
    page.wait_for_load_state("load")
    assert target.split("?")[0].split("#")[0].split("/")[-1] in page.url
    visit.clean()


@pytest.mark.parametrize("word", ["determinant", "collapse", "hazelnut"])
def test_search_needs_no_server(word: str, browser: Browser) -> None:
    """Opened as files, as `make book` says, the pages still find words."""
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(f"{(HTML / 'search.html').as_uri()}?q={word}")
    page.wait_for_selector("#search-results li a")
    found = [link.get_attribute("href") or "" for link in page.locator("#search-results li a").all()]
    page.close()
    assert found
    text = (HTML / found[0].split("?")[0].split("#")[0]).read_text("utf8").lower()
    assert word in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_can_be_copied(name: str, visit: Visit) -> None:
    """Every visible code cell has a button, and a button copies the code beside it."""
    page = visit.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.open(f"{name}.html")
    page.evaluate(UNFOLD)
    cells = page.locator("article .cell_input div.highlight")
    buttons = page.locator("article .cell_input div.highlight button.copybtn")
    assert cells.count() == buttons.count() > 0
    buttons.first.focus()  # seen when the pointer or the focus is on it
    buttons.first.press("Enter")
    page.wait_for_function("() => navigator.clipboard.readText().then(text => text.length > 0)")
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied.strip() == cells.first.locator("pre").inner_text().strip()
    visit.clean()


LOOKS = (("light", WIDE), ("dark", NARROW))
"""Both themes and both widths; colours do not depend on the width, nor the rest on the theme."""
OPTIONS = {"resultTypes": ["violations", "incomplete"], "preload": False}
"""Of axe. It would load style sheets again, and look for what they import in the wrong folder."""


@pytest.mark.parametrize("name", [*documents(), "search", "genindex"])
def test_accessibility(name: str, visit: Visit) -> None:
    """axe-core's rules, best practices included, hidden parts unfolded; the counts go into build/accessibility/.

    Inside of a formula, thousands of elements, is MathJax's affair, which speaks it to screen readers.
    """
    visit.open(f"{name}.html")
    visit.page.evaluate(UNFOLD)
    lines, faults = [], []
    for theme, size in LOOKS:
        visit.show(theme, size)
        found = Axe().run(visit.page, {"exclude": [["mjx-container"]]}, OPTIONS).response
        undecided = sum(len(rule["nodes"]) for rule in found["incomplete"])
        counts = (
            f"{len(found['passes'])} rules passed, {len(found['violations'])} violated, {undecided} elements undecided"
        )
        lines.append(f"{name}, {theme}, {size['width']} px, axe-core {found['testEngine']['version']}: {counts}")
        for rule in found["violations"]:
            where = "; ".join(" ".join(map(str, node["target"])) for node in rule["nodes"][:3])
            faults.append(f"{theme}, {size['width']} px: {rule['id']}, {rule['help']}, {len(rule['nodes'])}: {where}")
    report = ROOT / "build" / "accessibility" / f"{name.replace('/', '-')}.txt"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join([*lines, *faults, ""]), "utf8")
    assert faults == []


def test_first_page(visit: Visit) -> None:
    """The address that `make book` prints leads to the introduction."""
    visit.page.goto(f"{visit.address}/index.html")
    visit.page.wait_for_url(f"**/{documents()[0]}.html")
    visit.clean()
