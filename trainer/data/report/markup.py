"""Pieces of HTML that the sections are made of: tables, folded details, lists of places. Everything is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.report.charts import histogram, usable_histogram
from trainer.data.report.schema import items
from trainer.data.report.svg import escape


@dataclass(slots=True)
class Limits:
    """How much of long lists a page shows; what is left out is said, and stands in audit.json."""

    rows: int = 60
    """Rows of a table, and bars of a chart half as many."""
    characters: int = 3000
    """Characters of one decoded sample."""
    samples: int = 8
    words: int = 300
    """Characters of any other text."""


def clipped(value: Any, limits: Limits) -> str:
    """`value` as text of at most `limits.words` characters, not yet escaped."""
    shown = str(value)
    return shown if len(shown) <= limits.words else f"{shown[: limits.words]}… ({len(shown):,} characters)"


def figure(number: Any) -> str:
    """A number as a person writes it; other values as they are."""
    if isinstance(number, bool) or number is None:
        return "" if number is None else str(number).lower()
    if isinstance(number, int):
        return f"{number:,}"
    return f"{number:,.4g}" if isinstance(number, float) else str(number)


def cell(value: Any, limits: Limits) -> str:
    """A table cell: numbers to the right, text in the direction of its own script."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="n">{escape(figure(value))}</td>'
    return f'<td dir="auto">{escape(clipped(figure(value), limits))}</td>'


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], limits: Limits, caption: str = "") -> str:
    """A table; a column whose first cell is a number is aligned as numbers."""
    if not rows:
        return ""
    first = [isinstance(value, int | float) and not isinstance(value, bool) for value in rows[0]]
    head = "".join(
        f'<th scope="col" class="{"n" if number else "t"}">{escape(clipped(name, Limits(words=40)))}</th>'
        for name, number in zip(heads, first, strict=False)
    )
    body = "".join(f"<tr>{''.join(cell(v, limits) for v in row)}</tr>" for row in rows[: limits.rows])
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    made = f'<div class="scroll"><table>{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return made + left_out(len(rows) - limits.rows)


def left_out(number: int) -> str:
    """The line under a list that was cut."""
    return f'<p class="muted-text">… and {number:,} more, in audit.json</p>' if number > 0 else ""


def details(summary: str, inside: str) -> str:
    """Folded content; nothing where there is none."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>" if inside else ""


def paragraph(words: str, style: str = "") -> str:
    """A paragraph of plain words."""
    return f'<p class="{style}">{escape(words)}</p>' if style else f"<p>{escape(words)}</p>"


def drawn(*svg: str) -> str:
    """Drawings, in a box that scrolls on narrow screens."""
    return "".join(f'<div class="drawing">{one}</div>' for one in svg if one)


def anything(value: Any, limits: Limits, name: str = "", depth: int = 0) -> str:
    """A rendering of any JSON value: plain values in a table, histograms drawn, inner mappings under a heading.

    What a section does not know by name is shown by this, so that no finding is lost.
    """
    if (found := usable_histogram(value)) is not None:
        return drawn(histogram(*found, title=name or "distribution", unit=""))
    if not isinstance(value, Mapping):
        if items(value) and all(isinstance(entry, Mapping) for entry in value):
            heads = list(dict.fromkeys(str(key) for entry in value[: limits.rows] for key in entry))
            shown, rest = heads[:12], [clipped(head, Limits(words=40)) for head in heads[12:24]]
            note = paragraph(f"… and in audit.json: {', '.join(rest)}", "muted-text") if rest else ""
            return table(shown, [[_flat(entry.get(h)) for h in shown] for entry in value], limits) + note
        return paragraph(clipped(_flat(value), limits))
    if value and all(isinstance(v, Mapping) and v and not any(map(_deep, v.values())) for v in value.values()):
        return anything([{"name": str(key).replace("_", " "), **inner} for key, inner in value.items()], limits)
    plain = [(str(k).replace("_", " "), _flat(v)) for k, v in value.items() if not _deep(v)]
    parts = [pairs(plain, limits)]
    inner = [(str(k).replace("_", " "), v) for k, v in value.items() if _deep(v) and v]
    for key, child in inner[: limits.rows]:
        body = anything(child, limits, key, depth + 1) if depth < 4 else paragraph(clipped(child, limits))
        parts.append(f"<h3>{escape(clipped(key, limits))}</h3>{body}")
    return "".join(parts) + left_out(len(inner) - limits.rows)


def pairs(rows: Sequence[tuple[str, Any]], limits: Limits) -> str:
    """A narrow table of names and values."""
    body = "".join(f"<tr>{''.join(cell(v, limits) for v in row)}</tr>" for row in rows[: limits.rows])
    made = f'<div class="scroll"><table class="pairs"><tbody>{body}</tbody></table></div>' if body else ""
    return made + left_out(len(rows) - limits.rows)


def _deep(value: Any) -> bool:
    """Whether a value needs more than a cell: a mapping, or a list of mappings."""
    return isinstance(value, Mapping) or any(isinstance(entry, Mapping) for entry in items(value))


def _flat(value: Any) -> Any:
    """A value for one cell: lists joined by commas."""
    return ", ".join(figure(entry) for entry in value) if isinstance(value, list | tuple) else value
