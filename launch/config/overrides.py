"""Reads the overrides `key=value` of the command line, without stopping at the first mistake.

Group choices are separated from values. Paths and other text stay as typed. Every override that cannot be used gets a
line with what was probably meant. Hydra's own parser reads everything that is not text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, NamedTuple, get_args, get_origin

from launch.config import hints, user_files
from launch.config.choices import (
    MODEL_GROUP,
    WHOLE_RUN_GROUPS,
    choices_by_group,
    means_a_shape,
    settings_class_of,
    settings_classes,
    shipped_choices,
)
from strategies.errors import ConfigError
from trainer.export.gates.bounds import read_word
from trainer.model.known_shapes import read_shape
from trainer.objectives.reward_functions import WHAT_IS_A_REWARD, functions_of, split_function
from trainer.optim.schedule import MEANT_UNDER

TASKS_TABLE = "evaluation.tasks"
"""A table for which a list of kinds can be typed: `[json,json:strict]` makes the entries `json` and `strict` of kind json."""
REWARDS_TABLE = "objective.rewards"
"""A table for which Python files and kinds can be typed: `rewards.py` makes an entry of each reward function of the file."""
GATES = "gates"
"""A table of bounds such as `eval/loss<2`, which Hydra's grammar cannot read."""
RESOLVED_BY_EACH_RANK = re.compile(r"\$\{\s*(now|hydra)\s*:")
"""Interpolations that every process would resolve for itself, each at its own time."""
RANKS_DISAGREE = "could differ between processes; write the value itself"
MODEL_PATH = "model.path"
"""What `model=<name of a published shape>` sets."""
NO_TARGET = "`_target_` is not used here and never runs anything; remove it"
OVERRIDE_REGEX = re.compile(r"[+]{0,2}(?P<key>[^=\s]+?)=(?P<value>.*)", re.DOTALL)


class TypedValue(NamedTuple):
    """One setting as it was typed or read from a file."""

    key: str
    value: Any
    override: str
    """The whole override, for messages."""


@dataclass(slots=True)
class ParsedOverrides:
    """The command line of a run, sorted into choices of groups, values of settings, and problems."""

    choices: dict[str, str] = field(default_factory=dict)
    """The choice of each group that was typed."""
    values: list[TypedValue] = field(default_factory=list)
    """The settings, in their order. The last one of a key counts."""
    problems: list[str] = field(default_factory=list)
    """A message for each override that cannot be used."""
    shape_overrides: set[str] = field(default_factory=set)
    """The overrides that name the model by its published shape, as `model=llama3_8b` does."""
    replaced_tables: set[str] = field(default_factory=set)
    """Tables that were typed as a whole. Entries that an experiment or a run has in them are dropped."""
    number_from_files: int = 0
    """How many of `values` come from the user's settings files; they are the first ones, the others were typed."""
    resets: list[tuple[str, str]] = field(default_factory=list)
    """(key, override) of each `~key`, which sets a setting back to the default of the code."""
    meant_keys: set[str] = field(default_factory=set)
    """Settings that a wrong override was probably meant for. Validation complains that they are not set, which is not shown."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the tree: its type, and the group choices under which it exists (empty: always)."""

    type: Any
    available_under: tuple[str, ...] = ()


@cache
def settings() -> dict[str, Setting]:
    """Every setting of a run by its full key, under whatever choice it exists; `*` stands for names that the user chooses.

    Such as {"optim.lr": Setting(float | None), "tuning.rank": Setting(int, ("lora", "dora")), "data.sources.*.path": ...}.
    """
    from trainer.config.run import RunConfig
    from trainer.config.tree import keyed_fields

    settings_by_key: dict[str, Setting] = {}
    groups_with_classes = settings_classes()  # groups whose choices have different settings, such as `tuning`
    for keyed in keyed_fields(RunConfig):
        name, _, below = keyed.key.partition(".")
        if name in groups_with_classes and not below:
            settings_by_key |= _settings_under_choices(name)
        elif name not in groups_with_classes and not keyed.is_group:
            settings_by_key[keyed.key] = Setting(keyed.type)
    for key, setting in settings_by_key.items():
        # A setting that every choice of its group has needs none of them.
        all_choices = shipped_choices().get(key.split(".")[0], ())
        if set(setting.available_under) == set(all_choices):
            settings_by_key[key] = Setting(setting.type)
    # The schedules share one class, in which some settings mean something under some of them only.
    for name, schedules in MEANT_UNDER.items():
        key = f"schedule.{name}"
        settings_by_key[key] = Setting(settings_by_key[key].type, tuple(str(schedule) for schedule in schedules))
    del settings_by_key["substitutions"]  # what a run records about itself; nobody types it
    return settings_by_key


def _settings_under_choices(group: str) -> dict[str, Setting]:
    """The settings of a group such as `tuning` whose choices have different settings, each with the choices that have it."""
    from trainer.config.tree import keyed_fields

    # In the order of the classes, and not of the alphabet: messages list the choices so.
    order = [*settings_classes()[group], *shipped_choices()[group]]
    settings_by_key: dict[str, Setting] = {}
    for choice in sorted(shipped_choices()[group], key=order.index):
        for keyed_field in keyed_fields(settings_class_of(group, choice), group):
            if keyed_field.is_group:
                continue
            key = keyed_field.key
            earlier_choices = settings_by_key[key].available_under if key in settings_by_key else ()
            settings_by_key[key] = Setting(keyed_field.type, (*earlier_choices, choice))
    return settings_by_key


def field_key(settings_by_key: dict[str, Setting], key: str) -> str:
    """The key of the dataclass field behind a typed key.

    A field whose name would be a keyword of Python ends in an underscore (`tuning.from_`); it is typed without.
    """
    if key not in settings_by_key and f"{key}_" in settings_by_key:
        return f"{key}_"
    return key


def find_setting(settings_by_key: dict[str, Setting], key: str) -> Setting | None:
    """The setting behind a key as typed, also of an entry in a table (`data.sources.chat.path`); None if there is none.

    Tried are the key itself, then the key with `*` for one of its parts; of either, the table that it would be an entry of.
    """
    key = field_key(settings_by_key, key)
    parts = key.split(".")
    # `data.sources.chat.path` is known as `data.sources.*.path`: any part but the first may be a name of the user's.
    wildcard_keys = [".".join([*parts[:n], "*", *parts[n + 1 :]]) for n in range(1, len(parts))]
    for candidate in (key, *wildcard_keys):
        if candidate in settings_by_key:
            return settings_by_key[candidate]
        # An entry of a plain dictionary, as in `data.columns.text`.
        table = settings_by_key.get(candidate.rpartition(".")[0])
        if table is not None and get_origin(table.type) is dict:
            entry_type = get_args(table.type)[1]
            # `Any` alone would be read as text. In a table of anything, numbers are numbers.
            if entry_type is Any:
                entry_type = object
            return Setting(entry_type, table.available_under)
    return None


def parse(overrides: list[str]) -> ParsedOverrides:
    """Sort command-line overrides into choices of groups and values of settings. What cannot be read becomes a problem.

    `tuning=lora optim.lr=1e-4 my.yaml` gives the choice `lora`, the value of `optim.lr`, and before it those of the file.
    """
    parsed = ParsedOverrides()
    settings_by_key = settings()
    overrides, parsed.problems = hints.take_split_settings(overrides, settings_by_key)
    foreign = hints.ForeignArguments(overrides, lambda key: find_setting(settings_by_key, key) is not None)
    # Files first, so that a typed override overrides what a file says.
    for override in overrides:
        if user_files.is_settings_file(override):
            _add_file(parsed, settings_by_key, override)
    parsed.number_from_files = len(parsed.values)
    for override in foreign.overrides:
        if user_files.is_settings_file(override):
            continue
        hint = foreign.hint(override)
        if hint is not None:
            parsed.problems.append(hint.problem)
            parsed.meant_keys |= hint.meant_keys
        elif override.startswith("~"):
            _add_reset(parsed, settings_by_key, override)
        else:
            _add_override(parsed, settings_by_key, override)
    parsed.problems += _contradictions(parsed)
    return parsed


def _add_override(parsed: ParsedOverrides, settings_by_key: dict[str, Setting], override: str) -> None:
    """Add one typed override `key=value` to `parsed`: as a choice of a group, a value of a setting, or a problem."""
    match = OVERRIDE_REGEX.fullmatch(override)
    if match is None or override.startswith("-"):
        parsed.problems.append(hints.explain_argument_without_value(override))
        return
    key = field_key(settings_by_key, match["key"])
    value = match["value"]
    if key.split(".")[0].split("/")[0] == "hydra":
        parsed.problems.append(hints.explain_hydra_setting(key, value, override))
    elif "_target_" in override:
        parsed.problems.append(f"{override}: {NO_TARGET}")
    elif key in choices_by_group():
        _add_choice(parsed, key, value, override)
    else:
        _add_setting(parsed, settings_by_key, key, value, override)


def _contradictions(parsed: ParsedOverrides) -> list[str]:
    """A problem for each two typed overrides of which one would be ignored: `~key` beside `key=...`, two names of the model."""
    problems = []
    typed = parsed.values[parsed.number_from_files :]
    problems += _two_models(typed, parsed.shape_overrides)
    for key, removal in parsed.resets:
        for typed_key, _, override in typed:
            if typed_key == key or typed_key.startswith(f"{key}."):
                problems.append(f"{removal}: {override} sets the same; leave one of the two out")
    return problems


def _two_models(values: list[TypedValue], shape_overrides: set[str]) -> list[str]:
    """A problem if values of one origin (the command line, or a file) name the model both by a shape and by `model.path`."""
    overrides = [value.override for value in values if value.key == MODEL_PATH]
    by_shape = [override for override in overrides if override in shape_overrides]
    by_path = [override for override in overrides if override not in shape_overrides]
    if not by_path or not by_shape:
        return []
    return [
        f"{by_shape[-1]}: {by_path[-1]} names another model; leave {by_shape[-1]} out to take the model of {MODEL_PATH}, or "
        f"leave {MODEL_PATH} out to take the published model of that name"
    ]


def needs_other_choice(key: str, override: str, setting: Setting) -> str:
    """The message about a setting that exists only under another choice of its group."""
    return f"{override}: needs {hints.needed_choice(key, setting.available_under)}; add it, or leave {key.removesuffix('_')} out"


def describe_type(annotation: Any) -> str:
    """What a value of a setting's type looks like, in words: `a whole number or null`."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(member.name for member in annotation)
    if get_origin(annotation) is list:
        return f"a list such as [a,b] of which each is {describe_type(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "pairs such as {a:b}"
    if get_args(annotation):
        return " or ".join(describe_type(part) for part in get_args(annotation))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(annotation, "a value")


def _add_file(parsed: ParsedOverrides, settings_by_key: dict[str, Setting], override: str) -> None:
    """Add the choices and values of the user's settings file to `parsed`, as if they had been typed; problems as well.

    `override`: the file as typed, such as `my.yaml`. A key of another trainer is a problem that names our setting.
    """
    try:
        choices, values = user_files.read_settings_file(override)
    except ConfigError as error:
        parsed.problems += error.problems
        return
    number_of_earlier_files = len(parsed.values)
    for group, choice in choices.items():
        if group in choices_by_group():
            _add_choice(parsed, group, choice, f"{override}: {group}: {choice}")
        else:
            parsed.problems.append(
                f"{override}: defaults: there is no group {group}; one of {', '.join(choices_by_group())}"
            )

    def is_ours(key: str) -> bool:
        return find_setting(settings_by_key, field_key(settings_by_key, key)) is not None

    foreign = hints.ForeignArguments([f"{key}={value}" for key, value in values], is_ours)
    for key, value in values:
        source = f"{override}: {key}: {value}"
        hint = foreign.hint(f"{key}={value}")
        if hint is not None:
            parsed.problems.append(f"{source}: {hint.reason}")
            parsed.meant_keys |= hint.meant_keys
        elif RESOLVED_BY_EACH_RANK.search(str(value)):
            parsed.problems.append(f"{source}: {RANKS_DISAGREE}")
        elif "_target_" in source:
            parsed.problems.append(f"{source}: {NO_TARGET}")
        elif key in (TASKS_TABLE, REWARDS_TABLE) and isinstance(value, list):
            _add_setting(parsed, settings_by_key, key, f"[{','.join(map(str, value))}]", source)
        else:
            parsed.values.append(TypedValue(field_key(settings_by_key, key), value, source))
    parsed.problems += _two_models(parsed.values[number_of_earlier_files:], parsed.shape_overrides)


def _add_reset(parsed: ParsedOverrides, settings_by_key: dict[str, Setting], override: str) -> None:
    """Add an override `~key` to `parsed`, which sets a setting back to its default; `~experiment` takes back the experiment."""
    key = field_key(settings_by_key, override.lstrip("~").partition("=")[0])
    is_table = any(name.startswith(f"{key}.") for name in settings_by_key)
    if key in WHOLE_RUN_GROUPS:
        parsed.choices[key] = "null"
    elif key in choices_by_group():
        another = "model.path=<directory or hub id>" if key == MODEL_GROUP else f"{key}={choices_by_group()[key][0]}"
        parsed.problems.append(f"{override}: cannot be removed; choose another one, for example {another}")
    elif key in settings_by_key or is_table:
        parsed.resets.append((key, override))
    else:
        unknown = hints.explain_unknown_key(key, override, settings_by_key)
        parsed.problems.append(unknown.problem)
        parsed.meant_keys |= unknown.meant_keys


def _add_choice(parsed: ParsedOverrides, group: str, choice: str, override: str) -> None:
    """Add the choice of a group to `parsed`, such as `tuning=lora`. `override`: as typed, for messages."""
    if means_a_shape(group, choice):
        parsed.values.append(TypedValue(MODEL_PATH, read_shape(choice).hub[0], override))
        parsed.shape_overrides.add(override)
    elif choice in choices_by_group()[group] or (group in WHOLE_RUN_GROUPS and choice == "null"):
        parsed.choices[group] = choice
    elif "," in choice:
        parsed.problems.append(f"{override}: several values are a sweep; add -m, or choose one")
    else:
        parsed.problems.append(hints.explain_unknown_choice(group, choice, override))
        parsed.meant_keys.add(group)


def _add_setting(
    parsed: ParsedOverrides, settings_by_key: dict[str, Setting], key: str, text: str, override: str
) -> None:
    """Add the value of a setting, typed as `text`, to `parsed`. Text stays as typed; the rest is read by Hydra's grammar.

    `override`: the whole argument, `key=text`, for messages. Gates, and lists of tasks or rewards, have a syntax of their own.
    """
    if RESOLVED_BY_EACH_RANK.search(text):
        parsed.problems.append(f"{override}: {RANKS_DISAGREE}")
        return
    # As in `gates={eval/loss: "<3"}`: `<` and `>` are no characters of Hydra's grammar.
    if key.split(".")[0] == GATES:
        gates, problem = read_word(override.lstrip("+"))
        if gates is None:
            parsed.problems.append(problem)
        parsed.values.append(TypedValue(GATES, gates or {}, override))
        return
    # `evaluation.tasks=[json,json:strict]`: each entry is a kind, with a name behind a colon if it is used twice.
    task_kinds = _list_entries(text) if key == TASKS_TABLE else None
    if task_kinds is not None:
        parsed.replaced_tables.add(key)
        for entry in task_kinds:
            kind, _, name = entry.partition(":")
            parsed.values.append(TypedValue(f"{key}.{name or kind}.kind", kind, override))
        return
    # `objective.rewards=[maths,rewards.py]`, or one of them without brackets.
    if key == REWARDS_TABLE and not text.startswith("{") and text != "null":
        entries = _list_entries(text)
        _add_rewards(parsed, [text] if entries is None else entries, override)
        return
    # Paths hold spaces, colons and equals signs that the grammar would take apart.
    setting = find_setting(settings_by_key, key)
    if setting is not None and _is_text_type(setting.type) and not _is_hydra_syntax(text):
        parsed.values.append(TypedValue(key, text, override))
        return
    _add_setting_by_grammar(parsed, settings_by_key, key, text, override)


def _add_rewards(parsed: ParsedOverrides, entries: list[str], override: str) -> None:
    """Add the rewards of `objective.rewards=[maths,rewards.py,more.py:brief]` to `parsed`.

    Each entry is a kind (with a name behind a colon if it is used twice), a Python file that stands for all its reward functions,
    or one function of a file. `maths` sets `objective.rewards.maths.kind`, `more.py:brief` `objective.rewards.brief.function`.
    """
    parsed.replaced_tables.add(REWARDS_TABLE)
    # Of several such overrides the last one counts, as of any setting. Entries that were typed by themselves stay.
    table_override = re.compile(rf"[+]*{re.escape(REWARDS_TABLE)}\s*[=:]")
    parsed.values = [value for value in parsed.values if not table_override.match(value.override)]
    for entry in entries:
        path, function = split_function(entry)
        if path.suffix != ".py":
            kind, _, name = entry.partition(":")
            parsed.values.append(TypedValue(f"{REWARDS_TABLE}.{name or kind}.kind", kind, override))
            continue
        names = [function]
        if not function:
            try:
                names = [*functions_of(path)]
            except ConfigError as error:
                parsed.problems += [f"{override}: {problem}" for problem in error.problems]
                parsed.meant_keys.add(REWARDS_TABLE)
                continue
            if not names:
                parsed.meant_keys.add(REWARDS_TABLE)
                parsed.problems.append(f"{override}: {path.name} has no reward function; {WHAT_IS_A_REWARD}")
        for name in names:
            parsed.values.append(TypedValue(f"{REWARDS_TABLE}.{name}.function", f"{path}:{name}", override))


def _add_setting_by_grammar(
    parsed: ParsedOverrides, settings_by_key: dict[str, Setting], key: str, text: str, override: str
) -> None:
    """Add a value that Hydra's own parser reads to `parsed`: a number, a list, a dictionary or null.

    A sweep of values is a problem here. What the parser cannot read is a list of paths, for a setting of text, or a problem.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed_override = OverridesParser.create().parse_override(f"{key}={text}")
        if parsed_override.is_sweep_override():  # choice(...), range(...), or a value with commas
            is_range = re.match(r"(interval|tag)\(", text) is not None
            remedy = "a range is searched: add -m sweeper=optuna" if is_range else "several values are a sweep; add -m"
            parsed.problems.append(f"{override}: {remedy}, or give one")
            return
        parsed.values += _values_of_override(key, parsed_override.value(), override)
    except (HydraException, NotImplementedError) as error:
        setting = find_setting(settings_by_key, key)
        if setting is None:
            unknown = hints.explain_unknown_key(key, override, settings_by_key)
            parsed.problems.append(unknown.problem)
            parsed.meant_keys |= unknown.meant_keys
        elif _is_text_type(setting.type) and text.startswith("["):
            # A list of paths with characters that the grammar would want quoted.
            paths = [part.strip().strip("'\"") for part in text[1:-1].split(",")]
            parsed.values.append(TypedValue(key, paths, override))
        else:
            reason = str(error).splitlines()[0].split(" See https")[0]
            parsed.problems.append(f"{override}: cannot be read ({reason}); {key} is {describe_type(setting.type)}")
            parsed.meant_keys.add(key)


def _values_of_override(key: str, value: Any, override: str) -> list[TypedValue]:
    """The settings that one override sets: `budget={epochs: 3}` and `batch={...}` one for each entry, any other only `key`."""
    if key not in ("batch", "budget") or not isinstance(value, dict):
        return [TypedValue(key, value, override)]
    return [TypedValue(f"{key}.{name}", entry, override) for name, entry in value.items()]


def _list_entries(text: str) -> list[str] | None:
    """The entries of `[a,b]` without quotes and empty ones; None if the text is no list."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    entries = []
    for part in text[1:-1].split(","):
        entry = part.strip().strip("'\"")
        if entry:
            entries.append(entry)
    return entries


def _is_text_type(annotation: Any) -> bool:
    """Whether a setting of this type takes the typed characters as they are: `str`, or paths and patterns (`Any`)."""
    if get_origin(annotation) is dict:
        return False
    alternatives = set(get_args(annotation))
    is_optional_text = bool(alternatives) and alternatives <= {str, type(None)}
    return annotation in (str, Any) or is_optional_text


def _is_hydra_syntax(text: str) -> bool:
    """Whether a typed value is meant for Hydra's grammar: null, a list, a dictionary, or quoted as a whole."""
    is_quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    is_list = text.startswith("[") and text.endswith("]")
    is_pairs = text.startswith("{") and text.endswith("}") and ":" in text
    return text == "null" or is_quoted or is_list or is_pairs
