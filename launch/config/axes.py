"""The axes of a sweep (arguments with several values), their points, and the conditions that leave points out."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.config.choices import MODEL_GROUP, WHOLE_RUN_GROUPS, choices_by_group
from strategies.errors import ConfigError
from trainer.model.known_shapes import shape_names

if TYPE_CHECKING:
    from trainer.reporting.config import LoggingConfig

SWEEP_FUNCTION_REGEX = re.compile(r"[a-z]+\(.*\)", re.DOTALL)
"""Hydra's own way to write several values, such as range(0,3)."""
MAX_LABEL_CHARACTERS = 80
"""Longest name of a point: file systems take 255 bytes, and tables of runs much less."""
CONDITION_SEPARATOR_REGEX = re.compile(r"\s*\+\s*(?=[\w.]+=)|\s+(?=[\w.]+=)")
"""What separates the arguments of one condition: `a=1+b=2` or `a=1 b=2`."""
OPENING_BRACKETS = "([{"
CLOSING_BRACKETS = ")]}"


@dataclass(frozen=True, slots=True)
class Axes:
    """The command line of a sweep. An argument with several values, such as `optim.lr=1e-4,2e-4`, is an axis.

    Two axes of two and three values span six points. A point is one run.
    """

    alternative_arguments: tuple[tuple[str, ...], ...]
    """For each typed argument, in order: the `key=value` arguments that it stands for, one for each of its values."""

    @property
    def values_by_axis(self) -> dict[str, tuple[str, ...]]:
        """The values of each axis, by its key: {"tuning": ("full", "lora"), "optim.lr": ("1e-4", "2e-4")}."""
        values_by_key = {}
        for arguments in self.alternative_arguments:
            if len(arguments) > 1:
                values_by_key[argument_key(arguments[0])] = tuple(argument_value(argument) for argument in arguments)
        return values_by_key

    def points(self) -> list[list[str]]:
        """The arguments of every run of a sweep: all combinations of the axes' values, in which the last axis changes fastest.

        A setting that only some choices of an axis have is left out of the other points, as `tuning.rank` of a point with
        `tuning=full`. Points that become equal by this are one point: `tuning=full,lora tuning.rank=4,8` has three.
        """
        required_choices_by_key = self._required_choices_by_key()
        points: list[list[str]] = []
        seen_shortened_points: set[tuple[str, ...]] = set()
        for full_point in itertools.product(*self.alternative_arguments):
            # `full_point` has an argument for each key, also those with one value.
            values = {argument_key(argument): argument_value(argument) for argument in full_point}
            arguments_to_keep = []
            for argument in full_point:
                required = required_choices_by_key.get(argument_key(argument))
                if required is None or values[required.axis] in required.choices:
                    arguments_to_keep.append(argument)
            point = tuple(arguments_to_keep)
            # Only shortened points are compared, because a value that the user gives twice (`run.seed=1,1`) stays two points.
            if point == full_point:
                points.append(list(point))
            elif point not in seen_shortened_points:
                points.append(list(point))
                seen_shortened_points.add(point)
        return points

    def values_on_axes(self, point: list[str]) -> dict[str, str]:
        """What tells a point from the others: its value on each axis, by key: {"optim.lr": "1e-4"}.

        `point`: its arguments, with those that all points share.
        An axis that the point lacks is left out.
        """
        axis_keys = self.values_by_axis.keys()
        return {
            argument_key(argument): argument_value(argument)
            for argument in point
            if argument_key(argument) in axis_keys
        }

    def describe_point(self, point: list[str]) -> str:
        """The arguments in which a point differs from the others, such as `tuning=lora optim.lr=1e-4`, or "only point"."""
        arguments = [f"{key}={value}" for key, value in self.values_on_axes(point).items()]
        return " ".join(arguments) or "only point"

    def partial_setting_lines(self) -> list[str]:
        """The lines that tell the user which settings only some points of the sweep have, and which points these are.

        Such as `tuning.rank: only where tuning is lora`.
        """
        values_by_axis = self.values_by_axis
        sentences = []
        for key, required in self._required_choices_by_key().items():
            choices = [choice for choice in values_by_axis[required.axis] if choice in required.choices]
            sentences.append(f"{key}: only where {required.axis} is {' or '.join(choices)}")
        return sentences

    def _required_choices_by_key(self) -> dict[str, RequiredChoices]:
        """Which typed settings only some points of the sweep can have, and the choices of an axis that they need.

        `tuning=full,lora tuning.rank=8` gives {"tuning.rank": RequiredChoices("tuning", ("lora", ...))}, since `full` has no
        rank. Settings that every choice of the axis has, or none, are left out.
        """
        from launch.config.known_settings import find_setting

        values_by_axis = self.values_by_axis  # of a group its choices: {"tuning": ("full", "lora")}
        required_choices_by_key = {}
        for arguments in self.alternative_arguments:
            key = argument_key(arguments[0])
            group = key.partition(".")[0]
            if key == group or group not in values_by_axis:
                continue
            # Under which choices of its group a setting exists; None for a mistyped key, which composing the points reports.
            setting = find_setting(key)
            if setting is None:
                continue
            choices = values_by_axis[group]
            num_choices_with_setting = sum(choice in setting.available_under for choice in choices)
            # A setting that no choice of the axis has stays in every point, so that composing the points refuses it.
            if 0 < num_choices_with_setting < len(choices):
                required_choices_by_key[key] = RequiredChoices(axis=group, choices=setting.available_under)
        return required_choices_by_key


@dataclass(frozen=True, slots=True)
class RequiredChoices:
    """The choices of an axis under which a setting exists, such as `tuning.rank` under `tuning=lora`."""

    axis: str
    choices: tuple[str, ...]


def argument_key(argument: str) -> str:
    """The key of an argument `key=value`."""
    return argument.partition("=")[0]


def argument_value(argument: str) -> str:
    """The value of an argument `key=value`, as text."""
    return argument.partition("=")[2]


def read_axes(arguments: list[str]) -> Axes:
    """Split the arguments of a sweep at the commas between their values: `optim.lr=1e-4,2e-4` is an axis of two values.

    Raises ConfigError, with all problems at once, for an empty value, as in `optim.lr=1e-4,,2e-4`, and for a glob or function
    that stands for no value.
    """
    problems: list[str] = []
    alternative_arguments: list[tuple[str, ...]] = []
    for argument in arguments:
        try:
            alternative_arguments.append(tuple(_single_value_arguments(argument)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Axes(tuple(alternative_arguments))


def split_at_commas(text: str) -> list[str]:
    """Split a typed value at its commas, but not at those within quotes or brackets: `a,[b,c],"d,e"` has three parts."""
    parts = [""]
    depth = 0  # of open brackets
    quote = ""  # the quotation mark that is open; empty outside quotes
    # Each character with the one before it, which tells an escaped quote from a closing one.
    for previous, character in zip(" " + text, text, strict=False):
        if quote:
            if character == quote and previous != "\\":
                quote = ""
        elif character in "'\"" and previous in " ,=[({":  # a value's own apostrophe quotes nothing
            quote = character
        elif character in OPENING_BRACKETS:
            depth += 1
        elif character in CLOSING_BRACKETS:
            depth = max(0, depth - 1)
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts]


def _single_value_arguments(argument: str) -> list[str]:
    """The arguments with one value each that one argument of a sweep stands for: `optim.lr=1e-4,2e-4` is two.

    By its value:

    - `optim.lr=1e-4,2e-4`: values between commas;
    - `tuning=glob(*ora)`: the choices or files that match;
    - `run.seed=range(0,3)`: a function of Hydra;
    - anything else: itself alone.

    Raises ConfigError for an empty value between commas, and for a glob or a function that stands for nothing.
    """
    key = argument_key(argument)
    value_text = argument_value(argument)
    values = split_at_commas(value_text)
    if len(values) > 1:
        if not all(values):
            raise ConfigError(f"{argument}: nothing stands between two commas; leave one out, or quote the whole value")
        return [f"{key}={value}" for value in values]
    if value_text.startswith("glob(") and value_text.endswith(")"):
        return [f"{key}={match}" for match in _glob_matches(argument, key, value_text)]
    if SWEEP_FUNCTION_REGEX.fullmatch(value_text):
        return _arguments_of_hydra_function(argument) or [argument]
    return [argument]


def _arguments_of_hydra_function(argument: str) -> list[str]:
    """The arguments that a function of Hydra stands for: `run.seed=range(0,3)` -> run.seed=0, run.seed=1, run.seed=2.

    Empty for text that only looks like a function. If it is a mistake, composing the configuration reports it later.
    Raises ConfigError for a function without a value, such as `range(5,5)`.
    """
    # Imported here, because Hydra's parser takes long to load and few arguments need it.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed_override = OverridesParser.create().parse_override(argument)
        if not parsed_override.is_sweep_override():
            return []
        key = parsed_override.get_key_element()
        arguments = [f"{key}={value}" for value in parsed_override.sweep_string_iterator()]
    except (HydraException, NotImplementedError):
        return []
    if not arguments:
        raise ConfigError(f"{argument}: stands for no value")
    return arguments


def _glob_matches(whole_argument: str, key: str, glob_text: str) -> list[str]:
    """The values that a glob on the command line of a sweep stands for, sorted: choices if `key` is a group, otherwise files.

    `tuning=glob(*ora)` is `adalora` and `lora`.
    `glob_text`: such as `glob(*ora)` or `glob([a*,b*],exclude=c)`.
    `whole_argument`: for messages.
    Raises ConfigError if nothing matches, or if every published model does, since that is surely not meant.
    """
    patterns = _parse_glob(glob_text)
    remaining = _matches_of_patterns(key, patterns.included) - _matches_of_patterns(key, patterns.excluded)
    if key == MODEL_GROUP and remaining >= {*shape_names()}:
        raise ConfigError(
            f"{whole_argument}: would be a run of each of {len(shape_names())} published models; name some of them, as in "
            "model=qwen3_0_6b,qwen3_1_7b or model=glob(qwen3_*)"
        )
    if not remaining:
        hint = f"; {key}= has {', '.join(choices_by_group()[key])}" if key in choices_by_group() else ""
        raise ConfigError(f"{whole_argument}: matches nothing{hint}")
    return sorted(remaining)


class _GlobPatterns(NamedTuple):
    """The patterns of a glob on the command line: a value is meant if one of `included` fits and none of `excluded`."""

    included: list[str]
    excluded: list[str]


def _parse_glob(glob_text: str) -> _GlobPatterns:
    """Read Hydra's way to write a glob: `glob([a*,b*],exclude=c)` has the patterns a* and b*, and excludes c.

    An argument of glob is `pattern`, `[pattern,pattern]`, `include=...` or `exclude=...`.
    """
    patterns = _GlobPatterns(included=[], excluded=[])
    for glob_argument in split_at_commas(glob_text.removeprefix("glob(").removesuffix(")")):
        name, equals_sign, value = glob_argument.partition("=")
        is_named = equals_sign and name.strip() in ("include", "exclude")
        pattern_list = value if is_named else glob_argument  # a pattern without a name may hold an equals sign itself
        target = patterns.excluded if is_named and name.strip() == "exclude" else patterns.included
        target += [pattern.strip("'\" ") for pattern in split_at_commas(pattern_list.strip().strip("[]"))]
    return patterns


def _matches_of_patterns(key: str, patterns: list[str]) -> set[str]:
    """The choices of the group `key` that fit one of the patterns; for a setting that is no group, the files that do."""
    from glob import glob

    matches: set[str] = set()
    for pattern in patterns:
        if key in choices_by_group():
            matches.update(fnmatch.filter(choices_by_group()[key], pattern))
        else:
            matches.update(glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too
    return matches


def point_exclusion_flags(axes: Axes, skip: list[str], where: list[str]) -> list[bool]:
    """For each point of a sweep, in order, whether one of the user's conditions leaves it out. A point is one run.

    A condition is arguments joined by `+`, such as `tuning=lora+optim.lr=2e-4`.

    - In `skip` it excludes the points that have all its arguments: those with LoRA and this rate.
    - In `where` it excludes the points that have its first argument and lack another one: those with LoRA and another rate.

    Raises ConfigError for an argument that is no axis or no value of it, since such a condition would never hold.
    """
    problems: list[str] = []
    skip_conditions = [_read_condition("compare.skip", text, axes, problems) for text in skip]
    where_conditions = [_read_condition("compare.where", text, axes, problems) for text in where]
    for text, condition in zip(where, where_conditions, strict=True):
        if len(condition) == 1:
            problems.append(
                f"compare.where: {text}: says nothing more of such points; add the settings that must stand beside it, as in "
                "compare.where=[tuning=lora+optim.lr=2e-4]"
            )
    if problems:
        raise ConfigError(problems)

    is_excluded = []
    for point in axes.points():
        values = axes.values_on_axes(point)
        is_skipped = any(_meets_condition(condition, values) for condition in skip_conditions)
        violates_where = False
        for condition in where_conditions:
            meets_first_argument = _meets_condition(condition[:1], values)
            if meets_first_argument and not _meets_condition(condition, values):
                violates_where = True
        is_excluded.append(is_skipped or violates_where)
    return is_excluded


def _meets_condition(condition: list[tuple[str, str]], values: dict[str, str]) -> bool:
    """Whether a point with these values has every (key, value) of a condition."""
    return all(values.get(key) == value for key, value in condition)


def _read_condition(name: str, text: str, axes: Axes, problems: list[str]) -> list[tuple[str, str]]:
    """Read a condition on points of a sweep: `tuning=lora+optim.lr=2e-4` is [("tuning", "lora"), ("optim.lr", "2e-4")].

    It selects the points that have all of these values.
    `name`: the setting that holds the condition, for messages.
    An argument that is no swept setting (axis) with one of its values is left out, and a message is appended to `problems`.
    """
    pairs = []
    for argument in CONDITION_SEPARATOR_REGEX.split(text.strip().strip("'\"")):
        key = argument_key(argument)
        value = argument_value(argument)
        values = axes.values_by_axis.get(key)
        if values is None:
            axis_names = ", ".join(axes.values_by_axis) or "none"
            problems.append(f"{name}: {argument}: no axis of this comparison; those with several values: {axis_names}")
        elif value not in values:
            problems.append(f"{name}: {argument}: {key} takes {', '.join(values)} here")
        else:
            pairs.append((key, value))
    return pairs


def point_label(values: dict[str, str]) -> str:
    """Name a point of a sweep for people and directories, such as `fsdp2-lora-lr2e-4`; `point` if there is no axis.

    `values`: the point's value on each axis, by key: {"strategy": "fsdp2", "tuning": "lora", "optim.lr": "2e-4"}.
    """
    axis_labels = [_axis_label(key, value) for key, value in values.items()]
    joined = "-".join(label for label in axis_labels if label)
    return joined[:MAX_LABEL_CHARACTERS].strip("-.") or "point"


def set_point_name_in_trackers(
    logging: LoggingConfig, sweep_dir: Path, point_name: str, arguments: Iterable[str]
) -> None:
    """Set `logging.group`, `.name` and `.columns` of one point, so that W&B and other trackers show a sweep as one group.

    The group gets the name of `sweep_dir`, unless the user or WANDB_RUN_GROUP names one.
    `point_name`: such as `lora-lr2e-4`, behind the user's own name for the run.
    `arguments`: the point's values on the axes, such as `optim.lr=1e-4`; each gets a column.
    """
    logging.group = logging.group or os.environ.get("WANDB_RUN_GROUP") or sweep_dir.resolve().name
    logging.name = f"{logging.name}-{point_name}" if logging.name else point_name
    columns = list(logging.columns)
    for argument in arguments:
        key = argument_key(argument)
        # `experiment=x` is no setting of the run, so there is no value to look up: the whole argument is the column.
        columns.append(argument if key in WHOLE_RUN_GROUPS else key)
    logging.columns = list(dict.fromkeys(columns))


def _axis_label(key: str, value: str) -> str:
    """One point's value on one axis, as a part of the point's name, safe for a directory: `optim.lr`, `2e-4` -> `lr2e-4`.

    By what the axis is:

    - a group of settings with named choices, such as `tuning`: the choice, `lora`;
    - a path: its last part, `chat.jsonl`;
    - a number: the setting's last name with it, `lr2e-4`;
    - anything else: the same with `_` between them, `packing_true`.
    """
    bare_value = value.strip("'\"[]").rstrip("/")
    setting_name = key.rsplit(".", 1)[-1]
    is_number = re.fullmatch(r"[\d.]+(e[+-]?\d+)?", bare_value) is not None
    if key in choices_by_group():
        label = bare_value
    elif setting_name in ("path", "eval_path", "tokenizer"):
        label = bare_value.rsplit("/", 1)[-1]
    elif is_number:
        label = f"{setting_name}{bare_value}"
    else:
        label = f"{setting_name}_{bare_value}"
    return re.sub(r"[^\w.-]+", "_", label).strip("_.-")
