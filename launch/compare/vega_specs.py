"""Vega-Lite specifications of a comparison's plots: how points are told apart, shared axes and menus, and compact data.

A specification is a dictionary, so that no library is needed to make one. Its colours come from the page's theme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from launch.compare.comparison import Comparison

Entry = TypeVar("Entry")
Spec = dict[str, Any]
VEGA_LITE_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
PLOT_HEIGHT_PX = 320
PLOT_WIDTH_PX = 860
"""Size of a plot in pixels; a page fits the width to its window."""
NUM_THEME_COLORS = 8
"""Colours of the page's theme. An axis with more values has a scheme of its own."""
LEGEND_SYMBOLS: dict[str, Spec] = {
    "strokeDash": {"symbolType": "stroke", "symbolSize": 700, "symbolStrokeWidth": 2},
    "shape": {"symbolSize": 160},
}
"""How the legend draws a value: a piece of line long enough to show its dashes, or the mark."""
STYLES_BY_CHANNEL: dict[str, list[Any]] = {
    "strokeDash": [[1, 0], [6, 3], [2, 2], [10, 3, 2, 3], [12, 5], [4, 1, 1, 1, 1, 1]],
    "shape": ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"],
}
"""The dashes of lines, as lengths in pixels, and the shapes of marks that tell points apart."""
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
    """Write data rows as the `data` of a Vega-Lite plot, as CSV: it takes a third of the space of JSON, so the page stays small.

    Numbers have 6 digits; None, NaN and infinity are empty cells. Columns are numbers, except `text_columns`.
    """
    lines = [",".join(columns)]
    for row in rows:
        lines.append(",".join(_csv_cell(value) for value in row))
    parse = {column: "string" if column in text_columns else "number" for column in columns}
    return {"values": "\n".join(lines), "format": {"type": "csv", "parse": parse}}


def evenly_spread(entries: Sequence[Entry], max_entries: int) -> list[Entry]:
    """About `max_entries` of the entries, so that a page stays small: every n-th, and always the last one."""
    stride = max(1, math.ceil(len(entries) / max_entries))
    last_index = len(entries) - 1
    return [entry for index, entry in enumerate(entries) if index % stride == 0 or index == last_index]


def chart_frame(height_px: int) -> Spec:
    """What the Vega-Lite specification of each plot begins with: schema, look of the legends, size in pixels."""
    return {"$schema": VEGA_LITE_SCHEMA, "config": LEGEND_CONFIG, "width": PLOT_WIDTH_PX, "height": height_px}


def _csv_cell(value: Any) -> str:
    """Write a value into a plot's CSV data: a number with six digits, a text in quotes; empty if unknown or not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return str(value)
    return json.dumps(str(value).replace('"', "'").replace("\n", " "), ensure_ascii=False)


def point_lookup_transform(axes: Sequence[VisibleAxis], point_names: Sequence[str]) -> Spec:
    """The Vega-Lite transform that adds to each data row the name of its point and its values on the axes (`axis0` ...).

    Data rows have only the index of their point in `point_names`, as `point_index`, so that the page stays small.
    """
    values = []
    for point_index, name in enumerate(point_names):
        row = {"point_index": point_index, "point": name}
        for axis_index, axis in enumerate(axes):
            row[f"axis{axis_index}"] = axis.label_by_point[name]
        values.append(row)
    fields = ["point", *(f"axis{axis_index}" for axis_index in range(len(axes)))]
    return {
        "lookup": "point_index",
        "from": {"data": {"values": values}, "key": "point_index", "fields": fields},
    }


@dataclass(frozen=True, slots=True)
class VisibleAxis:
    """A setting in which the points of a comparison differ, as plots show it: by colour, dash or shape."""

    title: str
    label_by_point: dict[str, str]
    """Its value at each point of the comparison, by the point's name."""
    legend_values: list[str]
    """Each value once, in the order of the legend."""


def visible_axes(comparison: Comparison) -> list[VisibleAxis]:
    """The settings by which plots tell points apart: at most three, because a plot has colour, dash and shape.

    From the third on, all axes are joined into one, such as `rank, precision` with the values `8, bf16` and `16, fp32`.
    """
    names = [point.name for point in comparison.points]
    shown_axes = comparison.axes if len(comparison.axes) <= 3 else comparison.axes[:2]
    axes = [VisibleAxis(axis.title, dict(zip(names, axis.labels, strict=True)), axis.values) for axis in shown_axes]
    joined_axes = comparison.axes[len(shown_axes) :]
    if joined_axes:
        labels_by_axis = [axis.labels for axis in joined_axes]
        labels = [", ".join(labels_of_point) for labels_of_point in zip(*labels_by_axis, strict=True)]
        title = ", ".join(axis.title for axis in joined_axes)
        axes.append(VisibleAxis(title, dict(zip(names, labels, strict=True)), list(dict.fromkeys(labels))))
    return axes


def point_encoding(axes: Sequence[VisibleAxis], *, marks_are_lines: bool) -> Spec:
    """The Vega-Lite encoding that tells points apart by the settings in which they differ, the axes of the comparison.

    The first axis is shown by colour. If the marks are lines, the second is shown by dash and the third by the shape of the
    marks on the line. Otherwise the second is shown by shape, and the third is not shown.
    """
    channels = ["color", "strokeDash", "shape"] if marks_are_lines else ["color", "shape"]
    encoding: Spec = {}
    for axis_index, (axis, channel) in enumerate(zip(axes, channels, strict=False)):
        # The field that `point_lookup_transform` adds to each data row.
        field = f"axis{axis_index}"
        encoding[channel] = (
            _color_encoding(field, axis) if channel == "color" else _style_encoding(field, axis, channel)
        )
    return encoding


def _color_encoding(field: str, axis: VisibleAxis) -> Spec:
    """The Vega-Lite encoding that shows an axis by colour; `field`: of the data rows, with a point's value on the axis."""
    encoding: Spec = {
        "field": field,
        "type": "nominal",
        "title": axis.title,
        "sort": axis.legend_values,
        "legend": {"labelLimit": NAME_PIXELS, "symbolLimit": 40},
    }
    if len(axis.legend_values) > NUM_THEME_COLORS:
        # Many numbers read as a scale; many words need colours that differ.
        scheme = "viridis" if _are_numbers(axis.legend_values) else "tableau20"
        encoding["scale"] = {"scheme": scheme}
    return encoding


def _style_encoding(field: str, axis: VisibleAxis, channel: str) -> Spec:
    """The Vega-Lite encoding that shows an axis by dash or shape, as `channel` says: `strokeDash` or `shape`."""
    styles = STYLES_BY_CHANNEL[channel]
    # With more values than styles, the styles are used again.
    style_of_value = [styles[index % len(styles)] for index in range(len(axis.legend_values))]
    return {
        "field": field,
        "type": "nominal",
        "title": axis.title,
        "scale": {"domain": axis.legend_values, "range": style_of_value},
        "legend": {"labelLimit": NAME_PIXELS, "symbolLimit": 40, **LEGEND_SYMBOLS[channel]},
    }


def _are_numbers(values: Sequence[str]) -> bool:
    try:
        return bool([float(value) for value in values])
    except ValueError:
        return False


def legend_selections(num_axes: int) -> list[Spec]:
    """Vega-Lite parameters, one for each axis, by which a click on a value in a legend selects the points that have it."""
    selections = []
    for axis_index in range(num_axes):
        selection = {"type": "point", "fields": [f"axis{axis_index}"]}
        selections.append({"name": f"chosen{axis_index}", "select": selection, "bind": "legend"})
    return selections


def legend_opacity(num_axes: int) -> Spec:
    """The Vega-Lite encoding that fades all points but those that the reader has selected by clicking in the legends."""
    tests = [{"param": selection["name"]} for selection in legend_selections(num_axes)]
    if not tests:
        return {"value": 1}
    # Without a selection, each of these tests holds for every point.
    return {"condition": {"test": {"and": tests}, "value": 1}, "value": 0.1}


def x_axis_menu() -> Spec:
    """The menu below a plot in which the reader chooses what the x axis shows.

    It sets the Vega parameter `over`, at first to `step`.
    """
    choices = list(X_AXIS_CHOICES)
    return {"name": "over", "value": choices[0], "bind": {"input": "select", "options": choices, "name": "over "}}


def x_axis_title() -> Spec:
    """The title below a plot that names what the reader chose for the x axis, since an axis title of Vega-Lite cannot change.

    `over` is the parameter of the menu. The text is the expression `over === 'step' ? 'steps' : over === 'tokens' ?
    'tokens' : 'seconds of steps'`.
    """
    *first_choices, (_, last_title) = X_AXIS_CHOICES.items()
    conditions = " : ".join(f"over === '{choice}' ? '{title}'" for choice, title in first_choices)
    return {
        "text": {"expr": f"{conditions} : '{last_title}'"},
        "orient": "bottom",
        "anchor": "middle",
        "fontSize": 12,
        "fontWeight": "bold",
        "offset": 6,
    }


def x_axis_encoding() -> Spec:
    """The Vega-Lite encoding of the x axis of curves: the field `x`, which `x_axis_transform` adds to each data row."""
    return {
        "field": "x",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": False},
        # `over` is the parameter of the menu below the plot. Steps and tokens are whole: no ticks between them.
        "axis": {"tickMinStep": {"expr": "over === 'seconds' ? 0.001 : 1"}, "tickCount": 8},
    }


def x_axis_transform() -> Spec:
    """The Vega-Lite transform that adds `x` to each data row: its step, tokens or seconds, as the menu says (`over`)."""
    return {"calculate": "datum[over]", "as": "x"}


def zoom_selection() -> Spec:
    """The parameter by which the mouse wheel zooms a plot and dragging moves it."""
    return {"name": "zoom", "select": "interval", "bind": "scales"}


def position_tooltip_fields() -> list[Spec]:
    """Tooltip fields that say where on a curve the pointer is: name of the point, step, tokens and seconds."""
    return [
        {"field": "point", "type": "nominal"},
        {"field": "step", "type": "quantitative"},
        {"field": "tokens", "type": "quantitative", "format": ",.0f"},
        {"field": "seconds", "type": "quantitative", "format": ".1f"},
    ]
