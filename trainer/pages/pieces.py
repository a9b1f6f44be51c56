"""What a page is put together from, as values. `pieces.html.j2` has a macro for each; the words are the caller's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Tone = Literal["good", "bad", "warning", "note", ""]
"""How a piece is tinted. A reader who sees no colours has the mark beside it (✓ ✕ ! i), and the words."""
Arrow = Literal["up", "down", "level", ""]
"""Which way a number went. Whether that is good or bad is the tone's."""


@dataclass(frozen=True, slots=True)
class PageCard:
    """One number at the head of a page, large, with its name above and a note below."""

    label: str
    value: str
    note: str = ""
    tone: Tone = ""
    arrow: Arrow = ""
    href: str = ""
    """Where a click on the card leads; `#section` or a file beside the page."""
    unit: str = ""
    """Of the value, after it in small type."""


@dataclass(frozen=True, slots=True)
class Callout:
    """Something that a reader should know: a heading, a sentence or two, and the words to type about it."""

    tone: Tone
    heading: str
    text: str
    commands: tuple[str, ...] | list[str] = ()


TONE_ORDER: tuple[Tone, ...] = ("bad", "warning", "note", "good", "")
"""Tones, the worst first."""


def worst_first(callouts: list[Callout]) -> list[Callout]:
    """The call-outs by tone, the worst first; those of one tone stay in their order."""
    return sorted(callouts, key=lambda callout: TONE_ORDER.index(callout.tone))


@dataclass(frozen=True, slots=True)
class IntervalBar:
    """A value and its interval on a common scale, as a small picture: a bar, a dot on it, and a line at `zero`.

    Rows of one table share `minimum` and `maximum`, so that the bars can be compared. All in the unit of the value.
    """

    low: float
    value: float
    high: float
    minimum: float
    maximum: float
    zero: float = 0.0
    tone: Tone = ""
    label: str = ""
    """What a screen reader says of it; empty says the numbers."""

    def position(self, number: float) -> float:
        """Where a number is on the scale, in percent of its width; a number beyond an end is at that end."""
        span = self.maximum - self.minimum
        if not math.isfinite(number) or span <= 0:
            return 50.0
        return 100 * min(max((number - self.minimum) / span, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class PageColumn:
    """A column of a table."""

    heading: str
    group: str = ""
    """Neighbours of one group stand below a common heading."""
    best: Literal["", "smallest", "largest"] = ""
    """Which cell is marked as the best; empty where none is better than another."""
    unit: str = ""
    note: str = ""
    """A sentence on what the column is, which the pointer shows at the heading."""
    scale: tuple[str, str, str] | None = None
    """What stands below the heading of interval bars: at the left end of their scale, in its middle, at its right end."""


@dataclass(frozen=True, slots=True)
class PageCell:
    """A cell: what it shows, and what the column is sorted by."""

    text: str
    sort_value: float | str | None = None
    """None for a cell without a value: it stays last, and is never the best. Text sorts by letters."""
    tone: Tone = ""
    note: str = ""
    """A second line in small type."""
    href: str = ""
    interval: IntervalBar | None = None


@dataclass(frozen=True)
class PageTable:
    """A table that a click on a heading sorts. Its first column names the rows, and stays in sight while others scroll."""

    columns: list[PageColumn]
    rows: list[list[PageCell]]
    caption: str = ""
    id: str = ""

    @cached_property
    def numeric(self) -> list[bool]:
        """Of each column, whether its cells are numbers: those stand to the right, below a heading that does too."""
        return [self._is_numeric(index) for index in range(len(self.columns))]

    @cached_property
    def best_rows(self) -> list[frozenset[int]]:
        """Of each column, the indices of the rows with its best value; empty if there is nothing to choose between."""
        return [_best_rows(column, self._numbers(index)) for index, column in enumerate(self.columns)]

    def _numbers(self, column: int) -> dict[int, float]:
        """The numbers of a column by the index of their row."""
        numbers = {}
        for index, row in enumerate(self.rows):
            value = row[column].sort_value
            if isinstance(value, int | float) and not math.isnan(value):
                numbers[index] = float(value)
        return numbers

    def _is_numeric(self, column: int) -> bool:
        has_text = any(isinstance(row[column].sort_value, str) for row in self.rows)
        return bool(self._numbers(column)) and not has_text

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The headings above the table's own, each over a group of neighbouring columns: [("", 1), ("speed", 2)].

        Each with its number of columns, from left to right; "" is over columns of no group. Empty if no column has a group.
        """
        if not any(column.group for column in self.columns):
            return []
        groups: list[tuple[str, int]] = []
        for column in self.columns:
            if groups and groups[-1][0] == column.group:
                groups[-1] = (column.group, groups[-1][1] + 1)
            else:
                groups.append((column.group, 1))
        return groups

    @property
    def starts_group(self) -> list[bool]:
        """Of each column, whether a line stands to its left because another group begins there."""
        starts = [False]
        for left, right in zip(self.columns, self.columns[1:], strict=False):
            starts.append(left.group != right.group)
        return starts

    @property
    def marks_best(self) -> bool:
        """Whether any cell is marked, so that the mark has to be explained."""
        return any(self.best_rows)


def _best_rows(column: PageColumn, numbers: dict[int, float]) -> frozenset[int]:
    """The rows whose number is the best of its column; none if all are equal, or fewer than two rows have one."""
    finite = {row: number for row, number in numbers.items() if math.isfinite(number)}
    if not column.best or len(finite) < 2 or len(set(finite.values())) < 2:
        return frozenset()
    choose = min if column.best == "smallest" else max
    best = choose(finite.values())
    return frozenset(row for row, number in finite.items() if number == best)
