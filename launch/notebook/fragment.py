"""Renders what a notebook shows of an object: a heading, cards, call-outs, tables and a picture of curves."""

from __future__ import annotations

from collections.abc import Sequence

from launch.notebook.curve import BOTTOM_MARGIN, HEIGHT, LEFT_MARGIN, RIGHT_MARGIN, TOP_MARGIN, WIDTH, Picture
from trainer.pages.pieces import Callout, PageCard, PageTable
from trainer.pages.render import render

MAX_TABLE_ROWS = 50
"""Rows of a table in a notebook; the DataFrame has all of them."""
MAX_CALLOUTS = 8


def notebook_html(
    heading: str,
    *,
    lead: Callout | None = None,
    cards: Sequence[PageCard] = (),
    callouts: Sequence[Callout] = (),
    lines: Sequence[str] = (),
    tables: Sequence[PageTable] = (),
    picture: Picture | None = None,
    footer: str = "",
) -> str:
    """Render what a notebook shows below a cell: HTML without a script, that fetches nothing, with every text escaped.

    `lead` is the answer, and stands first; `cards` are large numbers, `callouts` what the reader should know.
    """
    return render(
        "launch.notebook",
        "fragment.html.j2",
        heading=heading,
        lead=lead,
        cards=list(cards),
        callouts=list(callouts)[:MAX_CALLOUTS],
        lines=list(lines)[:MAX_TABLE_ROWS],
        tables=[_first_table_rows(table) for table in tables],
        picture=picture,
        footer=footer,
        # Size of the picture, and the borders of its plot area, in pixels.
        width=WIDTH,
        height=HEIGHT,
        left=LEFT_MARGIN,
        right=WIDTH - RIGHT_MARGIN,
        top=TOP_MARGIN,
        bottom=HEIGHT - BOTTOM_MARGIN,
    )


def _first_table_rows(table: PageTable) -> PageTable:
    """The first rows of a long table, with a caption that says how many there are."""
    if len(table.rows) <= MAX_TABLE_ROWS:
        return table
    caption = f"{table.caption} the first {MAX_TABLE_ROWS} of {len(table.rows):,} rows".strip()
    return PageTable(table.columns, table.rows[:MAX_TABLE_ROWS], caption)
