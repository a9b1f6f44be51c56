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
    is_published_shape_choice,
    settings_class_of,
    settings_classes_by_group,
    shipped_choices_by_group,
)
from strategies.errors import ConfigError
from trainer.export.gates.bounds import parse_gate_argument
from trainer.model.known_shapes import read_shape
from trainer.objectives.reward_functions import WHAT_IS_A_REWARD, parse_function_path, reward_functions_in_file
from trainer.optim.schedule import SCHEDULES_BY_SETTING

TASKS_TABLE = "evaluation.tasks"
"""A table for which a list of kinds can be typed: `[json,json:strict]` makes the entries `json` and `strict` of kind json."""
REWARDS_TABLE = "objective.rewards"
"""A table for which Python files and kinds can be typed: `rewards.py` makes an entry of each reward function of the file."""
GATES_GROUP = "gates"
"""A table of bounds such as `eval/loss<2`, which Hydra's grammar cannot read."""
RESOLVED_BY_EACH_RANK_REGEX = re.compile(r"\$\{\s*(now|hydra)\s*:")
"""Interpolations that every process would resolve for itself, each at its own time."""
RANKS_DISAGREE_REASON = "could differ between processes; write the value itself"
MODEL_PATH_KEY = "model.path"
"""What `model=<name of a published shape>` sets."""
NO_TARGET_REASON = "`_target_` is not used here and never runs anything; remove it"
OVERRIDE_REGEX = re.compile(r"[+]{0,2}(?P<key>[^=\s]+?)=(?P<value>.*)", re.DOTALL)


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
    """Tables that were typed as a whole. Entries that an experiment or a run has in them are dropped."""
    num_file_values: int = 0
    """How many of `values` come from the user's settings files. Those stand first; the others were set on the command line."""
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
def all_settings() -> dict[str, Setting]:
    """Every setting of a run by its full key, under whatever choice it exists; `*` stands for names that the user chooses.

    Such as {"optim.lr": Setting(float | None), "tuning.rank": Setting(int, ("lora", "dora")), "data.sources.*.path": ...}.
    """
    from trainer.config.run import RunConfig
    from trainer.config.tree import keyed_fields

    settings_by_key: dict[str, Setting] = {}
    groups_with_classes = settings_classes_by_group()  # groups whose choices have different settings, such as `tuning`
    for keyed_field in keyed_fields(RunConfig):
        group, _, key_in_group = keyed_field.key.partition(".")
        if group in groups_with_classes and not key_in_group:
            settings_by_key |= _settings_under_choices(group)
        elif group not in groups_with_classes and not keyed_field.is_group:
            settings_by_key[keyed_field.key] = Setting(keyed_field.type)
    for key, setting in settings_by_key.items():
        # A setting that every choice of its group has needs none of them.
        all_choices = shipped_choices_by_group().get(key.split(".")[0], ())
        if set(setting.available_under) == set(all_choices):
            settings_by_key[key] = Setting(setting.type)
    # The schedules share one class, in which some settings mean something under some of them only.
    for name, schedules in SCHEDULES_BY_SETTING.items():
        key = f"schedule.{name}"
        settings_by_key[key] = Setting(settings_by_key[key].type, tuple(str(schedule) for schedule in schedules))
    del settings_by_key["substitutions"]  # what a run records about itself; nobody types it
    return settings_by_key


def _settings_under_choices(group: str) -> dict[str, Setting]:
    """The settings of a group such as `tuning` whose choices have different settings, each with the choices that have it.

    Such as {"tuning.rank": Setting(int, ("lora", "dora")), ...}.
    """
    from trainer.config.tree import keyed_fields

    # In the order of the classes, and not of the alphabet, because messages list the choices in this order.
    ordered_choices = [*settings_classes_by_group()[group], *shipped_choices_by_group()[group]]
    settings_by_key: dict[str, Setting] = {}
    for choice in sorted(shipped_choices_by_group()[group], key=ordered_choices.index):
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
    """The setting that a key on the command line or in a file means; None if there is none. Such as:

    - `optim.lr`: the setting of this key;
    - `data.sources.chat.path`: the setting `data.sources.*.path`, because the user chooses the name `chat`;
    - `data.columns.text`: an entry of the dictionary `data.columns`, with the type of its values.
    """
    key = field_key(settings_by_key, key)
    names = key.split(".")
    # Any name but the first may be the user's own.
    wildcard_keys = [".".join([*names[:n], "*", *names[n + 1 :]]) for n in range(1, len(names))]
    for candidate in (key, *wildcard_keys):
        if candidate in settings_by_key:
            return settings_by_key[candidate]
        table = settings_by_key.get(candidate.rpartition(".")[0])
        if table is not None and get_origin(table.type) is dict:
            entry_type = get_args(table.type)[1]
            # A setting of type `Any` holds text as typed (see `_is_text_type`), but in a table of anything numbers are numbers.
            if entry_type is Any:
                entry_type = object
            return Setting(entry_type, table.available_under)
    return None


def parse_overrides(overrides: list[str]) -> ParsedOverrides:
    """Sort command-line overrides into choices of groups and values of settings. What cannot be read becomes a problem.

    `tuning=lora optim.lr=1e-4 my.yaml` gives the choice `lora`, the values in the file and, behind them, that of `optim.lr`.
    """
    parsed = ParsedOverrides()
    settings_by_key = all_settings()
    overrides, parsed.problems = hints.take_out_split_settings(overrides, settings_by_key)
    foreign = hints.ForeignOverrides(overrides, lambda key: find_setting(settings_by_key, key) is not None)
    # Files first, because the last value of a key counts, and the command line goes before a file.
    for override in overrides:
        if user_files.is_settings_file(override):
            _add_settings_file(parsed, settings_by_key, override)
    parsed.num_file_values = len(parsed.values)
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
    parsed.problems += _contradiction_problems(parsed)
    return parsed


def _add_override(parsed: ParsedOverrides, settings_by_key: dict[str, Setting], override: str) -> None:
    """Add one override `key=value` to `parsed`: as a choice of a group, a value of a setting, or a problem.

    Problems: text that is no `key=value`, settings of Hydra itself, and `_target_`, with which Hydra would call a function.
    """
    match = OVERRIDE_REGEX.fullmatch(override)
    if match is None or override.startswith("-"):
        parsed.problems.append(hints.explain_argument_without_value(override))
        return
    key = field_key(settings_by_key, match["key"])
    value = match["value"]
    if re.match(r"hydra([./]|$)", key):
        parsed.problems.append(hints.explain_hydra_setting(key, value, override))
    elif "_target_" in override:
        parsed.problems.append(f"{override}: {NO_TARGET_REASON}")
    elif key in choices_by_group():
        _add_choice(parsed, key, value, override)
    else:
        _add_setting(parsed, settings_by_key, key, value, override)


def _contradiction_problems(parsed: ParsedOverrides) -> list[str]:
    """A problem for each two overrides of which one would be ignored: `~key` beside `key=...`, or two names of the model."""
    cli_values = parsed.values[parsed.num_file_values :]
    problems = _two_models_problems(cli_values)
    for reset_key, reset_override in parsed.resets:
        for cli_value in cli_values:
            if cli_value.key == reset_key or cli_value.key.startswith(f"{reset_key}."):
                problems.append(f"{reset_override}: {cli_value.source_text} sets the same; leave one of the two out")
    return problems


def _two_models_problems(values: list[SettingValue]) -> list[str]:
    """A problem if `values` name the model twice, by a shape (`model=llama3_8b`) and by `model.path`; otherwise empty.

    `values`: those of the command line, or those of one file. A file and the command line may name two: the latter counts.
    """
    model_values = [value for value in values if value.key == MODEL_PATH_KEY]
    shape_overrides = [value.source_text for value in model_values if value.is_published_shape]
    path_overrides = [value.source_text for value in model_values if not value.is_published_shape]
    if not path_overrides or not shape_overrides:
        return []
    shape_override = shape_overrides[-1]  # the last value of a key counts
    return [
        f"{shape_override}: {path_overrides[-1]} names another model; leave {shape_override} out to take the model of "
        f"{MODEL_PATH_KEY}, or leave {MODEL_PATH_KEY} out to take the published model of that name"
    ]


def needed_choice_problem(key: str, override: str, setting: Setting) -> str:
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
        return " or ".join(describe_type(member) for member in get_args(annotation))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(annotation, "a value")


def _add_settings_file(parsed: ParsedOverrides, settings_by_key: dict[str, Setting], override: str) -> None:
    """Add the choices and values of the settings file that `override` names (`my.yaml`) to `parsed`, or problems.

    Problems: a file that cannot be read, an unknown group, a setting of another trainer, an interpolation that differs between
    processes, and `_target_`. The keys of settings are checked later, when they are applied.
    """
    try:
        choices, values = user_files.read_settings_file(override)
    except ConfigError as error:
        parsed.problems += error.problems
        return
    num_earlier_values = len(parsed.values)
    for group, choice in choices.items():
        if group in choices_by_group():
            _add_choice(parsed, group, choice, f"{override}: {group}: {choice}")
        else:
            parsed.problems.append(
                f"{override}: defaults: there is no group {group}; one of {', '.join(choices_by_group())}"
            )

    def is_ours(key: str) -> bool:
        return find_setting(settings_by_key, field_key(settings_by_key, key)) is not None

    foreign = hints.ForeignOverrides([f"{key}={value}" for key, value in values], is_ours)
    for key, value in values:
        source_text = f"{override}: {key}: {value}"
        hint = foreign.hint(f"{key}={value}")
        if hint is not None:
            parsed.problems.append(f"{source_text}: {hint.reason}")
            parsed.meant_keys |= hint.meant_keys
        elif RESOLVED_BY_EACH_RANK_REGEX.search(str(value)):
            parsed.problems.append(f"{source_text}: {RANKS_DISAGREE_REASON}")
        elif "_target_" in source_text:
            parsed.problems.append(f"{source_text}: {NO_TARGET_REASON}")
        elif key in (TASKS_TABLE, REWARDS_TABLE) and isinstance(value, list):
            # Such a list has a syntax of its own, which is read in the form that it has on the command line.
            _add_setting(parsed, settings_by_key, key, f"[{','.join(map(str, value))}]", source_text)
        else:
            parsed.values.append(SettingValue(field_key(settings_by_key, key), value, source_text))
    parsed.problems += _two_models_problems(parsed.values[num_earlier_values:])


def _add_reset(parsed: ParsedOverrides, settings_by_key: dict[str, Setting], override: str) -> None:
    """Add an override `~key` to `parsed`. By what the key names:

    - `~experiment`, or another group that sets a whole run: the choice is taken back;
    - `~tuning`, another group: a problem, because one of its choices is needed;
    - `~optim.lr`, a setting, or `~data.columns`, a table of settings: it is set back to its default;
    - anything else: a problem.
    """
    key = field_key(settings_by_key, override.lstrip("~").partition("=")[0])
    is_table = any(setting_key.startswith(f"{key}.") for setting_key in settings_by_key)
    if key in WHOLE_RUN_GROUPS:
        parsed.choices[key] = "null"
    elif key in choices_by_group():
        example = "model.path=<directory or hub id>" if key == MODEL_GROUP else f"{key}={choices_by_group()[key][0]}"
        parsed.problems.append(f"{override}: cannot be removed; choose another one, for example {example}")
    elif key in settings_by_key or is_table:
        parsed.resets.append((key, override))
    else:
        unknown = hints.explain_unknown_key(key, override, settings_by_key)
        parsed.problems.append(unknown.problem)
        parsed.meant_keys |= unknown.meant_keys


def _add_choice(parsed: ParsedOverrides, group: str, choice: str, source_text: str) -> None:
    """Add the choice of a group to `parsed`, such as `tuning=lora`. `source_text`: what chooses it, for messages.

    A published shape (`model=llama3_8b`) becomes a value of `model.path`. Several choices, and an unknown one, are problems.
    """
    if is_published_shape_choice(group, choice):
        hub_id = read_shape(choice).hub[0]
        parsed.values.append(SettingValue(MODEL_PATH_KEY, hub_id, source_text, is_published_shape=True))
    elif choice in choices_by_group()[group] or (group in WHOLE_RUN_GROUPS and choice == "null"):
        parsed.choices[group] = choice
    elif "," in choice:
        parsed.problems.append(f"{source_text}: several values are a sweep; add -m, or choose one")
    else:
        parsed.problems.append(hints.explain_unknown_choice(group, choice, source_text))
        parsed.meant_keys.add(group)


def _add_setting(
    parsed: ParsedOverrides, settings_by_key: dict[str, Setting], key: str, text: str, source_text: str
) -> None:
    """Add the value of a setting, typed as `text`, to `parsed`. Text stays as typed; the rest is read by Hydra's grammar.

    Gates, and lists of tasks or rewards, have a syntax of their own. `source_text`: what sets it, for messages.
    """
    if RESOLVED_BY_EACH_RANK_REGEX.search(text):
        parsed.problems.append(f"{source_text}: {RANKS_DISAGREE_REASON}")
        return
    # Gates such as `gates={eval/loss: "<3"}`, since `<` and `>` are no characters of Hydra's grammar.
    if key.split(".")[0] == GATES_GROUP:
        gates, problem = parse_gate_argument(source_text.lstrip("+"))
        if gates is None:
            parsed.problems.append(problem)
        parsed.values.append(SettingValue(GATES_GROUP, gates or {}, source_text))
        return
    # Tasks such as `evaluation.tasks=[json,json:strict]`: each is a kind, with a name behind a colon if it is used twice.
    task_kinds = _list_entries(text) if key == TASKS_TABLE else None
    if task_kinds is not None:
        parsed.replaced_tables.add(key)
        for entry in task_kinds:
            kind, _, name = entry.partition(":")
            parsed.values.append(SettingValue(f"{key}.{name or kind}.kind", kind, source_text))
        return
    # Rewards such as `objective.rewards=[maths,rewards.py]`, or one of them without brackets.
    if key == REWARDS_TABLE and not text.startswith("{") and text != "null":
        entries = _list_entries(text)
        _add_rewards(parsed, [text] if entries is None else entries, source_text)
        return
    # Text stays as typed, because paths hold spaces, colons and equals signs that the grammar would take apart.
    setting = find_setting(settings_by_key, key)
    if setting is not None and _is_text_type(setting.type) and not _is_hydra_syntax(text):
        parsed.values.append(SettingValue(key, text, source_text))
        return
    _add_setting_by_grammar(parsed, settings_by_key, key, text, source_text)


def _add_rewards(parsed: ParsedOverrides, entries: list[str], source_text: str) -> None:
    """Add the rewards of `objective.rewards=[maths,rewards.py,more.py:brief]` to `parsed`.

    Each entry is a kind (with a name behind a colon if it is used twice), a Python file that stands for all its reward functions,
    or one function of a file. `maths` sets `objective.rewards.maths.kind`, `more.py:brief` `objective.rewards.brief.function`.
    """
    parsed.replaced_tables.add(REWARDS_TABLE)
    # Of several such overrides the last one counts, as of any setting. Entries that were typed by themselves stay:
    # `objective.rewards.maths.weight=2` does not match.
    whole_table_regex = re.compile(rf"[+]*{re.escape(REWARDS_TABLE)}\s*[=:]")
    parsed.values = [value for value in parsed.values if not whole_table_regex.match(value.source_text)]
    for entry in entries:
        path, function = parse_function_path(entry)  # `more.py:brief` -> (more.py, "brief"); the function may be empty
        if path.suffix != ".py":
            kind, _, name = entry.partition(":")
            parsed.values.append(SettingValue(f"{REWARDS_TABLE}.{name or kind}.kind", kind, source_text))
            continue
        function_names = [function]
        if not function:
            try:
                function_names = [*reward_functions_in_file(path)]
            except ConfigError as error:
                parsed.problems += [f"{source_text}: {problem}" for problem in error.problems]
                parsed.meant_keys.add(REWARDS_TABLE)
                continue
            if not function_names:
                parsed.meant_keys.add(REWARDS_TABLE)
                parsed.problems.append(f"{source_text}: {path.name} has no reward function; {WHAT_IS_A_REWARD}")
        for name in function_names:
            parsed.values.append(SettingValue(f"{REWARDS_TABLE}.{name}.function", f"{path}:{name}", source_text))


def _add_setting_by_grammar(
    parsed: ParsedOverrides, settings_by_key: dict[str, Setting], key: str, text: str, source_text: str
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
            parsed.problems.append(f"{source_text}: {remedy}, or give one")
            return
        parsed.values += _values_of_override(key, parsed_override.value(), source_text)
    except (HydraException, NotImplementedError) as error:
        setting = find_setting(settings_by_key, key)
        if setting is None:
            unknown = hints.explain_unknown_key(key, source_text, settings_by_key)
            parsed.problems.append(unknown.problem)
            parsed.meant_keys |= unknown.meant_keys
        elif _is_text_type(setting.type) and text.startswith("["):
            # A list of paths with characters that the grammar would want quoted.
            paths = [entry.strip().strip("'\"") for entry in text[1:-1].split(",")]
            parsed.values.append(SettingValue(key, paths, source_text))
        else:
            reason = str(error).splitlines()[0].split(" See https")[0]
            parsed.problems.append(f"{source_text}: cannot be read ({reason}); {key} is {describe_type(setting.type)}")
            parsed.meant_keys.add(key)


def _values_of_override(key: str, value: Any, source_text: str) -> list[SettingValue]:
    """The settings that one override sets. By its key and value:

    - `budget={epochs: 3}`, `batch={...}`: one for each entry, such as `budget.epochs`;
    - anything else: the setting `key` itself.
    """
    if key not in ("batch", "budget") or not isinstance(value, dict):
        return [SettingValue(key, value, source_text)]
    return [SettingValue(f"{key}.{name}", entry, source_text) for name, entry in value.items()]


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
