"""One foreign setting in our words, and the settings of a foreign file that its translation may depend on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TranslatedSetting:
    """Our words for one of theirs."""

    words: Mapping[str, str] = field(default_factory=dict)
    """Our settings and their values, as typed; empty where there is no equal, or nothing to be set."""
    note: str = ""
    """What is to be known besides: why there is no equal, or in what ours differs."""
    needless: bool = False
    """Whether nothing is lost without it: it is so anyway, or concerns the other trainer alone."""


@dataclass(frozen=True, slots=True)
class ForeignSettings:
    """All settings that were written, by their plain names, and how many ranks there are, where that is known."""

    by_name: Mapping[str, str]
    ranks: int | None = None

    def get(self, *names: str) -> str | None:
        """The value of the first of these names that is set to something."""
        return next((self.by_name[name] for name in names if is_set(self.by_name.get(name))), None)


def is_set(value: str | None) -> bool:
    """Whether a value says something."""
    return value is not None and value.lower() not in ("", "null", "none", "auto", "~")


def is_true(value: str | None) -> bool:
    """Whether a switch is on."""
    return str(value).lower() in ("true", "1", "yes", "on", "auto")


def parse_number(value: str | None) -> float | None:
    """The number that is written; None where it is none, or not finite."""
    try:
        parsed = float(str(value).replace("_", ""))
    except ValueError:
        return None
    return parsed if math.isfinite(parsed) else None


def format_number(value: float) -> str:
    """A number as people write it."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:g}"


def list_entries(value: str) -> list[str]:
    """The entries of `[a,b]`, `a,b` or `a`."""
    return [part.strip().strip("'\"") for part in value.strip().strip("[]").split(",") if part.strip().strip("'\"")]
