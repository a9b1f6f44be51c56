"""Reads the overrides `key=value` of the command line, without stopping at the first mistake.

Group choices are separated from values. Paths and other text stay as typed. Every override that cannot be used gets a
line with what was probably meant. Hydra's own parser reads everything that is not text.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, get_args, get_origin

from launch.config import hints, user_files
from launch.config.choices import (
    MODEL_GROUP,
    WHOLE_RUN_GROUPS,
    choices_by_group,
    is_published_shape_choice,
)
from launch.config.known_settings import all_settings, find_setting, key_with_underscore
from launch.config.parsed_overrides import ParsedOverrides, SettingValue
from strategies.errors import ConfigError
from trainer.export.gates.bounds import parse_gate_argument
from trainer.model.known_shapes import read_shape
from trainer.objectives.reward_functions import REWARD_DEFINITION_TEXT, parse_function_path, reward_functions_in_file

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
SWEEP_ADVICE = "several values are a sweep; add -m, or give one"
SEARCH_ADVICE = "a range is searched: add -m sweeper=optuna, or give one"
OVERRIDE_REGEX = re.compile(r"[+]{0,2}(?P<key>[^=\s]+?)=(?P<value>.*)", re.DOTALL)
"""`optim.lr=1e-4`, or with Hydra's plus signs `+optim.lr=1e-4`: the key `optim.lr`, the value `1e-4`."""


def parse_overrides(overrides: list[str]) -> ParsedOverrides:
    """Sort the arguments of a command line into choices of groups, values of settings, and problems; composing them comes later.

    `overrides`: `key=value`, `~key`, or settings files.
    `tuning=lora optim.lr=1e-4 my.yaml` gives the choice {"tuning": "lora"}, the values in the file and, behind them, that of
    `optim.lr`.
    Nothing is raised: what cannot be read becomes a problem, so that all are shown together.
    """
    overrides, split_problems = hints.separate_settings_split_at_spaces(overrides)
    from_files = ParsedOverrides(problems=split_problems)
    for override in overrides:
        if user_files.is_settings_file(override):
            from_files = from_files.followed_by(_parse_settings_file(override))
    from_command_line = _parse_command_line(overrides)
    parsed = from_files.followed_by(from_command_line)
    # Those of files come first, wherever the file stood on the command line: what is typed always counts more.
    parsed.num_file_values = len(parsed.values) - len(from_command_line.values)
    parsed.problems += _contradiction_problems(parsed)
    return parsed


def _parse_command_line(overrides: list[str]) -> ParsedOverrides:
    """Sort the overrides that are no settings files into choices of groups, values of settings, and problems.

    Settings of other trainers, such as `--learning_rate 1e-4`, become problems that say what to type here.
    """
    parsed = ParsedOverrides()
    of_other_trainers = hints.OverridesOfOtherTrainers(overrides)
    # Here `--learning_rate 1e-4` has become one argument.
    for override in of_other_trainers.overrides:
        if user_files.is_settings_file(override):
            continue
        refused = of_other_trainers.explain(override)
        if refused is not None:  # a setting of another trainer, such as `--learning_rate 1e-4`
            parsed.add_problem(refused.problem, refused.probably_meant_keys)
        elif override.startswith("~"):
            _add_reset(parsed, override)
        else:
            _add_override(parsed, override)
    return parsed


def _add_override(parsed: ParsedOverrides, override: str) -> None:
    """Add one argument `key=value` of a command line to `parsed`: as a choice of a group, a value of a setting, or a problem.

    Problems are text that is no `key=value`, settings of Hydra itself, and `_target_`, with which Hydra would call a function.
    """
    match = OVERRIDE_REGEX.fullmatch(override)
    if match is None or override.startswith("-"):
        parsed.add_problem(hints.explain_argument_without_value(override))
        return
    # `tuning.from` means the field `from_`, since `from` is a keyword of Python.
    key = key_with_underscore(match["key"])
    value = match["value"]
    if re.match(r"hydra([./]|$)", key):
        parsed.add_problem(hints.explain_hydra_setting(key, value, override))
    elif "_target_" in override:
        parsed.add_problem(f"{override}: {NO_TARGET_REASON}")
    elif key in choices_by_group():
        _add_choice(parsed, key, value, override)
    else:
        _add_setting(parsed, key, value, override)


def _contradiction_problems(parsed: ParsedOverrides) -> list[str]:
    """A problem for each two typed overrides of which one would be silently ignored: `~key` beside `key=...`, or two models.

    Values of files are left out: to override a file is what the command line is for.
    """
    problems = _two_models_problems(parsed.cli_values)
    for reset_key, reset_override in parsed.resets:
        for cli_value in parsed.cli_values:
            if cli_value.key == reset_key or cli_value.key.startswith(f"{reset_key}."):
                problems.append(f"{reset_override}: {cli_value.source_text} sets the same; leave one of the two out")
    return problems


def _two_models_problems(values: list[SettingValue]) -> list[str]:
    """A problem if `values` name the model twice, by `model=llama3_8b` (which sets `model.path` too) and by `model.path=...`.

    `llama3_8b` is a published shape: a model whose layer sizes are known, so that it can be planned without its files. `values`:
    those of the command line, or those of one file. A file and the command line may name two: the latter counts.
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


def describe_type(annotation: Any) -> str:
    """Say in words what a setting of this type takes, for messages: `int | None` is "a whole number or null"."""
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


def _parse_settings_file(override: str) -> ParsedOverrides:
    """Read a user's settings file, as named on the command line, into choices, values and problems.

    `override`: the file, `my.yaml`.
    Problems: a file that cannot be read, an unknown group, a value that cannot be used, and two names of the model.
    """
    parsed = ParsedOverrides()
    try:
        choices, values = user_files.read_settings_file(override)
    except ConfigError as error:
        parsed.problems += error.problems
        parsed.has_unread_file = True
        return parsed
    if not choices and not values:
        parsed.empty_file_problems.append(
            f"{override}: is empty: it sets nothing; write settings, as in `tuning: lora` or `optim: {{lr: 2e-4}}`"
        )
    for group, choice in choices.items():
        if group in choices_by_group():
            _add_choice(parsed, group, choice, f"{override}: {group}: {choice}")
        else:
            parsed.add_problem(
                f"{override}: defaults: there is no group {group}; one of {', '.join(choices_by_group())}"
            )
    _add_file_values(parsed, override, values)
    parsed.problems += _two_models_problems(parsed.values)
    return parsed


def _add_file_values(parsed: ParsedOverrides, file_name: str, values: list[tuple[str, Any]]) -> None:
    """Add the values of a user's settings file to `parsed`, or problems that name the file and what stands there.

    `values`: (full key, value) pairs in the file's order.
    Problems: a setting of another trainer, an interpolation that differs between processes, and `_target_`. Whether a key exists
    is checked later, when the values are applied.
    """
    of_other_trainers = hints.OverridesOfOtherTrainers([f"{key}={value}" for key, value in values])
    for key, value in values:
        source_text = f"{file_name}: {key}: {value}"
        refused = of_other_trainers.explain(f"{key}={value}")
        if refused is not None:  # a setting of another trainer, such as `learning_rate: 1e-4`
            parsed.add_problem(f"{source_text}: {refused.reason}", refused.probably_meant_keys)
        elif RESOLVED_BY_EACH_RANK_REGEX.search(str(value)):
            parsed.add_problem(f"{source_text}: {RANKS_DISAGREE_REASON}")
        elif "_target_" in source_text:
            parsed.add_problem(f"{source_text}: {NO_TARGET_REASON}")
        elif key in (TASKS_TABLE, REWARDS_TABLE) and isinstance(value, list):
            # Such a list has a syntax of its own, which is read in the form that it has on the command line.
            _add_setting(parsed, key, f"[{','.join(map(str, value))}]", source_text)
        else:
            parsed.add_value(key_with_underscore(key), value, source_text)


def _add_reset(parsed: ParsedOverrides, override: str) -> None:
    """Add an argument `~key` of the command line to `parsed`: it takes back what a file or an experiment sets.

    By what the key names:

    - `~experiment`, or another group that sets a whole run: the choice is taken back;
    - `~tuning`, another group: a problem, because one of its choices is needed;
    - `~optim.lr`, a setting, or `~data.columns`, a table of settings: it is set back to its default;
    - anything else: a problem.
    """
    key = key_with_underscore(override.lstrip("~").partition("=")[0])
    is_table = any(setting_key.startswith(f"{key}.") for setting_key in all_settings())
    if key in WHOLE_RUN_GROUPS:
        parsed.choices[key] = "null"
    elif key in choices_by_group():
        example = "model.path=<directory or hub id>" if key == MODEL_GROUP else f"{key}={choices_by_group()[key][0]}"
        parsed.add_problem(f"{override}: cannot be removed; choose another one, for example {example}")
    elif key in all_settings() or is_table:
        parsed.resets.append((key, override))
    else:
        refused = hints.explain_unknown_key(key, override)
        parsed.add_problem(refused.problem, refused.probably_meant_keys)


def _add_choice(parsed: ParsedOverrides, group: str, choice: str, source_text: str) -> None:
    """Add the choice of a group to `parsed`, such as `tuning=lora`: a file of conf/ with that name, which sets several settings.

    `model=llama3_8b` may also be a published model whose layer sizes we know (its shape); it becomes a value of `model.path`.
    Several choices, and an unknown one, are problems.
    `source_text`: what chooses it, for messages.
    """
    if is_published_shape_choice(group, choice):
        hub_id = read_shape(choice).hub[0]  # several hub ids may have this shape; the first is meant
        parsed.values.append(SettingValue(MODEL_PATH_KEY, hub_id, source_text, is_published_shape=True))
    # Groups such as `experiment` may be turned off by `null`.
    elif choice in choices_by_group()[group] or (group in WHOLE_RUN_GROUPS and choice == "null"):
        parsed.choices[group] = choice
    elif "," in choice:
        parsed.add_problem(f"{source_text}: {SWEEP_ADVICE}")
    else:
        parsed.add_problem(hints.explain_unknown_choice(group, choice, source_text), [group])


def _add_setting(parsed: ParsedOverrides, key: str, text: str, source_text: str) -> None:
    """Add the value of one setting to `parsed`, read from its text by the syntax that the key calls for.

    `key`, `text`: the halves of `optim.lr=1e-4`.
    `source_text`: what sets it, for messages: the override, or file, key and value.
    The cases, in order:

    - an interpolation that every process would resolve for itself, such as `${now:%H}`: a problem;
    - gates, a list of tasks, and rewards: each has a syntax of its own;
    - a setting of text: as typed, because paths hold spaces, colons and equals signs that Hydra's grammar would take apart;
    - anything else: by Hydra's grammar.
    """
    setting = find_setting(key)
    task_entries = _list_entries(text) if key == TASKS_TABLE else None
    if RESOLVED_BY_EACH_RANK_REGEX.search(text):
        parsed.add_problem(f"{source_text}: {RANKS_DISAGREE_REASON}")
    elif key.split(".")[0] == GATES_GROUP:
        _add_gates(parsed, source_text)
    elif task_entries is not None:
        _add_tasks(parsed, task_entries, source_text)
    elif key == REWARDS_TABLE and not text.startswith("{") and text != "null":
        entries = _list_entries(text)
        _add_rewards(parsed, [text] if entries is None else entries, source_text)  # one may be typed without brackets
    elif setting is not None and _is_text_type(setting.type) and not _is_hydra_syntax(text):
        parsed.add_value(key, text, source_text)  # as typed
    else:
        _add_setting_by_grammar(parsed, key, text, source_text)


def _add_gates(parsed: ParsedOverrides, source_text: str) -> None:
    """Add the gates of an override to `parsed`, or a problem: bounds that a finished model must meet before it is exported.

    `source_text`: the whole override, `gates.eval/loss=<3` or `gates={eval/loss: "<3"}`.
    It has a parser of its own, because `<` and `>` are no characters of Hydra's grammar.
    """
    gates: dict[str, Any] = {}
    try:
        gates = parse_gate_argument(source_text.lstrip("+"))
    except ConfigError as error:
        parsed.add_problem(str(error))
    parsed.add_value(GATES_GROUP, gates, source_text)


def _add_tasks(parsed: ParsedOverrides, entries: list[str], source_text: str) -> None:
    """Add the evaluation tasks of `evaluation.tasks=[json,json:strict]` to `parsed`. They replace all tasks of an experiment.

    `entries`: each a kind of task, with a name behind a colon if it is used twice: `json:strict` sets
        `evaluation.tasks.strict.kind` to `json`.
    """
    parsed.replace_table(TASKS_TABLE)
    for entry in entries:
        kind, _, name = entry.partition(":")
        parsed.add_value(f"{TASKS_TABLE}.{name or kind}.kind", kind, source_text)


def _add_rewards(parsed: ParsedOverrides, entries: list[str], source_text: str) -> None:
    """Add the rewards of `objective.rewards=[maths,rewards.py,more.py:brief]` to `parsed`. They replace all earlier rewards."""
    parsed.replace_table(REWARDS_TABLE)
    for entry in entries:
        _add_reward_entry(parsed, entry, source_text)


def _add_reward_entry(parsed: ParsedOverrides, entry: str, source_text: str) -> None:
    """Turn one entry of the list `objective.rewards=[...]`, as typed or read from a settings file, into settings in `parsed`.

    `entry`: one of

    - a built-in kind: `maths` sets `objective.rewards.maths.kind`; `maths:easy` names the reward `easy`, for a kind used twice;
    - one function of a Python file: `more.py:brief` sets `objective.rewards.brief.function` to `more.py:brief`;
    - a Python file: `more.py` does that for each reward function in it.

    `source_text`: the whole override, for messages.
    Raises nothing: a file that cannot be read, or that has no reward function, becomes a problem in `parsed`.
    """
    path, function = parse_function_path(entry)  # `more.py:brief` -> (more.py, "brief"); `more.py` -> (more.py, "")
    if path.suffix != ".py":
        kind, _, name = entry.partition(":")
        parsed.add_value(f"{REWARDS_TABLE}.{name or kind}.kind", kind, source_text)
        return
    function_names = [function]
    if not function:
        try:
            function_names = [*reward_functions_in_file(path)]
        except ConfigError as error:
            # The table is named too, so that validation does not complain as well that no reward is set.
            for problem in error.problems:
                parsed.add_problem(f"{source_text}: {problem}", [REWARDS_TABLE])
            return
        if not function_names:
            parsed.add_problem(
                f"{source_text}: {path.name} has no reward function; {REWARD_DEFINITION_TEXT}", [REWARDS_TABLE]
            )
    for name in function_names:
        parsed.add_value(f"{REWARDS_TABLE}.{name}.function", f"{path}:{name}", source_text)


def _add_setting_by_grammar(parsed: ParsedOverrides, key: str, text: str, source_text: str) -> None:
    """Add a value to `parsed` that Hydra's own parser reads: a number, a list, a dictionary or null.

    `key`, `text`: the halves of `optim.betas=[0.9,0.95]`.
    `source_text`: what sets it, for messages.
    Several values, as for a sweep, are a problem, since this is the command line of one run.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed_override = OverridesParser.create().parse_override(f"{key}={text}")
        if parsed_override.is_sweep_override():  # choice(...), range(...), or a value with commas
            is_range = re.match(r"(interval|tag)\(", text) is not None
            parsed.add_problem(f"{source_text}: {SEARCH_ADVICE if is_range else SWEEP_ADVICE}")
            return
        parsed.values += _values_of_override(key, parsed_override.value(), source_text)
    except (HydraException, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(" See https")[0]
        _add_unparsable_setting(parsed, key, text, source_text, reason=reason)


def _add_unparsable_setting(
    parsed: ParsedOverrides,
    key: str,
    text: str,
    source_text: str,
    *,
    reason: str,
) -> None:
    """Add a value to `parsed` that Hydra's parser could not read, or the problem; `reason`: what the parser said.

    By its key:

    - no setting: a problem, with the key that was probably meant;
    - a setting of text, and the value is a list: the paths in it, whose characters the grammar would want quoted;
    - another setting: a problem, with the type that the value must have.
    """
    setting = find_setting(key)
    if setting is None:
        refused = hints.explain_unknown_key(key, source_text)
        parsed.add_problem(refused.problem, refused.probably_meant_keys)
    elif _is_text_type(setting.type) and text.startswith("["):
        paths = [entry.strip().strip("'\"") for entry in text[1:-1].split(",")]
        parsed.add_value(key, paths, source_text)
    else:
        problem = f"{source_text}: cannot be read ({reason}); {key} is {describe_type(setting.type)}"
        parsed.add_problem(problem, [key])


def _values_of_override(key: str, value: Any, source_text: str) -> list[SettingValue]:
    """The settings that one override sets: of `budget={epochs: 3}` or `batch={...}` one for each entry, else the one it names.

    `source_text`: what sets them, for messages.
    """
    # Other dictionaries, such as `data.columns`, are one setting whose value is the dictionary.
    if key not in ("batch", "budget") or not isinstance(value, dict):
        return [SettingValue(key, value, source_text)]
    return [SettingValue(f"{key}.{name}", entry, source_text) for name, entry in value.items()]


def _list_entries(text: str) -> list[str] | None:
    """Split the text of a list, `[a,b]`, into its entries, without quotes and without empty ones; None if it is no list."""
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
