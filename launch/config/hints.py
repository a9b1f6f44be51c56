"""Suggests what a wrong override probably meant, including the names that other trainers use."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from launch.config import misspelled
from launch.config.choices import MODEL_GROUP, choices_by_group
from launch.config.importers.equivalent import OtherTrainerSettings, TranslatedSetting, parse_number
from launch.config.importers.names import RULE_BY_NORMALISED_NAME, normalised_name, translate_by_rule
from launch.config.importers.rules import RULE_BY_GROUP
from launch.config.known_settings import all_settings, find_setting
from launch.config.removed import REASON_BY_NOT_OFFERED_KEY, SUCCESSOR_BY_REMOVED_KEY

MAX_LISTED_CHOICES = 20
"""Choices of a group that a message lists whole; of larger groups, such as the published models, it lists similar ones."""
MAX_SIMILAR_CHOICES = 5
KNOWN_FLAGS = ("--help", "--cfg", "--info", "--config-dir", "--dry-run", "--multirun", "--version")
NAMES_SHARED_WITH_SUBMITIT = (
    "partition",
    "account",
    "qos",
    "cpus_per_task",
    "gpus_per_node",
    "nodes",
    "constraint",
    "exclusive",
)
"""Settings of Hydra's submitit launcher that `launcher.*` has under the same name."""


@dataclass(frozen=True, slots=True)
class RefusedOverride:
    """Why a command-line override cannot be used, and what was probably meant."""

    override: str
    reason: str
    probably_meant_keys: frozenset[str] = frozenset()
    """The settings that it was probably meant for, such as `optim.lr`; empty if nothing is similar.

    Validation complains about them as well, because they are not set; that would only repeat this problem and is not shown.
    """

    @property
    def problem(self) -> str:
        """The line for the user."""
        return f"{self.override}: {self.reason}"


class _TypedOverride(NamedTuple):
    """One setting as it was typed, in one argument or in two."""

    override: str
    """The whole of it: `optim.lr=1e-4`, or `--learning_rate 1e-4`."""
    key: str
    value: str | None
    """None for an argument without a value, such as a settings file."""


def _typed_overrides(arguments: list[str]) -> Iterator[_TypedOverride]:
    """Read the arguments of a command line as settings: `key=value`, or another trainer's flag `--name value` or `--switch`.

    Only names that another trainer uses take the argument behind them as their value; a switch has the value `true`.
    """
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        key, equals_sign, value = argument.partition("=")
        is_flag = argument.startswith("--") and normalised_name(key) in RULE_BY_NORMALISED_NAME
        if equals_sign:
            yield _TypedOverride(argument, key, value)
        elif not is_flag:
            yield _TypedOverride(argument, key, value=None)
        elif remaining and not remaining[0].startswith("--") and "=" not in remaining[0]:
            value = remaining.pop(0)
            yield _TypedOverride(f"{argument} {value}", key, value)
        else:
            yield _TypedOverride(argument, key, value="true")


class OverridesOfOtherTrainers:
    """Finds the settings of other trainers on a command line, such as `--learning_rate 1e-4`, and says what to type instead.

    They are collected first, because the translation of one may depend on another: a batch size on the number of ranks.
    """

    def __init__(self, overrides: list[str]) -> None:
        """Collect the settings of other trainers among command-line arguments.

        `overrides`: the arguments as typed, in which `--name value` may be one setting.
        A name that shardtune has itself means shardtune's setting.
        """
        self.overrides: list[str] = []
        """All arguments in their order, in which `--name value` of another trainer has become one argument."""
        self._value_by_other_name: dict[str, str] = {}
        """The values of the other trainers' settings, by normalised name."""
        self._other_name_by_override: dict[str, str] = {}
        """The normalised name of each setting of another trainer, by its override."""

        for typed in _typed_overrides(overrides):
            self.overrides.append(typed.override)
            name = normalised_name(typed.key)
            our_key = typed.key.lstrip("-+~")
            is_our_key = find_setting(our_key) is not None or our_key in choices_by_group()
            if typed.value is not None and name in RULE_BY_NORMALISED_NAME and not is_our_key:
                self._value_by_other_name[name] = typed.value.strip("'\"")
                self._other_name_by_override[typed.override] = name

        # How many ranks there will be, for translations that depend on it.
        cli_values: dict[str, str] = {}
        for override in overrides:
            key, _, value = override.lstrip("+").partition("=")
            cli_values[key] = value
        self._ranks = num_requested_ranks(cli_values, self._value_by_other_name)

    def explain(self, override: str) -> RefusedOverride | None:
        """What to type instead of an override that is another trainer's setting; None if it is none, or has no translation.

        `override`: one of `self.overrides`. `--learning_rate 1e-4` gives the reason `here it is optim.lr=1e-4`.
        """
        name = self._other_name_by_override.get(override)
        if name is None:
            return None
        translation = translate_by_rule(name, OtherTrainerSettings(self._value_by_other_name, self._ranks))
        if translation is None:
            return None
        # Validation will say that no budget or batch size is set, which repeats this problem as well.
        groups = {key.split(".")[0] for key in translation.overrides if key.startswith(("budget.", "batch."))}
        return RefusedOverride(
            override,
            reason=translation_sentence(translation),
            probably_meant_keys=frozenset(translation.overrides) | groups,
        )


def translation_sentence(translation: TranslatedSetting) -> str:
    """The translation of another trainer's setting as a sentence: `here it is optim.lr=1e-4`."""
    if translation.overrides:
        note = f" ({translation.note})" if translation.note else ""
        return f"here it is {_overrides_text(translation.overrides)}{note}"
    if translation.not_needed:
        return f"leave it out: {translation.note}" if translation.note else "leave it out"
    return f"there is no equal here: {translation.note}"


def _overrides_text(overrides: Mapping[str, str]) -> str:
    """Settings as they are typed: `optim.lr=1e-4 tuning=lora`."""
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def explain_unknown_choice(group: str, choice: str, override: str) -> str:
    """Write the message about a choice that its group does not have, such as `tuning=qlora`, with what was probably meant.

    `override`: what was typed, with which the message begins.
    Meant may be, in this order:

    - the choice that another trainer calls so;
    - `model.path`, for a model that is a directory or a hub id;
    - a stage of ZeRO, for `strategy=deepspeed`;
    - otherwise a similar choice, if there is one; behind it, all choices of the group, or of a large group the similar ones.
    """
    if group in RULE_BY_GROUP:
        # Other trainers' names of choices have rules of translation, which need none of the other trainer's settings.
        overrides = RULE_BY_GROUP[group](choice, OtherTrainerSettings({})).overrides
        if overrides:
            return f"{override}: no such choice; here it is {_overrides_text(overrides)}"
    choices = choices_by_group()[group]
    if group == MODEL_GROUP and "/" in choice:
        return f"{override}: no such choice; a directory or a hub id is model.path={choice}"
    if group == "strategy" and choice in ("deepspeed", "zero"):
        return f"{override}: no such choice; did you mean strategy=zero2 or strategy=zero3? All: {', '.join(choices)}"
    similar = difflib.get_close_matches(choice, choices, n=MAX_SIMILAR_CHOICES, cutoff=0.4)
    suggestion = f"; did you mean {group}={similar[0]}? " if similar else ""
    if len(choices) <= MAX_LISTED_CHOICES:
        one_of = "One of" if similar else ", one of"
        return f"{override}: no such choice{suggestion}{one_of} {', '.join(choices)}"
    all_choices = f"shardtune train --help lists all {len(choices)}"
    if not similar:
        return f"{override}: no such choice; {all_choices}"
    others = f"Also similar: {', '.join(similar[1:])}; " if len(similar) > 1 else ""
    return f"{override}: no such choice{suggestion}{others}{all_choices}"


def explain_hydra_setting(key: str, value: str, override: str) -> str:
    """Write the message about an override of Hydra's own settings, such as `hydra.run.dir=out`, with what does the same here.

    Hydra composes the configuration, but shardtune decides about directories, launchers and logging itself. `key`, `value`: the
    two halves of `override`.
    """
    name = key.replace("/", ".").removeprefix("hydra.")
    equivalent = _shardtune_equivalent_of_hydra(name, value)
    if equivalent is None:
        return f"{override}: Hydra's own settings cannot be changed; remove it"
    return f"{override}: Hydra's own settings cannot be changed; instead: {equivalent}"


def _shardtune_equivalent_of_hydra(name: str, value: str) -> str | None:
    """What users of Hydra should type instead of one of its own settings; None if nothing does the same.

    `name`: the setting without `hydra.`, and its `value`: ("sweeper.n_trials", "20") -> "sweeper.trials=20 with -m
    sweeper=optuna".
    """
    if name in ("run.dir", "sweep.dir"):
        return f"run.dir={value} names the directory, and under -m the one of all points"
    # submitit is Hydra's launcher for SLURM.
    if name == "launcher" and "submitit" in value:
        return "launcher=slurm submits, under -m one job array"
    if name == "launcher":
        return "the points of -m run one after another here, or as one job array with launcher=slurm"
    if name.startswith("launcher."):
        submitit_name = name.rsplit(".", 1)[-1]
        return f"launcher.{_submitit_setting(submitit_name, value)} with launcher=slurm"
    if name == "sweeper":
        return "values separated by commas under -m are run in all combinations; -m sweeper=optuna searches"
    if name == "sweeper.n_trials":
        return f"sweeper.trials={value} with -m sweeper=optuna"
    if name == "sweeper.sampler.seed":
        return f"sweeper.seed={value} with -m sweeper=optuna"
    if name.startswith("sweeper.params."):
        return f"-m {name.removeprefix('sweeper.params.')}={value}"
    if name == "searchpath":
        return "--config-dir <directory> adds one"
    if name == "verbose" or name.startswith("job_logging"):
        return "`shardtune logs <run>` shows what every rank said"
    return None


def _submitit_setting(name: str, value: str) -> str:
    """A setting of Hydra's submitit launcher as `launcher.*` has it, such as `time=60:00` for `timeout_min`, `60`."""
    renamed = {"timeout_min": f"time={value}:00", "mem_gb": f"mem={value}G", "tasks_per_node": f"processes={value}"}
    if name in renamed:
        return renamed[name]
    return f"{name}={value}" if name in NAMES_SHARED_WITH_SUBMITIT else "<key>=<value>"


def needed_choice(key: str, choices: tuple[str, ...]) -> str:
    """The choices under which a setting exists, as typed: `tuning=lora|vera|loha|lokr` for `tuning.rank`."""
    group = key.split(".")[0]
    return f"{group}={'|'.join(choices)}"


def explain_argument_without_value(argument: str) -> str:
    """Write the message about an argument that is not of the form `key=value`, with what was probably meant.

    The cases, in order:

    - a flag of another launcher, such as `--multi_gpu`;
    - a file as `@my.yaml`;
    - a setting with dashes, such as `--optim.lr=1e-4`;
    - a group without a choice, such as `tuning`;
    - a mistyped flag, or anything else.
    """
    from launch.config.choices import settings_classes_by_group

    name = argument.lstrip("-")
    if name in misspelled.ADVICE_BY_FLAG_OF_OTHER_LAUNCHERS:
        return f"{argument}: leave it out: {misspelled.ADVICE_BY_FLAG_OF_OTHER_LAUNCHERS[name]}"
    if argument.startswith("@"):
        return f"{argument}: a file of settings is YAML, and is given by its name alone, as in my.yaml"
    if name != argument and "=" in name:
        return f"{argument}: settings have no dashes; type {name}"
    if name in choices_by_group():
        # Of groups with classes the first class is an example that people use, such as `adamw`, and not the alphabet's first.
        choices = [*settings_classes_by_group().get(name, choices_by_group()[name])]
        if not choices:
            return f"{argument}: no choices"
        return f"{argument}: give its choice, as in {name}={choices[0]}"
    similar_flags = difflib.get_close_matches(argument, KNOWN_FLAGS, n=1)
    hint = f"; did you mean {similar_flags[0]}?" if similar_flags else ""
    return f"{argument}: not of the form key=value{hint}"


def separate_settings_split_at_spaces(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take settings typed with spaces out of a command line, and explain each, since their pieces alone would confuse.

    `optim.lr = 1e-4` is three arguments; `optim.lr= 1e-4`, `optim.lr =1e-4` and `--optim.lr 1e-4` are two. Returns the other
    arguments in their order, and for each setting taken out a message that says how to type it.
    """
    other_arguments: list[str] = []
    problems: list[str] = []
    unread = list(arguments)
    while unread:
        argument = unread.pop(0)
        next_argument = unread[0] if unread else ""
        if argument in all_settings() and next_argument.startswith("="):
            # `key =value`, or `key = value`.
            value = unread.pop(0)[1:]
            if not value and unread:
                value = unread.pop(0)
            problems.append(f"{argument} = {value}: no spaces around the equals sign; type {argument}={value}")
        elif argument.endswith("=") and argument[:-1] in all_settings() and _can_be_value(next_argument):
            unread.pop(0)
            problems.append(
                f"{argument} {next_argument}: no spaces around the equals sign; type {argument}{next_argument}"
            )
        elif _is_setting_typed_as_flag(argument) and _can_be_value(next_argument):
            unread.pop(0)
            key = argument.lstrip("-").replace("-", "_")
            hint = f"type {key}={next_argument}"
            if key not in all_settings():
                hint = explain_unknown_key(key, f"{key}={next_argument}").reason
            problems.append(f"{argument} {next_argument}: settings have no dashes; {hint}")
        else:
            other_arguments.append(argument)
    return other_arguments, problems


def _can_be_value(argument: str) -> bool:
    """Whether an argument can be the value of the argument before it: it is no `key=value` and no flag."""
    return bool(argument) and "=" not in argument and not argument.startswith("-")


def _is_setting_typed_as_flag(argument: str) -> bool:
    """Whether an argument is a setting of shardtune typed with dashes, such as `--optim.lr` or `--lr`, followed by its value.

    False for a flag of another trainer or launcher, which is translated or refused with its own advice, and for a near miss of
    one of our flags (`--dryrun`), which `explain_argument_without_value` explains.
    """
    key = argument.lstrip("-").replace("-", "_")
    is_of_other_trainer = normalised_name(argument) in RULE_BY_NORMALISED_NAME
    is_of_other_launcher = key in misspelled.ADVICE_BY_FLAG_OF_OTHER_LAUNCHERS
    if not argument.startswith("--") or "=" in argument or is_of_other_trainer or is_of_other_launcher:
        return False
    last_names = {setting_key.rpartition(".")[2] for setting_key in all_settings()}
    is_setting = key in all_settings() or key in last_names
    is_near_miss_of_flag = bool(difflib.get_close_matches(argument, KNOWN_FLAGS, n=1, cutoff=0.8))
    return is_setting and not is_near_miss_of_flag


def explain_unknown_key(key: str, override: str) -> RefusedOverride:
    """Write the message about an override whose key does not exist, with what was probably meant.

    `override`: what was typed, with which the message begins.
    The first of these that applies:

    - The setting was removed, is not offered, or is commonly confused with one of ours: what there is instead.
    - It is the `name` of a group, or a whole block of settings: how these are typed.
    - A group or setting has a similar name: that one.
    - Otherwise only that there is no such setting.
    """
    no_such_setting = f"there is no setting {key}"
    value = override.partition("=")[2]
    if key in SUCCESSOR_BY_REMOVED_KEY:
        return RefusedOverride(override, f"{no_such_setting} any more: {SUCCESSOR_BY_REMOVED_KEY[key]}")
    if key in REASON_BY_NOT_OFFERED_KEY:
        return RefusedOverride(override, f"{no_such_setting}: {REASON_BY_NOT_OFFERED_KEY[key]}")
    replacement = misspelled.replacement_text(key, value)
    if replacement is not None:
        return RefusedOverride(override, f"{no_such_setting}; {replacement}")
    group = key.split(".")[0]
    last_name = key.split(".")[-1]
    if last_name == "name" and group in choices_by_group():
        choices = ", ".join(choices_by_group()[group])
        return RefusedOverride(override, f"chosen as a group; type {group}=<choice>, one of {choices}")
    settings_below = sorted(name for name in all_settings() if name.startswith(f"{key}."))
    if settings_below:
        return RefusedOverride(override, f"{key} is not one value; set {', '.join(settings_below[:8])}")
    group_suggestion = _group_suggestion(key, value)
    if group_suggestion is not None:
        return RefusedOverride(override, f"{no_such_setting}; {group_suggestion}")

    similar_keys = _similar_keys(key)
    if not similar_keys:
        return RefusedOverride(override, no_such_setting)
    suggestions = [_suggested_key_text(similar_key) for similar_key in similar_keys[:3]]
    return RefusedOverride(
        override,
        reason=f"{no_such_setting}; did you mean {' or '.join(suggestions)}?",
        probably_meant_keys=frozenset({similar_keys[0]}),
    )


def _suggested_key_text(key: str) -> str:
    """A key as a message suggests it: `optim.lr`, or `tuning.rank (with tuning=lora|...)` if only some choices have it."""
    choices_with_key = all_settings()[key].available_under
    return f"{key} (with {needed_choice(key, choices_with_key)})" if choices_with_key else key


def _similar_keys(key: str) -> list[str]:
    """The full keys of settings that a mistyped key may mean, the likeliest first; empty if nothing is similar.

    The first of these that finds any, from strict to loose:

    - keys that are nearly the same, then keys with the same last name (`optim.lr` for `learning.lr`);
    - a less similar key;
    - keys with a similar last name.
    """
    last_name = key.split(".")[-1]
    # `cutoff`: the least similarity, from 0 to 1 (equal).
    nearly_same_keys = difflib.get_close_matches(key, all_settings(), n=1, cutoff=0.75)
    keys_of_same_last_name = []
    for known_key in all_settings():
        if known_key.split(".")[-1] == last_name and known_key not in nearly_same_keys:
            keys_of_same_last_name.append(known_key)
    if nearly_same_keys or keys_of_same_last_name:
        return [*nearly_same_keys, *keys_of_same_last_name]
    less_similar_keys = difflib.get_close_matches(key, all_settings(), n=1, cutoff=0.5)
    if less_similar_keys:
        return less_similar_keys
    known_last_names = [known_key.split(".")[-1] for known_key in all_settings()]
    similar_last_names = difflib.get_close_matches(last_name, known_last_names, n=1, cutoff=0.7)
    return [known_key for known_key in all_settings() if known_key.split(".")[-1] in similar_last_names]


def _group_suggestion(key: str, value: str) -> str | None:
    """Suggest a choice of a group for a mistyped key without dots: `tunning=lora` and `method=lora` give `tuning=lora`.

    A group, such as `tuning`, has named choices. The key may be similar to a group's name, or the value may be a choice of just
    one group. Returns `did you mean <group>=<choice>?`, or None if neither is so.
    """
    if "." in key:
        return None
    # Settings compete too: a key nearer to a setting than to any group is none of these.
    similar = difflib.get_close_matches(key, [*choices_by_group(), *all_settings()], n=1, cutoff=0.7)
    groups_with_value = [name for name in choices_by_group() if value in choices_by_group()[name]]
    if similar and similar[0] in choices_by_group():
        group = similar[0]
    elif len(groups_with_value) == 1:
        group = groups_with_value[0]
    else:
        return None
    if value in choices_by_group()[group]:
        return f"did you mean {group}={value}?"
    return f"did you mean {group}=<choice>, one of {', '.join(choices_by_group()[group])}?"


def num_requested_ranks(cli_values: Mapping[str, str], value_by_other_name: Mapping[str, str]) -> int | None:
    """The number of ranks (processes) that a command line asks for, processes per node times nodes; None if it does not say.

    `cli_values`: what was typed, by key of shardtune.
    `value_by_other_name`: settings of other trainers that were typed, by normalised name.
    Only launchers' settings are read, such as `launcher.processes` or torchrun's `nproc_per_node`.
    """
    settings = OtherTrainerSettings({**value_by_other_name, **cli_values})  # its `get` reads the first name that is set
    ranks_per_node = parse_number(
        settings.get("launcher.processes", "launcher.gpus_per_node", "nproc_per_node", "num_processes")
    )
    nodes = parse_number(settings.get("launcher.nodes", "nnodes", "num_machines")) or 1
    return None if ranks_per_node is None else round(ranks_per_node * nodes)
