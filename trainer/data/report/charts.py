"""The drawings of the audit page: flow of rows, histograms, bars, stacked shares and intervals."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trainer.data.report.schema import count, items, mapping, number, share
from trainer.data.report.svg import (
    Scale,
    drawing,
    element,
    escape,
    fit,
    line,
    percent,
    plural,
    rect,
    short,
    spread,
    text,
)
from trainer.data.report.svg import text_width as width_of

MINUS = "\N{MINUS SIGN}"
WIDTH = 900
"""Pixels; drawings shrink with the page and never grow beyond this."""


@dataclass(slots=True)
class Bar:
    """One row of a bar chart: a bar for each (value, CSS class), and what stands at their ends."""

    label: str
    values: Sequence[tuple[float, str, str]]
    """(value, CSS class, text at the end of the bar)."""


@dataclass(slots=True)
class Mark:
    """A vertical line in a histogram."""

    value: float
    label: str
    style: str = "mark-line"


@dataclass(slots=True)
class Interval:
    """One row of a forest plot."""

    label: str
    value: float
    low: float
    high: float
    note: str


def flow(stages: Sequence[Mapping[str, Any]], most_reasons: int = 4) -> str:
    """Rows as a band that narrows from stage to stage; what a stage drops leaves to the right, with its reasons."""
    largest = max((max(count(s.get("in")), count(s.get("out"))) for s in stages), default=0)
    begin, room, words_at = 160, 420, 612
    scale = Scale(0, largest, 0, room)
    parts, y = [], 6.0
    for position, stage in enumerate(stages):
        rows, kept = count(stage.get("in")), count(stage.get("out"))
        words = _leaving(stage, most_reasons)
        height = max(58.0, 17.0 * len(words) + 24)
        follows = stages[position + 1] if position + 1 < len(stages) else {"in": kept}
        left, entering = scale(kept), scale(count(follows.get("in")))
        lost = max(scale(rows) - left, 0)
        gone = sum(count(v) for v in mapping(stage.get("dropped")).values())
        if gone:
            lost = max(lost, 2)
        parts += [
            text(begin - 14, y + 12, fit(stage.get("stage", f"stage {position + 1}"), 140, 14), "name", "end"),
            text(begin - 14, y + 28, f"{rows:,}", "muted", "end"),
            _band(begin, y + 16, left, begin, y + height, entering),
            rect(begin, y, left, 16, "kept", f"{plural(kept, 'row')} go on"),
        ]
        if lost:
            parts.append(rect(begin + left, y, lost, 16, "lost", f"{plural(gone, 'row')} dropped"))
        if words and gone:
            parts.append(line(begin + left + lost + 3, y + 8, words_at - 6, y + 8, "leader"))
        parts += [
            text(words_at, y + 12 + 17 * row, fit(shown, WIDTH - words_at, 12), style)
            for row, (shown, style) in enumerate(words)
        ]
        y += height
    kept = count(stages[-1].get("out")) if stages else 0
    parts += [
        text(begin - 14, y + 13, "kept", "name", "end"),
        rect(begin, y, scale(kept), 20, "kept", f"{plural(kept, 'row')} kept"),
        text(begin + scale(kept) + 8, y + 15, f"{kept:,}", "name"),
    ]
    first = count(stages[0].get("in")) if stages else 0
    said = f"{plural(first, 'row')} in, {kept:,} kept, through {plural(len(stages), 'stage')}"
    return drawing(WIDTH, y + 26, "Rows through the stages", said, *parts)


def _leaving(stage: Mapping[str, Any], most: int) -> list[tuple[str, str]]:
    """Lines beside a stage: what it dropped by reason, largest first, then what it noted."""
    made: list[tuple[str, str]] = []
    for key, style in (("dropped", "bad-text"), ("noted", "muted")):
        found = sorted(((count(v), str(k)) for k, v in mapping(stage.get(key)).items() if count(v)), reverse=True)
        if not found:
            continue
        shown = found if len(found) <= most else found[: most - 1]
        sign = MINUS if key == "dropped" else "noted: "
        made += [(f"{sign}{amount:,} {name.replace('_', ' ')}", style) for amount, name in shown]
        if len(found) > len(shown):
            rest = sum(amount for amount, _ in found[len(shown) :])
            made.append((f"{sign}{rest:,} for {len(found) - len(shown)} more reasons", style))
    return made


def _band(x1: float, y1: float, width1: float, x2: float, y2: float, width2: float) -> str:
    middle = (y1 + y2) / 2
    right1, right2 = x1 + width1, x2 + width2
    path = (
        f"M{x1:.1f},{y1:.1f} L{right1:.1f},{y1:.1f} C{right1:.1f},{middle:.1f} {right2:.1f},{middle:.1f} "
        f"{right2:.1f},{y2:.1f} L{x2:.1f},{y2:.1f} Z"
    )
    return element("path", d=path, class_="band")


def usable_histogram(found: Any) -> tuple[list[float], list[int]] | None:
    """Edges and counts of a histogram that can be drawn: one edge more than counts, edges that grow, all finite."""
    edges = [number(e, math.nan) for e in items(mapping(found).get("edges"))]
    counts = [count(c) for c in items(mapping(found).get("counts"))]
    grows = all(a < b for a, b in pairwise(edges))
    return (edges, counts) if counts and len(edges) == len(counts) + 1 and grows else None


def histogram(
    edges: list[float], counts: list[int], title: str, unit: str, marks: Sequence[Mark] = (), style: str = "kept"
) -> str:
    """Bars over `edges`; where bins differ much in width (long tails), every bin is drawn equally wide."""
    place = _bins(edges, 52, WIDTH - 12)
    kept_marks = sorted((m for m in marks if edges[0] <= m.value <= edges[-1]), key=lambda m: m.value)
    boxes = [_label_box(place(m.value), m.label) for m in kept_marks]
    rows = spread([(x, x + width_of(m.label, 11)) for x, m in zip(boxes, kept_marks, strict=True)])
    top = 10 + 15 * (max(rows, default=-1) + 1)
    bottom = top + 170
    height = Scale(0, max(max(counts), 1), 0, bottom - top)
    total = sum(counts)
    parts = []
    for tick in height.ticks(4):
        if tick != int(tick):
            continue
        y = bottom - height(tick)
        parts += [line(52, y, WIDTH - 12, y, "grid"), text(44, y + 4, short(tick), "axis", "end")]
    for left, right, amount in zip(edges, edges[1:], counts, strict=False):
        if amount:
            x1, x2 = place(left), place(right)
            gap = 1 if x2 - x1 > 4 else 0
            tip = f"{left:,.4g} to {right:,.4g} {unit}: {amount:,} ({percent(share(amount, total))})"
            tall = max(height(amount), 1.5)
            parts.append(rect(x1, bottom - tall, max(x2 - x1 - gap, 0.8), tall, style, tip))
    parts += [line(52, bottom, WIDTH - 12, bottom, "axis-line"), *_x_ticks(edges, place, bottom)]
    for mark, x, row in zip(kept_marks, boxes, rows, strict=True):
        at = place(mark.value)
        parts += [line(at, 4 + 15 * row, at, bottom, mark.style), text(x, 13 + 15 * row, mark.label, "mark-text")]
    parts.append(text(WIDTH - 12, bottom + 34, unit, "axis", "end"))
    words = f"{total:,} values in {len(counts)} bins from {edges[0]:,.4g} to {edges[-1]:,.4g} {unit}"
    return drawing(WIDTH, bottom + 40, title, words, *parts)


def _label_box(at: float, label: str) -> float:
    """Where the label of a mark begins: to the right of its line, or to the left where there is no room."""
    width = width_of(label, 11)
    return at + 4 if at + 4 + width <= WIDTH else at - 4 - width


def _bins(edges: list[float], begin: float, end: float) -> Any:
    widths = [b - a for a, b in pairwise(edges)]
    if max(widths) <= 4 * min(widths):
        return Scale(edges[0], edges[-1], begin, end)
    by_bin = Scale(0, len(widths), begin, end)

    def place(value: float) -> float:
        position = min(max(bisect.bisect_right(edges, value) - 1, 0), len(widths) - 1)
        return by_bin(position + min(max((value - edges[position]) / widths[position], 0), 1))

    return place


def _x_ticks(edges: list[float], place: Any, bottom: float) -> list[str]:
    values = place.ticks(8) if isinstance(place, Scale) else edges
    parts, free = [], -1e9
    for value in values:
        x, label = place(value), f"{value:,.4g}"
        half = width_of(label, 11) / 2
        x_text = min(x, WIDTH - half)
        if x_text - half > free:
            parts += [line(x, bottom, x, bottom + 4, "axis-line"), text(x_text, bottom + 17, label, "axis", "middle")]
            free = x_text + half + 10
    return parts


def bars(rows: Sequence[Bar], title: str, description: str, *, legend: Sequence[tuple[str, str]] = ()) -> str:
    """Horizontal bars, all on one scale from 0; `legend` is (CSS class, words) of each bar of a row."""
    thick = 18 if all(len(row.values) < 2 for row in rows) else 15
    largest = max((value for row in rows for value, _, _ in row.values), default=0.0)
    begin, longest_note = 190, max((width_of(n, 12) for row in rows for _, _, n in row.values), default=0)
    scale = Scale(0, largest, 0, max(WIDTH - begin - min(longest_note, 300) - 16, 100))
    parts, y = _legend(legend, begin), 28.0 if legend else 4.0
    for row in rows:
        tall = thick * len(row.values)
        parts.append(text(begin - 10, y + tall / 2 + 4, fit(row.label, begin - 16, 12), "label", "end"))
        for position, (value, style, note) in enumerate(row.values):
            length = max(scale(value), 1.5 if value > 0 else 0)
            at = y + position * thick
            parts += [
                rect(begin, at + 1, length, thick - 3, style, f"{row.label}: {note}"),
                text(begin + length + 6, at + thick / 2 + 3.5, fit(note, 300, 12), "value"),
            ]
        y += tall + 8
    parts.append(line(begin, 24 if legend else 0, begin, y - 4, "axis-line"))
    return drawing(WIDTH, y, title, description, *parts)


def _legend(entries: Sequence[tuple[str, str]], begin: float) -> list[str]:
    parts, x = [], begin
    for style, words in entries:
        parts += [rect(x, 3, 11, 11, style), text(x + 17, 13, words, "axis")]
        x += 17 + width_of(words, 12) + 26
    return parts


def stacked(rows: Sequence[tuple[str, float, str]], title: str, legend: tuple[str, str]) -> str:
    """One bar a row that is full at 1: the share in front, the rest pale behind it. Rows are (label, share, note)."""
    begin, room = 190, 420
    parts, y = _legend([("learned", legend[0]), ("context", legend[1])], begin), 28.0
    for label, part, note in rows:
        part = min(max(part, 0), 1)
        parts += [
            text(begin - 10, y + 15, fit(label, begin - 16, 12), "label", "end"),
            rect(begin, y, room, 22, "context", f"{label}: {note}"),
            rect(begin, y, max(room * part, 1.5 if part else 0), 22, "learned", f"{label}: {note}"),
            text(begin + room + 10, y + 15, fit(note, WIDTH - begin - room - 12, 12), "value"),
        ]
        y += 32
    words = "; ".join(f"{label} {percent(part)}" for label, part, _ in rows)
    return drawing(WIDTH, y, title, words, *parts)


def forest(rows: Sequence[Interval], title: str) -> str:
    """Log-odds with their intervals; those that do not cross 0 stand out in colour and in weight."""
    low = min(0.0, *(row.low for row in rows)) if rows else 0.0
    high = max(0.0, *(row.high for row in rows)) if rows else 0.0
    begin, end, room = 300, 640, WIDTH
    scale = Scale(low, high, begin, end) if high > low else Scale(-1, 1, begin, end)
    bottom = 14 + 24 * len(rows)
    parts = [line(scale(tick), 6, scale(tick), bottom, "grid") for tick in scale.ticks(6)]
    parts.append(line(scale(0), 2, scale(0), bottom + 4, "axis-line"))
    for position, row in enumerate(rows):
        y = 20.0 + 24 * position
        style = "lost" if row.low > 0 or row.high < 0 else "neutral"
        tip = f"{row.label}: log-odds {row.value:.2f} ({row.low:.2f} to {row.high:.2f})"
        parts += [
            text(begin - 14, y + 4, fit(row.label, begin - 20, 12), "label", "end"),
            rect(scale(row.low), y - 1.5, max(scale(row.high) - scale(row.low), 1), 3, style, tip),
            element("circle", element("title", escape(tip)), cx=scale(row.value), cy=y, r=5, class_=style),
            text(end + 18, y + 4, fit(row.note, room - end - 20, 12), "value"),
        ]
    parts += [text(scale(t), bottom + 18, f"{t:.3g}", "axis", "middle") for t in scale.ticks(6)]
    clear = sum(row.low > 0 or row.high < 0 for row in rows)
    words = f"{plural(len(rows), 'pair')}, {clear} with an interval that leaves 0 out"
    return drawing(WIDTH, bottom + 26, title, words, *parts)
