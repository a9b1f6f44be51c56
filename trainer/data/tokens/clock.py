"""Chat templates that write today's date: which ones do, and the same template with a fixed date.

Templates of Llama 3 and Mistral Small ask for the date by `strftime_now(format)`, a function that transformers gives them.
Data prepared on two days would differ although nothing else does, so preparation fixes the date once (`TemplateDate`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import date, datetime

CLOCK = "strftime_now"
"""How a template asks for the time."""
_LITERAL_CALL = re.compile(rf"""{CLOCK}\(\s*(?:format\s*=\s*)?(["'])([^"'\\]*)\1\s*\)""")
_CLOCK_CALL = re.compile(rf"{CLOCK}(?!\s+is\b)")
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
_UNDATED = " (not in the fingerprint)"


@dataclass(frozen=True, slots=True)
class TemplateDate:
    """The date that a chat template writes into prepared data."""

    day: date
    in_fingerprint: bool = True
    """False for data of an earlier version, whose fingerprint did not know of the date."""

    def __str__(self) -> str:
        return self.day.isoformat() + ("" if self.in_fingerprint else _UNDATED)

    @classmethod
    def parse(cls, text: str) -> TemplateDate:
        """The date that `str` wrote. Raises ValueError."""
        day, undated, trailing = text.partition(_UNDATED)
        if trailing:
            raise ValueError(f"{text!r} is no date of a chat template")
        return cls(date.fromisoformat(day), not undated)


def reads_clock(template: str | None) -> bool:
    """Whether a chat template may write the date."""
    return template is not None and CLOCK in template


def with_date(template: str, day: date) -> str:
    """The template with its calls of the clock replaced by the date `day`, at midnight."""
    midnight = datetime(day.year, day.month, day.day)
    fixed = _LITERAL_CALL.sub(lambda match: json.dumps(midnight.strftime(match[2]), ensure_ascii=False), template)
    if not _CLOCK_CALL.search(fixed):
        return fixed
    # A format that is computed is filled in by the template itself: its own macro takes the place of the function.
    replaced = "".join(
        f" | replace({json.dumps(code)}, {json.dumps(value)})" for code, value in _directive_values(midnight)
    )
    # Jinja (with trim_blocks) removes the newline after a tag, so the template still begins at the start of a line.
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro %}}\n{fixed}"


def _directive_values(moment: datetime) -> list[tuple[str, str]]:
    """(directive, value) of each strftime directive at `moment`, such as (`%-d`, "3") and (`%d`, "03")."""
    codes = [f"%-{letter}" for letter in _DIRECTIVES] + [f"%{letter}" for letter in _DIRECTIVES]
    directives = [(code, moment.strftime(code)) for code in codes]
    # A directive that this system does not know comes back unchanged.
    return [(code, text) for code, text in directives if text != code]
