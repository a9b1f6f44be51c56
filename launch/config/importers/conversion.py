"""The result of a translation: each foreign setting has words of ours, is needless here, or has no equivalent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.config.importers.equivalent import TranslatedSetting
from strategies.redaction import redacted


@dataclass(frozen=True, slots=True)
class ForeignValue:
    """A setting of another trainer's file with its value, of which secrets are hidden."""

    setting: str
    value: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.value}"


@dataclass(frozen=True, slots=True)
class SettingNote:
    """A setting of another trainer's file, its value, and what the user should know about it."""

    setting: str
    value: str
    why: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.value}: {self.why}"


@dataclass(slots=True)
class Converted:
    """Another trainer's file in our words, with everything that did not become a word."""

    trainer: str
    """Whose file it is, in words."""
    words: dict[str, str] = field(default_factory=dict)
    """Our settings as typed, by key."""
    origin: dict[str, list[ForeignValue]] = field(default_factory=dict)
    """By our key: the settings of the file that gave it."""
    no_equal: list[SettingNote] = field(default_factory=list)
    """Settings that have no equal here, and why."""
    needless: list[SettingNote] = field(default_factory=list)
    """Settings that need no word here: nothing is lost without them."""
    remarks: list[SettingNote] = field(default_factory=list)
    """Settings that were taken, and work differently here."""
    empty: list[str] = field(default_factory=list)
    """Settings that the file names and leaves without a value."""

    def add(self, setting: str, value: Any, translation: TranslatedSetting) -> None:
        """File the translation of a setting. If two settings contradict each other, the first stays and the other is noted."""
        source = ForeignValue(setting, without_secrets(setting, value))
        new_words = {key: text for key, text in translation.words.items() if key not in self.words}
        self.words |= new_words
        for key in new_words:
            self.origin[key] = [source]
        contradicting = {key: text for key, text in translation.words.items() if self.words[key] != text}
        for key, text in contradicting.items():
            origins = " and ".join(str(origin) for origin in self.origin[key])
            self.add_no_equal(
                setting, source.value, f"{key}={text} here, but {origins} gave {key}={self.words[key]}, which stays"
            )
        says_the_same_again = translation.words and not new_words and not contradicting
        if says_the_same_again:
            self.origin[list(translation.words)[-1]].append(source)
        self._add_note(source, translation)

    def _add_note(self, source: ForeignValue, translation: TranslatedSetting) -> None:
        """File what the user should know about a translated setting."""
        note = translation.note
        if translation.words:
            if note and all(remark.why != note for remark in self.remarks):
                self.remarks.append(SettingNote(source.setting, source.value, note))
        elif translation.needless or not note:
            why = note or "it is so here without a setting"
            self.needless.append(SettingNote(source.setting, source.value, why))
        else:
            self.add_no_equal(source.setting, source.value, note)

    def add_no_equal(self, setting: str, value: Any, why: str) -> None:
        """Note a setting that has no equal here."""
        self.no_equal.append(SettingNote(setting, without_secrets(setting, value), why))

    def drop(self, key: str, why: str) -> None:
        """Take back one of our words that cannot be used after all: its settings have no equal."""
        text = self.words.pop(key)
        for source in self.origin.pop(key):
            self.add_no_equal(source.setting, source.value, f"{key}={text}: {why}")


def as_typed(value: Any) -> str:
    """A value of YAML or JSON as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and not any(isinstance(entry, dict | list) for entry in value):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "null" if value is None else str(value)


def without_secrets(setting: str, value: Any) -> str:
    """A value as it would be typed, for people to read: a secret is not repeated."""
    if re.search(r"(^|[_.])(token|key|api_key|secret|password)$", setting.lower()):
        return "(hidden)"
    return redacted(as_typed(value))


def typed_values(tree: Mapping[str, Any]) -> dict[str, str]:
    """The settings of one level that hold a value and are no block, as typed."""
    values = {}
    for key, value in tree.items():
        if value is not None and not isinstance(value, dict):
            values[str(key)] = as_typed(value)
    return values
