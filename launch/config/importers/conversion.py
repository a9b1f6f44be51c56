"""The result of a translation: each setting of another trainer has settings of ours, is not needed, or has no equivalent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.config.importers.equivalent import TranslatedSetting
from strategies.redaction import redact


@dataclass(frozen=True, slots=True)
class SettingOfOtherTrainer:
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
class ConvertedSettings:
    """Another trainer's settings file as settings of shardtune, with a note on everything that did not become one.

    Filled setting by setting while the file is translated; `shardtune init from=FILE` writes and prints it.
    """

    trainer: str
    """The trainer that the file was written for, such as `axolotl`."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Our settings as they are typed on the command line, by key."""
    sources_by_key: dict[str, list[SettingOfOtherTrainer]] = field(default_factory=dict)
    """For each key of `overrides`: the settings of the file that it comes from."""
    unsupported: list[SettingNote] = field(default_factory=list)
    """Settings that shardtune has no equivalent for, and why."""
    not_needed: list[SettingNote] = field(default_factory=list)
    """The other trainer's settings that need none of ours: nothing is lost without them."""
    remarks: list[SettingNote] = field(default_factory=list)
    """Settings that were translated, but work differently here."""
    names_without_value: list[str] = field(default_factory=list)
    """Settings that the file names and leaves without a value."""

    def add_translation(self, setting: str, value: Any, translation: TranslatedSetting) -> None:
        """Add the translation of one setting of the file, unless an earlier setting of the file says otherwise.

        `setting`: its name in the file, `value`: as read from YAML; `translation`: settings of shardtune for it, maybe none.

        The first setting that gives a key of shardtune decides. For a key that was given before:

        - with another value: the earlier value stays, and this setting is noted as unsupported, with both values;
        - with the same value: if that is so for all keys of the translation, this setting is a further source of the last of
          them.
        """
        source = SettingOfOtherTrainer(setting, cli_text_without_secrets(setting, value))
        new_overrides: dict[str, str] = {}
        contradicting_overrides: dict[str, str] = {}
        for key, text in translation.overrides.items():
            if key not in self.overrides:
                new_overrides[key] = text
            elif self.overrides[key] != text:
                contradicting_overrides[key] = text

        self.overrides |= new_overrides
        for key in new_overrides:
            self.sources_by_key[key] = [source]
        for key, text in contradicting_overrides.items():
            earlier_sources = " and ".join(str(earlier) for earlier in self.sources_by_key[key])
            why = f"{key}={text} here, but {earlier_sources} gave {key}={self.overrides[key]}, which stays"
            self.add_unsupported(setting, source.value, why)
        repeats_earlier_settings = translation.overrides and not new_overrides and not contradicting_overrides
        if repeats_earlier_settings:
            # The last key alone: the keys before it name the method, such as tuning=lora before tuning.rank.
            last_key = list(translation.overrides)[-1]
            self.sources_by_key[last_key].append(source)
        self._add_note(source, translation)

    def _add_note(self, source: SettingOfOtherTrainer, translation: TranslatedSetting) -> None:
        """Sort what the user should know about one setting of the file into `remarks`, `not_needed` or `unsupported`.

        `source`: the setting of the file; `translation`: what became of it.
        The cases, in order:

        - It has become settings of shardtune: its note, if it has one, goes to `remarks`.
        - It needs no setting of shardtune, or has no note: `not_needed`.
        - It has no equivalent: `unsupported`.
        """
        note = translation.note
        if translation.overrides:
            # Once only, because a note about a whole block comes with each of its settings.
            if note and all(remark.why != note for remark in self.remarks):
                self.remarks.append(SettingNote(source.setting, source.value, note))
        elif translation.not_needed or not note:
            why = note or "it is so here without a setting"
            self.not_needed.append(SettingNote(source.setting, source.value, why))
        else:
            self.add_unsupported(source.setting, source.value, note)

    def add_unsupported(self, setting: str, value: Any, why: str) -> None:
        """Note a setting of the file that shardtune has no equivalent for."""
        self.unsupported.append(SettingNote(setting, cli_text_without_secrets(setting, value), why))

    def withdraw(self, key: str, why: str) -> None:
        """Take back a setting of shardtune that cannot be used after all, and note the settings it came from as unsupported.

        `key`: such as `batch.micro`. `why`: the reason, for the user.
        """
        text = self.overrides.pop(key)
        for source in self.sources_by_key.pop(key):
            self.add_unsupported(source.setting, source.value, f"{key}={text}: {why}")


def to_cli_text(value: Any) -> str:
    """Write a value of a YAML or JSON file as it is typed behind `key=` on the command line: `true`, `[a,b]`, `null`.

    A dictionary, or a list that has lists or dictionaries, is written as JSON.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and not any(isinstance(entry, dict | list) for entry in value):
        return f"[{','.join(map(to_cli_text, value))}]"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "null" if value is None else str(value)


def cli_text_without_secrets(setting: str, value: Any) -> str:
    """The value of a setting as command-line text for people to read; tokens, keys and passwords are hidden."""
    if re.search(r"(^|[_.])(token|key|api_key|secret|password)$", setting.lower()):
        return "(hidden)"
    return redact(to_cli_text(value))


def scalar_settings(file_settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings at the outermost level of a file that are one value, as command-line text: {"learning_rate": "1e-4"}.

    `file_settings`: the file as nested dictionaries.
    Left out are blocks and settings without a value. Rules of translation read this.
    """
    values = {}
    for key, value in file_settings.items():
        if value is not None and not isinstance(value, dict):
            values[str(key)] = to_cli_text(value)
    return values
