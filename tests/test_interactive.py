"""Interactive figures: what they hold is what the library computes, and in a browser without network they answer."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright

from usf.alignment import spearman
from usf.oneclass import inversion_loss, inversion_map, standard_normal_log_prob
from usf.plots import interactive
from usf.study import mixtures

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "book" / "_static"
ALPHAS = (0.5, 1.0, 4.0)


def collapse_path() -> interactive.Figure:
    """Three weights; the latents shrink by the root of the weight, the last ones by much more."""
    generator = torch.Generator().manual_seed(0)
    z, center = torch.randn(60, 2, generator=generator), torch.tensor([3.0, -1.0])
    path = {}
    for weight, factor in ((1.0, 1.0), (0.1, math.sqrt(0.1)), (0.0, 1e-3)):
        scaled = factor * z / math.sqrt(2)
        squared = float(scaled.square().sum(-1).mean())
        # A volume change of 1.5 nats at scale 1, so that the scale-free objective is the same everywhere.
        path[weight] = (
            squared,
            math.log(squared) - (-1.5 + 2 * math.log(factor)),
            scaled.norm(dim=-1),
            scaled + center,
        )
    return interactive.collapse_path(path, -0.5 * z.square().sum(-1), center, points=40)


def inversion() -> interactive.Figure:
    return interactive.density_inversion(ALPHAS, dim=3, points=50, seed=1)


def explorer() -> interactive.Figure:
    return interactive.latent_explorer(mixtures.load()["points"])


MADE = {"collapse": collapse_path, "inversion": inversion, "explorer": explorer}


@pytest.mark.parametrize("name", MADE)
def test_content_is_complete(name: str) -> None:
    """A place for every point, a value for every position of the slider, nothing that JSON cannot hold."""
    content = json.loads(MADE[name]().json())
    positions, count = len(content["slider"]["values"]), len(content["colors"])
    assert positions > 1
    assert sorted(content["order"]) == list(range(count))
    for frames in content["positions"].values():
        assert len(frames) in (1, positions)
        assert all(len(axis) == count for frame in frames for axis in frame)
    for panel in content["panels"]:
        assert all(len(line["values"]) == positions for line in panel.get("lines", ()))
        assert len(panel.get("scale", range(positions))) == positions
        assert ("lines" in panel) != (panel.get("of") in content["positions"])
    assert all(len(values) == positions for _, values in content["frame"])
    for _, frames in content["point"]:
        assert len(frames) in (1, positions)
        assert all(len(values) == count for values in frames)
    assert len(content.get("focus", range(positions))) == positions


def test_inversion_is_the_proposition() -> None:
    content = inversion().content
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    true = standard_normal_log_prob(x)
    said = dict(content["frame"])
    for index, alpha in enumerate(ALPHAS):
        z = inversion_map(x, alpha)
        drawn = np.array(content["positions"]["z"][index])
        assert np.hypot(*drawn) == pytest.approx(z.norm(dim=-1).numpy(), rel=2e-3)
        assert float(said["loss, exact"][index]) == pytest.approx(inversion_loss(3, alpha), rel=5e-3)
        assert spearman(z.square().sum(-1), true) == pytest.approx(-1)
        assert said["Spearman, score and −ln p"][index] == "−1.000"
    ranks = dict(content["point"])
    assert [a + b for a, b in zip(ranks["rank by density"][0], ranks["rank by score"][0], strict=True)] == [51] * 50


def test_collapse_path_has_the_terms_of_the_loss() -> None:
    content = collapse_path().content
    assert content["slider"]["values"] == ["1", "0.1", "0"]
    squared, terms, total = (np.array(line["values"]) for line in content["panels"][2]["lines"])
    log_det = np.array(content["panels"][3]["lines"][0]["values"])
    assert terms == pytest.approx(-np.array([1, 0.1, 0]) * log_det, abs=1e-3)
    assert total == pytest.approx(squared + terms, abs=1e-3)
    assert log_det == pytest.approx([-1.5, -1.5 + math.log(0.1), -1.5 + math.log(1e-6)], abs=1e-2)
    with pytest.raises(ValueError, match="plane"):
        interactive.collapse_path({1.0: (1.0, 0.0, torch.ones(3), torch.ones(3, 3))}, torch.ones(3), torch.zeros(3))


def test_explorer_links_the_same_points() -> None:
    points = mixtures.load()["points"]
    content = explorer().content
    said = dict(content["point"])
    rows = [r for r in points if r["model"] == "usf" and r["dim"] == 2 and r["choice"] == "val_loss"]
    likeliest = content["order"][0]
    assert said["true ln p"][0][likeliest] == pytest.approx(max(r["true"] for r in rows), rel=1e-2)
    assert said["rank by density"][0][likeliest] == 1
    kept = [r for r in points if not (r["model"] == "usf" and r["dim"] == 2 and r["point"] == rows[0]["point"])]
    with pytest.raises(ValueError, match="same points"):
        interactive.latent_explorer(kept)


def test_html_holds_the_data_and_a_sentence() -> None:
    """What a notebook shows: nothing that runs, and no way out of the element for what stands in the data."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[tuple[str, dict[str, str | None]]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.append((tag, dict(attrs)))

    figure = interactive.Figure({"slider": {"label": "</script><b>", "values": []}})
    text = figure._repr_html_()
    reader = Reader()
    reader.feed(text)
    assert reader.tags == [("usf-figure", {}), ("script", {"type": "application/json"}), ("p", {})]
    assert json.loads(figure.json())["slider"]["label"] == "</script><b>"
    with pytest.raises(ValueError, match="JSON"):
        interactive.Figure({"slider": {"label": math.nan, "values": []}}).json()


def test_script_is_light_and_needs_nothing() -> None:
    script, style = ((STATIC / name).read_text("utf8") for name in ("figures.js", "figures.css"))
    assert len(script.encode()) < 20_000
    assert len(style.encode()) < 5_000
    assert not re.search(r"\b(import|fetch|XMLHttpRequest|eval|innerHTML|Worker)\b", script)
    assert set(re.findall(r"https?://\S+?\"", script)) == {'http://www.w3.org/2000/svg"'}
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b|rgb|url\(", style), "colours come with the data or from the pages' theme"


# ------------------------------------------------------------------------------------------------------------- browser

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf8"><meta name="viewport" content="width=device-width">
<title>figure</title><style>:root {{--pst-color-text-muted: #48566b; --pst-color-text-base: #222}}
body {{margin: 16px; font: 16px sans-serif}} figure {{margin: 0}}</style>
<link rel="stylesheet" href="{static}/figures.css"><script defer src="{static}/figures.js"></script></head>
<body><figure>{figure}<figcaption>What to see.</figcaption></figure></body></html>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = os.environ.get("USF_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture(params=MADE)
def page(request: pytest.FixtureRequest, browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The figure in a page that is opened as a file, with the network cut; in the end nothing may have gone wrong."""
    path = tmp_path / "page.html"
    path.write_text(PAGE.format(static=STATIC.as_uri(), figure=MADE[request.param]()._repr_html_()), "utf8")
    context = browser.new_context(viewport={"width": 1000, "height": 900}, offline=True, reduced_motion="reduce")
    page, errors = context.new_page(), []
    page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith("file:") else errors.append(sent.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert errors == []


def picture(page: Page) -> Any:
    """All that the slider may change: places, brightness and the words."""
    return page.evaluate("""() => [
      [...document.querySelectorAll("usf-figure .dot")].map(d => d.style.transform + d.classList),
      [...document.querySelectorAll("usf-figure dd")].map(d => d.textContent),
    ]""")


def test_slider_changes_the_picture_by_keyboard(page: Page) -> None:
    slider = page.get_by_role("slider")
    slider.focus()
    first, said = picture(page), page.locator("output").inner_text()
    page.keyboard.press("ArrowRight")
    second = picture(page)
    assert second[0] != first[0]
    assert second[1] != first[1]
    assert page.locator("output").inner_text() != said
    assert slider.get_attribute("aria-valuetext") == page.locator("output").inner_text()
    page.keyboard.press("Home")
    assert sorted(picture(page)[0]) == sorted(first[0])
    page.keyboard.press("End")
    assert page.locator("usf-figure .mark, usf-figure .dot").first.is_visible()


def test_a_point_is_chosen_in_all_panels(page: Page) -> None:
    panels = page.get_by_role("application")
    content = json.loads(page.evaluate("() => JSON.stringify(document.querySelector('usf-figure').spec)"))
    rings = page.locator("usf-figure .ring:not(.off)")
    assert rings.count() == 0
    panels.first.focus()
    chosen = "() => document.querySelector('usf-figure').chosen"
    page.keyboard.press("Home")
    assert page.evaluate(chosen) == content["order"][0]
    assert rings.count() == panels.count() == sum("of" in panel for panel in content["panels"])
    told = page.locator("usf-figure dl").last.locator("dd").all_inner_texts()
    assert "–" not in told
    page.keyboard.press("PageDown")
    assert page.evaluate(chosen) == content["order"][1]
    seen = set()
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown") * 2:
        page.keyboard.press(key)
        seen.add(page.evaluate(chosen))
    assert len(seen) > 3
    page.keyboard.press("Escape")
    assert rings.count() == 0
    # The pointer: over a point of the last panel, the same point is chosen everywhere.
    page.evaluate("() => document.querySelectorAll('usf-figure svg[tabindex]')[0].scrollIntoView()")
    dot = panels.first.locator(".dot:not(.pale)").nth(5)
    dot.hover(force=True)
    assert rings.count() == panels.count()


def test_labels(page: Page) -> None:
    """Names for whoever does not see it: the group by its caption, the slider by its label, panels by their titles."""
    assert page.get_by_role("group", name="What to see.").count() == 1
    content = json.loads(page.evaluate("() => JSON.stringify(document.querySelector('usf-figure').spec)"))
    assert page.get_by_role("slider", name=content["slider"]["label"]).count() == 1
    for panel in content["panels"]:
        role = "img" if "lines" in panel else "application"
        assert page.get_by_role(role, name=re.compile("^" + re.escape(panel["title"]))).count() == 1


def test_phone(page: Page) -> None:
    """At 390 pixels nothing is wider than the window and no text smaller than nine pixels."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(150)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    # A label along a vertical axis is turned: its scale is the length of the matrix's first column.
    heights = """() => [...document.querySelectorAll("usf-figure text")].map(t => {
      const m = t.getCTM();
      return parseFloat(getComputedStyle(t).fontSize) * Math.hypot(m.a, m.b);
    })"""
    assert min(page.evaluate(heights)) >= 9
    assert page.locator("usf-figure input").bounding_box()["height"] >= 24  # type: ignore[index]


def test_motion_only_where_it_is_wanted(page: Page) -> None:
    moving = "() => getComputedStyle(document.querySelector('usf-figure .dot')).transitionDuration"
    assert page.evaluate(moving) == "0s"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) == "0.25s"


def test_without_javascript(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGE.format(static=STATIC.as_uri(), figure=inversion()._repr_html_()), "utf8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    shown = page.locator("usf-figure").inner_text()
    context.close()
    assert "standing still" in shown
    assert "colors" not in shown
