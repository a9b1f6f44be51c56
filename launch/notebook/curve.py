"""Draws curves as a picture (SVG) that needs no script and no library, for notebooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH = 480
HEIGHT = 200
LEFT = 52
RIGHT = 12
TOP = 10
BOTTOM = 34
MOST_POINTS = 300
"""Points of a drawn line at most: a picture has no more columns that an eye tells apart."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#AA3377", "#FF8FA3")
"""Colours that the colour-blind tell apart, the first six of Okabe and Ito; yellow and black would vanish on one background."""
DASHES = ("", "7 4", "2 4", "9 4 2 4")
"""Each line has the next one, so that of two lines on top of each other both are seen."""
LOGARITHMIC_FROM = 30.0
"""Largest over smallest value from which on the axis is logarithmic: the later steps would be one flat line."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a picture."""

    label: str
    points: Sequence[tuple[float, float]]
    """(x, y) in the order of x. A point whose y is not finite is left out."""
    style: Literal["line", "faint", "dots"] = "line"
    """`dots` marks every point, `faint` is the raw line behind a smoothed one and is not in the legend."""


@dataclass(frozen=True, slots=True)
class DrawnCurve:
    """A curve in the coordinates of the picture, for the template."""

    label: str
    polyline: str
    dots: list[tuple[str, str]]
    colour: str
    dash: str
    is_faint: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of curves, for the template: lines, the marks of both axes, and what they are called."""

    curves: list[DrawnCurve]
    x_ticks: list[tuple[str, str]]
    """(position, text) of each mark of the x axis."""
    y_ticks: list[tuple[str, str]]
    x_title: str
    description: str
    """What the picture shows, for people who do not see it."""


def picture(curves: Sequence[Curve], *, x_title: str, description: str) -> Picture | None:
    """The picture of these curves; None if none of them has two points to draw a line through.

    Left out are points that are not finite, and curves with a single point unless they are drawn as dots. The y axis is
    logarithmic if all values are positive and far apart (`LOGARITHMIC_FROM`).
    """
    finite = [(curve, _finite(curve.points)) for curve in curves]
    drawable = [(curve, points) for curve, points in finite if len(points) > 1 or (points and curve.style == "dots")]
    if not any(len(points) > 1 for _, points in drawable):
        return None
    # The axes span the points of all curves.
    all_points: list[tuple[float, float]] = []
    for _, points in drawable:
        all_points += points
    y_values = [y for _, y in all_points]
    is_logarithmic = min(y_values) > 0 and max(y_values) / min(y_values) >= LOGARITHMIC_FROM
    x_axis = _Axis.over([x for x, _ in all_points], LEFT, WIDTH - RIGHT)
    y_axis = _Axis.over(y_values, HEIGHT - BOTTOM, TOP, is_logarithmic=is_logarithmic)

    # The curves, with points as positions in the picture. `number` counts colours.
    drawn = []
    number = 0
    for curve, points in drawable:
        positions = [(f"{x_axis.position(x):.1f}", f"{y_axis.position(y):.1f}") for x, y in _thinned(points)]
        drawn.append(
            DrawnCurve(
                label=curve.label,
                polyline=" ".join(f"{x},{y}" for x, y in positions),
                dots=positions if curve.style == "dots" else [],
                colour=COLOURS[number % len(COLOURS)],
                dash="" if curve.style == "faint" else DASHES[number % len(DASHES)],
                is_faint=curve.style == "faint",
            )
        )
        if curve.style != "faint":  # the line over a faint one has its colour
            number += 1
    return Picture(drawn, x_axis.marks(), y_axis.marks(), x_title, description)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running mean of each point and those before it, over a fiftieth of all, so that a trend shows through the noise of batches.

    Points are (x, y). Those that are not finite are left out.
    """
    window = max(1, len(points) // 50)
    means = []
    total = 0.0
    values = [y for _, y in _finite(points)]
    for index, (x, y) in enumerate(_finite(points)):
        total += y
        if index >= window:
            total -= values[index - window]
        means.append((x, total / min(index + 1, window)))
    return means


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MOST_POINTS` of the points (x, y): of each stretch the lowest and the highest, so that a spike stays."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        lowest = min(part, key=lambda point: point[1])
        highest = max(part, key=lambda point: point[1])
        kept += sorted({lowest, highest})
    return kept


@dataclass(frozen=True, slots=True)
class _Axis:
    """A scale from values to positions in the picture."""

    low: float
    high: float
    start: float
    """Position of `low`; `stop` is that of `high`."""
    stop: float
    is_logarithmic: bool = False

    @classmethod
    def over(cls, values: list[float], start: float, stop: float, *, is_logarithmic: bool = False) -> _Axis:
        low = min(values)
        high = max(values)
        if low == high:  # a flat line lies in the middle
            margin = abs(low) / 10 or 1.0
            low -= margin
            high += margin
        return cls(low, high, start, stop, is_logarithmic)

    def position(self, value: float) -> float:
        if self.is_logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def marks(self) -> list[tuple[str, str]]:
        """(position, text) of four or five round values."""
        values = self._powers_of_ten() if self.is_logarithmic else self._round_values()
        return [(f"{self.position(value):.1f}", f"{value:g}") for value in values]

    def _round_values(self) -> list[float]:
        rough = (self.high - self.low) / 4
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        # Rounded, or 0.1 + 0.2 would be the text of a mark.
        return [round(number * step, 12) for number in range(first, last + 1)]

    def _powers_of_ten(self) -> list[float]:
        first = math.ceil(math.log10(self.low))
        last = math.floor(math.log10(self.high))
        every = max(1, (last - first) // 4)
        return [10.0**exponent for exponent in range(first, last + 1, every)] or [self.low, self.high]
