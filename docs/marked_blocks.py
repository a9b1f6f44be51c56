"""Reads the marked blocks of the pages: what a reader types or writes to a file, and a script or a test runs.

A block is marked where the line above its fence is one of these:

    <!-- file: notes.jsonl -->       the block is written to this file
    <!-- run -->                     the block runs: bash, or Python
    <!-- run real -->                the same, for commands that need the demo's own model or a download
    <!-- run tiny -->                the same, for commands that only the tests with a tiny model run
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MARKED = re.compile(
    r"<!-- (?P<mark>run|run real|run tiny|file: \S+) -->\n```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class MarkedBlock:
    """One marked block of a page."""

    mark: str
    """`run`, `run real`, `run tiny` or `file: <name>`."""
    language: str
    text: str
    line: int
    """Line of the page at which its text begins, from 1."""
    start: int
    """Position in the page at which its mark begins."""
    stop: int
    """Position behind its closing fence."""

    @property
    def file(self) -> str | None:
        """The file to which the block is written; None for a block that runs."""
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None


def marked_blocks(page: str) -> list[MarkedBlock]:
    """The marked blocks of a page's text, from top to bottom."""
    blocks = []
    for match in MARKED.finditer(page):
        line = page[: match.start()].count("\n") + 3  # the mark, the fence, the text
        blocks.append(MarkedBlock(match["mark"], match["language"], match["text"], line, *match.span()))
    return blocks
