"""How the terminal, the page and the card write numbers, and text that comes from the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

JOINERS = "\u200c\u200d"
"""Invisible, but part of how words (Persian, Hindi) and emoji are spelled."""


def visible(text: object) -> str:
    """`text` with control characters, direction overrides and lone surrogates spelled out as \\xNN."""
    return "".join(
        c if c.isprintable() or c == "\n" or c in JOINERS else (" " if c == "\t" else f"\\x{ord(c):02x}")
        for c in str(text)
    )


def plural(amount: int, word: str) -> str:
    """`1 row`, `2 rows`; with thousands separators."""
    return f"{amount:,} {word if amount == 1 else word + 's'}"


def percent(value: float) -> str:
    """A share as a percentage that never rounds something to nothing, nor a part to the whole."""
    if 0 < value < 0.0005:
        return "<0.1%"
    if 0.9995 <= value < 1:
        return ">99.9%"
    return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


def reason(code: str) -> str:
    """A reason for dropping or noting a document, in words where the code alone would not tell."""
    return SAID.get(code, code.replace("_", " "))


SAID = {
    "truncated": "truncated to data.max_length",
    "split": "split into pieces of data.max_length",
    "too_long": "longer than data.max_length",
    "nothing_to_learn": "nothing left to learn",
    "same_answers": "both answers of a pair are the same",
    "thumbs_down": "an answer marked as undesirable",
    "control_tokens_in_text": "text spells control tokens of the tokenizer",
    "control_tokens_as_text": "of these in prompts and texts, encoded as ordinary characters",
    "missing_eos": "the last learned token closes no turn",
}


def templates(shown: Callable[[str], str], *, autoescape: bool) -> Environment:
    """Jinja for the templates of this package: every text of an expression goes through `shown`, but for Markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,  # a name that is not in the audit is an error, never an empty place
        autoescape=autoescape,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "reason": reason, "file_name": lambda path: PurePath(path).name}
    made.filters |= {"count": lambda value: f"{value:,.0f}", "number": lambda value: f"{value:,.4g}"}
    made.globals |= {"plural": plural}
    return made
