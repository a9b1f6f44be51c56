"""Chat templates that write today's date: which ones do, and the same template with a fixed date.

Templates of Llama 3 and Mistral Small ask for the date by `strftime_now(format)`, a function that transformers gives them.
Data prepared on two days would differ although nothing else does, so preparation fixes the date once (`TemplateDate`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import date, datetime

CLOCK_FUNCTION = "strftime_now"
"""How a template asks for the time."""
_LITERAL_CALL_REGEX = re.compile(rf"""{CLOCK_FUNCTION}\(\s*(?:format\s*=\s*)?(["'])([^"'\\]*)\1\s*\)""")
"""A call whose format is written into the template."""
_CLOCK_CALL_REGEX = re.compile(rf"{CLOCK_FUNCTION}(?!\s+is\b)")
"""Any call; `strftime_now is defined` is none."""
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
_NOT_IN_FINGERPRINT = " (not in the fingerprint)"


@dataclass(frozen=True, slots=True)
class TemplateDate:
    """The date that a chat template writes into prepared data."""

    day: date
    in_fingerprint: bool = True
    """False for data of an earlier version, whose fingerprint did not know of the date."""

    def __str__(self) -> str:
        if self.in_fingerprint:
            return self.day.isoformat()
        return self.day.isoformat() + _NOT_IN_FINGERPRINT

    @classmethod
    def parse(cls, text: str) -> TemplateDate:
        """Read back a date that `str` wrote, with its note on the fingerprint. Raises ValueError."""
        day, suffix, trailing = text.partition(_NOT_IN_FINGERPRINT)
        if trailing:
            raise ValueError(f"{text!r} is no date of a chat template")
        return cls(date.fromisoformat(day), in_fingerprint=not suffix)


def reads_clock(template: str | None) -> bool:
    """Whether a chat template may write the date."""
    return template is not None and CLOCK_FUNCTION in template


def replace_clock_calls(template: str, day: date) -> str:
    """Fix the date in a chat template: its calls of the clock (`strftime_now`) are replaced by the date `day`, at midnight.

    Otherwise data prepared on two days would differ. Example: `{{ strftime_now("%d %b %Y") }}` -> `{{ "03 Jan 2025" }}`.
    """
    midnight = datetime(day.year, day.month, day.day)

    def quoted_date(call: re.Match[str]) -> str:
        """The value of a call such as `strftime_now("%Y")`, as a literal of Jinja: `"2025"`."""
        date_format = call[2]
        return json.dumps(midnight.strftime(date_format), ensure_ascii=False)

    template_without_literal_calls = _LITERAL_CALL_REGEX.sub(quoted_date, template)
    if not _CLOCK_CALL_REGEX.search(template_without_literal_calls):
        return template_without_literal_calls
    # Other calls compute their format while the template runs. A macro of the same name takes the place of the function, and
    # fills the format in.
    replace_filters = ""
    for directive, formatted in _directive_values(midnight):
        replace_filters += f" | replace({json.dumps(directive)}, {json.dumps(formatted)})"
    # Jinja (with trim_blocks) removes the newline after a tag, so the template still begins at the start of a line.
    macro = f"{{%- macro {CLOCK_FUNCTION}(format) -%}}{{{{ format{replace_filters} }}}}{{%- endmacro %}}"
    return f"{macro}\n{template_without_literal_calls}"


def _directive_values(moment: datetime) -> list[tuple[str, str]]:
    """List what each directive of strftime stands for at `moment`: (`%-d`, "3"), (`%d`, "03") and so on."""
    directives = [f"%-{letter}" for letter in _DIRECTIVES] + [f"%{letter}" for letter in _DIRECTIVES]
    directive_values = []
    for directive in directives:
        formatted = moment.strftime(directive)
        if formatted != directive:  # a directive that this system does not know comes back unchanged
            directive_values.append((directive, formatted))
    return directive_values
