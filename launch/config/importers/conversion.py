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
class SettingNote:
    """A setting of theirs, its value, and what there is to be known about it."""

    setting: str
    value: str
    why: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.value}: {self.why}"


@dataclass(slots=True)
class Converted:
    """Our words for a file of theirs, and all that did not become one."""

    trainer: str
    """Whose file it is, in words."""
    words: dict[str, str] = field(default_factory=dict)
    """Our settings as typed."""
    origin: dict[str, list[str]] = field(default_factory=dict)
    """By our key: theirs that say it, each with its value."""
    no_equal: list[SettingNote] = field(default_factory=list)
    """What has no equal here, and why."""
    needless: list[SettingNote] = field(default_factory=list)
    """What needs no setting here: nothing is lost without it."""
    remarks: list[SettingNote] = field(default_factory=list)
    """In what a setting that was taken differs here."""
    empty: list[str] = field(default_factory=list)
    """Settings that their file names and leaves without a value."""

    def add(self, setting: str, value: Any, answer: TranslatedSetting) -> None:
        """File an answer. Of two that contradict each other the first one stays, and the other is told."""
        text = without_secrets(setting, value)
        new_words = {key: our_value for key, our_value in answer.words.items() if key not in self.words}
        self.words |= new_words
        self.origin |= {key: [f"{setting}: {text}"] for key in new_words}
        contradicting = {key: our_value for key, our_value in answer.words.items() if self.words[key] != our_value}
        for key, our_value in contradicting.items():
            reason = f"{' and '.join(self.origin[key])} gave {key}={self.words[key]}, which stays"
            self.add_no_equal(setting, text, f"{key}={our_value} here, but {reason}")
        if answer.words and not new_words and not contradicting:  # said twice
            self.origin[list(answer.words)[-1]].append(f"{setting}: {text}")
        if answer.words and answer.note:
            if all(remark.why != answer.note for remark in self.remarks):
                self.remarks.append(SettingNote(setting, text, answer.note))
        elif answer.needless or not (answer.words or answer.note):
            self.needless.append(SettingNote(setting, text, answer.note or "it is so here without a setting"))
        elif not answer.words:
            self.add_no_equal(setting, text, answer.note)

    def add_no_equal(self, setting: str, value: Any, why: str) -> None:
        """A setting has no equal."""
        self.no_equal.append(SettingNote(setting, without_secrets(setting, value), why))

    def drop(self, key: str, why: str) -> None:
        """A word of ours cannot be used after all."""
        our_value = self.words.pop(key)
        for foreign in self.origin.pop(key):
            setting, _, value = foreign.partition(": ")
            self.add_no_equal(setting, value, f"{key}={our_value}: {why}")


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
    """The same for people to read: secrets are not repeated."""
    if re.search(r"(^|[_.])(token|key|api_key|secret|password)$", setting.lower()):
        return "(hidden)"
    return redacted(as_typed(value))


def typed_values(tree: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a level that hold a value, as typed."""
    return {
        str(key): as_typed(value) for key, value in tree.items() if value is not None and not isinstance(value, dict)
    }
