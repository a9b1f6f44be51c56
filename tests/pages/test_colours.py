"""Colours of plots and bars as people with deuteranopia or protanopia see them: no two of a palette may look alike.

The yardstick is Okabe and Ito's palette, which was made for them: no two colours of ours are nearer than its nearest two.
"""

import itertools
import math
import re

import numpy as np
import pytest

from launch.compare.page import IMAGE_CONFIG
from launch.notebook.curve import CURVE_COLOURS
from tests.helpers.launching import ROOT

SIGHT = {
    "normal": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}
"""What each kind of sight makes of linear RGB: Machado, Oliveira and Fernandes 2009, at full severity."""
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
WHITE = [0.95047, 1.0, 1.08883]
OKABE_AND_ITO = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
NON_TEXT_CONTRAST = 3.0
"""Least contrast of graphical objects with what is behind them: WCAG 2.2, success criterion 1.4.11."""


def linear(color: str) -> np.ndarray:
    """Linear RGB of `#rrggbb`, each from 0 to 1."""
    values = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab_of(color: str, sight: str) -> tuple[float, float, float]:
    """The colour in CIELAB, as it is seen."""
    xyz = np.array(TO_XYZ) @ np.clip(np.array(SIGHT[sight]) @ linear(color), 0, 1) / WHITE
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def difference(first: tuple[float, float, float], second: tuple[float, float, float]) -> float:
    """CIEDE2000 between two colours in CIELAB; 1 is just seen when they touch."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    chroma7 = ((math.hypot(a1, b1) + math.hypot(a2, b2)) / 2) ** 7
    stretch = 1 + 0.5 * (1 - math.sqrt(chroma7 / (chroma7 + 25**7)))
    c1, c2 = math.hypot(stretch * a1, b1), math.hypot(stretch * a2, b2)
    h1 = math.degrees(math.atan2(b1, stretch * a1)) % 360
    h2 = math.degrees(math.atan2(b2, stretch * a2)) % 360
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue = (h1 + turn / 2) % 360 if c1 * c2 else h1 + h2
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    waves = ((0.17, 1, -30), (-0.24, 2, 0), (-0.32, 3, 6), (0.20, 4, -63))
    t = 1 - sum(weight * math.cos(math.radians(times * hue + shift)) for weight, times, shift in waves)
    by_light = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / math.sqrt(20 + (light - 50) ** 2))
    by_chroma = (c2 - c1) / (1 + 0.045 * chroma)
    by_hue = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    rotation = -2 * math.sqrt(chroma**7 / (chroma**7 + 25**7))
    rotation *= math.sin(math.radians(60 * math.exp(-(((hue - 275) / 25) ** 2))))
    return math.sqrt(by_light**2 + by_chroma**2 + by_hue**2 + rotation * by_chroma * by_hue)


def nearest(colors: tuple[str, ...] | list[str]) -> tuple[float, str, str, str]:
    """(difference, sight, and the two colours) of the pair that looks most alike to anybody."""
    pairs = []
    for sight in SIGHT:
        seen = {color: lab_of(color.lower(), sight) for color in colors}
        pairs += [(difference(seen[a], seen[b]), sight, a, b) for a, b in itertools.combinations(colors, 2)]
    return min(pairs)


def contrast(first: str, second: str) -> float:
    """The contrast of WCAG between two colours."""
    darker, lighter = sorted(float(np.array(TO_XYZ)[1] @ linear(color)) for color in (first, second))
    return (lighter + 0.05) / (darker + 0.05)


def themes() -> dict[str, list[str]]:
    """The colours of plots on a page, in the dark theme and the light one, as its script has them."""
    script = (ROOT / "trainer" / "pages" / "base.js").read_text()
    lists = re.search(r"category: isDark\.matches\s*\? \[(.*?)\]\s*: \[(.*?)\]", script, re.DOTALL)
    return {theme: re.findall(r"#\w{6}", lists[number]) for number, theme in enumerate(("dark", "light"), 1)}


def bars(theme: str) -> list[str]:
    """The colours of the parts of a plan's bars in a theme."""
    rules = re.findall(r"\.bars\{(.*?)\}", (ROOT / "launch" / "plan" / "page.html.j2").read_text())
    colors = dict(re.findall(r"(--p\d):(#\w{6})", rules[0]))
    if theme == "dark":
        colors |= dict(re.findall(r"(--p\d):(#\w{6})", rules[1]))
    return list(colors.values())


def test_difference_of_colours_is_that_of_its_published_examples():
    """Of Sharma, Wu and Dalal 2005, table 1: pairs 1, 7, 14, 17, 25 and 34."""
    examples = [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
        ((50.0, -0.0010, 2.4900), (50.0, 0.0009, -2.4900), 4.8045),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ]
    for first, second, expected in examples:
        assert difference(first, second) == pytest.approx(expected, abs=1e-4)
        assert difference(second, first) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("palette", ["dark", "light", "plan, dark", "plan, light", "notebook"])
def test_no_two_colours_of_a_palette_look_alike_to_the_colour_blind(palette):
    known = {**themes(), "plan, dark": bars("dark"), "plan, light": bars("light"), "notebook": CURVE_COLOURS}
    colors = known[palette]
    assert len({*colors}) == len(colors) == (9 if palette.startswith("plan") else 8)
    assert nearest(colors)[0] >= nearest(OKABE_AND_ITO)[0] - 1e-9, nearest(colors)
    # Few comparisons have more than four values on an axis.
    if palette in ("dark", "light"):
        assert nearest(colors[:4])[0] > 15, nearest(colors[:4])


@pytest.mark.parametrize(("theme", "media"), [("light", 0), ("dark", 1)])
def test_colours_of_plots_stand_out_from_the_page(theme, media):
    styles = (ROOT / "trainer" / "pages" / "base.css").read_text()
    for name in ("page", "surface"):
        behind = re.findall(rf"--{name}: (#\w+)", styles)[media]
        if len(behind) == 4:
            behind = "#" + "".join(2 * digit for digit in behind[1:])
        for color in themes()[theme]:
            assert contrast(color, behind) >= NON_TEXT_CONTRAST, (color, name)


def test_pictures_of_plots_have_the_colours_of_the_light_page():
    assert IMAGE_CONFIG["range"]["category"] == themes()["light"]
    assert IMAGE_CONFIG["mark"]["color"] == themes()["light"][0]
