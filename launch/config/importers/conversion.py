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
class Said:
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
    lacking: list[Said] = field(default_factory=list)
    """What has no equal here, and why."""
    needless: list[Said] = field(default_factory=list)
    """What needs no setting here: nothing is lost without it."""
    remarks: list[Said] = field(default_factory=list)
    """In what a setting that was taken differs here."""
    empty: list[str] = field(default_factory=list)
    """Settings that their file names and leaves without a value."""

    def take(self, setting: str, value: Any, answer: TranslatedSetting) -> None:
        """File an answer. Of two that contradict each other the first one stays, and the other is told."""
        text = shown_of(setting, value)
        new = {key: ours for key, ours in answer.words.items() if key not in self.words}
        self.words |= new
        self.origin |= {key: [f"{setting}: {text}"] for key in new}
        other = {key: ours for key, ours in answer.words.items() if self.words[key] != ours}
        for key, ours in other.items():
            stays = f"{' and '.join(self.origin[key])} gave {key}={self.words[key]}, which stays"
            self.lack(setting, text, f"{key}={ours} here, but {stays}")
        if answer.words and not new and not other:  # said twice
            self.origin[list(answer.words)[-1]].append(f"{setting}: {text}")
        if answer.words and answer.said:
            if all(known.why != answer.said for known in self.remarks):
                self.remarks.append(Said(setting, text, answer.said))
        elif answer.needless or not (answer.words or answer.said):
            self.needless.append(Said(setting, text, answer.said or "it is so here without a setting"))
        elif not answer.words:
            self.lack(setting, text, answer.said)

    def lack(self, setting: str, value: Any, why: str) -> None:
        """A setting has no equal."""
        self.lacking.append(Said(setting, shown_of(setting, value), why))

    def drop(self, key: str, why: str) -> None:
        """A word of ours cannot be used after all."""
        ours = self.words.pop(key)
        for said in self.origin.pop(key):
            setting, _, value = said.partition(": ")
            self.lack(setting, value, f"{key}={ours}: {why}")


def text_of(value: Any) -> str:
    """A value of YAML or JSON as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and not any(isinstance(each, dict | list) for each in value):
        return f"[{','.join(map(text_of, value))}]"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "null" if value is None else str(value)


def shown_of(setting: str, value: Any) -> str:
    """The same for people to read: secrets are not repeated."""
    if re.search(r"(^|[_.])(token|key|api_key|secret|password)$", setting.lower()):
        return "(hidden)"
    return redacted(text_of(value))


def texts(tree: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a level that hold a value, as typed."""
    return {
        str(key): text_of(value) for key, value in tree.items() if value is not None and not isinstance(value, dict)
    }
