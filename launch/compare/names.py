"""Finds the settings in which runs differ, and names the runs by them."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.compare.run_files import RecordedRun
from trainer.reporting.numbers import format_setting
from trainer.reporting.run_record import RunRecord

PER_RUN_KEYS = ("run.dir", "logging.name", "substitutions")
"""Keys that differ between any two runs, or follow from others."""
KEYS_LEFT_OUT_OF_NAMES = (
    "run.resume",
    "run.accept",
    "logging",
    "profile",
    "launcher",
    "checkpoint",
    "export",
    "data.cache_dir",
    "data.workers",
)
"""Keys that are listed where they differ, and are no part of a name: they say how a run was started or what it reports."""
RECORD_KEYS = ("world_size", "precision", "attention", "layout", "device", "host", "git_revision")
"""Keys of `run.json` about how the steps were computed."""
RECORD_KEY_PREFIX = "run.json "
WORLD_SIZE_KEY = f"{RECORD_KEY_PREFIX}world_size"
KEYS_FIRST_IN_NAME = (
    *("model.path", "data.path", "objective.name", "strategy.name", "tuning.name", "optim.name"),
    *("optim.lr", "batch.global", "batch.micro", "run.seed"),
)
"""Come first in a name, in this order."""
CHOICE_GROUPS = ("strategy", "tuning", "objective", "optim", "schedule", "launcher")
"""Groups of settings whose `name` is chosen by the group alone, as in `strategy=ddp`."""
ABSENT_VALUE = "-"
MAX_NAME_LENGTH = 40
"""Characters of a name."""


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting, and its value in each run; `-` where a run has no such setting."""

    key: str
    """Dotted, such as `optim.lr`, or for an entry of `run.json` with `RECORD_KEY_PREFIX` before it: `run.json world_size`."""
    values: tuple[Any, ...]

    @property
    def is_setting(self) -> bool:
        """Whether it is a setting of the run, and no entry of `run.json`."""
        return not self.key.startswith(RECORD_KEY_PREFIX)


def setting_differences(runs: list[RecordedRun]) -> list[SettingDifference]:
    """Find the settings in which the runs differ, to name them and to show why their results differ.

    A setting such as `tuning.rank` is compared only between runs with the same choice in its group, such as `tuning=lora`:
    between others a difference may follow from the choice. Values are compared as text in which 1.0 and 1 are equal.

    Behind the settings stand facts of `run.json` in which the runs differ, such as `run.json world_size`.
    """
    differences = []
    config_keys: dict[str, None] = {}  # a dict as an ordered set
    for run in runs:
        config_keys |= dict.fromkeys(run.config)
    for key in config_keys:
        if not is_below(key, PER_RUN_KEYS) and _has_several_values(key, runs):
            values = tuple(run.config.get(key, ABSENT_VALUE) for run in runs)
            differences.append(SettingDifference(key, values))

    for key in RECORD_KEYS:
        # A run that never started has no facts, which is no difference.
        values = tuple(_record_value(run.record, key) for run in runs)
        known_values = {_comparable_text(value) for value in values if value != ABSENT_VALUE}
        if len(known_values) > 1:
            differences.append(SettingDifference(f"{RECORD_KEY_PREFIX}{key}", values))
    return differences


def _has_several_values(key: str, runs: list[RecordedRun]) -> bool:
    """Whether the runs differ in a setting by more than what follows from their choice in its group.

    `tuning.rank` may differ between two runs with `tuning=lora`. `tuning=full` has no rank, so a difference from that does
    not count. The choice itself, `tuning.name`, is compared between all runs.
    """
    choice_key = f"{key.split('.')[0]}.name"
    values_by_choice: dict[Any, set[str]] = {}
    for run in runs:
        choice = None if key == choice_key else run.config.get(choice_key)
        values_by_choice.setdefault(choice, set()).add(_comparable_text(run.config.get(key, ABSENT_VALUE)))
    return any(len(values) > 1 for values in values_by_choice.values())


def _record_value(record: RunRecord, key: str) -> Any:
    """A fact that a run recorded in `run.json`, such as its world size; `ABSENT_VALUE` if it did not."""
    return getattr(record, key) if key in record.keys else ABSENT_VALUE


def _comparable_text(value: Any) -> str:
    """A text that is the same for equal values of a setting. Whole floats count as integers, because trackers write 0.0 as 0."""
    if isinstance(value, list):
        return f"[{', '.join(map(_comparable_text, value))}]"
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))
    return repr(value)


def names_of_runs(runs: list[RecordedRun], differences: list[SettingDifference]) -> list[str]:
    """Name each run by the settings in which it differs from the others, such as `fsdp2-lora-lr2e-4`.

    A setting that would make any name longer than `MAX_NAME_LENGTH` is left out of all names, so that names stay comparable
    part by part. Runs that share a name then, or have none, get the name of their directory behind it.
    """
    names = [""] * len(runs)
    for suffixes in _name_parts_by_difference(differences):
        longer_names = [_join_with_dash(name, suffix) for name, suffix in zip(names, suffixes, strict=True)]
        if max(map(len, longer_names)) <= MAX_NAME_LENGTH:
            names = longer_names
    counts = Counter(names)
    unique_names = []
    for name, run in zip(names, runs, strict=True):
        is_unique = name and counts[name] == 1
        unique_names.append(name if is_unique else _join_with_dash(name, run.directory.resolve().name))
    return unique_names


def _join_with_dash(name: str, suffix: str) -> str:
    return "-".join(filter(None, (name, suffix)))


def _name_parts_by_difference(differences: list[SettingDifference]) -> list[list[str]]:
    """What each difference adds to the name of each run: [["lora", "full"], ["lr2e-4", "lr2e-5"]] for two runs.

    The settings that tell a reader most come first, because later ones may not fit into the name any more.
    """
    values_by_key = {difference.key: difference.values for difference in differences}
    named_keys = []
    for difference in differences:
        if difference.is_setting and not is_below(difference.key, KEYS_LEFT_OUT_OF_NAMES):
            named_keys.append(difference.key)

    suffixes = []
    for key in KEYS_FIRST_IN_NAME:
        if key in named_keys:
            suffixes.append([_run_name_part(key, value) for value in values_by_key[key]])
    # The world size is the only entry of `run.json` that is part of a name.
    if WORLD_SIZE_KEY in values_by_key:
        suffixes.append([_world_size_suffix(world_size) for world_size in values_by_key[WORLD_SIZE_KEY]])
    for key in named_keys:
        if key not in KEYS_FIRST_IN_NAME:
            suffixes.append([_run_name_part(key, value) for value in values_by_key[key]])
    return suffixes


def _world_size_suffix(world_size: Any) -> str:
    """What the number of ranks adds to a run's name: `1rank`, `4ranks`; nothing if it is not known."""
    if world_size == ABSENT_VALUE:
        return ""
    return "1rank" if world_size == 1 else f"{world_size}ranks"


def _run_name_part(key: str, value: Any) -> str:
    """What the value of a setting adds to a run's name. Of the key only the last part is used:

    - A missing setting: nothing.
    - A choice (`tuning.name`): `lora`.
    - True or False (`tuning.dora`): `dora` or `no_dora`.
    - A number (`optim.lr`): `lr2e-4`.
    - A path: its last part, for a data file without the file's suffix.
    - Any other value (`batch.order`): `order_random`.
    """
    last_part = key.rsplit(".", 1)[-1].strip("_")
    if value == ABSENT_VALUE:
        return ""
    if last_part == "name":
        return str(value)
    if isinstance(value, bool):
        return last_part if value else f"no_{last_part}"
    if isinstance(value, int | float):
        return f"{last_part}{format_setting(value)}"
    if last_part in ("path", "eval_path") and value:
        path = Path(str(value))
        # The last part of a model's path may have a dot that begins no suffix, as in `qwen2.5`. Held-out files (`eval_path`) keep
        # theirs.
        is_data_file = last_part == "path" and "data" in key
        return _word_characters_only(path.stem if is_data_file else path.name)
    return f"{last_part}_{_word_characters_only(format_setting(value))}"


def _word_characters_only(text: str) -> str:
    """Make a text fit for a run's name: each run of characters other than letters, digits, `_` and `.` becomes one `_`."""
    return re.sub(r"[^\w.]+", "_", text).strip("_")


def point_arguments(differences: Sequence[SettingDifference], point_index: int) -> str:
    """The arguments with which a reader can train one point of a comparison: `strategy=ddp optim.lr=1e-3`, quoted for a shell.

    Only settings in which the points differ are among them, and none that only says how a run was started or what it
    reports. `point_index`: position of the point's value in each difference.
    """
    arguments = []
    for difference in differences:
        value = difference.values[point_index]
        is_named = difference.is_setting and not is_below(difference.key, KEYS_LEFT_OUT_OF_NAMES)
        if is_named and value != ABSENT_VALUE:
            arguments.append(shlex.quote(setting_as_argument(difference.key, value)))
    return " ".join(arguments)


def setting_as_argument(key: str, value: Any) -> str:
    """Write a setting as on the command line: `optim.lr=1e-3`, `tuning.dora=true`; a choice by its group: `tuning=lora`."""
    group, _, last_part = key.rpartition(".")
    is_choice = last_part == "name" and group in CHOICE_GROUPS
    return f"{group if is_choice else key}={_argument_value(value)}"


def _argument_value(value: Any) -> str:
    """Write the value of a setting as the command line reads it back: `null`, `true`, `[q_proj,v_proj]` or `'a,b.jsonl'`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        entries = [_argument_value(entry) for entry in value]
        return f"[{','.join(entries)}]"
    text = format_setting(value)
    # Unquoted, a comma would make an axis of the value, and a bracket a list.
    needs_quotes = any(char in ",[]{}=:" for char in text) and "'" not in text
    return f"'{text}'" if needs_quotes else text


def is_below(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of the prefixes or below one: `logging.name` is below `logging`."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
