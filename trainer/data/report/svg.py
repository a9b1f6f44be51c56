"""A small SVG writer: elements, numbers that are always finite, text cut to a width, and linear scales.

Everything that comes from data passes through `escape`, also in attributes. Colours are CSS classes of `style.py`, so
that a drawing follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_NARROW, _BROAD = frozenset("ijl.,:;|!'` "), frozenset("mwMW@%\u2026\u2014")
JOINERS = "\u200c\u200d"
"""Invisible, but part of how words (Persian, Hindi) and emoji are spelled."""


def visible(text: object) -> str:
    """`text` with control characters, direction overrides and lone surrogates spelled out as \\xNN."""
    return "".join(
        c if c.isprintable() or c == "\n" or c in JOINERS else (" " if c == "\t" else f"\\x{ord(c):02x}")
        for c in str(text)
    )


def escape(text: object) -> str:
    """`text` for HTML or SVG, as content or inside double quotes."""
    return html.escape(visible(text), quote=True)


def coordinate(value: float) -> str:
    """A number as SVG takes it, in tenths of a pixel; what is not finite becomes 0."""
    if not math.isfinite(value):
        return "0"
    return f"{round(value, 1) + 0.0:.1f}".rstrip("0").rstrip(".")  # adding 0.0 makes -0.0 plain 0


def element(tag: str, /, *inside: str, **attributes: object) -> str:
    """One element. Attribute `class_` is class; `_` in names is `-`; floats and ints become coordinates."""
    words = []
    for name, value in attributes.items():
        if value is None:
            continue
        shown = coordinate(value) if isinstance(value, int | float) else escape(value)
        words.append(f' {name.rstrip("_").replace("_", "-")}="{shown}"')
    body = "".join(inside)
    return f"<{tag}{''.join(words)}>{body}</{tag}>" if body else f"<{tag}{''.join(words)}/>"


def rect(x: float, y: float, width: float, height: float, style: str, tip: str = "") -> str:
    """A rectangle of CSS class `style`; `tip` shows on hovering."""
    title = element("title", escape(tip)) if tip else ""
    return element(
        "rect", title, x=x, y=y, width=max(width, 0), height=max(height, 0), rx=min(2, width / 2), class_=style
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A line of CSS class `style`."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def text(x: float, y: float, words: object, style: str = "", anchor: str | None = None) -> str:
    """Text with its baseline at y; `anchor` is start, middle or end."""
    return element("text", escape(words), x=x, y=y, class_=style or None, text_anchor=anchor)


def drawing(width: float, height: float, title: str, description: str, *inside: str) -> str:
    """A whole inline SVG of its own size in pixels, shrinking with the page, with a name for screen readers."""
    return (
        f'<svg viewBox="0 0 {coordinate(width)} {coordinate(height)}" width="{coordinate(width)}" '
        f'height="{coordinate(height)}" role="img" aria-label="{escape(f"{title}: {description}")}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(inside)}</svg>"
    )


def text_width(words: str, size: float = 12) -> float:
    """About how wide `words` are in pixels in a system font of `size` pixels."""
    total = 0.0
    for character in words:
        if unicodedata.combining(character):
            continue
        if unicodedata.east_asian_width(character) in "WF":
            total += 1.05
        elif character in _NARROW:
            total += 0.32
        elif character in _BROAD:
            total += 0.95
        else:
            total += 0.72 if character.isupper() else 0.6
    return total * size


def fit(words: object, width: float, size: float = 12) -> str:
    """`words` on one line, cut with an ellipsis to about `width` pixels."""
    shown = " ".join(visible(words).split())
    if text_width(shown, size) <= width:
        return shown
    left, kept = width - text_width("…", size), []
    for character in shown:
        left -= text_width(character, size)
        if left < 0:
            break
        kept.append(character)
    return "".join(kept) + "…"


def plural(amount: int, word: str, words: str = "") -> str:
    """`1 row`, `2 rows`; with thousands separators."""
    return f"{amount:,} {word if amount == 1 else words or word + 's'}"


def short(value: float) -> str:
    """A number for an axis: 950, 1.2k, 3M."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share as a percentage that never rounds something to nothing, nor a part to the whole."""
    if 0 < value < 0.0005:
        return "<0.1%"
    if 0.9995 <= value < 1:
        return ">99.9%"
    return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


@dataclass(slots=True)
class Scale:
    """Values `low`..`high` to pixels `begin`..`end`; an empty range maps to `begin`."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        place = (value - self.low) / span if span > 0 else 0.0
        return self.begin + min(max(place, 0.0), 1.0) * (self.end - self.begin)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values (1, 2 or 5 times a power of ten apart) within the range, about `wanted` of them."""
        span = self.high - self.low
        if not span > 0 or not math.isfinite(span):
            return [self.low]
        rough = span / max(wanted, 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [position * step for position in range(first, min(last, first + 50) + 1)]


def spread(places: Sequence[tuple[float, float]], gap: float = 6) -> list[int]:
    """Rows for labels so that none overlaps: for each (left, right) in pixels the lowest row that is free there."""
    rows: list[list[tuple[float, float]]] = []
    chosen = []
    for left, right in places:
        free = [all(right + gap <= a or left - gap >= b for a, b in row) for row in rows]
        number = free.index(True) if True in free else len(rows)
        if number == len(rows):
            rows.append([])
        rows[number].append((left, right))
        chosen.append(number)
    return chosen
