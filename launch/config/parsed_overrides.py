"""The command line of a run, sorted into choices of groups, values of settings, and problems."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from strategies.errors import key_of_problem


class SettingValue(NamedTuple):
    """One setting as it was typed or read from a file."""

    key: str
    value: Any
    source_text: str
    """What set it, for messages: the override (`optim.lr=1e-4`), or file, key and value (`my.yaml: optim.lr: 1e-4`)."""
    is_published_shape: bool = False
    """For `model.path`: whether the model was named by its published shape, as in `model=llama3_8b`."""


@dataclass(slots=True)
class ParsedOverrides:
    """The command line of a run, sorted into choices of groups, values of settings, and problems."""

    choices: dict[str, str] = field(default_factory=dict)
    """The choice of each group that a file or an override chooses, such as {"tuning": "lora"}."""
    values: list[SettingValue] = field(default_factory=list)
    """The settings, in their order. The last one of a key counts."""
    problems: list[str] = field(default_factory=list)
    """A message for each override that cannot be used."""
    replaced_tables: set[str] = field(default_factory=set)
    """Tables that were typed as a whole. Entries that a settings file, an experiment or a run has in them are dropped."""
    num_file_values: int = 0
    """How many of `values` come from the user's settings files. Those stand first; the others were set on the command line."""
    resets: list[tuple[str, str]] = field(default_factory=list)
    """(key, override) of each `~key`, which sets a setting back to the default of the code."""
    probably_meant_keys: set[str] = field(default_factory=set)
    """Settings that a wrong override was probably meant for. Validation complains that they are not set, which is not shown."""

    has_unread_file: bool = False
    """Whether a settings file could not be read: what else is missing may well stand in it."""
    empty_file_problems: list[str] = field(default_factory=list)
    """A message for each settings file without any setting. That is allowed, and shown only beside other problems."""

    @property
    def cli_values(self) -> list[SettingValue]:
        """The values that were typed on the command line, without those of the user's settings files."""
        return self.values[self.num_file_values :]

    def add_problem(self, problem: str, probably_meant: Iterable[str] = ()) -> None:
        """Add the message about an override that cannot be used. `probably_meant`: settings that validation need not miss."""
        self.problems.append(problem)
        self.probably_meant_keys.update(probably_meant)

    def explains(self, problem: str) -> bool:
        """Whether a problem of validation only follows from a settings file that could not be read: that a setting is missing.

        A problem of a setting that was typed does not follow from it.
        """
        problem_key = key_of_problem(problem)
        return self.has_unread_file and not any(value.key == problem_key for value in self.values)

    def add_value(self, key: str, value: Any, source_text: str) -> None:
        """Add the value of a setting. `source_text`: what sets it, for messages, such as `optim.lr=1e-4`."""
        self.values.append(SettingValue(key, value, source_text))

    def replace_table(self, table: str) -> None:
        """Note that a list was typed for a whole table, as in `evaluation.tasks=[json]`, and drop an earlier list for it.

        The last one counts, as of any setting. Entries that were typed by themselves stay, such as
        `objective.rewards.maths.weight=2`.
        """
        self.replaced_tables.add(table)
        # A file has one list at most, since YAML refuses a key that comes twice: only those that were typed are looked for.
        list_regex = re.compile(rf"[+]*{re.escape(table)}\s*=")
        self.values = [value for value in self.values if not list_regex.match(value.source_text)]

    def followed_by(self, later: ParsedOverrides) -> ParsedOverrides:
        """These settings and those of a later source together, of files and the command line or of two files: the later count.

        Their values stand last, because the last value of a key counts. A table that was typed as a whole replaces an earlier
        one, as a value does.
        """
        earlier_values = self.values
        for table in later.replaced_tables:
            earlier_values = [value for value in earlier_values if not value.key.startswith(f"{table}.")]
        return ParsedOverrides(
            choices=self.choices | later.choices,
            values=[*earlier_values, *later.values],
            problems=[*self.problems, *later.problems],
            replaced_tables=self.replaced_tables | later.replaced_tables,
            resets=[*self.resets, *later.resets],
            probably_meant_keys=self.probably_meant_keys | later.probably_meant_keys,
            has_unread_file=self.has_unread_file or later.has_unread_file,
            empty_file_problems=[*self.empty_file_problems, *later.empty_file_problems],
        )
