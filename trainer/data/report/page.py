"""The audit page: one HTML file that needs no network, for people who would rather look than read (`page.html.j2`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.report.audit import Audit, DecodedSample
from trainer.data.report.verdict import known_gaps, overall, tiles
from trainer.data.report.wording import percent, plural, reason, visible

if TYPE_CHECKING:
    from jinja2 import Environment

    from trainer.data.report.card import CardConfig

MOST_WORDS = 200
"""Characters of any text but a sample: what is longer is cut, and stands in audit.json."""
MOST_SAMPLE = 3000
"""Characters of one decoded sample."""


def page(audit: Audit, stated: CardConfig) -> str:
    """The text of `audit.html`. Whatever comes from the data is escaped; long lists are cut, with the number left out."""
    found = tiles(audit)
    level, words = overall(found)
    template = _environment().get_template("page.html.j2")
    return template.render(
        audit=audit, tiles=found, level=level, words=words, gaps=known_gaps(audit, stated), card=stated
    )


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        """Any text of an expression: nothing invisible, nothing endless."""
        if not isinstance(value, str) or isinstance(value, Markup):
            return value
        return visible(value if len(value) <= MOST_WORDS else f"{value[:MOST_WORDS]}… ({len(value):,} characters)")

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "reason": reason, "runs": runs, "number": lambda value: f"{value:,.4g}"}
    made.filters |= {"count": lambda value: f"{value:,.0f}"}
    made.globals |= {"plural": plural}
    return made


def runs(sample: DecodedSample, room: int = MOST_SAMPLE) -> list[tuple[Any, str]]:
    """The sample's runs as (escaped text, "learned", "context" or "cut"), at most `room` characters: its head and tail."""
    from markupsafe import escape

    total = sum(len(piece["text"]) for piece in sample.pieces)
    head, tail = (total, total) if total <= room else (room * 2 // 3, total - room // 3)
    out, at = list[tuple[Any, str]](), 0
    for piece in sample.pieces:
        text, kind = piece["text"], "learned" if piece["learned"] else "context"
        if first := text[: max(head - at, 0)]:
            out.append((escape(visible(first)), kind))
        if at <= head < at + len(text) and head < tail:
            out.append((f"… {tail - head:,} characters …", "cut"))
        if last := text[max(tail - at, 0) :]:
            out.append((escape(visible(last)), kind))
        at += len(text)
    return out
