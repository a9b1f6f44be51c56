"""Draws curves as a picture (SVG) that needs no script and no library, for notebooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH = 480
HEIGHT = 200
LEFT_MARGIN = 52
RIGHT_MARGIN = 12
TOP_MARGIN = 10
BOTTOM_MARGIN = 34
MAX_POINTS = 300
"""Points of a drawn line at most: a picture has no more columns that an eye tells apart."""
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#AA3377", "#FF8FA3")
"""Colours that the colour-blind tell apart, the first six of Okabe and Ito; yellow and black would vanish on one background."""
CURVE_DASHES = ("", "7 4", "2 4", "9 4 2 4")
"""Each line has the next one, so that of two lines on top of each other both are seen."""
MIN_LOGARITHMIC_RATIO = 30.0
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


def draw_picture(curves: Sequence[Curve], *, x_title: str, description: str) -> Picture | None:
    """Draw curves as a picture that a notebook shows without a script; None if none has two points to draw a line through.

    Left out are points that are not finite, and curves with a single point unless they are drawn as dots. The y axis is
    logarithmic if all values are positive and far apart (`MIN_LOGARITHMIC_RATIO`).
    """
    drawable = []  # (curve, its finite points)
    for curve in curves:
        points = _finite_points(curve.points)
        if len(points) > 1 or (points and curve.style == "dots"):
            drawable.append((curve, points))
    if not any(len(points) > 1 for _, points in drawable):
        return None
    # The axes span the points of all curves.
    all_points: list[tuple[float, float]] = []
    for _, points in drawable:
        all_points += points
    y_values = [y for _, y in all_points]
    is_logarithmic = min(y_values) > 0 and max(y_values) / min(y_values) >= MIN_LOGARITHMIC_RATIO
    x_axis = _Axis.spanning([x for x, _ in all_points], LEFT_MARGIN, WIDTH - RIGHT_MARGIN)
    y_axis = _Axis.spanning(y_values, HEIGHT - BOTTOM_MARGIN, TOP_MARGIN, is_logarithmic=is_logarithmic)

    # The curves, with points as positions in the picture.
    drawn_curves = []
    colour_index = 0
    for curve, points in drawable:
        positions = [(f"{x_axis.position(x):.1f}", f"{y_axis.position(y):.1f}") for x, y in _thinned(points)]
        drawn_curves.append(
            DrawnCurve(
                label=curve.label,
                polyline=" ".join(f"{x},{y}" for x, y in positions),
                dots=positions if curve.style == "dots" else [],
                colour=CURVE_COLOURS[colour_index % len(CURVE_COLOURS)],
                dash="" if curve.style == "faint" else CURVE_DASHES[colour_index % len(CURVE_DASHES)],
                is_faint=curve.style == "faint",
            )
        )
        if curve.style != "faint":  # the line over a faint one has its colour
            colour_index += 1
    return Picture(
        curves=drawn_curves,
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        x_title=x_title,
        description=description,
    )


def running_means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Smooth a curve, so that a trend shows through the noise of batches: the mean of each point and those before it.

    The mean is over a fiftieth of all points. Points are (x, y); those that are not finite are left out.
    """
    window = max(1, len(points) // 50)
    finite_points = _finite_points(points)
    means = []
    window_sum = 0.0
    for index, (x, y) in enumerate(finite_points):
        window_sum += y
        if index >= window:
            _, dropped_y = finite_points[index - window]
            window_sum -= dropped_y
        means.append((x, window_sum / min(index + 1, window)))
    return means


def _finite_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Thin a long curve to about `MAX_POINTS` points: the lowest and the highest of each stretch, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return points
    stretch_length = math.ceil(2 * len(points) / MAX_POINTS)  # two points are kept of each
    kept = []
    for start in range(0, len(points), stretch_length):
        stretch = points[start : start + stretch_length]
        lowest = min(stretch, key=lambda point: point[1])
        highest = max(stretch, key=lambda point: point[1])
        kept += sorted({lowest, highest})
    return kept


@dataclass(frozen=True, slots=True)
class _Axis:
    """A scale from values to positions in the picture."""

    low: float
    high: float
    low_position: float
    """Where `low` lies in the picture."""
    high_position: float
    is_logarithmic: bool = False

    @classmethod
    def spanning(
        cls, values: list[float], low_position: float, high_position: float, *, is_logarithmic: bool = False
    ) -> _Axis:
        """An axis from the smallest of `values`, at `low_position` in the picture, to the largest, at `high_position`."""
        low = min(values)
        high = max(values)
        if low == high:  # a flat line lies in the middle
            margin = abs(low) / 10 or 1.0
            low -= margin
            high += margin
        return cls(low, high, low_position, high_position, is_logarithmic)

    def position(self, value: float) -> float:
        """Where a value lies in the picture."""
        if self.is_logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.low_position + share * (self.high_position - self.low_position)

    def ticks(self) -> list[tuple[str, str]]:
        """The marks of the axis, (position in the picture, text): a few round values or, on a logarithmic axis, powers of ten."""
        values = self._powers_of_ten() if self.is_logarithmic else self._round_values()
        return [(f"{self.position(value):.1f}", f"{value:g}") for value in values]

    def _round_values(self) -> list[float]:
        """Choose about four round values within the axis: multiples of 1, 2 or 5 times a power of ten."""
        least_step = (self.high - self.low) / 4
        magnitude = 10.0 ** math.floor(math.log10(least_step))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= least_step)
        first_multiple = math.ceil(self.low / step)
        last_multiple = math.floor(self.high / step)
        # Rounded, or 0.30000000000000004 (0.1 + 0.2) would be the text of a tick.
        return [round(multiple * step, 12) for multiple in range(first_multiple, last_multiple + 1)]

    def _powers_of_ten(self) -> list[float]:
        """Choose powers of ten within a logarithmic axis, at most about five; its two ends if there are none."""
        first_exponent = math.ceil(math.log10(self.low))
        last_exponent = math.floor(math.log10(self.high))
        exponent_step = max(1, (last_exponent - first_exponent) // 4)
        exponents = range(first_exponent, last_exponent + 1, exponent_step)
        return [10.0**exponent for exponent in exponents] or [self.low, self.high]
