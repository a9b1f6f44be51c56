"""Vega-Lite specifications of a comparison's plots: how points are told apart, shared axes and menus, and compact data.

A specification is a dictionary, so that no library is needed to make one. Its colours come from the page's theme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launch.compare.comparison import ComparedPoint, Comparison

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
HEIGHT = 320
WIDTH = 860
"""Size of a plot in pixels; a page fits the width to its window."""
THEME_COLORS = 8
"""Colours of the page's theme. An axis with more values has a scheme of its own."""
LEGEND_SYMBOLS: dict[str, Spec] = {
    "strokeDash": {"symbolType": "stroke", "symbolSize": 700, "symbolStrokeWidth": 2},
    "shape": {"symbolSize": 160},
}
"""How the legend draws a value: a piece of line long enough to show its dashes, or the mark."""
DASHES = [[1, 0], [6, 3], [2, 2], [10, 3, 2, 3], [12, 5], [4, 1, 1, 1, 1, 1]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
NAME_PIXELS = 280
"""Widest name in a legend. Vega cuts at 160 by default, and two points may differ in the end of their names alone."""
X_AXIS_CHOICES = {"step": "steps", "tokens": "tokens", "seconds": "seconds of steps"}
"""What the reader can choose for the axis below curves, and what it is then called."""


LEGEND_CONFIG: Spec = {"legend": {"symbolBaseFillColor": "#808b99", "symbolBaseStrokeColor": "#808b99"}}
"""Colour of legend entries that stand for a dash or a shape: a grey that is seen in both themes."""


@dataclass(frozen=True, slots=True)
class PagePlot:
    """One plot of the page."""

    name: str
    """Id of its HTML element, and stem of its image file."""
    title: str
    caption: str
    spec: Spec


def csv_plot_data(columns: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: Sequence[str] = ()) -> Spec:
    """Data of a plot as CSV, which takes a third of the room of JSON. Numbers have 6 digits; None is an empty cell."""
    lines = [",".join(columns)]
    for row in rows:
        lines.append(",".join(_csv_cell(value) for value in row))
    parse = {column: "string" if column in text_columns else "number" for column in columns}
    return {"values": "\n".join(lines), "format": {"type": "csv", "parse": parse}}


def _csv_cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return str(value)
    return json.dumps(str(value).replace('"', "'").replace("\n", " "), ensure_ascii=False)


def point_lookup_transform(comparison: Comparison, points: Sequence[ComparedPoint]) -> Spec:
    """Vega-Lite transform that gives each data row the name of its point, and the point's value on each axis.

    Data rows have only the number of their point in `points`, as `p`, so that the page stays small.
    """
    index_by_name = {point.name: index for index, point in enumerate(comparison.points)}
    values = []
    for number, point in enumerate(points):
        row = {"p": number, "point": point.name}
        for axis_number, axis in enumerate(visible_axes(comparison)):
            row[f"axis{axis_number}"] = axis[1][index_by_name[point.name]]
        values.append(row)
    fields = ["point", *(f"axis{number}" for number in range(len(visible_axes(comparison))))]
    return {"lookup": "p", "from": {"data": {"values": values}, "key": "p", "fields": fields}}


def visible_axes(comparison: Comparison) -> list[tuple[str, tuple[str, ...]]]:
    """(title, label of each point) of at most three axes: colour, dash, and all others together."""
    axes = [(axis.title, axis.labels) for axis in comparison.axes]
    if len(axes) <= 3:
        return axes
    others = axes[2:]
    labels_by_axis = [labels for _, labels in others]
    labels = [", ".join(parts) for parts in zip(*labels_by_axis, strict=True)]
    return [*axes[:2], (", ".join(title for title, _ in others), tuple(labels))]


def _axis_values(comparison: Comparison, number: int) -> list[str]:
    """The values of an axis in the order of the legend."""
    if number < 2 or len(comparison.axes) <= 3:
        return comparison.axes[number].values
    return list(dict.fromkeys(visible_axes(comparison)[number][1]))


def point_encoding(comparison: Comparison, *, dashed: bool) -> Spec:
    """The Vega-Lite encoding that tells points apart by their values on the axes (the settings in which they differ).

    The first axis is shown by colour, the second by dash, the third by the shape of the mark. `dashed`: whether marks are lines;
    else the second axis has shapes, and the third is not shown.
    """
    axes = visible_axes(comparison)
    encoding: Spec = {}
    if not axes:
        return encoding
    title, _ = axes[0]
    values = _axis_values(comparison, 0)
    encoding["color"] = {
        "field": "axis0",
        "type": "nominal",
        "title": title,
        "sort": values,
        "legend": {"labelLimit": NAME_PIXELS, "symbolLimit": 40},
    }
    if len(values) > THEME_COLORS:
        scheme = "viridis" if _are_numbers(values) else "tableau20"
        encoding["color"]["scale"] = {"scheme": scheme}
    channels = ["strokeDash", "shape"] if dashed else ["shape"]
    ranges: dict[str, list[Any]] = {"strokeDash": DASHES, "shape": SHAPES}
    for number, channel in enumerate(channels, 1):
        if number < len(axes):
            values = _axis_values(comparison, number)
            marks = [ranges[channel][index % len(ranges[channel])] for index in range(len(values))]
            encoding[channel] = {
                "field": f"axis{number}",
                "type": "nominal",
                "title": axes[number][0],
                "scale": {"domain": values, "range": marks},
                "legend": {"labelLimit": NAME_PIXELS, "symbolLimit": 40, **LEGEND_SYMBOLS[channel]},
            }
    return encoding


def _are_numbers(values: Sequence[str]) -> bool:
    try:
        return bool([float(value) for value in values])
    except ValueError:
        return False


def legend_selections(comparison: Comparison) -> list[Spec]:
    """Parameters by which a click on a legend entry shows the points of this value alone, one for each axis with a legend."""
    selections = []
    for number in range(min(len(visible_axes(comparison)), 3)):
        selections.append(
            {"name": f"chosen{number}", "select": {"type": "point", "fields": [f"axis{number}"]}, "bind": "legend"}
        )
    return selections


def legend_opacity(comparison: Comparison) -> Spec:
    """The opacity that fades points which the reader has not chosen in a legend."""
    tests = [{"param": selection["name"]} for selection in legend_selections(comparison)]
    if not tests:
        return {"value": 1}
    return {"condition": {"test": {"and": tests}, "value": 1}, "value": 0.1}


def x_axis_menu() -> Spec:
    """The menu for what the axis below curves shows."""
    choices = list(X_AXIS_CHOICES)
    return {"name": "over", "value": choices[0], "bind": {"input": "select", "options": choices, "name": "over "}}


def x_axis_title() -> Spec:
    """Title below a plot that names what the reader chose: an axis title of Vega-Lite cannot change."""
    names = " : ".join(f"over === '{choice}' ? '{name}'" for choice, name in list(X_AXIS_CHOICES.items())[:-1])
    expression = f"{names} : '{list(X_AXIS_CHOICES.values())[-1]}'"
    return {
        "text": {"expr": expression},
        "orient": "bottom",
        "anchor": "middle",
        "fontSize": 12,
        "fontWeight": "bold",
        "offset": 6,
    }


def x_axis_encoding() -> Spec:
    """The x encoding of curves, whose `x` is calculated from the reader's choice."""
    return {
        "field": "x",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": False},
        # Steps and tokens are whole: no ticks between them.
        "axis": {"tickMinStep": {"expr": "over === 'seconds' ? 0.001 : 1"}, "tickCount": 8},
    }


def x_axis_transform() -> Spec:
    """Transform that calculates `x` from the reader's choice."""
    return {"calculate": "datum[over]", "as": "x"}


def zoom_selection() -> Spec:
    """Parameter by which the wheel zooms and dragging moves a plot."""
    return {"name": "zoom", "select": "interval", "bind": "scales"}


def position_tooltip_fields() -> list[Spec]:
    """What the pointer shows of a point of a curve: name, step, tokens and seconds."""
    return [
        {"field": "point", "type": "nominal"},
        {"field": "step", "type": "quantitative"},
        {"field": "tokens", "type": "quantitative", "format": ",.0f"},
        {"field": "seconds", "type": "quantitative", "format": ".1f"},
    ]
