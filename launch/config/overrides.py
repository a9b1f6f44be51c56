"""Reads the words `key=value` of the command line, without stopping at the first mistake.

Group choices are separated from values. Paths and other text stay as typed. Every word that cannot be used gets a
line with what was probably meant. Hydra's own parser reads everything that is not text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin

from launch.config import hints, user_files
from launch.config.choices import WHOLE_RUN_GROUPS, groups, settings_of, shipped, variants
from strategies.errors import ConfigError
from trainer.export.gates.bounds import read_word
from trainer.optim.schedule import MEANT_UNDER

TASKS_TABLE = "evaluation.tasks"
"""A table of which a list of kinds can be typed: an entry of each, of that name, or of the one after a colon."""
GATES = "gates"
"""A table of bounds, which are no values of Hydra's grammar."""
WORD = re.compile(r"[+]{0,2}(?P<key>[^=\s]+?)=(?P<value>.*)", re.DOTALL)


@dataclass(slots=True)
class Parsed:
    """The command line, sorted. `values` are (key, value, word) in the order typed."""

    choices: dict[str, str] = field(default_factory=dict)
    values: list[tuple[str, Any, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)
    """Tables of which the whole was typed: what an experiment or a run has in them gives way."""
    from_files: int = 0
    """How many of the values, the first ones, are not typed but read from files."""
    defaults: list[tuple[str, str]] = field(default_factory=list)
    """(key, word) of the settings that are to be as the code has them: `~key`."""
    suspects: set[str] = field(default_factory=set)
    """Keys that a wrong word was probably meant for: what validation says about them is not worth showing."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the tree: its type, and the group choices under which it exists (empty: always)."""

    type: Any
    under: tuple[str, ...] = ()


@cache
def settings() -> dict[str, Setting]:
    """Every leaf key of the tree under any choice, by full name; `*` stands for names that the user chooses."""
    from trainer.config.run import RunConfig
    from trainer.config.tree import keyed_fields

    settings_by_key: dict[str, Setting] = {}
    groups_with_variants = variants()
    for keyed in keyed_fields(RunConfig):
        name, _, below = keyed.key.partition(".")
        if name in groups_with_variants and not below:
            settings_by_key |= _settings_under_choices(name)
        elif name not in groups_with_variants and not keyed.is_group:
            settings_by_key[keyed.key] = Setting(keyed.type)
    for key, setting in settings_by_key.items():
        if set(setting.under) == set(shipped().get(key.split(".")[0], ())):
            settings_by_key[key] = Setting(setting.type)
    for name, schedules in MEANT_UNDER.items():
        settings_by_key[f"schedule.{name}"] = Setting(
            settings_by_key[f"schedule.{name}"].type, tuple(str(schedule) for schedule in schedules)
        )
    del settings_by_key["substitutions"]
    return settings_by_key


def _settings_under_choices(group: str) -> dict[str, Setting]:
    """The settings of a group whose choices differ in their keys, each with the choices that have it."""
    from trainer.config.tree import keyed_fields

    order = [*variants()[group], *shipped()[group]]
    settings_by_key: dict[str, Setting] = {}
    for choice in sorted(shipped()[group], key=order.index):
        for keyed in keyed_fields(settings_of(group, choice), group):
            if not keyed.is_group:
                under = settings_by_key[keyed.key].under if keyed.key in settings_by_key else ()
                settings_by_key[keyed.key] = Setting(keyed.type, (*under, choice))
    return settings_by_key


def field_key(settings_by_key: dict[str, Setting], key: str) -> str:
    """A key as the code has it: named by a keyword of Python it ends in an underscore there, and is typed without."""
    return f"{key}_" if key not in settings_by_key and f"{key}_" in settings_by_key else key


def setting_of(settings_by_key: dict[str, Setting], key: str) -> Setting | None:
    """The setting behind a key as typed: also in a table, such as `data.columns.text` or `data.sources.chat.path`."""
    key = field_key(settings_by_key, key)
    parts = key.split(".")
    wildcard_keys = [".".join([*parts[:n], "*", *parts[n + 1 :]]) for n in range(1, len(parts))]
    for candidate in (key, *wildcard_keys):
        if candidate in settings_by_key:
            return settings_by_key[candidate]
        table = settings_by_key.get(candidate.rpartition(".")[0])
        if table is not None and get_origin(table.type) is dict:
            entry = get_args(table.type)[1]  # of a table of anything, numbers are numbers
            return Setting(object if entry is Any else entry, table.under)
    return None


def parse(words: list[str]) -> Parsed:
    """Sort `words` into group choices and values; everything that cannot be read becomes a problem."""
    parsed, settings_by_key = Parsed(), settings()
    words, parsed.problems = hints.join_split_words(words, settings_by_key)
    foreign = hints.ForeignWords(words, lambda key: setting_of(settings_by_key, key) is not None)
    for word in filter(user_files.is_file_word, words):  # first: what is typed goes before what a file says
        _read_file(parsed, settings_by_key, word)
    parsed.from_files = len(parsed.values)
    for word in foreign.words:
        if user_files.is_file_word(word):
            continue
        match = WORD.fullmatch(word)
        if (hint := foreign.hint(word)) is not None:
            parsed.problems.append(hint.problem)
            parsed.suspects |= hint.meant_keys
            continue
        if word.startswith("~"):
            _remove(parsed, settings_by_key, word)
            continue
        if match is None or word.startswith("-"):
            parsed.problems.append(hints.not_a_pair(word))
            continue
        key, text = match["key"], match["value"]
        key = field_key(settings_by_key, key)
        if key.split(".")[0].split("/")[0] == "hydra":
            parsed.problems.append(hints.hydra_setting(key, text, word))
        elif "_target_" in word:
            parsed.problems.append(f"{word}: `_target_` is not used here and never runs anything; remove it")
        elif key in groups():
            _choose(parsed, key, text, word)
        else:
            _assign(parsed, settings_by_key, key, text, word)
    parsed.problems += _contradictions(parsed)
    return parsed


def _contradictions(parsed: Parsed) -> list[str]:
    """A problem for each `~key` beside a word that sets the same key: one of the two would be ignored."""
    typed = parsed.values[parsed.from_files :]
    return [
        f"{removal}: {word} sets the same; leave one of the two out"
        for key, removal in parsed.defaults
        for typed_key, _, word in typed
        if typed_key == key or typed_key.startswith(f"{key}.")
    ]


def needs_other_choice(key: str, word: str, setting: Setting) -> str:
    """What to say about a key that exists only under another choice of its group."""
    return f"{word}: needs {hints.condition(key, setting.under)}; add it, or leave {key.removesuffix('_')} out"


def describe(hint: Any) -> str:
    """What a value of this type looks like, in words."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if get_origin(hint) is list:
        return f"a list such as [a,b] of which each is {describe(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "pairs such as {a:b}"
    if get_args(hint):
        return " or ".join(describe(part) for part in get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, "a value")


def _read_file(parsed: Parsed, settings_by_key: dict[str, Setting], word: str) -> None:
    """The choices and values of the user's file, as if they had been typed first."""
    try:
        choices, values = user_files.read(word)
    except ConfigError as error:
        parsed.problems += error.problems
        return
    for group, choice in choices.items():
        if group in groups():
            _choose(parsed, group, choice, f"{word}: {group}: {choice}")
        else:
            parsed.problems.append(f"{word}: defaults: there is no group {group}; one of {', '.join(groups())}")
    foreign = hints.ForeignWords(
        [f"{key}={value}" for key, value in values],
        lambda key: setting_of(settings_by_key, field_key(settings_by_key, key)) is not None,
    )
    for key, value in values:
        if (hint := foreign.hint(f"{key}={value}")) is not None:
            parsed.problems.append(f"{word}: {hint.problem.replace('=', ': ', 1)}")
            parsed.suspects |= hint.meant_keys
            continue
        line = f"{word}: {key}: {value}"
        if re.search(r"\$\{\s*(now|hydra)\s*:", str(value)):
            parsed.problems.append(f"{line}: ranks would not agree on it; write the value out")
        elif "_target_" in line:
            parsed.problems.append(f"{line}: `_target_` is not used here and never runs anything; remove it")
        elif key == TASKS_TABLE and isinstance(value, list):
            _assign(parsed, settings_by_key, key, f"[{','.join(map(str, value))}]", line)
        else:
            parsed.values.append((field_key(settings_by_key, key), value, line))


def _remove(parsed: Parsed, settings_by_key: dict[str, Setting], word: str) -> None:
    """`~key`: as the code has it, whatever an experiment says; `~experiment`: none."""
    key = field_key(settings_by_key, word.lstrip("~").partition("=")[0])
    if key in WHOLE_RUN_GROUPS:
        parsed.choices[key] = "null"
    elif key in groups():
        parsed.problems.append(f"{word}: a run needs one; give another choice, as in {key}={groups()[key][0]}")
    elif key in settings_by_key or any(setting.startswith(f"{key}.") for setting in settings_by_key):
        parsed.defaults.append((key, word))
    else:
        problem, meant_key = hints.unknown_key(key, word, settings_by_key)
        parsed.problems.append(problem)
        parsed.suspects |= {meant_key} if meant_key else set()


def _choose(parsed: Parsed, group: str, choice: str, word: str) -> None:
    choices = groups()[group]
    if choice in choices or (group in WHOLE_RUN_GROUPS and choice == "null"):
        parsed.choices[group] = choice
    elif "," in choice:
        parsed.problems.append(f"{word}: several values are a sweep; add -m, or choose one")
    else:
        parsed.problems.append(hints.unknown_choice(group, choice, word))
        parsed.suspects.add(group)


def _assign(parsed: Parsed, settings_by_key: dict[str, Setting], key: str, text: str, word: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if re.search(r"\$\{\s*(now|hydra)\s*:", text):
        parsed.problems.append(f"{word}: ranks would not agree on it; write the value out")
        return
    if key.split(".")[0] == GATES:
        gates, problem = read_word(word.lstrip("+"))
        parsed.problems += [] if gates is not None else [problem]
        parsed.values.append((GATES, gates or {}, word))
        return
    if key == TASKS_TABLE and (kinds := _list_entries(text)) is not None:
        parsed.replaced.add(key)
        kind_and_name = [(kind, name or kind) for kind, _, name in (entry.partition(":") for entry in kinds)]
        parsed.values += [(f"{key}.{name}.kind", kind, word) for kind, name in kind_and_name]
        return
    setting = setting_of(settings_by_key, key)
    if setting is not None and _is_text(setting.type) and not _is_syntax(text):
        parsed.values.append((key, text, word))
        return
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        if override.is_sweep_override():
            is_range = re.match(r"(interval|tag)\(", text) is not None
            remedy = "a range is searched: add -m sweeper=optuna" if is_range else "several values are a sweep; add -m"
            parsed.problems.append(f"{word}: {remedy}, or give one")
            return
        parsed.values += _entries(key, override.value(), word)
    except (HydraException, NotImplementedError) as error:
        if setting is not None and _is_text(setting.type) and text.startswith("["):  # a list of paths as they are typed
            parsed.values.append((key, [part.strip().strip("'\"") for part in text[1:-1].split(",")], word))
        elif setting is None:
            problem, meant_key = hints.unknown_key(key, word, settings_by_key)
            parsed.problems.append(problem)
            parsed.suspects |= {meant_key} if meant_key else set()
        else:
            reason = str(error).splitlines()[0].split(" See https")[0]
            parsed.problems.append(f"{word}: cannot be read ({reason}); {key} is {describe(setting.type)}")
            parsed.suspects.add(key)


def _entries(key: str, value: Any, word: str) -> list[tuple[str, Any, str]]:
    """A value as (key, value, word); `budget={epochs: 3}` and `batch={...}` as a value for each of their settings."""
    if key not in ("batch", "budget") or not isinstance(value, dict):
        return [(key, value, word)]
    return [(f"{key}.{name}", entry, word) for name, entry in value.items()]


def _list_entries(text: str) -> list[str] | None:
    """The words of a list; None where it is none."""
    inner = text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else None
    return None if inner is None else [name for part in inner if (name := part.strip().strip("'\""))]


def _is_text(hint: Any) -> bool:
    """Whether the words of the user are the value: plain text, or the paths and patterns typed `Any`."""
    if get_origin(hint) is dict:
        return False
    return hint in (str, Any) or (get_args(hint) != () and set(get_args(hint)) <= {str, type(None)})


def _is_syntax(text: str) -> bool:
    """Whether text is meant for the grammar: null, a list, pairs, or quoted as a whole."""
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    pairs = text.startswith("{") and text.endswith("}") and ":" in text
    return text == "null" or quoted or pairs or (text.startswith("[") and text.endswith("]"))
