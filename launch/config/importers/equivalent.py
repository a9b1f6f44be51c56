"""One setting of another trainer as settings of shardtune, and the settings of its file that its translation may depend on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TranslatedSetting:
    """The translation of one setting of another trainer into settings of shardtune."""

    overrides: Mapping[str, str] = field(default_factory=dict)
    """Our settings and their values, as typed; empty if there is no equivalent, or nothing needs to be set."""
    note: str = ""
    """What the user should know: why there is no equivalent, or how ours differs."""
    not_needed: bool = False
    """Whether no setting of ours is needed: shardtune does the same anyway, or it concerns the other trainer alone."""


@dataclass(frozen=True, slots=True)
class OtherTrainerSettings:
    """All settings of another trainer that were written, since the translation of one may depend on others.

    The global batch, for example, follows from three settings and the number of ranks.
    """

    value_by_name: Mapping[str, str]
    """Their values, by normalised name (`names.normalised_name`)."""
    ranks: int | None = None
    """Ranks of the run; None if nobody has said."""

    def get(self, *names: str) -> str | None:
        """The value of the first of these names that is set; None if none is. Null, an empty text and `auto` count as not set."""
        for name in names:
            value = self.value_by_name.get(name)
            if is_set(value):
                return value
        return None


def is_set(value: str | None) -> bool:
    """Whether a value is more than an empty text, null or `auto`."""
    return value is not None and value.lower() not in ("", "null", "none", "auto", "~")


def is_true(value: str | None) -> bool:
    """Whether a switch is on."""
    return str(value).lower() in ("true", "1", "yes", "on", "auto")


def parse_number(value: str | None) -> float | None:
    """The number that a text spells; None if it spells none, or is not finite."""
    try:
        parsed = float(str(value).replace("_", ""))
    except ValueError:
        return None
    return parsed if math.isfinite(parsed) else None


def format_number(value: float) -> str:
    """A number as people write it: `8` instead of `8.0`."""
    # Above 1e15 a float no longer holds every whole number, so such a value keeps its exponent.
    is_whole = value == int(value) and abs(value) < 1e15
    return str(int(value)) if is_whole else f"{value:g}"


def list_entries(value: str) -> list[str]:
    """The entries of a list as another trainer may write it, `[a,b]`, `a,b` or `a`, without quotes and without empty entries."""
    entries = []
    for part in value.strip().strip("[]").split(","):
        entry = part.strip().strip("'\"")
        if entry:
            entries.append(entry)
    return entries
