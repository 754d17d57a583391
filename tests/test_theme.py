"""One visual language: colours are written down in one module, mean one thing, and can be told apart."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import jupytext
import matplotlib.colors as mcolors
import numpy as np
import numpy.typing as npt
import pytest

from usf.plots.theme import COLORS, DARK_BRIGHTNESS, INK, INNER_CMAP, shades

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(p for p in (ROOT / "src" / "usf" / "plots").glob("*.py") if p.name != "theme.py")
CHAPTERS = sorted((ROOT / "book").rglob("*.md"))
WHITE, DARK = "#ffffff", "#121212"
"""The pages' backgrounds."""

NEUTRAL = {"none", "face", "auto", "_r"}
_ARGUMENT = re.compile(r"\w*colou?rs?|cmap|mfc|mec|ec|fc|c")
_HEX = re.compile(r"#(?:[0-9a-fA-F]{3,4}){1,2}$")


def typed_colours(code: str) -> list[str]:
    """Colours and colour maps that Python code writes down: as an argument that takes one, or as a word that is one."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.keyword) and node.arg and _ARGUMENT.fullmatch(node.arg):
            values = [v for v in ast.walk(node.value) if isinstance(v, ast.Constant) and isinstance(v.value, str)]
            # Inside a subscript, COLORS["usf"], it is a key.
            keys = {k for s in ast.walk(node.value) if isinstance(s, ast.Subscript) for k in ast.walk(s.slice)}
            tests = {k for s in ast.walk(node.value) if isinstance(s, ast.Compare) for k in ast.walk(s)}
            found += [v.value for v in values if v not in keys | tests and v.value not in NEUTRAL | COLORS.keys()]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = node.value
            if _HEX.match(word) or word.startswith(("tab:", "xkcd:")) or word in mcolors.CSS4_COLORS:
                found.append(word)
    return found


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_colours_are_typed_in_the_theme_only(path: Path) -> None:
    assert typed_colours(path.read_text("utf8")) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_type_no_colours(path: Path) -> None:
    cells = [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.lstrip().startswith(("%", "!")))
    assert typed_colours(code) == []


def test_the_search_finds_them() -> None:
    code = 'a(color="red"); b(cmap="magma"); c = "#0072B2"; d(color=COLORS["usf"], mfc="none"); e["gold"]'
    assert sorted(typed_colours(code)) == ["#0072B2", "gold", "magma", "red", "red"]


# ----------------------------------------------------------------------------------------------- telling them apart

# Machado, Oliveira and Fernandes (2009), "A physiologically-based model for simulation of color vision deficiency",
# severity 1; on linear RGB.
DEFICIENCIES = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
Array = npt.NDArray[np.float64]


def linear(color: str, brightness: float = 1.0) -> Array:
    """sRGB to linear RGB, after a factor on the former as CSS's ``brightness`` has it."""
    rgb = np.minimum(np.array(mcolors.to_rgb(color)) * brightness, 1)
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: Array) -> Array:
    """Linear RGB to CIE L*a*b* (D65)."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ np.clip(rgb, 0, 1) / (to_xyz @ np.ones(3))
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(color: str, page: str, brightness: float = 1.0) -> float:
    """WCAG's ratio of relative luminances."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    a, b = float(weights @ linear(color, brightness)), float(weights @ linear(page))
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_can_be_told_apart(deficiency: str) -> None:
    """Ten units of CIE L*a*b* between any two: several times what is just noticeable (2.3)."""
    seen = {name: lab(DEFICIENCIES[deficiency] @ linear(color)) for name, color in COLORS.items()}
    near = {pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in itertools.combinations(seen, 2)}
    closest = min(near, key=lambda pair: near[pair])
    assert near[closest] > 10, f"{closest} look alike under {deficiency}: {near[closest]:.1f}"


def test_every_role_has_its_own_colour() -> None:
    assert len(set(COLORS.values())) == len(COLORS)


def test_ink_is_legible_on_both_pages() -> None:
    assert contrast(INK, WHITE) >= 4.5
    assert contrast(INK, DARK, DARK_BRIGHTNESS) >= 4.5
    assert contrast(INK, DARK) < 4.5, "the dark page no longer needs a brightness: drop it"


@pytest.mark.parametrize("name", COLORS)
def test_colours_stand_out_on_both_pages(name: str) -> None:
    assert contrast(COLORS[name], WHITE) >= 2
    assert contrast(COLORS[name], DARK, DARK_BRIGHTNESS) >= 3


def test_points_of_any_density_are_seen_on_both_pages() -> None:
    ends = [mcolors.to_hex(INNER_CMAP(share)) for share in (0.0, 1.0)]
    assert contrast(ends[1], WHITE) > 1.3
    assert contrast(ends[0], DARK, DARK_BRIGHTNESS) > 2
    lightness = [lab(linear(mcolors.to_hex(INNER_CMAP(share))))[0] for share in np.linspace(0, 1, 20)]
    assert np.all(np.diff(lightness) > 0), "the order of densities must survive without hue"


def test_style_sheet_brightens_the_dark_page_as_the_theme_says() -> None:
    sheet = (ROOT / "book" / "_static" / "book.css").read_text("utf8")
    assert re.findall(r"brightness\(([\d.]+)\)", sheet) == [f"{DARK_BRIGHTNESS:g}"]


def test_shades_are_of_one_hue_and_differ() -> None:
    tones = [lab(linear(color)) for color in shades("usf", 4)]
    assert np.all(np.diff([tone[0] for tone in tones]) > 8)
