"""The audit page: one HTML file that needs no network, for people who would rather look than read (`page.html.j2`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.data.report.audit import Audit, DecodedSample
from trainer.data.report.verdict import known_gaps, overall, tiles
from trainer.data.report.wording import templates, visible

if TYPE_CHECKING:
    from trainer.data.config import CardConfig

MOST_WORDS = 200
"""Characters of any text but a sample: what is longer is cut, and stands in audit.json."""
MOST_SAMPLE = 3000
"""Characters of one decoded sample."""


def page(audit: Audit, stated: CardConfig) -> str:
    """The text of `audit.html`. Whatever comes from the data is escaped; long lists are cut, with the number left out."""
    found, gaps = tiles(audit), known_gaps(audit, stated)
    level, words = overall(found)
    made = templates(_shown, autoescape=True)
    made.filters["runs"] = runs
    template = made.get_template("page.html.j2")
    return template.render(audit=audit, tiles=found, level=level, words=words, gaps=gaps, card=stated)


def _shown(text: str) -> str:
    """Any text of the page: nothing invisible, nothing endless."""
    return visible(text if len(text) <= MOST_WORDS else f"{text[:MOST_WORDS]}… ({len(text):,} characters)")


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
        if "weight" in piece and out[-1][1] == "learned":
            out.append((f"*{piece['weight']:g}", "cut"))
        at += len(text)
    return out
